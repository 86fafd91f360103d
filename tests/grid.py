"""The grid that every test of an op runs on: the (backend, device) pairs of this machine."""

import os
import sys

import pytest
import torch
from torch.overrides import TorchFunctionMode

from redit_fast import backends

# Kernels are interpreted, on the CPU, where TRITON_INTERPRET is set before they are imported:
# tests/backends/test_triton.py runs the test bodies of every backend in such a process.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
CUDA_INTERPRETED = os.environ.get("REDIT_FAST_CUDA_INTERPRET") == "1"  # as tests/backends/test_cuda.py does
ON_CPU = ["cpu"] + ["cuda"] * CUDA_INTERPRETED + ["triton"] * INTERPRETED + ["reference"]
DEVICES = ["cpu"] + ["cuda"] * (torch.cuda.is_available() and not INTERPRETED and not CUDA_INTERPRETED)


def pairs(devices):
    """A parameter for each (backend, device); `gpu` marks those on a GPU."""
    found = []
    for device in devices:
        for name in backends.NAMES:
            if device == "cpu" and name in ON_CPU:
                found.append(pytest.param((name, device), id=name))
            elif device != "cpu" and name != "cpu":
                marks = [pytest.mark.gpu] * (device == "cuda")
                found.append(pytest.param((name, device), id=f"{name}-{device}", marks=marks))
    return found


MAKERS = {
    torch.arange, torch.empty, torch.eye, torch.full, torch.linspace, torch.ones, torch.rand, torch.randint,
    torch.randn, torch.randperm, torch.tensor, torch.zeros,
}  # fmt: skip


class MadeOn(TorchFunctionMode):
    """What a test, or a module of torch.nn that it builds, makes without naming a device lies on `device`, with the
    numbers of the CPU's generator: the same on every device. What the package makes lies where the package puts it, so
    that a tensor on the wrong device is found as it would be in a user's process."""

    def __init__(self, device):
        super().__init__()
        self.device = device

    def __torch_function__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        if func not in MAKERS or (kwargs or {}).get("device") is not None:
            return made
        if not sys._getframe(1).f_globals["__name__"].startswith(("tests.", "torch.nn.modules.")):
            return made
        return made.detach().to(self.device).requires_grad_(made.requires_grad)
