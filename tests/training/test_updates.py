"""Several optimizer steps on a step's samples: what each pass takes for the old log-probs, what counts what, stops."""

import signal

import pytest
import torch
from safetensors.torch import load_file

import redit_fast as rf
from redit_fast.training import config_file, report, setup
from redit_fast.training.batch import Batch
from redit_fast.training.metrics import over_updates
from redit_fast.training.trainer import train
from tests.training.jobs import lines_of
from tests.training.test_stops import assert_equal_checkpoints, timeless


@pytest.fixture
def job(settings, tmp_path, monkeypatch):
    (tmp_path / "varied.py").write_text(
        "def judge(prompts, completions, **columns):\n    return [float(len(c) % 3) for c in completions]\n"
    )
    monkeypatch.setattr(report, "write", lambda run: None)
    more = {"eval_problems": 0, "lr_scheduler_type": "linear", "warmup_steps": 1}
    return {**settings, "rewards": [f"{tmp_path}/varied:judge"], "updates_per_rollout": 3, **more}


@pytest.mark.parametrize("ratio", ["fresh", "pass1"])
def test_every_pass_but_the_first_has_the_rollouts_log_probs(job, tmp_path, monkeypatch, ratio):
    calls, loss = [], rf.linear_grpo_loss

    def recorded(*args, **options):
        out = loss(*args, **options)
        calls.append({**options, "logp": out.logp})
        return out

    monkeypatch.setattr(rf, "linear_grpo_loss", recorded)
    train(config_file.load(overrides={**job, "gr_pass2_ratio": ratio}))
    _, *calls = calls  # the trial's
    assert len(calls) == 2 * 3 * 2
    for step in (0, 1):
        first, *others = calls[6 * step : 6 * step + 6]
        assert first["old_logp"] is None and {call["step"] for call in (first, *others)} == {step}
        assert all(torch.equal(call["old_logp"], first["logp"]) for call in others)
        passes = [first, *others]
        assert [call["masks_of"] is None for call in passes] == [True, False] * 3
        moved = [not torch.equal(call["logp"], first["logp"]) for call in passes]
        # At the first update the learning rate is 0, which warms up from there.
        assert moved == [False, True, step == 1, True, True, True]
    state = load_file(tmp_path / "run/checkpoints/step-000002/optimizer.safetensors")
    assert {tensor.item() for name, tensor in state.items() if name.endswith(".step")} == {6}
    for line in lines_of(tmp_path / "run" / "metrics.jsonl")[1:]:
        assert line["policy/on_policy"] == pytest.approx(1 / 3) and line["ratio/max_abs_dev"] > 0


def test_the_learning_rate_falls_over_the_optimizer_steps(job, tmp_path):
    made = config_file.load(overrides=job)
    rates = [setup.learning_rate(made)(number) for number in range(6)]
    assert rates == pytest.approx([0, 1e-3, 8e-4, 6e-4, 4e-4, 2e-4])
    train(made)
    assert [line["learning_rate"] for line in lines_of(tmp_path / "run" / "metrics.jsonl")[1:]] == [rates[2], rates[5]]


def test_a_stop_between_two_updates_waits_for_the_last_and_the_run_goes_on_bit_by_bit(job, tmp_path, monkeypatch):
    train(config_file.load(overrides={**job, "name": "whole"}))
    backward, passes = Batch.backward, []

    def stopped(*args, **options):
        passes.append(options.get("masks_of"))
        if len(passes) == 1 + 4:  # the trial's; the second pass of the second update
            signal.raise_signal(signal.SIGINT)
        return backward(*args, **options)

    monkeypatch.setattr(Batch, "backward", stopped)
    halves = config_file.load(overrides={**job, "name": "halves"})
    with pytest.raises(KeyboardInterrupt, match="stopped after step 1 of 2"):
        train(halves)
    assert len(passes) == 1 + 6
    train(halves, resume=True)
    assert timeless(tmp_path / "whole" / "metrics.jsonl") == timeless(tmp_path / "halves" / "metrics.jsonl")
    for step in ("step-000001", "step-000002"):
        assert_equal_checkpoints(tmp_path / "whole/checkpoints" / step, tmp_path / "halves/checkpoints" / step)


def test_samples_that_are_cut_off_and_masked_have_no_part_in_any_update(job, tmp_path):
    """Nor have they log-probs, which are NaN in the old ones."""
    (tmp_path / "half.py").write_text(
        "def judge(prompts, completions, **columns):\n    return [-float(len(c)) for c in completions]\n"
    )
    job |= {
        "rewards": [f"{tmp_path}/half:judge"],
        "overlong": "mask",
        "max_completion_length": 30,
        "beta": 0.1,
        "steps": 1,
    }
    with pytest.warns(UserWarning, match="a KL term and gradient regularisation are both"):
        train(
            config_file.load(
                overrides={**job, "prompts_per_step": 8, "lr_scheduler_type": "constant", "warmup_steps": 0}
            )
        )
    for line in lines_of(tmp_path / "run" / "metrics.jsonl")[1:]:
        assert 0 < line["completions/clipped_ratio"] < 1
        unknown = {name for name, value in line.items() if value is None}
        assert unknown == {"gr/penalty_ratio"} and line["ratio/max_abs_dev"] > 0


def test_metrics_of_several_updates_are_means_but_for_extremes_counts_and_settings():
    each = [
        {"loss": 1.0, "clip_ratio/low_min": 0.2, "ratio/max_abs_dev": 0.0, "gr/skipped_steps": 0.0, "gr/g2_norm": 3.0},
        {"loss": 2.0, "clip_ratio/low_min": 0.1, "ratio/max_abs_dev": 0.5, "gr/skipped_steps": 1.0},
    ]
    assert over_updates(each) == {"loss": 1.5, "clip_ratio/low_min": 0.1, "ratio/max_abs_dev": 0.5,
                                  "gr/skipped_steps": 1.0, "gr/g2_norm": 3.0}  # fmt: skip
    assert over_updates(each[:1]) == each[0]
