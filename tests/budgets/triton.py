"""The launches of each op's Triton kernels, and the instructions of what Triton compiles for sm_90. Nothing runs."""

from collections import Counter
from unittest import mock

import torch
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

import redit_fast as rf
from redit_fast.backends import triton as backend
from tests.backends.test_triton import Target
from tests.budgets.ops import RUNS


def launched(make):
    """{unit: number} of a run that `make` makes."""
    launches, run = [], JITFunction.run

    def compiled(self, *args, grid, warmup, **options):
        kernel = run(self, *args, grid=grid, warmup=True, **options)
        launches.append((self.__name__, kernel))
        return kernel

    torch.manual_seed(0)
    with mock.patch.object(JITFunction, "run", compiled), rf.use_backend("triton"):
        op = make()
        launches.clear()
        op()
    kernels = Counter(name for name, _ in launches)
    return {"launches": kernels, "instructions, sm_90": {name: instructions(kernel) for name, kernel in launches}}


def instructions(kernel):
    lines = [line.strip() for line in kernel.asm["sass"].splitlines()]
    return sum(line.endswith(";") and "NOP" not in line for line in lines)


def count():
    with mock.patch.object(driver, "_active", Target(90)), mock.patch.object(backend, "why_not", lambda *_: None):
        return {name: launched(make) for name, make in RUNS.items() if not name.startswith("policy_loss")}
