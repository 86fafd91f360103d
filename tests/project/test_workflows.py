"""What runs elsewhere can be run here: a workflow's steps are make's targets. And every file says the same version."""

import re
import tomllib

import pytest
import yaml

import redit_fast
from tests import ROOT

WORKFLOWS = {path.name: yaml.safe_load(path.read_text()) for path in (ROOT / ".github" / "workflows").iterdir()}
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PYTHONS = {line.rpartition(" ")[2] for line in PYPROJECT["project"]["classifiers"] if re.search(r":: 3\.\d+$", line)}


def steps(workflow):
    return [step for job in workflow["jobs"].values() for step in job["steps"]]


@pytest.mark.parametrize("name", WORKFLOWS)
def test_a_step_is_a_target_of_make_or_an_action_with_its_version(name):
    goals = re.search(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.M)[1].split()
    commands = [step["run"] for step in steps(WORKFLOWS[name]) if "run" in step]
    assert commands and all(re.fullmatch("make (\\S+)", command)[1] in goals for command in commands)
    assert all(re.search(r"@v\d+$", step["uses"]) for step in steps(WORKFLOWS[name]) if "uses" in step)
    assert WORKFLOWS[name]["permissions"] == {"contents": "read"}
    assert all("timeout-minutes" in job for job in WORKFLOWS[name]["jobs"].values())


def test_together_they_run_what_a_release_needs():
    commands = {step["run"] for workflow in WORKFLOWS.values() for step in steps(workflow) if "run" in step}
    assert commands == {f"make {goal}" for goal in ("lint", "check", "test", "sanitize", "docs", "wheels")}
    matrix = WORKFLOWS["test.yml"]["jobs"]["fast"]["strategy"]["matrix"]
    built = {f"{tag[2]}.{tag[3:5]}" for tag in PYPROJECT["tool"]["cibuildwheel"]["build"]}
    assert set(matrix["python"]) == PYTHONS == built
    assert len(WORKFLOWS["wheels.yml"]["jobs"]["wheels"]["strategy"]["matrix"]["runner"]) == 3


def test_the_version_is_everywhere_the_same():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    (first, *_) = re.findall(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.M)
    assert citation["version"] == first == redit_fast.__version__


def test_the_extras_begin_at_the_versions_that_the_integrations_support():
    from tools import tables

    extras = PYPROJECT["project"]["optional-dependencies"]
    for host, versions in tables.supported().items():
        assert extras[host.lower()][0].endswith(f">={versions.split()[0]}"), host
