"""What no file of the package may contain, read with `ast`."""

import ast

import pytest

from tests import ROOT
from tests.project.test_floors import package_sources, third_party

UNSAFE_MODULES = ("pickle", "cPickle", "dill", "cloudpickle", "marshal", "shelve")
UNSAFE_NAMES = ("eval", "exec")
UNSAFE_ATTRIBUTES = (("torch", "load"), ("yaml", "unsafe_load"), ("yaml", "full_load"), ("os", "system"))
BROAD = ("Exception", "BaseException")


def broken_rules(source):
    """(line, what) of everything that is not allowed."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            names += [f"{node.module}.{alias.name}" for alias in node.names] if isinstance(node, ast.ImportFrom) else []
            for name in names:
                if name.split(".")[0] in UNSAFE_MODULES or tuple(name.split(".")) in UNSAFE_ATTRIBUTES:
                    yield node.lineno, f"imports {name}"
        elif isinstance(node, ast.Name) and node.id in UNSAFE_NAMES:
            yield node.lineno, node.id
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            if (node.value.id, node.attr) in UNSAFE_ATTRIBUTES:
                yield node.lineno, f"{node.value.id}.{node.attr}"
        elif isinstance(node, ast.keyword) and node.arg == "trust_remote_code":
            if not (isinstance(node.value, ast.Constant) and node.value.value is False):
                yield node.value.lineno, "trust_remote_code"
        elif isinstance(node, ast.ExceptHandler):
            caught = node.type.elts if isinstance(node.type, ast.Tuple) else [node.type]
            for exception in caught:
                if exception is None or getattr(exception, "id", "") in BROAD:
                    yield node.lineno, "catches everything"


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
        "eval('1')",
        "run = exec",
        "torch.load(path, weights_only=True)",
        "from torch import load",
        "Model.from_pretrained(path, trust_remote_code=True)",
        "Model.from_pretrained(path, trust_remote_code=flag)",
        "yaml.unsafe_load(text)",
        "try:\n    f()\nexcept:\n    pass",
        "try:\n    f()\nexcept Exception as error:\n    print(error)",
        "try:\n    f()\nexcept (ValueError, BaseException):\n    return",
    ],
)
def test_the_checker_finds_each(source):
    assert list(broken_rules(source))


def test_the_checker_leaves_honest_code_alone():
    ours = "model.eval()\ntry:\n    load(trust_remote_code=False)\nexcept (ValueError, OSError):\n    pass\nst.load(b)"
    assert list(broken_rules(ours)) == []


def test_setup_stays_small_and_runs_no_other_program():
    source = (ROOT / "setup.py").read_text()
    assert len(source.splitlines()) < 120
    assert third_party(source) == {"pybind11", "setuptools"} and "subprocess" not in source
