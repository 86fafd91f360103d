"""Instructions of one thread, and the warp's shuffle. A function gets the machine, the opcode's modifiers and types,
the operands and the threads. A result that is true ends the step.
"""

import operator

import numpy as np

from tests.ptx.floats import approximate, flushed, fused, gross_reciprocal, odd_sum, rounded, to_bfloat16, to_integer
from tests.ptx.memory import U, cells, check_alignment
from tests.ptx.parse import Fault

DONE = 1 << 30  # the place of a thread that has left


def branch(m, o, a, s):
    m.pc[s] = m.labels[a[0]]


def leave(m, o, a, s):
    m.pc[s] = DONE


def trap(m, o, a, s):
    raise Fault(f"{m.clock.name(m.ids(s)[0] + 1)} traps")


def nothing(m, o, a, s):
    pass


def move(m, o, a, s):
    to, source = a
    if o[-1] == "pred":
        m.write(to, bool(source) if isinstance(source, int) else m.predicate(source, s), s)
    elif isinstance(source, tuple):  # the low part first
        bits, whole = int(o[-1][1:]) // len(source), U[int(o[-1][1:]) // 8]
        parts = (m.read(part, f"b{bits}", s).astype(whole) << whole(i * bits) for i, part in enumerate(source))
        m.write(to, sum(parts), s)
    elif isinstance(to, tuple):
        bits, whole = int(o[-1][1:]) // len(to), m.read(source, o[-1], s)
        for i, part in enumerate(to):
            m.write(part, (whole >> whole.dtype.type(i * bits)).astype(U[bits // 8]), s)
    else:
        m.write(to, m.read(source, o[-1], s), s)


def load(m, o, a, s):
    registers, size, space = a[0] if isinstance(a[0], tuple) else a[:1], m.types[o[-1]].itemsize, o[0].split("::")[0]
    at, n = m.address(a[1], s), size * len(registers)
    if space == "param":
        check_alignment(at, n, space)
        values = cells(m.params, n, size)[at // n]
    else:
        m.bytes[f"{space} read"] += n * len(at)
        values = m.memory[space].load(at, n, size, m.ids(s))
    for k, register in enumerate(registers):
        m.write(register, np.ascontiguousarray(values[:, k]).view(m.types[o[-1]]), s)


def store(m, o, a, s):
    operands, size, space = a[1] if isinstance(a[1], tuple) else a[1:2], m.types[o[-1]].itemsize, o[0].split("::")[0]
    at, n = m.address(a[0], s), size * len(operands)
    values = np.empty((len(at), len(operands)), U[size])
    for k, operand in enumerate(operands):
        values[:, k] = m.read(operand, f"b{8 * size}", s)
    m.bytes[f"{space} written"] += n * len(at)
    m.memory[space].store(at, n, values, m.ids(s))


def values(m, o, operands, s):
    return [flushed(np.asarray(m.read(operand, o[-1], s)), o) for operand in operands]


def plain(compute):
    """Of numbers of one type, or of predicates. NumPy's floats are rounded to nearest."""

    def instruction(m, o, a, s):
        read = [m.predicate(x, s) for x in a[1:]] if o[-1] == "pred" else values(m, o, a[1:], s)
        m.write(a[0], flushed(compute(*read), o), s)

    return instruction


def rounding(exact, near):
    """Float32 with a modifier, and its fma, is rounded from the `exact` result in float64, all else `near`."""

    def instruction(m, o, a, s):
        read, special = values(m, o, a[1:], s), {"rz", "rm", "rp", "sat", "ftz"} & set(o)
        if o[-1] != "f32" and special:
            raise Fault(f"unknown opcode: a rounding of {o[-1]}")
        special = special or near is fused and o[-1] == "f32"
        result = rounded(exact(*(x.astype(np.float64) for x in read)), o) if special else near(*read)
        m.write(a[0], result, s)

    return instruction


def approximation(exact):
    def instruction(m, o, a, s):
        if o == ("ftz", "f64") and exact is np.reciprocal:
            return m.write(a[0], gross_reciprocal(m.read(a[1], "f64", s)), s)
        if o[-1] != "f32":
            raise Fault(f"unknown opcode: an approximation of {o[-1]}")
        read = values(m, o, a[1:], s)
        m.write(a[0], flushed(approximate(exact(*(x.astype(np.float64) for x in read)), read[0], m.ulps), o), s)

    return instruction


def wide_product(x, y):
    if x.itemsize == 8:
        raise Fault("unknown opcode: a product of 128 bits")
    wide = f"{x.dtype.kind}{2 * x.itemsize}"
    return x.astype(wide) * y.astype(wide)


def high_half(x, y):
    return (wide_product(x, y) >> wide_product(x, y).dtype.type(8 * x.itemsize)).astype(x.dtype)


def quotient(x, y):
    """Of integers it goes to zero."""
    if x.dtype.kind == "f":
        return x / y
    down = x // y
    return down + ((down < 0) & (down * y != x))


def shift(shifted, beyond):
    """Numbers of bits past the width shift out everything."""
    return plain(lambda x, n: np.where(n < 8 * x.itemsize, shifted(x, n % x.dtype.type(8 * x.itemsize)), beyond(x)))


def select(m, o, a, s):
    m.write(a[0], np.where(m.predicate(a[3], s), m.read(a[1], o[-1], s), m.read(a[2], o[-1], s)), s)


COMPARE = {name: getattr(operator, name) for name in ("eq", "ne", "lt", "le", "gt", "ge")}
COMPARE |= {"lo": operator.lt, "ls": operator.le, "hi": operator.gt, "hs": operator.ge}
COMBINE = {"and": operator.and_, "or": operator.or_, "xor": operator.xor}


def set_predicate(m, o, a, s):
    x, y = values(m, o, a[1:3], s)
    nan = np.isnan(x) | np.isnan(y) if x.dtype.kind == "f" else np.False_
    if o[0] in ("num", "nan"):
        result = nan if o[0] == "nan" else ~nan
    else:
        result = COMPARE[o[0]](x, y) & ~nan if o[0] in COMPARE else COMPARE[o[0][:-1]](x, y) | nan
    for target, each in zip(a[0] if isinstance(a[0], tuple) else a[:1], (result, ~result)):
        m.write(target, COMBINE[o[1]](each, m.predicate(a[3], s)) if o[1] in COMBINE else each, s)


WHOLE = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}


def convert(m, o, a, s):
    to, x = m.types[o[-2]], values(m, o, a[1:], s)
    if o[-2] in ("bf16x2", "f16x2"):
        high, low = (to_bfloat16(v) if o[-2] == "bf16x2" else v.astype(np.float16).view(np.uint16) for v in x)
        m.write(a[0], high.astype(np.uint32) << np.uint32(16) | low, s)
        return
    x = (x[0].astype(np.uint32) << np.uint32(16)).view(np.float32) if o[-1] == "bf16" else x[0]
    x = next((whole(x) for name, whole in WHOLE.items() if name in o), x)
    if {"rz", "rm", "rp", "sat"} & set(o) and not (to == np.float32 and x.dtype.kind == "f"):
        raise Fault("unknown conversion")
    if o[-2] == "bf16":
        x = to_bfloat16(x)
    elif to == np.float32 and x.dtype.kind == "f":
        x = rounded(x, o)
    else:
        x = to_integer(x, to) if x.dtype.kind == "f" and to.kind != "f" else x.astype(to)
    m.write(a[0], x, s)


def permute(x, y, selector):
    """Four bytes of eight, chosen by four bits each, of which the highest asks for copies of the byte's sign."""
    eight, result = y.astype(np.uint64) << np.uint64(32) | x, np.uint32(0)
    for i in range(0, 32, 8):
        choice = (selector >> np.uint32(i // 2) & np.uint32(15)).astype(np.uint64)
        byte = (eight >> (choice & np.uint64(7)) * np.uint64(8)).astype(np.uint8)
        byte = np.where(choice & np.uint64(8), np.where(byte >= 128, 255, 0), byte)
        result = result | byte.astype(np.uint32) << np.uint32(i)
    return result


AGAIN = "again"  # a result: the threads wait for others, then execute the instruction


def shuffle(source):
    """Of whole warps, from the lane `source`; beyond the warp, a lane's own. Lanes wait for the others of theirs."""

    def instruction(m, o, a, s):
        ids, lane = m.ids(s), np.arange(32)
        clamp, members = m.read(a[3], "u32", s), m.read(a[4], "u32", s)
        if (clamp != 31).any() or (members != 0xFFFFFFFF).any() or (m.pc.reshape(-1, 32)[ids // 32] == DONE).any():
            raise Fault("a shuffle of part of a warp")
        if len(ids) % 32 or (ids.reshape(-1, 32) != ids[::32, None] // 32 * 32 + lane).any():
            m.state[ids] = 4
            return AGAIN
        value, by = (np.broadcast_to(m.read(x, "b32", s), ids.shape).reshape(-1, 32) for x in a[1:3])
        wanted = source(lane, by.astype(np.int64))
        inside = wanted < 32
        to = a[0] if isinstance(a[0], tuple) else (a[0], "_")
        m.write(to[0], np.take_along_axis(value, np.where(inside, wanted, lane), 1).ravel(), s)
        m.write(to[1], np.broadcast_to(inside, value.shape).ravel(), s)

    return instruction


def funnel(low, high, n):
    """64 bits to the right, of which the low half stays."""
    return (high.astype(np.uint64) << np.uint64(32) | low).__rshift__(n.astype(np.uint64) & 31).astype(np.uint32)


CACHES = "nc ca cg cs lu cv wt wb L1::no_allocate L1::evict_first L1::evict_last L2::cache_hint L2::128B L2::256B"
SPACES = f"global shared shared::cta shared::cluster v2 v4 {CACHES}"
ROUNDINGS = "rn rz rm rp ftz sat"

# Beginnings of opcodes, with the modifiers that are obeyed, or change nothing here. All else is unknown.
TABLE = {
    "bra": (branch, "uni"),
    "ret exit": (leave, "uni"),
    "trap": (trap, ""),
    "mov cvta cvta.to.global cvta.param": (move, ""),
    "ld": (load, f"param {SPACES}"),
    "st": (store, SPACES),
    "neg": (plain(operator.neg), "ftz"),
    "abs": (plain(np.abs), "ftz"),
    "and": (plain(operator.and_), ""),
    "or": (plain(operator.or_), ""),
    "xor": (plain(operator.xor), ""),
    "not": (plain(operator.invert), ""),
    "sqrt": (plain(np.sqrt), "rn"),
    "rcp": (plain(np.reciprocal), "rn"),
    "div": (plain(quotient), "rn"),
    "rem": (plain(lambda x, y: x - quotient(x, y) * y), ""),
    "add": (rounding(odd_sum, operator.add), ROUNDINGS),
    "sub": (rounding(lambda x, y: odd_sum(x, -y), operator.sub), ROUNDINGS),
    "mul": (rounding(operator.mul, operator.mul), ROUNDINGS),
    "fma": (rounding(lambda x, y, z: odd_sum(x * y, z), fused), ROUNDINGS),
    "mul.lo": (plain(operator.mul), ""),
    "mad.lo": (plain(lambda x, y, z: x * y + z), ""),
    "mul.hi": (plain(high_half), ""),
    "mul.wide": (plain(wide_product), ""),
    "max": (plain(np.fmax), "ftz"),
    "min": (plain(np.fmin), "ftz"),
    "max.NaN": (plain(np.maximum), "ftz"),
    "min.NaN": (plain(np.minimum), "ftz"),
    "ex2.approx": (approximation(np.exp2), "ftz"),
    "lg2.approx": (approximation(np.log2), "ftz"),
    "rcp.approx": (approximation(np.reciprocal), "ftz"),
    "sqrt.approx": (approximation(np.sqrt), "ftz"),
    "rsqrt.approx": (approximation(lambda x: 1 / np.sqrt(x)), "ftz"),
    "div.approx div.full": (approximation(operator.truediv), "ftz"),
    "shl": (shift(operator.lshift, lambda x: x * 0), ""),
    "shr": (shift(operator.rshift, lambda x: -(x < 0).astype(x.dtype)), ""),
    "selp": (select, ""),
    "setp": (set_predicate, " ".join([*COMPARE, *(f"{name}u" for name in COMPARE), *COMBINE, "num nan ftz"])),
    "cvt": (convert, f"{ROUNDINGS} {' '.join(WHOLE)}"),
    "shf.r.wrap": (plain(funnel), ""),
    "prmt": (plain(permute), ""),
    "copysign": (plain(lambda sign, x: np.copysign(x, sign)), ""),
    "shfl.sync.bfly": (shuffle(lambda lane, by: lane ^ by), ""),
    "shfl.sync.down": (shuffle(lambda lane, by: lane + by), ""),
    "shfl.sync.idx": (shuffle(lambda lane, by: by & 31), ""),
}
