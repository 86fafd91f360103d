"""The examples of the swap-ins run, with the real trainers, and learn."""

import pytest

from examples import transformers_sft

pytestmark = pytest.mark.filterwarnings("ignore:.*pin_memory", "ignore:.*gradient_checkpointing")


def test_the_transformers_example_learns_with_gr_and_without_logits(tmp_path):
    trainer, losses = transformers_sft.main(steps=8, out=str(tmp_path))
    assert losses[-1] < losses[0] - 0.5
    assert "gr/g1_norm" in trainer.state.log_history[0] and "forward" not in vars(trainer.model)


def test_the_trl_example_runs_with_dithering_and_gr(tmp_path, monkeypatch):
    pytest.importorskip("trl", reason="TRL is not installed: its example needs it")
    monkeypatch.setenv("CI", "1")  # TRL sends telemetry otherwise
    from examples import trl_grpo

    trainer, rewards = trl_grpo.main(steps=2, out=str(tmp_path))
    log = trainer.state.log_history[0]
    assert {"dither/reward_std", "dither/advantage_std", "gr/g1_norm", "time/gr_pass2"} <= set(log)
    assert len(rewards) == 2 and log["dither/reward_std"] > log["reward_std"]
