"""The examples of the swap-ins run, with the real trainers, and learn; the loop on two ranks ends as on one."""

import os
import subprocess
import sys

import pytest
import torch

from examples import openrlhf_loop, plain_loop, transformers_sft
from tests import ROOT

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


def test_the_openrlhf_example_teaches_a_model():
    before, after = openrlhf_loop.main()
    assert before < 0.05 < 0.2 < after


def test_the_loop_gives_the_same_weights_on_one_rank_and_by_ddp_and_fsdp2_on_two():
    def norm(ranks, kind):
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
        command = [*launch, "examples/distributed_loop.py", kind, "--steps=8"]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
        return float(done.stdout.split("|weights| ")[1])

    torch.manual_seed(0)
    before = torch.nn.utils.get_total_norm([p.detach().double() for p in plain_loop.a_model().parameters()]).item()
    one = norm(1, "ddp")
    assert [norm(2, "ddp"), norm(2, "fsdp2")] == pytest.approx([one, one], rel=1e-8)
    assert abs(one - before) > 1e-4 * before
