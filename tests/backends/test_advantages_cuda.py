"""csrc/cuda/advantages.cu, its PTX run by tests/ptx: bit for bit the reference backend, in every order of the warps."""

import json
import math
import os
import re
from itertools import product

import numpy as np
import pytest
import torch

import redit_fast as rf
from redit_fast.backends.cuda import module
from tests import ROOT
from tests.cuda import EMPTY, NVCC, ORDERS, TARGETS, choose, cubin, other_release

pytestmark = [pytest.mark.skipif(NVCC is None, reason="nvcc is not installed"), pytest.mark.usefixtures("cuda")]
NAN = math.nan
SOURCE = ROOT / "csrc" / "cuda" / "advantages.cu"
ROW = re.compile(r"//   (\w+) +(\d+) +[-\w ]+? +(\d+) +([-\d]+) +(\d+) +(\d+)\n")  # of the table in its comment
TABLE = {row[0]: row[1:] for row in ROW.findall(SOURCE.read_text())}
ARCHES = os.environ.get("KERNEL_ARCHS", "90").split()


def check(rewards, orders=ORDERS, cluster=True, **options):
    """What the reference gives, and the machines of the last order."""
    with rf.use_backend("reference"):
        expected = rf.group_advantages(rewards, **options)
    for order in orders:
        with pytest.MonkeyPatch.context() as patch, choose(order=order) as machines:
            patch.setattr(module, "described", module.described._replace(clusters=int(cluster)))
            ours = rf.group_advantages(rewards, **options)
        for name, x, y in zip(expected._fields, ours, expected):
            assert torch.equal(x.nan_to_num(nan=1e30), y.nan_to_num(nan=1e30)), (name, order, options)
    return expected, machines


HOSTILE = torch.tensor(
    [
        [1.0, 0.0, NAN], [1.0, 0.0, 0.2], [0.0, 1.0, 0.7], [1.0, 0.3, NAN],  # mixed
        [0.35, 0.4, 0.95], [0.95, 0.4, 0.35], [0.4, 0.35, 0.95], [0.95, 0.35, 0.4],  # equal sums
        [NAN, NAN, NAN], [2.0, NAN, NAN], [NAN, NAN, math.inf], [NAN, 1.0, NAN],  # mostly unscored
        [NAN, NAN, NAN], [NAN, NAN, NAN], [NAN, NAN, NAN], [3.0, NAN, NAN],  # one scored
        [1e6, 1.0, 0.0], [1e6, 1.5, 0.0], [1e6, 1.2, 0.0], [1e6, 1.3, 0.0],  # large offset: dead
    ]
).double()  # fmt: skip
DITHERS = [None] + [
    rf.Dither(distribution, 0.05, [1.0, 2.0, 0.5], dead_groups=policy, seed=2**64 - 3)
    for distribution, policy in [("uniform", "apply"), *product(["gaussian"], ["apply", "skip", "center_only", "only"])]
]
ESTIMATORS = [
    (baseline, scale, "sum_then_normalize")
    for baseline, scale in product(["mean", "leave_one_out"], ["group", "batch", "none"])
] + [("mean", "group", "normalize_then_sum")]


@pytest.mark.parametrize("dither", DITHERS, ids=lambda d: f"{d.distribution}-{d.dead_groups}" if d else "clean")
@pytest.mark.parametrize(("baseline", "scale", "combine"), ESTIMATORS)
def test_every_option_on_hostile_rewards(dither, baseline, scale, combine):
    options = dict(dither=dither, step=2**32 - 1, baseline=baseline, scale=scale, combine=combine)
    expected, _ = check(HOSTILE, ["lowest"], group_size=4, reward_weights=[1.0, 0.5, -0.25], eps=0.0, ddof=0, **options)
    assert (expected.values != 0).sum() >= 4
    check(HOSTILE[:20], ["random"], cluster=False, group_ids=torch.tensor([5, 3, 5, 3, 9] * 4), **options)


@pytest.mark.parametrize(("scale", "combine"), [estimator[1:] for estimator in ESTIMATORS[3:]])
def test_rewards_whose_sums_overflow(scale, combine):
    rewards = torch.tensor([[1e308, 1e308], [-1e308, 2.0], [1.0, -1e308], [1e308, 1e308]] * 2, dtype=torch.float64)
    rewards[4:6] = 1e308
    for dither in (None, rf.Dither(dead_groups="skip")):
        options = dict(dither=dither, scale=scale, combine=combine, reward_weights=10.0, group_size=2)
        expected, _ = check(rewards, ["lowest"], **options)
        assert torch.isnan(expected.group_mean).any()


@pytest.mark.parametrize("group_size", [1, 3, 8, 256, 257])
def test_groups_below_at_and_above_a_block(group_size):
    rewards = torch.rand(group_size * (40 if group_size < 256 else 2), 2)
    orders = ORDERS if group_size < 256 else ["random"]
    check(rewards, orders, group_size=group_size, dither=rf.Dither(seed=1))


@pytest.mark.parametrize(("scale", "combine"), [estimator[1:] for estimator in ESTIMATORS[3:]])
@pytest.mark.parametrize("cluster", [True, False])
def test_unequal_shuffled_groups(scale, combine, cluster):
    generator = torch.Generator().manual_seed(1)
    rewards = torch.randn(300, 2, generator=generator).double()
    rewards[torch.rand(300, 2, generator=generator) < 0.1] = NAN
    ids = (torch.randn(300, generator=generator) * 15).long()  # from 8 samples down to one
    options = dict(scale=scale, combine=combine, group_ids=ids, sample_ids=torch.arange(300) - 2**62)
    check(rewards, cluster=cluster, dither=rf.Dither(seed=4, dead_groups="only"), **options)


@pytest.mark.parametrize("cluster", [True, False])
def test_batch_wide_sums_keep_their_order(cluster):
    """Rewards of 0.1 with noise of 1e-14: the rounding of the sums reaches the advantages. 1024 groups are a block."""
    rewards = torch.full((3600,), 0.1, dtype=torch.float64)
    options = dict(group_size=3, dither=rf.Dither(level=1e-14, seed=4), scale="batch", eps=0.0)
    expected, _ = check(rewards, ["lowest"], cluster=cluster, **options)
    assert expected.values.abs().max() > 1
    with rf.use_backend("reference"):
        moved = rf.group_advantages(rewards, sample_ids=torch.arange(3600).roll(1800), **options).values
    assert not torch.equal(moved.roll(-1800), expected.values)  # another order of the groups shows


def test_a_cluster_has_all_of_8192_samples():
    """7168 groups are seven blocks: the eighth has the groups of eight."""
    ids = torch.cat([torch.arange(7200), torch.arange(992) // 8 + 10_000])
    expected, machines = check(torch.rand(8192), ["lowest"], group_ids=ids, scale="batch", baseline="mean")
    assert len(machines) == 1 and (expected.values[7200:] != 0).all()


@pytest.mark.parametrize("distribution", ["uniform", "gaussian"])
def test_known_answers(distribution):
    """A sample a group and half range 1: the dithered mean is the noise, rounded to float32. The streams are those of
    the first columns; the cases beyond are other counters of the same Philox."""
    known = [case for case in json.loads((ROOT / "tests" / "known_answers.json").read_text()) if case["stream"] < 4]
    assert len(known) >= 7
    for case in known:
        rewards = torch.full((2, case["stream"] + 1), NAN)
        rewards[:, case["stream"]] = 0.0
        ids = torch.tensor([case["sample_id"]] * 2)
        dither = rf.Dither(distribution, 1.0, seed=case["seed"])
        out = rf.group_advantages(rewards, group_size=1, dither=dither, step=case["step"], sample_ids=ids)
        uniform, normal = (float.fromhex(case[name]) for name in ("uniform", "normal_float32"))
        xi = 2 * uniform - 1 if distribution == "uniform" else 1 / 1.7320508075688772 * normal
        assert out.dithered_mean.tolist() == [np.float32(xi)] * 2, case


def test_bytes_are_what_the_kernel_s_comment_says():
    n, K = 1024, 2
    ids = torch.arange(n)
    _, (machine,) = check(torch.rand(n, K), ["lowest"], group_size=8, sample_ids=ids, dither=rf.Dither())
    assert machine.bytes["global written"] == 21 * n
    assert machine.bytes["global read"] == (8 * K + 8) * n


@pytest.mark.skipif(other_release(), reason="the table is of nvcc 13.0")
@pytest.mark.parametrize("arch", ARCHES)
def test_no_register_is_spilled_and_the_table_is_kept(arch):
    column = {"80": 2, "90": 3, "100": 4}[arch]
    report = cubin("advantages", TARGETS[arch]).with_suffix(".log").read_text()
    found = re.findall(r"'advantages_(\w+)' for.*?(\d+) bytes stack.*?Used (\d+) registers", report, re.S)
    assert {kernel for kernel, *_ in found} == set(TABLE)
    for kernel, stack, registers in found:
        assert stack == "0" and int(registers) <= int(TABLE[kernel][column].replace("-", EMPTY)), kernel
