"""float32 arithmetic with one rounding, through float64, and what a GPU computes approximately."""

import numpy as np

from tests.ptx.parse import Fault


def exact_sum(x, y):
    """x + y of float64, and what rounding it lost."""
    total = np.asarray(x + y)
    back = total - x
    return total, (x - (total - back)) + (y - back)


def exact_product(x, y):
    """x y of float64, and what rounding it lost; below 2^900 and above 2^-900."""
    halves = []
    for number in (x, y):
        wide = number * 134217729.0
        high = wide - (wide - number)
        halves.append((high, number - high))
    (a, b), (c, d) = halves
    return x * y, ((a * c - x * y) + a * d + b * c) + b * d


def odd_sum(x, y):
    """x + y of float64; where that is not exact its last bit is odd, so that rounding it to float32 rounds once."""
    total, lost = exact_sum(x, y)
    bits = total.view(np.int64)
    move = np.where((lost != 0) & np.isfinite(total) & (bits & 1 == 0), np.where((lost > 0) == (total > 0), 1, -1), 0)
    return (bits + move).view(np.float64)


def fused(x, y, z):
    """x y + z of float64 with one rounding (Boldo and Melquiond 2008)."""
    plain, product = x * y + z, np.abs(x * y)
    numbers = np.isfinite(plain) & (x != 0) & (y != 0)
    largest = np.maximum(np.maximum(np.abs(x), np.abs(y)), np.maximum(np.abs(z), product))
    if np.count_nonzero(numbers & ((product < 2.0**-900) | (largest > 2.0**900))):
        raise Fault("unknown: a fused multiply-add of float64 beyond 2^900 or below 2^-900")
    high, low = exact_product(x, y)
    upper, lost = exact_sum(z, low)
    total, rest = exact_sum(high, upper)
    return np.where(numbers, total + odd_sum(lost, rest), plain)


def gross_reciprocal(x):
    """rcp.approx.ftz.f64: of the upper 32 bits, and no lower ones."""
    upper = np.uint64(0xFFFFFFFF << 32)
    return (np.reciprocal((x.view(np.uint64) & upper).view(np.float64)).view(np.uint64) & upper).view(np.float64)


def fused_float(x, y, z):
    """x y + z of float32 with one rounding: float64 rounds it first, which shows halfway between two of float32."""
    product = x.astype(np.float64) * y
    total = product + z
    halfway = total.view(np.int64) & 0x1FFFFFFF == 0x10000000
    if np.count_nonzero(halfway | (np.abs(total) < 2.0**-125) & (total != 0)):  # where the spacing is another
        total = odd_sum(product, z.astype(np.float64))
    return total.astype(np.float32)


TOO_FAR = {  # where the nearest is on the wrong side, and where the next one lies
    "rz": (lambda near, x: np.abs(near) > np.abs(x), 0),
    "rm": (lambda near, x: near > x, -np.inf),
    "rp": (lambda near, x: near < x, np.inf),
}


def rounded(x, modifiers):
    """float64 to float32: to nearest, rz, rm (down) or rp (up); then sat: to [0, 1], NaN to 0."""
    near = np.asarray(x).astype(np.float32)
    for name in TOO_FAR.keys() & set(modifiers):
        wrong, towards = TOO_FAR[name]
        near = np.where(wrong(near, x), np.nextafter(near, np.float32(towards)), near)
    return np.where(near > 0, np.minimum(near, np.float32(1)), np.float32(0)) if "sat" in modifiers else near


def flushed(x):
    small = x.dtype == np.float32 and np.abs(x) < np.finfo(np.float32).tiny
    return np.where(small, np.copysign(np.float32(0), x), x) if np.count_nonzero(small) else x


def flushing(compute):
    """ftz: float32 has no subnormal numbers, neither before nor after."""
    return lambda *numbers: flushed(compute(*map(flushed, numbers)))


def approximate(exact, argument, ulps):
    """The float32 nearest to `exact`, moved by +ulps or -ulps: the argument's bits choose."""
    near = np.asarray(exact).astype(np.float32)
    if ulps == 0:
        return near
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
