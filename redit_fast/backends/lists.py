"""Lists of tensors as the passes over parameters take them: checks, row-major copies, version counters."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

T = TypeVar("T", Tensor, Tensor | None)


def contiguous(tensors: list[T]) -> list[T]:
    """A transposed or channels-last tensor is read through a row-major copy: the rounding's counter is row-major."""
    return [tensor if tensor is None else tensor.contiguous() for tensor in tensors]


def finish(originals: Sequence[Tensor | None], written: Sequence[Tensor | None]) -> None:
    """Version counters of what was written, and row-major copies back to where they came from."""
    for original, copy in zip(originals, written, strict=True):
        if original is not None and copy is not None and copy is not original:
            original.copy_(copy)
    increment_version([original for original in originals if original is not None])


def check_lists(optional: str = "", **lists: Sequence[Tensor | int | None]) -> None:
    """Lists of one length, None only in the one named `optional`."""
    first, length = next((name, len(entries)) for name, entries in lists.items())
    for name, entries in lists.items():
        if len(entries) != length:
            raise ValueError(f"{name} must be as long as {first}, {length}, got {len(entries)}")
        if name != optional and any(entry is None for entry in entries):
            raise ValueError(f"{name} must hold no None, got one at index {entries.index(None)}")


def check_tensors(
    backend: str, dtypes: Sequence[torch.dtype], device: torch.device, **lists: Sequence[Tensor | None]
) -> None:
    """All on `device`, and of `dtypes`, those that the backend has a version for."""
    for name, tensors in lists.items():
        for tensor in tensors:
            if tensor is None:
                continue
            if tensor.device != device:
                raise ValueError(f"{name} must lie on {device} as the others do, got a tensor on {tensor.device}")
            if tensor.dtype not in dtypes:
                *most, last = (str(dtype).removeprefix("torch.") for dtype in dtypes)
                raise NotImplementedError(
                    f"{name} of {tensor.dtype}: the {backend} backend has {', '.join(most)} and {last}; "
                    "use_backend('reference') has every dtype"
                )


def check_sums(name: str, sums: Tensor, count: int) -> None:
    if sums.dtype != torch.float64 or sums.numel() != count or not sums.is_contiguous():
        raise ValueError(
            f"{name} must be {count} contiguous torch.float64, got {sums.dtype} {tuple(sums.shape)} with strides "
            f"{sums.stride()}"
        )


def check_like(name: str, tensors: Sequence[Tensor | None], params: list[Tensor], wide: bool) -> None:
    for tensor, param in zip(tensors, params, strict=True):
        if tensor is None:
            continue
        dtype = torch.promote_types(param.dtype, torch.float32)
        if tensor.shape != param.shape or (wide and tensor.dtype != dtype):
            raise ValueError(
                f"{name} must be {f'{dtype}, ' if wide else ''}of its parameter's shape {tuple(param.shape)}, "
                f"got {tensor.dtype} {tuple(tensor.shape)}"
            )


def check_pairs(firsts: list[Tensor], grads: list[Tensor]) -> None:
    for first, grad in zip(firsts, grads, strict=True):
        if first.shape != grad.shape or first.dtype != grad.dtype:
            raise ValueError(
                f"firsts must be of their gradient's dtype and shape {grad.dtype} {tuple(grad.shape)}, "
                f"got {first.dtype} {tuple(first.shape)}"
            )


def check_steps(steps: list[Tensor], params: list[Tensor], masters: list[Tensor | None]) -> None:
    for param, master, step in zip(params, masters, steps, strict=True):
        if step.dtype != torch.float32 or step.numel() != 1 or step.device != param.device:
            raise ValueError(f"steps must be float32 numbers on {param.device}, got {step.dtype} {tuple(step.shape)}")
        if master is None and param.dtype in (torch.bfloat16, torch.float16):
            raise ValueError(f"a {param.dtype} parameter needs a float32 master")
