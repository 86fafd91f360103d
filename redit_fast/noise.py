"""The only random numbers: counter-based noise in plain PyTorch, a pure function of (seed, step, id, stream).

Philox4x32-10 as an integer counter generator, then a uniform or a Box-Muller transform in float64 that uses only
+ - * / sqrt and integer operations, so that every backend gives the same bits. `csrc/shared/element.h` holds the same
functions for C++ and CUDA; `tests/known_answers.json` pins both.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

STREAM_ROUNDING = 0x10000  # stochastic rounding of perturbed parameters
STREAM_SAMPLING = 0x10001  # token sampling: id = sample + (position << 32)
STREAM_CLIP_COV = 0x10002  # the tokens that clip_cov drops: id = index among the scored tokens of the call
MAX_REWARDS = 0x10000  # streams below are reward indices

Distribution = Literal["gaussian", "uniform"]

_MASK32 = 0xFFFFFFFF


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
