"""Dithered group advantages: pytest benchmarks --benchmark-only

128 prompts x 8 completions x 3 rewards. Every timed call's output is checked; the eager baseline computes TRL 1.16's
formula without noise, weights by group or unscored rewards, so it does less.
"""

import pytest
import torch

import redit_fast as rf
from redit_fast import backends

PROMPTS, GROUP, REWARDS = 128, 8, 3


def rewards():
    return torch.randint(0, 3, (PROMPTS * GROUP, REWARDS), generator=torch.Generator().manual_seed(0)).double() / 2


def trl_eager(values):
    total = values.nansum(1).view(PROMPTS, GROUP)
    return ((total - total.mean(1, keepdim=True)) / (total.std(1, keepdim=True) + 1e-4)).flatten().float()


@pytest.mark.parametrize("backend", backends.NAMES)
@pytest.mark.parametrize("dither", [None, rf.Dither()], ids=["clean", "dithered"])
def test_advantages(benchmark, backend, dither):
    refusal = backends._backend(backend).why_not("group_advantages", torch.device("cpu"))
    if refusal:
        pytest.skip(f"{backend}: {refusal}")
    values = rewards()
    with rf.use_backend("reference"):
        expected = rf.group_advantages(values, group_size=GROUP, dither=dither, step=3).values
    with rf.use_backend(backend):
        out = benchmark(rf.group_advantages, values, group_size=GROUP, dither=dither, step=3)
    assert torch.equal(out.values, expected)


def test_trl_eager(benchmark):
    values = rewards()
    out = benchmark(trl_eager, values)
    torch.testing.assert_close(out, rf.group_advantages(values, group_size=GROUP).values, rtol=1e-5, atol=1e-6)
