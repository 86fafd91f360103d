"""Dithered group advantages; kernels/advantages.py."""

from __future__ import annotations

from torch import Tensor
from torch.autograd.graph import increment_version

from redit_fast.kernels import advantages as kernels


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
    """As `reference.group_advantages`, bit for bit; every tensor contiguous, weights and half_range on the CPU."""
    outputs = (values, group_mean, group_std, dead, dithered_mean, dithered_std)
    kernels.group_advantages(
        *outputs,
        rewards,
        groups,
        group_size,
        sample_ids,
        weights.tolist(),
        None if half_range is None else half_range.tolist(),
        distribution == "gaussian",
        seed,
        step,
        dead_groups,
        baseline == "leave_one_out",
        scale,
        combine == "normalize_then_sum",
        eps,
        ddof,
    )
    increment_version(outputs)
