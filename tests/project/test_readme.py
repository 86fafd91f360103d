"""The README is true: its example runs and learns, its table is the measured one, its links lead somewhere."""

import json
import re
import subprocess

import pytest

from examples import plain_loop
from redit_fast.training import builtin
from tests import ROOT
from tools import cpu_table, demo_table
from tools.known_answers import table as known_answers

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


def test_the_versions_are_those_that_the_code_names():
    """Of each host the SUPPORTED beside its hooks, and the lower bounds of pyproject.toml."""
    sources = [path.read_text() for path in (ROOT / "redit_fast" / "integrations").rglob("*.py")]
    found = [re.search(r'^SUPPORTED = "(.*)"  # (?:of (\w+))?', source, re.M) for source in sources]
    supported = dict((m[2], m[1]) if m[2] else tuple(m[1].split()) for m in found if m)
    assert set(supported) == {"TRL", "transformers", "verl", "OpenRLHF"}
    names = {"transformers": "transformers.Trainer"}
    for host, versions in supported.items():
        assert f"**{names.get(host, host)}** ({versions.replace('..', ' to ')})" in README
    said = [version for source in sources for version in re.findall(r"supported: (\d[.\d]*\d)", source)]
    assert set(said) == {supported["verl"]}
    assert {f"verl {supported['verl']}"} == set(re.findall(r"\bverl \d+\.\d+\.\d+", README))

    bounds = dict(re.findall(r'"([\w-]+)>=([.\d]+)"', (ROOT / "pyproject.toml").read_text().split("dependencies")[1]))
    assert f"**torch** ({bounds['torch']} or newer)" in README
    assert f"**transformers** ({bounds['transformers']} or newer;" in README


def planned(goal, *variables):
    """The commands that make would run."""
    return subprocess.run(
        ["make", "-n", "-B", goal, *variables], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout


def test_make_asks_pytorchs_cpu_index_where_there_is_no_nvidia_driver():
    def install(driver):
        return re.search(r'import torch" 2>/dev/null \|\| \S*pip install (.*)', planned("demo", f"NVIDIA={driver}"))[1]

    assert "`make` installs torch 2.13.0: where there is no NVIDIA driver,\nfrom PyTorch's CPU index" in README
    assert install("").startswith("torch==2.13.0 --no-deps ") and install("").endswith("pytorch.org/whl/cpu")
    assert install("/usr/bin/nvidia-smi") == "torch==2.13.0"


def installs(plan):
    """(environment, what is installed there), torch and the second Triton aside."""
    found = re.findall(r"^(\S+)/bin/pip install (.*)", plan, re.M)
    return [(venv, words) for venv, words in found if "triton==3.6" not in words]


def test_make_installs_what_is_locked_and_the_demo_only_what_it_needs():
    demo, test = (installs(planned(goal, "NVIDIA=")) for goal in ("demo", "test"))
    assert {venv for venv, _ in test} == {".venv"} and all(words.startswith("-c tests/lock.txt ") for _, words in test)
    assert test[: len(demo)] == demo and demo[-1][1].endswith("--no-build-isolation -e .")
    assert not re.search("packages.txt|verl", str(demo)) and "-r tests/packages.txt" in str(test)
    newest = planned("test-newest", "NVIDIA=")
    assert {venv for venv, _ in installs(newest)} == {".venv-newest"} and "lock.txt" not in newest
    assert "-c tests/lock.txt" in planned("lint", "NVIDIA=") and "-c tests/lock.txt" in planned("sanitize", "NVIDIA=")


def test_the_lock_leaves_triton_to_torchs_cuda_build():
    plan = planned("test", "NVIDIA=yes")
    assert {words.split()[1] for _, words in installs(plan)} == {"build/lock.txt"}
    assert 'grep -v "^triton==" tests/lock.txt > build/lock.txt' in plan


def test_the_modes_of_apply_to_are_the_measured_ones():
    measured = json.loads((ROOT / "benchmarks" / "results" / "cpu" / "apply_hosts.json").read_text())
    rows = [(title, row) for title, table in measured["tables"].items() for row in table[1:]]
    lines = [f"| {title}: {row['name']} | {row['ms']:.0f} | {row['peak_mb']:.0f} |" for title, row in rows]
    table = "\n".join(["| | CPU ms | MB |", "|---|---|---|", *lines])
    assert len(rows) == 5 and measured["machine"]["threads"] == 2 and measured["machine"]["clock"] == "process_time"
    page = (ROOT / "docs" / "apply_to.md").read_text()
    assert f"<!-- apply table -->\n{table}\n<!-- end of apply table -->" in page, table
