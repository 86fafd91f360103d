"""Reward dithering (ReDit, arXiv 2506.18631): noise levels, schedules and the counter-based noise itself, in plain
PyTorch.

The noise is a pure function of (seed, step, sample id, reward index): Philox4x32-10 as an integer counter generator,
then a uniform or a Box-Muller transform in float64 that uses only + - * / sqrt and integer operations, so that every
backend gives the same bits. `csrc/element.h` holds the same functions for C++ and CUDA; `tests/known_answers.json` pins
both.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

STREAM_ROUNDING = 0x10000  # stochastic rounding of perturbed parameters
STREAM_SAMPLING = 0x10001  # token sampling: id = sample + (position << 32)
STREAM_CLIP_COV = 0x10002  # the tokens that clip_cov drops: id = index among the scored tokens of the call
MAX_REWARDS = 0x10000  # streams below are reward indices

Distribution = Literal["gaussian", "uniform"]
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

_MASK32 = 0xFFFFFFFF


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
        ValueError, TypeError: a field outside its range, naming it.
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
        if self.total_steps is not None and self.total_steps < 1:
            raise ValueError(f"total_steps must be at least 1, got {self.total_steps}")
        if not (math.isfinite(self.level) and self.level >= 0):
            raise ValueError(f"level must be finite and at least 0, got {self.level}")
        check_seed(self.seed)
        per_reward("reward_scale", self.reward_scale)

    def level_at(self, step: int) -> float:
        """level(t) of spec section 1, in float64 on the host."""
        if self.level == 0:
            return 0.0
        if callable(self.schedule):
            level = float(self.schedule(step))
            if not (math.isfinite(level) and level >= 0):
                raise ValueError(f"schedule returned {level} at step {step}; it must be finite and at least 0")
            return level
        name, t = self.schedule, step
        if name.endswith("_reverse"):
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


def per_reward(name: str, value: float | Sequence[float] | Tensor, count: int | None = None) -> Tensor:
    """`value` (a number, sequence or tensor of finite entries) as (count,) float64 on the CPU; ValueError otherwise."""
    numbers = torch.as_tensor(value, dtype=torch.float64).detach().cpu()
    readable = not torch.compiler.is_compiling()  # a graph cannot ask
    if numbers.ndim > 1 or (readable and not torch.isfinite(numbers).all()):
        raise ValueError(f"{name} must be a finite number or one finite number per reward, got {value}")
    if count is None:
        return numbers
    if numbers.ndim == 1 and len(numbers) != count:
        raise ValueError(f"{name} has {len(numbers)} entries; rewards have {count} columns")
    return numbers.expand(count).contiguous()


def check_choice(name: str, value: object, choices: Sequence[str]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}; got {value!r}")


def check_seed(seed: int) -> None:
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise TypeError(f"seed must be an int, got {type(seed).__name__}")
    if not 0 <= seed < 2**64:
        raise ValueError(f"seed must be in [0, 2**64), got {seed}")


def check_step(step: int) -> None:
    if isinstance(step, bool) or not isinstance(step, int):
        raise TypeError(f"step must be an int, got {type(step).__name__}")
    if not 0 <= step < 2**32:
        raise ValueError(f"step must be in [0, 2**32), got {step}")


def philox4x32(seed: int, ids: Tensor, stream: int, step: int | Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox4x32-10 (Salmon et al., SC 2011) at key = seed, counter = (id lo, id hi, stream, step).

    `ids` is int64 of any shape; the four results hold uint32 words in int64 tensors of that shape.
    """
    c0, c1 = ids & _MASK32, (ids >> 32) & _MASK32
    c2, c3 = torch.zeros_like(ids) + stream, torch.zeros_like(ids) + step
    k0, k1 = seed & _MASK32, seed >> 32
    for _ in range(10):
        # The int64 products wrap modulo 2**64, so both 32-bit halves are those of the unsigned product.
        p0, p1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = (
            ((p1 >> 32) & _MASK32) ^ c1 ^ k0,
            p1 & _MASK32,
            ((p0 >> 32) & _MASK32) ^ c3 ^ k1,
            p0 & _MASK32,
        )
        k0, k1 = (k0 + 0x9E3779B9) & _MASK32, (k1 + 0xBB67AE85) & _MASK32
    return c0, c1, c2, c3


def counter_uniform(seed: int, ids: Tensor, stream: int, step: int) -> Tensor:
    """float64 in (0, 1) with 24 bits: ((x0 >> 8) + 0.5) / 2**24."""
    x0 = philox4x32(seed, ids, stream, step)[0]
    return ((x0 >> 8).double() + 0.5) * 2.0**-24


def counter_normal(seed: int, ids: Tensor, stream: int, step: int) -> Tensor:
    """Standard normal z rounded once to float32, by Box-Muller in float64 from the first two Philox words."""
    x0, x1, _, _ = philox4x32(seed, ids, stream, step)
    return box_muller(x0, x1).float()


def noise(distribution: Distribution, half_range: float, seed: int, ids: Tensor, stream: int, step: int) -> Tensor:
    """xi of spec section 1, float64 of the shape of `ids`."""
    if distribution == "uniform":
        return half_range * (2 * counter_uniform(seed, ids, stream, step) - 1)
    return (half_range / math.sqrt(3)) * counter_normal(seed, ids, stream, step).double()


def rounding_halves(seed: int, start: int, count: int, step: int | Tensor, device: torch.device) -> Tensor:
    """(count,) int64 random 16-bit halves for the weights at element offsets start, start + 1, ...: one Philox call per
    eight weights (id = offset // 8); the weight at offset % 8 takes half offset % 2, low first, of word (offset % 8) //
    2."""
    ids = torch.arange(start // 8, (start + count + 7) // 8, device=device)
    words = torch.stack(philox4x32(seed, ids, STREAM_ROUNDING, step), 1)
    halves = torch.stack([words & 0xFFFF, words >> 16], 2).flatten()
    return halves[start % 8 : start % 8 + count]


_LOG_SERIES = [1 / k for k in range(19, 0, -2)]  # atanh series of ln((1 + t) / (1 - t)) / (2 t), highest power first
_SIN_SERIES = [(-1) ** (k // 2) / math.factorial(k) for k in range(13, 0, -2)]
_COS_SERIES = [(-1) ** (k // 2) / math.factorial(k) for k in range(14, -1, -2)]


def _horner(coefficients: list[float], x: Tensor) -> Tensor:
    total = torch.full_like(x, coefficients[0])
    for coefficient in coefficients[1:]:
        total = total * x + coefficient
    return total


def exact_sqrt(x: Tensor) -> Tensor:
    """The correctly rounded square root of float64 x >= 0; torch's own errs in the last bit of 1.3 % of values on the
    CPU.

    One Newton step on the residual x - s * s, exact by Dekker's product.
    """
    s = torch.sqrt(x)
    c = 134217729.0 * s  # 2**27 + 1 splits s into halves of 26 bits
    high = c - (c - s)
    low = s - high
    residual = (x - high * high) - 2 * high * low - low * low
    return torch.where((s > 0) & torch.isfinite(s), s + residual / (2 * s), s)


def box_muller(x0: Tensor, x1: Tensor) -> Tensor:
    """sqrt(-2 ln u1) cos(theta) in float64, u1 = (2 x0 + 1) / 2**33, theta from x1; own log and sincos polynomials
    (log error 2e-15), so that no libm takes part and the bits are the same everywhere."""
    v = (2 * x0 + 1).double()  # exact: below 2**33
    mantissa, exponent = torch.frexp(v)  # v = mantissa * 2**exponent, mantissa in [0.5, 1)
    mantissa, exponent = mantissa * 2, exponent - 1
    high = mantissa > math.sqrt(2)
    mantissa = torch.where(high, mantissa * 0.5, mantissa)
    exponent = (exponent + high).double()
    t = (mantissa - 1) / (mantissa + 1)
    log = 2 * t * _horner(_LOG_SERIES, t * t) + (exponent - 33) * math.log(2)
    radius = exact_sqrt(-2 * log)

    quadrant = x1 >> 30
    phase = (((x1 & 0x3FFFFFFF).double() + 0.5) * 2.0**-30 - 0.5) * (math.pi / 2)
    h = phase * phase
    sin, cos = phase * _horner(_SIN_SERIES, h), _horner(_COS_SERIES, h)
    # theta = quadrant * pi/2 + pi/4 + phase. A tensor divides: CUDA multiplies by the reciprocal of a number.
    root2 = torch.full_like(cos, math.sqrt(2))
    value = torch.where(quadrant % 2 == 0, (cos - sin) / root2, (cos + sin) / root2)
    return radius * torch.where((quadrant == 1) | (quadrant == 2), -value, value)
