"""Log-probs and GRPO losses from hidden states; the (R, V) logits are never held.

`linear_logp` makes E (see `head`) forward and once more in backward, from the rows' sums that forward left.
`linear_grpo_loss` knows the coefficients of a token-level loss inside the chunk loop and takes both gradient products
at once: three products in all.
"""

from __future__ import annotations

from typing import Any, get_args

import torch
from torch import Tensor

from redit_fast.checks import check_apart, check_choice, check_flag, check_tensor, described, whole_number
from redit_fast.losses.config import LossConfig
from redit_fast.losses.policy import LossOutput, fused_metrics, rows_loss
from redit_fast.losses.rows import Rows
from redit_fast.losses.transforms import LogitTransform
from redit_fast.ops.autograd import as_in_forward, refuse_double_backward, refuse_second_backward, remember_backend
from redit_fast.ops.chunks import (
    TILE_V,
    e_dtype,
    linear_logp_,
    linear_logp_grad_,
    linear_loss_,
    new_gradients,
    outgoing,
    padded,
    rows_per_chunk,
)
from redit_fast.ops.targets import IGNORE, check_targets
from redit_fast.ops.token_loss import EntropyMode, LogpEntropy, as_gradients_are, detached, scale_in_place_

ROW_BYTES = 64  # of float32 numbers beside each row


def _refuse_parts(name: str, tensor: Any) -> None:
    """By name what is only partly here: further in it would be a wrong shape, or freed memory."""
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
    if getattr(tensor, "_fsdp_flattened", False) and tensor.ndim == 1:
        raise ValueError(
            f"{name} is a piece of FSDP1's, got shape {tuple(tensor.shape)}: run the loss inside `with "
            "FullyShardedDataParallel.summon_full_params(module):`, or leave the head out of what FSDP1 wraps by itself"
        )


def _check_head(hidden, weight, bias, targets, mask, validate) -> Tensor:
    """Checks the head's arguments; the targets flat, -100 where masked."""
    flat = check_targets("hidden", hidden, targets, mask, len(weight), validate)
    if weight.shape[1] != hidden.shape[-1]:
        raise ValueError(f"weight must have shape (V, {hidden.shape[-1]}) like hidden, got {tuple(weight.shape)}")
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is None:
            continue
        if tensor.dtype != hidden.dtype or tensor.device != hidden.device:
            raise TypeError(
                f"{name} must be {hidden.dtype} on {hidden.device} like hidden (or use autocast), "
                f"got {described(tensor)}"
            )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias must have shape ({len(weight)},), got {tuple(bias.shape)}")
    return flat


def _check_chunk_rows(chunk_rows: object) -> int | None:
    return None if chunk_rows is None else whole_number("chunk_rows", chunk_rows, 1)


def _check_parts(hidden: Any, weight: Any, bias: Any) -> None:
    check_tensor("hidden", hidden, "floating-point")
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is None and name == "bias":
            continue
        check_tensor(name, tensor, "floating-point")
        _refuse_parts(name, tensor)
    if weight.ndim != 2 or len(weight) < 1:
        raise ValueError(f"weight must have shape (V, D) with V at least 1, got {tuple(weight.shape)}")


def _autocast(*tensors: Any) -> tuple[Any, ...]:
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
    frozen head: two in all; where gradients are off: one). Rows whose upstream gradients are 0 skip those of the
    backward pass.

    Args:
        hidden: (..., D); weight: (V, D); bias: (V,) of one dtype, float32, bfloat16 or float16; autocast casts them. A
            head padded beyond the vocabulary is passed as weight[:V].
        targets, mask: (...), as in `token_logp`; masked rows cost nothing.
        entropy: "metric" also returns the entropy without graph, "grad" with.
        chunk_rows: rows per chunk, the only buffer of V columns; default: 256 MiB of it, 8192 rows at most. The
            gradient of the weight depends on it by float32 rounding, nothing else does.

    Returns:
        (...) float32, or the named tuple (logp, entropy) of two.

    Raises:
        ValueError, TypeError: an argument that does not fit, naming it.
    """
    transform = LogitTransform(temperature, logit_scale, softcap).check()
    check_choice("entropy", entropy, get_args(EntropyMode))
    chunk_rows = _check_chunk_rows(chunk_rows)
    _check_parts(hidden, weight, bias)
    hidden, weight, bias = _autocast(hidden, weight, bias)
    flat = _check_head(hidden, weight, bias, targets, mask, validate)
    hidden, weight, bias = as_gradients_are(hidden, weight, bias)
    logp, entropies = _LinearLogp.apply(hidden, weight, bias, flat, transform, entropy, chunk_rows)
    logp = logp.view(targets.shape)
    return logp if entropy == "none" else LogpEntropy(logp, entropies.view(targets.shape))


class _LinearLogp(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, targets, transform, entropy_mode, chunk_rows):
        remember_backend(ctx)
        needed = ctx.needs_input_grad[:3]
        # A frozen head has its gradient dlogp/dX ready after one more product, and backward none left.
        frozen = needed == (True, False, False) and entropy_mode != "grad"
        slopes = torch.zeros_like(hidden, dtype=torch.float32).view(-1, hidden.shape[-1]) if frozen else None
        logp = hidden.new_zeros(len(targets), dtype=torch.float32)
        entropy = None if entropy_mode == "none" else torch.zeros_like(logp)
        sums = logp.new_zeros(3, len(targets)) if any(needed) and not frozen else None
        linear_logp_(logp, entropy, sums, slopes, hidden, weight, bias, targets, transform, chunk_rows)
        kept_entropy = entropy if entropy_mode == "grad" else None
        ctx.save_for_backward(hidden, weight, bias, targets, slopes, sums, kept_entropy)
        ctx.transform, ctx.chunk_rows, ctx.entropy_mode = transform, chunk_rows, entropy_mode
        ctx.set_materialize_grads(False)
        if entropy_mode == "metric":
            ctx.mark_non_differentiable(entropy)
        return logp, entropy

    @staticmethod
    @as_in_forward
    def backward(ctx, grad_logp, grad_entropy):
        refuse_double_backward()
        hidden, weight, bias, targets, slopes, sums, entropy = ctx.saved_tensors
        if ctx.entropy_mode != "grad":  # torch.compile hands in zeros for an entropy without graph
            grad_entropy = None
        if grad_logp is None:
            grad_logp = torch.zeros(len(targets), dtype=torch.float32, device=hidden.device)
        if slopes is not None:
            rows = torch.where(grad_logp[:, None] == 0, 0.0, grad_logp[:, None] * slopes)
            return rows.to(hidden.dtype).view(hidden.shape), None, None, None, None, None, None
        grads = new_gradients(hidden, weight, bias, ctx.needs_input_grad[:3], ctx.chunk_rows)
        upstream = grad_logp, grad_entropy, sums, entropy
        linear_logp_grad_(*grads, *upstream, hidden, weight, bias, targets, ctx.transform, ctx.chunk_rows)
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
    masks_of: LossOutput | None = None,
    step: int = 0,
    seed: int = 0,
) -> LossOutput:
    """`grpo_loss` from hidden states (..., D) and the head's weight (V, D), without logits.

    Token-level losses take route "fused": three products, both gradients inside the forward chunk loop. The others go
    through `linear_logp` (route "logp", four products). Where gradients are off there is one product and no buffer for
    them. Arguments as in `linear_logp` and `policy_loss`; a target of
    -100 counts as masked; logp and entropy of the result are detached. A second backward through the fused route
    raises. On route "fused" the metric head/frac_rows_skipped is the share of the scored rows with a coefficient of 0,
    which skip the gradient products; on route "logp" it is absent, the coefficients come with the backward pass.

    Raises:
        ValueError, TypeError: an argument that does not fit, naming it.
    """
    chunk_rows = _check_chunk_rows(chunk_rows)
    _check_parts(hidden, weight, bias)
    hidden, weight, bias = _autocast(hidden, weight, bias)
    flat = _check_head(hidden, weight, bias, targets, mask, validate=False)
    mask = (flat != IGNORE).view(targets.shape)
    rows = Rows.check(targets, advantages, old_logp, ref_logp, sampling_logp, mask, cu_seqlens, config, normalizer,
                      step, seed, masks_of)  # fmt: skip
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
    hidden, weight, bias = as_gradients_are(hidden, weight, bias)
    loss, logp, entropy, skipped = _LinearGrpoLoss.apply(
        hidden, weight, bias, flat, rows, rows.weights(normalizer), chunk_rows
    )
    metrics = fused_metrics(rows, logp, entropy) | {"head/frac_rows_skipped": skipped}
    return LossOutput(loss, logp.view(targets.shape), entropy.view(targets.shape), metrics, "fused")


def _fused(grads, hidden, weight, bias, targets, rows: Rows, weights: Tensor, chunk_rows) -> tuple[Tensor, ...]:
    """Loss (), logp and entropy (R,) and the share of rows skipped (); adds into the gradients."""
    loss, skipped = weights.new_zeros(()), weights.new_zeros(())
    logp, entropy = weights.new_zeros(len(targets)), weights.new_zeros(len(targets))
    hidden_grad, weight_grad, bias_grad = grads
    linear_loss_(
        loss,
        logp,
        entropy,
        skipped,
        hidden_grad,
        weight_grad,
        bias_grad,
        hidden,
        weight,
        bias,
        targets,
        weights,
        rows.advantages,
        rows.old_logp,
        rows.ref_logp,
        rows.sampling_logp,
        rows.config.text,
        chunk_rows,
    )
    return loss, logp, entropy, skipped


class _LinearGrpoLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, targets, rows, weights, chunk_rows):
        remember_backend(ctx)
        grads = new_gradients(hidden, weight, bias, ctx.needs_input_grad[:3], chunk_rows)
        loss, logp, entropy, skipped = _fused(grads, hidden, weight, bias, targets, rows, weights, chunk_rows)
        ctx.grads = grads if hidden.dtype == torch.float16 else outgoing(grads, hidden.dtype)
        ctx.spent, ctx.dtype = False, hidden.dtype
        ctx.mark_non_differentiable(logp, entropy, skipped)
        return loss, logp, entropy, skipped

    @staticmethod
    @as_in_forward
    def backward(ctx, upstream, *_):
        refuse_double_backward()
        refuse_second_backward(ctx)
        grads, ctx.grads = ctx.grads, None  # autograd copies what is held here as well
        for grad in grads:
            if grad is not None:
                scale_in_place_(grad, upstream)
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
    masks_of: LossOutput | None = None,
    step: int = 0,
    seed: int = 0,
) -> tuple[LossOutput, Tensor]:
    """`linear_grpo_loss` without autograd: adds dL/dweight and dL/dbias in float32 into `weight_grad` (V, D) and
    `bias_grad` (V,), where given, and returns the loss with dL/dhidden, of the shape and dtype of `hidden`.

    Raises:
        ValueError, TypeError: an argument that does not fit, naming it.
    """
    chunk_rows = _check_chunk_rows(chunk_rows)
    _check_parts(hidden, weight, bias)
    flat = _check_head(hidden, weight, bias, targets, mask, validate=False)
    for name, grad, of in (("weight_grad", weight_grad, weight), ("bias_grad", bias_grad, bias)):
        if grad is None:
            continue
        check_tensor(name, grad, "floating-point")
        if of is None or grad.dtype != torch.float32 or grad.shape != of.shape or grad.device != of.device:
            shape = "no bias" if of is None else f"float32 {tuple(of.shape)} on {of.device}"
            raise ValueError(f"{name} must match {shape}, got {described(grad)}")
        check_apart(name, grad)
    mask = (flat != IGNORE).view(targets.shape)
    rows = Rows.check(targets, advantages, old_logp, ref_logp, sampling_logp, mask, cu_seqlens, config, normalizer,
                      step, seed, masks_of)  # fmt: skip
    hidden_grad: Any
    hidden_grad, *_ = new_gradients(hidden, weight, bias, (True, False, False), chunk_rows)
    grads = hidden_grad, weight_grad, bias_grad
    if rows.config.route == "fused":
        loss, logp, entropy, skipped = _fused(
            grads, hidden, weight, bias, flat, rows, rows.weights(normalizer), chunk_rows
        )
        metrics = fused_metrics(rows, logp, entropy) | {"head/frac_rows_skipped": skipped}
        out = LossOutput(loss, logp.view(targets.shape), entropy.view(targets.shape), metrics, "fused")
    else:
        leaves = [hidden.new_zeros(targets.shape, dtype=torch.float32, requires_grad=True) for _ in range(2)]
        head, sums = (hidden, weight, bias, flat, config.transform, chunk_rows), leaves[0].new_zeros(3, len(flat))
        logp, entropy = (leaf.detach().view(-1) for leaf in leaves)
        linear_logp_(logp, entropy, sums, None, *head)
        with torch.enable_grad():
            out = detached(rows_loss(rows, leaves[0], leaves[1], normalizer))
            g, h = torch.autograd.grad(out.loss, leaves, allow_unused=True)  # entropy, where it has no coefficient
        h = None if h is None else h.reshape(-1)
        linear_logp_grad_(hidden_grad, weight_grad, bias_grad, g.reshape(-1), h, sums, entropy, *head)
        out = out._replace(loss=out.loss.detach())
    return out, hidden_grad.to(hidden.dtype)


def estimate_memory(R: int, D: int, V: int, dtype: torch.dtype, trainable: bool, chunk_rows: int | None = None) -> int:
    """Peak bytes above the inputs that `linear_grpo_loss` and its backward pass take on route "fused", gradients
    included: dX, one chunk of rows, and, where the weight is `trainable`, dW with its float32 accumulator (in bfloat16
    only where the rows take more than one chunk). A CPU without AVX512_BF16 takes for bfloat16 a tile of 4096 columns
    of the weight and of the chunk more, in float32; a GPU takes whole chunks, so no less than one.

    Args:
        R: scored rows that have a coefficient; D: hidden size; V: vocabulary; dtype: of hidden and weight.
        trainable: whether the weight takes a gradient; the hidden states always do.
        chunk_rows: as in `linear_grpo_loss`.

    Raises:
        ValueError, TypeError: an argument that does not fit, naming it.
    """
    R, D, V = (whole_number(name, value, 1) for name, value in (("R", R), ("D", D), ("V", V)))
    chunk_rows = _check_chunk_rows(chunk_rows)
    check_flag("trainable", trainable)
    if not isinstance(dtype, torch.dtype) or dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise TypeError(f"dtype must be torch.float32, torch.bfloat16 or torch.float16, got {described(dtype)}")
    rows, width, e_width = min(padded(R), rows_per_chunk(V, dtype, chunk_rows)), dtype.itemsize, e_dtype(dtype).itemsize
    one_chunk = rows == padded(R)
    product, gradient = width * rows * D, 12 * rows * D  # copies of the chunk's hidden rows
    product += min(4 * rows * min(V, 1024), torch.get_num_threads() << 20)  # a tile of the logits
    if dtype == torch.float16:  # hidden rows and a tile of the weight in float32
        product += 4 * (rows + min(V, 1024)) * D
        gradient += 4 * min(V, TILE_V) * D
    chunk = e_width * rows * V + max(product, gradient)
    sums = (e_width if one_chunk else 4) * V * D if trainable else 0
    rounded = width * V * D if trainable and sums != width * V * D else 0
    if dtype == torch.float16:
        rounded += width * R * D
    return R * (ROW_BYTES + e_width * D) + sums + max(chunk, rounded)
