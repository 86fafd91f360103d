"""The chunk loop over the head, once: forward pass, gradient products, and the token-level loss inside the loop.

`exp_product` gives a chunk of rows E with dz = beta * E per row (see the reference), so that dX = beta * (E W) and
dW += E^T (beta * X) are plain products, and no more than a chunk of the (R, V) logits is ever held.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from redit_fast.backends import primitive
from redit_fast.logprob import IGNORE
from redit_fast.loss_rows import Rows
from redit_fast.loss_terms import token_coefficients
from redit_fast.transforms import LogitTransform

CHUNK_BYTES = 256 << 20  # of the E chunk, unless chunk_rows is given
ROW_MULTIPLE = 16  # below 8 rows torch's float32 products change bits with the number of rows
TILE_V = 4096  # vocabulary rows per product tile of the gradients


def padded(rows: int) -> int:
    return -(-rows // ROW_MULTIPLE) * ROW_MULTIPLE


def e_dtype(dtype: torch.dtype) -> torch.dtype:
    """E keeps the input's dtype, but float16, whose range exp does not fit, keeps float32."""
    return torch.float32 if dtype == torch.float16 else dtype


def rows_per_chunk(vocabulary: int, dtype: torch.dtype, chunk_rows: int | None) -> int:
    if chunk_rows is None:
        chunk_rows = CHUNK_BYTES // max(1, vocabulary * e_dtype(dtype).itemsize)
    return max(ROW_MULTIPLE, chunk_rows // ROW_MULTIPLE * ROW_MULTIPLE)


class Head(NamedTuple):
    """The scored rows, which are gathered chunk by chunk and made up to a multiple of 16 with zero rows, and the head
    that they meet."""

    hidden: Tensor  # (..., D), the caller's own
    weight: Tensor  # (V, D)
    bias: Tensor | None  # (V,)
    targets: Tensor  # (R',) int64, of the scored rows; 0 in the padding
    scored: Tensor  # (n,) the rows' places among the caller's R, n <= R'
    transform: LogitTransform
    chunk_rows: int

    @classmethod
    def of(cls, hidden, weight, bias, targets, transform: LogitTransform, chunk_rows: int | None) -> Head:
        scored = torch.nonzero(targets != IGNORE).squeeze(1)
        row_targets = targets.new_zeros(padded(len(scored)))
        row_targets[: len(scored)] = targets[scored]
        bias = None if bias is None else bias.detach()
        chunk_rows = rows_per_chunk(len(weight), hidden.dtype, chunk_rows)
        return cls(torch.atleast_2d(hidden.detach()), weight.detach(), bias, row_targets, scored, transform, chunk_rows)

    def chunks(self) -> list[slice]:
        return [slice(start, start + self.chunk_rows) for start in range(0, len(self.targets), self.chunk_rows)]

    def rows(self, chunk: slice) -> Tensor:
        """(r, D), zero in the padding; a caller's slice is never copied whole."""
        places = torch.unravel_index(self.scored[chunk], self.hidden.shape[:-1])
        rows = self.hidden.new_zeros(len(self.targets[chunk]), self.hidden.shape[-1])
        rows[: len(places[0])] = self.hidden[places]
        return rows

    def new_e(self) -> Tensor:
        rows = min(self.chunk_rows, len(self.targets))
        return self.hidden.new_empty(rows, len(self.weight), dtype=e_dtype(self.hidden.dtype))

    def new_rows(self, *leading: int) -> Tensor:
        return self.hidden.new_zeros(*leading, len(self.targets), dtype=torch.float32)

    def compact(self, rows: Tensor) -> Tensor:
        """(R,) -> (R',), zero in the padding."""
        out = self.new_rows()
        out[: len(self.scored)] = rows[self.scored]
        return out

    def expand(self, rows: Tensor, count: int) -> Tensor:
        """(R', ...) -> (count, ...), zero where masked."""
        out = rows.new_zeros(count, *rows.shape[1:])
        out[self.scored] = rows[: len(self.scored)]
        return out


def forward(head: Head, chunk: slice, x: Tensor, e: Tensor | None, logp, entropy, sums, *upstream) -> Tensor | None:
    """Runs `exp_product` on one chunk; its part of e."""
    e = None if e is None else e[: len(x)]
    primitive("exp_product", head.hidden.device)(
        e,
        logp[chunk],
        None if entropy is None else entropy[chunk],
        sums[:, chunk],
        x,
        head.weight,
        head.bias,
        head.targets[chunk],
        head.transform,
        *(None if rows is None else rows[chunk] for rows in upstream),
    )
    return e


def accumulate(x: Tensor, weight: Tensor, e: Tensor, beta: Tensor, hidden_grad, weight_grad, bias_grad) -> None:
    """hidden_grad = beta * (E W); weight_grad += E^T (beta * X); bias_grad += sum of beta * E; sums in float32."""
    scaled = beta[:, None] * x.float()
    rows = torch.zeros_like(scaled) if hidden_grad is not None else None
    for start in range(0, len(weight), TILE_V):
        tile = slice(start, start + TILE_V)
        if hidden_grad is not None:
            # bfloat16: torch rounds a tile's product once more (1e-3), for twice the speed on this CPU
            rows += e[:, tile] @ weight[tile].to(e.dtype)
        wide = e[:, tile].float()
        if weight_grad is not None:
            # beta * X in bfloat16 would bring the error to the limit of 3e-3
            weight_grad[tile].addmm_(wide.t(), scaled)
        if bias_grad is not None:
            bias_grad[tile].addmv_(wide.t(), beta)
    if hidden_grad is not None:
        hidden_grad.copy_(rows.mul_(beta[:, None]))


def add_gradients(head: Head, chunk: slice, x, e: Tensor, beta: Tensor, hidden_grad, weight_grad, bias_grad) -> None:
    """`accumulate` over the rows with a coefficient, made up to a multiple of 16 with zero rows. The last of them move
    into the places of those without, in X and E themselves: no more rows move than are left out."""
    used = beta != 0
    count = padded(int(used.sum()))
    if count == 0:
        return
    free, late = torch.nonzero(~used[:count]).squeeze(1), count + torch.nonzero(used[count:]).squeeze(1)
    free, zeros = free[: len(late)], free[len(late) :]
    for to, source in zip(free.split(ROW_MULTIPLE), late.split(ROW_MULTIPLE), strict=True):
        e[to], x[to], beta[to] = e[source], x[source], beta[source]
    e[zeros], x[zeros] = 0, 0  # what they held may be NaN
    slopes = None if hidden_grad is None else torch.empty_like(x[:count], dtype=hidden_grad.dtype)
    accumulate(x[:count], head.weight, e[:count], beta[:count], slopes, weight_grad, bias_grad)
    if hidden_grad is not None:
        places = torch.arange(len(used), device=used.device)
        places[free] = late
        places, known = places[:count], used[places[:count]]
        hidden_grad.view(-1, hidden_grad.shape[-1])[head.scored[chunk][places[known]]] = slopes[known]


def gradients(head: Head, grad_logp, grad_entropy, hidden_grad, weight_grad, bias_grad) -> None:
    """The backward pass from the log-probs: E once more, then the gradient products of every chunk."""
    e, logp, sums = head.new_e(), head.new_rows(), head.new_rows(3)
    for chunk in head.chunks():
        x = head.rows(chunk)
        part = forward(head, chunk, x, e, logp, None, sums, grad_logp, grad_entropy)
        coefficient = grad_logp[chunk]
        if grad_entropy is not None:
            coefficient = ((coefficient != 0) | (grad_entropy[chunk] != 0)).float()
        beta = torch.where(coefficient == 0, 0.0, -coefficient / sums[2, chunk])
        add_gradients(head, chunk, x, part, beta, hidden_grad, weight_grad, bias_grad)


def new_gradients(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, needed: tuple[bool, bool, bool]
) -> tuple[Tensor | None, ...]:
    """Zeros: of hidden in the dtype of E, of weight and bias in float32; None where not needed. In float16 all are
    rounded by `outgoing`, after the upstream gradient: a loss scale comes too late for what a float16 has lost."""
    return (
        torch.zeros(hidden.shape, dtype=e_dtype(hidden.dtype), device=hidden.device) if needed[0] else None,
        torch.zeros(weight.shape, dtype=torch.float32, device=hidden.device) if needed[1] else None,
        torch.zeros_like(bias, dtype=torch.float32) if needed[2] and bias is not None else None,
    )


def outgoing(grads: tuple[Tensor | None, ...], dtype: torch.dtype) -> tuple[Tensor | None, ...]:
    """The gradients as autograd takes them, rounded once."""
    return tuple(None if grad is None else grad.to(dtype) for grad in grads)


def fused_loss(
    head: Head, rows: Rows, weights: Tensor, grads: tuple[Tensor | None, ...]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Loss (), logp and entropy (R,), and the share () of the scored rows that have no coefficient and so no gradient
    products; adds into the gradients that are not None, chunk by chunk."""
    logp, entropy, sums = head.new_rows(), head.new_rows(), head.new_rows(3)
    wanted = any(grad is not None for grad in grads)
    e = head.new_e() if wanted else None
    loss, skipped = logp.new_zeros(()), logp.new_zeros(())
    weights, advantages = head.compact(weights), head.compact(rows.advantages)
    others = [None if x is None else head.compact(x) for x in (rows.old_logp, rows.ref_logp, rows.sampling_logp)]
    for chunk in head.chunks():
        x = head.rows(chunk)
        part = forward(head, chunk, x, e, logp, entropy, sums, None, None)
        row_loss, slope = token_coefficients(
            rows.config, logp[chunk], advantages[chunk], *(None if x is None else x[chunk] for x in others)
        )
        used = weights[chunk] != 0  # not in the padding
        loss += torch.where(used, weights[chunk] * row_loss, 0.0).sum()
        coefficient = torch.where(used, weights[chunk] * slope, 0.0)
        skipped += (used & (coefficient == 0)).sum()
        if wanted:
            beta = torch.where(coefficient == 0, 0.0, -coefficient / sums[2, chunk])
            add_gradients(head, chunk, x, part, beta, *grads)
    count = len(rows.mask)
    return loss, head.expand(logp, count), head.expand(entropy, count), skipped / max(len(head.scored), 1)
