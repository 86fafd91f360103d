"""Log-probs and GRPO losses from hidden states: one chunk loop over the head, the (R, V) logits are never held.

`exp_product` gives a chunk of rows E with dz = beta * E per row (see the reference), so that dX = beta * (E W) and
dW += E^T (beta * X) are plain products. `linear_logp` runs it again in backward; `linear_grpo_loss` knows the
coefficients of a token-level loss inside the chunk and takes both gradient products at once: three products in all.
"""

from __future__ import annotations

import re
from typing import NamedTuple, get_args

import torch
from torch import Tensor

from redit_fast.backends import primitive
from redit_fast.dither import check_choice
from redit_fast.logprob import (
    IGNORE,
    EntropyMode,
    LogpEntropy,
    check_targets,
    loss_from_logp,
    refuse_double_backward,
    refuse_second_backward,
)
from redit_fast.losses import (
    LogitTransform,
    LossConfig,
    LossOutput,
    Rows,
    loss_metrics,
    token_coefficients,
)

CHUNK_BYTES = 256 << 20  # of the E chunk, unless chunk_rows is given
ROW_MULTIPLE = 16  # below 8 rows torch's float32 products change bits with the number of rows
TILE_V = 4096  # vocabulary rows per product tile of the gradients


class _Head(NamedTuple):
    """The scored rows, compacted and padded to a multiple of 16 with zero rows, and the head they meet."""

    hidden: Tensor  # (R', D)
    weight: Tensor  # (V, D)
    bias: Tensor | None  # (V,)
    targets: Tensor  # (R',) int64
    scored: Tensor  # (n,) the rows' places in the caller's R rows, n <= R'
    transform: LogitTransform
    chunk_rows: int

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


def _head(hidden, weight, bias, targets, transform: LogitTransform, chunk_rows: int | None) -> _Head:
    scored = torch.nonzero(targets != IGNORE).squeeze(1)
    padded = -(-len(scored) // ROW_MULTIPLE) * ROW_MULTIPLE
    rows, row_targets = hidden.new_zeros(padded, hidden.shape[1]), targets.new_zeros(padded)
    rows[: len(scored)], row_targets[: len(scored)] = hidden.detach()[scored], targets[scored]
    if chunk_rows is None:
        chunk_rows = CHUNK_BYTES // (len(weight) * (2 if hidden.dtype == torch.bfloat16 else 4))
    chunk_rows = max(ROW_MULTIPLE, chunk_rows // ROW_MULTIPLE * ROW_MULTIPLE)
    bias = None if bias is None else bias.detach()
    return _Head(rows, weight.detach(), bias, row_targets, scored, transform, chunk_rows)


def _forward(head: _Head, chunk: slice, e: Tensor | None, logp, entropy, sums, *upstream) -> Tensor | None:
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


def _accumulate(head: _Head, chunk: slice, e: Tensor, beta: Tensor, hidden_grad, weight_grad, bias_grad) -> None:
    """hidden_grad[chunk] = beta * (E W); weight_grad += E^T (beta * X); bias_grad += sum of beta * E; all in
    float32."""
    if not beta.any():
        return
    used = (beta != 0)[:, None]
    scaled = torch.where(used, beta[:, None] * head.hidden[chunk].float(), 0.0)
    rows = torch.zeros_like(scaled) if hidden_grad is not None else None
    for start in range(0, len(head.weight), TILE_V):
        tile = slice(start, start + TILE_V)
        e_tile = torch.where(used, e[:, tile].float(), 0.0)
        if hidden_grad is not None:
            rows += e_tile @ head.weight[tile].float()
        if weight_grad is not None:
            weight_grad[tile] += e_tile.t() @ scaled
        if bias_grad is not None:
            bias_grad[tile] += beta @ e_tile
    if hidden_grad is not None:
        hidden_grad[chunk] = torch.where(used, beta[:, None] * rows, 0.0).to(hidden_grad.dtype)


def _gradients(head: _Head, grad_logp, grad_entropy, hidden_grad, weight_grad, bias_grad) -> None:
    """The backward pass from the log-probs: E once more, then the gradient products of every chunk."""
    e, logp, sums = head.new_e(), head.new_rows(), head.new_rows(3)
    for chunk in head.chunks():
        part = _forward(head, chunk, e, logp, None, sums, grad_logp, grad_entropy)
        coefficient = grad_logp[chunk]
        if grad_entropy is not None:
            coefficient = ((coefficient != 0) | (grad_entropy[chunk] != 0)).float()
        beta = torch.where(coefficient == 0, 0.0, -coefficient / sums[2, chunk])
        _accumulate(head, chunk, part, beta, hidden_grad, weight_grad, bias_grad)


def _new_gradients(hidden: Tensor, head: _Head, needed: tuple[bool, bool, bool]) -> tuple[Tensor | None, ...]:
    """Rows in the dtype of hidden, weight and bias in float32; None where not needed."""
    return (
        torch.zeros_like(head.hidden) if needed[0] else None,
        torch.zeros_like(head.weight, dtype=torch.float32) if needed[1] else None,
        torch.zeros_like(head.bias, dtype=torch.float32) if needed[2] and head.bias is not None else None,
    )


def _check_head(hidden, weight, bias, targets, mask, chunk_rows, validate) -> Tensor:
    """Checks the head's arguments; the targets flat, -100 where masked."""
    flat = check_targets("hidden", hidden, targets, mask, len(weight) if weight.ndim else 0, validate)
    if weight.ndim != 2 or weight.shape[1] != hidden.shape[-1]:
        raise ValueError(f"weight must have shape (V, {hidden.shape[-1]}) like hidden, got {tuple(weight.shape)}")
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is None:
            continue
        if tensor.dtype != hidden.dtype or tensor.device != hidden.device:
            raise TypeError(
                f"{name} must be {hidden.dtype} on {hidden.device} like hidden (or use autocast), "
                f"got {tensor.dtype} on {tensor.device}"
            )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias must have shape ({len(weight)},), got {tuple(bias.shape)}")
    if chunk_rows is not None and chunk_rows < 1:
        raise ValueError(f"chunk_rows must be at least 1, got {chunk_rows}")
    return flat


def _autocast(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """What autocast would do to the inputs of a linear layer."""
    device = tensors[0].device.type
    if not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(None if tensor is None else tensor.to(dtype) for tensor in tensors)


def linear_logp(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    mask: Tensor | None = None,
    entropy: EntropyMode = "none",
    chunk_rows: int | None = None,
    validate: bool = False,
) -> Tensor | LogpEntropy:
    """`token_logp` of the logits hidden @ weight.T + bias, which are never held: one product forward, three backward (a
    frozen
    head: two in all).

    Args:
        hidden: (..., D); weight: (V, D); bias: (V,) of one dtype, float32, bfloat16 or float16; autocast casts them.
        targets, mask: (...), as in `token_logp`; masked rows cost nothing.
        entropy: "metric" also returns the entropy without graph, "grad" with.
        chunk_rows: rows per chunk, the only buffer of V columns; default: 256 MiB of it. The gradient of the weight
            depends on it by float32 rounding, nothing else does.

    Returns:
        (...) float32, or the named tuple (logp, entropy) of two.

    Raises:
        ValueError, TypeError: an argument that does not fit, naming it.
    """
    transform = LogitTransform(temperature, logit_scale, softcap).check()
    check_choice("entropy", entropy, get_args(EntropyMode))
    hidden, weight, bias = _autocast(hidden, weight, bias)
    flat = _check_head(hidden, weight, bias, targets, mask, chunk_rows, validate)
    logp, entropies = _LinearLogp.apply(
        hidden.reshape(-1, hidden.shape[-1]), weight, bias, flat, transform, entropy, chunk_rows
    )
    logp = logp.view(targets.shape)
    return logp if entropy == "none" else LogpEntropy(logp, entropies.view(targets.shape))


class _LinearLogp(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, targets, transform, entropy_mode, chunk_rows):
        with torch.autocast(hidden.device.type, enabled=False):
            head = _head(hidden, weight, bias, targets, transform, chunk_rows)
            # A frozen head has its gradient dlogp/dX ready after one more product, and backward none left.
            frozen = ctx.needs_input_grad[:3] == (True, False, False) and entropy_mode != "grad"
            slopes = torch.zeros_like(head.hidden, dtype=torch.float32) if frozen else None
            logp, sums, e = head.new_rows(), head.new_rows(3), head.new_e() if frozen else None
            entropy = None if entropy_mode == "none" else head.new_rows()
            for chunk in head.chunks():
                part = _forward(head, chunk, e, logp, entropy, sums, None, None)
                if frozen:
                    _accumulate(head, chunk, part, -1 / sums[2, chunk], slopes, None, None)
        ctx.save_for_backward(hidden, weight, bias, targets, slopes)
        ctx.transform, ctx.chunk_rows = transform, chunk_rows
        ctx.set_materialize_grads(False)
        rows = len(targets)
        out = head.expand(logp, rows), None if entropy is None else head.expand(entropy, rows)
        if entropy_mode == "metric":
            ctx.mark_non_differentiable(out[1])
        return out

    @staticmethod
    def backward(ctx, grad_logp, grad_entropy):
        refuse_double_backward()
        hidden, weight, bias, targets, slopes = ctx.saved_tensors
        if grad_logp is None:
            grad_logp = torch.zeros(len(targets), device=hidden.device)
        with torch.autocast(hidden.device.type, enabled=False):
            head = _head(hidden, weight, bias, targets, ctx.transform, ctx.chunk_rows)
            g, h = head.compact(grad_logp), None if grad_entropy is None else head.compact(grad_entropy)
            if slopes is not None:
                rows = torch.where(g[:, None] == 0, 0.0, g[:, None] * slopes).to(hidden.dtype)
                return head.expand(rows, len(targets)), None, None, None, None, None, None
            grads = _new_gradients(hidden, head, ctx.needs_input_grad[:3])
            _gradients(head, g, h, *grads)
        return *_outgoing(head, grads, len(targets)), None, None, None, None


def _outgoing(head: _Head, grads: tuple[Tensor | None, ...], rows: int) -> tuple[Tensor | None, ...]:
    """The gradients as autograd takes them: rows back in their places, weight and bias rounded once."""
    hidden_grad, weight_grad, bias_grad = grads
    return (
        None if hidden_grad is None else head.expand(hidden_grad, rows),
        None if weight_grad is None else weight_grad.to(head.weight.dtype),
        None if bias_grad is None else bias_grad.to(head.weight.dtype),
    )


def linear_grpo_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    advantages: Tensor,
    *,
    bias: Tensor | None = None,
    old_logp: Tensor | None = None,
    ref_logp: Tensor | None = None,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    normalizer: float | Tensor | None = None,
    config: LossConfig,
    chunk_rows: int | None = None,
) -> LossOutput:
    """`grpo_loss` from hidden states (..., D) and the head's weight (V, D), without logits.

    Token-level losses take route "fused": three products, both gradients inside the forward chunk loop. The others go
    through `linear_logp` (route "logp", four products). Arguments as in `linear_logp` and `policy_loss`; a target of
    -100 counts as masked; logp and entropy of the result are detached. A second backward through the fused route
    raises.

    Raises:
        ValueError, TypeError: an argument that does not fit, naming it.
    """
    hidden, weight, bias = _autocast(hidden, weight, bias)
    flat = _check_head(hidden, weight, bias, targets, mask, chunk_rows, validate=False)
    mask = (flat != IGNORE).view(targets.shape)
    rows = Rows.check(targets, advantages, old_logp, ref_logp, mask, cu_seqlens, config, normalizer)
    if config.route == "logp":
        logp, entropy = linear_logp(
            hidden,
            weight,
            targets,
            bias=bias,
            mask=mask,
            entropy="grad" if config.entropy_coef != 0 else "metric",
            chunk_rows=chunk_rows,
            **config.transform._asdict(),
        )
        return loss_from_logp(logp, entropy, advantages, old_logp, ref_logp, mask, cu_seqlens, config, normalizer)
    loss, logp, entropy = _LinearGrpoLoss.apply(
        hidden.reshape(-1, hidden.shape[-1]),
        weight,
        bias,
        flat,
        rows,
        rows.weights(config, normalizer),
        config,
        chunk_rows,
    )
    metrics = loss_metrics(config, rows, logp, entropy)
    return LossOutput(loss, logp.view(targets.shape), entropy.view(targets.shape), metrics, "fused")


def _fused_loss(
    head: _Head, rows: Rows, weights: Tensor, config: LossConfig, grads: tuple[Tensor | None, ...]
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss (), logp and entropy (R,); adds into the gradients that are not None, chunk by chunk."""
    logp, entropy, sums = head.new_rows(), head.new_rows(), head.new_rows(3)
    wanted = any(grad is not None for grad in grads)
    e = head.new_e() if wanted else None
    loss = logp.new_zeros(())
    weights, advantages = head.compact(weights), head.compact(rows.advantages)
    old_logp = None if rows.old_logp is None else head.compact(rows.old_logp)
    ref_logp = None if rows.ref_logp is None else head.compact(rows.ref_logp)
    for chunk in head.chunks():
        part = _forward(head, chunk, e, logp, entropy, sums, None, None)
        row_loss, slope = token_coefficients(
            config,
            logp[chunk],
            advantages[chunk],
            None if old_logp is None else old_logp[chunk],
            None if ref_logp is None else ref_logp[chunk],
        )
        used = weights[chunk] != 0  # not in the padding
        loss += torch.where(used, weights[chunk] * row_loss, 0.0).sum()
        if wanted:
            coefficient = torch.where(used, weights[chunk] * slope, 0.0)
            beta = torch.where(coefficient == 0, 0.0, -coefficient / sums[2, chunk])
            _accumulate(head, chunk, part, beta, *grads)
    count = len(rows.mask)
    return loss, head.expand(logp, count), head.expand(entropy, count)


class _LinearGrpoLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, targets, rows, weights, config, chunk_rows):
        with torch.autocast(hidden.device.type, enabled=False):
            head = _head(hidden, weight, bias, targets, config.transform, chunk_rows)
            grads = _new_gradients(hidden, head, ctx.needs_input_grad[:3])
            loss, logp, entropy = _fused_loss(head, rows, weights, config, grads)
            ctx.grads = _outgoing(head, grads, len(targets))
        ctx.spent = False
        ctx.mark_non_differentiable(logp, entropy)
        return loss, logp, entropy

    @staticmethod
    def backward(ctx, upstream, *_):
        refuse_double_backward()
        refuse_second_backward(ctx)
        for grad in ctx.grads:
            if grad is not None:
                primitive("scale_in_place", grad.device)(grad, upstream)
        return *ctx.grads, None, None, None, None, None


@torch.no_grad()
def linear_grpo_loss_and_grad_(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    advantages: Tensor,
    *,
    weight_grad: Tensor | None,
    bias: Tensor | None = None,
    bias_grad: Tensor | None = None,
    old_logp: Tensor | None = None,
    ref_logp: Tensor | None = None,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    normalizer: float | Tensor | None = None,
    config: LossConfig,
    chunk_rows: int | None = None,
) -> tuple[LossOutput, Tensor]:
    """`linear_grpo_loss` without autograd: adds dL/dweight and dL/dbias in float32 into `weight_grad` (V, D) and
    `bias_grad` (V,), where given, and returns the loss with dL/dhidden, of the shape and dtype of `hidden`.

    Raises:
        ValueError, TypeError: an argument that does not fit, naming it.
    """
    flat = _check_head(hidden, weight, bias, targets, mask, chunk_rows, validate=False)
    for name, grad, of in (("weight_grad", weight_grad, weight), ("bias_grad", bias_grad, bias)):
        if grad is None:
            continue
        if of is None or grad.dtype != torch.float32 or grad.shape != of.shape or grad.device != of.device:
            shape = "no bias" if of is None else f"float32 {tuple(of.shape)} on {of.device}"
            raise ValueError(f"{name} must match {shape}, got {grad.dtype} {tuple(grad.shape)} on {grad.device}")
    mask = (flat != IGNORE).view(targets.shape)
    rows = Rows.check(targets, advantages, old_logp, ref_logp, mask, cu_seqlens, config, normalizer)
    head = _head(hidden.reshape(-1, hidden.shape[-1]), weight, bias, flat, config.transform, chunk_rows)
    grads = torch.zeros_like(head.hidden), weight_grad, bias_grad
    if config.route == "fused":
        loss, logp, entropy = _fused_loss(head, rows, rows.weights(config, normalizer), config, grads)
        logp, entropy = logp.view(targets.shape), entropy.view(targets.shape)
        out = LossOutput(loss, logp, entropy, loss_metrics(config, rows, logp.view(-1), entropy.view(-1)), "fused")
    else:
        logp, entropy, sums = head.new_rows(), head.new_rows(), head.new_rows(3)
        for chunk in head.chunks():
            _forward(head, chunk, None, logp, entropy, sums, None, None)
        with torch.enable_grad():
            leaves = [head.expand(x, len(flat)).view(targets.shape).requires_grad_() for x in (logp, entropy)]
            out = loss_from_logp(*leaves, advantages, old_logp, ref_logp, mask, cu_seqlens, config, normalizer)
            g, h = torch.autograd.grad(out.loss, leaves)
        h = None if config.entropy_coef == 0 else head.compact(h.reshape(-1))
        _gradients(head, head.compact(g.reshape(-1)), h, *grads)
        out = out._replace(loss=out.loss.detach())
    return out, head.expand(grads[0], len(flat)).view(hidden.shape)


_SCALE_KEYS = ("logit_scale", "output_multiplier", "lm_head_multiplier")
_KNOWN = re.compile(
    r"^(attn|router|num|output)_|^(final_logit_softcapping|logits_scaling|logits_to_keep|{})$".format(
        "|".join(_SCALE_KEYS)
    )
)


def logit_transforms(model_config: object) -> dict[str, float | None]:
    """{"logit_scale", "softcap"} of a Hugging Face model config (its text config where nested), as the ops take them.

    Reads final_logit_softcapping (Gemma), logit_scale (Cohere), output_multiplier, lm_head_multiplier (Falcon-H1) and
    logits_scaling (a divisor in Granite and MiniCPM3, a factor in HyperCLOVA X).

    Raises:
        ValueError: the config sets another field that looks like a transform of the logits, naming it.
    """
    config = getattr(model_config, "text_config", None) or model_config
    values = config if isinstance(config, dict) else vars(config)
    for key, value in values.items():
        looks_like_one = re.search(r"logit|softcap|lm_head_mult", key) and re.search(r"scal|cap|mult|temper|bias", key)
        if looks_like_one and value not in (None, False) and not _KNOWN.search(key):
            raise ValueError(f"the model config sets {key}={value}, a logit transform that redit-fast does not know")
    scale = 1.0
    for key in _SCALE_KEYS:
        if values.get(key) is not None:
            scale *= float(values[key])
    if values.get("logits_scaling") is not None:
        factor = float(values["logits_scaling"])
        scale = scale * factor if values.get("model_type") == "hyperclovax" else scale / factor
    return {"logit_scale": scale, "softcap": values.get("final_logit_softcapping")}
