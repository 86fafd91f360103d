"""What `make test` runs on a CUDA machine, shown on one without: the pairs, and the bodies on another device."""

import subprocess
import sys
from types import FunctionType

import torch

from tests import ROOT
from tests.grid import MadeOn, pairs


def test_on_cuda_is_every_backend_that_has_kernels_and_the_reference():
    found = {pair.id: [mark.name for mark in pair.marks] for pair in pairs(["cuda"])}
    assert found == {f"{name}-cuda": ["gpu"] for name in ("cuda", "triton", "reference")}


def test_what_a_test_makes_is_moved_with_the_same_numbers_and_what_the_package_makes_is_not():
    def made(module):
        code = (lambda: torch.zeros(2, requires_grad=True)).__code__
        return FunctionType(code, {"torch": torch, "__name__": module})()

    with MadeOn("meta"):
        assert torch.zeros(2).device.type == "meta" and torch.zeros(2, device="cpu").device.type == "cpu"
        assert made("tests.ops.test_x").device.type == "meta" and made("tests.ops.test_x").is_leaf
        assert made("torch.nn.modules.linear").device.type == "meta"
        assert made("redit_fast.ops.chunks").device.type == made("torch.optim.adamw").device.type == "cpu"
    torch.manual_seed(0)
    expected = torch.randn(5)
    torch.manual_seed(0)
    with MadeOn(torch.device("cpu")):
        assert torch.equal(torch.randn(5), expected)


def test_the_bodies_of_the_head_pass_on_another_device():
    """The rest of the grid passes there too, but what asks for a tensor's address or assigns to `.data`."""
    command = [sys.executable, "-m", "tests.pretend", "tests/ops/test_heads.py", "tests/ops/test_linear_whole.py"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "7 passed" in done.stdout, done.stdout + done.stderr
