"""The formulas of `LossConfig`, token by token. `loss_terms` is the definition, which autograd differentiates;
`token_coefficients` is its value and gradient in closed form, for the fused losses. Both say: policy + beta kl."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from redit_fast.checks import given
from redit_fast.losses.config import LossConfig
from redit_fast.losses.rows import Rows
from redit_fast.noise import STREAM_CLIP_COV, counter_uniform

MAX_LOG_RATIO = 20.0
DPPO_MAX_RATIO = 20.0  # arXiv 2602.04879, section 5.4


def clamp(x: Tensor, low: float = -torch.inf, high: float = torch.inf) -> Tensor:
    """With a gradient at the bounds, as torch.clamp had before 2.15."""
    return torch.where((x >= low) & (x <= high), x, x.detach().clamp(low, high))


def clamp_exponent(x: Tensor) -> Tensor:
    return clamp(x, -MAX_LOG_RATIO, MAX_LOG_RATIO)


class Terms(NamedTuple):
    """(R,) each; masked rows hold finite numbers of no meaning."""

    policy: Tensor  # with its masks and the sampler's correction
    kl: Tensor | None
    exponent: Tensor  # what the policy term exponentiates, before the clamp
    below: Tensor | None  # bool: the lower bound takes the token's gradient away; None: the loss has none
    above: Tensor | None
    phi: Tensor | None  # vespo's weight
    gap: Tensor | None  # old - sampling, NaN where the sampler has none; None: no correction
    correction: Tensor | None


def loss_terms(rows: Rows, logp: Tensor, kept: Tensor) -> Terms:
    """`logp` (R,) float32, finite where masked; `kept` (R,) the tokens that the policy term keeps."""
    config, A = rows.config, rows.advantages
    low, high = config.clip_range
    old = logp.detach() if rows.old_logp is None else rows.old_logp
    choosing = logp.detach() if rows.masks_of is None else rows.masks_of[0]
    log_ratio = logp - old
    gap = None if config.correction == "none" else old - given(rows.sampling_logp)
    correction = None if gap is None else _correction(rows, gap)
    exponent = _exponent(rows, log_ratio, correction, kept)
    ratio = torch.exp(clamp_exponent(exponent))
    below = above = phi = None

    if config.loss_type in ("gpg", "reinforce"):
        policy = -A * logp
    elif config.loss_type == "dro":
        policy = -A * logp + 0.5 * given(config.dro_beta) * log_ratio.square()
    elif config.loss_type == "cispo":
        policy = -ratio.clamp(low, high).detach() * A * logp
        above = (ratio > high) & (A > 0)
    elif config.loss_type == "vespo":
        phi = _vespo_weight(config, clamp_exponent(exponent), A)
        policy = -phi * A * logp
    elif config.loss_type in ("dppo_tv", "dppo_kl"):
        trusted = dppo_trusts(config, logp.detach(), old, A)
        policy = -A * ratio.clamp(max=DPPO_MAX_RATIO).detach() * logp * trusted
        below, above = ~trusted & (A < 0), ~trusted & (A > 0)
    elif config.loss_type == "sapo":
        temperature = of_sign(A > 0, A, config.sapo_temperature_pos, config.sapo_temperature_neg)
        policy = -(4 / temperature) * torch.sigmoid(temperature * (ratio - 1)) * A
    elif config.loss_type == "gmpo":
        policy = -ratio * A
        below, above = (log_ratio < low) & (A < 0), (log_ratio > high) & (A > 0)
    elif config.loss_type == "kl_cov":
        policy = -ratio * A + config.kl_cov_coef * log_ratio.abs() * _kl_cov_tokens(rows, choosing)
    else:
        unclipped = ratio if config.delta is None else clamp(ratio, high=config.delta)
        policy = -torch.min(unclipped * A, clamp(ratio, low, high) * A)
        if config.dual_clip is not None:
            policy = torch.where(A < 0, torch.min(policy, -config.dual_clip * A), policy)
        below, above = (unclipped < low) & (A < 0), (unclipped > high) & (A > 0)
        if config.loss_type == "clip_cov":
            policy = torch.where(clip_cov_tokens(rows, choosing), 0.0, policy)

    if config.off_policy_mask_threshold is not None:
        policy = torch.where(_on_policy(rows, choosing), policy, 0.0)
    if config.top_entropy_quantile < 1 and config.loss_type != "gmpo":  # gmpo leaves them out of its mean
        policy = torch.where(kept, policy, 0.0)
    if correction is not None and config.loss_type != "vespo":  # vespo has it in phi
        policy = policy * correction
    kl = None if config.beta == 0 else _kl(rows, logp, log_ratio)
    return Terms(policy, kl, exponent, below, above, phi, gap, correction)


def _exponent(rows: Rows, log_ratio: Tensor, correction: Tensor | None, kept: Tensor) -> Tensor:
    config = rows.config
    if config.sequence_ratio:
        return rows.sequence_mean(log_ratio)
    if config.loss_type == "gspo_token":
        return log_ratio - log_ratio.detach() + rows.sequence_mean(log_ratio.detach())
    if config.loss_type == "rloo":
        return rows.sequence_sum(log_ratio)
    if config.loss_type == "vespo":
        log_weights = clamp_exponent(log_ratio.detach())
        return rows.sequence_sum(log_weights if correction is None else log_weights + clamp_exponent(correction.log()))
    if config.loss_type == "gmpo":
        clipped = clamp(log_ratio, *config.clip_range)
        nearer = torch.where(rows.advantages > 0, torch.minimum(log_ratio, clipped), torch.maximum(log_ratio, clipped))
        return rows.sequence_mean(nearer, kept)
    return log_ratio


def of_sign(is_positive: Tensor, advantages: Tensor, positive: float, negative: float) -> Tensor:
    """One of two numbers for each advantage. torch.where of two floats has the process's default dtype: in bfloat16
    1.05 is 1.047."""
    return torch.full_like(advantages, negative).masked_fill(is_positive, positive)


def _vespo_weight(config: LossConfig, log_weight: Tensor, advantages: Tensor) -> Tensor:
    k = of_sign(advantages >= 0, advantages, config.vespo_k_pos, config.vespo_k_neg)
    scale = of_sign(advantages >= 0, advantages, config.vespo_lambda_pos, config.vespo_lambda_neg)
    return torch.exp(scale + k * log_weight - scale * torch.exp(log_weight))


def _kl(rows: Rows, logp: Tensor, log_ratio: Tensor) -> Tensor:
    config, difference = rows.config, given(rows.ref_logp) - logp
    if config.kl == "k1":
        kl = -difference
    elif config.kl == "k2":
        kl = 0.5 * difference.square()
    elif config.kl == "abs":
        kl = difference.abs()
    else:
        difference = clamp_exponent(difference)
        kl = torch.expm1(difference) - difference
    if config.kl_ratio_correction:
        kl = kl * torch.exp(clamp_exponent(rows.sequence_mean(log_ratio) if config.sequence_ratio else log_ratio))
    return kl


# The sampler's correction, and the masks. None has a gradient; none waits for the device.


def _correction(rows: Rows, gap: Tensor) -> Tensor:
    if rows.config.correction.startswith("sequence"):
        gap = rows.sequence_sum(gap.nan_to_num(nan=0.0))
    return correction_weight(rows.config, gap)


def correction_weight(config: LossConfig, gap: Tensor) -> Tensor:
    """From old - sampling; an unknown sampling log-prob (NaN) has weight 1 (TRL)."""
    floor, cap = config.correction_range
    weight = torch.exp(clamp_exponent(gap.nan_to_num(nan=0.0)))
    if config.correction.endswith("truncate"):
        return weight.clamp(floor, cap)
    return torch.where((weight >= floor) & (weight <= cap), weight, 0.0)


def dppo_trusts(config: LossConfig, logp: Tensor, old_logp: Tensor, advantages: Tensor) -> Tensor:
    """bool: the step from p_old to p is short enough, or, in dppo_kl, against the advantage."""
    low, high = config.clip_range
    p, p_old = torch.exp(logp), torch.exp(old_logp)
    if config.loss_type == "dppo_tv":
        return torch.where(advantages > 0, p - p_old <= high, p - p_old >= low)
    tiny = 1e-8
    divergence = p_old * (old_logp - logp) + (1 - p_old) * torch.log((1 - p_old + tiny) / (1 - p + tiny))
    return torch.where(advantages > 0, (divergence <= high) | (p <= p_old), (divergence <= -low) | (p >= p_old))


def _on_policy(rows: Rows, logp: Tensor) -> Tensor:
    """off_policy_mask_threshold: A >= 0, or a mean of sampling - logp (old - logp without) of at most the threshold."""
    sampling = rows.old_logp if rows.sampling_logp is None else rows.sampling_logp
    drift = torch.zeros_like(logp) if sampling is None else (sampling - logp).nan_to_num(nan=0.0)
    return (rows.advantages >= 0) | (rows.sequence_mean(drift) <= given(rows.config.off_policy_mask_threshold))


def top_entropy(rows: Rows, entropy: Tensor) -> Tensor:
    """bool (R,): the scored tokens at or above the quantile 1 - top_entropy_quantile, interpolated as torch.quantile
    does: float32 ranks, then lerp. That function has at most 2^24 elements, and no way to leave masked ones out."""
    if not len(entropy):
        return rows.mask
    ordered = torch.where(rows.mask, entropy, torch.inf).sort().values
    rank = (1 - rows.config.top_entropy_quantile) * (rows.mask.sum().float() - 1)
    first, second = (ordered.gather(0, r.long().clamp(min=0)[None]) for r in (rank.floor(), rank.ceil()))
    return rows.mask & (entropy >= torch.lerp(first, second, rank - rank.floor()))


def _covariance(rows: Rows, logp: Tensor) -> Tensor:
    return (rows.advantages - rows.mean(rows.advantages)) * (logp - rows.mean(logp))


def _share(rows: Rows, ratio: float) -> Tensor:
    """() how many tokens a ratio of the scored ones is, at least one."""
    return (ratio * rows.mask.sum().double()).long().clamp(min=1)


def _smallest(keys: Tensor, count: Tensor) -> Tensor:
    """bool (R,): the `count` () smallest keys, of equal ones the first."""
    chosen = torch.arange(len(keys), device=keys.device) < count
    return torch.zeros_like(chosen).scatter(0, keys.argsort(stable=True), chosen)


def clip_cov_tokens(rows: Rows, logp: Tensor) -> Tensor:
    config, covariance, A = rows.config, _covariance(rows, logp), rows.advantages
    low, high = config.clip_range
    ratio = torch.ones_like(logp) if rows.old_logp is None else torch.exp(clamp_exponent(logp - rows.old_logp))
    clipped = ((ratio < low) & (A < 0)) | ((ratio > high) & (A > 0))
    inside = (covariance > config.clip_cov_lb) & (covariance < config.clip_cov_ub)
    candidates = rows.mask & inside & ~clipped
    ids = rows.mask.cumsum(0) - 1  # the index among the scored tokens: padded or packed, the same
    lots = counter_uniform(rows.seed, ids, STREAM_CLIP_COV, rows.step)
    return candidates & _smallest(torch.where(candidates, lots, torch.inf), _share(rows, config.clip_cov_ratio))


def _kl_cov_tokens(rows: Rows, logp: Tensor) -> Tensor:
    keys = torch.where(rows.mask, -_covariance(rows, logp), torch.inf)
    return _smallest(keys, _share(rows, rows.config.kl_cov_ratio))
