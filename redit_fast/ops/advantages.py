"""Dithered group advantages: ReDit (arXiv 2506.18631) on the advantage estimators of the GRPO family."""

from __future__ import annotations

from collections.abc import Sequence
from typing import get_args

import torch
from torch import Tensor

from redit_fast.backends import primitive, reference
from redit_fast.backends.args import AdvantageInputs, AdvantageOptions, Advantages, Baseline, Combine, Scale
from redit_fast.checks import check_choice, check_dense, check_step, check_tensor, described, real_number, whole_number
from redit_fast.dither import Dither, per_reward
from redit_fast.noise import MAX_REWARDS
from redit_fast.ops.autograd import operator

_NO_NOISE = Dither(level=0.0)


def group_advantages(
    rewards: Tensor,
    *,
    group_size: int | None = None,
    group_ids: Tensor | None = None,
    reward_weights: float | Sequence[float] | Tensor | None = None,
    dither: Dither | None = None,
    step: int = 0,
    sample_ids: Tensor | None = None,
    baseline: Baseline = "mean",
    scale: Scale = "group",
    combine: Combine = "sum_then_normalize",
    eps: float = 1e-4,
    ddof: int = 1,
) -> Advantages:
    """Advantages A = (r~ - baseline) / scale of N completions, r~ the weighted sum of K dithered rewards.

    Dithering (`Dither`) adds independent zero-mean noise to every reward of every sample before weights and centring;
    the dithered rewards never leave this function. With a group standard deviation as scale, a group of equal rewards
    gets full-size random advantages at any level (rms 0.93 for 8 samples): `Dither.dead_groups` chooses what happens to
    it.

    Args:
        rewards: (N,) or (N, K), any real dtype, read into float64. NaN or infinite means unscored: the sample's
            weighted sum runs over its other rewards; a sample with none gets advantage 0 and is left out of mean and
            deviation.
        group_size: consecutive samples per group; or
        group_ids: (N,) integers, any values, sizes and order.
        reward_weights: one number, or one per reward; default 1.
        dither: None for none.
        step: in [0, 2**32); moves the noise and its schedule.
        sample_ids: (N,) int64 that name the samples in the noise counter; default arange(N). Required when
            torch.distributed runs with more than one rank, where every rank would otherwise draw the same noise.
        baseline: the group's mean, or the mean of the sample's siblings ("leave_one_out").
        scale: divide by the group's standard deviation, the batch's, or by nothing.
        combine: "sum_then_normalize", or "normalize_then_sum" (GDPO: every reward normalised within its group, summed,
            then normalised over the batch; baseline and scale must keep their defaults).
        eps: added to the standard deviation. TRL 1.16 uses 1e-4, verl 1e-6.
        ddof: 1 divides the squared deviations by n - 1, 0 by n.

    Returns:
        `Advantages`, on the device of `rewards`. The same bits from every backend, whatever the order of the groups.

    Raises:
        ValueError, TypeError: an argument that does not fit, naming it, before anything is computed.
    """
    _check(rewards, group_ids, sample_ids, dither, baseline, scale, combine)
    group_size = _checked_group_size(group_size, group_ids, len(rewards))
    eps, ddof, step = real_number("eps", eps, least=0), whole_number("ddof", ddof), check_step(step)
    if ddof > 1:
        raise ValueError(f"ddof must be 0 or 1, got {ddof}")
    device, count = rewards.device, len(rewards)
    values = rewards.detach().to(torch.float64)
    values = (values if values.ndim == 2 else values[:, None]).contiguous()
    reward_count = values.shape[1]
    weights = per_reward("reward_weights", 1.0 if reward_weights is None else reward_weights, reward_count)
    half_range = None
    if dither is not None:
        reward_scale = per_reward("reward_scale", dither.reward_scale, reward_count)
        level = dither.level_at(step)
        half_range = level * reward_scale if level > 0 else None
    if half_range is not None and sample_ids is None and _world_size() > 1:
        raise ValueError("sample_ids is required with more than one rank: otherwise every rank draws the same noise")

    out = Advantages(
        *(torch.empty(count, dtype=torch.bool if name == "dead" else torch.float32, device=device)
          for name in Advantages._fields)
    )  # fmt: skip
    if count:
        settings = dither or _NO_NOISE
        inputs = AdvantageInputs(
            values,
            None if group_ids is None else _dense_groups(group_ids),
            group_size,
            None if sample_ids is None else sample_ids.contiguous(),
            weights,
            half_range,
        )
        seed = settings.seed - (settings.seed >> 63 << 64)  # operators take 64 bits with a sign
        options = AdvantageOptions(
            settings.distribution, seed, step, settings.dead_groups, baseline, scale, combine, eps, ddof
        )
        group_advantages_(out, inputs, options)
    return out


@operator(mutates=("outputs",))
def group_advantages_(outputs: Advantages, inputs: AdvantageInputs, options: AdvantageOptions) -> None:
    """A seed of 2**63 or more comes as seed - 2**64."""
    if options.seed < 0:
        options = options._replace(seed=options.seed + 2**64)
    primitive(reference.group_advantages, inputs.rewards.device)(outputs, inputs, options)


def _check(rewards, group_ids, sample_ids, dither, baseline, scale, combine) -> None:
    check_tensor("rewards", rewards, "real")
    if rewards.ndim not in (1, 2) or (rewards.ndim == 2 and not 1 <= rewards.shape[1] <= MAX_REWARDS):
        raise ValueError(f"rewards must have shape (N,) or (N, K) with K at least 1, got {tuple(rewards.shape)}")
    for name, ids in (("group_ids", group_ids), ("sample_ids", sample_ids)):
        if ids is None:
            continue
        if not isinstance(ids, Tensor) or ids.dtype != torch.int64:
            raise TypeError(f"{name} must be an int64 tensor, got {described(ids)}")
        check_dense(name, ids)
        if ids.shape != rewards.shape[:1] or ids.device != rewards.device:
            raise ValueError(f"{name} must have shape ({len(rewards)},) on {rewards.device}, got {described(ids)}")
    if dither is not None and not isinstance(dither, Dither):
        raise TypeError(f"dither must be a Dither, got {described(dither)}")
    check_choice("baseline", baseline, get_args(Baseline))
    check_choice("scale", scale, get_args(Scale))
    check_choice("combine", combine, get_args(Combine))
    if combine == "normalize_then_sum" and (baseline, scale) != ("mean", "group"):
        raise ValueError("combine='normalize_then_sum' needs the default baseline='mean' and scale='group'")


def _checked_group_size(group_size: object, group_ids: Tensor | None, count: int) -> int | None:
    if (group_size is None) == (group_ids is None):
        got = f"{described(group_size)} and {described(group_ids)}"
        raise ValueError(f"exactly one of group_size and group_ids must be given, got {got}")
    if group_size is None:
        return None
    group_size = whole_number("group_size", group_size, 1)
    if count % group_size:
        raise ValueError(f"group_size must divide the number of rewards, {count}, got {group_size}")
    return group_size


def _dense_groups(group_ids: Tensor) -> Tensor:
    """(N,) group index in order of first appearance."""
    count, device = len(group_ids), group_ids.device
    by_id, order = torch.sort(group_ids, stable=True)
    index = torch.zeros_like(order)
    index[order[1:]] = (by_id[1:] != by_id[:-1]).cumsum(0)
    first = torch.full((count,), count, dtype=torch.int64, device=device)
    first = first.scatter_reduce(0, index, torch.arange(count, device=device), "amin")
    return torch.argsort(torch.argsort(first))[index]


def _world_size() -> int:
    distributed = torch.distributed
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1
