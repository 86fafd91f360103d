"""The chunk loop over the head, once: forward pass, gradient products, and the token-level loss inside the loop.

`exp_product` gives a chunk of rows E with dz = beta * E per row (see the reference), so that dX = beta * (E W) and
dW += E^T (beta * X) are plain products, and no more than a chunk of the (R, V) logits is ever held.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from redit_fast.backends import primitive, reference
from redit_fast.losses.coefficients import token_coefficients
from redit_fast.losses.config import LossConfig
from redit_fast.losses.transforms import LogitTransform
from redit_fast.ops.autograd import operator
from redit_fast.ops.targets import IGNORE

CHUNK_BYTES = 256 << 20  # of the E chunk, unless chunk_rows is given
MOST_ROWS = 8192  # of it, which a GPU makes up to a whole chunk
ROW_MULTIPLE = 16  # below 8 rows torch's float32 products change bits with the number of rows
TILE_V = 4096  # vocabulary rows per product tile of the gradients


def padded(rows: int, multiple: int = ROW_MULTIPLE) -> int:
    return -(-rows // multiple) * multiple


def whole_chunks(device: torch.device) -> bool:
    """On a GPU every product has the shape of a whole chunk: its library chooses the kernel, and so the bits, by shape,
    and the host never waits for a chunk's coefficients."""
    return device.type == "cuda"


def may_wait(device: torch.device) -> bool:
    """Whether the host may ask how many rows are scored: not while it records a CUDA graph."""
    return device.type != "cuda" or not torch.cuda.is_current_stream_capturing()


def e_dtype(dtype: torch.dtype) -> torch.dtype:
    """E keeps the input's dtype, but float16, whose range exp does not fit, keeps float32."""
    return torch.float32 if dtype == torch.float16 else dtype


def rows_per_chunk(vocabulary: int, dtype: torch.dtype, chunk_rows: int | None) -> int:
    if chunk_rows is None:
        chunk_rows = min(MOST_ROWS, CHUNK_BYTES // max(1, vocabulary * e_dtype(dtype).itemsize))
    return max(ROW_MULTIPLE, chunk_rows // ROW_MULTIPLE * ROW_MULTIPLE)


def _refuse_freed(name: str, tensor: Tensor) -> None:
    if tensor.numel() > 0 and tensor.untyped_storage().nbytes() == 0:
        raise ValueError(
            f"{name} of shape {tuple(tensor.shape)} has had its storage freed, as FSDP does with a parameter between "
            "uses: run the loss inside `with FullyShardedDataParallel.summon_full_params(module):`"
        )


def _places(rows: Tensor) -> Tensor:
    return torch.nonzero(rows).squeeze(1)


class Head(NamedTuple):
    """The scored rows, which are gathered chunk by chunk and made up with zero rows to a multiple of 16, on a GPU to
    whole chunks, and the head that they meet."""

    hidden: Tensor  # (..., D), the caller's own
    weight: Tensor  # (V, D)
    bias: Tensor | None  # (V,)
    targets: Tensor  # (R',) int64, of the scored rows; 0 in the padding
    scored: Tensor  # (n,) the rows' places among the caller's R, n <= R'
    known: Tensor | None  # (n,) bool: which of them are scored at all; None: each
    loud: int  # how many of them, the first, can have a coefficient other than 0
    transform: LogitTransform
    chunk_rows: int

    @classmethod
    def of(
        cls, hidden, weight, bias, targets, transform: LogitTransform, chunk_rows: int | None, silent: Tensor | None
    ) -> Head:
        """silent (R,): rows whose coefficient is certainly 0, which come last; None: no row."""
        _refuse_freed("weight", weight)
        if bias is not None:
            _refuse_freed("bias", bias)
        known = targets != IGNORE
        if may_wait(targets.device):
            scored = _places(known if silent is None else known & ~silent)
            loud = len(scored)
            if silent is not None:
                scored = torch.cat([scored, _places(known & silent)])
            known = None
        else:
            scored, loud = torch.arange(len(targets), device=targets.device), len(targets)
            targets = torch.where(known, targets, 0)
        chunk_rows = rows_per_chunk(len(weight), hidden.dtype, chunk_rows)
        multiple = chunk_rows if whole_chunks(hidden.device) else ROW_MULTIPLE
        row_targets = targets.new_zeros(padded(len(scored), multiple))
        row_targets[: len(scored)] = targets[scored]
        bias = None if bias is None else bias.detach()
        hidden = torch.atleast_2d(hidden.detach())
        return cls(hidden, weight.detach(), bias, row_targets, scored, known, loud, transform, chunk_rows)

    def chunks(self) -> list[slice]:
        return [slice(start, start + self.chunk_rows) for start in range(0, len(self.targets), self.chunk_rows)]

    def rows(self, chunk: slice) -> Tensor:
        """(r, D), zero in the padding; a caller's slice is never copied whole."""
        place = self.scored[chunk]
        places: list[Tensor] = []
        for size in reversed(self.hidden.shape[1:-1]):
            places.insert(0, place % size)
            place = place // size
        found = self.hidden[(place, *places)]
        if self.known is not None:
            found = torch.where(self.known[chunk, None], found, 0)
        rows = self.hidden.new_zeros(len(self.targets[chunk]), self.hidden.shape[-1])
        rows[: len(found)] = found
        return rows

    def new_e(self) -> Tensor:
        rows = min(self.chunk_rows, len(self.targets))
        return self.hidden.new_empty(rows, len(self.weight), dtype=e_dtype(self.hidden.dtype))

    def new_rows(self, *leading: int) -> Tensor:
        return self.hidden.new_zeros(*leading, len(self.targets), dtype=torch.float32)

    def compact(self, rows: Tensor) -> Tensor:
        """(..., R) -> (..., R'), zero in the padding."""
        out, found = self.new_rows(*rows.shape[:-1]), rows[..., self.scored]
        out[..., : len(self.scored)] = found if self.known is None else torch.where(self.known, found, 0)
        return out

    def expand(self, out: Tensor, rows: Tensor, chunk: slice = slice(None)) -> None:
        """A chunk's rows (r, ...) -> out (R, ...), zero or untouched where masked."""
        scored = self.scored[chunk]
        found = rows[: len(scored)].to(out.dtype)
        if self.known is not None:
            known = self.known[chunk]
            found = torch.where(known if found.ndim == 1 else known[:, None], found, 0)
        out[scored] = found


def forward(head: Head, chunk: slice, x: Tensor, e: Tensor | None, logp, entropy, sums) -> Any:
    """Runs `exp_product` on one chunk; its part of e."""
    e = None if e is None else e[: len(x)]
    primitive(reference.exp_product, head.hidden.device)(
        e,
        logp[chunk],
        None if entropy is None else entropy[chunk],
        sums[:, chunk],
        x,
        head.weight,
        head.bias,
        head.targets[chunk],
        head.transform,
    )
    return e


def backward(head: Head, chunk: slice, x: Tensor, e: Tensor, sums, entropy, grad_logp, grad_entropy) -> Tensor:
    """Runs `exp_product_grad` on one chunk; its part of e."""
    e = e[: len(x)]
    primitive(reference.exp_product_grad, head.hidden.device)(
        e,
        sums[:, chunk],
        None if entropy is None else entropy[chunk],
        x,
        head.weight,
        head.bias,
        head.targets[chunk],
        head.transform,
        grad_logp[chunk],
        None if grad_entropy is None else grad_entropy[chunk],
    )
    return e


def accumulate(x: Tensor, weight: Tensor, e: Tensor, beta: Tensor, weight_grad, bias_grad, hidden: bool) -> Any:
    """weight_grad += E^T (beta * X); bias_grad += sum of beta * E; returns beta * (E W) in float32 where `hidden`."""
    scaled = (beta[:, None] * x).to(e.dtype)
    rows: Any = torch.zeros(x.shape, dtype=torch.float32, device=x.device) if hidden else None
    addmm = primitive(reference.addmm, x.device)
    no_copies = weight.dtype == e.dtype and bias_grad is None
    columns = len(weight) if whole_chunks(x.device) and no_copies else TILE_V
    for start in range(0, len(weight), columns):
        tile = slice(start, start + columns)
        if hidden:
            addmm(rows, e[:, tile], weight[tile].to(e.dtype))
        if weight_grad is not None and weight_grad.dtype == torch.float32:
            addmm(weight_grad[tile], e[:, tile].t(), scaled)
        elif weight_grad is not None:
            weight_grad[tile].addmm_(e[:, tile].t(), scaled)
        if bias_grad is not None:
            bias_grad[tile].addmv_(e[:, tile].float().t(), beta)
    return rows.mul_(beta[:, None]) if hidden else None


def add_gradients(head: Head, chunk: slice, x, e: Tensor, beta: Tensor, hidden_grad, weight_grad, bias_grad) -> None:
    """`accumulate` over the rows with a coefficient, made up to a multiple of 16 with zero rows. The last of them move
    into the places of those without, in X and E themselves: no more rows move than are left out. On a GPU over all rows
    but chunks of silent ones."""
    if whole_chunks(x.device):
        x.masked_fill_((beta == 0)[:, None], 0)  # what they hold may be NaN
        if chunk.start < head.loud:
            slopes = accumulate(x, head.weight, e, beta, weight_grad, bias_grad, hidden_grad is not None)
        elif hidden_grad is not None:
            slopes = beta[:, None].expand(x.shape)  # 0, or the NaN of a row whose logits hold one
        if hidden_grad is not None:
            head.expand(hidden_grad.view(-1, hidden_grad.shape[-1]), slopes, chunk)
        return
    used = beta != 0
    count = padded(int(used.sum()))
    if count == 0:
        return
    free, late = torch.nonzero(~used[:count]).squeeze(1), count + torch.nonzero(used[count:]).squeeze(1)
    free, zeros = free[: len(late)], free[len(late) :]
    for to, source in zip(free.split(ROW_MULTIPLE), late.split(ROW_MULTIPLE), strict=True):
        e[to], x[to], beta[to] = e[source], x[source], beta[source]
    e[zeros], x[zeros] = 0, 0  # what they held may be NaN
    slopes = accumulate(
        x[:count], head.weight, e[:count], beta[:count], weight_grad, bias_grad, hidden_grad is not None
    )
    if hidden_grad is not None:
        places = torch.arange(len(used), device=used.device)
        places[free] = late
        places, known = places[:count], used[places[:count]]
        flat = hidden_grad.view(-1, hidden_grad.shape[-1])
        flat[head.scored[chunk][places[known]]] = slopes[known].to(flat.dtype)


@operator(mutates=("logp", "entropy", "sums", "slopes"))
def linear_logp_(
    logp: Tensor,
    entropy: Tensor | None,
    sums: Tensor | None,
    slopes: Tensor | None,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    transform: LogitTransform,
    chunk_rows: int | None,
) -> None:
    """Writes logp, entropy (R,), what `linear_logp_grad_` needs, sums (3, R), and dlogp/dX, slopes (R, D) float32, of
    the scored rows; targets -100 elsewhere."""
    head = Head.of(hidden, weight, bias, targets, transform, chunk_rows, None)
    rows, row_sums, e = head.new_rows(), head.new_rows(3), head.new_e() if slopes is not None else None
    entropies: Any = None if entropy is None else head.new_rows()
    with torch.autocast(hidden.device.type, enabled=False):
        for chunk in head.chunks():
            x = head.rows(chunk)
            part = forward(head, chunk, x, e, rows, entropies, row_sums)
            if slopes is not None:
                beta = -1 / row_sums[2, chunk]
                head.expand(slopes, accumulate(x, head.weight, part, beta, None, None, hidden=True), chunk)
    head.expand(logp, rows)
    if entropy is not None:
        head.expand(entropy, entropies)
    if sums is not None:
        for out, found in zip(sums, row_sums, strict=True):
            head.expand(out, found)


@operator(mutates=("hidden_grad", "weight_grad", "bias_grad"))
def linear_logp_grad_(
    hidden_grad: Tensor | None,
    weight_grad: Tensor | None,
    bias_grad: Tensor | None,
    grad_logp: Tensor,
    grad_entropy: Tensor | None,
    sums: Tensor,
    entropy: Tensor | None,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    transform: LogitTransform,
    chunk_rows: int | None,
) -> None:
    """The backward pass of `linear_logp_` from gradients (R,) and what it wrote: E once more, then the gradient
    products, both of rows with a gradient alone. Adds into the gradients that are not None."""
    silent = grad_logp == 0 if grad_entropy is None else (grad_logp == 0) & (grad_entropy == 0)
    targets = torch.where(silent, IGNORE, targets)
    head = Head.of(hidden, weight, bias, targets, transform, chunk_rows, None)
    e, g, sums = head.new_e(), head.compact(grad_logp), head.compact(sums)
    h, entropy = (None if rows is None else head.compact(rows) for rows in (grad_entropy, entropy))
    with torch.autocast(hidden.device.type, enabled=False):
        for chunk in head.chunks():
            x = head.rows(chunk)
            part = backward(head, chunk, x, e, sums, entropy, g, h)
            used = g[chunk] != 0 if h is None else (g[chunk] != 0) | (h[chunk] != 0)
            beta = torch.where(used, -1 / sums[2, chunk], 0.0)
            add_gradients(head, chunk, x, part, beta, hidden_grad, weight_grad, bias_grad)


def new_gradients(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, needed: tuple[bool, bool, bool], chunk_rows: int | None
) -> tuple[Tensor | None, ...]:
    """Zeros: of hidden in the dtype of E, of weight and bias in float32, but where one chunk takes every row a bfloat16
    weight's in bfloat16: its product's one rounding is the last; None where not needed. In float16 all are rounded by
    `outgoing`, after the upstream gradient: a loss scale comes too late for what a float16 has lost."""
    rows = hidden.shape[:-1].numel()
    one_chunk = padded(rows) <= rows_per_chunk(len(weight), hidden.dtype, chunk_rows)
    weight_dtype = e_dtype(weight.dtype) if one_chunk else torch.float32
    return (
        torch.zeros(hidden.shape, dtype=e_dtype(hidden.dtype), device=hidden.device) if needed[0] else None,
        torch.zeros(weight.shape, dtype=weight_dtype, device=hidden.device) if needed[1] else None,
        torch.zeros_like(bias, dtype=torch.float32) if needed[2] and bias is not None else None,
    )


def outgoing(grads: tuple[Tensor | None, ...], dtype: torch.dtype) -> tuple[Tensor | None, ...]:
    """The gradients as autograd takes them, rounded once."""
    return tuple(None if grad is None else grad.to(dtype) for grad in grads)


@operator(mutates=("loss", "logp", "entropy", "skipped", "hidden_grad", "weight_grad", "bias_grad"))
def linear_loss_(
    loss: Tensor,
    logp: Tensor,
    entropy: Tensor,
    skipped: Tensor,
    hidden_grad: Tensor | None,
    weight_grad: Tensor | None,
    bias_grad: Tensor | None,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    weights: Tensor,
    advantages: Tensor,
    old_logp: Tensor | None,
    ref_logp: Tensor | None,
    sampling_logp: Tensor | None,
    config: str,
    chunk_rows: int | None,
) -> None:
    """Writes loss (), logp and entropy (R,), and the share () of the scored rows that have no coefficient and so no
    gradient products; adds into the gradients that are not None, chunk by chunk. `config` is a `LossConfig.text`."""
    policy = LossConfig.of(config)
    silent = advantages == 0 if policy.silent_at_zero else None
    head = Head.of(hidden, weight, bias, targets, policy.transform, chunk_rows, silent)
    rows, entropies, sums = head.new_rows(), head.new_rows(), head.new_rows(3)
    wanted = any(grad is not None for grad in (hidden_grad, weight_grad, bias_grad))
    e = head.new_e() if wanted else None
    weights, advantages = head.compact(weights), head.compact(advantages)
    others = [None if x is None else head.compact(x) for x in (old_logp, ref_logp, sampling_logp)]
    with torch.autocast(hidden.device.type, enabled=False):
        for chunk in head.chunks():
            x = head.rows(chunk)
            part = forward(head, chunk, x, e, rows, entropies, sums)
            row_loss, slope = token_coefficients(
                policy, rows[chunk], advantages[chunk], *(None if x is None else x[chunk] for x in others)
            )
            used = weights[chunk] != 0  # not in the padding
            loss += torch.where(used, weights[chunk] * row_loss, 0.0).sum()
            coefficient = torch.where(used, weights[chunk] * slope, 0.0)
            skipped += (used & (coefficient == 0)).sum()
            if wanted:
                beta = torch.where(coefficient == 0, 0.0, -coefficient / sums[2, chunk])
                add_gradients(head, chunk, x, part, beta, hidden_grad, weight_grad, bias_grad)
    skipped /= max(len(head.scored), 1) if head.known is None else head.known.sum().clamp(min=1)
    head.expand(logp, rows)
    head.expand(entropy, entropies)
