"""A row of logits: what the token loss and the head share, the twin of csrc/shared/row_math.h;
redit_fast/backends/reference/token_loss.py is the definition.

    y_j = (z_j - z_anchor) log2 e, e_j = 2^y_j; the anchor is the target's logit: no maximum is needed first, one
    exponential an element, and 1 - p_t does not cancel.

A row whose sum exceeds e^40 or is not finite is redone with its largest logit as anchor.
"""

import triton
import triton.language as tl

from redit_fast.kernels.element import log1p

REPAIR = tl.constexpr(2.353852668370200e17)  # e^40
LN2 = tl.constexpr(0.6931471805599453)
SLOPE, INNER, OUTER = (tl.constexpr(i) for i in range(3))  # in the table of numbers; what follows them is the caller's


def transform_numbers(transform) -> tuple[float, float, float]:
    """SLOPE, INNER, OUTER of a TransformConstants of redit_fast/losses/transforms.py. `squash` has its tanh by exp2."""
    inner = transform.inner * (2 / LN2.value) if transform.capped else transform.inner
    return transform.slope, inner, transform.outer


@triton.jit
def number(numbers_ptr, i):
    return tl.load(numbers_ptr + i).to(tl.float64, bitcast=True).to(tl.float32)


@triton.jit
def squash(x, inner, CAPPED: tl.constexpr):
    """Under softcap tanh(x logit_scale / softcap), to 2e-7, inner 2 log2 e times the factor; else x."""
    if CAPPED:
        x = 1.0 - 2.0 / (1.0 + tl.exp2(x * inner))
    return x


@triton.jit
def exponential(squashed, anchor, outer):
    """e and y, both anchors squashed. y ends at -200, where e is 0: e y is never 0 times infinity. NaN stays."""
    y = tl.maximum((squashed - anchor) * outer, -200.0, propagate_nan=tl.PropagateNan.ALL)
    return tl.exp2(y), y


@triton.jit
def columns(start, BLOCK: tl.constexpr, TYPE: tl.constexpr):
    """(lanes, 16 bytes of TYPE): neighbours that one thread has, and adds itself."""
    WIDE: tl.constexpr = 128 // TYPE.primitive_bitwidth
    return start + tl.arange(0, BLOCK // WIDE)[:, None] * WIDE + tl.arange(0, WIDE)[None, :]


@triton.jit
def folded(x, LENGTH: tl.constexpr):
    """Sums of neighbours: (LENGTH,), or () for 1. In pairs of pairs, so that the bits do not depend on which thread has
    which element, as in tl.sum they do."""
    x = tl.reshape(x, [x.numel])
    for _ in tl.static_range(24):
        if x.shape[0] > LENGTH:
            x = tl.sum(tl.reshape(x, [x.shape[0] // 2, 2]), 1)
    if LENGTH == 1:
        x = tl.sum(x)
    return x


@triton.jit
def needs_repair(anchor, others):
    return (others <= REPAIR) & (tl.abs(anchor) < float("inf")) == 0


@triton.jit
def offset_of(target, anchor, inner, outer, CAPPED: tl.constexpr):
    """z_t - z_anchor; exactly 0 unless repaired."""
    return (squash(target, inner, CAPPED) - squash(anchor, inner, CAPPED)) * (outer * LN2)


@triton.jit
def times_or_zero(e, y):
    return tl.where(e == 0, 0.0, e * y)


@triton.jit
def finish(anchor, target, others, weighted, inner, outer, CAPPED: tl.constexpr):
    """logp, entropy and s = sum_j e_j, from the sums of e_j and e_j y_j over j != t."""
    offset = offset_of(target, anchor, inner, outer, CAPPED)
    e_target = tl.exp(offset)
    total = others + e_target
    log_total = log1p(tl.where(offset == 0, others, total - 1.0))
    entropy = log_total - (weighted * LN2 + times_or_zero(e_target, offset)) / total
    return offset - log_total, entropy, total


@triton.jit
def slopes(total, entropy, g, h, slope):
    """g (1{j = t} - p_j) - h p_j (log p_j + H), times dz/dx_j, is e_j (constant + by_gap y_j) for j != t."""
    surprise = tl.where(h == 0, 0.0, entropy - log1p(total - 1.0))
    return (-g - h * surprise) * slope / total, -h * LN2 * slope / total


@triton.jit
def slope_at_target(
    anchor, target, others, total, entropy, g, h, slope, inner, outer, CAPPED: tl.constexpr
):  # fmt: skip
    """The target's own: others / total is 1 - p_t without cancellation."""
    offset = offset_of(target, anchor, inner, outer, CAPPED)
    by_entropy = h * times_or_zero(tl.exp(offset), offset + entropy - log1p(total - 1.0))
    value = g * others - tl.where(h == 0, 0.0, by_entropy)
    if CAPPED:
        tangent = squash(target, inner, CAPPED)
        value *= 1.0 - tangent * tangent
    return value * slope / total
