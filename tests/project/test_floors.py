"""Imports only go down: the floors of the house, read from the source with `ast`, imports inside functions included."""

import ast
import os
import sys
import tomllib
from pathlib import Path

import pytest

from redit_fast.extras import MODULES
from tests import ROOT

# Module or package -> floor; an import must reach a smaller number, or a sibling in the same package of PACKAGES.
FLOORS = {
    "redit_fast.__main__": 9,
    "redit_fast.cli": 8,
    "redit_fast.commands": 7,
    "redit_fast.benchmarks": 6,
    "redit_fast.selftest": 5,
    "redit_fast.info": 5,
    "redit_fast.training": 5,
    "redit_fast.integrations": 5,
    "redit_fast.gr": 4,
    "redit_fast.ops": 4,
    "redit_fast.packing": 4,
    "redit_fast.backends": 3,
    "redit_fast.backends.reference": 2,
    "redit_fast.backends.cpu": 2,
    "redit_fast.backends.triton": 2,
    "redit_fast.backends.cuda": 2,
    "redit_fast.backends.lists": 2,
    "redit_fast.backends.rows": 2,
    "redit_fast.backends.args": 2,
    "redit_fast.backends.addresses": 2,
    "redit_fast.dither": 1,
    "redit_fast.losses": 1,
    "redit_fast.checks": 0,
    "redit_fast.extras": 0,
    "redit_fast.foreign": 0,
    "redit_fast.known_names": 0,
    "redit_fast.noise": 0,
    "redit_fast.pictures": 0,
    "redit_fast.signals": 0,
    "redit_fast.kernels": 0,
    "redit_fast._cpu": 0,
    "redit_fast._cuda": 0,
}
FLOORS["redit_fast"] = 7  # the public names: they lead to anything below, and floors 5 and up use them
LEAST_FOR_PUBLIC_NAMES = 5
COMPILED = ("redit_fast.kernels", "redit_fast._cpu", "redit_fast._cuda")  # for floor 2 alone
PACKAGES = (
    "redit_fast.benchmarks",
    "redit_fast.training",
    "redit_fast.integrations",
    "redit_fast.gr",
    "redit_fast.ops",
    "redit_fast.packing",
    "redit_fast.losses",
    "redit_fast.kernels",
    "redit_fast.backends.reference",
    "redit_fast.backends.cpu",
    "redit_fast.backends.triton",
    "redit_fast.backends.cuda",
)  # import their own siblings
# what the backends share
OF_BACKENDS = tuple(f"redit_fast.backends.{name}" for name in ("addresses", "args", "lists", "rows"))
OUTSIDE = ("tests", "benchmarks", "tools")
KERNEL_IMPORTS = ("torch", "triton")


def entry(module):
    """The key of FLOORS that `module` belongs to, or None."""
    if module in FLOORS:
        return module
    return next((package for package in PACKAGES if module.startswith(package + ".")), None)


def imports(module, source, is_package, modules):
    """(line, absolute name) of every import in `source`; `from package import module` counts as the module."""
    package = module if is_package else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            parts = package.split(".")
            base = ".".join(parts[: len(parts) - node.level + 1] if node.level else [])
            base = ".".join(filter(None, (base, node.module)))
            for alias in node.names:
                name = f"{base}.{alias.name}"
                yield node.lineno, name if name in modules or name in FLOORS else base


def violations(sources):
    """One sentence per broken rule. `sources`: module name -> (source, whether it is a package)."""
    found, graph = [], {}
    for module, (source, is_package) in sources.items():
        home = entry(module)
        if home is None:
            found.append(f"{module} has no floor: add it to FLOORS in {Path(__file__).name}")
            continue
        for line, name in imports(module, source, is_package, sources):
            top, where = name.split(".")[0], f"{module}:{line}"
            if top in OUTSIDE:
                found.append(f"{where} imports {name}: nothing imports tests, tools or the folder benchmarks/ itself")
            if home == "redit_fast.kernels" and top not in KERNEL_IMPORTS and entry(name) != home:
                found.append(f"{where} imports {name}: kernels/ imports torch, triton and itself only")
            if top != "redit_fast":
                continue
            target = entry(name)
            if target is None:
                found.append(f"{where} imports {name}, which has no floor")
                continue
            graph.setdefault(module, {})[name] = where
            if target in COMPILED and home != target and FLOORS[home] != 2:
                found.append(f"{where} imports {name}: only a backend reaches compiled code")
                continue
            allowed = (
                FLOORS[target] < FLOORS[home]
                or (target == home and home in PACKAGES)
                or (target in OF_BACKENDS and FLOORS[home] == FLOORS[target])
                or (target == "redit_fast" and FLOORS[home] >= LEAST_FOR_PUBLIC_NAMES)
            )
            if not allowed:
                found.append(f"{where} imports {name}: floor {FLOORS[home]} reaches up or sideways to {FLOORS[target]}")
    return found + cycles(graph)


def cycles(graph):
    found, done = [], set()

    def visit(module, path):
        if module in path:
            found.append("imports go in a circle: " + " -> ".join([*path[path.index(module) :], module]))
        elif module not in done:
            for name in graph.get(module, {}):
                visit(name, [*path, module])
            done.add(module)

    for module in graph:
        visit(module, [])
    return found


def package_sources():
    sources = {}
    linked = [(ROOT / name, f"redit_fast.{name}") for name in ("kernels", "benchmarks")]
    for folder, name in ((ROOT / "redit_fast", "redit_fast"), *linked):
        for current, _, files in os.walk(folder):  # does not follow the links in redit_fast/
            for file in filter(lambda file: file.endswith(".py"), files):
                path = Path(current, file)
                parts = [name, *path.relative_to(folder).with_suffix("").parts]
                is_package = parts[-1] == "__init__"
                sources[".".join(parts[:-1] if is_package else parts)] = (path.read_text(), is_package)
    return sources


def test_the_package_keeps_its_floors():
    sources = package_sources()
    assert {"redit_fast", "redit_fast.dither", "redit_fast.backends.cpu", "redit_fast.kernels.element"} <= set(sources)
    assert violations(sources) == []


@pytest.mark.parametrize(
    ("module", "source", "message"),
    [
        ("redit_fast.dither", "from redit_fast.losses.policy import policy_loss", "sideways"),
        ("redit_fast.dither", "import redit_fast.backends", "reaches up"),
        ("redit_fast.losses.policy", "def f():\n    from redit_fast.ops import linear_loss", "reaches up"),
        ("redit_fast.losses.policy", "from ..ops import chunks", "reaches up"),
        ("redit_fast.losses.policy", "import redit_fast as rf", "reaches up"),
        ("redit_fast.backends.cpu", "from .reference import why_not", "sideways"),
        ("redit_fast.ops.token_loss", "from redit_fast.gr import shards", "sideways"),
        ("redit_fast.ops.advantages", "from redit_fast.integrations.apply import apply_to", "reaches up"),
        ("redit_fast.gr.adamw", "import redit_fast as rf", "reaches up"),
        ("redit_fast.ops.linear_loss", "import redit_fast._cpu", "only a backend"),
        ("redit_fast.training.trainer", "from redit_fast.kernels import element", "only a backend"),
        ("redit_fast.training.trainer", "from redit_fast.cli import main", "reaches up"),
        ("redit_fast.training.trainer", "from redit_fast.integrations import trl", "sideways"),
        ("redit_fast.training.trainer", "import tests.conftest", "nothing imports tests"),
        ("redit_fast.cli", "from benchmarks.clock import clock", "nothing imports tests"),
        ("redit_fast.training.trainer", "from redit_fast.benchmarks import clock", "reaches up"),
        ("redit_fast.benchmarks.peers", "from redit_fast import cli", "reaches up"),
        ("redit_fast.kernels.element", "import numpy", "kernels/ imports"),
        ("redit_fast.kernels.element", "from redit_fast import dither", "kernels/ imports"),
        ("redit_fast.novelty", "import torch", "has no floor"),
        ("redit_fast.backends.novelty", "import torch", "has no floor"),
        ("redit_fast.training.a", "from redit_fast.training import a", "circle"),
    ],
)
def test_the_checker_finds_a_broken_rule(module, source, message):
    found = violations({module: (source, False)})
    assert any(message in sentence for sentence in found), found


def test_the_checker_finds_a_circle_and_allows_what_the_floors_allow():
    circle = {
        "redit_fast.training.a": ("from . import b", False),
        "redit_fast.training.b": ("from redit_fast.training.a import x", False),
    }
    assert len(violations(circle)) == 1 and "circle" in violations(circle)[0]
    allowed = {
        "redit_fast": ("from redit_fast.gr.adamw import RegularizedAdamW", True),
        "redit_fast.gr.adamw": ("from redit_fast.gr.regularizer import x\nfrom redit_fast import dither", False),
        "redit_fast.backends.cpu": ("import redit_fast._cpu as _cpu\nfrom ..dither import noise", False),
        "redit_fast.training.trainer": ("import redit_fast as rf\nfrom redit_fast.training import data, config", False),
        "redit_fast.training.data": ("from redit_fast.dither import counter_uniform", False),
        "redit_fast.training.config": ("import yaml", False),
        "redit_fast.cli": ("from redit_fast.training import config\nimport redit_fast", False),
        "redit_fast.kernels.launch": ("import torch\nfrom redit_fast.kernels import element", False),
        "redit_fast.kernels.element": ("import triton.language as tl", False),
    }
    assert violations(allowed) == []


def third_party(source):
    names = {name.split(".")[0] for _, name in imports("redit_fast.x", source, False, {})}
    return names - set(sys.stdlib_module_names) - {"redit_fast"}


TRL_BRINGS = {"transformers", "datasets", "numpy", "safetensors"}
USES = {  # part of the package -> what it imports beside torch, which is all that the package depends on
    "redit_fast.kernels": {"triton"},
    "redit_fast.packing": {"transformers", "flash_attn", "flash_attn_interface"},  # the latter where a GPU has rows
    "redit_fast.integrations": {"transformers", "trl", "verl", "tensordict"},  # which verl brings
    "redit_fast.training": {
        name for extra in ("train", "lora", "math", "data", "wandb", "trackio") for name in MODULES[extra]
    },
    "redit_fast.commands": {"transformers"},
    "redit_fast.benchmarks": {*MODULES["bench"], "trl", "verl", "prefix_grouper", *TRL_BRINGS},
}


def test_each_part_imports_what_its_extra_brings_and_the_rest_torch_alone():
    used = {}
    for name, (text, _) in package_sources().items():
        used.setdefault(entry(name), set()).update(third_party(text) - {"torch"})
    assert {part: names for part, names in used.items() if names} == USES
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert [line.split(">=")[0] for line in project["dependencies"]] == ["torch"]
