"""The policy losses of the GRPO family: the one definition, in plain PyTorch, that every fused path must equal.

Notation: logp current log-probs, old and ref those of the old and the reference policy, r = exp(logp - old), A
advantages, m the mask, |o| the scored tokens of a sequence. Everything that is exponentiated is clamped to [-20, 20]
first.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from redit_fast.dither import check_choice
from redit_fast.transforms import LogitTransform

LossType = Literal["grpo", "bnpo", "dr_grpo", "dapo", "cispo", "gspo"]
Importance = Literal["token", "sequence"]
Route = Literal["fused", "logp"]

MAX_LOG_RATIO = 20.0
_COMMON = {"beta", "kl", "kl_ratio_correction", "entropy_coef", "max_completion_length", "temperature", "logit_scale",
           "softcap"}  # fmt: skip
_CLIPPED = _COMMON | {"importance", "epsilon_low", "epsilon_high", "delta"}
_USED = {
    "grpo": _CLIPPED,
    "bnpo": _CLIPPED,
    "dr_grpo": _CLIPPED,
    "dapo": _CLIPPED,
    "gspo": _CLIPPED,
    "cispo": _COMMON | {"importance", "epsilon_low", "epsilon_high", "cispo_bound"},
}
_LATER_TYPES = ("sapo", "luspo", "vespo", "gspo_token", "gmpo", "gpg", "reinforce", "rloo", "dppo_tv", "dppo_kl",
                "clip_cov", "kl_cov", "dro")  # fmt: skip
_LATER_FIELDS = ("dual_clip", "correction", "correction_cap", "correction_floor", "off_policy_mask_threshold",
                 "top_entropy_quantile", "sapo_temperature_pos", "sapo_temperature_neg", "vespo_k_pos",
                 "vespo_lambda_pos", "vespo_k_neg", "vespo_lambda_neg", "clip_cov_ratio", "clip_cov_lb", "clip_cov_ub",
                 "kl_cov_ratio", "kl_cov_coef", "dro_beta")  # fmt: skip


@dataclass(frozen=True)
class LossConfig:
    """What the loss is. The defaults are TRL 1.16's formulas with KL and sampler corrections off.

    Args:
        loss_type: the objective and its denominator. With l the per-token loss -min(r A, clip(r, 1 - epsilon_low,
            1 + epsilon_high) A): "grpo" and "gspo" average l over each sequence, then over sequences; "bnpo" and "dapo"
            over all scored tokens; "dr_grpo" divides the sum by sequences x max_completion_length. "cispo" is
            -stop_gradient(clip(r)) A logp over all scored tokens. "gspo" implies importance "sequence".
        importance: r per token, or exp of the sequence's mean log-ratio.
        epsilon_low, epsilon_high: the clip range; epsilon_high None means epsilon_low.
        delta: upper bound of r in the unclipped branch (two-sided clipping), None for none.
        cispo_bound: "absolute" clips r from above at epsilon_high itself (TRL), "relative" to
            [1 - epsilon_low, 1 + epsilon_high] (verl).
        beta: weight of the KL term exp(ref - logp) - (ref - logp) - 1 ("k3").
        kl_ratio_correction: multiply the KL term by r, with its gradient.
        entropy_coef: weight of the entropy bonus, a mean over scored tokens (TRL).
        max_completion_length: the length in dr_grpo's denominator.
        temperature, logit_scale, softcap: logits -> log-probs, in the fused losses only.

    Raises:
        ValueError: a value out of range, or a non-default value of a field that the loss type does not use, naming it.
        NotImplementedError: a loss type or field of a later version, naming it.
    """

    loss_type: LossType = "dapo"
    importance: Importance = "token"
    epsilon_low: float = 0.2
    epsilon_high: float | None = None
    delta: float | None = None
    dual_clip: float | None = None
    cispo_bound: Literal["absolute", "relative"] = "absolute"
    beta: float = 0.0
    kl: Literal["k3"] = "k3"
    kl_ratio_correction: bool = False
    entropy_coef: float = 0.0
    correction: Literal["none"] = "none"
    correction_cap: float = 3.0
    correction_floor: float | None = None
    off_policy_mask_threshold: float | None = None
    top_entropy_quantile: float = 1.0
    sapo_temperature_pos: float = 1.0
    sapo_temperature_neg: float = 1.05
    vespo_k_pos: float = 2.0
    vespo_lambda_pos: float = 3.0
    vespo_k_neg: float = 3.0
    vespo_lambda_neg: float = 2.0
    clip_cov_ratio: float = 2e-4
    clip_cov_lb: float = 1.0
    clip_cov_ub: float = 5.0
    kl_cov_ratio: float = 2e-4
    kl_cov_coef: float = 1.0
    dro_beta: float | None = None
    max_completion_length: int | None = None
    temperature: float = 1.0
    logit_scale: float = 1.0
    softcap: float | None = None

    def __post_init__(self) -> None:
        if self.loss_type in _LATER_TYPES:
            raise NotImplementedError(f"loss_type={self.loss_type!r} is not part of this version")
        check_choice("loss_type", self.loss_type, get_args(LossType))
        check_choice("importance", self.importance, get_args(Importance))
        check_choice("cispo_bound", self.cispo_bound, ("absolute", "relative"))
        if self.kl in ("k1", "k2", "abs"):
            raise NotImplementedError(f"kl={self.kl!r} is not part of this version")
        check_choice("kl", self.kl, ("k3",))
        for field in fields(self):
            if getattr(self, field.name) == field.default:
                continue
            if field.name in _LATER_FIELDS:
                raise NotImplementedError(f"{field.name} is not part of this version")
            if field.name != "loss_type" and field.name not in _USED[self.loss_type]:
                raise ValueError(f"{field.name} is not used by loss_type={self.loss_type!r}; leave it at its default")
        if self.loss_type == "cispo" and self.cispo_bound == "absolute" and self.epsilon_high is not None:
            if self.epsilon_low != 0.2:
                raise ValueError("epsilon_low is not used by cispo with cispo_bound='absolute' and an epsilon_high")
        for name in ("epsilon_low", "epsilon_high", "beta"):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value >= 0):
                raise ValueError(f"{name} must be finite and at least 0, got {value}")
        if self.delta is not None and not self.delta > 0:
            raise ValueError(f"delta must be above 0, got {self.delta}")
        self.transform.check()
        if not math.isfinite(self.entropy_coef):
            raise ValueError(f"entropy_coef must be finite, got {self.entropy_coef}")
        if self.max_completion_length is not None and self.max_completion_length < 1:
            raise ValueError(f"max_completion_length must be at least 1, got {self.max_completion_length}")

    @property
    def sequence_level(self) -> bool:
        return self.loss_type == "gspo" or self.importance == "sequence"

    @property
    def route(self) -> Route:
        """ "fused" where a row's coefficient depends on that row alone."""
        return "logp" if self.sequence_level or self.entropy_coef != 0 else "fused"

    @property
    def transform(self) -> LogitTransform:
        return LogitTransform(self.temperature, self.logit_scale, self.softcap)

    @property
    def clip_range(self) -> tuple[float, float]:
        high = self.epsilon_low if self.epsilon_high is None else self.epsilon_high
        if self.loss_type == "cispo" and self.cispo_bound == "absolute":
            return -math.inf, high
        return 1 - self.epsilon_low, 1 + high


class LossOutput(NamedTuple):
    loss: Tensor  # 0-d float32
    logp: Tensor  # (...) float32; detached in the fused losses
    entropy: Tensor | None  # (...) float32, detached in the fused losses
    metrics: dict[str, Tensor]  # 0-d, on the device, without graph
    route: Route


class Layout:
    """Rows as sequences: padded (..., T), packed with cu_seqlens (S + 1,), or one 1-D sequence."""

    def __init__(self, shape: torch.Size, cu_seqlens: Tensor | None):
        if cu_seqlens is None:
            if not shape:
                raise ValueError("targets must have at least one dimension, the tokens of a sequence; got a 0-d tensor")
            self.lengths, self.length = None, shape[-1]
            self.count = math.prod(shape[:-1])
        else:
            if len(shape) != 1:
                raise ValueError(f"cu_seqlens goes with packed rows of shape (R,), got {tuple(shape)}")
            if cu_seqlens.ndim != 1 or len(cu_seqlens) < 1 or cu_seqlens.is_floating_point():
                raise ValueError(
                    f"cu_seqlens must be (S + 1,) integers, got {tuple(cu_seqlens.shape)} {cu_seqlens.dtype}"
                )
            self.lengths, self.count = cu_seqlens.diff().long(), len(cu_seqlens) - 1
            if cu_seqlens.device.type == "cpu" and (
                cu_seqlens[0] != 0 or cu_seqlens[-1] != shape[0] or (self.lengths < 0).any()
            ):
                raise ValueError(
                    f"cu_seqlens must rise from 0 to the {shape[0]} rows, got {cu_seqlens.tolist()[:8]}..."
                )
        self.rows = math.prod(shape)

    def sum(self, rows: Tensor) -> Tensor:
        """(R,) -> (S,) float32, in a fixed order."""
        if self.lengths is None:
            return rows.view(self.count, self.length).sum(-1)
        return torch.segment_reduce(rows, "sum", lengths=self.lengths, unsafe=True, initial=0.0)

    def spread(self, sequences: Tensor) -> Tensor:
        """(S,) -> (R,)"""
        if self.lengths is None:
            return sequences[:, None].expand(self.count, self.length).reshape(-1)
        return sequences.repeat_interleave(self.lengths, output_size=self.rows)


class Rows(NamedTuple):
    """Everything a loss reads, flat: (R,), float32, without graph; masked rows hold zeros."""

    layout: Layout
    mask: Tensor  # bool
    advantages: Tensor
    old_logp: Tensor | None
    ref_logp: Tensor | None

    @classmethod
    def check(
        cls,
        logp: Tensor,
        advantages: Tensor,
        old_logp: Tensor | None,
        ref_logp: Tensor | None,
        mask: Tensor | None,
        cu_seqlens: Tensor | None,
        config: LossConfig,
        normalizer: float | Tensor | None,
    ) -> Rows:
        """Checks the arguments of a loss against the shape and device of `logp` (or of the targets) and flattens
        them."""
        if not isinstance(config, LossConfig):
            raise TypeError(f"config must be a LossConfig, got {type(config).__name__}")
        layout = Layout(logp.shape, cu_seqlens)
        for name, tensor in (
            ("advantages", advantages),
            ("old_logp", old_logp),
            ("ref_logp", ref_logp),
            ("mask", mask),
        ):
            if tensor is None:
                continue
            if not isinstance(tensor, Tensor) or tensor.device != logp.device:
                raise TypeError(
                    f"{name} must be a tensor on {logp.device}, got {getattr(tensor, 'device', type(tensor))}"
                )
            per_sequence = name == "advantages" and tensor.shape == (layout.count,)
            if tensor.shape != logp.shape and not per_sequence:
                also = f" or ({layout.count},)" if name == "advantages" else ""
                raise ValueError(f"{name} must have shape {tuple(logp.shape)}{also}, got {tuple(tensor.shape)}")
        if config.beta != 0 and ref_logp is None:
            raise ValueError(f"ref_logp is required by beta={config.beta}")
        if config.loss_type == "dr_grpo" and config.max_completion_length is None and normalizer is None:
            raise ValueError("loss_type='dr_grpo' needs max_completion_length in its config, or a normalizer")
        if isinstance(normalizer, Tensor) and normalizer.ndim != 0:
            raise ValueError(f"normalizer must be a number or a 0-d tensor, got shape {tuple(normalizer.shape)}")

        scored = (
            (mask != 0).reshape(-1)
            if mask is not None
            else torch.ones(layout.rows, dtype=torch.bool, device=logp.device)
        )

        def flat(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else torch.where(scored, tensor.detach().reshape(-1).float(), 0.0)

        if advantages.shape != logp.shape:
            advantages = layout.spread(advantages).view(logp.shape)
        return cls(layout, scored, flat(advantages), flat(old_logp), flat(ref_logp) if config.beta != 0 else None)

    def weights(self, config: LossConfig, normalizer: float | Tensor | None) -> Tensor:
        """(R,) float32: the factor of each row's loss in the whole loss; 0 where masked."""
        scored = self.mask.float()
        if config.loss_type in ("grpo", "gspo"):
            lengths = self.layout.sum(scored)
            weights = scored / self.layout.spread(lengths.clamp(min=1))
            default = float(self.layout.count)
        elif config.loss_type == "dr_grpo":
            weights, default = scored, float(self.layout.count * (config.max_completion_length or 0))
        else:
            weights, default = scored, scored.sum().clamp(min=1)
        return weights / (default if normalizer is None else normalizer)


def policy_loss(
    logp: Tensor,
    advantages: Tensor,
    *,
    old_logp: Tensor | None = None,
    ref_logp: Tensor | None = None,
    entropy: Tensor | None = None,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    config: LossConfig,
    normalizer: float | Tensor | None = None,
) -> LossOutput:
    """The loss of `config` from log-probs, differentiable in `logp` (and in `entropy` where it has a coefficient).

    Args:
        logp: (B, T), or packed (R,) with cu_seqlens; 1-D without cu_seqlens is one sequence. Computed in float32, the
            gradient rounded once to the dtype of `logp`.
        advantages: the shape of `logp`, or one per sequence.
        old_logp: None means on policy: the detached `logp`, ratio exactly 1.
        ref_logp: read where config.beta is not 0.
        entropy: read for the bonus and the metric.
        mask: nonzero where scored; masked positions are never read. Default: all.
        normalizer: replaces the whole denominator: the number of sequences, empty ones included (grpo, gspo), the
            number of scored tokens (bnpo, dapo, cispo), sequences x max_completion_length (dr_grpo). Pass the global
            one so that micro-batches and ranks add up. Nothing else is divided by.

    Raises:
        ValueError, TypeError: an argument that does not fit, naming it.
    """
    rows = Rows.check(logp, advantages, old_logp, ref_logp, mask, cu_seqlens, config, normalizer)
    if entropy is not None and entropy.shape != logp.shape:
        raise ValueError(f"entropy must have shape {tuple(logp.shape)}, got {tuple(entropy.shape)}")
    if entropy is None and config.entropy_coef != 0:
        raise ValueError(f"entropy is required by entropy_coef={config.entropy_coef}")
    x = torch.where(rows.mask, logp.reshape(-1).float(), 0.0)
    loss = (_row_losses(config, rows, x) * rows.weights(config, normalizer)).sum()
    if entropy is not None:
        entropy = torch.where(rows.mask, entropy.reshape(-1).float(), 0.0)
        loss = loss - config.entropy_coef * entropy.sum() / rows.mask.sum().clamp(min=1)
    metrics = loss_metrics(config, rows, x.detach(), None if entropy is None else entropy.detach())
    return LossOutput(loss, logp, None if entropy is None else entropy.view(logp.shape), metrics, "logp")


def _log_ratio(config: LossConfig, rows: Rows, x: Tensor) -> Tensor:
    """Unclamped, (R,); for sequence importance the mean over the scored tokens of the row's sequence."""
    log_ratio = x - (x.detach() if rows.old_logp is None else rows.old_logp)
    if not config.sequence_level:
        return log_ratio
    lengths = rows.layout.sum(rows.mask.float()).clamp(min=1)
    return rows.layout.spread(rows.layout.sum(log_ratio) / lengths)


def _clamp(x: Tensor) -> Tensor:
    return x.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)


def _row_losses(config: LossConfig, rows: Rows, x: Tensor) -> Tensor:
    ratio = torch.exp(_clamp(_log_ratio(config, rows, x)))
    low, high = config.clip_range
    if config.loss_type == "cispo":
        losses = -ratio.clamp(low, high).detach() * rows.advantages * x
    else:
        unclipped = ratio if config.delta is None else ratio.clamp(max=config.delta)
        losses = -torch.min(unclipped * rows.advantages, ratio.clamp(low, high) * rows.advantages)
    return losses + config.beta * _kl(config, rows, x, ratio) if config.beta != 0 else losses


def _kl(config: LossConfig, rows: Rows, x: Tensor, ratio: Tensor) -> Tensor:
    difference = _clamp(rows.ref_logp - x)
    k3 = torch.expm1(difference) - difference
    return k3 * ratio if config.kl_ratio_correction else k3


def token_coefficients(
    config: LossConfig, logp: Tensor, advantages: Tensor, old_logp: Tensor | None, ref_logp: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Per-token loss l and its closed-form derivative dl/dlogp, for the losses of route "fused"; all (R,) float32.

    The derivative is that of `policy_loss`: torch.min halves its gradient at a tie and clamp passes it at the bounds.
    """
    log_ratio = logp - (logp if old_logp is None else old_logp)
    inside = log_ratio.abs() <= MAX_LOG_RATIO
    ratio = torch.exp(_clamp(log_ratio))
    low, high = config.clip_range
    if config.loss_type == "cispo":
        weighted = -ratio.clamp(low, high) * advantages
        loss, slope = weighted * logp, weighted
    else:
        bound = math.inf if config.delta is None else config.delta
        unclipped, clipped = ratio.clamp(max=bound) * advantages, ratio.clamp(low, high) * advantages
        share = (unclipped < clipped) + 0.5 * (unclipped == clipped)
        passed = share * (ratio <= bound) + (1 - share) * ((low <= ratio) & (ratio <= high))
        loss, slope = -torch.minimum(unclipped, clipped), -advantages * ratio * inside * passed
    if config.beta != 0:
        raw = ref_logp - logp
        difference = _clamp(raw)
        growth = torch.expm1(difference)
        k3, k3_slope = growth - difference, -growth * (raw.abs() <= MAX_LOG_RATIO)
        if config.kl_ratio_correction:
            k3, k3_slope = k3 * ratio, ratio * (k3_slope + k3 * inside)
        loss, slope = loss + config.beta * k3, slope + config.beta * k3_slope
    return loss, slope


@torch.no_grad()
def loss_metrics(config: LossConfig, rows: Rows, x: Tensor, entropy: Tensor | None) -> dict[str, Tensor]:
    """TRL's keys, and the ratio's own: 0-d tensors on the device, without host synchronisation."""
    layout, mask = rows.layout, rows.mask
    if layout.count == 0:
        return {}
    scored = mask.sum().clamp(min=1)
    lengths = layout.sum(mask.float())

    def mean(values: Tensor) -> Tensor:
        """Over scored tokens; over sequences where the importance ratio is the sequence's (TRL)."""
        if config.sequence_level:
            return (layout.sum(torch.where(mask, values, 0.0)) / lengths.clamp(min=1)).mean()
        return torch.where(mask, values, 0.0).sum() / scored

    log_ratio = _log_ratio(config, rows, x)
    ratio = torch.exp(_clamp(log_ratio))
    low, high = config.clip_range
    metrics = {
        "ratio/mean": torch.where(mask, ratio, 0.0).sum() / scored,
        "ratio/max_abs_dev": torch.where(mask, (ratio - 1).abs(), 0.0).amax() if layout.rows else ratio.sum(),
        "ratio/overflow_frac": mean((log_ratio.abs() > MAX_LOG_RATIO).float()),
        "policy/on_policy": torch.tensor(float(rows.old_logp is None), device=x.device),
    }
    above = ((ratio > high) & (rows.advantages > 0)).float()
    if config.loss_type == "cispo":
        metrics["cispo_clip_ratio"] = mean(above)
    else:
        below = ((ratio < low) & (rows.advantages < 0)).float()
        metrics["clip_ratio/low_mean"] = mean(below)
        metrics["clip_ratio/high_mean"] = mean(above)
        metrics["clip_ratio/region_mean"] = mean(below + above)
        empty, per_sequence = lengths == 0, lengths.clamp(min=1)
        below = layout.sum(torch.where(mask, below, 0.0)) / per_sequence
        above = layout.sum(torch.where(mask, above, 0.0)) / per_sequence
        metrics["clip_ratio/low_min"] = below.masked_fill(empty, 1.0).amin()
        metrics["clip_ratio/high_max"] = above.masked_fill(empty, 0.0).amax()
    if config.beta != 0:
        metrics["kl"] = torch.where(mask, _kl(config, rows, x, ratio), 0.0).sum() / scored
    if entropy is not None:
        metrics["entropy"] = torch.where(mask, entropy, 0.0).sum() / scored
    return metrics
