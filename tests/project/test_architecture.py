"""docs/architecture.md: every hop of its lists is there, and a call on the CPU takes them in that order."""

import ast
import re
import sys

import pytest
import torch

import redit_fast as rf
from redit_fast import backends
from tests import ROOT

PAGE = (ROOT / "docs" / "architecture.md").read_text()
MOST_HOPS = 9
HOP = re.compile(r"^\d+\. `([^`]+)` `([^`]+)`: \S", re.M)


def lists():
    """Heading -> the hops (file, function) below it."""
    parts = re.split(r"^### (.*)$", PAGE, flags=re.M)[1:]
    return {name: HOP.findall(text) for name, text in zip(parts[::2], parts[1::2], strict=True)}


LISTS = lists()


def functions(path):
    """The functions that a file defines, methods as Class.method, in C++ as Class::method where it is written so."""
    source = path.read_text()
    if path.suffix != ".py":
        return set(re.findall(r"^[A-Za-z][^;=()\n]*?([\w:]+)\((?![^{]*;\n)", source, re.M))
    found = set()
    for node in ast.parse(source).body:
        members = node.body if isinstance(node, ast.ClassDef) else [node]
        prefix = f"{node.name}." if isinstance(node, ast.ClassDef) else ""
        found |= {prefix + member.name for member in members if isinstance(member, ast.FunctionDef)}
    return found


def test_there_are_four_lists_of_at_most_nine_hops():
    assert list(LISTS) == ["logits -> loss", "hidden -> loss", "rewards -> advantages", "gradient -> step"]
    for name, hops in LISTS.items():
        assert 1 < len(hops) <= MOST_HOPS, name
        assert len(hops) == len(re.findall(r"^\d+\. ", PAGE.split(f"### {name}\n")[1].split("###")[0], re.M)), name


@pytest.mark.parametrize("name", LISTS)
def test_each_named_function_is_in_the_named_file(name):
    absent = [f"{file}: {function}" for file, function in LISTS[name] if function not in functions(ROOT / file)]
    assert absent == []


def test_a_function_that_is_only_called_or_declared_is_not_found(tmp_path):
    (tmp_path / "a.py").write_text("def f():\n    g()\n\n\nclass C:\n    def m(self):\n        pass\n")
    (tmp_path / "a.cpp").write_text("void declared(int x);\nvoid C::defined(int x) {\n    called(x);\n}\n")
    assert functions(tmp_path / "a.py") == {"f", "C.m"} and functions(tmp_path / "a.cpp") == {"C::defined"}


def logits_to_loss():
    logits = torch.randn(4, 3, 11, requires_grad=True)
    rf.grpo_loss(logits, torch.randint(11, (4, 3)), torch.randn(4), config=rf.LossConfig("dapo"))


def hidden_to_loss():
    hidden, weight = (torch.randn(*shape, requires_grad=True) for shape in ((4, 3, 5), (11, 5)))
    rf.linear_grpo_loss(hidden, weight, torch.randint(11, (4, 3)), torch.randn(4), config=rf.LossConfig("dapo"))


def rewards_to_advantages():
    rf.group_advantages(torch.rand(8), group_size=4, dither=rf.Dither(), step=1)


def gradient_to_step():
    weight = torch.nn.Parameter(torch.randn(5))
    optimizer = rf.RegularizedAdamW([weight], gamma=2e-3, epsilon=1e-3)
    weight.square().sum().backward()
    assert optimizer.perturb()
    weight.square().sum().backward()
    optimizer.step()


def calls_of(call):
    """(file, function) of every Python call below redit_fast/, in order."""
    found = []

    def note(frame, event, _):
        if event == "call" and frame.f_code.co_filename.startswith(str(ROOT / "redit_fast")):
            file = frame.f_code.co_filename[len(str(ROOT)) + 1 :]
            found.append((file, frame.f_code.co_qualname))

    sys.setprofile(note)
    try:
        call()
    finally:
        sys.setprofile(None)
    return found


@pytest.mark.parametrize(
    ("name", "call"),
    list(zip(LISTS, (logits_to_loss, hidden_to_loss, rewards_to_advantages, gradient_to_step), strict=True)),
)
def test_a_call_takes_the_hops_in_their_order(name, call):
    assert backends.refusal("adamw", "cpu", torch.device("cpu")) is None  # the lists are those of the C++ backend
    made = iter(calls_of(call))
    for hop in LISTS[name]:
        if hop[0].endswith(".py"):
            assert hop in made, f"{name}: {hop} is not called, or before the hop above it"
