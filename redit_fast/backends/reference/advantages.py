"""Group advantages: everything in float64, sums in a fixed order, one rounding to float32 at the end."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from redit_fast.backends.args import AdvantageInputs, AdvantageOptions, Advantages
from redit_fast.noise import exact_sqrt, noise

DEAD_SPREAD = 1e-6
BATCH_BLOCK = 1024  # groups per partial sum of a batch-wide sum


class _Groups:
    """Sums over the members of each group, one member of every group at a time: in batch order whatever the layout."""

    def __init__(self, index: Tensor):
        self.index = index  # (N,) dense, in order of first appearance
        sizes = torch.bincount(index)
        self.count = len(sizes)
        order = torch.argsort(index, stable=True)
        place = torch.arange(len(index), device=index.device) - (torch.cumsum(sizes, 0) - sizes)[index[order]]
        self.rounds = order[torch.argsort(place, stable=True)].split(torch.bincount(place).tolist())

    def sum(self, x: Tensor) -> Tensor:
        total = x.new_zeros(self.count)
        for rows in self.rounds:
            total[self.index[rows]] += x[rows]
        return total

    def moments(self, x: Tensor, scored: Tensor, ddof: int) -> tuple[Tensor, Tensor, Tensor]:
        """Number, mean and two-pass standard deviation of the scored members; 0 where they are undefined."""
        n = self.sum(scored.double())
        mean = self.sum(torch.where(scored, x, 0.0)) / n.clamp(min=1)
        squares = self.sum(torch.where(scored, (x - mean[self.index]) ** 2, 0.0))
        return n, mean, torch.where(n > ddof, exact_sqrt(squares / (n - ddof).clamp(min=1)), 0.0)

    def batch_moments(self, x: Tensor, scored: Tensor, ddof: int) -> tuple[Tensor, Tensor]:
        n = scored.sum().double()
        mean = _blocked_sum(self.sum(torch.where(scored, x, 0.0))) / n.clamp(min=1)
        squares = _blocked_sum(self.sum(torch.where(scored, (x - mean) ** 2, 0.0)))
        return mean, torch.where(n > ddof, exact_sqrt(squares / (n - ddof).clamp(min=1)), 0.0)

    def dead(self, x: Tensor, scored: Tensor, n: Tensor, mean: Tensor) -> Tensor:
        extreme = x.new_full((self.count,), torch.inf)
        low = extreme.scatter_reduce(0, self.index, torch.where(scored, x, torch.inf), "amin")
        high = (-extreme).scatter_reduce(0, self.index, torch.where(scored, x, -torch.inf), "amax")
        return (n < 2) | (high - low <= DEAD_SPREAD * mean.abs().clamp(min=1))


def _blocked_sum(group_sums: Tensor) -> Tensor:
    blocks = torch.nn.functional.pad(group_sums, (0, -len(group_sums) % BATCH_BLOCK)).view(-1, BATCH_BLOCK)
    partial, total = group_sums.new_zeros(len(blocks)), group_sums.new_zeros(())
    for column in blocks.unbind(1)[: len(group_sums)]:
        partial = partial + column
    for block in partial:
        total = total + block
    return total


def _weighted_sum(rewards: Tensor, scored: Tensor, weights: Tensor) -> Tensor:
    total = rewards.new_zeros(len(rewards))
    for k, weight in enumerate(weights):
        total = total + torch.where(scored[:, k], weight * rewards[:, k], 0.0)
    return total


def _quotient(x: Tensor, divisor: Tensor) -> Tensor:
    return torch.where(divisor > 0, x / divisor, 0.0)


def group_advantages(outputs: Advantages, inputs: AdvantageInputs, options: AdvantageOptions) -> None:
    """Spec section 1."""
    rewards, groups, group_size, sample_ids, weights, half_range = inputs
    distribution, seed, step, dead_groups, baseline, scale, combine, eps, ddof = options
    samples = torch.arange(len(rewards), device=rewards.device)
    groups = samples // cast(int, group_size) if groups is None else groups
    sample_ids = samples if sample_ids is None else sample_ids
    batch, reward_count = _Groups(groups), rewards.shape[1]
    scored = torch.isfinite(rewards)
    any_scored = scored.any(1)

    def dithered_column(k: int, where: Tensor) -> Tensor:
        if half_range is None:
            return rewards[:, k]
        xi = noise(distribution, half_range[k].item(), seed, sample_ids, k, step)
        return torch.where(where[groups], rewards[:, k] + xi, rewards[:, k])

    def gets_noise(is_dead: Tensor) -> Tensor:
        if half_range is None:
            return torch.zeros_like(is_dead)
        return {"skip": ~is_dead, "only": is_dead}.get(dead_groups, torch.ones_like(is_dead))

    def divisor(std: Tensor, is_dead: Tensor) -> Tensor:
        return torch.where(is_dead, 1.0, std + eps) if dead_groups == "center_only" else std + eps

    clean = _weighted_sum(rewards, scored, weights)
    n, mean, std = batch.moments(clean, any_scored, ddof)
    if combine == "sum_then_normalize":
        is_dead = batch.dead(clean, any_scored, n, mean)
        noisy = gets_noise(is_dead)
        columns = torch.stack([dithered_column(k, noisy) for k in range(reward_count)], 1)
        dithered = _weighted_sum(columns, scored, weights)
        _, noisy_mean, noisy_std = batch.moments(dithered, any_scored, ddof)
        silent = (n < 2) | (is_dead & ~noisy)
        advantage = dithered - noisy_mean[groups]
        if baseline == "leave_one_out":
            advantage = advantage * n[groups] / (n - 1).clamp(min=1)[groups]
        if scale == "group":
            advantage = _quotient(advantage, divisor(noisy_std, is_dead)[groups])
        elif scale == "batch":
            _, batch_std = batch.batch_moments(dithered, any_scored, ddof)
            advantage = _quotient(advantage, divisor(batch_std.expand(batch.count), is_dead)[groups])
    else:  # GDPO: normalise every reward within its group, sum, normalise over the batch
        dithered_columns, normalised, dead_columns, silent_columns = [], [], [], []
        for k in range(reward_count):
            n_k, mean_k, _ = batch.moments(rewards[:, k], scored[:, k], ddof)
            dead_k = batch.dead(rewards[:, k], scored[:, k], n_k, mean_k)
            noisy_k = gets_noise(dead_k)
            column = dithered_column(k, noisy_k)
            _, mean_k, std_k = batch.moments(column, scored[:, k], ddof)
            silent_k = (n_k < 2) | (dead_k & ~noisy_k)
            z = _quotient(column - mean_k[groups], divisor(std_k, dead_k)[groups])
            dithered_columns.append(column)
            normalised.append(torch.where(silent_k[groups], 0.0, z))
            dead_columns.append(dead_k)
            silent_columns.append(silent_k)
        is_dead = torch.stack(dead_columns).all(0)
        silent = torch.stack(silent_columns).all(0)
        _, noisy_mean, noisy_std = batch.moments(
            _weighted_sum(torch.stack(dithered_columns, 1), scored, weights), any_scored, ddof
        )
        total = _weighted_sum(torch.stack(normalised, 1), scored, weights)
        batch_mean, batch_std = batch.batch_moments(total, any_scored, ddof)
        advantage = _quotient(total - batch_mean, batch_std + eps)

    outputs.values.copy_(torch.where(any_scored & ~silent[groups], advantage, 0.0))
    for out, statistic in zip(outputs[1:], (mean, std, is_dead, noisy_mean, noisy_std), strict=True):
        out.copy_(statistic[groups])
