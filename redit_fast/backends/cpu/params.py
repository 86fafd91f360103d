"""Passes over parameters, csrc/cpu/params.cpp: tables of (address, dtype, elements) in, one call a pass."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from redit_fast.backends.addresses import code, table, view, views
from redit_fast.backends.args import AdamwOptions, PerturbOptions, Rounding
from redit_fast.backends.cpu.module import compiled, processor
from redit_fast.backends.lists import (
    check_like,
    check_lists,
    check_pairs,
    check_steps,
    check_tensors,
    contiguous,
    finish,
)

_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def _check_tensors(**lists: Sequence[Tensor | None]) -> None:
    check_tensors("cpu", _FLOATS, torch.device("cpu"), **lists)


def squared_norm(out: Tensor, tensors: list[Tensor]) -> None:
    """As `reference.squared_norm`, to 2.4e-7."""
    check_lists(tensors=tensors)
    _check_tensors(tensors=tensors)
    tensors = contiguous(tensors)  # held until the call returns
    compiled.squared_norm(view(out), table(tensors), processor())
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
    """As `reference.perturb`: the parameters bit for bit, the sums to 2.4e-7."""
    check_lists(params=params, grads=grads, offsets=offsets)
    check_like("grads", grads, params, wide=False)
    _check_tensors(params=params, grads=grads)
    if compute_dtype is not None and compute_dtype not in _FLOATS:
        raise NotImplementedError(f"compute_dtype {compute_dtype} has no C++ version; use_backend('reference') has it")
    moved, slopes = contiguous(params), contiguous(grads)
    numbers = views(scale, step)
    options = PerturbOptions(grad_factor, rounding, seed, code(compute_dtype))
    compiled.perturb(view(sums), table(moved), table(slopes), offsets, numbers, options, processor())
    increment_version(sums)
    finish(params, moved)
    if grad_factor != 1:
        finish(grads, slopes)


@torch.no_grad()
def combine(sums: Tensor, firsts: list[Tensor], grads: list[Tensor], ratio: float) -> None:
    """As `reference.combine`: the gradients bit for bit, the sums to 2.4e-7; both of one dtype."""
    check_lists(grads=grads, firsts=firsts)
    check_pairs(firsts, grads)
    _check_tensors(firsts=firsts, grads=grads)
    firsts, combined = contiguous(firsts), contiguous(grads)
    compiled.combine(view(sums), table(firsts), table(combined), ratio, processor())
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
    _check_tensors(params=params, grads=grads, **state)
    check_steps(steps, params, masters)
    written: tuple[Any, ...] = (params, masters, exp_avgs, exp_avg_sqs)
    work = [contiguous(tensors) for tensors in written]
    grads = contiguous(grads)
    p, master, m, v = map(table, work)
    lists = [p, master, table(grads), m, v, table(steps)]
    options = AdamwOptions(lr, beta1, beta2, eps, weight_decay)
    compiled.adamw(lists, views(factor, finite), options, processor())
    for originals, copies in zip(written, work, strict=True):
        finish(originals, copies)
    increment_version(steps)
