"""The head: a chunk of hidden rows times the weight in vocabulary tiles, exponentials, sums and repair."""

from __future__ import annotations

import torch
from torch import Tensor

from redit_fast.backends.reference.token_loss import finish, gap, is_target, needs_repair, slope, times_or_zero
from redit_fast.transforms import LogitTransform

TILE_V = 4096  # vocabulary columns per product tile


def addmm(out: Tensor, a: Tensor, b: Tensor) -> None:
    """out (m, n) float32 += a (m, k) b (k, n), of one dtype and any strides; products and sums in float32."""
    out.addmm_(a.float(), b.float())


def exp_product(
    e: Tensor | None,
    logp: Tensor,
    entropy: Tensor | None,
    sums: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    transform: LogitTransform,
    grad_logp: Tensor | None,
    grad_entropy: Tensor | None,
) -> None:
    """One chunk of rows of the head: hidden (r, D) times weight (V, D), in vocabulary tiles, float32 from the product
    on.

    Writes logp, entropy (r,) and sums (3, r) as `token_logp` does, and into e (r, V), where given, the gradient's rows
    up to a factor beta: e_j dz/dx_j, and -sum_{j != t} e_j dz/dx_t in the target's column, so that the gradient of
    c logp with respect to the row's raw logits is beta e with beta = -c / s. With g = grad_logp and h = grad_entropy
    (r,), e holds (e_j (g + h (log p_j + H)) - g s 1{j = t}) dz/dx_j, and beta = -1 / s. Rows with an s of NaN hold 0,
    which such a beta makes NaN and a beta of 0 does not.
    """
    x, vocabulary = hidden.float(), len(weight)
    inside = (targets >= 0) & (targets < vocabulary)
    columns = torch.where(inside, targets, 0)
    target = (x * weight[columns].float()).sum(1)
    if bias is not None:
        target = target + bias[columns].float()
    target = torch.where(inside, target, torch.nan)

    def tiles():
        for start in range(0, vocabulary, TILE_V):
            stop = min(start + TILE_V, vocabulary)
            z = x @ weight[start:stop].float().t()
            yield start, stop, z if bias is None else z + bias[start:stop].float()

    def sums_at(anchor: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        others, weighted, largest = (
            torch.zeros_like(anchor),
            torch.zeros_like(anchor),
            torch.full_like(anchor, -torch.inf),
        )
        for start, stop, z in tiles():
            y = gap(z, anchor[:, None], transform)
            exponential = torch.exp(y).masked_fill(is_target(targets, start, stop), 0.0)
            others += exponential.sum(1)
            weighted += times_or_zero(exponential, y).sum(1)
            largest = torch.maximum(largest, z.amax(1))
            if e is not None:
                e[:, start:stop] = exponential * slope(z, transform)
        return others, weighted, largest

    anchor = target
    others, weighted, largest = sums_at(anchor)
    broken = needs_repair(anchor, others)
    if broken.any():
        anchor = torch.where(broken, largest, target)
        others, weighted, _ = sums_at(anchor)
    row_logp, row_entropy, row_sums = finish(anchor, target, others, weighted, transform)
    logp.copy_(row_logp)
    sums.copy_(row_sums)
    if entropy is not None:
        entropy.copy_(row_entropy)
    if e is None:
        return
    at_target = -others
    if grad_entropy is not None:
        total = row_sums[2]
        for start, stop, z in tiles():
            y = gap(z, anchor[:, None], transform)
            surprise = y - total.log()[:, None] + row_entropy[:, None]
            e[:, start:stop] = times_or_zero(
                torch.exp(y), grad_logp[:, None] + grad_entropy[:, None] * surprise
            ) * slope(z, transform)
        at_target = grad_entropy * torch.exp(row_logp) * total * (row_logp + row_entropy) - grad_logp * others
    e.scatter_(1, columns[:, None], (at_target * slope(target, transform)).to(e.dtype)[:, None])
    e.masked_fill_(~torch.isfinite(row_sums[2])[:, None], 0)
