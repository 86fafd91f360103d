"""The self-test passes on this machine, and finds a backend that is wrong."""

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
    assert all(result.passed and result.backend == backend_here for result in results), results
    assert all(result.error > 0 for result in results if result.op.endswith("grpo_loss"))  # not one against itself


def test_a_wrong_backend_is_found_and_the_exit_code_says_so(backend_here, monkeypatch, capsys):
    module = backends._backend(backend_here)
    right = module.token_logp

    def wrong(logp, *args):
        right(logp, *args)
        logp += 0.1

    monkeypatch.setattr(backends, "NAMES", (backend_here, "reference"))
    monkeypatch.setattr(module, "token_logp", wrong)
    monkeypatch.setattr(selftest, "CHECKS", {"grpo_loss": selftest.CHECKS["grpo_loss"]})
    assert cli.main(["selftest"]) == 1
    assert "WRONG" in capsys.readouterr().out


def test_what_is_not_a_number_does_not_pass():
    assert not selftest.Result("op", "cpu", "cpu", "float32", float("nan"), 1.0, 0.0).passed
    x = torch.tensor([1.0, float("nan")])
    assert selftest._error([x, x[:1]], [torch.ones(2), torch.ones(1)]) != 0
