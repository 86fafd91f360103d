"""Reward dithering (ReDit, arXiv 2506.18631): noise levels, schedules and the counter-based noise itself, in plain
PyTorch.

The noise is a pure function of (seed, step, sample id, reward index): Philox4x32-10 as an integer counter generator,
then a uniform or a Box-Muller transform in float64 that uses only + - * / sqrt and integer operations, so that every
backend gives the same bits. `csrc/element.h` holds the same functions for C++ and CUDA; `tests/known_answers.json` pins
both.
"""

from __future__ import annotations

import math
import sys
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Literal, get_args

import torch
from torch import Tensor, nn

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
_LARGEST = sys.float_info.max
_A = {"real": "a real", "floating-point": "a floating-point", "integer": "an integer"}


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


# The door's questions: one sentence that names the argument, or the argument as the ops take it.


def described(value: object) -> str:
    """A value that does not fit in a few words: what a message says that it got."""
    if isinstance(value, Tensor):
        return f"a tensor of {value.dtype} with shape {tuple(value.shape)} on {value.device}"
    if value is None or isinstance(value, int | float | complex | str | torch.dtype):
        text = repr(value)
        return text if len(text) < 80 else f"{text[:80]}..."
    kind = type(value)
    return kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"


def whole_number(name: str, value: object, least: int = 0, bits: int = 63) -> int:
    """An int, Python's or numpy's, in [least, 2**bits), as Python's."""
    if isinstance(value, bool) or not isinstance(value, int):
        if isinstance(value, bool) or not isinstance(value, Integral):
            raise TypeError(f"{name} must be an int, got {described(value)}")
        value = int(value)
    if not least <= value < 1 << bits:
        wanted = f"at least {least}" if value < least and bits == 63 else f"in [{least}, 2**{bits})"
        raise ValueError(f"{name} must be {wanted}, got {described(value)}")
    return value


def real_number(
    name: str,
    value: object,
    *,
    least: float | None = None,
    above: float | None = None,
    most: float | None = None,
    finite: bool = True,
) -> float:
    """A number, Python's or numpy's, in its range, as Python's float. NaN is in none."""
    if isinstance(value, bool) or not isinstance(value, float | int):
        if isinstance(value, bool) or not isinstance(value, Real):
            raise TypeError(f"{name} must be a number, got {described(value)}")
        value = float(value)
    size = abs(value)
    if (
        not (size <= _LARGEST or (size == math.inf and not finite))
        or (least is not None and value < least)
        or (above is not None and value <= above)
        or (most is not None and value > most)
    ):
        bounds = (("finite", finite or None), ("at least {}", least), ("above {}", above), ("at most {}", most))
        wanted = " and ".join(text.format(bound) for text, bound in bounds if bound is not None)
        raise ValueError(f"{name} must be {wanted}, got {described(value)}")
    return float(value)


def check_flag(name: str, value: object) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be a bool, got {described(value)}")


def check_choice(name: str, value: object, choices: Sequence[str | None]) -> None:
    if value is not None and not isinstance(value, str):  # an array would be compared element by element
        raise TypeError(f"{name} must be one of {', '.join(map(repr, choices))}; got {described(value)}")
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}; got {value!r}")


def check_tensor(name: str, value: object, kind: Literal["real", "floating-point", "integer"]) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be {_A[kind]} tensor, got {described(value)}")
    dtype = value.dtype
    if kind == "floating-point":
        fits = dtype.is_floating_point
    else:
        fits = not dtype.is_complex and (kind == "real" or not (dtype.is_floating_point or dtype == torch.bool))
    if not fits:
        raise TypeError(f"{name} must be {_A[kind]} tensor, got {described(value)}")
    if value.device.type == "meta":
        raise TypeError(f"{name} must be on a device that holds its values, got {described(value)}")


def check_module(name: str, value: object) -> None:
    if not isinstance(value, nn.Module):
        raise TypeError(f"{name} must be a torch.nn.Module, got {described(value)}")


def check_seed(seed: object) -> int:
    return whole_number("seed", seed, bits=64)


def check_step(step: object) -> int:
    return whole_number("step", step, bits=32)


def per_reward(name: str, value: float | Sequence[float] | Tensor, count: int | None = None) -> Tensor:
    """`value` (a number, sequence, array or tensor of finite entries) as (count,) float64 on the CPU."""
    wanted = f"{name} must be a finite number or one finite number per reward, got"
    if isinstance(value, Tensor):
        if value.dtype.is_complex or value.dtype == torch.bool or value.device.type == "meta":
            raise TypeError(f"{wanted} {described(value)}")
        numbers = value.detach().to("cpu", torch.float64)
        readable = not torch.compiler.is_compiling()  # a graph cannot ask
        if numbers.ndim > 1 or (readable and not torch.isfinite(numbers).all()):
            raise ValueError(f"{wanted} {described(value) if numbers.ndim > 1 else numbers.tolist()}")
    else:
        plain = value.tolist() if hasattr(value, "tolist") else value  # of numpy
        many = isinstance(plain, Sequence) and not isinstance(plain, str | bytes)
        for each in plain if many else (plain,):
            if isinstance(each, bool) or not isinstance(each, Real):
                raise TypeError(f"{wanted} {described(each)}{' among them' if many else ''}")
            if not abs(each) <= _LARGEST:
                raise ValueError(f"{wanted} {described(each)}{' among them' if many else ''}")
        numbers = torch.tensor([float(each) for each in plain] if many else float(plain), dtype=torch.float64)
    if count is None:
        return numbers
    if numbers.ndim == 1 and len(numbers) != count:
        raise ValueError(f"{name} has {len(numbers)} entries; rewards have {count} columns")
    return numbers.expand(count).contiguous()


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
