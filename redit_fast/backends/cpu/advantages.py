"""Dithered group advantages; csrc/cpu/advantages.cpp."""

from __future__ import annotations

from torch.autograd.graph import increment_version

from redit_fast.backends.addresses import views
from redit_fast.backends.args import AdvantageInputs, AdvantageOptions, Advantages
from redit_fast.backends.cpu.module import compiled, processor


def group_advantages(outputs: Advantages, inputs: AdvantageInputs, options: AdvantageOptions) -> None:
    """As `reference.group_advantages`, bit for bit; every tensor contiguous."""
    rewards, groups, group_size, sample_ids, weights, half_range = inputs
    tensors = views(rewards, groups, sample_ids, weights, half_range)
    consecutive = group_size or 0 if groups is None else 0
    compiled.group_advantages(views(*outputs), tensors, options, consecutive, processor())
    increment_version(outputs)
