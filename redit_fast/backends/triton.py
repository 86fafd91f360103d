"""The Triton backend: kernels/, compiled at first use. TRITON_INTERPRET=1, set before the first import, runs them on
CPU tensors, one program after the other."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from redit_fast.backends.lists import check_like, check_pairs, check_steps, contiguous, finish

try:
    from redit_fast.kernels import advantages, launch
    from redit_fast.kernels import params as passes

    _missing = None
except ImportError as error:
    _missing = f"Triton does not load ({error}); run `pip install triton`"

_OPS = ("group_advantages", "squared_norm", "perturb", "combine", "adamw")


def why_not(op: str, device: torch.device) -> str | None:
    if op not in _OPS:
        return f"{op} has no Triton version yet"
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
    groups: Tensor,
    sample_ids: Tensor,
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
    check_like("grads", grads, params, wide=False)
    written = (params, masters, exp_avgs, exp_avg_sqs)
    for name, state in zip(("params", "masters", "exp_avgs", "exp_avg_sqs"), written, strict=True):
        check_like(name, state, params, wide=name != "params")
        _check_tensors(name, state, factor.device)
    _check_tensors("grads", grads, factor.device)
    check_steps(steps, params, masters)
    p, w, m, v = (contiguous(tensors) for tensors in written)
    passes.adamw(p, w, contiguous(grads), m, v, steps, factor, finite, (lr, beta1, beta2, eps, weight_decay))
    for originals, copies in zip(written, (p, w, m, v), strict=True):
        finish(originals, copies)
    increment_version(steps)
