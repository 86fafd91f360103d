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


class Head(NamedTuple):
    """The scored rows, compacted and padded to a multiple of 16 with zero rows, and the head they meet."""

    hidden: Tensor  # (R', D)
    weight: Tensor  # (V, D)
    bias: Tensor | None  # (V,)
    targets: Tensor  # (R',) int64
    scored: Tensor  # (n,) the rows' places in the caller's R rows, n <= R'
    transform: LogitTransform
    chunk_rows: int

    @classmethod
    def of(cls, hidden, weight, bias, targets, transform: LogitTransform, chunk_rows: int | None) -> Head:
        scored = torch.nonzero(targets != IGNORE).squeeze(1)
        padded = -(-len(scored) // ROW_MULTIPLE) * ROW_MULTIPLE
        rows, row_targets = hidden.new_zeros(padded, hidden.shape[1]), targets.new_zeros(padded)
        rows[: len(scored)], row_targets[: len(scored)] = hidden.detach()[scored], targets[scored]
        if chunk_rows is None:
            chunk_rows = CHUNK_BYTES // (len(weight) * (2 if hidden.dtype == torch.bfloat16 else 4))
        chunk_rows = max(ROW_MULTIPLE, chunk_rows // ROW_MULTIPLE * ROW_MULTIPLE)
        bias = None if bias is None else bias.detach()
        return cls(rows, weight.detach(), bias, row_targets, scored, transform, chunk_rows)

    def chunks(self) -> list[slice]:
        return [slice(start, start + self.chunk_rows) for start in range(0, len(self.hidden), self.chunk_rows)]

    def new_e(self) -> Tensor:
        """E keeps the input's dtype, but float16, whose range exp does not fit, keeps float32."""
        dtype = torch.float32 if self.hidden.dtype == torch.float16 else self.hidden.dtype
        rows = min(self.chunk_rows, len(self.hidden))
        return self.hidden.new_empty(rows, len(self.weight), dtype=dtype)

    def new_rows(self, *leading: int) -> Tensor:
        return self.hidden.new_zeros(*leading, len(self.hidden), dtype=torch.float32)

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


def forward(head: Head, chunk: slice, e: Tensor | None, logp, entropy, sums, *upstream) -> Tensor | None:
    """Runs `exp_product` on one chunk; its part of e."""
    e = None if e is None else e[: len(head.targets[chunk])]
    primitive("exp_product", head.hidden.device)(
        e,
        logp[chunk],
        None if entropy is None else entropy[chunk],
        sums[:, chunk],
        head.hidden[chunk],
        head.weight,
        head.bias,
        head.targets[chunk],
        head.transform,
        *(None if rows is None else rows[chunk] for rows in upstream),
    )
    return e


def accumulate(head: Head, chunk: slice, e: Tensor, beta: Tensor, hidden_grad, weight_grad, bias_grad) -> None:
    """hidden_grad[chunk] = beta * (E W); weight_grad += E^T (beta * X); bias_grad += sum of beta * E; sums in
    float32."""
    used = (beta != 0)[:, None]
    if not used.any():
        return
    if not used.all():  # E of an unused row may hold NaN
        e = e.masked_fill(~used, 0)
    scaled = torch.where(used, beta[:, None] * head.hidden[chunk].float(), 0.0)
    rows = torch.zeros_like(scaled) if hidden_grad is not None else None
    for start in range(0, len(head.weight), TILE_V):
        tile = slice(start, start + TILE_V)
        if hidden_grad is not None:
            # bfloat16: torch rounds a tile's product once more (1e-3), for 2.5 times the speed on this CPU
            rows += e[:, tile] @ head.weight[tile].to(e.dtype)
        wide = e[:, tile].float()
        if weight_grad is not None:
            # beta * X in bfloat16 would bring the error to the limit of 3e-3
            weight_grad[tile] += wide.t() @ scaled
        if bias_grad is not None:
            bias_grad[tile] += beta @ wide
    if hidden_grad is not None:
        hidden_grad[chunk] = torch.where(used, beta[:, None] * rows, 0.0).to(hidden_grad.dtype)


def gradients(head: Head, grad_logp, grad_entropy, hidden_grad, weight_grad, bias_grad) -> None:
    """The backward pass from the log-probs: E once more, then the gradient products of every chunk."""
    e, logp, sums = head.new_e(), head.new_rows(), head.new_rows(3)
    for chunk in head.chunks():
        part = forward(head, chunk, e, logp, None, sums, grad_logp, grad_entropy)
        coefficient = grad_logp[chunk]
        if grad_entropy is not None:
            coefficient = ((coefficient != 0) | (grad_entropy[chunk] != 0)).float()
        beta = torch.where(coefficient == 0, 0.0, -coefficient / sums[2, chunk])
        accumulate(head, chunk, part, beta, hidden_grad, weight_grad, bias_grad)


def new_gradients(head: Head, needed: tuple[bool, bool, bool]) -> tuple[Tensor | None, ...]:
    """Rows in the dtype of hidden, weight and bias in float32; None where not needed."""
    return (
        torch.zeros_like(head.hidden) if needed[0] else None,
        torch.zeros_like(head.weight, dtype=torch.float32) if needed[1] else None,
        torch.zeros_like(head.bias, dtype=torch.float32) if needed[2] and head.bias is not None else None,
    )


def outgoing(head: Head, grads: tuple[Tensor | None, ...], rows: int) -> tuple[Tensor | None, ...]:
    """The gradients as autograd takes them: rows back in their places, weight and bias rounded once."""
    hidden_grad, weight_grad, bias_grad = grads
    return (
        None if hidden_grad is None else head.expand(hidden_grad, rows),
        None if weight_grad is None else weight_grad.to(head.weight.dtype),
        None if bias_grad is None else bias_grad.to(head.weight.dtype),
    )


def fused_loss(
    head: Head, rows: Rows, weights: Tensor, grads: tuple[Tensor | None, ...]
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss (), logp and entropy (R,); adds into the gradients that are not None, chunk by chunk."""
    logp, entropy, sums = head.new_rows(), head.new_rows(), head.new_rows(3)
    wanted = any(grad is not None for grad in grads)
    e = head.new_e() if wanted else None
    loss = logp.new_zeros(())
    weights, advantages = head.compact(weights), head.compact(rows.advantages)
    others = [None if x is None else head.compact(x) for x in (rows.old_logp, rows.ref_logp, rows.sampling_logp)]
    for chunk in head.chunks():
        part = forward(head, chunk, e, logp, entropy, sums, None, None)
        row_loss, slope = token_coefficients(
            rows.config, logp[chunk], advantages[chunk], *(None if x is None else x[chunk] for x in others)
        )
        used = weights[chunk] != 0  # not in the padding
        loss += torch.where(used, weights[chunk] * row_loss, 0.0).sum()
        if wanted:
            coefficient = torch.where(used, weights[chunk] * slope, 0.0)
            beta = torch.where(coefficient == 0, 0.0, -coefficient / sums[2, chunk])
            accumulate(head, chunk, part, beta, *grads)
    count = len(rows.mask)
    return loss, head.expand(logp, count), head.expand(entropy, count)
