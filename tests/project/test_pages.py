"""The Python of every page runs, block after block, with the names that a page leaves to its reader; and the site is
built, in which every public name has its entry."""

import os
import re
import subprocess
import sys

import pytest
from transformers import Trainer, TrainingArguments

import redit_fast as rf
from examples.plain_loop import a_model
from redit_fast.training import builtin
from tests import ROOT
from tests.project.pages import PAGES, README, fenced
from tests.project.test_public_names import OF_HOSTS

pytestmark = pytest.mark.filterwarnings("ignore:.*pin_memory", "ignore:.*gradient_checkpointing")
ELSEWHERE = {  # page, or its block -> what runs it, or why nothing does
    ("README.md", 0): "test_readme.py",
    ("docs/epsilon.md", 1): "tests/integrations/test_accelerate.py",
    ("docs/integrations/openrlhf.md", 0): "needs ray's workers, with GPUs",
    ("docs/integrations/unsloth.md", 0): "Unsloth takes TRL up to 1.15.0; the page says what has run",
    ("docs/integrations/verl.md", 0): "tests/integrations/test_verl.py",
    ("docs/integrations/vllm.md", 0): "tests/training/fake_vllm.py loads the same file",
    ("docs/kernels.md", 0): "compiles a file of the reader's with nvcc",
    ("docs/metrics.md", 0): "test_install.py, after a run",
}
BLOCKS = {(page, number): code for page, text in PAGES.items() for number, code in enumerate(fenced("python", text))}


def of_trl(folder):
    """A reader's model, which is a folder, data and reward; the smallest options of a run, its folder among them."""
    trl = pytest.importorskip("trl", reason="TRL is not installed: its page needs it")
    from datasets import Dataset

    for part in builtin.build(0):
        part.save_pretrained(folder / "model")
    options = {"output_dir": str(folder / "run"), "max_steps": 1, "per_device_train_batch_size": 8,
               "num_generations": 4, "max_completion_length": 4, "logging_steps": 1, "save_strategy": "no",
               "report_to": "none", "use_cpu": True, "bf16": False}  # fmt: skip
    names = {"model": str(folder / "model"), "data": Dataset.from_list([{"prompt": "1 + 1"}] * 8),
             "reward": lambda completions, **_: [float(len(text) % 2) for text in completions],
             "options": options}  # fmt: skip
    args = trl.GRPOConfig(**options)
    trainer = trl.GRPOTrainer(names["model"], reward_funcs=names["reward"], args=args, train_dataset=names["data"])
    return names | {"trainer": trainer}


def of_transformers(folder):
    args = TrainingArguments(str(folder / "run"), max_steps=1, save_strategy="no", report_to="none", use_cpu=True)
    ids = {"input_ids": [1, 2, 3, 4], "labels": [1, 2, 3, 4]}
    return {"rf": rf, "Trainer": Trainer, "model": a_model(), "args": args, "data": [ids] * 8}


NAMES = {
    "docs/quickstart.md": of_trl,
    "docs/integrations/trl.md": of_trl,
    "docs/integrations/transformers.md": of_transformers,
}


@pytest.fixture(autouse=True)
def no_telemetry(monkeypatch):
    monkeypatch.setenv("CI", "1")  # of TRL


@pytest.mark.filterwarnings("ignore:the applied perturbation has cosine")  # what docs/epsilon.md shows
@pytest.mark.parametrize("page", sorted({page for page, _ in BLOCKS.keys() - ELSEWHERE.keys()}))
def test_the_blocks_of_a_page_run(page, tmp_path):
    names = NAMES[page](tmp_path) if page in NAMES else {}
    for block, code in BLOCKS.items():
        if block[0] == page and block not in ELSEWHERE:
            code = re.sub(r'output_dir="\w+"', "**options", code)
            exec(compile(code, f"{page}, block {block[1]}", "exec"), names)


def test_every_block_that_does_not_run_here_is_there():
    assert set(ELSEWHERE) <= set(BLOCKS)


@pytest.mark.parametrize("side", "-+")
def test_both_sides_of_the_readmes_diff_train(side, tmp_path):
    (block,) = fenced("diff", README)
    lines = [line[1:] for line in block.splitlines() if not line or line[0] in (side, " ")]
    code = "\n".join(lines).replace('"run"', "**options")
    assert "**options" in code and ("Redit" in code) == (side == "+")
    names = of_trl(tmp_path)
    exec(compile(code, "README.md", "exec"), names)
    found = {key for entry in names["trainer"].state.log_history for key in entry}
    assert "reward" in found and ({"dither/reward_std", "gr/g1_norm"} <= found) == (side == "+")


def test_the_site_is_built_without_a_warning_and_every_public_name_has_its_entry(tmp_path):
    """Without a network; a name's entry has its signature and what its docstring says."""
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", tmp_path / "site"]
    environment = os.environ | {
        "NO_MKDOCS_2_WARNING": "1",
        "http_proxy": "http://0.0.0.0:1",
        "https_proxy": "http://0.0.0.0:1",
    }
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    pages = "".join(path.read_text() for path in (tmp_path / "site" / "reference").glob("*.html"))
    entries = set(re.findall(r'<h[23] id="([\w.]+)"', pages))
    expected = {f"redit_fast.{name}" for name in rf.__all__}
    expected |= {f"redit_fast.integrations.{host}.{name}" for host, names in OF_HOSTS.items() for name in names}
    expected ^= {
        "redit_fast.integrations.trl.ReditGRPOConfig",
        "redit_fast.integrations.trl.ReditOptions",
    }  # its fields
    assert expected <= entries and pages.count('class="doc doc-contents') >= len(expected)
    assert "fonts.googleapis" not in pages + (tmp_path / "site" / "index.html").read_text()
