"""Dithered group advantages; csrc/cuda/advantages.cu."""

from __future__ import annotations

import torch
from torch.autograd.graph import increment_version

from redit_fast.backends import addresses
from redit_fast.backends.args import AdvantageInputs, AdvantageOptions, Advantages
from redit_fast.backends.cuda.module import compiled, device_of, run, views
from redit_fast.backends.rows import check_advantages


def group_advantages(outputs: Advantages, inputs: AdvantageInputs, options: AdvantageOptions) -> None:
    """As `reference.group_advantages`, bit for bit; every tensor contiguous, weights and half_range on the CPU."""
    check_advantages(outputs, inputs)
    rewards, groups, group_size, sample_ids, weights, half_range = inputs
    if groups is not None:
        group_size = None
    order = starts = room = None
    if groups is not None:
        by_group, order = torch.sort(groups, stable=True)
        starts = torch.searchsorted(by_group, torch.arange(len(rewards) + 1, device=rewards.device))
    if options.scale == "batch" or options.combine == "normalize_then_sum":
        count = len(rewards) // (group_size or 1)
        room = rewards.new_empty(count * (3 * rewards.shape[1] + 2) + 3)  # csrc/cuda/bindings_cuda.cpp says of what
    tensors = views(rewards, groups, sample_ids) + addresses.views(weights, half_range)
    scratch, device = (order, starts, room), device_of(rewards)
    launches = compiled.group_advantages(views(*outputs), tensors, options, views(*scratch), group_size or 0, device)
    run(launches, *outputs, rewards, groups, sample_ids, *scratch)
    increment_version(outputs)
