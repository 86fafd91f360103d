"""What travels packed from an op to the backends, each a named tuple. Where csrc/shared/args.h has a struct of the same
name, its fields are these in this order."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from redit_fast.dither import DeadGroups
from redit_fast.noise import Distribution

Baseline = Literal["mean", "leave_one_out"]
Scale = Literal["group", "batch", "none"]
Combine = Literal["sum_then_normalize", "normalize_then_sum"]
Rounding = Literal["stochastic", "nearest"]

# Dtype of csrc/shared/dtype.h: an index into this.
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.bool)


class Advantages(NamedTuple):
    """Every field is (N,), float32 but `dead` (bool); the statistics are those of the sample's own group."""

    values: Tensor
    group_mean: Tensor  # of the clean weighted rewards
    group_std: Tensor
    dead: Tensor  # clean rewards all equal, or fewer than two samples scored
    dithered_mean: Tensor
    dithered_std: Tensor


class AdvantageInputs(NamedTuple):
    rewards: Tensor  # (N, K) float64, NaN or inf for unscored
    groups: Tensor | None  # (N,) int64 dense in order of first appearance; None: of group_size consecutive samples each
    group_size: int | None
    sample_ids: Tensor | None  # (N,) int64; None: arange(N)
    weights: Tensor  # (K,) float64, on the CPU, as half_range
    half_range: Tensor | None  # (K,); None: no dither


class AdvantageOptions(NamedTuple):
    distribution: Distribution
    seed: int  # in [0, 2**64)
    step: int  # in [0, 2**32)
    dead_groups: DeadGroups
    baseline: Baseline
    scale: Scale
    combine: Combine
    eps: float
    ddof: int


class PerturbOptions(NamedTuple):
    grad_factor: float
    rounding: Rounding
    seed: int  # in [0, 2**64)
    compute_dtype: int  # an index into DTYPES; -1: each parameter's own


class AdamwOptions(NamedTuple):
    lr: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
