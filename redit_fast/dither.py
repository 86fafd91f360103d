"""Reward dithering (ReDit, arXiv 2506.18631): how much noise each reward gets, at which step. The noise itself is in
`noise`."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from redit_fast.checks import (
    LARGEST,
    as_float,
    check_choice,
    check_dense,
    check_seed,
    check_step,
    described,
    real_number,
    whole_number,
)
from redit_fast.noise import (
    Distribution,
)

DeadGroups = Literal["apply", "skip", "center_only", "only"]
Schedule = Literal[
    "constant",
    "square_root",
    "factor",
    "multi_factor",
    "cosine",
    "square_root_reverse",
    "factor_reverse",
    "multi_factor_reverse",
    "cosine_reverse",
]


@dataclass(frozen=True)
class Dither:
    """Zero-mean noise added to each reward before weighting and group normalisation.

    Args:
        distribution: "uniform" on (-a, a), or "gaussian" with standard deviation a / sqrt(3) (the same variance).
        level: relative half-range n0; a_k(t) = level(t) * reward_scale_k. 0 switches dithering off under every
            schedule.
        reward_scale: the full scale of each reward: a number, or K numbers for K reward functions.
        schedule: level over steps (the paper's vendored scripts; formulas in `level_at`), or a callable step -> level.
        total_steps: T of the `_reverse` schedules, which need it.
        dead_groups: what happens to a group whose clean weighted rewards are equal: "apply" dithers it like any other
            (the paper), "skip" gives it advantage 0, "center_only" divides by 1 instead of the standard deviation,
            "only" dithers dead groups alone.
        seed: in [0, 2**64).

    Raises:
        ValueError, TypeError: a field of another type or outside its range, naming it.
    """

    distribution: Distribution = "gaussian"
    level: float = 0.05
    reward_scale: float | Sequence[float] | Tensor = 1.0
    schedule: Schedule | Callable[[int], float] = "constant"
    total_steps: int | None = None
    dead_groups: DeadGroups = "apply"
    seed: int = 0

    def __post_init__(self) -> None:
        check_choice("distribution", self.distribution, get_args(Distribution))
        check_choice("dead_groups", self.dead_groups, get_args(DeadGroups))
        if not callable(self.schedule):
            check_choice("schedule", self.schedule, get_args(Schedule))
            if self.schedule.endswith("_reverse") and self.total_steps is None:
                raise ValueError(f"schedule={self.schedule!r} counts back from the end and needs total_steps")
        if self.total_steps is not None:
            object.__setattr__(self, "total_steps", whole_number("total_steps", self.total_steps, 1))
        object.__setattr__(self, "level", real_number("level", self.level, least=0))
        object.__setattr__(self, "seed", check_seed(self.seed))
        per_reward("reward_scale", self.reward_scale)

    def level_at(self, step: int) -> float:
        """level(t) of spec section 1, in float64 on the host; `step` in [0, 2**32)."""
        step = check_step(step)
        if self.level == 0:
            return 0.0
        if callable(self.schedule):
            return real_number(f"what schedule returns at step {step}", self.schedule(step), least=0)
        name, t = str(self.schedule), step
        if name.endswith("_reverse") and self.total_steps is not None:
            name, t = name.removesuffix("_reverse"), max(0, self.total_steps - step)
            if name == "cosine":
                return _half_cosine(self.level, min(t, 8000) / 8000)
        if name == "square_root":
            return self.level * (t / 300 + 1) ** -0.5
        if name == "factor":
            return max(1e-3, self.level * 0.99**t)
        if name == "multi_factor":
            return self.level * 0.5 ** bisect_right([2000, 4000, 6000, 8000], t)
        if name == "cosine":
            return self.level * t / 1000 if t < 1000 else _half_cosine(self.level, min(t - 1000, 7000) / 7000)
        return self.level


def _half_cosine(level: float, progress: float) -> float:
    return 1e-3 + (level - 1e-3) * (1 + math.cos(math.pi * progress)) / 2


# The door's questions: one sentence that names the argument, or the argument as the ops take it.


def per_reward(name: str, value: float | Sequence[float] | Tensor, count: int | None = None) -> Tensor:
    """`value` (a number, sequence, array or tensor of finite entries) as (count,) float64 on the CPU."""
    wanted = f"{name} must be a finite number or one finite number per reward, got"
    if isinstance(value, Tensor):
        check_dense(name, value)
        if value.dtype.is_complex or value.dtype == torch.bool or value.device.type == "meta":
            raise TypeError(f"{wanted} {described(value)}")
        if value.numel() == 0:
            raise ValueError(f"{wanted} {described(value)}")
        numbers = value.detach().to("cpu", torch.float64)
        readable = not torch.compiler.is_compiling()  # a graph cannot ask
        if numbers.ndim > 1 or (readable and not torch.isfinite(numbers).all()):
            raise ValueError(f"{wanted} {described(value) if numbers.ndim > 1 else numbers.tolist()}")
    else:
        plain: Any = value.tolist() if hasattr(value, "tolist") else value  # of numpy
        many = isinstance(plain, Sequence) and not isinstance(plain, str | bytes)
        if many and not plain:
            raise ValueError(f"{wanted} none")
        for each in plain if many else (plain,):
            if isinstance(each, bool) or not isinstance(each, Real):
                raise TypeError(f"{wanted} {described(each)}{' among them' if many else ''}")
            if not abs(as_float(each)) <= LARGEST:
                raise ValueError(f"{wanted} {described(each)}{' among them' if many else ''}")
        if not many:
            return torch.full(() if count is None else (count,), float(plain), dtype=torch.float64, device="cpu")
        numbers = torch.tensor([float(each) for each in plain], dtype=torch.float64, device="cpu")
    if count is None:
        return numbers
    if numbers.ndim == 1 and len(numbers) != count:
        raise ValueError(f"{name} has {len(numbers)} entries; rewards have {count} columns")
    return numbers.expand(count).contiguous()
