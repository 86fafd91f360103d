"""Passes over parameters; csrc/cuda/params.cu."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from redit_fast.backends.addresses import code, table
from redit_fast.backends.args import AdamwOptions, PerturbOptions, Rounding
from redit_fast.backends.cuda.module import compiled, device_of, run, view, views
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

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def _check_tensors(device: torch.device, **lists: Sequence[Tensor | None]) -> None:
    check_tensors("cuda", _FLOATS, device, **lists)


def _partials(sums: Tensor, tensors: list[Tensor]) -> Tensor:
    """Room for the sums of each chunk."""
    chunks = sum(-(-tensor.numel() // compiled.weights_per_chunk) for tensor in tensors)
    return sums.new_empty(sums.numel() * chunks)


def squared_norm(out: Tensor, tensors: list[Tensor]) -> None:
    """As `reference.squared_norm`, to 2.4e-7: up to 8 squares at a time are added in float32."""
    check_lists(tensors=tensors)
    check_sums("out", out, 1)
    _check_tensors(out.device, tensors=tensors)
    tensors, partials = contiguous(tensors), _partials(out, tensors)
    launches = compiled.squared_norm(view(out), table(tensors), view(partials), device_of(out))
    run(launches, out, partials, *tensors)
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
    if compute_dtype not in (None, torch.float64, *_FLOATS):
        raise NotImplementedError(f"compute_dtype {compute_dtype} has no CUDA version; use_backend('reference')")
    moved, slopes, partials = contiguous(params), contiguous(grads), _partials(sums, params)
    options = PerturbOptions(grad_factor, rounding, seed, code(compute_dtype))
    lists = table(moved), table(slopes), offsets
    launches = compiled.perturb(view(sums), *lists, views(scale, step), options, view(partials), device_of(sums))
    run(launches, sums, scale, step, partials, *moved, *slopes)
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
    firsts, combined, partials = contiguous(firsts), contiguous(grads), _partials(sums, grads)
    launches = compiled.combine(
        view(sums), table(firsts), table(combined), ratio, view(partials), device_of(sums)
    )  # fmt: skip
    run(launches, sums, partials, *firsts, *combined)
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
    for name, tensors in state.items():
        check_like(name, tensors, params, wide=True)
    _check_tensors(factor.device, params=params, grads=grads, **state)
    check_steps(steps, params, masters)
    written: tuple[Any, ...] = (params, masters, exp_avgs, exp_avg_sqs)
    work = [contiguous(tensors) for tensors in written]
    grads = contiguous(grads)
    p, master, m, v = map(table, work)
    lists = [p, master, table(grads), m, v, table(steps)]
    scalars = factor.new_empty(10 * len(steps), dtype=torch.float32)  # csrc/cuda/bindings_params.h says of what
    options = AdamwOptions(lr, beta1, beta2, eps, weight_decay)
    launches = compiled.adamw(lists, views(factor, finite), options, view(scalars), device_of(factor))
    run(launches, factor, finite, scalars, *steps, *grads, *(tensor for tensors in work for tensor in tensors))
    for originals, copies in zip(written, work, strict=True):
        finish(originals, copies)
    increment_version(steps)
