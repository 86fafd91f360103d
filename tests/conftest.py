"""One test body, every backend that this machine can run: `backend` forces each in turn, a skip prints the refusal."""

import pytest
import torch

import redit_fast as rf
from redit_fast import backends


@pytest.fixture(params=backends.NAMES)
def backend(request):
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
