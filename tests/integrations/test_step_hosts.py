"""The steps of TRL and verl in the suite step: right with their own code and with ours, and not where it is broken."""

import time
from dataclasses import replace

import pytest
import torch

from redit_fast.benchmarks import step_trl
from redit_fast.benchmarks.bench_step import LIMITS
from redit_fast.benchmarks.step_cases import of_table, prepare
from redit_fast.benchmarks.step_hosts import Settings
from redit_fast.benchmarks.step_worker import Measured

pytest.importorskip("trl", reason="TRL is not installed: its steps need it")


@pytest.fixture(scope="module", params=[0.0, 0.04], ids=["", "KL"])
def settings(request, tmp_path_factory):
    case = replace(of_table("gsm8k", "cpu", "dry"), folder=str(tmp_path_factory.mktemp("case")), beta=request.param)
    prepare(case, torch.device("cpu"), torch.float32)
    return Settings(case, "cpu", "float32")


def steps(settings, host, rollout=False, count=2):
    measured = Measured(settings, host)
    return [measured.step(turn, rollout, time.perf_counter, watch=False) for turn in range(count)]


def right(step):
    pairs = zip(step.errors[:3], LIMITS[torch.float32][:3], strict=True)
    return not step.wrong and all(e <= limit for e, limit in pairs)


@pytest.mark.parametrize("host", ["TRL", "SwapIn", "packing", "packing, GR"])
def test_a_step_of_trl_is_right(settings, host):
    cls = getattr(step_trl, host, step_trl.SwapIn)
    own = replace(settings, packing="packing" in host, gr="GR" in host)
    for rollout in (True, False):
        for step in steps(own, cls, rollout):
            assert right(step) and max(step.errors[:3]) < 1e-4, step
            assert step.seconds.keys() == {"scoring", "update", *(["rollout"] if rollout else [])}
            packed = own.packing and step.computed < (1 + own.gr) * own.case.useful
            assert packed or not own.packing


@pytest.mark.parametrize("host", [step_trl.TRL, step_trl.SwapIn])
def test_a_wrong_loss_in_trl_gets_no_number(settings, host, monkeypatch):
    import trl

    from redit_fast.integrations.trl import ReditGRPOTrainer

    cls = trl.GRPOTrainer if host is step_trl.TRL else ReditGRPOTrainer
    own = cls._compute_loss
    monkeypatch.setattr(cls, "_compute_loss", lambda self, model, inputs: -own(self, model, inputs))
    (step,) = steps(settings, host, count=1)
    assert not right(step) and step.errors.gradient > 0.5

    def one_sample_less(self, model, inputs):
        inputs["advantages"] = inputs["advantages"].clone()
        inputs["advantages"][inputs["advantages"].abs().argmax()] = 0
        return own(self, model, inputs)

    monkeypatch.setattr(cls, "_compute_loss", one_sample_less)
    (step,) = steps(settings, host, count=1)
    assert not right(step)


def test_an_error_in_trls_thread_arrives(settings, monkeypatch):
    import trl

    def fails(self, model, inputs):
        raise RuntimeError("of the trainer")

    monkeypatch.setattr(trl.GRPOTrainer, "_compute_loss", fails)
    with pytest.raises(RuntimeError, match="of the trainer"):
        steps(settings, step_trl.TRL)
