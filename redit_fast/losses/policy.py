"""The policy losses of the GRPO family: the one definition, in plain PyTorch, that every fused path must equal."""

from __future__ import annotations

import torch
from torch import Tensor

from redit_fast.checks import check_tensor, described, given
from redit_fast.losses.config import LossConfig
from redit_fast.losses.rows import LossOutput, Rows
from redit_fast.losses.terms import MAX_LOG_RATIO, Terms, clamp_exponent, loss_terms, top_entropy


def policy_loss(
    logp: Tensor,
    advantages: Tensor,
    *,
    old_logp: Tensor | None = None,
    ref_logp: Tensor | None = None,
    sampling_logp: Tensor | None = None,
    entropy: Tensor | None = None,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    config: LossConfig,
    normalizer: float | Tensor | None = None,
    masks_of: LossOutput | None = None,
    step: int = 0,
    seed: int = 0,
) -> LossOutput:
    """The loss of `config` from log-probs, differentiable in `logp` (and in `entropy` where it has a coefficient).

    Args:
        logp: (B, T), or packed (R,) with cu_seqlens; 1-D without cu_seqlens is one sequence. Computed in float32, the
            gradient rounded once to the dtype of `logp`.
        advantages: the shape of `logp`, or one per sequence.
        old_logp: None means on policy: the detached `logp`, ratio exactly 1.
        ref_logp: read where config.beta is not 0.
        sampling_logp: the sampler's own; required by config.correction, read by config.off_policy_mask_threshold. NaN
            where the sampler has none.
        entropy: for the bonus, top_entropy_quantile and the metric.
        mask: nonzero where scored; masked positions are never read. Default: all.
        normalizer: replaces the whole denominator (see `LossConfig`): the number of sequences, empty ones included, the
            number of scored tokens, or sequences x max_completion_length. Pass the global one so that micro-batches and
            ranks add up. Nothing else is divided by; the entropy bonus stays a mean over this call's scored tokens.
            Without scored tokens the loss is 0 whatever the normalizer; with them it must be above 0, which is asked of
            numbers and CPU tensors where the mask is on the CPU too, and not under torch.compile.
        masks_of: the `LossOutput` by whose log-probs and entropy clip_cov, kl_cov, off_policy_mask_threshold and
            top_entropy_quantile choose tokens; None: this call's own. In the second pass of gradient regularisation
            that of the first, so that both are gradients of one objective.
        step, seed: counter and key of clip_cov's random sample.

    Returns:
        `LossOutput`. Its metrics carry TRL's keys: clip_ratio/{low,high,region}_mean, clip_ratio/{low_min,high_max},
        cispo_clip_ratio, vespo/phi_seq_mean, kl, entropy, policy_loss (before the entropy bonus),
        sampling/sampling_logp_difference/{mean,max}, sampling/importance_sampling_ratio/{min,mean,max}; and our own:
        ratio/mean, ratio/max_abs_dev, ratio/overflow_frac (of log-ratios outside [-20, 20]), policy/on_policy.

    Raises:
        ValueError, TypeError: an argument that does not fit, naming it.
    """
    check_tensor("logp", logp, "floating-point")
    if logp.ndim == 0:
        raise ValueError("logp must have at least one dimension, the tokens of a sequence, got shape ()")
    rows = Rows.check(logp, advantages, old_logp, ref_logp, sampling_logp, mask, cu_seqlens, config, normalizer,
                      step, seed, masks_of)  # fmt: skip
    if entropy is not None:
        check_tensor("entropy", entropy, "floating-point")
        if entropy.shape != logp.shape or entropy.device != logp.device:
            raise ValueError(f"entropy must have shape {tuple(logp.shape)} on {logp.device}, got {described(entropy)}")
    for name, off in (("entropy_coef", 0), ("top_entropy_quantile", 1)):
        if entropy is None and getattr(config, name) != off:
            raise ValueError(f"entropy is required by {name}={getattr(config, name)}")
    return rows_loss(rows, logp, entropy, normalizer)


def rows_loss(rows: Rows, logp: Tensor, entropy: Tensor | None, normalizer: float | Tensor | None) -> LossOutput:
    """`policy_loss` of arguments that are checked."""
    config, shape = rows.config, logp.shape
    x = torch.where(rows.mask, logp.reshape(-1).float(), 0.0)
    if entropy is not None:
        entropy = torch.where(rows.mask, entropy.reshape(-1).float(), 0.0)
    kept = rows.mask
    if config.top_entropy_quantile != 1:
        choosing = entropy if rows.masks_of is None else rows.masks_of[1]
        kept = top_entropy(rows, given(choosing).detach())
    terms = loss_terms(rows, x, kept)
    row_losses = terms.policy if terms.kl is None else terms.policy + config.beta * terms.kl
    loss = (row_losses * rows.weights(normalizer)).sum()
    metrics = loss_metrics(rows, terms, None if entropy is None else entropy.detach())
    if config.entropy_coef != 0:
        metrics["policy_loss"] = loss.detach()
        bonus = torch.where(kept, given(entropy), 0.0).sum() / kept.sum().clamp(min=1)
        loss = loss - config.entropy_coef * bonus
    return LossOutput(loss, logp, None if entropy is None else entropy.view(shape), metrics, "logp")


@torch.no_grad()
def fused_metrics(rows: Rows, logp: Tensor, entropy: Tensor) -> dict[str, Tensor]:
    """The metrics of a call whose loss was computed elsewhere; logp and entropy (R,), zero where masked."""
    return loss_metrics(rows, loss_terms(rows, logp, rows.mask), entropy)


@torch.no_grad()
def loss_metrics(rows: Rows, terms: Terms, entropy: Tensor | None) -> dict[str, Tensor]:
    """0-d tensors on the device, finite, without host synchronisation."""
    config, layout, mask = rows.config, rows.layout, rows.mask
    if layout.rows == 0:
        return {}
    whole_sequences = config.sequence_ratio or config.loss_type == "rloo"

    def mean(values: Tensor, sequences: bool = whole_sequences, empty: float = 0.0) -> Tensor:
        """Over the scored tokens; over the sequences where a value is the sequence's (TRL), `empty` in those without
        tokens."""
        return per_sequence(values, empty).mean() if sequences else rows.mean(values)

    def per_sequence(values: Tensor, empty: float) -> Tensor:
        return torch.where(layout.sum(mask.float()) == 0, empty, rows.sequence_means(values, mask))

    ratio = torch.exp(clamp_exponent(terms.exponent))
    metrics = {
        "ratio/mean": rows.mean(ratio),
        "ratio/max_abs_dev": torch.where(mask, (ratio - 1).abs(), 0.0).amax(),
        "ratio/overflow_frac": mean((terms.exponent.abs() > MAX_LOG_RATIO).float()),
        "policy/on_policy": torch.full((), float(rows.old_logp is None), dtype=torch.float32, device=mask.device),
    }
    if config.loss_type == "cispo":
        metrics["cispo_clip_ratio"] = mean(given(terms.above).float())
    elif terms.below is not None:
        below, above = terms.below.float(), given(terms.above).float()
        metrics["clip_ratio/low_mean"] = mean(below)
        metrics["clip_ratio/high_mean"] = mean(above)
        metrics["clip_ratio/region_mean"] = mean(below + above)
        empty = 0.0 if whole_sequences else 1.0  # TRL leaves a sequence without tokens out of the means of its tokens
        metrics["clip_ratio/low_min"] = torch.where(mask.any(), per_sequence(below, empty).amin(), 0.0)
        metrics["clip_ratio/high_max"] = per_sequence(above, 0.0).amax()
    if terms.phi is not None:
        metrics["vespo/phi_seq_mean"] = mean(terms.phi, sequences=True, empty=1.0)
    if terms.kl is not None:
        metrics["kl"] = rows.mean(terms.kl)
    if entropy is not None:
        metrics["entropy"] = rows.mean(entropy)
    if terms.correction is not None:
        gap = given(terms.gap)
        known = mask & gap.isfinite()
        gap = torch.where(known, gap.abs(), 0.0)
        metrics["sampling/sampling_logp_difference/mean"] = gap.sum() / known.sum().clamp(min=1)
        metrics["sampling/sampling_logp_difference/max"] = gap.amax()
        by_sequence, least = config.correction.startswith("sequence"), torch.where(mask, terms.correction, torch.inf)
        metrics["sampling/importance_sampling_ratio/min"] = torch.where(mask.any(), least.amin(), 0.0)
        metrics["sampling/importance_sampling_ratio/mean"] = mean(terms.correction, by_sequence, empty=1.0)
        metrics["sampling/importance_sampling_ratio/max"] = torch.where(mask, terms.correction, 0.0).amax()
    return metrics
