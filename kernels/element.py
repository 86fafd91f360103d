"""Per-element maths as `@triton.jit` helpers, the twins of csrc/shared/element.h; redit_fast/noise.py is the
definition."""

import triton
import triton.language as tl

# Triton's interpreter truncates to bfloat16 and errs on its subnormal numbers: there both conversions are of bits.
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def philox4x32(seed, ids, stream, step):
    """Philox4x32-10: key = seed, counter = (id lo, id hi, stream, step). Four uint32 words shaped like `ids` (int64).

    `seed` is an int64 holding the seed's 64 bits, read from memory: Triton types an integer argument by its value.
    """
    c0 = ids.to(tl.uint32)
    c1 = (ids >> 32).to(tl.uint32)
    c2 = (ids * 0 + stream).to(tl.uint32)
    c3 = (ids * 0 + step).to(tl.uint32)
    k0 = seed.to(tl.uint32)
    k1 = (seed >> 32).to(tl.uint32)
    for _ in tl.static_range(10):
        p0 = c0.to(tl.uint64) * 0xD2511F53
        p1 = c2.to(tl.uint64) * 0xCD9E8D57
        c0 = (p1 >> 32).to(tl.uint32) ^ c1 ^ k0
        c1 = p1.to(tl.uint32)
        c2 = (p0 >> 32).to(tl.uint32) ^ c3 ^ k1
        c3 = p0.to(tl.uint32)
        k0 += 0x9E3779B9
        k1 += 0xBB67AE85
    return c0, c1, c2, c3


@triton.jit
def uniform(x0):
    """float64 in (0, 1) with 24 bits."""
    return ((x0 >> 8).to(tl.float64) + 0.5) * (1.0 / 16777216.0)


@triton.jit
def box_muller(x0, x1):
    """sqrt(-2 ln u1) cos(theta) in float64, u1 = (2 x0 + 1) / 2^33, theta from x1."""
    v = 2.0 * x0.to(tl.float64) + 1.0  # exact: below 2^33
    bits = v.to(tl.int64, bitcast=True)
    exponent = ((bits >> 52) - 1023).to(tl.float64)
    mantissa = ((bits & 0xFFFFFFFFFFFFF) | 0x3FF0000000000000).to(tl.float64, bitcast=True)
    high = mantissa > 1.4142135623730951
    mantissa = tl.where(high, mantissa * 0.5, mantissa)
    exponent = tl.where(high, exponent + 1.0, exponent)
    t = (mantissa - 1.0) / (mantissa + 1.0)
    t2 = t * t
    series = t2 * 0.0 + 1.0 / 19.0
    for k in tl.static_range(17, 0, -2):
        series = series * t2 + 1.0 / k
    log = 2.0 * t * series + (exponent - 33.0) * 0.6931471805599453
    radius = tl.sqrt(-2.0 * log)

    phase = (((x1 & 0x3FFFFFFF).to(tl.float64) + 0.5) * (1.0 / 1073741824.0) - 0.5) * 1.5707963267948966
    h = phase * phase
    sin = h * (1.0 / 6227020800.0) + -1.0 / 39916800.0
    sin = sin * h + 1.0 / 362880.0
    sin = sin * h + -1.0 / 5040.0
    sin = sin * h + 1.0 / 120.0
    sin = sin * h + -1.0 / 6.0
    sin = phase * (sin * h + 1.0)
    cos = h * (-1.0 / 87178291200.0) + 1.0 / 479001600.0
    cos = cos * h + -1.0 / 3628800.0
    cos = cos * h + 1.0 / 40320.0
    cos = cos * h + -1.0 / 720.0
    cos = cos * h + 1.0 / 24.0
    cos = cos * h + -1.0 / 2.0
    cos = cos * h + 1.0
    quadrant = x1 >> 30  # theta = quadrant * pi/2 + pi/4 + phase
    value = tl.where(quadrant % 2 == 0, cos - sin, cos + sin) / 1.4142135623730951
    return radius * tl.where((quadrant == 1) | (quadrant == 2), -value, value)


@triton.jit
def noise(half_range, seed, ids, stream, step, GAUSSIAN: tl.constexpr):
    """The dither xi: uniform on (-a, a), or gaussian with standard deviation a / sqrt(3)."""
    x0, x1, _, _ = philox4x32(seed, ids, stream, step)
    if GAUSSIAN:
        xi = (half_range / 1.7320508075688772) * box_muller(x0, x1).to(tl.float32).to(tl.float64)
    else:
        xi = half_range * (2.0 * uniform(x0) - 1.0)
    return xi


@triton.jit
def power(base, exponent):
    """base (float64) to a whole exponent of at least 0, by squaring: a few float64 ulps from the rounded power."""
    result = base * 0.0 + 1.0
    while exponent > 0:
        result = tl.where(exponent % 2 == 1, result * base, result)
        base = base * base
        exponent = exponent // 2
    return result


@triton.jit
def log1p(x):
    """float32 ln(1 + x) to 2.3 ulps for x > -0.3. The hardware's logarithm errs by 2e-7 near 1: all of a small one."""
    sum = 1.0 + x
    bits = sum.to(tl.int32, bitcast=True)
    exponent = ((bits - 0x3F3504F3) >> 23).to(tl.float32)  # 0x3F3504F3: sqrt(1/2)
    mantissa = (bits - ((bits - 0x3F3504F3) >> 23 << 23)).to(tl.float32, bitcast=True)
    t = tl.where(exponent == 0, tl.div_rn(x, 2.0 + x), tl.div_rn(mantissa - 1.0, mantissa + 1.0))
    t2 = t * t
    series = (((t2 * (1.0 / 9.0) + 1.0 / 7.0) * t2 + 1.0 / 5.0) * t2 + 1.0 / 3.0) * t2
    log = 2.0 * (t + t * series) + exponent * 0.6931471805599453
    return tl.where(x < float("inf"), log, x)  # and NaN stays


@triton.jit
def _exp_rest(x):
    """(e^x - 1 - x) / x^2 for |x| < 1/2, by its series; what is left out is 2^-30 of e^x - 1."""
    series = x * 0.0 + 1.0
    for k in tl.static_range(10, 2, -1):
        series = 1.0 + series * x * (1.0 / k)
    return 0.5 * series


@triton.jit
def exp(x):
    """float32 e^x to 1 ulp for |x| < 87, where that of the hardware errs by |x| ulps."""
    power = tl.floor(x * 1.4426950408889634 + 0.5)
    rest = (x - power * 0.693359375) + power * 2.12194440054690583e-4  # ln 2, of which the first part has 9 bits
    scale = ((power.to(tl.int32) + 127) << 23).to(tl.float32, bitcast=True)
    return (1.0 + (rest + rest * rest * _exp_rest(rest))) * scale


@triton.jit
def expm1(x):
    """float32 e^x - 1 to 2 ulps for |x| < 87."""
    return tl.where(tl.abs(x) < 0.5, x + x * x * _exp_rest(x), exp(x) - 1.0)


@triton.jit
def pick_half(x0, x1, x2, x3, place):
    """16-bit half `place` (0 to 7, low halves first) of the four words of a Philox call, as int32."""
    low, high = tl.where(place < 2, x0, x1), tl.where(place < 6, x2, x3)
    word = tl.where(place < 4, low, high)
    return ((word >> ((place % 2) * 16).to(tl.uint32)) & 0xFFFF).to(tl.int32)


@triton.jit
def widen(x):
    """float32 of a float32, bfloat16 or float16; of a pair of bfloat16 an instruction each, where .to() takes three."""
    if x.dtype == tl.bfloat16:
        wide = (x.to(tl.int16, bitcast=True).to(tl.int32) << 16).to(tl.float32, bitcast=True)
    else:
        wide = x.to(tl.float32)
    return wide


@triton.jit
def nearest(x, DTYPE: tl.constexpr):
    """float32 x -> DTYPE, to nearest even."""
    if INTERPRETED and DTYPE == tl.bfloat16:
        bits = x.to(tl.int32, bitcast=True)
        bits = tl.where(x == x, bits + ((bits >> 16) & 1) + 0x7FFF, 0x7FC00000)
        rounded = (bits >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True)
    else:
        rounded = x.to(DTYPE)
    return rounded


@triton.jit
def round_stochastically(x, half, DTYPE: tl.constexpr):
    """float32 x -> DTYPE, up with the probability of its dropped bits: 16 for bfloat16, 13 for float16."""
    DROPPED: tl.constexpr = 0xFFFF if DTYPE == tl.bfloat16 else 0x1FFF
    bits = x.to(tl.int32, bitcast=True) + (half & DROPPED)
    rounded = (bits & ~DROPPED).to(tl.float32, bitcast=True)
    return nearest(tl.where(tl.abs(x) < float("inf"), rounded, x), DTYPE)


@triton.jit
def adamw_element(weight, m, v, grad, factor, lerp, beta2, one_minus_beta2, root_correction2, eps, minus_step, decay):
    """One AdamW step in torch.optim.AdamW's order of operations, float32, every operation rounded as IEEE says."""
    g = grad * factor
    m = tl.where(lerp < 0.5, m + lerp * (g - m), g + (lerp - 1.0) * (g - m))  # torch.lerp starts from the nearer end
    v = v * beta2 + (one_minus_beta2 * g) * g
    update = tl.div_rn(m * minus_step, tl.div_rn(tl.sqrt_rn(v), root_correction2) + eps)
    return weight * decay + update, m, v
