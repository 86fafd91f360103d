"""Log-probs and losses from logits; csrc/cpu/token_loss.cpp."""

from __future__ import annotations

from torch import Tensor
from torch.autograd.graph import increment_version

from redit_fast.backends.addresses import view, views
from redit_fast.backends.cpu.module import compiled, processor
from redit_fast.backends.lists import contiguous
from redit_fast.losses.coefficients import PolicyConstants
from redit_fast.losses.config import LossConfig
from redit_fast.losses.transforms import LogitTransform, TransformConstants


def token_logp(
    logp: Tensor, entropy: Tensor | None, sums: Tensor, logits: Tensor, targets: Tensor, transform: LogitTransform
) -> None:
    """As `reference.token_logp`; logp and entropy contiguous, so are the rows of sums."""
    targets = targets.contiguous()
    compiled.token_logp(
        views(logp, entropy, sums), views(logits, targets), TransformConstants.of(transform), processor()
    )
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
    upstream = views(sums, grad_logp, grad_entropy, entropy)
    constants = TransformConstants.of(transform)
    compiled.token_logp_grad(view(grad_logits), views(logits, targets), upstream, constants, processor())
    increment_version((grad_logits,))


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
    targets, rows = targets.contiguous(), contiguous([weights, advantages, old_logp, ref_logp, sampling_logp])
    grad_scale = None if grad_scale is None else grad_scale.float()
    compiled.token_loss(
        views(loss, logp, entropy, grad_logits),
        views(logits, targets),
        views(*rows),
        PolicyConstants.of(config),
        view(grad_scale),
        TransformConstants.of(config.transform),
        processor(),
    )
    increment_version((loss, logp, entropy) if grad_logits is None else (loss, logp, entropy, grad_logits))


def scale_in_place(x: Tensor, factor: Tensor) -> None:
    """As `reference.scale_in_place`; x of at most two dimensions."""
    matrix = x.view(1, -1) if x.is_contiguous() else x.unsqueeze(0) if x.ndim == 1 else x
    if matrix.stride(0) == 1:
        matrix = matrix.t()
    compiled.scale_in_place(view(matrix), factor.item(), processor())
    increment_version((x,))
