"""The Triton backend: kernels/, compiled at first use. TRITON_INTERPRET=1, set before the first import, runs them on
CPU tensors, one program after the other."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from redit_fast.backends.lists import check_like, check_lists, check_pairs, check_steps, check_sums, contiguous, finish
from redit_fast.backends.rows import check_head, check_logits, check_matrix, check_rows, require, require_loss_rows
from redit_fast.losses.config import LossConfig
from redit_fast.losses.transforms import LogitTransform

try:
    from redit_fast.kernels import advantages, launch, rows
    from redit_fast.kernels import linear_loss as head
    from redit_fast.kernels import params as passes
    from redit_fast.kernels import token_loss as tokens

    _missing = None
except ImportError as error:
    _missing = f"Triton does not load ({error}); run `pip install triton`"


def why_not(op: str, device: torch.device) -> str | None:
    if _missing:
        return _missing
    if launch.INTERPRETED and device.type != "cpu":
        return f"computes on CPU tensors only while TRITON_INTERPRET is set, got {device}"
    if not launch.INTERPRETED and device.type != "cuda":
        return f"computes on CUDA tensors, and on CPU tensors under TRITON_INTERPRET=1 only, got {device}"
    return None


def group_advantages(
    values: Tensor,
    group_mean: Tensor,
    group_std: Tensor,
    dead: Tensor,
    dithered_mean: Tensor,
    dithered_std: Tensor,
    rewards: Tensor,
    groups: Tensor | None,
    group_size: int | None,
    sample_ids: Tensor | None,
    weights: Tensor,
    half_range: Tensor | None,
    distribution: str,
    seed: int,
    step: int,
    dead_groups: str,
    baseline: str,
    scale: str,
    combine: str,
    eps: float,
    ddof: int,
) -> None:
    """As `reference.group_advantages`, bit for bit; every tensor contiguous, weights and half_range on the CPU."""
    outputs = (values, group_mean, group_std, dead, dithered_mean, dithered_std)
    advantages.group_advantages(
        *outputs,
        rewards,
        groups,
        group_size,
        sample_ids,
        weights.tolist(),
        None if half_range is None else half_range.tolist(),
        distribution == "gaussian",
        seed,
        step,
        dead_groups,
        baseline == "leave_one_out",
        scale,
        combine == "normalize_then_sum",
        eps,
        ddof,
    )
    increment_version(outputs)


def token_logp(
    logp: Tensor, entropy: Tensor | None, sums: Tensor, logits: Tensor, targets: Tensor, transform: LogitTransform
) -> None:
    """As `reference.token_logp`; logp and entropy contiguous, so are the rows of sums."""
    check_logits(sums, None, logits, targets)
    check_rows(len(logits), logits, logp=logp, entropy=entropy)
    numbers = rows.transform_numbers(*transform)
    tokens.token_logp(logp, entropy, sums, logits, targets.contiguous(), numbers, transform.softcap is not None)
    increment_version((logp, sums) if entropy is None else (logp, entropy, sums))


def token_logp_grad(
    grad_logits: Tensor,
    logits: Tensor,
    targets: Tensor,
    sums: Tensor,
    grad_logp: Tensor,
    grad_entropy: Tensor | None,
    entropy: Tensor | None,
    transform: LogitTransform,
) -> None:
    """As `reference.token_logp_grad`; grad_logp, grad_entropy and entropy contiguous, so are the rows of sums."""
    require("grad_entropy", grad_entropy is not None, entropy=entropy)
    check_logits(sums, grad_logits, logits, targets)
    check_rows(len(logits), logits, grad_logp=grad_logp, grad_entropy=grad_entropy, entropy=entropy)
    numbers = rows.transform_numbers(*transform)
    inputs = logits, targets.contiguous(), sums, grad_logp, grad_entropy, entropy
    tokens.token_logp_grad(grad_logits, *inputs, numbers, transform.softcap is not None)
    increment_version(grad_logits)


_FORMS = {"gpg": "reinforce"} | {name: name for name in ("cispo", "sapo", "reinforce", "dppo_tv", "dppo_kl", "dro")}


def token_loss(
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
    config: LossConfig,
    grad_scale: Tensor | None,
) -> None:
    """As `reference.token_loss`; the rows' numbers (R,) float32."""
    require_loss_rows(config, ref_logp, sampling_logp)
    check_logits(None, grad_logits, logits, targets)
    inputs = [x if x is None else x.contiguous() for x in (weights, advantages, old_logp, ref_logp, sampling_logp)]
    names = ("weights", "advantages", "old_logp", "ref_logp", "sampling_logp")
    check_rows(len(logits), logits, logp=logp, entropy=entropy, **dict(zip(names, inputs, strict=True)))
    check_matrix("loss", loss, (), logits)
    if grad_scale is not None:
        check_matrix("grad_scale", grad_scale, (), logits, grad_scale.dtype)
    numbers = (
        *rows.transform_numbers(*config.transform),
        *config.clip_range,
        math.inf if config.delta is None else config.delta,
        math.inf if config.dual_clip is None else config.dual_clip,
        config.sapo_temperature_pos,
        config.sapo_temperature_neg,
        config.dro_beta or 0.0,
        config.beta,
        *config.correction_range,
    )
    tokens.token_loss(
        loss,
        logp,
        entropy,
        grad_logits,
        logits,
        targets.contiguous(),
        *inputs,
        grad_scale,
        numbers,
        _FORMS.get(config.loss_type, "clipped"),
        "none" if config.beta == 0 else config.kl,
        config.beta != 0 and config.kl_ratio_correction,
        config.correction,
        config.softcap is not None,
    )
    increment_version((loss, logp, entropy) if grad_logits is None else (loss, logp, entropy, grad_logits))


def scale_in_place(x: Tensor, factor: Tensor) -> None:
    """As `reference.scale_in_place`; x of at most two dimensions."""
    check_matrix("factor", factor, (), x, factor.dtype)
    tokens.scale_in_place(x.view(1, -1) if x.is_contiguous() else torch.atleast_2d(x), factor)
    increment_version(x)


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
    """As `reference.exp_product`; logp and entropy contiguous, so are the rows of sums."""
    check_head(e, sums, hidden, weight, bias, targets)
    check_rows(len(hidden), hidden, logp=logp, entropy=entropy)
    outputs, inputs = (e, logp, entropy, sums), (hidden, weight, bias, targets.contiguous())
    head.exp_product(*outputs, *inputs, rows.transform_numbers(*transform), transform.softcap is not None)
    increment_version([x for x in outputs if x is not None])


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
    """As `reference.exp_product_grad`; entropy and the gradients contiguous, so are the rows of sums."""
    require("grad_entropy", grad_entropy is not None, entropy=entropy)
    check_head(e, sums, hidden, weight, bias, targets)
    check_rows(len(hidden), hidden, entropy=entropy, grad_logp=grad_logp, grad_entropy=grad_entropy)
    inputs = hidden, weight, bias, targets.contiguous(), grad_logp, grad_entropy
    numbers = rows.transform_numbers(*transform)
    head.exp_product_grad(e, sums, entropy, *inputs, numbers, transform.softcap is not None)
    increment_version(e)


def addmm(out: Tensor, a: Tensor, b: Tensor) -> None:
    """As `reference.addmm`, by cuBLAS."""
    head.addmm(out, a, b)
    increment_version(out)


# Passes over parameters. Each dtype (and alignment) among the tensors is a launch of its own.


def _check_tensors(name: str, tensors: list[Tensor | None], device: torch.device) -> None:
    for tensor in tensors:
        if tensor is None:
            continue
        if tensor.device != device:
            raise ValueError(f"{name} must lie on {device} as the others do, got a tensor on {tensor.device}")
        if tensor.dtype not in launch.TYPES:
            raise NotImplementedError(
                f"{name} of {tensor.dtype}: the triton backend has float32, bfloat16 and float16; "
                "use_backend('reference') has every dtype"
            )


def squared_norm(out: Tensor, tensors: list[Tensor]) -> None:
    """As `reference.squared_norm`, to 2.4e-7: 8 squares at a time are added in float32."""
    check_lists(tensors=tensors)
    check_sums("out", out, 1)
    _check_tensors("tensors", tensors, out.device)
    passes.squared_norm(out, contiguous(tensors))
    increment_version(out)


@torch.no_grad()
def perturb(
    sums: Tensor,
    params: list[Tensor],
    grads: list[Tensor],
    offsets: list[int],
    scale: Tensor,
    grad_factor: float,
    rounding: str,
    seed: int,
    step: Tensor,
    compute_dtype: torch.dtype | None,
) -> None:
    """As `reference.perturb`: the parameters bit for bit, the sums to 2.4e-7 as in squared_norm."""
    check_lists(params=params, grads=grads, offsets=offsets)
    check_sums("sums", sums, 4)
    check_like("grads", grads, params, wide=False)
    _check_tensors("params", params, sums.device)
    _check_tensors("grads", grads, sums.device)
    if compute_dtype not in (None, torch.float64, *launch.TYPES):
        raise NotImplementedError(f"compute_dtype {compute_dtype} has no Triton version; use_backend('reference')")
    moved, slopes = contiguous(params), contiguous(grads)
    stochastic = rounding == "stochastic"
    passes.perturb(sums, moved, slopes, offsets, scale, grad_factor, stochastic, seed, step, compute_dtype)
    increment_version(sums)
    finish(params, moved)
    if grad_factor != 1:
        finish(grads, slopes)


@torch.no_grad()
def combine(sums: Tensor, firsts: list[Tensor], grads: list[Tensor], ratio: float) -> None:
    """As `reference.combine`: the gradients bit for bit, the sums to 2.4e-7; both of one dtype."""
    check_lists(grads=grads, firsts=firsts)
    check_sums("sums", sums, 3)
    check_pairs(firsts, grads)
    _check_tensors("grads", firsts + grads, sums.device)
    combined = contiguous(grads)
    passes.combine(sums, contiguous(firsts), combined, ratio)
    increment_version(sums)
    finish(grads, combined)


@torch.no_grad()
def adamw(
    params: list[Tensor],
    masters: list[Tensor | None],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    steps: list[Tensor],
    factor: Tensor,
    finite: Tensor,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
) -> None:
    """As `reference.adamw`, to the last bit or two of float32."""
    state = {"masters": masters, "exp_avgs": exp_avgs, "exp_avg_sqs": exp_avg_sqs}
    check_lists(optional="masters", params=params, grads=grads, steps=steps, **state)
    check_like("grads", grads, params, wide=False)
    written = (params, masters, exp_avgs, exp_avg_sqs)
    for name, tensors in state.items():
        check_like(name, tensors, params, wide=True)
    for name, tensors in {"params": params, "grads": grads, **state}.items():
        _check_tensors(name, tensors, factor.device)
    check_steps(steps, params, masters)
    p, w, m, v = (contiguous(tensors) for tensors in written)
    passes.adamw(p, w, contiguous(grads), m, v, steps, factor, finite, (lr, beta1, beta2, eps, weight_decay))
    for originals, copies in zip(written, (p, w, m, v), strict=True):
        finish(originals, copies)
    increment_version(steps)
