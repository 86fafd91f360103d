"""Group advantages against an independent oracle in plain Python floats, on every backend."""

import math
import subprocess
import sys
from itertools import product

import pytest
import torch

import redit_fast as rf
from redit_fast.dither import per_reward
from redit_fast.noise import noise
from tests import ROOT
from tests.conftest import few

OPS = ("group_advantages",)
NAN = math.nan
HOSTILE = torch.tensor(
    [
        [1.0, 0.0, 0.5, NAN], [1.0, 0.0, 0.5, 0.2], [0.0, 1.0, 0.5, 0.7], [1.0, 0.3, 0.5, NAN],  # mixed
        [0.35, 0.4, 0.95, 0.0], [0.95, 0.4, 0.35, 0.0], [0.4, 0.35, 0.95, 0.0], [0.95, 0.35, 0.4, 0.0],  # equal sums
        [NAN, NAN, NAN, NAN], [2.0, NAN, NAN, NAN], [NAN, NAN, NAN, math.inf], [NAN, 1.0, NAN, NAN],  # mostly unscored
        [NAN, NAN, NAN, NAN], [NAN, NAN, NAN, NAN], [NAN, NAN, NAN, NAN], [3.0, NAN, NAN, NAN],  # one scored
        [1e6, 1.0, 0.0, 0.0], [1e6, 1.5, 0.0, 0.0], [1e6, 1.2, 0.0, 0.0], [1e6, 1.3, 0.0, 0.0],  # large offset: dead
        [0.0, 1.0, 0.0, -1e9], [0.0, 1.5, 0.0, -1e9], [0.0, 1.2, 0.0, -1e3], [0.0, 1.3, 0.0, 7.0],  # outlier
    ]
)  # fmt: skip


def mean_std(values, ddof):
    n = len(values)
    mean = math.fsum(values) / n if n else 0.0
    return mean, math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (n - ddof)) if n > ddof else 0.0


def is_dead(values):
    return len(values) < 2 or max(values) - min(values) <= 1e-6 * max(1, abs(mean_std(values, 0)[0]))


def oracle(rewards, ids, weights, dither, step, baseline, scale, combine, eps, ddof):
    """Spec section 1, one group and one sample at a time."""
    rows, K = rewards.double().tolist(), rewards.shape[1]
    level = dither.level_at(step) if dither else 0.0
    members = {g: [i for i, x in enumerate(ids) if x == g] for g in ids}
    sums = lambda table, i: sum(w * v for w, v in zip(weights, table[i]) if math.isfinite(v))  # noqa: E731
    scored = [any(map(math.isfinite, row)) for row in rows]

    def noisy(i, k):
        a = level * per_reward("", dither.reward_scale, K)[k].item()
        xi = noise(dither.distribution, a, dither.seed, torch.tensor([i]), k, step).item()
        return rows[i][k] + xi

    def policy(dead):
        if level == 0:
            return False
        return {"apply": True, "center_only": True, "skip": not dead, "only": dead}[dither.dead_groups]

    def normalise(values, mean, std, dead):
        divisor = {"group": std + eps, "none": 1.0}[scale] if scale != "batch" else None
        if level and dead and dither.dead_groups == "center_only":
            divisor = 1.0
        n = len(values)
        factor = n / (n - 1) if baseline == "leave_one_out" else 1.0
        return [((v - mean) * factor, divisor) for v in values]

    values, silent = [0.0] * len(rows), [False] * len(rows)
    table = [list(row) for row in rows]
    if combine == "sum_then_normalize":
        pending = {}
        for group in members.values():
            alive = [i for i in group if scored[i]]
            dead = is_dead([sums(rows, i) for i in alive])
            if policy(dead):
                for i in alive:
                    table[i] = [noisy(i, k) for k in range(K)]
            if len(alive) < 2 or (dead and not policy(dead)):
                continue
            xs = [sums(table, i) for i in alive]
            pending.update(zip(alive, normalise(xs, *mean_std(xs, ddof), dead)))
        _, batch_std = mean_std([sums(table, i) for i in range(len(rows)) if scored[i]], ddof)
        for i, (centred, divisor) in pending.items():
            values[i] = centred / (batch_std + eps if divisor is None else divisor)
        return values
    for group in members.values():
        dead_columns = 0
        for k in range(K):
            alive = [i for i in group if math.isfinite(rows[i][k])]
            dead = is_dead([rows[i][k] for i in alive])
            xs = [noisy(i, k) if policy(dead) else rows[i][k] for i in alive]
            if len(alive) < 2 or (dead and not policy(dead)):
                dead_columns += 1
                continue
            for i, (centred, divisor) in zip(alive, normalise(xs, *mean_std(xs, ddof), dead)):
                values[i] += weights[k] * centred / divisor
        for i in group:
            silent[i] = dead_columns == K
    mean, std = mean_std([values[i] for i in range(len(rows)) if scored[i]], ddof)
    return [(v - mean) / (std + eps) if ok and not quiet else 0.0 for v, ok, quiet in zip(values, scored, silent)]


DITHERS = [None] + [
    rf.Dither(distribution, 0.05, [1.0, 2.0, 0.5, 0.1], dead_groups=policy, seed=3)
    for distribution, policy in product(["gaussian", "uniform"], ["apply", "skip", "center_only", "only"])
]
ESTIMATORS = [
    (baseline, scale, "sum_then_normalize")
    for baseline, scale in product(["mean", "leave_one_out"], ["group", "batch", "none"])
] + [("mean", "group", "normalize_then_sum")]


@pytest.mark.parametrize("dither", DITHERS, ids=lambda d: f"{d.distribution}-{d.dead_groups}" if d else "clean")
@pytest.mark.parametrize(("baseline", "scale", "combine"), ESTIMATORS)
@pytest.mark.parametrize(("eps", "ddof"), [(1e-4, 1), (0.0, 0)])
def test_every_option_follows_the_oracle_on_hostile_rewards(
    backend, device, dither, baseline, scale, combine, eps, ddof
):
    weights = [1.0, 0.5, -0.25, 2.0]
    ids = [i // 4 for i in range(len(HOSTILE))]
    out = rf.group_advantages(
        HOSTILE.double().to(device), group_size=4, reward_weights=weights, dither=dither, step=9,
        baseline=baseline, scale=scale, combine=combine, eps=eps, ddof=ddof,
    )  # fmt: skip
    expected = oracle(HOSTILE, ids, weights, dither, 9, baseline, scale, combine, eps, ddof)
    assert torch.isfinite(out.values).all()
    torch.testing.assert_close(out.values, torch.tensor(expected), rtol=2e-6, atol=1e-9)
    assert out.values.abs().max() > 0.1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("options", [{}, {"scale": "batch"}, {"scale": "none"}, {"baseline": "leave_one_out"}])
def test_rewards_that_are_equal_only_on_paper_give_exactly_0(backend, dtype, options):
    """0.35 + 0.4 + 0.95 in four orders, which differ by an ulp; and singletons and single scored samples."""
    rewards = torch.tensor([[0.35, 0.4, 0.95], [0.95, 0.4, 0.35], [0.4, 0.35, 0.95], [0.95, 0.35, 0.4]], dtype=dtype)
    assert dtype == torch.float32 or len((rewards[:, 0] + rewards[:, 1] + rewards[:, 2]).unique()) > 1
    for eps in (0.0, 1e-4):
        out = rf.group_advantages(rewards, group_size=4, eps=eps, **options)
        assert (out.values == 0).all() and out.dead.all()
    for dither in [None] + [rf.Dither(dead_groups=policy) for policy in ("apply", "skip", "center_only", "only")]:
        for lonely, size in (([3.0, 4.0, 5.0], 1), ([1.0, NAN, NAN, 2.0, math.inf, NAN], 3), ([NAN] * 4, 2)):
            out = rf.group_advantages(torch.tensor(lonely), group_size=size, dither=dither, eps=0.0, **options)
            assert (out.values == 0).all() and out.dead.all() and (out.group_std == 0).all()


def test_statistics_are_those_of_the_samples_own_group(backend, device):
    dither = rf.Dither(level=0.1, seed=1)
    out = rf.group_advantages(HOSTILE[:8].double().to(device), group_size=4, dither=dither)
    mean, std = mean_std([1.5, 1.7, 2.2, 1.8], 1)
    assert out.group_mean[:4].tolist() == pytest.approx([mean] * 4, rel=1e-6)
    assert out.group_std[:4].tolist() == pytest.approx([std] * 4, rel=1e-6)
    assert out.dead.tolist() == [False] * 4 + [True] * 4
    assert (out.dithered_mean != out.group_mean).all() and (out.dithered_std[4:] > 1e-3).all()


def test_bits_are_those_of_the_reference_for_many_unequal_shuffled_groups(backend):
    generator = torch.Generator().manual_seed(1)
    n = few(backend, 20_000, 1500)  # more than 1024 groups: two blocks of batch sums
    ids = torch.randint(-1500, 1500, (n,), generator=generator)
    rewards = torch.randn(n, 3, generator=generator).double()
    rewards[torch.rand(n, 3, generator=generator) < 0.1] = NAN
    for baseline, scale, combine in ESTIMATORS:
        for dither in DITHERS[:: 9 // few(backend, 9, 3)]:
            options = dict(baseline=baseline, scale=scale, combine=combine, step=2, reward_weights=[1, 0.3, 2])
            if dither:
                dither = rf.Dither(dither.distribution, 0.2, dead_groups=dither.dead_groups, seed=11)
            ours = rf.group_advantages(rewards, group_ids=ids, dither=dither, **options)
            with rf.use_backend("reference"):
                reference = rf.group_advantages(rewards, group_ids=ids, dither=dither, **options)
            for name, a, b in zip(rf.Advantages._fields, ours, reference):
                assert torch.equal(a, b), (name, options)


def in_order(values):
    total = 0.0
    for value in values:
        total += value
    return total


def batch_sum(groups):
    """Members in order, groups in blocks of 1024, blocks in order."""
    sums = [in_order(group) for group in groups]
    return in_order(in_order(sums[first : first + 1024]) for first in range(0, len(sums), 1024))


def test_batch_sums_are_in_the_documented_order_of_blocks(backend):
    """A group's sum is nothing but rounding, and so is the batch's mean, which an exact 0 shows. Each group has one of
    three rewards, with weights 1, -1 and 1e-13: the first two cancel in the end, and on the way there they swallow of
    the third's sums what the order makes them."""
    groups, weights = 3000, [1.0, -1.0, 1e-13]
    scores = torch.rand(groups, 3).double()
    scores[-100:] = torch.tensor([0.25, 0.5, 0.75])
    order, which, twice = torch.randperm(groups), torch.full((groups,), 2), torch.rand(400, 3).double()
    for k in (0, 1):
        scores[order[k:800:2]] = twice
        which[order[k:800:2]] = k
    rewards = torch.full((groups, 3, 3), NAN, dtype=torch.float64)
    rewards.scatter_(2, which[:, None, None].expand(-1, 3, 1), scores[..., None])
    x = []
    for row, k in zip(scores.tolist(), which.tolist(), strict=True):
        mean = in_order(row) / 3
        std = math.sqrt(in_order((r - mean) ** 2 for r in row) / 2)
        x.append([weights[k] * ((r - mean) / (std + 1e-4)) for r in row])
    mean = batch_sum(x) / (3 * groups)
    std = math.sqrt(batch_sum([[(a - mean) ** 2 for a in row] for row in x]) / (3 * groups - 1))
    expected = torch.tensor([[(a - mean) / (std + 1e-4) for a in row] for row in x], dtype=torch.float64).float()
    assert (expected != 0).all() and abs(mean * 3 * groups / in_order(map(in_order, x)) - 1) > 1e-6
    options = {"group_size": 3, "combine": "normalize_then_sum", "reward_weights": weights}
    assert torch.equal(rf.group_advantages(rewards.flatten(0, 1), **options).values, expected.flatten())


@pytest.mark.parametrize("scale", ["group", "none"])
def test_reordering_interleaving_and_splitting_whole_groups_keep_every_bit(backend, scale):
    groups, size = 40, 7
    rewards = torch.randn(groups, size, 2).double()
    ids = torch.arange(groups)[:, None].expand(-1, size)
    samples = torch.arange(groups * size).view(groups, size)

    def run(order, rows=slice(None)):
        r, g, s = (x.flatten(0, 1)[order][rows] for x in (rewards, ids, samples))
        dither = rf.Dither(seed=5)
        out = rf.group_advantages(r, group_ids=g, sample_ids=s, dither=dither, scale=scale)
        return dict(zip(s.tolist(), zip(*(field.tolist() for field in out))))

    in_order = torch.arange(groups * size)
    interleaved = samples.t().flatten()
    shuffled_groups = samples[torch.randperm(groups)].flatten()
    whole = run(in_order)
    assert run(interleaved) == whole and run(shuffled_groups) == whole
    assert run(in_order, slice(0, 70)) | run(in_order, slice(70, None)) == whole


def test_level_zero_is_bitwise_no_dither(backend):
    rewards = torch.randn(64, 3)
    clean = rf.group_advantages(rewards, group_size=8)
    for schedule in ("constant", "cosine_reverse", "factor"):
        zero = rf.Dither(level=0, schedule=schedule, total_steps=10)
        assert all(map(torch.equal, rf.group_advantages(rewards, group_size=8, dither=zero), clean))
    assert not torch.equal(rf.group_advantages(rewards, group_size=8, dither=rf.Dither()).values, clean.values)


@pytest.mark.parametrize(("group_size", "rms"), [(2, 0.67), (8, 0.93), (16, 0.95)])
@pytest.mark.parametrize("level", [0.01, 0.05, 0.5])
def test_a_dithered_dead_group_gets_full_size_random_advantages_at_any_level(backend, group_size, rms, level):
    rewards = torch.zeros(group_size * few(backend, 4000, 400))
    values = rf.group_advantages(
        rewards, group_size=group_size, dither=rf.Dither(level=level, distribution="gaussian")
    ).values
    # A / std is sqrt((G - 1) / G) at large noise; eps = 1e-4 takes a little off it at level 0.01.
    assert rms - 0.02 < values.square().mean().sqrt().item() < math.sqrt((group_size - 1) / group_size) + 1e-3


def test_advantages_never_exceed_the_bound_of_their_group_size(backend):
    for size in (2, 3, 8, 16):
        rewards = torch.zeros(size)
        rewards[0] = 1e12
        bound = torch.tensor((size - 1) / math.sqrt(size))
        out = rf.group_advantages(rewards, group_size=size, eps=0.0)
        assert out.values.abs().max() <= bound and out.values[0] > 0.99 * bound


@pytest.mark.parametrize(
    "dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int8, torch.int64]
)
def test_any_real_dtype_is_read_exactly(backend, dtype):
    rewards = torch.tensor([0, 1, 3, 2, 7, 7, 0, 1])
    expected = rf.group_advantages(rewards.double(), group_size=4).values
    assert torch.equal(rf.group_advantages(rewards.to(dtype), group_size=4).values, expected)


def test_singletons_empty_batches_and_strided_rewards(backend):
    single = rf.group_advantages(torch.tensor([3.0, 4.0]), group_size=1, dither=rf.Dither())
    assert single.values.tolist() == [0.0, 0.0] and single.dead.all() and single.group_std.tolist() == [0.0, 0.0]
    assert rf.group_advantages(torch.empty(0, 2), group_size=4).values.shape == (0,)
    wide = torch.randn(16, 9)
    expected = rf.group_advantages(wide[:, 1::3].clone(), group_size=4).values
    assert torch.equal(rf.group_advantages(wide[:, 1::3], group_size=4).values, expected)


def test_trl_numbers():
    """TRL 1.16 grpo_trainer.py: (r - mean) / (std + 1e-4) with Bessel's correction."""
    rewards = torch.randn(32)
    grouped = rewards.view(4, 8)
    expected = (grouped - grouped.mean(1, keepdim=True)) / (grouped.std(1, keepdim=True) + 1e-4)
    torch.testing.assert_close(rf.group_advantages(rewards, group_size=8).values, expected.flatten())


BAD = [
    ({}, "exactly one"),
    ({"group_size": 3}, "group_size"),
    ({"group_size": 0}, "group_size"),
    ({"group_size": 4, "group_ids": torch.zeros(8, dtype=torch.int64)}, "exactly one"),
    ({"group_ids": torch.zeros(8)}, "group_ids"),
    ({"group_ids": torch.zeros(7, dtype=torch.int64)}, "group_ids"),
    ({"group_size": 4, "sample_ids": torch.zeros(8)}, "sample_ids"),
    ({"group_size": 4, "reward_weights": [1.0, 2.0]}, "reward_weights"),
    ({"group_size": 4, "reward_weights": math.inf}, "reward_weights"),
    ({"group_size": 4, "dither": rf.Dither(reward_scale=[1.0, 2.0])}, "reward_scale"),
    ({"group_size": 4, "baseline": "median"}, "baseline"),
    ({"group_size": 4, "scale": "std"}, "scale"),
    ({"group_size": 4, "combine": "normalize_then_sum", "scale": "batch"}, "combine"),
    ({"group_size": 4, "eps": -1.0}, "eps"),
    ({"group_size": 4, "ddof": 2}, "ddof"),
    ({"group_size": 4, "step": -1}, "step"),
    ({"group_size": 4, "step": 1.0}, "step"),
]


@pytest.mark.parametrize(("options", "message"), BAD)
def test_bad_input_gets_one_sentence_that_names_the_argument(options, message):
    with pytest.raises((ValueError, TypeError), match=message) as caught:
        rf.group_advantages(torch.randn(8), **options)
    assert "\n" not in str(caught.value)


def test_rewards_themselves_are_checked():
    for rewards in ([1.0, 2.0], torch.zeros(2, dtype=torch.complex64)):
        with pytest.raises(TypeError, match="rewards"):
            rf.group_advantages(rewards, group_size=2)
    with pytest.raises(ValueError, match="rewards"):
        rf.group_advantages(torch.zeros(2, 2, 2), group_size=2)


def test_two_ranks_need_sample_ids(tmp_path):
    script = f"""
import os, torch, redit_fast as rf
from tests.ranks import meet_and_end
other = os.fork()  # after the imports, which take seconds, and before any thread
rank = 0 if other else 1
torch.distributed.init_process_group("gloo", init_method="file://{tmp_path}/store", rank=rank, world_size=2)
rewards = torch.zeros(8)
rf.group_advantages(rewards, group_size=4)
try:
    rf.group_advantages(rewards, group_size=4, dither=rf.Dither())
except ValueError as error:
    assert "sample_ids" in str(error)
else:
    raise SystemExit("no error without sample_ids")
ids = torch.arange(8) + 8 * rank
values = rf.group_advantages(rewards, group_size=4, dither=rf.Dither(), sample_ids=ids).values
torch.save(values, f"{tmp_path}/{{rank}}.pt")
meet_and_end(other)
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, stderr=subprocess.PIPE, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    values = torch.cat([torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1)])
    assert torch.equal(values, rf.group_advantages(torch.zeros(16), group_size=4, dither=rf.Dither()).values)
