"""The closed forms of `terms`: a token's loss and its derivative, for the fused losses, where autograd does not run."""

from __future__ import annotations

import math
from typing import Any, Literal, NamedTuple, cast

import torch
from torch import Tensor

from redit_fast.checks import given
from redit_fast.losses.config import KL, LossConfig
from redit_fast.losses.terms import (
    DPPO_MAX_RATIO,
    MAX_LOG_RATIO,
    clamp_exponent,
    correction_weight,
    dppo_trusts,
    of_sign,
)


class PolicyConstants(NamedTuple):
    """What the closed forms need of a config, as kernels take it."""

    form: Literal["clipped", "cispo", "sapo", "reinforce", "dppo_tv", "dppo_kl", "dro"]
    kl: KL
    kl_ratio_correction: bool
    correction: Literal["none", "token_truncate", "token_mask"]
    low: float
    high: float
    delta: float  # infinity: none, as dual_clip
    dual_clip: float
    sapo_temperature_pos: float
    sapo_temperature_neg: float
    dro_beta: float
    beta: float  # 0: no KL term
    correction_floor: float
    correction_cap: float

    @classmethod
    def of(cls, config: LossConfig) -> PolicyConstants:
        return cls(
            cast(Any, _FORMS.get(config.loss_type, "clipped")),
            config.kl,
            config.kl_ratio_correction,
            cast(Any, config.correction),
            *config.clip_range,
            math.inf if config.delta is None else config.delta,
            math.inf if config.dual_clip is None else config.dual_clip,
            config.sapo_temperature_pos,
            config.sapo_temperature_neg,
            config.dro_beta or 0.0,
            config.beta,
            *config.correction_range,
        )


_FORMS = {"gpg": "reinforce"} | {name: name for name in ("cispo", "sapo", "reinforce", "dppo_tv", "dppo_kl", "dro")}


def token_coefficients(
    config: LossConfig,
    logp: Tensor,
    advantages: Tensor,
    old_logp: Tensor | None,
    ref_logp: Tensor | None,
    sampling_logp: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """A token's loss l and its closed-form derivative dl/dlogp, for the configs of route "fused"; all (R,) float32."""
    A, old = advantages, logp if old_logp is None else old_logp
    low, high = config.clip_range
    log_ratio = logp - old
    inside = log_ratio.abs() <= MAX_LOG_RATIO
    ratio = torch.exp(clamp_exponent(log_ratio))
    if config.loss_type in ("gpg", "reinforce"):
        slope = -A
        loss = slope * logp
    elif config.loss_type == "dro":
        loss, slope = (
            -A * logp + 0.5 * given(config.dro_beta) * log_ratio.square(),
            given(config.dro_beta) * log_ratio - A,
        )
    elif config.loss_type == "cispo":
        slope = -ratio.clamp(low, high) * A
        loss = slope * logp
    elif config.loss_type in ("dppo_tv", "dppo_kl"):
        slope = -A * ratio.clamp(max=DPPO_MAX_RATIO) * dppo_trusts(config, logp, old, A)
        loss = slope * logp
    elif config.loss_type == "sapo":
        temperature = of_sign(A > 0, A, config.sapo_temperature_pos, config.sapo_temperature_neg)
        x = temperature * (ratio - 1)
        gate = torch.sigmoid(x)
        loss, slope = -(4 / temperature) * gate * A, -4 * A * gate * torch.sigmoid(-x) * ratio * inside
    else:
        bound = torch.inf if config.delta is None else config.delta
        unclipped, clipped = ratio.clamp(max=bound) * A, ratio.clamp(low, high) * A
        share = (unclipped < clipped).float() + 0.5 * (unclipped == clipped).float()
        passed = share * (ratio <= bound) + (1 - share) * ((low <= ratio) & (ratio <= high))
        loss, slope = -torch.minimum(unclipped, clipped), -A * ratio * inside * passed
        if config.dual_clip is not None:
            most = torch.where(A < 0, -config.dual_clip * A, torch.inf)
            slope = slope * ((loss < most).float() + 0.5 * (loss == most).float())
            loss = torch.minimum(loss, most)
    if config.correction != "none":
        weight = correction_weight(config, old - given(sampling_logp))
        loss, slope = loss * weight, slope * weight
    if config.beta != 0:
        kl, kl_slope = _kl_coefficients(config, given(ref_logp) - logp)
        if config.kl_ratio_correction:
            kl, kl_slope = kl * ratio, ratio * (kl_slope + kl * inside)
        loss, slope = loss + config.beta * kl, slope + config.beta * kl_slope
    return loss, slope


def _kl_coefficients(config: LossConfig, difference: Tensor) -> tuple[Tensor, Tensor]:
    """The KL term and its derivative by logp; difference = ref - logp."""
    if config.kl == "k1":
        return -difference, torch.ones_like(difference)
    if config.kl == "k2":
        return 0.5 * difference.square(), -difference
    if config.kl == "abs":
        return difference.abs(), -difference.sign()
    limited = clamp_exponent(difference)
    growth = torch.expm1(limited)
    return growth - limited, -growth * (difference.abs() <= MAX_LOG_RATIO)
