"""Passes over parameters; redit_fast/backends/reference/params.py is the definition.

    squared_norm   sum x^2                                            2 / 4 bytes a weight of 16 bits / float32
    perturb        x += scale g, rounded once; then g *= factor       6 / 12, and 2 / 4 more with a factor
    combine        g2 = (1 - ratio) g1 + ratio g2                     6 / 12
    adamw          AdamW of m, v and the master or x; x = master      28 / 28

One program a chunk of 64 K weights of one tensor; addresses and numbers come from a table on the device. Weights are
tiled in rows of 8: one Philox call of the stochastic rounding, and 16 bytes of a 16-bit type. Sums are float64 partials
a chunk, added in a fixed order by a second kernel. Launch with enable_fp_fusion=False: a fused multiply-add would
change the bits.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from redit_fast.kernels.element import adamw_element, nearest, philox4x32, pick_half, power, round_stochastically, widen
from redit_fast.kernels.launch import TYPES, bits, table, word

CHUNK = tl.constexpr(65536)  # weights a program: 0.4 MB of a perturbation, and partials of 1/2000 of the bytes moved
STREAM_ROUNDING = tl.constexpr(0x10000)
LAUNCH = {"num_warps": 4, "enable_fp_fusion": False}
# Of a norm. Without it Triton 3.6 gives that of unaligned tensors 32 on sm_80 and spills one. AMD has no such option.
REGISTERS = {} if torch.version.hip else {"maxnreg": 64}
LR, BETA1, BETA2, EPS, WEIGHT_DECAY = map(tl.constexpr, range(5))  # in AdamW's table of numbers
ROWS = 128  # of 8 weights a tile: one for each thread


@triton.jit
def _pointer(entry_ptr, DTYPE: tl.constexpr, ALIGNED: tl.constexpr):
    pointer = tl.load(entry_ptr).to(tl.pointer_type(DTYPE))
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)  # bytes
    return pointer


@triton.jit
def _number(entry_ptr):
    return tl.load(entry_ptr).to(tl.float64, bitcast=True)


@triton.jit
def _chunk(tensors_ptr, chunks_ptr, COLUMNS: tl.constexpr):
    """The program's tensor's row of the table, its first weight there, and the number of its weights."""
    chunk = tl.program_id(0).to(tl.int64)
    entry_ptr = tensors_ptr + tl.load(chunks_ptr + 2 * chunk) * COLUMNS
    first = tl.load(chunks_ptr + 2 * chunk + 1) * CHUNK
    return entry_ptr, first, tl.minimum(tl.load(entry_ptr) - first, CHUNK).to(tl.int32)


@triton.jit
def _rows(row, count, ROWS: tl.constexpr):
    """(ROWS, 8) places from `row` on; the mask is of whole rows, so that accesses stay 16 bytes wide."""
    rows = row + tl.arange(0, ROWS)
    at = rows[:, None] * 8 + tl.arange(0, 8)[None, :]
    return rows, at, tl.broadcast_to((rows < count)[:, None], (ROWS, 8))


@triton.jit
def _last_row(n):
    rows = n // 8 + tl.arange(0, 1)
    at = rows[:, None] * 8 + tl.arange(0, 8)[None, :]
    return rows, at, at < n


@triton.jit(do_not_specialize=["stride"])
def _sum_kernel(out_ptr, partials_ptr, stride, BLOCK: tl.constexpr):
    """out[k] = the sum of row k of the partials, in 1024 lanes and then over the lanes."""
    k = tl.program_id(0).to(tl.int64)
    lanes = tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float64)
    for start in range(0, stride, BLOCK):
        total += tl.load(partials_ptr + k * stride + start + lanes, start + lanes < stride, 0.0)
    tl.store(out_ptr + k, tl.sum(total))


@triton.jit
def _row_sums(products):
    """Eight in float32, the rest in float64; rounding is at most 4 x 2^-24, 2.4e-7, of the sum of magnitudes. All in
    float64, a perturbation's 6 operations and 2 conversions a weight would take longer than its bytes on a consumer
    GPU, which does 2 a clock and SM."""
    return tl.sum(products, 1).to(tl.float64)


@triton.jit
def _squares(x_ptr, at, mask):
    x = widen(tl.load(x_ptr + at, mask, 0.0))
    return _row_sums(x * x)


@triton.jit(do_not_specialize=["column"])
def _squared_norm_kernel(
    partials_ptr, column, tensors_ptr, chunks_ptr, DTYPE: tl.constexpr, ALIGNED: tl.constexpr, ROWS: tl.constexpr
):
    entry_ptr, first, n = _chunk(tensors_ptr, chunks_ptr, 2)
    x_ptr = _pointer(entry_ptr + 1, DTYPE, ALIGNED) + first
    squares = tl.zeros([ROWS], tl.float64)
    for row in range(0, n // 8, ROWS):
        rows, at, mask = _rows(row, n // 8, ROWS)
        squares += _squares(x_ptr, at, mask)
    total = tl.sum(squares)
    if n % 8 != 0:
        rows, at, mask = _last_row(n)
        total += tl.sum(_squares(x_ptr, at, mask))
    tl.store(partials_ptr + column + tl.program_id(0), total)


@triton.jit
def _halves(seed, step, offset, rows, SHIFTED: tl.constexpr):
    """(rows, 8) random halves; `offset`: the first weight's place among all trainable parameters' weights."""
    place = tl.arange(0, 8)[None, :]
    calls, shift = offset // 8 + rows, (offset % 8).to(tl.int32)
    x0, x1, x2, x3 = philox4x32(seed, calls[:, None], STREAM_ROUNDING, step)
    if not SHIFTED:
        halves = pick_half(x0, x1, x2, x3, place)
    else:
        y0, y1, y2, y3 = philox4x32(seed, calls[:, None] + 1, STREAM_ROUNDING, step)
        place += shift
        halves = tl.where(place < 8, pick_half(x0, x1, x2, x3, place), pick_half(y0, y1, y2, y3, place - 8))
    return halves


@triton.jit
def _seen(x, DTYPE: tl.constexpr):
    seen = widen(x)
    if x.dtype != DTYPE:
        seen = widen(nearest(seen, DTYPE))
    return seen


@triton.jit
def _perturb_tile(
    x_ptr, g_ptr, rows, at, mask, scale, factor, seed, step, offset,
    PARAM: tl.constexpr, GRAD: tl.constexpr, SEEN: tl.constexpr, STOCHASTIC: tl.constexpr, SHIFTED: tl.constexpr,
    SCALE_GRAD: tl.constexpr,
):  # fmt: skip
    old = tl.load(x_ptr + at, mask, 0.0)
    g = widen(tl.load(g_ptr + at, mask, 0.0))
    intended = scale * g
    moved = widen(old) + intended
    if STOCHASTIC:
        moved = round_stochastically(moved, _halves(seed, step, offset, rows, SHIFTED), PARAM)
    else:
        moved = nearest(moved, PARAM)
    tl.store(x_ptr + at, moved, mask)
    if SCALE_GRAD:
        tl.store(g_ptr + at, nearest(g * factor, GRAD), mask)
    applied = _seen(moved, SEEN) - _seen(old, SEEN)
    moves = tl.sum((applied != 0).to(tl.int32), 1)
    return _row_sums(applied * intended), _row_sums(applied * applied), _row_sums(intended * intended), moves


@triton.jit(do_not_specialize=["column", "stride"])
def _perturb_kernel(
    partials_ptr, column, stride, numbers_ptr, tensors_ptr, chunks_ptr, scale_ptr, step_ptr,
    PARAM: tl.constexpr, GRAD: tl.constexpr, SEEN: tl.constexpr, STOCHASTIC: tl.constexpr, SHIFTED: tl.constexpr,
    SCALE_GRAD: tl.constexpr, ALIGNED: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    entry_ptr, first, n = _chunk(tensors_ptr, chunks_ptr, 4)
    x_ptr = _pointer(entry_ptr + 1, PARAM, ALIGNED) + first
    g_ptr = _pointer(entry_ptr + 2, GRAD, ALIGNED) + first
    offset = tl.load(entry_ptr + 3) + first
    seed, factor = tl.load(numbers_ptr), _number(numbers_ptr + 1).to(tl.float32)
    step, wide_scale = tl.load(step_ptr).to(tl.int64), tl.load(scale_ptr)
    scale = wide_scale.to(tl.float32)
    dots, applied, intended = tl.zeros([ROWS], tl.float64), tl.zeros([ROWS], tl.float64), tl.zeros([ROWS], tl.float64)
    count = tl.zeros([ROWS], tl.int32)
    if wide_scale == 0:  # changes nothing, also where a gradient is NaN
        n = 0
    for row in range(0, n // 8, ROWS):
        rows, at, mask = _rows(row, n // 8, ROWS)
        d, a, i, c = _perturb_tile(
            x_ptr, g_ptr, rows, at, mask, scale, factor, seed, step, offset,
            PARAM, GRAD, SEEN, STOCHASTIC, SHIFTED, SCALE_GRAD,
        )  # fmt: skip
        dots, applied, intended, count = dots + d, applied + a, intended + i, count + c
    dot, applied_square, intended_square = tl.sum(dots), tl.sum(applied), tl.sum(intended)
    moved = tl.sum(count)
    if n % 8 != 0:
        rows, at, mask = _last_row(n)
        d, a, i, c = _perturb_tile(
            x_ptr, g_ptr, rows, at, mask, scale, factor, seed, step, offset,
            PARAM, GRAD, SEEN, STOCHASTIC, SHIFTED, SCALE_GRAD,
        )  # fmt: skip
        dot += tl.sum(d)
        applied_square += tl.sum(a)
        intended_square += tl.sum(i)
        moved += tl.sum(c)
    partials_ptr += column + tl.program_id(0)
    tl.store(partials_ptr, dot)
    tl.store(partials_ptr + stride, applied_square)
    tl.store(partials_ptr + 2 * stride, intended_square)
    tl.store(partials_ptr + 3 * stride, moved.to(tl.float64))


@triton.jit
def _combine_tile(first_ptr, g_ptr, at, mask, rest, share, DTYPE: tl.constexpr):
    g1 = widen(tl.load(first_ptr + at, mask, 0.0))
    g2 = widen(tl.load(g_ptr + at, mask, 0.0))
    combined = nearest(rest * g1 + share * g2, DTYPE)
    tl.store(g_ptr + at, combined, mask)
    gap, both = g2 - g1, widen(combined)
    return _row_sums(g2 * g2), _row_sums(gap * gap), _row_sums(both * both)


@triton.jit(do_not_specialize=["column", "stride"])
def _combine_kernel(
    partials_ptr, column, stride, numbers_ptr, tensors_ptr, chunks_ptr,
    DTYPE: tl.constexpr, ALIGNED: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    entry_ptr, first, n = _chunk(tensors_ptr, chunks_ptr, 3)
    first_ptr = _pointer(entry_ptr + 1, DTYPE, ALIGNED) + first
    g_ptr = _pointer(entry_ptr + 2, DTYPE, ALIGNED) + first
    rest, share = _number(numbers_ptr).to(tl.float32), _number(numbers_ptr + 1).to(tl.float32)
    second, gaps, combined = tl.zeros([ROWS], tl.float64), tl.zeros([ROWS], tl.float64), tl.zeros([ROWS], tl.float64)
    for row in range(0, n // 8, ROWS):
        rows, at, mask = _rows(row, n // 8, ROWS)
        a, b, c = _combine_tile(first_ptr, g_ptr, at, mask, rest, share, DTYPE)
        second, gaps, combined = second + a, gaps + b, combined + c
    second_square, gap_square, combined_square = tl.sum(second), tl.sum(gaps), tl.sum(combined)
    if n % 8 != 0:
        rows, at, mask = _last_row(n)
        a, b, c = _combine_tile(first_ptr, g_ptr, at, mask, rest, share, DTYPE)
        second_square += tl.sum(a)
        gap_square += tl.sum(b)
        combined_square += tl.sum(c)
    partials_ptr += column + tl.program_id(0)
    tl.store(partials_ptr, second_square)
    tl.store(partials_ptr + stride, gap_square)
    tl.store(partials_ptr + 2 * stride, combined_square)


@triton.jit
def _adamw_tile(
    x_ptr, w_ptr, g_ptr, m_ptr, v_ptr, at, mask, finite,
    factor, lerp, beta2, one_minus_beta2, root_correction2, eps, minus_step, decay,
    PARAM: tl.constexpr, MASTER: tl.constexpr,
):  # fmt: skip
    weight = tl.load(w_ptr + at, mask, 0.0)
    if finite:
        m, v = tl.load(m_ptr + at, mask, 0.0), tl.load(v_ptr + at, mask, 0.0)
        g = widen(tl.load(g_ptr + at, mask, 0.0))
        weight, m, v = adamw_element(
            weight, m, v, g, factor, lerp, beta2, one_minus_beta2, root_correction2, eps, minus_step, decay
        )
        tl.store(m_ptr + at, m, mask)
        tl.store(v_ptr + at, v, mask)
        tl.store(w_ptr + at, weight, mask)
    if MASTER:
        tl.store(x_ptr + at, nearest(weight, PARAM), mask)


@triton.jit
def _adamw_kernel(
    numbers_ptr, tensors_ptr, chunks_ptr, factor_ptr, finite_ptr,
    PARAM: tl.constexpr, GRAD: tl.constexpr, MASTER: tl.constexpr, ALIGNED: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    entry_ptr, first, n = _chunk(tensors_ptr, chunks_ptr, 7)
    x_ptr = _pointer(entry_ptr + 1, PARAM, ALIGNED) + first
    w_ptr = x_ptr
    if MASTER:
        w_ptr = _pointer(entry_ptr + 2, tl.float32, ALIGNED) + first
    g_ptr = _pointer(entry_ptr + 3, GRAD, ALIGNED) + first
    m_ptr = _pointer(entry_ptr + 4, tl.float32, ALIGNED) + first
    v_ptr = _pointer(entry_ptr + 5, tl.float32, ALIGNED) + first
    step = (tl.load(_pointer(entry_ptr + 6, tl.float32, False)) + 1.0).to(tl.int64)
    lr, beta1, beta2 = _number(numbers_ptr + LR), _number(numbers_ptr + BETA1), _number(numbers_ptr + BETA2)
    factor, finite = tl.load(factor_ptr).to(tl.float32), tl.load(finite_ptr).to(tl.int1)
    lerp, one_minus_beta2 = (1.0 - beta1).to(tl.float32), (1.0 - beta2).to(tl.float32)
    root_correction2 = tl.sqrt(1.0 - power(beta2, step)).to(tl.float32)
    minus_step = (-(lr / (1.0 - power(beta1, step)))).to(tl.float32)
    eps = _number(numbers_ptr + EPS).to(tl.float32)
    decay = (1.0 - lr * _number(numbers_ptr + WEIGHT_DECAY)).to(tl.float32)
    beta2 = beta2.to(tl.float32)
    for row in range(0, n // 8, ROWS):
        rows, at, mask = _rows(row, n // 8, ROWS)
        _adamw_tile(
            x_ptr, w_ptr, g_ptr, m_ptr, v_ptr, at, mask, finite,
            factor, lerp, beta2, one_minus_beta2, root_correction2, eps, minus_step, decay, PARAM, MASTER,
        )  # fmt: skip
    if n % 8 != 0:
        rows, at, mask = _last_row(n)
        _adamw_tile(
            x_ptr, w_ptr, g_ptr, m_ptr, v_ptr, at, mask, finite,
            factor, lerp, beta2, one_minus_beta2, root_correction2, eps, minus_step, decay, PARAM, MASTER,
        )  # fmt: skip


@triton.jit(do_not_specialize=["count"])
def _count_steps_kernel(tensors_ptr, finite_ptr, count, COLUMNS: tl.constexpr, BLOCK: tl.constexpr):
    """A launch of its own: every chunk of a tensor reads its step."""
    tensor = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    step_ptr = tl.load(tensors_ptr + tensor * COLUMNS + COLUMNS - 1, tensor < count, 0).to(tl.pointer_type(tl.float32))
    step = tl.load(step_ptr, tensor < count, 0.0)
    tl.store(step_ptr, step + tl.load(finite_ptr).to(tl.float32), tensor < count)


class _Group:
    """Tensors of one launch: what the code depends on, and tables of them."""

    def __init__(self, types: tuple, aligned: bool, shifted: bool, rows: list[tuple[int, ...]], device: torch.device):
        self.types, self.aligned, self.shifted, self.count = types, aligned, shifted, len(rows)
        sizes = tuple(-(-row[0] // CHUNK.value) for row in rows)
        self.programs = sum(sizes)
        if (sizes, device) not in _chunk_tables:
            chunks = [(t, c) for t, size in enumerate(sizes) for c in range(size)]
            _chunk_tables[sizes, device] = torch.tensor(chunks, dtype=torch.int64, device=device)
        self.chunks = _chunk_tables[sizes, device]  # (row, chunk of its tensor) of each program
        self.tensors = table(tuple(x for row in rows for x in row), device)  # (numel, address or number, ...) of each


_chunk_tables: dict[tuple, Tensor] = {}  # 16 bytes for 64 K weights, made once for a model


def _groups(device: torch.device, *columns: list[Tensor | int | None]) -> list[_Group]:
    """Columns of row-major tensors, None or whole numbers; those of the first are the ones that chunks are cut from.

    A group has the same dtypes; addresses that are all multiples of 16 or not; and offsets (whole numbers) that are all
    multiples of 8 or not, which take a second Philox call a row.
    """
    members: dict[tuple, list[tuple[int, ...]]] = {}
    for row in zip(*columns, strict=True):
        types = tuple(TYPES[x.dtype] if isinstance(x, Tensor) else None for x in row)
        places = tuple(x.data_ptr() if isinstance(x, Tensor) else x or 0 for x in row)
        aligned = all(x.data_ptr() % 16 == 0 for x in row if isinstance(x, Tensor) and x.numel() > 1)
        shifted = any(x % 8 != 0 for x in row if isinstance(x, int))
        members.setdefault((types, aligned, shifted), []).append((row[0].numel(), *places))
    return [_Group(*key, rows, device) for key, rows in members.items()]


def _sum(out: Tensor, groups: list[_Group], launch) -> None:
    """`launch(group, partials, column, stride)` fills a column of partials a program; out = the sum of each row."""
    stride = sum(group.programs for group in groups)
    partials = torch.empty(out.numel(), stride, dtype=torch.float64, device=out.device)
    column = 0
    for group in groups:
        if group.programs:
            launch(group, partials, column, stride)
        column += group.programs
    _sum_kernel[(out.numel(),)](out, partials, stride, BLOCK=1024)


def squared_norm(out: Tensor, tensors: list[Tensor]) -> None:
    def launch(group, partials, column, stride):
        _squared_norm_kernel[(group.programs,)](
            partials, column, group.tensors, group.chunks, *group.types, group.aligned, ROWS, **LAUNCH, **REGISTERS
        )

    with torch.cuda.device_of(out):
        _sum(out, _groups(out.device, tensors), launch)


def perturb(
    sums: Tensor, params: list[Tensor], grads: list[Tensor], offsets: list[int], scale: Tensor, grad_factor: float,
    stochastic: bool, seed: int, step: Tensor, compute_dtype: torch.dtype | None,
) -> None:  # fmt: skip
    def launch(group, partials, column, stride):
        param, grad, _ = group.types
        # float64 shows a float32 as it is
        seen = param if compute_dtype is None else TYPES.get(compute_dtype, tl.float32)
        rounds = stochastic and param != tl.float32
        _perturb_kernel[(group.programs,)](
            partials, column, stride, numbers, group.tensors, group.chunks, scale, step,
            param, grad, seen, rounds, group.shifted, grad_factor != 1, group.aligned, ROWS, **LAUNCH,
        )  # fmt: skip

    with torch.cuda.device_of(sums):
        numbers = table((word(seed), *bits(grad_factor)), sums.device)
        _sum(sums, _groups(sums.device, params, grads, offsets), launch)


def combine(sums: Tensor, firsts: list[Tensor], grads: list[Tensor], ratio: float) -> None:
    def launch(group, partials, column, stride):
        _combine_kernel[(group.programs,)](
            partials,
            column,
            stride,
            numbers,
            group.tensors,
            group.chunks,
            group.types[0],
            group.aligned,
            ROWS,
            **LAUNCH,
        )

    with torch.cuda.device_of(sums):
        numbers = table(bits(1 - ratio, ratio), sums.device)
        _sum(sums, _groups(sums.device, firsts, grads), launch)


def adamw(
    params: list[Tensor], masters: list[Tensor | None], grads: list[Tensor], exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor], steps: list[Tensor], factor: Tensor, finite: Tensor, options,
) -> None:  # fmt: skip
    """options: AdamwOptions of redit_fast/backends/args.py."""
    with torch.cuda.device_of(factor):
        numbers = table(bits(*options), factor.device)
        for group in _groups(factor.device, params, masters, grads, exp_avgs, exp_avg_sqs, steps):
            param, master, grad, *_ = group.types
            if group.programs:
                _adamw_kernel[(group.programs,)](
                    numbers, group.tensors, group.chunks, factor, finite,
                    param, grad, master is not None, group.aligned, ROWS, **LAUNCH,
                )  # fmt: skip
            _count_steps_kernel[(triton.cdiv(group.count, 128),)](
                group.tensors, finite, group.count, COLUMNS=7, BLOCK=128
            )
