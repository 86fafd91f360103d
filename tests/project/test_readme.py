"""README.md and docs/ are true: snippets run, tables and pictures are the measured ones, links lead somewhere.

Bound are table cells, headings and fenced snippets, never sentences.
"""

import ast
import json
import os
import re
import shlex
import subprocess
import tomllib
from importlib.util import find_spec
from typing import get_args

import pytest
import yaml
from PIL import Image

from examples import plain_loop
from redit_fast import backends, cli
from redit_fast.losses.config import LossType
from redit_fast.training.config import TrainConfig
from tests import ROOT
from tests.project.pages import PAGES, README, fenced
from tools import bench_tables, measure, step_picture, tables
from tools.known_answers import table as known_answers

HOSTS = {"TRL": "trl", "transformers": "transformers", "verl": "verl", "OpenRLHF": "openrlhf"}
EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
every_page = pytest.mark.parametrize("page", PAGES)


def test_the_readme_is_read_in_two_minutes():
    assert len(README.splitlines()) <= 140 and len(README.split()) <= 1000  # with code and tables


def test_the_plain_loop_is_the_readmes_and_teaches_a_model():
    (block,) = fenced("python", README)
    source = (ROOT / "examples" / "plain_loop.py").read_text()
    assert block.split("import redit_fast as rf\n")[1].strip() in source
    before, after = plain_loop.main()
    assert after > 2 * before


@pytest.mark.parametrize(("page", "marker"), tables.BLOCKS)
def test_the_tables_are_the_measured_ones(page, marker):
    expected = tables.block(marker, tables.BLOCKS[page, marker]())
    assert PAGES[page].count(expected) == 1, f"{page}, {marker}: run python -m tools.tables"


def test_every_marked_table_of_these_pages_is_written_by_the_tool():
    pages = {page for page, _ in tables.BLOCKS}
    marked = {(page, marker) for page in pages for marker in re.findall(r"<!-- (?!end of)(.*) -->", PAGES[page])}
    assert marked == set(tables.BLOCKS)


def test_the_known_answers_are_the_computed_ones():
    assert known_answers() in PAGES["docs/noise.md"]


def test_the_picture_shows_the_measured_steps():
    shown = json.loads(Image.open(step_picture.PICTURE).text["Description"])
    assert shown == step_picture.shown() and len(shown) == 5, "run python -m tools.step_picture"
    time, memory = step_picture.figure().axes
    assert [bar.get_width() for bar in time.patches] == [row["s"] for row in shown]
    assert [bar.get_width() for bar in memory.patches] == [row["mb"] for row in shown]
    for axes in (time, memory):
        assert axes.get_xlim()[0] == 0 and axes.get_title() and axes.get_xlabel()


@pytest.mark.parametrize("name", measure.COMMANDS)
def test_the_results_were_measured_on_two_threads_or_one_for_whole_steps_and_say_by_which_clock(name):
    machine = json.loads((step_picture.RESULTS / f"{name}.json").read_text())["machine"]
    alone = name == "step" and machine["clock"] == "process_time"  # beside other work two threads wait for each other
    assert machine["threads"] == (1 if alone else 2) and machine["clock"] in bench_tables.CLOCKS
    assert step_picture.unit("step") in step_picture.figure().axes[0].get_xlabel()


def test_the_status_table_knows_every_backend_and_primitive_and_alone_says_what_has_not_run():
    assert set(backends.NAMES) <= set(tables.RUN)
    assert {name for names in tables.OPS.values() for name in names} == set(backends.PRIMITIVES)
    assert [page for page, text in PAGES.items() if "no GPU yet" in text] == ["README.md", "CHANGELOG.md"]
    assert README.count("no GPU yet") == tables.status().count("no GPU yet") == 1


def test_a_backend_without_a_primitive_is_not_said_to_have_it():
    assert tables._state("reference", ("addmm",)) == "yes" and tables._state("cuda", ("addmms",)) == "not yet"
    assert tables._state("reference", ("addmm", "addm")) == "not yet"


@every_page
def test_commands_and_snippets_of_a_page_can_be_typed(page):
    goals = re.search(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.M)[1].split()
    text = PAGES[page]
    commands = "\n".join([*fenced("bash", text), *re.findall(r"`([^`\n]+)`", text)]).replace("\\\n", " ")
    assert set(re.findall(r"^make ([\w-]+)", commands, re.M)) <= set(goals)
    for words in re.findall(r"^(?:torchrun .* -m redit_fast|redit-fast) (\w.*)", commands, re.M):
        parse(shlex.split(words, comments=True))
    for module in re.findall(r"python -m ((?:examples|benchmarks|tools|redit_fast)[\w.]*)", commands):
        assert find_spec(module) is not None, module
    for extras in re.findall(r"(?:redit-fast|\"\.)\[([\w,]+)\]", commands):
        assert set(extras.split(",")) <= set(EXTRAS)
    for file in re.findall(r"\bexamples/[\w./]+", commands):
        assert (ROOT / file).exists(), file
    for snippet in fenced("python", text):
        ast.parse(snippet)
    for settings in fenced("yaml", text):
        assert set(yaml.safe_load(settings)) <= set(TrainConfig.model_fields)


def parse(words):
    """As the command line does; of a command that stands there without arguments the name alone."""
    parser, commands = cli._parsers()
    assert words[0] in commands
    if words[1:] not in ([], ["--help"]):
        cli.FLAGS.get(words[0], lambda _: None)(commands[words[0]])
        _, unknown = parser.parse_known_args(words)
        assert set(unknown) <= {"..."}, (words, unknown)


@pytest.mark.parametrize(
    "words", ["trian", "train --gr-gama 1", "eval a --greedy", "generate --samples 4", "info --yaml"]
)
def test_a_command_that_is_not_there_is_found(words):
    with pytest.raises((AssertionError, SystemExit)):
        parse(words.split())


def test_the_targets_of_contributing_are_makes():
    goals = re.search(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.M)[1].split()
    assert sorted(re.findall(r"^\| `make ([\w-]+)", PAGES["CONTRIBUTING.md"], re.M)) == sorted(goals)


def test_the_versions_are_those_that_the_code_names():
    """Of each host the SUPPORTED beside its hooks, and the lower bounds of pyproject.toml."""
    supported = tables.supported()
    assert set(supported) == set(HOSTS) == set(tables.HOSTS)
    for host, page in HOSTS.items():
        assert PAGES[f"docs/integrations/{page}.md"].startswith(f"# {host} {supported[host]}\n")
    sources = [path.read_text() for path in (ROOT / "redit_fast" / "integrations").rglob("*.py")]
    said = [version for source in sources for version in re.findall(r"supported: (\d[.\d]*\d)", source)]
    assert set(said) == {supported["verl"]}
    texts = "".join(PAGES.values())
    assert {f"verl {supported['verl']}"} == set(re.findall(r"\bverl \d+\.\d+\.\d+", texts))

    bounds = tables.lower_bounds()
    assert set(bounds) == set(tables.DEPENDENCIES)
    python = re.search(r'requires-python = ">=(.*)"', (ROOT / "pyproject.toml").read_text())[1]
    assert f"Python {python}, torch {bounds['torch']} or newer" in fenced("bash", README)[0]


def test_the_readme_counts_the_losses():
    assert f"| `policy_loss` | {len(get_args(LossType))} losses " in README


def planned(goal, *variables):
    """The commands that make would run, without the variables of the make that runs these tests."""
    environment = {name: value for name, value in os.environ.items() if name not in ("MAKEFLAGS", "MAKEOVERRIDES")}
    command = ["make", "-n", "-B", goal, *variables]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True).stdout


def test_make_asks_pytorchs_cpu_index_where_there_is_no_nvidia_driver():
    def install(driver):
        return re.search(r'import torch" 2>/dev/null \|\| \S*pip install (.*)', planned("demo", f"NVIDIA={driver}"))[1]

    assert install("").startswith("torch==2.13.0 --no-deps ") and install("").endswith("pytorch.org/whl/cpu")
    assert install("/usr/bin/nvidia-smi") == "torch==2.13.0"


def installs(plan):
    """(environment, what is installed there), torch and the second Triton aside."""
    found = re.findall(r"^(\S+)/bin/pip install (.*)", plan, re.M)
    return [(venv, words) for venv, words in found if "triton==3.6" not in words]


def test_make_installs_what_is_locked_and_the_demo_only_what_it_needs():
    demo, test = (installs(planned(goal, "NVIDIA=")) for goal in ("demo", "test"))
    locks = ("-c .venv/lock.txt ", "-c tests/lock.txt -r docs/packages.txt")
    assert {venv for venv, _ in test} == {".venv"} and all(words.startswith(locks) for _, words in test)
    assert test[: len(demo)] == demo and demo[-1][1].endswith('--no-build-isolation -e ".[train]"')
    assert not re.search("packages.txt|verl", str(demo)) and "-r tests/packages.txt" in str(test)
    newest = installs(planned("test-newest", "NVIDIA="))
    assert {venv for venv, _ in newest} == {".venv-newest"} and "lock.txt" not in str(newest)
    assert all("-c .venv/lock.txt" in planned(goal, "NVIDIA=") for goal in ("lint", "sanitize"))


@pytest.mark.parametrize("needs", ["filelock, triton", "filelock"])
def test_the_lock_leaves_triton_to_a_torch_that_brings_it(tmp_path, needs):
    """An environment whose pip says what torch requires, as its CUDA build and its CPU build do."""
    (tmp_path / "bin").mkdir()
    for name, says in (("python", ""), ("pip", f"echo 'Requires: {needs}'")):
        (tmp_path / "bin" / name).write_text(f"#!/bin/sh\n{says}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    subprocess.run(["make", "-s", f"{tmp_path}/lock.txt", f"VENV={tmp_path}"], cwd=ROOT, check=True)
    everything = (ROOT / "tests" / "lock.txt").read_text()
    left_out = set(everything.splitlines()) - set((tmp_path / "lock.txt").read_text().splitlines())
    assert left_out == set(re.findall("^triton==.*$", everything, re.M) if "triton" in needs else ())
