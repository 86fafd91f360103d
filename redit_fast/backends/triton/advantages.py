"""Dithered group advantages; kernels/advantages.py."""

from __future__ import annotations

from torch.autograd.graph import increment_version

from redit_fast.backends.args import AdvantageInputs, AdvantageOptions, Advantages
from redit_fast.backends.rows import check_advantages
from redit_fast.kernels import advantages as kernels


def group_advantages(outputs: Advantages, inputs: AdvantageInputs, options: AdvantageOptions) -> None:
    """As `reference.group_advantages`, bit for bit; every tensor contiguous, weights and half_range on the CPU."""
    check_advantages(outputs, inputs)
    kernels.group_advantages(outputs, inputs, options)
    increment_version(outputs)
