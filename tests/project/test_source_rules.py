"""What no file of the package may contain and ruff's rules (S, BLE) do not know, read with `ast`."""

import ast
import json
import re
import subprocess
import sys

import pytest

from tests import ROOT
from tests.project.test_floors import package_sources, third_party

UNSAFE_MODULES = ("pickle", "cPickle", "dill", "cloudpickle", "marshal", "shelve")
UNSAFE_CALLS = ("torch.load", "yaml.unsafe_load", "yaml.full_load")


def broken_rules(source):
    """(line, what) of everything that is not allowed."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            names += [f"{node.module}.{alias.name}" for alias in node.names] if isinstance(node, ast.ImportFrom) else []
            for name in names:
                if name.split(".")[0] in UNSAFE_MODULES or name in UNSAFE_CALLS:
                    yield node.lineno, f"imports {name}"
        elif isinstance(node, ast.Attribute) and ast.unparse(node) in UNSAFE_CALLS:
            yield node.lineno, ast.unparse(node)
        elif isinstance(node, ast.keyword) and node.arg == "trust_remote_code":
            if not (isinstance(node.value, ast.Constant) and node.value.value is False):
                yield node.value.lineno, "trust_remote_code"


def test_ranks_meet_before_they_leave_and_no_thread_of_gloo_is_left_to_an_ending_python():
    """tests/ranks.py says why. A fake group has no threads."""
    sources = [path.read_text() for folder in ("tests", "examples") for path in (ROOT / folder).rglob("*.py")]
    several = r"(?m)^(?!.*\"fake\").*(world_size=(?!1\b)\w|num_processes == [2]|get_world[_]size)"
    ranks = [each for each in sources if re.search(several, each)]
    assert len(ranks) == 6
    for source in ranks:
        holds_threads = re.search("DistributedDataParallel|fully_shard", source)
        end = r"os\._exit\(" if holds_threads else r"destroy_process_group\("
        assert re.search(rf"meet_and_end\(|\.barrier\((.*\n)+.*{end}", source)


def test_the_package_contains_nothing_unsafe():
    sources = package_sources()
    found = {module: list(broken_rules(source)) for module, (source, _) in sources.items()}
    assert found == {module: [] for module in sources}


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from pickle import loads",
        "def f():\n    import cloudpickle",
        "torch.load(path, weights_only=True)",
        "from torch import load",
        "yaml.unsafe_load(text)",
        "Model.from_pretrained(path, trust_remote_code=True)",
        "Model.from_pretrained(path, trust_remote_code=flag)",
    ],
)
def test_the_checker_finds_each(source):
    assert list(broken_rules(source))
    assert not list(broken_rules("load(trust_remote_code=False)"))


@pytest.mark.parametrize(
    ("source", "code"),
    [
        ("eval(text)", "S307"),
        ("exec(text)", "S102"),
        ("import os\nos.system(text)", "S605"),
        ("try:\n    f()\nexcept:\n    pass", "E722"),
        ("try:\n    f()\nexcept Exception as error:\n    print(error)", "BLE001"),
        ("try:\n    f()\nexcept (ValueError, BaseException):\n    g()", "BLE001"),
    ],
)
def test_make_lint_finds_each(source, code):
    command = [sys.executable, "-m", "ruff", "check", "--stdin-filename", "redit_fast/cli.py", "--output-format=json"]
    done = subprocess.run([*command, "-"], input=source + "\n", cwd=ROOT, capture_output=True, text=True)
    assert code in [found["code"] for found in json.loads(done.stdout)]


def test_setup_stays_small_and_runs_no_program_but_nvcc():
    """test_setup_cuda.py sees which programs run."""
    source, cuda = (ROOT / "setup.py").read_text(), (ROOT / "setup_cuda.py").read_text()
    assert len(source.splitlines()) < 120 and len(cuda.splitlines()) < 140
    assert third_party(source) == {"pybind11", "setuptools", "setup_cuda"} and third_party(cuda) == {"setuptools"}
    assert "subprocess" not in source
    assert sorted(re.findall(r"subprocess\.(\w+)", cuda)) == ["PIPE", "STDOUT", "run"]
