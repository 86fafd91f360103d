"""Log-probs and GRPO losses from logits: the target-anchored algorithm behind autograd."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from redit_fast.backends import primitive, reference
from redit_fast.checks import check_choice, check_flag, check_tensor, described
from redit_fast.losses.config import LossConfig
from redit_fast.losses.policy import LossOutput, fused_metrics, rows_loss
from redit_fast.losses.rows import Rows
from redit_fast.losses.transforms import LogitTransform
from redit_fast.ops.autograd import (
    as_in_forward,
    operator,
    refuse_double_backward,
    refuse_in_place,
    refuse_second_backward,
    remember_backend,
)
from redit_fast.ops.targets import IGNORE, check_targets

EntropyMode = Literal["none", "metric", "grad"]


class LogpEntropy(NamedTuple):
    logp: Tensor
    entropy: Tensor


def token_logp(
    logits: Tensor,
    targets: Tensor,
    *,
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    mask: Tensor | None = None,
    entropy: EntropyMode = "none",
    inplace_backward: bool = False,
    validate: bool = False,
) -> Tensor | LogpEntropy:
    """Log-probability of each target under softmax(z), z = softcap(logit_scale * logits) / temperature.

    Args:
        logits: (..., V) float32, bfloat16 or float16, any strides. Computed in float32; never modified unless
            `inplace_backward`.
        targets: (...) integers in [0, V). -100 gives 0 and no gradient; any other value outside gives NaN in its row.
        mask: (...) nonzero where scored; elsewhere logits and target are not read and the result is 0.
        entropy: "metric" also returns the entropy without graph, "grad" with.
        inplace_backward: the gradient overwrites `logits`, whose elements must not share memory.
            A second backward then raises.
        validate: raise on a target outside [0, V), with its position; waits for the device.

    Returns:
        (...) float32, or the named tuple (logp, entropy) of two.

    Raises:
        ValueError, TypeError: an argument that does not fit, naming it.
    """
    transform = LogitTransform(temperature, logit_scale, softcap).check()
    check_choice("entropy", entropy, get_args(EntropyMode))
    check_flag("inplace_backward", inplace_backward)
    flat = check_targets("logits", logits, targets, mask, None, validate)
    refuse_in_place("inplace_backward", inplace_backward, logits)
    logp, entropies = _TokenLogp.apply(logits.reshape(-1, logits.shape[-1]), flat, transform, entropy, inplace_backward)
    logp = logp.view(targets.shape)
    return logp if entropy == "none" else LogpEntropy(logp, entropies.view(targets.shape))


def as_gradients_are(*tensors: Any) -> tuple[Any, ...]:
    """Detached where gradients are off: `ctx.needs_input_grad` of an autograd.Function says yes to a leaf even then."""
    if torch.is_grad_enabled():
        return tensors
    return tuple(None if tensor is None else tensor.detach() for tensor in tensors)


@operator(mutates=("logp", "entropy", "sums"))
def token_logp_(
    logp: Tensor,
    entropy: Tensor | None,
    sums: Tensor,
    logits: Tensor,
    targets: Tensor,
    transform: LogitTransform,
) -> None:
    """Writes logp, entropy (R,) and what `token_logp_grad_` needs, sums (3, R), of logits (R, V)."""
    primitive(reference.token_logp, logits.device)(logp, entropy, sums, logits, targets, transform)


@operator(mutates=("grad_logits",))
def token_logp_grad_(
    grad_logits: Tensor,
    logits: Tensor,
    targets: Tensor,
    sums: Tensor,
    grad_logp: Tensor,
    grad_entropy: Tensor | None,
    entropy: Tensor | None,
    transform: LogitTransform,
) -> None:
    """Writes dL/dlogits (R, V), which may be the logits themselves, from the gradients (R,) of logp and entropy."""
    primitive(reference.token_logp_grad, logits.device)(
        grad_logits, logits, targets, sums, grad_logp, grad_entropy, entropy, transform
    )


@operator(mutates=("loss", "logp", "entropy", "grad_logits"))
def token_loss_(
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
    config: str,
    grad_scale: Tensor | None,
) -> None:
    """Writes loss (), logp and entropy (R,), and grad_scale times dL/dlogits (R, V), which may be the logits
    themselves. `config` is a `LossConfig.text`."""
    primitive(reference.token_loss, logits.device)(
        loss,
        logp,
        entropy,
        grad_logits,
        logits,
        targets,
        weights,
        advantages,
        old_logp,
        ref_logp,
        sampling_logp,
        LossConfig.of(config),
        grad_scale,
    )


class _TokenLogp(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, targets, transform, entropy, inplace):
        remember_backend(ctx)
        rows = len(targets)
        logp = logits.new_empty(rows, dtype=torch.float32)
        entropies = None if entropy == "none" else torch.empty_like(logp)
        sums = logp.new_empty(3, rows)
        token_logp_(logp, entropies, sums, logits, targets, transform)
        ctx.save_for_backward(logits, targets, sums, entropies if entropy == "grad" else None)
        ctx.transform, ctx.entropy_mode, ctx.inplace = transform, entropy, inplace
        ctx.set_materialize_grads(False)
        if entropy == "metric":
            ctx.mark_non_differentiable(entropies)
        return logp, entropies

    @staticmethod
    @as_in_forward
    def backward(ctx, grad_logp, grad_entropy):
        refuse_double_backward()
        logits, targets, sums, entropies = ctx.saved_tensors
        if ctx.entropy_mode != "grad":  # torch.compile hands in zeros for an entropy without graph
            grad_entropy = None
        if grad_logp is None:
            if grad_entropy is None:
                return None, None, None, None, None
            grad_logp = torch.zeros_like(grad_entropy)
        grad = logits.detach() if ctx.inplace else torch.empty_like(logits)
        token_logp_grad_(
            grad,
            logits.detach(),
            targets,
            sums,
            grad_logp.float().contiguous(),
            None if grad_entropy is None else grad_entropy.float().contiguous(),
            entropies,
            ctx.transform,
        )
        return grad, None, None, None, None


def grpo_loss(
    logits: Tensor,
    targets: Tensor,
    advantages: Tensor,
    *,
    old_logp: Tensor | None = None,
    ref_logp: Tensor | None = None,
    sampling_logp: Tensor | None = None,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    normalizer: float | Tensor | None = None,
    config: LossConfig,
    inplace: bool = False,
    grad_scale: Tensor | None = None,
    masks_of: LossOutput | None = None,
    step: int = 0,
    seed: int = 0,
) -> LossOutput:
    """`policy_loss` of the log-probs of `targets` under `logits` (already shifted), loss and gradient in one pass.

    Args:
        logits, targets, mask: as in `token_logp`, with config's temperature, logit_scale and softcap; a target of -100
            counts as masked.
        advantages, old_logp, ref_logp, sampling_logp, cu_seqlens, normalizer, masks_of, step, seed: as in
            `policy_loss`.
        inplace: the gradient overwrites `logits`, whose elements must not share memory, in the forward pass already.
        grad_scale: 0-d, the upstream gradient that backward will receive, for instance GradScaler's scale: the stored
            gradient is multiplied by it before it is rounded, the returned loss is not.

    Returns:
        `LossOutput`; logp and entropy are detached. Its route is "fused" where each row's coefficient depends on that
        row alone, "logp" otherwise. A second backward through the fused route raises.

    Raises:
        ValueError, TypeError: an argument that does not fit, naming it.
    """
    check_flag("inplace", inplace)
    flat = check_targets("logits", logits, targets, mask, None, validate=False)
    refuse_in_place("inplace", inplace, logits)
    mask = (flat != IGNORE).view(targets.shape)
    rows = Rows.check(targets, advantages, old_logp, ref_logp, sampling_logp, mask, cu_seqlens, config, normalizer,
                      step, seed, masks_of)  # fmt: skip
    if grad_scale is not None:
        check_tensor("grad_scale", grad_scale, "floating-point")
        if grad_scale.ndim != 0 or grad_scale.device != logits.device:
            raise ValueError(f"grad_scale must be a 0-d tensor on {logits.device}, got {described(grad_scale)}")
    if rows.config.route == "logp":
        logp, entropy = token_logp(
            logits,
            targets,
            mask=mask,
            entropy="grad" if config.entropy_coef != 0 else "metric",
            inplace_backward=inplace,
            **config.transform._asdict(),
        )
        return detached(rows_loss(rows, logp, entropy, normalizer))
    (logits,) = as_gradients_are(logits)
    loss, logp, entropy = _GrpoLoss.apply(
        logits.reshape(-1, logits.shape[-1]), flat, rows, rows.weights(normalizer), inplace, grad_scale
    )
    metrics = fused_metrics(rows, logp, entropy)
    return LossOutput(loss, logp.view(targets.shape), entropy.view(targets.shape), metrics, "fused")


def detached(out: LossOutput) -> LossOutput:
    return out._replace(logp=out.logp.detach(), entropy=None if out.entropy is None else out.entropy.detach())


@operator(mutates=("x",))
def scale_in_place_(x: Tensor, factor: Tensor) -> None:
    """x (..., n) times factor (), by a kernel that exits at once where that is 1."""
    primitive(reference.scale_in_place, x.device)(x.view(-1, x.shape[-1]), factor)


class _GrpoLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, targets, rows, weights, inplace, grad_scale):
        remember_backend(ctx)
        loss = logits.new_zeros((), dtype=torch.float32)
        logp = logits.new_empty(len(targets), dtype=torch.float32)
        entropy = torch.empty_like(logp)
        grad = None
        if ctx.needs_input_grad[0]:
            grad = logits.detach() if inplace else torch.empty_like(logits)
        token_loss_(
            loss,
            logp,
            entropy,
            grad,
            logits.detach(),
            targets,
            weights,
            rows.advantages,
            rows.old_logp,
            rows.ref_logp,
            rows.sampling_logp,
            rows.config.text,
            grad_scale,
        )
        ctx.grad, ctx.grad_scale, ctx.spent = grad, grad_scale, False
        ctx.mark_non_differentiable(logp, entropy)
        return loss, logp, entropy

    @staticmethod
    @as_in_forward
    def backward(ctx, upstream, *_):
        refuse_double_backward()
        refuse_second_backward(ctx)
        scale_in_place_(ctx.grad, upstream if ctx.grad_scale is None else upstream / ctx.grad_scale)
        return ctx.grad, None, None, None, None, None
