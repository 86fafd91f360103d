"""Dithered group advantages; redit_fast/backends/reference/advantages.py is the definition, bit for bit.

    A = (r~ - mean) / (std + eps), r~ = sum_k weight_k (reward_k + xi_k)       reads 8 K + 24 bytes a sample, writes 21

float64, with enable_fp_fusion=False: a fused multiply-add would change the bits. A program takes GROUPS groups. Its
samples' noise has a lane each; sums have a lane a group and add its members in batch order. Between the two lie buffers
in sorted order (`place`), which no other program touches. Consecutive groups (group_size) are one launch; groups by id
are sorted by torch first, and what is normalised over the batch takes five launches more.
"""

import torch
import triton
import triton.language as tl

from redit_fast.kernels.element import noise
from redit_fast.kernels.launch import bits, table, word

DEAD_SPREAD = tl.constexpr(1e-6)
BATCH_BLOCK = tl.constexpr(1024)  # groups per partial sum of a batch-wide sum
LANES = tl.constexpr(64)  # with 128 sm_80 spills a register
LAUNCH = {"num_warps": 1, "enable_fp_fusion": False}  # with 4, sm_80 and sm_100 spill a register
GROUPS = 32  # a lane each
SEED, STEP, EPS, DDOF, PER_REWARD = (tl.constexpr(i) for i in range(5))  # the table of numbers; then weights, ranges


@triton.jit
def _number(numbers_ptr, i):
    return tl.load(numbers_ptr + i).to(tl.float64, bitcast=True)


@triton.jit
def _at_least_one(x):
    return tl.where(x < 1.0, 1.0, x)  # NaN stays


@triton.jit
def _quotient(x, divisor):
    return tl.where(divisor > 0.0, x / divisor, 0.0)


@triton.jit
def _deviation(squares, n, ddof):
    return tl.where(n > ddof, tl.sqrt(squares / _at_least_one(n - ddof)), 0.0)


@triton.jit
def _members(starts_ptr, group_size, n, GROUPS: tl.constexpr):
    """First places and sizes of the program's groups, and the largest size."""
    group = tl.program_id(0).to(tl.int64) * GROUPS + tl.arange(0, GROUPS)
    if starts_ptr is None:
        begin = tl.minimum(group * group_size, n)
        size = tl.minimum(begin + group_size, n) - begin
    else:
        begin = tl.load(starts_ptr + group, group < n, n)
        size = tl.load(starts_ptr + group + 1, group < n, n) - begin
    return begin, size, tl.max(size)


@triton.jit
def _at(order_ptr, place, here):
    """The sample at a place of the sorted order; consecutive groups are sorted."""
    if order_ptr is None:
        i = place
    else:
        i = tl.load(order_ptr + place, here, 0)
    return i


@triton.jit
def _noisy(dead, DITHER: tl.constexpr, POLICY: tl.constexpr):
    if not DITHER:
        noisy = dead & (dead == 0)
    elif POLICY == "skip":
        noisy = dead == 0
    elif POLICY == "only":
        noisy = dead
    else:
        noisy = dead | (dead == 0)
    return noisy


@triton.jit
def _moments(clean_ptr, noisy_ptr, noisy, scored_ptr, stride, begin, size, longest, ddof):
    """Number, mean and deviation of the scored members, of their noisy values where `noisy`."""
    n, total, squares = begin * 0.0, begin * 0.0, begin * 0.0
    n, total, squares = n.to(tl.float64), total.to(tl.float64), squares.to(tl.float64)
    for j in range(longest):
        at = (begin + j) * stride
        scored = tl.load(scored_ptr + at, j < size, 0) != 0
        x = tl.where(noisy, tl.load(noisy_ptr + at, scored, 0.0), tl.load(clean_ptr + at, scored, 0.0))
        n += scored.to(tl.float64)
        total += x
    mean = total / _at_least_one(n)
    for j in range(longest):
        at = (begin + j) * stride
        scored = tl.load(scored_ptr + at, j < size, 0) != 0
        x = tl.where(noisy, tl.load(noisy_ptr + at, scored, 0.0), tl.load(clean_ptr + at, scored, 0.0))
        squares += tl.where(scored, (x - mean) * (x - mean), 0.0)
    return n, mean, _deviation(squares, n, ddof)


@triton.jit
def _equal_rewards(x_ptr, scored_ptr, stride, begin, size, longest, n, mean):
    low = tl.full(begin.shape, float("inf"), tl.float64)
    high = -low
    for j in range(longest):
        at = (begin + j) * stride
        scored = tl.load(scored_ptr + at, j < size, 0) != 0
        x = tl.load(x_ptr + at, scored, 0.0)
        low = tl.where(scored & (x < low), x, low)
        high = tl.where(scored & (x > high), x, high)
    # An overflowed sum (NaN) makes the mean NaN and the comparison false: not dead.
    return (n < 2.0) | (high - low <= DEAD_SPREAD * _at_least_one(tl.abs(mean)))


@triton.jit
def _divisor(std, dead, eps, DITHER: tl.constexpr, POLICY: tl.constexpr):
    divisor = std + eps
    if POLICY == "center_only":
        divisor = tl.where(dead, 1.0, divisor)
    return divisor


@triton.jit(do_not_specialize=["group_size", "n", "reward_count"])
def _sum_kernel(
    values_ptr, mean_ptr, std_ptr, dead_ptr, noisy_mean_ptr, noisy_std_ptr,
    rewards_ptr, order_ptr, starts_ptr, group_size, ids_ptr, numbers_ptr,
    clean_ptr, dithered_ptr, scored_ptr, x_ptr, advantage_ptr, heard_ptr, n, reward_count,
    DITHER: tl.constexpr, GAUSSIAN: tl.constexpr, POLICY: tl.constexpr, LEAVE_ONE_OUT: tl.constexpr,
    SCALE: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    """sum_then_normalize. With the batch's scale: the dithered sums x, centred and `heard` samples, in sorted order."""
    begin, size, longest = _members(starts_ptr, group_size, n, GROUPS)
    if longest == 0:  # the host does not know how many groups there are
        return
    seed, step = tl.load(numbers_ptr + SEED), tl.load(numbers_ptr + STEP)
    last = tl.max(begin + size)
    for start in range(tl.min(begin), last, LANES):
        place = start + tl.arange(0, LANES)
        here = place < last
        i = _at(order_ptr, place, here)
        ids = _at(ids_ptr, i, here)
        clean, dithered = tl.zeros([LANES], tl.float64), tl.zeros([LANES], tl.float64)
        count = tl.zeros([LANES], tl.int32)
        for k in range(reward_count):
            reward = tl.load(rewards_ptr + i * reward_count + k, here, float("nan"))
            scored, weight = tl.abs(reward) < float("inf"), _number(numbers_ptr, PER_REWARD + k)
            count += scored.to(tl.int32)
            clean += tl.where(scored, weight * reward, 0.0)
            if DITHER:
                half_range = _number(numbers_ptr, PER_REWARD + reward_count + k)
                xi = noise(half_range, seed, ids, k, step, GAUSSIAN)
                dithered += tl.where(scored, weight * (reward + xi), 0.0)
        tl.store(clean_ptr + place, clean, here)
        if DITHER:
            tl.store(dithered_ptr + place, dithered, here)
        tl.store(scored_ptr + place, (count > 0).to(tl.int8), here)
    tl.debug_barrier()

    eps, ddof = _number(numbers_ptr, EPS), _number(numbers_ptr, DDOF)
    if not DITHER:
        dithered_ptr = clean_ptr
    no = size < 0
    scored_count, mean, std = _moments(clean_ptr, clean_ptr, no, scored_ptr, 1, begin, size, longest, ddof)
    dead = _equal_rewards(clean_ptr, scored_ptr, 1, begin, size, longest, scored_count, mean)
    noisy = _noisy(dead, DITHER, POLICY)
    _, noisy_mean, noisy_std = _moments(clean_ptr, dithered_ptr, noisy, scored_ptr, 1, begin, size, longest, ddof)
    silent = (scored_count < 2.0) | (dead & (noisy == 0))
    divisor = _divisor(noisy_std, dead, eps, DITHER, POLICY)
    for j in range(longest):
        at, here = begin + j, j < size
        i = _at(order_ptr, at, here)
        x = tl.where(noisy, tl.load(dithered_ptr + at, here, 0.0), tl.load(clean_ptr + at, here, 0.0))
        heard = (tl.load(scored_ptr + at, here, 0) != 0) & (silent == 0)
        a = x - noisy_mean
        if LEAVE_ONE_OUT:
            a = a * scored_count / _at_least_one(scored_count - 1.0)
        if SCALE == "group":
            a = _quotient(a, divisor)
        if SCALE == "batch":
            tl.store(x_ptr + at, x, here)
            tl.store(advantage_ptr + at, a, here)
            tl.store(heard_ptr + at, heard.to(tl.int8), here)
        else:
            tl.store(values_ptr + i, tl.where(heard, a, 0.0).to(tl.float32), here)
        tl.store(mean_ptr + i, mean.to(tl.float32), here)
        tl.store(std_ptr + i, std.to(tl.float32), here)
        tl.store(dead_ptr + i, dead.to(tl.int8), here)
        tl.store(noisy_mean_ptr + i, noisy_mean.to(tl.float32), here)
        tl.store(noisy_std_ptr + i, noisy_std.to(tl.float32), here)


@triton.jit(do_not_specialize=["group_size", "n", "reward_count"])
def _normalize_kernel(
    mean_ptr, std_ptr, dead_ptr, noisy_mean_ptr, noisy_std_ptr,
    rewards_ptr, order_ptr, starts_ptr, group_size, ids_ptr, numbers_ptr,
    columns_ptr, noisy_ptr, has_ptr, z_ptr, chosen_ptr,
    clean_ptr, dithered_ptr, scored_ptr, x_ptr, heard_ptr, n, reward_count,
    DITHER: tl.constexpr, GAUSSIAN: tl.constexpr, POLICY: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    """normalize_then_sum (GDPO): x = sum_k weight_k z_k and `heard` samples, in sorted order, for the batch."""
    begin, size, longest = _members(starts_ptr, group_size, n, GROUPS)
    if longest == 0:  # the host does not know how many groups there are
        return
    seed, step = tl.load(numbers_ptr + SEED), tl.load(numbers_ptr + STEP)
    last = tl.max(begin + size)
    for start in range(tl.min(begin), last, LANES):
        place = start + tl.arange(0, LANES)
        here = place < last
        i = _at(order_ptr, place, here)
        ids = _at(ids_ptr, i, here)
        clean, count = tl.zeros([LANES], tl.float64), tl.zeros([LANES], tl.int32)
        for k in range(reward_count):
            reward = tl.load(rewards_ptr + i * reward_count + k, here, float("nan"))
            scored, at = tl.abs(reward) < float("inf"), place * reward_count + k
            count += scored.to(tl.int32)
            clean += tl.where(scored, _number(numbers_ptr, PER_REWARD + k) * reward, 0.0)
            tl.store(columns_ptr + at, reward, here)
            tl.store(has_ptr + at, scored.to(tl.int8), here)
            if DITHER:
                half_range = _number(numbers_ptr, PER_REWARD + reward_count + k)
                tl.store(noisy_ptr + at, reward + noise(half_range, seed, ids, k, step, GAUSSIAN), here)
        tl.store(clean_ptr + place, clean, here)
        tl.store(scored_ptr + place, (count > 0).to(tl.int8), here)
    tl.debug_barrier()

    eps, ddof = _number(numbers_ptr, EPS), _number(numbers_ptr, DDOF)
    if not DITHER:
        noisy_ptr = columns_ptr
    no = size < 0
    dead, silent = size >= 0, size >= 0
    for k in range(reward_count):
        column_ptr, noise_ptr, own_ptr = columns_ptr + k, noisy_ptr + k, has_ptr + k
        scored_count, mean, _ = _moments(column_ptr, column_ptr, no, own_ptr, reward_count, begin, size, longest, ddof)
        dead_k = _equal_rewards(column_ptr, own_ptr, reward_count, begin, size, longest, scored_count, mean)
        noisy = _noisy(dead_k, DITHER, POLICY)
        _, mean, std = _moments(column_ptr, noise_ptr, noisy, own_ptr, reward_count, begin, size, longest, ddof)
        silent_k = (scored_count < 2.0) | (dead_k & (noisy == 0))
        dead, silent = dead & dead_k, silent & silent_k
        divisor = _divisor(std, dead_k, eps, DITHER, POLICY)
        for j in range(longest):
            at, here = (begin + j) * reward_count, j < size
            x = tl.where(noisy, tl.load(noise_ptr + at, here, 0.0), tl.load(column_ptr + at, here, 0.0))
            tl.store(z_ptr + at + k, tl.where(silent_k, 0.0, _quotient(x - mean, divisor)), here)
            tl.store(chosen_ptr + at + k, x, here)
    tl.debug_barrier()

    for start in range(tl.min(begin), last, LANES):
        place = start + tl.arange(0, LANES)
        here = place < last
        x, dithered = tl.zeros([LANES], tl.float64), tl.zeros([LANES], tl.float64)
        for k in range(reward_count):
            at, weight = place * reward_count + k, _number(numbers_ptr, PER_REWARD + k)
            scored = tl.load(has_ptr + at, here, 0) != 0
            x += tl.where(scored, weight * tl.load(z_ptr + at, here, 0.0), 0.0)
            dithered += tl.where(scored, weight * tl.load(chosen_ptr + at, here, 0.0), 0.0)
        tl.store(x_ptr + place, x, here)
        tl.store(dithered_ptr + place, dithered, here)
    tl.debug_barrier()

    _, mean, std = _moments(clean_ptr, clean_ptr, no, scored_ptr, 1, begin, size, longest, ddof)
    _, noisy_mean, noisy_std = _moments(dithered_ptr, dithered_ptr, no, scored_ptr, 1, begin, size, longest, ddof)
    for j in range(longest):
        at, here = begin + j, j < size
        i = _at(order_ptr, at, here)
        heard = (tl.load(scored_ptr + at, here, 0) != 0) & (silent == 0)
        tl.store(heard_ptr + at, heard.to(tl.int8), here)
        tl.store(mean_ptr + i, mean.to(tl.float32), here)
        tl.store(std_ptr + i, std.to(tl.float32), here)
        tl.store(dead_ptr + i, dead.to(tl.int8), here)
        tl.store(noisy_mean_ptr + i, noisy_mean.to(tl.float32), here)
        tl.store(noisy_std_ptr + i, noisy_std.to(tl.float32), here)


@triton.jit(do_not_specialize=["group_size", "n"])
def _group_sums_kernel(
    sums_ptr, x_ptr, scored_ptr, starts_ptr, group_size, batch_ptr, n, SQUARES: tl.constexpr, GROUPS: tl.constexpr
):
    """sums[g] = sum of x, or of (x - batch mean)^2, over the scored members; 0 past the last group."""
    begin, size, longest = _members(starts_ptr, group_size, n, GROUPS)
    total = tl.zeros([GROUPS], tl.float64)
    for j in range(longest):
        scored = tl.load(scored_ptr + begin + j, j < size, 0) != 0
        x = tl.load(x_ptr + begin + j, scored, 0.0)
        if SQUARES:
            x -= tl.load(batch_ptr + 1)
            x = x * x
        total += tl.where(scored, x, 0.0)
    group = tl.program_id(0).to(tl.int64) * GROUPS + tl.arange(0, GROUPS)
    tl.store(sums_ptr + group, total, group < n)


@triton.jit(do_not_specialize=["n"])
def _batch_kernel(batch_ptr, sums_ptr, partials_ptr, scored_ptr, numbers_ptr, n, SQUARES: tl.constexpr):
    """batch = (number scored, mean, std) from the group sums: blocks of 1024 groups, then the blocks in order."""
    blocks = tl.cdiv(n, BATCH_BLOCK)
    for first in range(0, blocks, LANES):
        block = first + tl.arange(0, LANES).to(tl.int64)
        partial = tl.zeros([LANES], tl.float64)
        for j in range(tl.minimum(n, BATCH_BLOCK)):
            at = block * BATCH_BLOCK + j
            partial += tl.load(sums_ptr + at, at < n, 0.0)
        tl.store(partials_ptr + block, partial, block < blocks)
    tl.debug_barrier()
    total = tl.load(numbers_ptr + EPS).to(tl.float64) * 0.0
    for block in range(blocks):
        total += tl.load(partials_ptr + block)
    if SQUARES:
        tl.store(batch_ptr + 2, _deviation(total, tl.load(batch_ptr), _number(numbers_ptr, DDOF)))
    else:
        count = tl.zeros([LANES], tl.int64)
        for start in range(0, n, LANES):
            place = start + tl.arange(0, LANES)
            count += tl.load(scored_ptr + place, place < n, 0).to(tl.int64)
        scored_count = tl.sum(count).to(tl.float64)
        tl.store(batch_ptr, scored_count)
        tl.store(batch_ptr + 1, total / _at_least_one(scored_count))


@triton.jit(do_not_specialize=["n"])
def _values_kernel(
    values_ptr, dead_ptr, order_ptr, x_ptr, heard_ptr, batch_ptr, numbers_ptr, n,
    DITHER: tl.constexpr, POLICY: tl.constexpr, CENTRE: tl.constexpr,
):  # fmt: skip
    place = tl.program_id(0).to(tl.int64) * LANES + tl.arange(0, LANES)
    here = place < n
    i = _at(order_ptr, place, here)
    a, std, eps = tl.load(x_ptr + place, here, 0.0), tl.load(batch_ptr + 2), _number(numbers_ptr, EPS)
    if CENTRE:  # GDPO
        a = _quotient(a - tl.load(batch_ptr + 1), std + eps)
    else:
        dead = tl.load(dead_ptr + i, here, 0) != 0
        a = _quotient(a, _divisor(tl.broadcast_to(std, a.shape), dead, eps, DITHER, POLICY))
    heard = tl.load(heard_ptr + place, here, 0) != 0
    tl.store(values_ptr + i, tl.where(heard, a, 0.0).to(tl.float32), here)


def group_advantages(out, inputs, options) -> None:
    """Advantages, AdvantageInputs and AdvantageOptions of redit_fast/backends/args.py."""
    rewards, groups, group_size, sample_ids, weights, half_range = inputs
    group_size, dead_groups, dither = group_size or 0, options.dead_groups, half_range is not None
    gdpo, by_batch = options.combine == "normalize_then_sum", options.scale == "batch"
    (n, reward_count), device = rewards.shape, rewards.device
    with torch.cuda.device_of(rewards):
        order = starts = None
        if groups is not None:
            order = torch.argsort(groups, stable=True)
            starts = torch.searchsorted(groups[order], torch.arange(n + 1, device=device))
        per_reward = (*weights.tolist(), *(half_range.tolist() if dither else ()))
        numbers = (word(options.seed), options.step, *bits(options.eps, options.ddof, *per_reward))
        numbers = table(numbers, device)
        room = triton.cdiv(n, 16) * 16  # buffers start at multiples of 16 bytes: another alignment is compiled anew
        clean, dithered, x, centred, sums = torch.empty(5, room, dtype=torch.float64, device=device)
        scored, heard = torch.empty(2, room, dtype=torch.int8, device=device)
        batch, partials = torch.empty(2, triton.cdiv(n, BATCH_BLOCK.value) + 3 & ~1, dtype=torch.float64, device=device)
        stats = out.group_mean, out.group_std, out.dead.view(torch.int8), out.dithered_mean, out.dithered_std
        sources = rewards, order, starts, group_size, sample_ids, numbers
        programs, noise_of = (triton.cdiv(n, GROUPS),), (dither, options.distribution == "gaussian", dead_groups)
        if gdpo:
            columns, noisy, z, chosen = torch.empty(4, room, reward_count, dtype=torch.float64, device=device)
            has = torch.empty(n, reward_count, dtype=torch.int8, device=device)
            _normalize_kernel[programs](
                *stats, *sources, columns, noisy, has, z, chosen, clean, dithered, scored, x, heard, n, reward_count,
                *noise_of, GROUPS, **LAUNCH,
            )  # fmt: skip
        else:
            _sum_kernel[programs](
                out.values, *stats, *sources, clean, dithered, scored, x, centred, heard, n, reward_count,
                *noise_of, options.baseline == "leave_one_out", options.scale, GROUPS, **LAUNCH,
            )  # fmt: skip
        if gdpo or by_batch:
            for squares in (False, True):
                _group_sums_kernel[programs](sums, x, scored, starts, group_size, batch, n, squares, GROUPS, **LAUNCH)
                _batch_kernel[(1,)](batch, sums, partials, scored, numbers, n, squares, **LAUNCH)
            _values_kernel[(triton.cdiv(n, LANES.value),)](
                out.values, stats[2], order, x if gdpo else centred, heard, batch, numbers, n,
                dither, dead_groups, gdpo, **LAUNCH,
            )  # fmt: skip
