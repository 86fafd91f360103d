"""Passes over parameters; kernels/params.py. Each dtype (and alignment) among the tensors is a launch of its own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from redit_fast.backends.args import AdamwOptions, Rounding
from redit_fast.backends.lists import (
    check_like,
    check_lists,
    check_pairs,
    check_steps,
    check_sums,
    check_tensors,
    contiguous,
    finish,
)
from redit_fast.kernels import launch
from redit_fast.kernels import params as kernels


def _check_tensors(device: torch.device, **lists: Sequence[Tensor | None]) -> None:
    check_tensors("triton", tuple(launch.TYPES), device, **lists)


def squared_norm(out: Tensor, tensors: list[Tensor]) -> None:
    """As `reference.squared_norm`, to 2.4e-7: 8 squares at a time are added in float32."""
    check_lists(tensors=tensors)
    check_sums("out", out, 1)
    _check_tensors(out.device, tensors=tensors)
    kernels.squared_norm(out, contiguous(tensors))
    increment_version(out)


@torch.no_grad()
def perturb(
    sums: Tensor,
    params: list[Tensor],
    grads: list[Tensor],
    offsets: list[int],
    scale: Tensor,
    grad_factor: float,
    rounding: Rounding,
    seed: int,
    step: Tensor,
    compute_dtype: torch.dtype | None,
) -> None:
    """As `reference.perturb`: the parameters bit for bit, the sums to 2.4e-7 as in squared_norm."""
    check_lists(params=params, grads=grads, offsets=offsets)
    check_sums("sums", sums, 4)
    check_like("grads", grads, params, wide=False)
    _check_tensors(sums.device, params=params, grads=grads)
    if compute_dtype not in (None, torch.float64, *launch.TYPES):
        raise NotImplementedError(f"compute_dtype {compute_dtype} has no Triton version; use_backend('reference')")
    moved, slopes = contiguous(params), contiguous(grads)
    stochastic = rounding == "stochastic"
    kernels.perturb(sums, moved, slopes, offsets, scale, grad_factor, stochastic, seed, step, compute_dtype)
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
    _check_tensors(sums.device, firsts=firsts, grads=grads)
    combined = contiguous(grads)
    kernels.combine(sums, contiguous(firsts), combined, ratio)
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
    state: dict[str, Sequence[Tensor | None]] = {"masters": masters, "exp_avgs": exp_avgs, "exp_avg_sqs": exp_avg_sqs}
    check_lists(optional="masters", params=params, grads=grads, steps=steps, **state)
    check_like("grads", grads, params, wide=False)
    written: tuple[Any, ...] = (params, masters, exp_avgs, exp_avg_sqs)
    for name, tensors in state.items():
        check_like(name, tensors, params, wide=True)
    _check_tensors(factor.device, params=params, grads=grads, **state)
    check_steps(steps, params, masters)
    p, w, m, v = (contiguous(tensors) for tensors in written)
    options = AdamwOptions(lr, beta1, beta2, eps, weight_decay)
    kernels.adamw(p, w, contiguous(grads), m, v, steps, factor, finite, options)
    for originals, copies in zip(written, (p, w, m, v), strict=True):
        finish(originals, copies)
    increment_version(steps)
