"""Log-probs and losses from logits; csrc/cuda/token_loss.cu."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from redit_fast.backends.cuda.module import compiled, device_of, run, view, views
from redit_fast.backends.rows import check_logits, check_matrix, check_rows, require, require_loss_rows
from redit_fast.losses.coefficients import PolicyConstants
from redit_fast.losses.config import LossConfig
from redit_fast.losses.transforms import LogitTransform, TransformConstants

MOST_COLUMNS = 2_000_000_000  # kMostColumns of csrc/cuda/token_loss.h


def token_logp(
    logp: Tensor, entropy: Tensor | None, sums: Tensor, logits: Tensor, targets: Tensor, transform: LogitTransform
) -> None:
    """As `reference.token_logp`; logp and entropy contiguous, so are the rows of sums."""
    check_logits(sums, None, logits, targets)
    check_rows(len(logits), logits, logp=logp, entropy=entropy)
    targets, constants = targets.contiguous(), TransformConstants.of(transform)
    outputs = (logp, entropy, sums)
    launches = compiled.token_logp(views(*outputs), views(logits, targets), constants, device_of(logits))
    run(launches, *outputs, logits, targets)
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
    require("grad_entropy", grad_entropy is not None, entropy=entropy)
    check_logits(sums, grad_logits, logits, targets)
    check_rows(len(logits), logits, grad_logp=grad_logp, grad_entropy=grad_entropy, entropy=entropy)
    targets, constants = targets.contiguous(), TransformConstants.of(transform)
    upstream = (sums, grad_logp, grad_entropy, entropy)
    launches = compiled.token_logp_grad(
        view(grad_logits), views(logits, targets), views(*upstream), constants, device_of(logits)
    )
    run(launches, grad_logits, logits, targets, *upstream)
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
    require_loss_rows(config, ref_logp, sampling_logp)
    check_logits(None, grad_logits, logits, targets)
    rows = [x if x is None else x.contiguous() for x in (weights, advantages, old_logp, ref_logp, sampling_logp)]
    names = ("weights", "advantages", "old_logp", "ref_logp", "sampling_logp")
    check_rows(len(logits), logits, logp=logp, entropy=entropy, **dict(zip(names, rows, strict=True)))
    check_matrix("loss", loss, (), logits)
    if grad_scale is not None:
        check_matrix("grad_scale", grad_scale, (), logits, grad_scale.dtype)
        grad_scale = grad_scale.float()
    targets, row_losses = targets.contiguous(), torch.empty_like(logp)
    outputs = (loss, logp, entropy, grad_logits)
    launches = compiled.token_loss(
        views(*outputs),
        views(logits, targets),
        views(*rows),
        PolicyConstants.of(config),
        view(grad_scale),
        TransformConstants.of(config.transform),
        view(row_losses),
        device_of(logits),
    )
    run(launches, *outputs, logits, targets, *rows, grad_scale, row_losses)
    increment_version((loss, logp, entropy) if grad_logits is None else (loss, logp, entropy, grad_logits))


def scale_in_place(x: Tensor, factor: Tensor) -> None:
    """As `reference.scale_in_place`; x of at most two dimensions."""
    check_matrix("factor", factor, (), x, factor.dtype)
    factor = factor.float()
    matrix = x.view(1, -1) if x.is_contiguous() and x.numel() <= MOST_COLUMNS else torch.atleast_2d(x)
    if matrix.stride(0) == 1:
        matrix = matrix.t()
    run(compiled.scale_in_place(view(matrix), view(factor), device_of(x)), x, factor)
    increment_version((x,))
