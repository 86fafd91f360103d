"""The step of verl's worker in the suite step, on the CPU, with GR and without."""

import time
from dataclasses import replace

import pytest
import torch

pytest.importorskip("verl", reason="verl is not installed: its step needs it")

from redit_fast.benchmarks import step_verl  # noqa: E402  after the skip
from redit_fast.benchmarks.step_cases import expected, of_table, prepare  # noqa: E402
from redit_fast.benchmarks.step_hosts import Settings  # noqa: E402
from redit_fast.benchmarks.step_worker import Measured  # noqa: E402
from tests.integrations.verl_rank import verl_process  # noqa: E402, F401


@pytest.mark.usefixtures("verl_process")
def test_a_step_of_verl_is_right_and_a_flipped_one_is_not(tmp_path, monkeypatch):
    case = replace(of_table("gsm8k", "cpu", "dry"), folder=str(tmp_path))
    prepare(case, torch.device("cpu"), torch.float32)
    settings = Settings(case, "cpu", "float32")
    hosts = [(host, False) for host in (step_verl.TorchHead, step_verl.Logits, step_verl.OurHead)]
    for host, gr in [*hosts, (step_verl.OurHead, True)]:
        measured = Measured(replace(settings, gr=gr), host)
        for turn in range(2):
            step = measured.step(turn, False, time.perf_counter, watch=False)
            assert not step.wrong and max(step.errors[:3]) < 1e-4, (host, step)
        assert step.computed == (1 + gr) * (case.useful + len(case.lengths))  # with the last tokens, for nothing
    kept, fresh = (expected(case, 0, pass2).gradient for pass2 in ("pass1", "fresh"))
    assert max((kept[name] - fresh[name]).norm() / fresh[name].norm() for name in fresh) > 1e-3  # not the other one's
    batches = [(p, c, old, -weights) for p, c, old, weights in measured.host.batches]
    measured.host.batches = batches
    assert measured.step(0, False, time.perf_counter, watch=False).errors.gradient > 1.9
