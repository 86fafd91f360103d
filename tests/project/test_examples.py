"""The example for OpenRLHF learns; the loop on two ranks ends as on one. test_install.py runs those of TRL and
transformers, each with its extra alone."""

import os
import subprocess
import sys

import pytest
import torch

from examples import openrlhf_loop, plain_loop
from tests import ROOT


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
