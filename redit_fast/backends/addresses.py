"""Tensors as the compiled modules take them, for csrc/bindings/ to check."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from redit_fast.backends.args import DTYPES

View = tuple[int, int, int, int, int, int]
_ABSENT: View = (0, 0, 0, 0, 0, 0)
_CODES = {dtype: code for code, dtype in enumerate(DTYPES)}


def code(dtype: torch.dtype | None) -> int:
    """Its index among DTYPES; -1: none of them."""
    return -1 if dtype is None else _CODES.get(dtype, -1)


def view(tensor: Tensor | None, device: str = "cpu") -> View:
    """Address, dtype, rows, columns and their strides; 0s for None; one row for a vector or a number.

    Raises:
        ValueError: the tensor lies on another type of device, or has more than two dimensions.
    """
    if tensor is None:
        return _ABSENT
    dimensions = tensor.ndim
    there = tensor.is_cpu if device == "cpu" else tensor.device.type == device  # is_cpu makes no object
    if not there or dimensions > 2:
        raise ValueError(
            f"the backend needs tensors of at most two dimensions on {device}, got {tuple(tensor.shape)} on "
            f"{tensor.device}"
        )
    address, dtype = tensor.data_ptr(), _CODES.get(tensor.dtype, -1)
    if dimensions == 2:
        return (address, dtype, *tensor.shape, *tensor.stride())
    if dimensions == 1:
        return (address, dtype, 1, *tensor.shape, 1, *tensor.stride())
    return (address, dtype, 1, 1, 1, 1)


def table(tensors: Sequence[Tensor | None]) -> list[tuple[int, int, int]]:
    """Address, dtype and elements of each; 0s for None."""
    return [(0, 0, 0) if x is None else (x.data_ptr(), code(x.dtype), x.numel()) for x in tensors]


def views(*tensors: Tensor | None, device: str = "cpu") -> list[View]:
    return [view(tensor, device) for tensor in tensors]
