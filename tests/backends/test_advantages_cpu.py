"""What only the compiled advantages can get wrong: threads, version counters, the C++ twin of the noise."""

import math
import re
import shutil
import subprocess
import sys
from itertools import product

import pytest
import torch

import redit_fast as rf
from redit_fast import noise
from redit_fast.backends import cpu
from redit_fast.backends.args import AdvantageInputs, AdvantageOptions, Advantages
from tests import ROOT

refusal = cpu.why_not("group_advantages", torch.device("cpu"))
OPTIONS = AdvantageOptions("gaussian", 0, 0, "apply", "mean", "group", "sum_then_normalize", 1e-4, 1)
compiled = pytest.mark.skipif(refusal is not None, reason=f"cpu: {refusal}")
ESTIMATORS = [("group", "sum_then_normalize"), ("batch", "sum_then_normalize"), ("group", "normalize_then_sum")]


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@compiled
@pytest.mark.parametrize(("scale", "combine"), ESTIMATORS)
def test_fifty_repeats_on_every_number_of_threads_give_the_same_bits(threads, scale, combine):
    """Rewards of 0.1 with noise of 1e-14: the rounding of every sum reaches the advantages."""
    rewards, ids = torch.full((10_000, 2), 0.1, dtype=torch.float64), torch.randint(0, 1300, (10_000,))
    options = dict(group_ids=ids, dither=rf.Dither(level=1e-14, seed=2), scale=scale, combine=combine, eps=0.0)
    with rf.use_backend("cpu"):
        expected = rf.group_advantages(rewards, **options)
        for count in (1, 2, 3, 4):
            threads(count)
            for _ in range(50):
                assert all(map(torch.equal, rf.group_advantages(rewards, **options), expected))
    assert expected.values.abs().max() > 1


@compiled
@pytest.mark.parametrize("distribution", ["gaussian", "uniform"])
def test_a_million_draws_at_the_edges_of_the_counter_have_the_bits_of_the_reference(distribution):
    ids = torch.randint(-(2**63), 2**63 - 1, (500_000, 2)).flatten()
    settings = rf.Dither(distribution, seed=2**64 - 3)
    options = dict(group_size=2, dither=settings, step=2**32 - 1, sample_ids=ids, scale="none")
    ours, reference = both(torch.zeros(len(ids)), **options)
    assert all(map(torch.equal, ours, reference)) and ours.values.abs().max() > 0.03
    for name in cpu.instruction_sets():
        with cpu.use_instruction_set(name), rf.use_backend("cpu"):
            assert all(map(torch.equal, rf.group_advantages(torch.zeros(len(ids)), **options), reference)), name


def both(rewards, **options):
    results = []
    for backend in ("cpu", "reference"):
        with rf.use_backend(backend):
            results.append(rf.group_advantages(rewards, **options))
    return results


@compiled
@pytest.mark.parametrize(("scale", "combine"), ESTIMATORS)
def test_rewards_that_overflow_float64_give_what_the_reference_gives(scale, combine):
    rewards = torch.tensor([[1e308, 1e308], [-1e308, -1e308], [1e308, -1e308], [1.0, 2.0]] * 2, dtype=torch.float64)
    rewards = torch.cat([rewards, torch.ones(4, 2, dtype=torch.float64)])
    rewards[8] = rewards[0]
    for settings, weight in product((None, rf.Dither(dead_groups="skip")), (1.0, 10.0)):  # weight 10: inf - inf, NaN
        options = dict(dither=settings, scale=scale, combine=combine, reward_weights=weight)
        torch.testing.assert_close(*both(rewards, group_size=4, **options), rtol=0, atol=0, equal_nan=True)


@compiled
def test_batch_wide_sums_keep_their_order():
    """Rewards of 0.1 with noise of 1e-14: the rounding of the batch-wide sums reaches the advantages."""
    rewards = torch.full((9000,), 0.1, dtype=torch.float64)
    options = dict(group_size=3, dither=rf.Dither(level=1e-14, seed=4), scale="batch", eps=0.0)
    ours, reference = both(rewards, **options)
    assert all(map(torch.equal, ours, reference)) and ours.values.abs().max() > 1
    moved, _ = both(rewards, sample_ids=torch.arange(9000).roll(1500), **options)
    assert not torch.equal(moved.values.roll(-1500), ours.values)  # another order of the groups: the sums do show


@compiled
def test_every_output_is_known_to_autograd_as_written():
    count = 8
    outputs = [torch.empty(count, dtype=torch.bool if i == 3 else torch.float32) for i in range(6)]
    versions = [out._version for out in outputs]
    leaf = torch.ones(count, requires_grad=True)
    product_of_old_values = leaf * outputs[0]
    one = torch.ones(1, dtype=torch.float64)
    samples = torch.arange(count)
    inputs = AdvantageInputs(torch.rand(count, 1, dtype=torch.float64), samples // 4, None, samples, one, None)
    cpu.group_advantages(Advantages(*outputs), inputs, OPTIONS)
    assert [out._version for out in outputs] == [version + 1 for version in versions]
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product_of_old_values.sum().backward()


@compiled
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc; OpenMP is compiled in on Linux only")
def test_one_openmp_runtime_and_one_thread_pool_are_shared_with_torch():
    script = """
import os, torch
import redit_fast as rf
from redit_fast.backends import cpu
from redit_fast.backends.args import AdvantageInputs, AdvantageOptions, Advantages
torch.set_num_threads(3)
n = 20_000
samples, one = torch.arange(n), torch.ones(1, dtype=torch.float64)
outputs = [torch.empty(n, dtype=torch.bool if i == 3 else torch.float32) for i in range(6)]
rewards = torch.ones(n, 1, dtype=torch.float64)
tasks = lambda: len(os.listdir("/proc/self/task"))
before = tasks()
options = AdvantageOptions("gaussian", 0, 0, "apply", "mean", "group", "sum_then_normalize", 1e-4, 1)
cpu.group_advantages(Advantages(*outputs), AdvantageInputs(rewards, None, 4, samples, one, one), options)
ours = tasks()
torch.rand(4_000_000).exp().sum()
print(ours - before, tasks() - ours)
print(open("/proc/self/maps").read())
"""
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=ROOT)
    counts, maps = result.stdout.split("\n", 1)
    assert counts == "2 0", "two workers started by our op, and torch's op on three threads starts none"
    runtimes = {path for path in re.findall(r"/\S+", maps) if re.search(r"lib(gomp|omp|iomp5)[-.\w]*\.so", path)}
    assert len(runtimes) == 1 and "/torch" in runtimes.pop()


TWIN = r"""
#include <cinttypes>
#include <cstdio>
#include "shared/element.h"
int main() {
  uint32_t x0, x1;
  while (std::scanf("%" SCNu32 " %" SCNu32, &x0, &x1) == 2) std::printf("%a\n", redit::box_muller(x0, x1));
}
"""


def box_muller(x0, x1):
    """`noise.box_muller` in Python floats, which are IEEE to the last bit."""

    def horner(coefficients, x):
        total = coefficients[0]
        for coefficient in coefficients[1:]:
            total = total * x + coefficient
        return total

    mantissa, exponent = math.frexp(2 * x0 + 1)
    mantissa, exponent = mantissa * 2, exponent - 1
    if mantissa > math.sqrt(2):
        mantissa, exponent = mantissa * 0.5, exponent + 1
    t = (mantissa - 1) / (mantissa + 1)
    radius = math.sqrt(-2 * (2 * t * horner(noise._LOG_SERIES, t * t) + (exponent - 33) * math.log(2)))
    quadrant, phase = x1 >> 30, (((x1 & 0x3FFFFFFF) + 0.5) * 2.0**-30 - 0.5) * (math.pi / 2)
    h = phase * phase
    sin, cos = phase * horner(noise._SIN_SERIES, h), horner(noise._COS_SERIES, h)
    value = (cos + sin if quadrant % 2 else cos - sin) / math.sqrt(2)
    return radius * (-value if quadrant in (1, 2) else value)


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
@pytest.mark.parametrize("optimisation", ["-O0", "-O3"])
def test_the_cpp_box_muller_has_every_float64_bit_of_the_formula(tmp_path, optimisation):
    (tmp_path / "twin.cpp").write_text(TWIN)
    flags = ["-std=c++17", optimisation, "-ffp-contract=off", f"-I{ROOT / 'csrc'}"]
    subprocess.run(["g++", *flags, "twin.cpp", "-o", "twin"], cwd=tmp_path, check=True)
    edges = [0, 1, 2, 0x3FFFFFFF, 0x40000000, 0x7FFFFFFF, 0x80000000, 0xBFFFFFFF, 0xC0000000, 0xFFFFFFFF]
    words = [*product(edges, edges), *torch.randint(0, 2**32, (20_000, 2)).tolist()]
    pairs = "\n".join(f"{x0} {x1}" for x0, x1 in words)
    output = subprocess.run([tmp_path / "twin"], input=pairs, capture_output=True, text=True, check=True).stdout
    assert [float.fromhex(line) for line in output.split()] == [box_muller(*pair) for pair in words]
