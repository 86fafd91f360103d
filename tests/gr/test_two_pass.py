"""The two passes without an optimizer, their options, and what their classes declare."""

import ast
import re
from dataclasses import FrozenInstanceError, fields

import pytest
import torch
from torch import nn

import redit_fast as rf
from redit_fast.gr.two_pass import Copies, TwoPass
from redit_fast.integrations.options import GROptions
from redit_fast.training.config import TrainConfig
from redit_fast.training.config_file import load
from redit_fast.training.setup import optimizer
from tests import ROOT
from tests.gr.test_regularize import loss_of, network


def gradient(model, x):
    return torch.autograd.grad(loss_of(model, x), list(model.parameters()))


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("scale", [None, 2.0**10])
def test_the_combined_gradient_is_the_hand_written_one_at_any_scale_of_the_loss(backend, keep, scale):
    model, x, gamma, epsilon = network(), torch.randn(8, 16), 0.3, 0.1
    params = list(model.parameters())
    first, start = gradient(model, x), [p.detach().clone() for p in params]
    with torch.no_grad():
        for p, g in zip(params, first):
            p += epsilon * g
    second = gradient(model, x)
    with torch.no_grad():
        for p, old in zip(params, start):
            p.copy_(old)
    expected = [g1 + gamma / epsilon * (g2 - g1) for g1, g2 in zip(first, second)]

    gr = rf.GR(gamma=gamma, epsilon=epsilon, keep_first_grad=keep)
    passes = TwoPass([{"params": params}], gr, Copies())
    loss_scale = None if scale is None else torch.tensor(scale, dtype=torch.float64)
    (loss_of(model, x) * (scale or 1)).backward()
    with passes.perturb(loss_scale) as wanted:
        assert wanted and passes.perturbed and not torch.equal(params[0], start[0])
        (loss_of(model, x) * (scale or 1)).backward()
    with passes.combine() as combined:
        assert all(map(torch.equal, params, start)) and combined.finite
        for p, g in zip(params, expected):
            torch.testing.assert_close(p.grad * combined.factor / (scale or 1), g.double(), rtol=1e-4, atol=1e-6,
                                       check_dtype=False)  # fmt: skip
    norm = torch.cat([g.flatten() for g in expected]).norm().item()
    assert combined.norm.item() == pytest.approx(norm, rel=1e-5)
    found = passes.metrics()
    assert found["gr/g1_norm"] == pytest.approx(torch.cat([g.flatten() for g in first]).norm().item(), rel=1e-5)
    assert found["gr/epsilon"] == epsilon and passes.state_dict() == {"attempts": 1, "completed": 1, "skipped": 0}


@pytest.mark.parametrize("where", ["second pass", "step"])
def test_an_exception_of_the_callers_puts_theta_back(where):
    model, x = network(), torch.randn(8, 16)
    params = list(model.parameters())
    start = [p.detach().clone() for p in params]
    passes = TwoPass([{"params": params}], rf.GR(gamma=0.5, epsilon=0.5), Copies())
    loss_of(model, x).backward()
    with pytest.raises(OSError):
        with passes.perturb():
            loss_of(model, x).backward()
            if where == "second pass":
                raise OSError
        with passes.combine():
            with torch.no_grad():
                params[0].zero_()
            raise OSError
    assert all(map(torch.equal, params, start)) and not passes.perturbed
    assert all(p.grad is None for p in params) and passes.state_dict()["attempts"] == 0
    with pytest.raises(RuntimeError, match=r"without perturb\(\)"):
        with passes.combine():
            pass


def test_a_step_without_a_second_pass_is_the_gradient_itself():
    model, x = network(), torch.randn(8, 16)
    passes = TwoPass([{"params": list(model.parameters())}], rf.GR(every_k_steps=2), Copies())
    passes.attempts = 1
    loss_of(model, x).backward()
    expected = [p.grad.clone() for p in model.parameters()]
    assert not passes.perturb()
    with passes.combine() as combined:
        assert combined.factor == 1 and combined.moved == []
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), expected))
    assert passes.store.copies == {} and passes.attempts == 2


def test_gamma_at_a_step():
    gr = rf.GR(gamma=0.5, gamma_warmup_steps=4, every_k_steps=3)
    assert [gr.gamma_at(step) for step in range(8)] == [0.0, 0.0, 0.0, 0.375, 0.0, 0.0, 0.5, 0.0]
    with pytest.raises(FrozenInstanceError):
        gr.gamma = 1.0


@pytest.mark.parametrize("wide", [2.0**-64, 2.0**64])
@pytest.mark.parametrize("keep", [False, True])
def test_gamma_far_from_epsilon_still_steps(wide, keep):
    """Their quotient multiplies the gradients, as its inverse does: beyond float32 each step would be skipped."""
    model, x = network(), torch.randn(8, 16)
    before = [p.detach().clone() for p in model.parameters()]
    opt = rf.RegularizedAdamW(model.parameters(), gamma=1e-3 * wide, gamma_warmup_steps=2**32 - 1, keep_first_grad=keep)
    for _ in range(2):
        loss_of(model, x).backward()
        if opt.perturb():
            loss_of(model, x).backward()
        opt.step()
        opt.zero_grad()
    assert opt.metrics()["gr/skipped_steps"] == 0
    assert all(p.isfinite().all() and not torch.equal(p, old) for p, old in zip(model.parameters(), before))


@pytest.mark.parametrize("gamma, epsilon", [(1e-50, 1e-3), (1e-3, 1e-30), (1e-30, "auto"), (1e30, 1e-3), (1e-20, 1e9)])
def test_gamma_beyond_what_multiplies_a_gradient_is_refused(gamma, epsilon):
    got = f"of epsilon ({epsilon}), since gradients are multiplied by their quotient, got {gamma}"
    sentence = rf"^(gr_)?gamma:? must be 0 or within a factor of 2\*\*64 {re.escape(got)}$"
    with pytest.raises(ValueError, match=sentence):
        rf.GR(gamma=gamma, epsilon=epsilon)
    with pytest.raises(ValueError, match=sentence):
        load(None, {"gr_gamma": gamma, "gr_epsilon": epsilon})
    opt = rf.RegularizedAdamW(network().parameters(), gamma=0.0, epsilon=epsilon)
    with pytest.raises(ValueError, match=sentence):
        opt.gamma = gamma
    if epsilon != "auto":
        with pytest.raises(ValueError, match=sentence):
            GROptions(gr_gamma=gamma, gr_epsilon=epsilon).gr()


def test_the_flat_options_are_those_of_gr_with_the_same_names_and_defaults():
    """But for what a host knows itself (compute_dtype), or has no use for (old log-probs outside of TRL)."""
    defaults = {f"gr_{field.name}": field.default for field in fields(rf.GR) if field.name != "compute_dtype"}
    trainer = {name: field.default for name, field in TrainConfig.model_fields.items() if name.startswith("gr_")}
    assert trainer == defaults
    of_hosts = {field.name: field.default for field in fields(GROptions)}
    assert of_hosts.pop("gr_optimizer", "missing") is None
    assert of_hosts == {name: v for name, v in defaults.items() if name != "gr_pass2_ratio"} | {"gr_gamma": 0.0}


OTHERS = {"gamma": 0.25, "epsilon": 0.125, "normalized": True, "perturb_max_norm": 3.0, "rounding": "nearest",
          "keep_first_grad": True, "gamma_warmup_steps": 7, "every_k_steps": 5}  # fmt: skip


@pytest.mark.parametrize("name", OTHERS)
def test_every_flat_option_reaches_gr(name):
    value = OTHERS[name]
    assert value != getattr(rf.GR(), name)
    expected = rf.GR(**{"gamma": 0.0, name: value})
    assert GROptions(**{f"gr_{name}": value}).gr() == expected
    model = nn.Module()
    model.layers = nn.ModuleList([nn.Linear(2, 2)])
    ours = optimizer(load(None, {"gr_gamma": 0.0, f"gr_{name}": value}), model)
    assert ours.gr == expected and getattr(ours, name) == value
    plain = torch.optim.SGD(model.parameters(), 0.1)
    assert rf.GradientRegularizer(plain, **{"gamma": 0.0, name: value}).gr == expected
    changed = rf.RegularizedAdamW(model.parameters(), gamma=0.0)
    setattr(changed, name, value)
    assert changed.gr == expected
    for wrong in (-1.0, "wrong"):
        with pytest.raises((ValueError, TypeError), match=f"^{name} must be"):
            setattr(changed, name, wrong)
    assert changed.gr == expected


def test_a_number_that_float32_has_not_is_named_with_its_flat_name(tmp_path):
    (tmp_path / "job.yaml").write_text("seed: 1\ngr_perturb_max_norm: 1.0e-60\n")
    with pytest.raises(ValueError, match=r"job.yaml:2: gr_perturb_max_norm: must be finite and above 0 in float32"):
        load(tmp_path / "job.yaml")


def attributes_set(function):
    """The names of `self.name = ...`, also in tuples, augmented, annotated, and of object.__setattr__(self, "name")."""
    for node in ast.walk(function):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            if isinstance(node.value, ast.Name) and node.value.id == "self":
                yield node.attr
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("object.__setattr__", "setattr"):
            target, name = node.args[-3:-1] if len(node.args) == 3 else (None, None)
            if isinstance(target, ast.Name) and target.id == "self":
                yield name.value if isinstance(name, ast.Constant) else ast.unparse(name)


def undeclared(source, known):
    """Class.method sets name: what neither constructor nor class body declares, nor those of the bases in `known`."""
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.ClassDef):
            continue
        declared = set().union(*(known.get(ast.unparse(base), set()) for base in node.bases))
        for part in node.body:
            if isinstance(part, ast.FunctionDef):
                if part.name == "__init__":
                    declared |= set(attributes_set(part))
                if any(isinstance(each, ast.Attribute) and each.attr == "setter" for each in part.decorator_list):
                    declared.add(part.name)
            elif isinstance(part, ast.AnnAssign | ast.Assign):
                targets = part.targets if isinstance(part, ast.Assign) else [part.target]
                declared |= {name.id for target in targets for name in ast.walk(target) if isinstance(name, ast.Name)}
        known[node.name] = declared
        for part in node.body:
            if isinstance(part, ast.FunctionDef):
                yield from (f"{node.name}.{part.name} sets {name}" for name in set(attributes_set(part)) - declared)


def test_no_method_sets_what_the_constructor_does_not_declare():
    known, found, sources = {}, [], sorted((ROOT / "redit_fast" / "gr").glob("*.py"))
    for path in sorted(sources, key=lambda path: path.stem == "adamw"):  # its base first
        found += undeclared(path.read_text(), known)
    assert found == [] and {"GR", "TwoPass", "GradientRegularizer", "RegularizedAdamW", "Replay"} <= set(known)


@pytest.mark.parametrize(
    "line",
    [
        "self.b = 1",
        "self.b += 1",
        "self.a, self.b = 1, 2",
        "self.b: int = 1",
        "for self.b in (): pass",
        "object.__setattr__(self, 'b', 1)",
        "setattr(self, name, 1)",
    ],
)
def test_the_checker_finds_each(line):
    source = f"class A:\n    c = 1\n    def __init__(self):\n        self.a = 0\n    def f(self):\n        {line}\n"
    assert [found.split(" sets ")[0] for found in undeclared(source, {})] == ["A.f"]
    assert list(undeclared(source.replace(line, "self.a = self.c = 1"), {})) == []
