"""Token log-probs and losses from logits (R, V); redit_fast/backends/reference/token_loss.py is the definition.

    token_logp       logp, entropy, sums                                    reads 2 bytes a logit of 16 bits, 4 of 32
    token_logp_grad  g (1{j = t} - p_j) - h p_j (log p_j + H), times dz/dx   reads and writes 2 / 4
    token_loss       both, and the coefficient g between them               reads 2 / 4 and writes 2 / 4

One program an SM, a row at a time: its second reading hits the L2 cache, where 132 rows of 304 KB (V = 151936, 16 bits)
fit. The second pass begins at the row's end, which was read last. A tile is 32 KB, 64 bytes a thread of 512, asked for
at once: a memory of 4 TB/s and 900 cycles needs 16 KB on the way to each SM. (Asked for a tile ahead, a logit would
take 10.2 instructions instead of 9.1, and spill.) Rows whose stride is not a multiple of 16 bytes (V = 50257)
are read 2 or 4 bytes at a time: the kernels are then limited by their instructions. Masked rows are not read, rows with
a coefficient of 0 are read once.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from redit_fast.kernels.element import nearest, widen
from redit_fast.kernels.launch import bits, first_that_fits, processors, table
from redit_fast.kernels.policy_loss import token_coefficient
from redit_fast.kernels.rows import (
    INNER,
    OUTER,
    SLOPE,
    columns,
    exponential,
    finish,
    needs_repair,
    number,
    slope_at_target,
    slopes,
    squash,
)

IGNORE = tl.constexpr(-100)
TILE_BYTES = (32768, 16384, 8192)  # of a tile, in the order of trial; a thread has 64
# Without it ptxas gives a float32 row under softcap 64, for a second program an SM, and spills. AMD has no such option.
REGISTERS = {} if torch.version.hip else {"maxnreg": 128}
SPAN = 8192  # elements a program of scale_in_place


@triton.jit
def _tile(x_ptr, stride, at, vocabulary, HINT: tl.constexpr):
    """Anything beyond the vocabulary."""
    return tl.load(x_ptr + at.to(tl.int64) * stride, at < vocabulary, eviction_policy=HINT)


@triton.jit
def _row_sums(
    x_ptr, stride, vocabulary, target, anchor, inner, outer,
    CAPPED: tl.constexpr, WEIGH: tl.constexpr, HINT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Sums of e_j and, WEIGH, of e_j y_j over j != t."""
    anchor = squash(anchor, inner, CAPPED)
    at = columns(0, BLOCK, x_ptr.dtype.element_ty)
    others = tl.zeros([at.shape[0]], tl.float32)
    weighted = tl.zeros([at.shape[0]], tl.float32)
    for start in range(0, vocabulary, BLOCK):
        squashed = squash(widen(_tile(x_ptr, stride, start + at, vocabulary, HINT)), inner, CAPPED)
        if (target >= start) & (target < start + BLOCK) | (start + BLOCK > vocabulary):
            here = (start + at != target) & (start + at < vocabulary)
            squashed = tl.where(here, squashed, float("-inf"))
        e, y = exponential(squashed, anchor, outer)
        others += tl.sum(e, 1)
        if WEIGH:
            weighted += tl.sum(e * y, 1)
    return tl.sum(others), tl.sum(weighted)


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
def _target_logit(x_ptr, stride, vocabulary, target):
    """NaN for a target outside the vocabulary."""
    return widen(tl.load(x_ptr + target * stride, (target >= 0) & (target < vocabulary), float("nan")))


@triton.jit
def _forward(
    x_ptr, stride, vocabulary, target, inner, outer,
    CAPPED: tl.constexpr, WEIGH: tl.constexpr, HINT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """What the row's results come from: target's and anchor's logit, sums of e_j and e_j y_j over j != t."""
    at_target = _target_logit(x_ptr, stride, vocabulary, target)
    anchor, others, weighted = at_target, at_target, at_target
    if at_target == at_target:  # else the row is NaN, unread
        others, weighted = _row_sums(
            x_ptr, stride, vocabulary, target, anchor, inner, outer, CAPPED, WEIGH, HINT, BLOCK
        )
        if needs_repair(anchor, others):
            anchor = _largest(x_ptr, stride, vocabulary, BLOCK)
            others, weighted = _row_sums(
                x_ptr, stride, vocabulary, target, anchor, inner, outer, CAPPED, WEIGH, HINT, BLOCK
            )
    return at_target, anchor, others, weighted


@triton.jit
def _clear(grad_ptr, stride, vocabulary, BLOCK: tl.constexpr):
    for start in range(0, vocabulary, BLOCK):
        at = columns(start, BLOCK, grad_ptr.dtype.element_ty)
        tl.store(grad_ptr + at.to(tl.int64) * stride, 0.0, at < vocabulary)


@triton.jit
def _backward(
    grad_ptr, grad_stride, x_ptr, stride, vocabulary, target, at_target, anchor, others, total, entropy, g, h,
    slope, inner, outer, CAPPED: tl.constexpr, BY_GAP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The gradient's row for the upstream gradients g of logp and h of the entropy; it may be the row itself."""
    if (g == 0) & (h == 0) & (tl.abs(total) < float("inf")):
        _clear(grad_ptr, grad_stride, vocabulary, BLOCK)
    else:
        constant, by_gap = slopes(total, entropy, g, h, slope)
        value = slope_at_target(anchor, at_target, others, total, entropy, g, h, slope, inner, outer, CAPPED)
        squashed_anchor = squash(anchor, inner, CAPPED)
        blocks = tl.cdiv(vocabulary, BLOCK)
        for block in range(blocks):
            at = columns((blocks - 1 - block) * BLOCK, BLOCK, x_ptr.dtype.element_ty)
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
        inside = (target >= 0) & (target < vocabulary)
        tl.store(grad_ptr + target * grad_stride, nearest(value, grad_ptr.dtype.element_ty), inside)


@triton.jit(do_not_specialize=["rows", "sums_stride"])
def _logp_kernel(
    logp_ptr, entropy_ptr, sums_ptr, sums_stride, logits_ptr, row_stride, stride, targets_ptr, numbers_ptr,
    rows, vocabulary, CAPPED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    inner, outer = number(numbers_ptr, INNER), number(numbers_ptr, OUTER)
    for row in range(tl.program_id(0).to(tl.int64), rows, tl.num_programs(0)):
        target = tl.load(targets_ptr + row)
        logp, entropy, anchor, others, total = 0.0, 0.0, 0.0, 0.0, 0.0
        if target != IGNORE:
            at_target, anchor, others, weighted = _forward(
                logits_ptr + row * row_stride, stride, vocabulary, target, inner, outer,
                CAPPED, entropy_ptr is not None, "evict_first", BLOCK,
            )  # fmt: skip
            logp, entropy, total = finish(anchor, at_target, others, weighted, inner, outer, CAPPED)
        tl.store(logp_ptr + row, logp)
        if entropy_ptr is not None:
            tl.store(entropy_ptr + row, entropy)
        tl.store(sums_ptr + row, anchor)
        tl.store(sums_ptr + sums_stride + row, others)
        tl.store(sums_ptr + 2 * sums_stride + row, total)


@triton.jit(do_not_specialize=["rows", "sums_stride"])
def _grad_kernel(
    grad_ptr, grad_row_stride, grad_stride, logits_ptr, row_stride, stride, targets_ptr, sums_ptr, sums_stride,
    grad_logp_ptr, grad_entropy_ptr, entropy_ptr, numbers_ptr, rows, vocabulary,
    CAPPED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    slope, inner, outer = number(numbers_ptr, SLOPE), number(numbers_ptr, INNER), number(numbers_ptr, OUTER)
    for row in range(tl.program_id(0).to(tl.int64), rows, tl.num_programs(0)):
        target = tl.load(targets_ptr + row)
        out_ptr = grad_ptr + row * grad_row_stride
        if target == IGNORE:
            _clear(out_ptr, grad_stride, vocabulary, BLOCK)
        else:
            x_ptr = logits_ptr + row * row_stride
            anchor, others = tl.load(sums_ptr + row), tl.load(sums_ptr + sums_stride + row)
            total, g = tl.load(sums_ptr + 2 * sums_stride + row), tl.load(grad_logp_ptr + row)
            h, entropy = 0.0, 0.0
            if grad_entropy_ptr is not None:
                h, entropy = tl.load(grad_entropy_ptr + row), tl.load(entropy_ptr + row)
            at_target = _target_logit(x_ptr, stride, vocabulary, target)
            tl.debug_barrier()  # the gradient may be written where it was read
            _backward(
                out_ptr, grad_stride, x_ptr, stride, vocabulary, target, at_target, anchor, others, total, entropy,
                g, h, slope, inner, outer, CAPPED, grad_entropy_ptr is not None, BLOCK,
            )  # fmt: skip


@triton.jit(do_not_specialize=["rows"])
def _loss_kernel(
    row_losses_ptr, logp_ptr, entropy_ptr, grad_ptr, grad_row_stride, grad_stride, logits_ptr, row_stride, stride,
    targets_ptr, weights_ptr, advantages_ptr, old_ptr, ref_ptr, sampling_ptr, scale_ptr, numbers_ptr, rows, vocabulary,
    FORM: tl.constexpr, KL: tl.constexpr, RATIO_CORRECTED: tl.constexpr, CORRECTION: tl.constexpr,
    CAPPED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    HINT: tl.constexpr = "evict_first" if grad_ptr is None else "evict_last"
    slope, inner, outer = number(numbers_ptr, SLOPE), number(numbers_ptr, INNER), number(numbers_ptr, OUTER)
    for row in range(tl.program_id(0).to(tl.int64), rows, tl.num_programs(0)):
        target = tl.load(targets_ptr + row)
        logp, entropy, loss = 0.0, 0.0, 0.0
        if target == IGNORE:
            if grad_ptr is not None:
                _clear(grad_ptr + row * grad_row_stride, grad_stride, vocabulary, BLOCK)
        else:
            x_ptr = logits_ptr + row * row_stride
            at_target, anchor, others, weighted = _forward(
                x_ptr, stride, vocabulary, target, inner, outer, CAPPED, True, HINT, BLOCK
            )
            logp, entropy, total = finish(anchor, at_target, others, weighted, inner, outer, CAPPED)
            weight, old, ref, sampling = tl.load(weights_ptr + row), logp, logp, logp
            if old_ptr is not None:
                old = tl.load(old_ptr + row)
            if ref_ptr is not None:
                ref = tl.load(ref_ptr + row)
            if sampling_ptr is not None:
                sampling = tl.load(sampling_ptr + row)
            loss, g = token_coefficient(
                numbers_ptr, logp, tl.load(advantages_ptr + row), old, ref, sampling,
                FORM, KL, RATIO_CORRECTED, CORRECTION,
            )  # fmt: skip
            loss *= weight
            if grad_ptr is not None:
                g *= weight
                if scale_ptr is not None:
                    g *= tl.load(scale_ptr).to(tl.float32)
                _backward(
                    grad_ptr + row * grad_row_stride, grad_stride, x_ptr, stride, vocabulary, target, at_target,
                    anchor, others, total, entropy, g, 0.0, slope, inner, outer, CAPPED, False, BLOCK,
                )  # fmt: skip
        tl.store(logp_ptr + row, logp)
        tl.store(entropy_ptr + row, entropy)
        tl.store(row_losses_ptr + row, loss)


@triton.jit(do_not_specialize=["rows"])
def _total_kernel(loss_ptr, row_losses_ptr, rows, BLOCK: tl.constexpr):
    """In 1024 lanes of float64, then over the lanes."""
    total = tl.zeros([BLOCK], tl.float64)
    for start in range(0, rows, BLOCK):
        row = start + tl.arange(0, BLOCK)
        total += tl.load(row_losses_ptr + row, row < rows, 0.0).to(tl.float64)
    tl.store(loss_ptr, tl.sum(total).to(tl.float32))


@triton.jit(do_not_specialize=["spans"])
def _scale_kernel(x_ptr, row_stride, stride, factor_ptr, spans, width, SPAN: tl.constexpr):
    """A factor of 1 touches nothing."""
    factor = tl.load(factor_ptr).to(tl.float32)
    if factor != 1.0:
        span = tl.program_id(0).to(tl.int64)
        at = columns(span % spans * SPAN, SPAN, x_ptr.dtype.element_ty)
        here_ptr = x_ptr + span // spans * row_stride + at * stride
        x = widen(tl.load(here_ptr, at < width))
        tl.store(here_ptr, nearest(x * factor, x_ptr.dtype.element_ty), at < width)


def tiles(vocabulary: int, width: int) -> list[tuple[int, int, int]]:
    """BLOCK, num_warps and programs an SM for rows of `vocabulary` elements of `width` bytes, in the order of trial."""
    shapes = []
    for most in TILE_BYTES:
        block = max(256, min(most // width, triton.next_power_of_2(vocabulary)))
        warps = max(1, block * width // 2048)
        shapes.append((block, warps, max(1, 16 // warps)))
    return shapes


def token_logp(
    logp: Tensor, entropy: Tensor | None, sums: Tensor, logits: Tensor, targets: Tensor,
    transform: tuple[float, ...], capped: bool,
) -> None:  # fmt: skip
    rows, vocabulary = logits.shape
    with torch.cuda.device_of(logits):
        numbers = table(bits(*transform), logits.device)

        def launch(block, warps, programs):
            _logp_kernel[(min(rows, programs * processors(logits.device)),)](
                logp, entropy, sums, sums.stride(0), logits, *logits.stride(), targets, numbers, rows, vocabulary,
                capped, block, num_warps=warps, **REGISTERS,
            )  # fmt: skip

        if rows:
            first_that_fits(launch, tiles(vocabulary, logits.element_size()))


def token_logp_grad(
    grad: Tensor, logits: Tensor, targets: Tensor, sums: Tensor, grad_logp: Tensor, grad_entropy: Tensor | None,
    entropy: Tensor | None, transform: tuple[float, ...], capped: bool,
) -> None:  # fmt: skip
    rows, vocabulary = logits.shape
    with torch.cuda.device_of(logits):
        numbers = table(bits(*transform), logits.device)

        def launch(block, warps, programs):
            _grad_kernel[(min(rows, programs * processors(logits.device)),)](
                grad, *grad.stride(), logits, *logits.stride(), targets, sums, sums.stride(0), grad_logp, grad_entropy,
                entropy, numbers, rows, vocabulary, capped, block, num_warps=warps, **REGISTERS,
            )  # fmt: skip

        if rows:
            first_that_fits(launch, tiles(vocabulary, logits.element_size()))


def token_loss(
    loss: Tensor, logp: Tensor, entropy: Tensor, grad: Tensor | None, logits: Tensor, targets: Tensor, weights: Tensor,
    advantages: Tensor, old_logp: Tensor | None, ref_logp: Tensor | None, sampling_logp: Tensor | None,
    grad_scale: Tensor | None, numbers: tuple[float, ...], form: str, kl: str, ratio_corrected: bool, correction: str,
    capped: bool,
) -> None:  # fmt: skip
    """numbers: the transform's, then those of policy_loss.py."""
    rows, vocabulary = logits.shape
    with torch.cuda.device_of(logits):
        numbers = table(bits(*numbers), logits.device)
        row_losses = torch.empty_like(logp)

        def launch(block, warps, programs):
            _loss_kernel[(min(rows, programs * processors(logits.device)),)](
                row_losses, logp, entropy, grad, *((1, 1) if grad is None else grad.stride()), logits,
                *logits.stride(), targets, weights, advantages, old_logp, ref_logp, sampling_logp, grad_scale, numbers,
                rows, vocabulary, form, kl, ratio_corrected, correction, capped, block, num_warps=warps, **REGISTERS,
            )  # fmt: skip

        if rows:
            first_that_fits(launch, tiles(vocabulary, logits.element_size()))
        _total_kernel[(1,)](loss, row_losses, rows, BLOCK=1024)


def scale_in_place(x: Tensor, factor: Tensor) -> None:
    """x (rows, columns) *= factor."""
    spans = triton.cdiv(x.shape[1], SPAN)
    with torch.cuda.device_of(x):
        if x.numel():
            _scale_kernel[(x.shape[0] * spans,)](x, *x.stride(), factor, spans, x.shape[1], SPAN=SPAN, num_warps=8)
