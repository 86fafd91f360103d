"""The per-token policy loss and its derivative, the twin of csrc/shared/policy_loss.h; redit_fast/losses/
coefficients.py::token_coefficients is the definition, float32 and with its order of operations."""

import triton
import triton.language as tl

from redit_fast.kernels.element import exp, expm1
from redit_fast.kernels.row_math import OUTER, number

# In the table of numbers, after the transform's: the floats of PolicyConstants of redit_fast/losses/coefficients.py.
(
    LOW, HIGH, DELTA, DUAL_CLIP, SAPO_TEMPERATURE_POS, SAPO_TEMPERATURE_NEG, DRO_BETA, BETA, CORRECTION_FLOOR,
    CORRECTION_CAP,
) = (tl.constexpr(OUTER.value + 1 + i) for i in range(10))  # fmt: skip


def policy_numbers(policy) -> tuple[float, ...]:
    """A PolicyConstants' from LOW to CORRECTION_CAP."""
    return tuple(number for number in policy if isinstance(number, float))


@triton.jit
def _clamped(x, low, high):
    """NaN stays; low above high gives high, as torch.clamp."""
    x = tl.where(x < low, low, x)
    return tl.where(x > high, high, x)


@triton.jit
def _sigmoid(x):
    return tl.div_rn(1.0, 1.0 + tl.exp(-x))


@triton.jit
def _clipped(numbers_ptr, ratio, advantage, inside):
    """torch.min halves its gradient at a tie and clamp passes it at the bounds; NaN stays."""
    low, high, delta = number(numbers_ptr, LOW), number(numbers_ptr, HIGH), number(numbers_ptr, DELTA)
    unclipped = tl.where(ratio > delta, delta, ratio) * advantage
    clipped = _clamped(ratio, low, high) * advantage
    share = tl.where(unclipped < clipped, 1.0, tl.where(unclipped == clipped, 0.5, 0.0))
    passed = share * (ratio <= delta) + (1.0 - share) * ((low <= ratio) & (ratio <= high))
    loss = tl.where((unclipped < clipped) | (unclipped != unclipped), -unclipped, -clipped)
    slope = -advantage * ratio * inside * passed
    most = tl.where(advantage < 0, -number(numbers_ptr, DUAL_CLIP) * advantage, float("inf"))
    slope *= tl.where(loss < most, 1.0, tl.where(loss == most, 0.5, 0.0))
    return tl.where(loss > most, most, loss), slope


@triton.jit
def _dppo_trusts(numbers_ptr, logp, old, advantage, FORM: tl.constexpr):
    low, high = number(numbers_ptr, LOW), number(numbers_ptr, HIGH)
    p, p_old = tl.exp(logp), tl.exp(old)
    if FORM == "dppo_tv":
        trusts = tl.where(advantage > 0, p - p_old <= high, p - p_old >= low)
    else:
        others = tl.log((1.0 - p_old + 1e-8) / (1.0 - p + 1e-8))
        divergence = p_old * (old - logp) + (1.0 - p_old) * others
        up, down = (divergence <= high) | (p <= p_old), (divergence <= -low) | (p >= p_old)
        trusts = tl.where(advantage > 0, up, down)
    return trusts


@triton.jit
def _policy(numbers_ptr, logp, advantage, old, ratio, inside, FORM: tl.constexpr):
    if FORM == "clipped":
        loss, slope = _clipped(numbers_ptr, ratio, advantage, inside)
    elif FORM == "dro":
        beta, log_ratio = number(numbers_ptr, DRO_BETA), logp - old
        loss, slope = -advantage * logp + 0.5 * beta * (log_ratio * log_ratio), beta * log_ratio - advantage
    elif FORM == "sapo":
        positive, negative = number(numbers_ptr, SAPO_TEMPERATURE_POS), number(numbers_ptr, SAPO_TEMPERATURE_NEG)
        temperature = tl.where(advantage > 0, positive, negative)
        x = temperature * (ratio - 1.0)
        gate = _sigmoid(x)
        loss = -tl.div_rn(4.0, temperature) * gate * advantage
        slope = -4.0 * advantage * gate * _sigmoid(-x) * ratio * inside
    else:
        if FORM == "cispo":
            slope = -_clamped(ratio, number(numbers_ptr, LOW), number(numbers_ptr, HIGH)) * advantage
        elif FORM == "reinforce":
            slope = -advantage
        else:
            trusts = _dppo_trusts(numbers_ptr, logp, old, advantage, FORM)
            slope = -advantage * tl.where(ratio > 20.0, 20.0, ratio) * trusts
        loss = slope * logp
    return loss, slope


@triton.jit
def _kl(difference, KL: tl.constexpr):
    """difference = ref - logp."""
    if KL == "k1":
        loss, slope = -difference, difference * 0.0 + 1.0
    elif KL == "k2":
        loss, slope = 0.5 * (difference * difference), -difference
    elif KL == "abs":
        loss, slope = tl.abs(difference), (difference < 0).to(tl.float32) - (difference > 0).to(tl.float32)
    else:
        limited = _clamped(difference, -20.0, 20.0)
        growth = expm1(limited)
        loss, slope = growth - limited, -growth * (tl.abs(difference) <= 20.0)
    return loss, slope


@triton.jit
def token_coefficient(
    numbers_ptr, logp, advantage, old, ref, sampling,
    FORM: tl.constexpr, KL: tl.constexpr, RATIO_CORRECTED: tl.constexpr, CORRECTION: tl.constexpr,
):  # fmt: skip
    """A token's loss and dl/dlogp. KL "none": no KL term."""
    log_ratio = logp - old
    ratio, inside = exp(_clamped(log_ratio, -20.0, 20.0)), tl.abs(log_ratio) <= 20.0
    loss, slope = _policy(numbers_ptr, logp, advantage, old, ratio, inside, FORM)
    if CORRECTION != "none":
        gap = old - sampling
        floor, cap = number(numbers_ptr, CORRECTION_FLOOR), number(numbers_ptr, CORRECTION_CAP)
        weight = exp(_clamped(tl.where(gap != gap, 0.0, gap), -20.0, 20.0))  # NaN: the sampler does not know it
        if CORRECTION == "token_truncate":
            weight = _clamped(weight, floor, cap)
        else:
            weight = tl.where((floor <= weight) & (weight <= cap), weight, 0.0)
        loss, slope = loss * weight, slope * weight
    if KL != "none":
        beta = number(numbers_ptr, BETA)
        kl, kl_slope = _kl(ref - logp, KL)
        if RATIO_CORRECTED:
            kl, kl_slope = kl * ratio, ratio * (kl_slope + kl * inside)
        loss, slope = loss + beta * kl, slope + beta * kl_slope
    return loss, slope
