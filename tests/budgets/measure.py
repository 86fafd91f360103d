"""What a run costs the host, in one thread."""

import gc
from collections import Counter
from contextlib import ExitStack, contextmanager
from unittest import mock

import torch

from redit_fast.backends.cpu.module import compiled
from tests.counting import Peak, Recorder


@contextmanager
def calls_of(module):
    """A Counter of the calls of a compiled module's functions, and of its classes' methods, inside the block."""
    calls = Counter()

    def counted(name, function):
        def call(*args):
            calls[name] += 1
            return function(*args)

        return call

    with ExitStack() as patches:
        for owner in (module, *(value for value in vars(module).values() if isinstance(value, type))):
            for name, value in vars(owner).items():
                if callable(value) and not isinstance(value, type) and not name.startswith("__"):
                    patches.enter_context(mock.patch.object(owner, name, counted(name, value)))
        yield calls


def recorded(run):
    """{unit: number} of what `run` costs the host; operators by name."""
    with Recorder() as recorder, calls_of(compiled) as calls:
        run()
    return {"operators": dict(recorder.ops), "waits": len(recorder.waits), "calls of _cpu": sum(calls.values())}


def measured(make):
    """The same, and its bytes, of a run, which `make` makes and which has been made and run once before. Cycles are not
    collected inside."""
    torch.manual_seed(0)
    make()()
    torch.manual_seed(0)
    run = make()
    gc.collect()
    gc.disable()
    try:
        with Peak() as peak:
            counts = recorded(run)
    finally:
        gc.enable()
    return counts | {"peak bytes": peak.bytes}


def difference(more, less, by=1):
    """Unit by unit of two records, divided by `by`, without a remainder."""
    found = {}
    for unit, count in more.items():
        if isinstance(count, dict):
            found[unit] = {name: n for name, n in difference(count, less[unit], by).items() if n}
        else:
            found[unit], rest = divmod(count - less.get(unit, 0), by)
            assert rest == 0, (unit, count, less.get(unit, 0), by)
    return found
