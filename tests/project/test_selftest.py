"""The self-test passes on this machine, and finds a backend that is wrong."""

from importlib import import_module

import pytest
import torch

from redit_fast import backends, cli, selftest


@pytest.fixture
def backend_here():
    """A backend that runs here: Triton's in its interpreter, else the C++ one."""
    for name in ("triton", "cpu"):
        if backends.refusal("token_loss", name, torch.device("cpu")) is None:
            return name
    pytest.skip("neither triton nor cpu runs here")


def test_every_backend_passes(backend_here, monkeypatch):
    monkeypatch.setattr(backends, "NAMES", (backend_here, "reference"))
    results = list(selftest.run())
    assert [result.op for result in results if result.device == "cpu"] == 2 * list(selftest.CHECKS)
    assert all(result.passed for result in results), results
    assert all(result.error > 0 for result in results if result.op.endswith("grpo_loss"))  # not one against itself
    assert all(result.limit < 1e-5 for result in results if result.dtype == "float32"), results


def test_every_primitive_is_asked_for_by_some_check():
    named = {primitive for check in selftest.CHECKS.values() for primitive in check.primitives}
    assert named == set(backends.PRIMITIVES)


WRONG = {  # primitive: the op that finds it, and the place of the argument that is written
    "token_logp": ("grpo_loss", 0),
    "token_logp_grad": ("grpo_loss", 0),
    "exp_product": ("linear_grpo_loss", 1),
    "addmm": ("linear_grpo_loss", 0),
    "group_advantages": ("group_advantages", 0),
}


@pytest.mark.parametrize("primitive", WRONG)
def test_a_float32_that_is_off_by_1e_5_is_found_and_the_exit_code_says_so(backend_here, monkeypatch, capsys, primitive):
    module = import_module(f"redit_fast.backends.{backend_here}")
    right, (op, place) = getattr(module, primitive), WRONG[primitive]

    def wrong(*args):
        right(*args)
        written = args[place]
        (written if isinstance(written, torch.Tensor) else written.values).mul_(1 + 1e-5)

    monkeypatch.setattr(backends, "NAMES", (backend_here, "reference"))
    monkeypatch.setattr(selftest, "CHECKS", {op: selftest.CHECKS[op]})
    assert cli.main(["selftest"]) == 0
    monkeypatch.setattr(module, primitive, wrong)
    capsys.readouterr()
    assert cli.main(["selftest"]) == 1
    line = next(line for line in capsys.readouterr().out.splitlines() if "float32" in line)
    assert "WRONG" in line and op in line and len(line) <= 80


def test_what_is_not_a_number_does_not_pass():
    assert not selftest.Result("op", "cpu", "cpu", "float32", float("nan"), 1.0, 0.0).passed
    x, ones = torch.tensor([1.0, float("nan")]), torch.ones(2)
    error, limit = selftest._error_and_limit([x, ones], [ones, ones], [ones, ones], 1e-6, 0.0)
    assert error != error and limit == 1e-6
