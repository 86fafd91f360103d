"""The README is true: its example runs and learns, its table is the measured one, its links lead somewhere."""

import json
import re
import subprocess
from pathlib import Path

import pytest

from benchmarks import cpu_table, demo_table
from examples import plain_loop
from redit_fast.training import builtin
from tests.make_known_answers import table as known_answers

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def test_the_plain_loop_is_the_readmes_and_teaches_a_model():
    block = re.search(r"```python\n(.*?)```", README, re.DOTALL)[1]
    source = (ROOT / "examples" / "plain_loop.py").read_text()
    assert block.split("import redit_fast as rf\n")[1].strip() in source
    before, after = plain_loop.main()
    assert after > 2 * before


def test_the_tables_are_the_measured_ones():
    assert f"<!-- demo table -->\n{demo_table.table()}\n<!-- end of demo table -->" in README
    assert f"<!-- cpu table -->\n{cpu_table.table()}\n<!-- end of cpu table -->" in README
    assert known_answers() in (ROOT / "docs" / "noise.md").read_text()


@pytest.mark.parametrize(
    ("name", "sentences"),
    [
        ("trl", {"redit-fast": "with our head", "TRL": "with TRL's own"}),
        ("verl", {"redit-fast": "with our head", "verl, torch head": "with verl's torch head",
                  "verl, logits": "with logits"}),
        ("apply", {"apply_to": "under `apply_to`", "transformers": "without"}),
    ],
)  # fmt: skip
def test_the_steps_of_other_trainers_are_the_measured_ones(name, sentences):
    measured = json.loads((ROOT / "benchmarks" / "results" / "cpu" / f"{name}.json").read_text())
    (rows,) = measured["tables"].values()
    assert measured["machine"]["threads"] == 2
    for row in rows[1:]:
        assert f"{row['ms']:.0f} ms and {row['peak_mb']:.0f} MB {sentences[row['name']]}" in README


def test_the_demos_model_is_as_large_as_it_says():
    model, _ = builtin.build(0)
    count = sum(parameter.numel() for parameter in model.parameters())
    assert f"Qwen2 model of {count / 1e6:.2g} million parameters" in README


def test_links_and_pictures_exist():
    links = [link for link in re.findall(r"\]\(([^)]+)\)", README) if not link.startswith("http")]
    assert links and all((ROOT / link).exists() for link in links)


def test_make_asks_pytorchs_cpu_index_where_there_is_no_nvidia_driver():
    def install(driver):
        make = ["make", "-n", "-B", ".venv/.ready", f"NVIDIA={driver}"]
        printed = subprocess.run(make, cwd=ROOT, capture_output=True, text=True, check=True).stdout
        return re.search(r'import torch" 2>/dev/null \|\| \S*pip install (.*)', printed)[1]

    assert "from PyTorch's CPU index" in README
    assert install("").startswith("torch==2.13.0 --no-deps ") and install("").endswith("pytorch.org/whl/cpu")
    assert install("/usr/bin/nvidia-smi") == "torch"


def test_the_modes_of_apply_to_are_the_measured_ones():
    measured = json.loads((ROOT / "benchmarks" / "results" / "cpu" / "apply_hosts.json").read_text())
    rows = [(title, row) for title, table in measured["tables"].items() for row in table[1:]]
    lines = [f"| {title}: {row['name']} | {row['ms']:.0f} | {row['peak_mb']:.0f} |" for title, row in rows]
    table = "\n".join(["| | CPU ms | MB |", "|---|---|---|", *lines])
    assert len(rows) == 5 and measured["machine"]["threads"] == 2 and measured["machine"]["clock"] == "process_time"
    page = (ROOT / "docs" / "apply_to.md").read_text()
    assert f"<!-- apply table -->\n{table}\n<!-- end of apply table -->" in page, table
