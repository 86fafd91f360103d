"""Dithered group advantages: python -m benchmarks.bench_advantages, or pytest benchmarks --benchmark-only

128 prompts x 8 completions x 3 rewards, 1024 prompts without --small. The eager baseline computes TRL 1.16's formula
without noise, weights by group or unscored rewards, so it does less. Bytes: the rewards and six numbers a sample.
"""

import pytest
import torch

import redit_fast as rf
from benchmarks.common import Candidate, clock, main, measure, show
from redit_fast import backends

GROUP, REWARDS = 8, 3


def trl_eager(values):
    total = values.nansum(1).view(-1, GROUP)
    return ((total - total.mean(1, keepdim=True)) / (total.std(1, keepdim=True) + 1e-4)).flatten().float()


def candidates(prompts):
    samples = prompts * GROUP
    values = torch.randint(0, 3, (samples, REWARDS), generator=torch.Generator().manual_seed(0)).double() / 2
    moved = samples * (8 * REWARDS + 5 * 4 + 1)

    def ours(backend, dither):
        def advantages():
            return rf.group_advantages(values, group_size=GROUP, dither=dither, step=3).values

        with rf.use_backend("reference"):
            expected = advantages()

        def run():
            with rf.use_backend(backend), clock:
                out = advantages()
            assert torch.equal(out, expected)

        return Candidate(f"{backend}, {'dithered' if dither else 'clean'}", moved, lambda: run)

    def trl():
        clean = rf.group_advantages(values, group_size=GROUP).values

        def run():
            with clock:
                out = trl_eager(values)
            torch.testing.assert_close(out, clean, rtol=1e-5, atol=1e-6)

        return run

    names = [name for name in backends.NAMES if not backends.refusal("group_advantages", name, values.device)]
    group = [ours(name, dither) for name in names for dither in (None, rf.Dither())]
    return [*group, Candidate("TRL, eager, clean", moved, trl, baseline=True)]


def tables(small):
    prompts = 128 if small else 1024
    title = f"advantages, {prompts} prompts x {GROUP} x {REWARDS}"
    rows = measure(candidates(prompts), rounds=51)
    show(title, rows)
    return {title: rows}


SMALL = {candidate.name: candidate for candidate in candidates(128)}


@pytest.mark.benchmark(timer=clock)
@pytest.mark.parametrize("name", SMALL)
def test_advantages(benchmark, name):
    benchmark.pedantic(SMALL[name].make(), rounds=25, warmup_rounds=1)


if __name__ == "__main__":
    main(tables)
