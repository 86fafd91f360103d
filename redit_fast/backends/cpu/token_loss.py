"""Log-probs and losses from logits; csrc/cpu/token_loss.cpp."""

from __future__ import annotations

import math

from torch import Tensor
from torch.autograd.graph import increment_version

from redit_fast.backends.cpu.module import compiled, setting, view
from redit_fast.losses.config import LossConfig
from redit_fast.losses.transforms import LogitTransform


def token_logp(
    logp: Tensor, entropy: Tensor | None, sums: Tensor, logits: Tensor, targets: Tensor, transform: LogitTransform
) -> None:
    """As `reference.token_logp`; logp and entropy contiguous, so are the rows of sums."""
    targets = targets.contiguous()
    compiled.token_logp(*map(view, (logp, entropy, sums, logits, targets)), setting(transform))
    increment_version((logp, sums) if entropy is None else (logp, entropy, sums))


def token_logp_grad(
    grad_logits: Tensor,
    logits: Tensor,
    targets: Tensor,
    sums: Tensor,
    grad_logp: Tensor,
    grad_entropy: Tensor | None,
    entropy: Tensor | None,
    transform: LogitTransform,
) -> None:
    """As `reference.token_logp_grad`; grad_logp, grad_entropy and entropy contiguous, so are the rows of sums."""
    targets = targets.contiguous()
    rows = targets, sums, grad_logp, grad_entropy, entropy
    compiled.token_logp_grad(*map(view, (grad_logits, logits, *rows)), setting(transform))
    increment_version((grad_logits,))


_FORMS = {"cispo": 1, "sapo": 2, "gpg": 3, "reinforce": 3, "dppo_tv": 4, "dppo_kl": 5, "dro": 6}  # else 0: clipped
_KLS = ("k1", "k2", "k3", "abs")
_CORRECTIONS = ("none", "token_truncate", "token_mask")


def _policy(config: LossConfig) -> tuple:
    """PolicyLoss of csrc/shared/policy_loss.h, field by field."""
    return (
        _FORMS.get(config.loss_type, 0),
        _KLS.index(config.kl),
        _CORRECTIONS.index(config.correction),
        config.kl_ratio_correction,
        *config.clip_range,
        math.inf if config.delta is None else config.delta,
        math.inf if config.dual_clip is None else config.dual_clip,
        config.sapo_temperature_pos,
        config.sapo_temperature_neg,
        config.dro_beta or 0.0,
        config.beta,
        *config.correction_range,
    )


def token_loss(
    loss: Tensor,
    logp: Tensor,
    entropy: Tensor,
    grad_logits: Tensor | None,
    logits: Tensor,
    targets: Tensor,
    weights: Tensor,
    advantages: Tensor,
    old_logp: Tensor | None,
    ref_logp: Tensor | None,
    sampling_logp: Tensor | None,
    config: LossConfig,
    grad_scale: Tensor | None,
) -> None:
    """As `reference.token_loss`; the rows' numbers (R,) float32."""
    # held until the call returns: a contiguous copy is read through its address
    rows = (targets, weights, advantages, old_logp, ref_logp, sampling_logp)
    inputs = [None if x is None else x.contiguous() for x in rows]
    compiled.token_loss(
        *map(view, (loss, logp, entropy, grad_logits, logits, *inputs)),
        _policy(config),
        1.0 if grad_scale is None else grad_scale.item(),
        setting(config.transform),
    )
    increment_version((loss, logp, entropy) if grad_logits is None else (loss, logp, entropy, grad_logits))


def scale_in_place(x: Tensor, factor: Tensor) -> None:
    """As `reference.scale_in_place`; x of at most two dimensions."""
    matrix = x.view(1, -1) if x.is_contiguous() else x.unsqueeze(0) if x.ndim == 1 else x
    if matrix.stride(0) == 1:
        matrix = matrix.t()
    compiled.scale_in_place(view(matrix), factor.item(), setting(LogitTransform()))
    increment_version((x,))
