"""Log-probs and losses from logits, target-anchored: e_j = exp(z_j - z_t), logp = -log1p(sum of e_j over j != t).

A row whose sum exceeds e^40 or is not finite is redone with its largest logit as anchor. `sums` (3, R) float32 keeps
per
row what a backward pass needs: the anchor's raw logit, sum_{j != t} e_j, and s = sum_j e_j.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from redit_fast.backends.rows import IGNORE, require, require_loss_rows
from redit_fast.losses.coefficients import token_coefficients
from redit_fast.losses.config import LossConfig
from redit_fast.losses.transforms import LogitTransform

REPAIR = 2.353852668370200e17  # e^40
BLOCK_ELEMENTS = 1 << 22  # logits per block of rows: bounds the float32 temporaries at 16 MB each


def gap(x: Tensor, anchor: Tensor, transform: LogitTransform) -> Tensor:
    """z(x) - z(anchor); without softcap the subtraction comes first, so that a common shift of the logits cancels."""
    temperature, scale, softcap = transform
    if softcap is None:
        return (x - anchor) * (scale / temperature)
    return (torch.tanh(x * (scale / softcap)) - torch.tanh(anchor * (scale / softcap))) * (softcap / temperature)


def slope(x: Tensor, transform: LogitTransform) -> Tensor | float:
    """dz/dx."""
    temperature, scale, softcap = transform
    if softcap is None:
        return scale / temperature
    return (1 - torch.tanh(x * (scale / softcap)) ** 2) * (scale / temperature)


def times_or_zero(e: Tensor, y: Tensor) -> Tensor:
    """e y, and 0 where e is 0 (y is -inf there)."""
    return torch.where(e == 0, 0.0, e * y)


def needs_repair(anchor: Tensor, others: Tensor) -> Tensor:
    return ~(others <= REPAIR) | ~torch.isfinite(anchor)


def finish(
    anchor: Tensor, target: Tensor, others: Tensor, weighted: Tensor, transform: LogitTransform
) -> tuple[Tensor, Tensor, Tensor]:
    """logp, entropy and sums (3, r), from others = sum_{j != t} e_j and weighted = sum_{j != t} e_j y_j, y = z -
    z_anchor."""
    offset = gap(target, anchor, transform)  # exactly 0 unless repaired
    e_target = torch.exp(offset)
    total = others + e_target
    log_total = torch.where(offset == 0, torch.log1p(others), torch.log(total))
    entropy = log_total - (weighted + times_or_zero(e_target, offset)) / total
    return offset - log_total, entropy, torch.stack([anchor, others, total])


def _blocks(targets: Tensor, vocabulary: int) -> tuple[Tensor, ...]:
    """Indices of the scored rows, block by block; every row's result depends on that row alone."""
    scored = torch.nonzero(targets != IGNORE).squeeze(1)
    return scored.split(max(16, BLOCK_ELEMENTS // vocabulary))


def is_target(targets: Tensor, start: int, stop: int) -> Tensor:
    return targets[:, None] == torch.arange(start, stop, device=targets.device)


def _sum(x: Tensor) -> Tensor:
    """(r, V) -> (r,); a lone row is summed beside a twin, since torch would split its sum over the threads."""
    return x.sum(1) if len(x) != 1 else torch.cat([x, x]).sum(1)[:1]


def _row_sums(x: Tensor, targets: Tensor, anchor: Tensor, transform: LogitTransform) -> tuple[Tensor, Tensor]:
    """sum_{j != t} e_j and sum_{j != t} e_j y_j of rows x (r, V)."""
    y = gap(x, anchor[:, None], transform)
    e = torch.exp(y).masked_fill(is_target(targets, 0, x.shape[1]), 0.0)
    return _sum(e), _sum(times_or_zero(e, y))


def token_logp(
    logp: Tensor, entropy: Tensor | None, sums: Tensor, logits: Tensor, targets: Tensor, transform: LogitTransform
) -> None:
    """logp, entropy (R,) and sums (3, R) float32 from logits (R, V) of any strides; a target of -100 gives 0 and is not
    read, any other target outside [0, V) gives NaN in its row."""
    vocabulary = logits.shape[1]
    for out in (logp, entropy, sums):
        if out is not None:
            out.zero_()
    for rows in _blocks(targets, vocabulary):
        x, t = logits[rows].float(), targets[rows]
        inside = (t >= 0) & (t < vocabulary)
        target = torch.where(inside, x.gather(1, torch.where(inside, t, 0)[:, None]).squeeze(1), torch.nan)
        anchor, (others, weighted) = target, _row_sums(x, t, target, transform)
        broken = needs_repair(anchor, others)
        if broken.any():
            anchor = torch.where(broken, x.amax(1), target)
            others, weighted = _row_sums(x, t, anchor, transform)
        logp[rows], row_entropy, sums[:, rows] = finish(anchor, target, others, weighted, transform)
        if entropy is not None:
            entropy[rows] = row_entropy


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
    """grad_logits (R, V), which may be logits itself: g (1{j = t} - p_j) - h p_j (log p_j + H), times dz/dx_j."""
    require("grad_entropy", grad_entropy is not None, entropy=entropy)
    vocabulary = logits.shape[1]
    grad_logits[targets == IGNORE] = 0
    for rows in _blocks(targets, vocabulary):
        x, (anchor, others, total), g = logits[rows].float(), sums[:, rows, None], grad_logp[rows, None]
        y = gap(x, anchor, transform)
        p = torch.exp(y) / total
        # others / total is 1 - p_t without cancellation
        grad = torch.where(is_target(targets[rows], 0, vocabulary), g * (others / total), -g * p)
        if grad_entropy is not None:
            H = cast(Tensor, entropy)[rows, None]
            grad = grad - grad_entropy[rows, None] * times_or_zero(p, y - total.log() + H)
        grad_logits[rows] = (grad * slope(x, transform)).to(grad_logits.dtype)


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
    """loss () = sum over rows of weights * l(logp); grad_logits (R, V), which may be logits itself, times grad_scale
    ()."""
    require_loss_rows(config, ref_logp, sampling_logp)
    sums = logits.new_empty(3, len(targets), dtype=torch.float32)
    token_logp(logp, entropy, sums, logits, targets, config.transform)
    row_loss, slope = token_coefficients(config, logp, advantages, old_logp, ref_logp, sampling_logp)
    scored = targets != IGNORE
    loss.copy_(torch.where(scored, weights * row_loss, 0.0).sum())
    if grad_logits is not None:
        slope = torch.where(scored, weights * slope, 0.0)
        slope = slope if grad_scale is None else slope * grad_scale
        token_logp_grad(grad_logits, logits, targets, sums, slope, None, None, config.transform)


def scale_in_place(x: Tensor, factor: Tensor) -> None:
    """x *= factor (0-d), one rounding."""
    x.copy_(x.float() * factor)
