"""Dithered group advantages; csrc/cpu/advantages.cpp."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from redit_fast.backends.cpu.module import compiled, view


def group_advantages(
    values: Tensor,
    group_mean: Tensor,
    group_std: Tensor,
    dead: Tensor,
    dithered_mean: Tensor,
    dithered_std: Tensor,
    rewards: Tensor,
    groups: Tensor | None,
    group_size: int | None,
    sample_ids: Tensor | None,
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
    """As `reference.group_advantages`, bit for bit; every tensor contiguous."""
    outputs = (values, group_mean, group_std, dead, dithered_mean, dithered_std)
    samples = torch.arange(len(rewards))
    groups = samples // group_size if groups is None else groups
    sample_ids = samples if sample_ids is None else sample_ids
    compiled.group_advantages(
        *map(view, (*outputs, rewards, groups, sample_ids, weights, half_range)),
        distribution,
        seed,
        step,
        dead_groups,
        baseline,
        scale,
        combine,
        eps,
        ddof,
        torch.get_num_threads(),
    )
    increment_version(outputs)
