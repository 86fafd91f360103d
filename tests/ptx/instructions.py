"""Instructions of one thread, and the warp's shuffle. What stands in a table makes an instruction for a program, from
its modifiers and types and its operands: a function of the machine and some of its threads.
"""

import operator

import numpy as np

from tests.ptx import floats
from tests.ptx.memory import U, check_alignment, some
from tests.ptx.parse import Fault

DONE = 1 << 30  # the place of a thread that has left
AGAIN = "again"  # a result: the threads wait for others, then execute the instruction


def action(function):
    """Of what is rare: it gets the machine, the modifiers, the operands and the threads."""
    return lambda code, o, a: lambda m, s: function(m, o, a, s)


def branch(code, o, a):
    target = code.labels[a[0]]

    def run(m, s):
        m.pc[s] = target

    return run


@action
def leave(m, o, a, s):
    m.pc[s] = DONE
    left = (m.pc == DONE).reshape(m.blocks, -1).all(1)
    for block in np.flatnonzero(left & ~m.shared.left):
        m.shared.leave(block)


@action
def trap(m, o, a, s):
    raise Fault(f"{m.clock.name(m.ids(s)[0] + 1)} traps")


@action
def nothing(m, o, a, s):
    pass


def flat(operands):
    return [each for x in operands for each in (x if isinstance(x, tuple) else (x,))]


def computed(choose):
    """choose(code, o, a): what computes the results from the operands, and the types of these."""

    def make(code, o, a):
        compute, kinds = choose(code, o, a)
        if "ftz" in o:
            compute = floats.flushing(compute)
        write, *others = [code.write(operand) for operand in flat(a[:1])]
        x, *more = [code.read(operand, kind) for operand, kind in zip(flat(a[1:]), kinds)]

        def several(m, s):
            for each, result in zip((write, *others), compute(x(m, s), *[y(m, s) for y in more])):
                each(m, s, result)

        if others:
            return several
        if len(more) == 1:  # the most
            (y,) = more
            return lambda m, s: write(m, s, compute(x(m, s), y(m, s)))
        return lambda m, s: write(m, s, compute(x(m, s), *[y(m, s) for y in more]))

    return make


def plain(compute):
    """Of numbers of one type, or of predicates. NumPy's floats are rounded to nearest."""
    return computed(lambda code, o, a: (compute, o[-1:] * 3))


def wide(numbers):
    return [x.astype(np.float64) for x in numbers]


def rounding(exact, near, near_float=None):
    """Float32 with a modifier is rounded from the `exact` result in float64."""

    def choose(code, o, a):
        if not {"rz", "rm", "rp", "sat", "ftz"} & set(o):
            return near_float if near_float and o[-1] == "f32" else near, o[-1:] * 3
        if o[-1] != "f32":
            raise Fault(f"unknown opcode: a rounding of {o[-1]}")
        return lambda *x: floats.rounded(exact(*wide(x)), o), o[-1:] * 3

    return computed(choose)


def approximation(exact):
    def choose(code, o, a):
        if o == ("ftz", "f64") and exact is np.reciprocal:
            return floats.gross_reciprocal, ["f64"]
        if o[-1] != "f32":
            raise Fault(f"unknown opcode: an approximation of {o[-1]}")
        return lambda *x: floats.approximate(exact(*wide(x)), x[0], code.ulps), o[-1:] * 2

    return computed(choose)


@computed
def move(code, o, a):
    """In parts the low one is first."""
    to, source, size = flat(a[:1]), flat(a[1:]), code.types[o[-1]].itemsize
    part = size // max(len(to), len(source))
    shifts = [U[size](8 * i) for i in range(0, size, part)]
    if len(to) > 1:
        return lambda x: [(x >> n).astype(U[part]) for n in shifts], [f"u{8 * size}"]
    if len(source) > 1:
        return lambda *x: sum(y.astype(U[size]) << n for y, n in zip(x, shifts)), [f"u{8 * part}"] * len(source)
    return lambda x: x, o[-1:]


def access(code, o, values):
    """The memory, the bytes of a value and of all."""
    space, size = o[0].split("::")[0], code.types[o[-1]].itemsize
    if space in code.units:
        code.units[space] = min(code.units[space], size * len(values))
    return space, size, size * len(values)


def load(code, o, a):
    registers = flat(a[:1])
    space, size, n = access(code, o, registers)
    address, writes, dtype = code.address(a[1]), [code.write(register) for register in registers], code.types[o[-1]]

    def run(m, s):
        at = address(m, s)
        if space == "param":
            check_alignment(at, n, space)
            values = m.params.view(U[size]).reshape(-1, n // size)[at // n]
        else:
            m.bytes[f"{space} read"] += n * len(at)
            values = m.memory[space].access(at, n, size, m.ids(s))
        for write, column in zip(writes, np.ascontiguousarray(values.T).view(dtype)):
            write(m, s, column)

    return run


def store(code, o, a):
    operands = flat(a[1:2])
    space, size, n = access(code, o, operands)
    address, reads = code.address(a[0]), [code.read(operand, f"u{8 * size}") for operand in operands]

    def run(m, s):
        at = address(m, s)
        values = np.empty((len(at), len(reads)), U[size])
        for k, read in enumerate(reads):
            values[:, k] = read(m, s)
        m.bytes[f"{space} written"] += n * len(at)
        m.memory[space].access(at, n, size, m.ids(s), values)

    return run


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

    def compute(x, n):
        return np.where(n < 8 * x.itemsize, shifted(x, n.astype(x.dtype) % x.dtype.type(8 * x.itemsize)), beyond(x))

    return computed(lambda code, o, a: (compute, [o[-1], "u32"]))


COMPARE = {name: getattr(operator, name) for name in ("eq", "ne", "lt", "le", "gt", "ge")}
COMPARE |= {"lo": operator.lt, "ls": operator.le, "hi": operator.gt, "hs": operator.ge}
COMBINE = {"and": operator.and_, "or": operator.or_, "xor": operator.xor}


@computed
def set_predicate(code, o, a):
    test, real, combine, pair = o[0], code.types[o[-1]].kind == "f", COMBINE.get(o[1]), isinstance(a[0], tuple)

    def compare(x, y):
        if not real or test in ("eq", "lt", "le", "gt", "ge"):  # which are false of NaN
            return COMPARE[test](x, y)
        nan = np.isnan(x) | np.isnan(y)
        if test in ("num", "nan"):
            return nan if test == "nan" else ~nan
        return ~nan & (x != y) if test == "ne" else nan | COMPARE[test[:-1]](x, y)

    def compute(x, y, also=None):
        result = compare(x, y)
        results = [combine(each, also) if combine else each for each in (result, ~result)[: 1 + pair]]
        return results if pair else results[0]

    return compute, [o[-1], o[-1], "pred"]


WHOLE = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}
TO_16_BITS = {"bf16": floats.to_bfloat16, "f16": lambda x: x.astype(np.float16).view(np.uint16)}


@computed
def convert(code, o, a):
    to, kind = code.types[o[-2]], code.types[o[-1]].kind
    if o[-2] in ("bf16x2", "f16x2"):
        half = TO_16_BITS[o[-2][:-2]]
        return lambda x, y: half(x).astype(np.uint32) << np.uint32(16) | half(y), o[-1:] * 2
    whole = next((function for name, function in WHOLE.items() if name in o), lambda x: x)
    to_float = to == np.float32 and (kind == "f" or o[-1] == "bf16")
    if {"rz", "rm", "rp", "sat"} & set(o) and not to_float:
        raise Fault("unknown conversion")

    def compute(x):
        x = whole((x.astype(np.uint32) << np.uint32(16)).view(np.float32) if o[-1] == "bf16" else x)
        if o[-2] == "bf16":
            return floats.to_bfloat16(x)
        if to_float:
            return floats.rounded(x, o)
        return floats.to_integer(x, to) if kind == "f" and to.kind != "f" else x.astype(to)

    return compute, o[-1:]


def permute(x, y, selector):
    """Four bytes of eight, chosen by four bits each, of which the highest asks for copies of the byte's sign."""
    eight, result = y.astype(np.uint64) << np.uint64(32) | x, np.uint32(0)
    for i in range(0, 32, 8):
        choice = (selector >> np.uint32(i // 2) & np.uint32(15)).astype(np.uint64)
        byte = (eight >> (choice & np.uint64(7)) * np.uint64(8)).astype(np.uint8)
        byte = np.where(choice & np.uint64(8), np.where(byte >= 128, 255, 0), byte)
        result = result | byte.astype(np.uint32) << np.uint32(i)
    return result


def shuffle(source):
    """Of whole warps, from the lane `source`; beyond the warp, a lane's own. Lanes wait for the others of theirs."""

    def make(code, o, a):
        writes, reads = [code.write(x) for x in flat(a[:1])], [code.read(x, "u32") for x in a[1:]]

        def run(m, s):
            ids, lane = m.ids(s), np.arange(32)
            value, by, clamp, members = (read(m, s) for read in reads)
            apart = len(ids) % 32 or some(ids.reshape(-1, 32) != ids[::32, None] // 32 * 32 + lane)
            left = apart and some(m.pc.reshape(-1, 32)[ids // 32] == DONE)
            if left or some(clamp != 31) or some(members != 0xFFFFFFFF):
                raise Fault("a shuffle of part of a warp")
            if apart:
                m.state[ids] = 4
                return AGAIN
            value, by = (np.broadcast_to(x, ids.shape).reshape(-1, 32) for x in (value, by))
            wanted = source(lane, by.astype(np.int64))
            inside = wanted < 32
            for write, x in zip(writes, (np.take_along_axis(value, np.where(inside, wanted, lane), 1), inside)):
                write(m, s, x.ravel())

        return run

    return make


def funnel(low, high, n):
    """64 bits to the right, of which the low half stays."""
    return (high.astype(np.uint64) << np.uint64(32) | low).__rshift__(n.astype(np.uint64) & 31).astype(np.uint32)


JUMPS = (branch, leave)
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
    "add": (rounding(floats.odd_sum, operator.add), ROUNDINGS),
    "sub": (rounding(lambda x, y: floats.odd_sum(x, -y), operator.sub), ROUNDINGS),
    "mul": (rounding(operator.mul, operator.mul), ROUNDINGS),
    "fma": (rounding(lambda x, y, z: floats.odd_sum(x * y, z), floats.fused, floats.fused_float), ROUNDINGS),
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
    "selp": (computed(lambda code, o, a: (lambda x, y, chosen: np.where(chosen, x, y), [*o[-1:] * 2, "pred"])), ""),
    "setp": (set_predicate, " ".join([*COMPARE, *(f"{name}u" for name in COMPARE), *COMBINE, "num nan ftz"])),
    "cvt": (convert, f"{ROUNDINGS} {' '.join(WHOLE)}"),
    "shf.r.wrap": (plain(funnel), ""),
    "prmt": (plain(permute), ""),
    "copysign": (plain(lambda sign, x: np.copysign(x, sign)), ""),
    "shfl.sync.bfly": (shuffle(lambda lane, by: lane ^ by), ""),
    "shfl.sync.down": (shuffle(lambda lane, by: lane + by), ""),
    "shfl.sync.idx": (shuffle(lambda lane, by: by & 31), ""),
}
