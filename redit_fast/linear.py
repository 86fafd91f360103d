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
from redit_fast.head import (
    TILE_V,
    Head,
    accumulate,
    e_dtype,
    forward,
    fused_loss,
    gradients,
    new_gradients,
    outgoing,
    padded,
    rows_per_chunk,
)
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

ROW_BYTES = 64  # of float32 numbers beside each row


def _refuse_parts(name: str, tensor: Tensor) -> None:
    """By name what is only partly here: further in it would be a wrong shape, or freed memory."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
    if hasattr(tensor, "full_tensor"):
        raise TypeError(
            f"{name} is a DTensor with placements {tensor.placements}: pass {name}.full_tensor(), whose gradient "
            "returns to the shards, or call unshard() on the module that FSDP2 shards (fully_shard with "
            "reshard_after_forward=False keeps it so until backward)"
        )
    if hasattr(tensor, "ds_id") and tensor.numel() == 0:
        raise ValueError(
            f"{name} is partitioned by DeepSpeed ZeRO-3, got shape {tuple(tensor.shape)} of "
            f"{tuple(getattr(tensor, 'ds_shape', ()))}: run the loss and its backward pass inside "
            f"`with deepspeed.zero.GatheredParameters([{name}]):`"
        )
    if tensor.numel() > 0 and tensor.untyped_storage().nbytes() == 0:
        raise ValueError(
            f"{name} of shape {tuple(tensor.shape)} has had its storage freed, as FSDP does with a parameter between "
            "uses: run the loss inside `with FullyShardedDataParallel.summon_full_params(module):`"
        )


def _check_head(hidden, weight, bias, targets, mask, chunk_rows, validate) -> Tensor:
    """Checks the head's arguments; the targets flat, -100 where masked."""
    _refuse_parts("weight", weight)
    if bias is not None:
        _refuse_parts("bias", bias)
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
    frozen head: two in all). Rows whose upstream gradients are 0 skip the gradient products.

    Args:
        hidden: (..., D); weight: (V, D); bias: (V,) of one dtype, float32, bfloat16 or float16; autocast casts them. A
            head padded beyond the vocabulary is passed as weight[:V].
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
    logp, entropies = _LinearLogp.apply(hidden, weight, bias, flat, transform, entropy, chunk_rows)
    logp = logp.view(targets.shape)
    return logp if entropy == "none" else LogpEntropy(logp, entropies.view(targets.shape))


class _LinearLogp(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, targets, transform, entropy_mode, chunk_rows):
        with torch.autocast(hidden.device.type, enabled=False):
            head = Head.of(hidden, weight, bias, targets, transform, chunk_rows)
            # A frozen head has its gradient dlogp/dX ready after one more product, and backward none left.
            frozen = ctx.needs_input_grad[:3] == (True, False, False) and entropy_mode != "grad"
            slopes = hidden.new_zeros(len(head.targets), hidden.shape[-1], dtype=torch.float32) if frozen else None
            logp, sums, e = head.new_rows(), head.new_rows(3), head.new_e() if frozen else None
            entropy = None if entropy_mode == "none" else head.new_rows()
            for chunk in head.chunks():
                x = head.rows(chunk)
                part = forward(head, chunk, x, e, logp, entropy, sums, None, None)
                if frozen:
                    accumulate(x, head.weight, part, -1 / sums[2, chunk], slopes[chunk], None, None)
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
                return head.expand(rows, len(targets)).view(hidden.shape), None, None, None, None, None, None
            grads = new_gradients(hidden, weight, bias, ctx.needs_input_grad[:3])
            gradients(head, g, h, *grads)
        return *outgoing(grads, hidden.dtype), None, None, None, None


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
    raises. On route "fused" the metric head/frac_rows_skipped is the share of the scored rows with a coefficient of 0,
    which skip the gradient products; on route "logp" it is absent, the coefficients come with the backward pass.

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
    loss, logp, entropy, skipped = _LinearGrpoLoss.apply(
        hidden,
        weight,
        bias,
        flat,
        rows,
        rows.weights(normalizer),
        chunk_rows,
    )
    metrics = fused_metrics(rows, logp, entropy) | {"head/frac_rows_skipped": skipped}
    return LossOutput(loss, logp.view(targets.shape), entropy.view(targets.shape), metrics, "fused")


class _LinearGrpoLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, targets, rows, weights, chunk_rows):
        with torch.autocast(hidden.device.type, enabled=False):
            head = Head.of(hidden, weight, bias, targets, rows.config.transform, chunk_rows)
            grads = new_gradients(hidden, weight, bias, ctx.needs_input_grad[:3])
            loss, logp, entropy, skipped = fused_loss(head, rows, weights, grads)
            ctx.grads = grads if hidden.dtype == torch.float16 else outgoing(grads, hidden.dtype)
        ctx.spent, ctx.dtype = False, hidden.dtype
        ctx.mark_non_differentiable(logp, entropy, skipped)
        return loss, logp, entropy, skipped

    @staticmethod
    def backward(ctx, upstream, *_):
        refuse_double_backward()
        refuse_second_backward(ctx)
        grads, ctx.grads = ctx.grads, None  # autograd copies what is held here as well
        for grad in grads:
            if grad is not None:
                primitive("scale_in_place", grad.device)(grad.view(-1, grad.shape[-1]), upstream)
        return *outgoing(grads, ctx.dtype), None, None, None, None


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
    head = Head.of(hidden, weight, bias, flat, config.transform, chunk_rows)
    hidden_grad, *_ = new_gradients(hidden, weight, bias, (True, False, False))
    grads = hidden_grad, weight_grad, bias_grad
    if rows.config.route == "fused":
        loss, logp, entropy, skipped = fused_loss(head, rows, rows.weights(normalizer), grads)
        metrics = fused_metrics(rows, logp, entropy) | {"head/frac_rows_skipped": skipped}
        out = LossOutput(loss, logp.view(targets.shape), entropy.view(targets.shape), metrics, "fused")
    else:
        logp, entropy, sums = head.new_rows(), head.new_rows(), head.new_rows(3)
        for chunk in head.chunks():
            forward(head, chunk, head.rows(chunk), None, logp, entropy, sums, None, None)
        with torch.enable_grad():
            leaves = [head.expand(x, len(flat)).view(targets.shape).requires_grad_() for x in (logp, entropy)]
            out = detached(rows_loss(rows, *leaves, normalizer))
            g, h = torch.autograd.grad(out.loss, leaves, allow_unused=True)  # entropy, where it has no coefficient
        h = None if h is None else head.compact(h.reshape(-1))
        gradients(head, head.compact(g.reshape(-1)), h, *grads)
        out = out._replace(loss=out.loss.detach())
    return out, hidden_grad.to(hidden.dtype)


def estimate_memory(R: int, D: int, V: int, dtype: torch.dtype, trainable: bool, chunk_rows: int | None = None) -> int:
    """Peak bytes above the inputs that `linear_grpo_loss` and its backward pass take on route "fused", gradients
    included: dX, dW and its float32 accumulator where the weight is `trainable`, and one chunk of rows.

    Args:
        R: scored rows that have a coefficient; D: hidden size; V: vocabulary; dtype: of hidden and weight.
        trainable: whether the weight takes a gradient; the hidden states always do.
        chunk_rows: as in `linear_grpo_loss`.

    Raises:
        ValueError, TypeError: an argument that does not fit, naming it.
    """
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise TypeError(f"dtype must be float32, bfloat16 or float16, got {dtype}")
    for name, value in (("R", R), ("D", D), ("V", V), ("chunk_rows", 1 if chunk_rows is None else chunk_rows)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} must be a whole number of at least 1, got {value!r}")
    rows, width, e_width = min(padded(R), rows_per_chunk(V, dtype, chunk_rows)), dtype.itemsize, e_dtype(dtype).itemsize
    chunk = e_width * rows * V + (8 + width + 2 * e_width) * rows * D  # five copies of its hidden rows, two in float32
    if dtype == torch.float16:  # a tile of the weight in float32
        chunk += 4 * min(V, TILE_V) * D
    if dtype == torch.bfloat16:  # the forward product's two tiles of the weight in float32, or two of E
        chunk += max(4 * min(V, 2048) * D, 4 * rows * min(V, 2 * TILE_V))
    weight = V * D if trainable else 0
    rounded = 0 if width == 4 else width * (weight + (R * D if e_width > width else 0))
    return R * (ROW_BYTES + e_width * D) + 4 * weight + max(chunk, rounded)
