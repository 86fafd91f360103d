"""The step with PrefixGrouper's attention in the suite step, on the CPU."""

import time
from dataclasses import replace

import pytest
import torch

pytest.importorskip("prefix_grouper", reason="prefix_grouper is not installed: its step needs it")

from redit_fast.benchmarks import step_prefix  # noqa: E402  after the skip
from redit_fast.benchmarks.step_cases import few, of_table, prepare  # noqa: E402
from redit_fast.benchmarks.step_hosts import Settings  # noqa: E402
from redit_fast.benchmarks.step_worker import Measured  # noqa: E402


@pytest.mark.parametrize("case", [few("dry"), replace(of_table("gsm8k", "cpu", "dry"), beta=0.04)], ids=["equal", "KL"])
def test_a_step_is_right_and_prompts_are_computed_once_and_one_that_sees_what_comes_is_not(case, tmp_path, monkeypatch):
    case = replace(case, folder=str(tmp_path))
    prepare(case, torch.device("cpu"), torch.float32)
    measured = Measured(Settings(case, "cpu", "float32"), step_prefix.PrefixGrouper)
    for turn in range(2):
        step = measured.step(turn, False, time.perf_counter, watch=False)
        assert not step.wrong and max(step.errors[:3]) < 1e-5, step
        # The last token of each completion too, for nothing, and what is padded to the longest group of a micro-batch.
        assert case.least < step.computed < case.useful
    own = step_prefix.sdpa
    monkeypatch.setattr(step_prefix, "sdpa", lambda q, k, v, real, **options: own(q, k, v, real, **options) * 0.99)
    assert max(measured.step(0, False, time.perf_counter, watch=False).errors[:3]) > 1e-3
