"""float32 arithmetic with one rounding, through float64, and what a GPU computes approximately."""

from fractions import Fraction

import numpy as np


def odd_sum(x, y):
    """x + y of float64; where that is not exact its last bit is odd, so that rounding it to float32 rounds once."""
    total = np.asarray(x + y)
    back = total - x
    lost = (x - (total - back)) + (y - back)
    bits = total.view(np.int64)
    move = np.where((lost != 0) & np.isfinite(total) & (bits & 1 == 0), np.where((lost > 0) == (total > 0), 1, -1), 0)
    return (bits + move).view(np.float64)


def fused(x, y, z):
    """x * y + z of float64 with one rounding, by fractions: 4 us each, for the few threads that end a row."""
    numbers = np.broadcast_arrays(x, y, z)
    near = np.array(numbers[0] * numbers[1] + numbers[2])
    for i in np.flatnonzero(np.isfinite(near)):
        a, b, c = (Fraction(float(each.flat[i])) for each in numbers)
        near.flat[i] = float(a * b + c) or near.flat[i]  # a zero keeps its sign
    return near


def gross_reciprocal(x):
    """rcp.approx.ftz.f64: of the upper 32 bits, and no lower ones."""
    upper = np.uint64(0xFFFFFFFF << 32)
    return (np.reciprocal((x.view(np.uint64) & upper).view(np.float64)).view(np.uint64) & upper).view(np.float64)


def rounded(x, modifiers):
    """float64 to float32: to nearest, rz, rm (down) or rp (up); then sat: to [0, 1], NaN to 0; ftz: no subnormals."""
    near = np.asarray(x).astype(np.float32)
    for name, wrong, to in (("rz", np.abs(near) > np.abs(x), 0), ("rm", near > x, -np.inf), ("rp", near < x, np.inf)):
        if name in modifiers:
            near = np.where(wrong, np.nextafter(near, np.float32(to)), near)
    if "sat" in modifiers:
        near = np.where(near > 0, np.minimum(near, np.float32(1)), np.float32(0))
    return flushed(near, modifiers)


def flushed(x, modifiers):
    if "ftz" not in modifiers:
        return x
    return np.where(np.abs(x) < np.finfo(np.float32).tiny, np.copysign(np.float32(0), x), x)


def approximate(exact, argument, ulps):
    """The float32 nearest to `exact`, moved by +ulps or -ulps: the argument's bits choose."""
    near = np.asarray(exact).astype(np.float32)
    up = np.asarray(argument).view(np.uint32) * np.uint32(2654435761) >> np.uint32(31)
    moved = (near.view(np.int32) + np.where(up, ulps, -ulps).astype(np.int32)).view(np.float32)
    return np.where((np.abs(near) > 1e-37) & (np.abs(near) < 1e38), moved, near)


def to_bfloat16(x):
    bits = x.view(np.uint32)
    return np.where(np.isnan(x), 0x7FFF, bits + 0x7FFF + (bits >> 16 & 1) >> 16).astype(np.uint16)


def to_integer(x, dtype):
    """The nearest that the type has of a whole number; NaN gives 0."""
    low, high = float(np.iinfo(dtype).min), float(np.iinfo(dtype).max)
    x = np.nan_to_num(x.astype(np.float64), nan=0.0)
    return np.where(x >= high, np.iinfo(dtype).max, np.clip(x, low, np.nextafter(high, 0)).astype(dtype))
