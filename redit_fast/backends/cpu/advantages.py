"""Dithered group advantages; csrc/cpu/advantages.cpp."""

from __future__ import annotations

from typing import cast

import torch
from torch.autograd.graph import increment_version

from redit_fast.backends.addresses import views
from redit_fast.backends.args import AdvantageInputs, AdvantageOptions, Advantages
from redit_fast.backends.cpu.module import compiled, processor


def group_advantages(outputs: Advantages, inputs: AdvantageInputs, options: AdvantageOptions) -> None:
    """As `reference.group_advantages`, bit for bit; every tensor contiguous."""
    rewards, groups, group_size, sample_ids, weights, half_range = inputs
    samples = torch.arange(len(rewards), device=rewards.device)
    groups = samples // cast(int, group_size) if groups is None else groups
    sample_ids = samples if sample_ids is None else sample_ids
    tensors = views(rewards, groups, sample_ids, weights, half_range)
    compiled.group_advantages(views(*outputs), tensors, options, processor())
    increment_version(outputs)
