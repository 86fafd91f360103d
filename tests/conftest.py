"""One test body, every backend that this machine can run: `backend` forces each in turn, a skip prints the refusal."""

import os

import pytest
import torch

import redit_fast as rf
from redit_fast import backends

# Kernels are interpreted where TRITON_INTERPRET is set before they are imported: tests/test_triton.py runs the test
# bodies of every backend in such a process.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
BACKENDS = [name for name in backends.NAMES if name != "triton" or INTERPRETED]


@pytest.fixture
def large_tiles(monkeypatch):
    """Tiles for Triton's interpreter, which takes 0.03 s a tile of any size: the bits do not depend on it."""
    if INTERPRETED:
        monkeypatch.setattr("redit_fast.kernels.params.ROWS", 2048)
        monkeypatch.setattr("redit_fast.kernels.advantages.GROUPS", 512)


@pytest.fixture(params=BACKENDS)
def backend(request, large_tiles):
    """A forced backend; the test skips where the backend refuses an op the test's module names in `OPS`."""
    module = backends._backend(request.param)
    for op in getattr(request.module, "OPS", ()):
        refusal = module.why_not(op, torch.device("cpu"))
        if refusal:
            pytest.skip(f"{request.param}: {refusal}")
    with rf.use_backend(request.param):
        yield request.param


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def skip_float64(backend, dtype=torch.float64):
    if backend == "triton" and dtype == torch.float64:
        pytest.skip("triton: refuses float64 parameters")
