"""The head, around its product; redit_fast/backends/reference/linear_loss.py is the definition.

cuBLAS makes a chunk's logits in float32, tile of the vocabulary by tile; a tile of about 16 MB stays in the L2 cache
until `_tile_kernel` has read it: of 16 bits 2 bytes an element reach memory, those of E. The anchor is the target's
logit. A row with a logit more than 40 above it goes on from its largest so far, and its earlier E are scaled at the
end: nothing overflows, no product is made twice, and the host need not know. The backward pass goes on from the sums
that the forward pass left: its products once more, and no sum.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from redit_fast.kernels.element import nearest, widen
from redit_fast.kernels.launch import bits, table
from redit_fast.kernels.row_math import (
    INNER,
    OUTER,
    SLOPE,
    exponential,
    finish,
    needs_repair,
    number,
    slope_at_target,
    slopes,
    squash,
    transform_numbers,
)

FAR = tl.constexpr(57.70780163555854)  # 40 log2 e
BLOCK_D = 1024
LAUNCH = {"enable_fp_fusion": True}  # Triton 3.10 will not without
ROWS = 128
AT_TARGET, ANCHOR, OTHERS, WEIGHTED, LARGEST, CONSTANT, BY_GAP, TOTAL, TARGET_E = map(tl.constexpr, range(9))  # state


@triton.jit(do_not_specialize=["rows"])
def _anchor_kernel(
    state_ptr, hidden_ptr, hidden_row, hidden_stride, weight_ptr, weight_row, weight_stride, bias_ptr, bias_stride,
    targets_ptr, numbers_ptr, rows, vocabulary, width, BLOCK: tl.constexpr,
):  # fmt: skip
    """The state of a row before its first tile; its target's logit NaN for a target outside the vocabulary."""
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(targets_ptr + row)
    logit = float("nan")
    if (target >= 0) & (target < vocabulary):
        products = tl.zeros([BLOCK], tl.float32)
        for start in range(0, width, BLOCK):
            at = start + tl.arange(0, BLOCK).to(tl.int64)
            x = widen(tl.load(hidden_ptr + row * hidden_row + at * hidden_stride, at < width, 0.0))
            w = widen(tl.load(weight_ptr + target * weight_row + at * weight_stride, at < width, 0.0))
            products += x * w
        logit = tl.sum(products)
        if bias_ptr is not None:
            logit += widen(tl.load(bias_ptr + target * bias_stride))
    state_ptr += row
    tl.store(state_ptr + AT_TARGET * rows, logit)
    tl.store(state_ptr + ANCHOR * rows, logit)
    tl.store(state_ptr + OTHERS * rows, 0.0)
    tl.store(state_ptr + WEIGHTED * rows, 0.0)
    tl.store(state_ptr + LARGEST * rows, float("-inf"))
    tl.store(state_ptr + CONSTANT * rows, number(numbers_ptr, SLOPE))
    tl.store(state_ptr + BY_GAP * rows, 0.0)


@triton.jit
def _moved(others, weighted, gap):
    """The sums of e_j and e_j y_j when every y_j becomes y_j + gap."""
    factor = tl.exp2(gap)  # of no use where nothing was added: the gap is not a number where all were -inf
    return tl.where(others == 0, 0.0, others * factor), tl.where(others == 0, 0.0, factor * (weighted + others * gap))


@triton.jit(do_not_specialize=["rows", "tile"])
def _tile_kernel(
    e_ptr, e_row, e_stride, state_ptr, tile_anchors_ptr, logits_ptr, bias_ptr, bias_stride, targets_ptr, numbers_ptr,
    rows, tile, vocabulary, CAPPED: tl.constexpr, ADD: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A row of tile number `tile`. ADD: to the row's sums; keeps the anchor that the tile was seen from. e, where
    given, gets e_j (constant + by_gap y_j) dz/dx_j, and of the target's column anything."""
    row = tl.program_id(0).to(tl.int64)
    inner, outer = number(numbers_ptr, INNER), number(numbers_ptr, OUTER)
    state_ptr += row
    anchor, target = tl.load(state_ptr + ANCHOR * rows), tl.load(targets_ptr + row)
    constant, by_gap = tl.load(state_ptr + CONSTANT * rows), tl.load(state_ptr + BY_GAP * rows)
    at = tile * BLOCK + tl.arange(0, BLOCK)
    here = at < vocabulary
    x = tl.load(logits_ptr + row * BLOCK + tl.arange(0, BLOCK), here, float("-inf"))
    if bias_ptr is not None:
        x += widen(tl.load(bias_ptr + at.to(tl.int64) * bias_stride, here, 0.0))
    squashed = squash(x, inner, CAPPED)
    if ADD:
        others, weighted = tl.load(state_ptr + OTHERS * rows), tl.load(state_ptr + WEIGHTED * rows)
        largest = tl.maximum(tl.load(state_ptr + LARGEST * rows), tl.max(x))
        gap = (squash(largest, inner, CAPPED) - squash(anchor, inner, CAPPED)) * outer
        if (gap <= FAR) | (anchor != anchor):  # else also where the gap is not a number
            moved_anchor = anchor
        else:
            others, weighted = _moved(others, weighted, -gap)
            moved_anchor = largest
        anchor = moved_anchor
        tl.store(state_ptr + ANCHOR * rows, anchor)
        tl.store(tile_anchors_ptr + tile.to(tl.int64) * rows + row, anchor)
        tl.store(state_ptr + LARGEST * rows, largest)
        seen_from = squash(tl.where(anchor == float("-inf"), 0.0, anchor), inner, CAPPED)  # all were -inf so far
        squashed = tl.where(here & (at != target.to(tl.int32)), squashed, float("-inf"))  # a stray one's row is NaN
        e, y = exponential(squashed, seen_from, outer)
        tl.store(state_ptr + OTHERS * rows, others + tl.sum(e))
        tl.store(state_ptr + WEIGHTED * rows, weighted + tl.sum(e * y))
    else:
        e, y = exponential(squashed, squash(anchor, inner, CAPPED), outer)
    if e_ptr is not None:
        e *= constant + by_gap * y
        if CAPPED:
            e *= 1.0 - squashed * squashed
        tl.store(e_ptr + row * e_row + at.to(tl.int64) * e_stride, nearest(e, e_ptr.dtype.element_ty), here)


@triton.jit(do_not_specialize=["rows", "sums_stride"])
def _finish_kernel(
    logp_ptr, entropy_ptr, sums_ptr, sums_stride, state_ptr, numbers_ptr, rows,
    CAPPED: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """A repaired row's anchor is its largest logit."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    here = row < rows
    slope, inner, outer = number(numbers_ptr, SLOPE), number(numbers_ptr, INNER), number(numbers_ptr, OUTER)
    state_ptr += row
    target, seen_from = tl.load(state_ptr + AT_TARGET * rows, here), tl.load(state_ptr + ANCHOR * rows, here)
    others, weighted = tl.load(state_ptr + OTHERS * rows, here), tl.load(state_ptr + WEIGHTED * rows, here)
    largest = tl.load(state_ptr + LARGEST * rows, here)
    repaired = ((seen_from != target) | needs_repair(target, others)) & (target == target)
    anchor = tl.where(repaired, largest, seen_from)
    gap = (squash(seen_from, inner, CAPPED) - squash(anchor, inner, CAPPED)) * outer
    moved_others, moved_weighted = _moved(others, weighted, gap)
    others, weighted = tl.where(repaired, moved_others, others), tl.where(repaired, moved_weighted, weighted)
    logp, entropy, total = finish(anchor, target, others, weighted, inner, outer, CAPPED)
    tl.store(logp_ptr + row, logp, here)
    if entropy_ptr is not None:
        tl.store(entropy_ptr + row, entropy, here)
    tl.store(sums_ptr + row, anchor, here)
    tl.store(sums_ptr + sums_stride + row, others, here)
    tl.store(sums_ptr + 2 * sums_stride + row, total, here)
    tl.store(state_ptr + ANCHOR * rows, anchor, here)
    tl.store(state_ptr + TOTAL * rows, total, here)
    g, h = total * 0.0 + 1.0, total * 0.0
    at_target = slope_at_target(anchor, target, others, total, entropy, g, h, slope, inner, outer, CAPPED)
    tl.store(state_ptr + TARGET_E * rows, -total * at_target, here)


@triton.jit(do_not_specialize=["rows", "sums_stride"])
def _resume_kernel(
    entropy_ptr, sums_ptr, sums_stride, state_ptr, grad_logp_ptr, grad_entropy_ptr, numbers_ptr, rows,
    CAPPED: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """The state after the last tile from what `_finish_kernel` left, with the slopes of the upstream gradients."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    here = row < rows
    slope, inner, outer = number(numbers_ptr, SLOPE), number(numbers_ptr, INNER), number(numbers_ptr, OUTER)
    state_ptr += row
    sums_ptr += row
    target, anchor = tl.load(state_ptr + AT_TARGET * rows, here), tl.load(sums_ptr, here)
    others, total = tl.load(sums_ptr + sums_stride, here), tl.load(sums_ptr + 2 * sums_stride, here)
    g = tl.load(grad_logp_ptr + row, here)
    h, entropy = g * 0.0, g * 0.0
    if grad_entropy_ptr is not None:
        h, entropy = tl.load(grad_entropy_ptr + row, here), tl.load(entropy_ptr + row, here)
    constant, by_gap = slopes(total, entropy, g, h, slope)  # E is the gradient times -s
    at_target = slope_at_target(anchor, target, others, total, entropy, g, h, slope, inner, outer, CAPPED)
    tl.store(state_ptr + ANCHOR * rows, anchor, here)
    tl.store(state_ptr + CONSTANT * rows, -total * constant, here)
    tl.store(state_ptr + BY_GAP * rows, -total * by_gap, here)
    tl.store(state_ptr + TOTAL * rows, total, here)
    tl.store(state_ptr + TARGET_E * rows, -total * at_target, here)


@triton.jit(do_not_specialize=["rows"])
def _repair_kernel(
    e_ptr, e_row, e_stride, state_ptr, tile_anchors_ptr, targets_ptr, numbers_ptr, rows, vocabulary,
    CAPPED: tl.constexpr, RESCALE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """RESCALE: the E of tiles that were seen from another anchor than the row's last. Then the target's E. All 0 where
    the row's sum is not a number above 0."""
    row = tl.program_id(0).to(tl.int64)
    inner, outer = number(numbers_ptr, INNER), number(numbers_ptr, OUTER)
    anchor, target = tl.load(state_ptr + ANCHOR * rows + row), tl.load(targets_ptr + row)
    total = tl.load(state_ptr + TOTAL * rows + row)
    lost = ((total > 0) & (total < float("inf"))) == 0
    e_ptr += row * e_row
    if RESCALE or lost:
        for tile in range(tl.cdiv(vocabulary, BLOCK)):
            seen_from = tl.load(tile_anchors_ptr + tile * rows + row)
            if (seen_from != anchor) | lost:
                at = tile * BLOCK + tl.arange(0, BLOCK).to(tl.int64)
                gap = (squash(seen_from, inner, CAPPED) - squash(anchor, inner, CAPPED)) * outer
                e = widen(tl.load(e_ptr + at * e_stride, at < vocabulary, 0.0))
                e = tl.where(lost, 0.0, e * tl.exp2(gap))
                tl.store(e_ptr + at * e_stride, nearest(e, e_ptr.dtype.element_ty), at < vocabulary)
        tl.debug_barrier()  # the target's own comes after its tile
    inside = (lost == 0) & (target >= 0) & (target < vocabulary)
    value = tl.load(state_ptr + TARGET_E * rows + row)
    tl.store(e_ptr + target * e_stride, nearest(value, e_ptr.dtype.element_ty), inside)


def tile_columns(vocabulary: int, width: int) -> int:
    """16 MB of float32 where the chunk is 256 MB of `width` bytes an element; of the vocabulary alone, so that other
    numbers of rows compile nothing more and keep a row's bits."""
    return max(1024, min(4096, triton.next_power_of_2(vocabulary * width // 64 + 1) // 2))


def _product(out: Tensor, hidden: Tensor, weight: Tensor) -> None:
    """out = hidden weight^T, float32 from the product on."""
    if out.device.type == "cpu":  # the interpreter
        torch.mm(hidden.float(), weight.float().t(), out=out)
    elif hidden.dtype == torch.float32:
        torch.mm(hidden, weight.t(), out=out)
    else:
        torch.mm(hidden, weight.t(), out_dtype=torch.float32, out=out)


def addmm(out: Tensor, a: Tensor, b: Tensor) -> None:
    """out float32 += a b, float32 from the product on."""
    if out.device.type == "cpu":  # the interpreter
        out.addmm_(a.float(), b.float())
    elif a.dtype == torch.float32:
        out.addmm_(a, b)
    else:
        torch.addmm(out, a, b, out_dtype=torch.float32, out=out)


def _anchored(hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, numbers: Tensor) -> tuple:
    """The state of the rows before their first tile, and room for the anchor of each tile."""
    (rows, width), vocabulary = hidden.shape, len(weight)
    tiles = triton.cdiv(vocabulary, tile_columns(vocabulary, e_width(hidden.dtype)))
    state = torch.empty(TARGET_E.value + 1, rows, dtype=torch.float32, device=hidden.device)
    _anchor_kernel[(rows,)](
        state, hidden, *hidden.stride(), weight, *weight.stride(), *_biases(bias), targets, numbers, rows, vocabulary,
        width, BLOCK_D, **LAUNCH,
    )  # fmt: skip
    return state, torch.empty(tiles, rows, dtype=torch.float32, device=hidden.device)


def _biases(bias: Tensor | None) -> tuple:
    return (None, 1) if bias is None else (bias, bias.stride(0))


def _tiles(
    e: Tensor | None, state: Tensor, tile_anchors: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor | None,
    targets: Tensor, numbers: Tensor, capped: bool, add: bool,
) -> None:  # fmt: skip
    rows, vocabulary = len(hidden), len(weight)
    columns = tile_columns(vocabulary, e_width(hidden.dtype))
    logits = torch.empty(rows, columns, dtype=torch.float32, device=hidden.device)
    for tile, part in enumerate(weight.split(columns)):
        _product(logits[:, : len(part)], hidden, part)
        _tile_kernel[(rows,)](
            e, *((1, 1) if e is None else e.stride()), state, tile_anchors, logits, *_biases(bias), targets, numbers,
            rows, tile, vocabulary, capped, add, columns, num_warps=columns // 512, **LAUNCH,
        )  # fmt: skip


def _repair(
    e: Tensor, state: Tensor, tile_anchors: Tensor, hidden: Tensor, targets: Tensor, numbers: Tensor, capped: bool,
    rescale: bool,
) -> None:  # fmt: skip
    rows, vocabulary = e.shape
    columns = tile_columns(vocabulary, e_width(hidden.dtype))
    _repair_kernel[(rows,)](
        e, *e.stride(), state, tile_anchors, targets, numbers, rows, vocabulary, capped, rescale, columns,
        num_warps=columns // 512, **LAUNCH,
    )  # fmt: skip


def exp_product(
    e: Tensor | None, logp: Tensor, entropy: Tensor | None, sums: Tensor, hidden: Tensor, weight: Tensor,
    bias: Tensor | None, targets: Tensor, transform,
) -> None:  # fmt: skip
    rows = len(hidden)
    if rows == 0:
        return
    with torch.cuda.device_of(hidden):
        numbers, capped = table(bits(*transform_numbers(transform)), hidden.device), transform.capped
        state, tile_anchors = _anchored(hidden, weight, bias, targets, numbers)
        _tiles(e, state, tile_anchors, hidden, weight, bias, targets, numbers, capped, add=True)
        _finish_kernel[(triton.cdiv(rows, ROWS),)](
            logp, entropy, sums, sums.stride(0), state, numbers, rows, capped, ROWS, **LAUNCH
        )
        if e is not None:
            _repair(e, state, tile_anchors, hidden, targets, numbers, capped, rescale=True)


def exp_product_grad(
    e: Tensor, sums: Tensor, entropy: Tensor | None, hidden: Tensor, weight: Tensor, bias: Tensor | None,
    targets: Tensor, grad_logp: Tensor, grad_entropy: Tensor | None, transform,
) -> None:  # fmt: skip
    rows = len(hidden)
    if rows == 0:
        return
    with torch.cuda.device_of(hidden):
        numbers, capped = table(bits(*transform_numbers(transform)), hidden.device), transform.capped
        state, tile_anchors = _anchored(hidden, weight, bias, targets, numbers)
        _resume_kernel[(triton.cdiv(rows, ROWS),)](
            entropy, sums, sums.stride(0), state, grad_logp, grad_entropy, numbers, rows, capped, ROWS, **LAUNCH
        )
        _tiles(e, state, tile_anchors, hidden, weight, bias, targets, numbers, capped, add=False)
        _repair(e, state, tile_anchors, hidden, targets, numbers, capped, rescale=False)


def e_width(dtype: torch.dtype) -> int:
    """Bytes an element of E, which holds a float16 model's in float32."""
    return 2 if dtype == torch.bfloat16 else 4
