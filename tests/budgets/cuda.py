"""The launches of each op's CUDA kernels and the bytes of global memory that they read and write, in the interpreter of
their PTX."""

import os
from collections import Counter

import torch

import redit_fast as rf
from redit_fast.backends.cuda import module
from tests.budgets.ops import RUNS
from tests.cuda import choose, interpret


def launched(make):
    """{unit: number} of a run that `make` makes."""
    kernels, moved = Counter(), Counter()

    def run(launches, tensors):
        kernels.update(launch.kernel for launch in launches)
        interpret(launches, tensors)

    module.run_launches = run
    torch.manual_seed(0)
    with rf.use_backend("cuda"), choose() as machines:
        op = make()
        kernels.clear()
        machines.clear()
        op()
    for machine in machines:
        moved.update(machine.bytes)
    read, written = (moved[f"global {way}"] + moved[f"bulk {way}"] for way in ("read", "written"))
    return {"launches": kernels, "bytes read": read, "bytes written": written}


def count():
    os.environ["REDIT_FAST_CUDA_INTERPRET"] = "1"
    return {name: launched(make) for name, make in RUNS.items() if not name.startswith("policy_loss")}
