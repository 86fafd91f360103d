"""Log-probs and GRPO losses from hidden states; the (R, V) logits are never held.

`linear_logp` makes E (see `head`) forward and once more in backward. `linear_grpo_loss` knows the coefficients of a
token-level loss inside the chunk loop and takes both gradient products at once: three products in all.
"""

from __future__ import annotations

from typing import get_args

import torch
from torch import Tensor

from redit_fast.backends import primitive
from redit_fast.dither import check_choice
from redit_fast.head import Head, accumulate, forward, fused_loss, gradients, new_gradients, outgoing
from redit_fast.logprob import (
    IGNORE,
    EntropyMode,
    LogpEntropy,
    check_targets,
    detached,
    refuse_double_backward,
    refuse_second_backward,
)
from redit_fast.loss_config import LossConfig
from redit_fast.loss_rows import Rows
from redit_fast.losses import LossOutput, fused_metrics, rows_loss
from redit_fast.transforms import LogitTransform


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
            head = Head.of(hidden, weight, bias, targets, transform, chunk_rows)
            # A frozen head has its gradient dlogp/dX ready after one more product, and backward none left.
            frozen = ctx.needs_input_grad[:3] == (True, False, False) and entropy_mode != "grad"
            slopes = torch.zeros_like(head.hidden, dtype=torch.float32) if frozen else None
            logp, sums, e = head.new_rows(), head.new_rows(3), head.new_e() if frozen else None
            entropy = None if entropy_mode == "none" else head.new_rows()
            for chunk in head.chunks():
                part = forward(head, chunk, e, logp, entropy, sums, None, None)
                if frozen:
                    accumulate(head, chunk, part, -1 / sums[2, chunk], slopes, None, None)
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
            head = Head.of(hidden, weight, bias, targets, ctx.transform, ctx.chunk_rows)
            g, h = head.compact(grad_logp), None if grad_entropy is None else head.compact(grad_entropy)
            if slopes is not None:
                rows = torch.where(g[:, None] == 0, 0.0, g[:, None] * slopes).to(hidden.dtype)
                return head.expand(rows, len(targets)), None, None, None, None, None, None
            grads = new_gradients(head, ctx.needs_input_grad[:3])
            gradients(head, g, h, *grads)
        return *outgoing(head, grads, len(targets)), None, None, None, None


def linear_grpo_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    advantages: Tensor,
    *,
    bias: Tensor | None = None,
    old_logp: Tensor | None = None,
    ref_logp: Tensor | None = None,
    sampling_logp: Tensor | None = None,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    normalizer: float | Tensor | None = None,
    config: LossConfig,
    chunk_rows: int | None = None,
    step: int = 0,
    seed: int = 0,
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
    rows = Rows.check(targets, advantages, old_logp, ref_logp, sampling_logp, mask, cu_seqlens, config, normalizer,
                      step, seed)  # fmt: skip
    if rows.config.route == "logp":
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
        return detached(rows_loss(rows, logp, entropy, normalizer))
    loss, logp, entropy = _LinearGrpoLoss.apply(
        hidden.reshape(-1, hidden.shape[-1]),
        weight,
        bias,
        flat,
        rows,
        rows.weights(normalizer),
        chunk_rows,
    )
    metrics = fused_metrics(rows, logp, entropy)
    return LossOutput(loss, logp.view(targets.shape), entropy.view(targets.shape), metrics, "fused")


class _LinearGrpoLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, targets, rows, weights, chunk_rows):
        with torch.autocast(hidden.device.type, enabled=False):
            head = Head.of(hidden, weight, bias, targets, rows.config.transform, chunk_rows)
            grads = new_gradients(head, ctx.needs_input_grad[:3])
            loss, logp, entropy = fused_loss(head, rows, weights, grads)
            ctx.grads = outgoing(head, grads, len(targets))
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
        return *ctx.grads, None, None, None, None


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
    sampling_logp: Tensor | None = None,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    normalizer: float | Tensor | None = None,
    config: LossConfig,
    chunk_rows: int | None = None,
    step: int = 0,
    seed: int = 0,
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
    rows = Rows.check(targets, advantages, old_logp, ref_logp, sampling_logp, mask, cu_seqlens, config, normalizer,
                      step, seed)  # fmt: skip
    head = Head.of(hidden.reshape(-1, hidden.shape[-1]), weight, bias, flat, config.transform, chunk_rows)
    grads = torch.zeros_like(head.hidden), weight_grad, bias_grad
    if rows.config.route == "fused":
        loss, logp, entropy = fused_loss(head, rows, rows.weights(normalizer), grads)
        metrics = fused_metrics(rows, logp, entropy)
        out = LossOutput(loss, logp.view(targets.shape), entropy.view(targets.shape), metrics, "fused")
    else:
        logp, entropy, sums = head.new_rows(), head.new_rows(), head.new_rows(3)
        for chunk in head.chunks():
            forward(head, chunk, None, logp, entropy, sums, None, None)
        with torch.enable_grad():
            leaves = [head.expand(x, len(flat)).view(targets.shape).requires_grad_() for x in (logp, entropy)]
            out = detached(rows_loss(rows, *leaves, normalizer))
            g, h = torch.autograd.grad(out.loss, leaves, allow_unused=True)  # entropy, where it has no coefficient
        h = None if h is None else head.compact(h.reshape(-1))
        gradients(head, head.compact(g.reshape(-1)), h, *grads)
        out = out._replace(loss=out.loss.detach())
    return out, head.expand(grads[0], len(flat)).view(hidden.shape)
