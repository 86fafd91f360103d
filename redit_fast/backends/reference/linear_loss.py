"""The head: a chunk of hidden rows times the weight in vocabulary tiles, exponentials, sums and repair."""

from __future__ import annotations

from collections.abc import Iterator
from typing import cast

import torch
from torch import Tensor

from redit_fast.backends.reference.token_loss import finish, gap, is_target, needs_repair, slope, times_or_zero
from redit_fast.backends.rows import require
from redit_fast.losses.transforms import LogitTransform

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
) -> None:
    """One chunk of rows of the head: hidden (r, D) times weight (V, D), in vocabulary tiles, float32 from the product
    on.

    Writes logp, entropy (r,) and sums (3, r) as `token_logp` does, and into e (r, V), where given, the gradient's rows
    up to a factor beta: e_j dz/dx_j, and -sum_{j != t} e_j dz/dx_t in the target's column, so that the gradient of
    c logp with respect to the row's raw logits is beta e with beta = -c / s. Rows with an s of NaN hold 0, which such a
    beta makes NaN and a beta of 0 does not.
    """
    target = _target_logits(hidden, weight, bias, targets)

    def sums_at(anchor: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        others, weighted, largest = (
            torch.zeros_like(anchor),
            torch.zeros_like(anchor),
            torch.full_like(anchor, -torch.inf),
        )
        for start, stop, z in _tiles(hidden, weight, bias):
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
    if e is not None:
        _store_targets(e, targets, -others * slope(target, transform), row_sums[2])


def exp_product_grad(
    e: Tensor,
    sums: Tensor,
    entropy: Tensor | None,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    transform: LogitTransform,
    grad_logp: Tensor,
    grad_entropy: Tensor | None,
) -> None:
    """The e of `exp_product` once more, from the sums and the entropy that it wrote, for g = grad_logp and h =
    grad_entropy (r,): (e_j (g + h (log p_j + H)) - g s 1{j = t}) dz/dx_j, so that the gradient with respect to the
    row's raw logits is beta e with beta = -1 / s. Rows whose s is not a number above 0 hold 0."""
    require("grad_entropy", grad_entropy is not None, entropy=entropy)
    anchor, others, total = sums
    target, g, h = _target_logits(hidden, weight, bias, targets), grad_logp, grad_entropy
    offset = gap(target, anchor, transform)
    at_target = -g * others
    if h is not None:
        at_target = at_target + h * times_or_zero(torch.exp(offset), offset - total.log() + entropy)
    for start, stop, z in _tiles(hidden, weight, bias):
        y = gap(z, anchor[:, None], transform)
        factor = g[:, None]
        if h is not None:
            factor = factor + h[:, None] * (y - total.log()[:, None] + cast(Tensor, entropy)[:, None])
        e[:, start:stop] = times_or_zero(torch.exp(y), factor) * slope(z, transform)
    _store_targets(e, targets, at_target * slope(target, transform), total)


def _inside(targets: Tensor, vocabulary: int) -> Tensor:
    return (targets >= 0) & (targets < vocabulary)


def _target_logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> Tensor:
    """(r,), NaN for a target outside the vocabulary."""
    inside = _inside(targets, len(weight))
    columns = torch.where(inside, targets, 0)
    logits = (hidden.float() * weight[columns].float()).sum(1)
    if bias is not None:
        logits = logits + bias[columns].float()
    return torch.where(inside, logits, torch.nan)


def _tiles(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Iterator[tuple[int, int, Tensor]]:
    """First column, the one after the last, and the logits between."""
    x, vocabulary = hidden.float(), len(weight)
    for start in range(0, vocabulary, TILE_V):
        stop = min(start + TILE_V, vocabulary)
        z = x @ weight[start:stop].float().t()
        yield start, stop, z if bias is None else z + bias[start:stop].float()


def _store_targets(e: Tensor, targets: Tensor, at_target: Tensor, total: Tensor) -> None:
    columns = torch.where(_inside(targets, e.shape[1]), targets, 0)
    e.scatter_(1, columns[:, None], at_target.to(e.dtype)[:, None])
    e.masked_fill_(~((total > 0) & torch.isfinite(total))[:, None], 0)
