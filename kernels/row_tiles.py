"""A row of logits in the token kernels, tile by tile, the twin of csrc/cpu/token_rows.h. Sums run over lanes of 16
bytes, tile after tile, then over the lanes in pairs: the same bits whichever program adds a tile."""

import triton
import triton.language as tl

from redit_fast.kernels.element import nearest, widen
from redit_fast.kernels.row_math import (
    columns,
    exponential,
    folded,
    needs_repair,
    slope_at_target,
    slopes,
    squash,
)


@triton.jit
def _tile(x_ptr, stride, at, vocabulary, HINT: tl.constexpr):
    """Anything beyond the vocabulary."""
    return tl.load(x_ptr + at.to(tl.int64) * stride, at < vocabulary, eviction_policy=HINT)


@triton.jit
def tile_sums(
    x_ptr, stride, vocabulary, target, start, anchor, inner, outer,
    CAPPED: tl.constexpr, WEIGH: tl.constexpr, HINT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Of the tile at `start`, by lanes of 16 bytes: sums of e_j and, WEIGH, of e_j y_j over j != t."""
    at = start + columns(0, BLOCK, x_ptr.dtype.element_ty)
    squashed = squash(widen(_tile(x_ptr, stride, at, vocabulary, HINT)), inner, CAPPED)
    if (target >= start) & (target < start + BLOCK) | (start + BLOCK > vocabulary):
        squashed = tl.where((at != target) & (at < vocabulary), squashed, float("-inf"))
    e, y = exponential(squashed, anchor, outer)
    others = folded(e, at.shape[0])
    weighted = others
    if WEIGH:
        weighted = folded(e * y, at.shape[0])
    return others, weighted


@triton.jit
def _row_sums(
    x_ptr, stride, vocabulary, target, anchor, inner, outer, lanes_ptr, row,
    CAPPED: tl.constexpr, WEIGH: tl.constexpr, HINT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The row's, from its logits or, with the same bits, from `_lanes_kernel`'s lanes (rows, tiles, 2, LANES)."""
    anchor = squash(anchor, inner, CAPPED)
    LANES: tl.constexpr = BLOCK * x_ptr.dtype.element_ty.primitive_bitwidth // 128
    others, weighted = tl.zeros([LANES], tl.float32), tl.zeros([LANES], tl.float32)
    for start in range(0, vocabulary, BLOCK):
        if lanes_ptr is None:
            more, more_weighted = tile_sums(
                x_ptr, stride, vocabulary, target, start, anchor, inner, outer, CAPPED, WEIGH, HINT, BLOCK
            )
        else:
            item = row * tl.cdiv(vocabulary, BLOCK) + start // BLOCK
            lane_ptr = lanes_ptr + item * (2 * LANES) + tl.arange(0, LANES)
            more, more_weighted = tl.load(lane_ptr), tl.load(lane_ptr + LANES)
        others += more
        if WEIGH:
            weighted += more_weighted
    return folded(others, 1), folded(weighted, 1)


@triton.jit
def _largest(x_ptr, stride, vocabulary, BLOCK: tl.constexpr):
    """A NaN reaches the row's sums without help."""
    at = columns(0, BLOCK, x_ptr.dtype.element_ty)
    top = tl.full([at.shape[0]], float("-inf"), tl.float32)
    for start in range(0, vocabulary, BLOCK):
        x = widen(_tile(x_ptr, stride, start + at, vocabulary, "evict_last"))
        top = tl.maximum(top, tl.max(tl.where(start + at < vocabulary, x, float("-inf")), 1))
    return tl.max(top)


@triton.jit
def target_logit(x_ptr, stride, vocabulary, target):
    """NaN for a target outside the vocabulary."""
    return widen(tl.load(x_ptr + target * stride, (target >= 0) & (target < vocabulary), float("nan")))


@triton.jit
def forward(
    x_ptr, stride, vocabulary, target, inner, outer, lanes_ptr, row,
    CAPPED: tl.constexpr, WEIGH: tl.constexpr, HINT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """What the row's results come from: target's and anchor's logit, sums of e_j and e_j y_j over j != t."""
    at_target = target_logit(x_ptr, stride, vocabulary, target)
    anchor, others, weighted = at_target, at_target, at_target
    if at_target == at_target:  # else the row is NaN, unread
        others, weighted = _row_sums(
            x_ptr, stride, vocabulary, target, anchor, inner, outer, lanes_ptr, row, CAPPED, WEIGH, HINT, BLOCK
        )
        if needs_repair(anchor, others):
            anchor = _largest(x_ptr, stride, vocabulary, BLOCK)
            others, weighted = _row_sums(
                x_ptr, stride, vocabulary, target, anchor, inner, outer, None, row, CAPPED, WEIGH, HINT, BLOCK
            )
    return at_target, anchor, others, weighted


@triton.jit
def clear(grad_ptr, stride, vocabulary, first, last, BLOCK: tl.constexpr):
    for tile in range(first, last):
        at = columns(tile * BLOCK, BLOCK, grad_ptr.dtype.element_ty)
        tl.store(grad_ptr + at.to(tl.int64) * stride, 0.0, at < vocabulary)


@triton.jit
def backward(
    grad_ptr, grad_stride, x_ptr, stride, vocabulary, first, last, target, at_target, anchor, others, total, entropy,
    g, h, slope, inner, outer, CAPPED: tl.constexpr, BY_GAP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Tiles `first` to `last` of the gradient's row, which may be the row itself, for the upstream gradients g of logp
    and h of the entropy. at_target is of use where the target is among them."""
    if (g == 0) & (h == 0) & (tl.abs(total) < float("inf")):
        clear(grad_ptr, grad_stride, vocabulary, first, last, BLOCK)
    else:
        constant, by_gap = slopes(total, entropy, g, h, slope)
        value = slope_at_target(anchor, at_target, others, total, entropy, g, h, slope, inner, outer, CAPPED)
        squashed_anchor = squash(anchor, inner, CAPPED)
        for tile in range(last - first):
            at = columns((last - 1 - tile) * BLOCK, BLOCK, x_ptr.dtype.element_ty)
            here = at < vocabulary
            x = widen(_tile(x_ptr, stride, at, vocabulary, "evict_first"))
            squashed = squash(x, inner, CAPPED)
            e, y = exponential(squashed, squashed_anchor, outer)
            if CAPPED:
                e *= 1.0 - squashed * squashed
            if BY_GAP:
                e *= constant + by_gap * y
            else:
                e *= constant
            stored = nearest(e, grad_ptr.dtype.element_ty)
            tl.store(grad_ptr + at.to(tl.int64) * grad_stride, stored, here, eviction_policy="evict_first")
        tl.debug_barrier()  # the target's own comes after its column
        inside = within(target, first, last, vocabulary, BLOCK)
        tl.store(grad_ptr + target * grad_stride, nearest(value, grad_ptr.dtype.element_ty), inside)


@triton.jit
def within(target, first, last, vocabulary, BLOCK: tl.constexpr):
    return (target >= first * BLOCK) & (target < tl.minimum(last * BLOCK, vocabulary))
