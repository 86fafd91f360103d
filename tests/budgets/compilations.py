"""How often torch.compile compiles each op, and the backward pass with it, for batches of five lengths."""

import torch
from torch._dynamo.utils import counters

from tests.ops.test_compile import FUNCTIONS, batch, results


def compilations(function):
    torch._dynamo.reset()
    counters.clear()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for rows in (4, 8, 16, 18, 42):
        results(compiled, *batch(rows))
    return counters["stats"]["unique_graphs"]


def count():
    return {function.__name__: {"compilations": compilations(function)} for function in FUNCTIONS}
