"""The interpreter of tests/ptx: kernels that nvcc compiles give what NumPy says, and each mistake in them is found."""

import shutil
import struct
import subprocess
from fractions import Fraction

import numpy as np
import pytest

from tests import ROOT
from tests.ptx import Fault, Launch, Machine, Module

NVCC = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
pytestmark = pytest.mark.skipif(NVCC is None, reason="nvcc is not installed")
EVERY_ORDER = [dict(order=order, late=late) for order in ("lowest", "highest", "random") for late in (True, False)]


@pytest.fixture(scope="session")
def kernels(tmp_path_factory):
    ptx = tmp_path_factory.mktemp("ptx") / "kernels.ptx"
    source = ROOT / "tests" / "backends" / "kernels.cu"
    include = f"-I{ROOT / 'csrc'}"
    subprocess.run([NVCC, "-ptx", "-arch=sm_90a", "-std=c++17", include, source, "-o", ptx], check=True)
    return Module(ptx.read_text())


def placed(array, shift=0):
    """A copy whose address is `shift` bytes after a multiple of 16."""
    room = np.zeros(array.nbytes + 32, np.uint8)
    first = -room.ctypes.data % 16 + shift
    view = room[first : first + array.nbytes].view(array.dtype).reshape(array.shape)
    view[...] = array
    return view


def run(kernels, name, x, y, n=0, more=0, grid=1, threads=64, cluster=1, shared=0, arrays=None, **choices):
    params = struct.pack("<QQii", x.ctypes.data, y.ctypes.data, n, more)
    launch = Launch(name, grid, threads, cluster, shared, params)
    return Machine(kernels, launch, arrays or [x, y], **choices).run()


def pipeline(kernels, broken=0, rows=7, **choices):
    x = placed(np.random.default_rng(0).integers(-8, 8, (rows, 2, 256)).astype(np.float32))
    y = placed(np.zeros_like(x))
    slices = [part for array in (x, y) for part in array.reshape(-1, 256)]  # a copy into the next is out of bounds
    machine = run(
        kernels, f"pipeline_{broken}", x, y, rows, grid=4, cluster=2, shared=128 + 3 * 1024, arrays=slices, **choices
    )
    assert (y == x * x.sum((1, 2), keepdims=True)).all()
    return machine


@pytest.mark.parametrize("choices", EVERY_ORDER, ids=str)
def test_clusters_mbarriers_and_bulk_copies(kernels, choices):
    machine = pipeline(kernels, **choices)
    count = 7 * 2 * 256
    assert machine.bytes["bulk read"] == machine.bytes["bulk written"] == 4 * count
    assert machine.bytes["shared read"] >= 4 * count and machine.bytes["global read"] == 0
    assert machine.instructions["cp.async.bulk.commit_group"] == 7 * 2
    assert machine.instructions["shfl.sync.bfly.b32"] == 5 * 7 * 2 * 64


BROKEN_PIPELINES = {
    1: r"race: thread 0 of block . reads shared byte .*, which thread 32 of block . wrote",
    2: r"race: thread . of block [02] writes shared byte 32 of block [13], which several threads read",
    3: r"race: thread . of block . (touches .*, of a bulk load not waited for|writes .*, which thread 32 .* read)",
    4: r"race: thread 0 of block . touches .*, that something has still to read",
    5: r"race: thread 0 of block . reads shared byte .*, which thread 1 of block . wrote",
    6: r"no fence.proxy.async: thread 0 of block . wrote shared byte 128",
    7: r"deadlock: 128 threads: waits at an mbarrier \[mbarrier.try_wait",
    8: r"race: thread 1 of block [02] writes shared byte 32 of block [13], which several threads read",
    9: r"out of bounds: 1040 bytes at global address",
    10: r"misaligned: global address",
    11: r"block . leaves during a bulk store or product of shared byte",
    12: r"block . leaves during a bulk load of shared byte",
}


@pytest.mark.parametrize("order", ["lowest", "highest", "random"])
@pytest.mark.parametrize("broken", BROKEN_PIPELINES)
def test_each_mistake_with_copies_is_found(kernels, broken, order):
    with pytest.raises(Fault, match=BROKEN_PIPELINES[broken]):
        pipeline(kernels, broken, order=order)


def ring(kernels, broken=0, **choices):
    x, y = (placed(np.arange(6 * 64, dtype=np.float32)) for _ in range(2))
    run(kernels, f"ring_{broken}", x, y, 6, threads=96, **choices)
    assert (y == x + 1).all()


@pytest.mark.parametrize("choices", EVERY_ORDER, ids=str)
def test_a_ring_of_a_producer_and_consumers(kernels, choices):
    ring(kernels, **choices)


BROKEN_RINGS = {
    1: "more threads arrive at the mbarrier at shared byte 512 of block 0 than it counts|race: thread 0 .* writes",
    2: "race: thread 32 of block 0 touches .*, of a bulk load not waited for|race: thread 0 .* writes",
    3: "deadlock: 1 threads: waits at an mbarrier .*; 64 threads: waits at an mbarrier",
    4: "deadlock: 1 threads: waits at an mbarrier .*; 64 threads: waits at an mbarrier",
}


@pytest.mark.parametrize("choices", EVERY_ORDER, ids=str)
@pytest.mark.parametrize("broken", BROKEN_RINGS)
def test_each_mistake_with_mbarriers_is_found(kernels, broken, choices):
    with pytest.raises(Fault, match=BROKEN_RINGS[broken]):
        ring(kernels, broken, **choices)


LEAVES = "race: block . leaves, thread .* of block . reached into it"


@pytest.mark.parametrize("choices", EVERY_ORDER, ids=str)
def test_a_block_that_others_reach_into_stays(kernels, choices):
    y = placed(np.zeros((2, 64), np.float32))
    run(kernels, "neighbours_0", y, y, grid=2, cluster=2, **choices)
    assert (y == [[1], [0]]).all()
    # Whether block 1 leaves before or after that is not known.
    reaches = "thread 0 of block 0 reaches into block 1, which has left" if choices["order"] == "highest" else LEAVES
    for broken, message in ((1, LEAVES), (2, LEAVES), (3, reaches if choices["order"] != "random" else "block 1")):
        with pytest.raises(Fault, match=message):
            run(kernels, f"neighbours_{broken}", y, y, grid=2, cluster=2, **choices)


def test_shared_memory_that_is_used_again_needs_a_barrier_between(kernels):
    x = placed(np.random.default_rng(0).integers(-9, 9, (3, 64)).astype(np.float32))
    y = placed(np.zeros_like(x))
    run(kernels, "rows_0", x, y, 3)
    assert (y == x.sum(1, keepdims=True)).all()
    with pytest.raises(Fault, match="race: thread . of block 0 writes shared byte .*, which several threads read"):
        run(kernels, "rows_1", x, y, 3)


# Kernel, launch, fault.
STRAY = {
    "past the end": ("copy", dict(n=101), "out of bounds: 4 bytes at global address"),
    "into the next array": ("copy", dict(n=-1), "out of bounds: 4 bytes at global address"),
    "half a vector past the end": ("copy_vectors", dict(n=26), "out of bounds: 16 bytes at global address"),
    "misaligned vectors": ("copy_vectors", dict(n=1, shift=4), "misaligned: global address .* for 16 bytes"),
    "shared memory": ("past_shared_memory", dict(shared=252), "out of bounds: .* shared address 252 of 252 bytes"),
    "two values": ("write_together", dict(more=1), "race: .* writes element 0 .*, which thread .* writes too"),
    "two blocks": ("write_together", dict(grid=2), "race: thread .* of block . writes element 0"),
    "read and written": ("read_what_another_block_writes", dict(grid=2), "race: .* element 0 .*, which several"),
    "two barriers": ("different_barriers", dict(), "deadlock: 32 .* at a block barrier .* 32 .* at a cluster barrier"),
    "half a warp": ("half_a_warp", dict(), "a shuffle of part of a warp"),
    "atomics": ("atomic", dict(), r"unknown opcode (atom|red)\S*\.add\.f32"),
    "a loop without end": ("for_ever", dict(most_steps=50), "not done after 50 steps: 64 threads: runs"),
    "a trap": ("trapped", dict(), "thread 5 of block 0 traps"),
    "too many threads": ("copy", dict(threads=2048), "at most 1024 threads"),
    "part of a warp": ("copy", dict(threads=40), "whole warps"),
    "part of a cluster": ("copy", dict(grid=3, cluster=2), "whole clusters"),
}


@pytest.mark.parametrize(("name", "launch", "message"), STRAY.values(), ids=STRAY)
def test_each_single_mistake_is_found(kernels, name, launch, message):
    launch = {"grid": 2 if name == "copy" else 1, **launch}
    x, y = placed(np.zeros(100, np.float32), launch.pop("shift", 0)), placed(np.zeros(100, np.float32))
    if launch.get("n") == -1:
        launch["n"], x = 100, x[:99]
    with pytest.raises(Fault, match=message):
        run(kernels, name, x, y, **launch)


def test_parameters_have_the_kernel_s_size(kernels):
    with pytest.raises(Fault, match="copy takes 24 bytes of parameters, got 4"):
        Machine(kernels, Launch("copy", 1, 64, params=b"1234"), [np.zeros(1)])


def test_what_is_right_is_no_fault(kernels):
    """A grid larger than the work, and a barrier of a block that half of the threads have left."""
    x, y = placed(np.arange(100, dtype=np.float32)), placed(np.zeros(100, np.float32))
    machine = run(kernels, "copy", x, y, 100, grid=2)
    assert (y == x).all() and machine.bytes["global read"] == machine.bytes["global written"] == 400
    assert machine.instructions["ld.global.f32"] == 100
    run(kernels, "half_a_block", x, y)
    assert (y.view(np.int32)[:32] == range(32)).all()
    run(kernels, "past_shared_memory", x, y, shared=256)
    assert (y[:64] == 1).all()


@pytest.mark.parametrize("order", ["lowest", "highest", "random"])
def test_lanes_that_part_meet_again(kernels, order):
    y = placed(np.zeros((2, 64), np.int32))
    run(kernels, "diverge", y, y, grid=(1, 2), order=order)
    steps = []
    for t in range(64):
        x, count = t, 0
        while x > 1:
            x, count = 3 * x + 1 if x % 2 else x // 2, count + 1
        steps.append(count + (100, -7, 0)[t % 3])
    assert (y == [steps[t] + 1000 * steps[t ^ 1] for t in range(64)]).all()


def nearest(exact, direction=None):
    """The float32 nearest to a fraction, ties to even; or the nearest not above ("rm"), not below ("rp"), not larger
    in magnitude ("rz")."""
    guess = np.float32(float(exact))
    around = [np.nextafter(guess, np.float32(-np.inf)), guess, np.nextafter(guess, np.float32(np.inf))]
    allowed = {
        None: around,
        "rm": [x for x in around if Fraction(float(x)) <= exact],
        "rp": [x for x in around if Fraction(float(x)) >= exact],
        "rz": [x for x in around if abs(Fraction(float(x))) <= abs(exact)],
    }[direction]
    return min(allowed, key=lambda x: (abs(Fraction(float(x)) - exact), int(x.view(np.uint32)) & 1))


def same(x, y):
    return np.array_equal(x, y, equal_nan=True) and (np.signbit(x) == np.signbit(y))[~np.isnan(y)].all()


def test_float_arithmetic_is_exact(kernels):
    n, random = 256, np.random.default_rng(1)
    x = (random.standard_normal((3, n)) * 2.0 ** random.integers(-30, 30, (3, n))).astype(np.float32)
    x[2, : n // 2] = -(x[0] * x[1])[: n // 2]  # what the product's rounding lost is all that remains
    x[2, n // 2 : n // 2 + 60] = (x[0] * x[1])[n // 2 : n // 2 + 60] * 2.0**24 * random.choice([1, -1], 60)  # halfway
    x = placed(x)
    y = placed(np.zeros((16, n), np.float32))
    run(kernels, "floats", x, y, n, threads=n)
    a, b, c = ([Fraction(float(value)) for value in row] for row in x)
    exact = {
        0: ([p * q + r for p, q, r in zip(a, b, c)], None),
        1: ([p / q for p, q in zip(a, b)], None),
        3: ([1 / p for p in a], None),
        4: ([p + q for p, q in zip(a, b)], "rz"),
        5: ([p * q + r for p, q, r in zip(a, b, c)], "rm"),
        6: ([p * q for p, q in zip(a, b)], "rp"),
        7: ([p - q for p, q in zip(a, b)], "rm"),
    }
    for row, (fractions, direction) in exact.items():
        assert same(y[row], [nearest(fraction, direction) for fraction in fractions]), row
    assert same(y[2], np.sqrt(np.abs(x[0])))
    twice = (x[0] * x[1] + x[2]).astype(np.float32)
    assert not same(y[0], twice)  # rounding twice shows


def test_float64_arithmetic_is_exact(kernels):
    n, random = 128, np.random.default_rng(1)
    x = random.standard_normal((3, n)) * 2.0 ** random.integers(-30, 30, (3, n))
    x[2, :64] = -(x[0] * x[1])[:64]  # what the product's rounding lost is all that remains
    x[:, -6:] = [[np.nan, np.inf, 1e308, -0.0, 0.0, 1e300], [1, 0, 1e308, 3, -3, 1e300], [1, 1, 1, -0.0, -0.0, -np.inf]]
    x, y = placed(x), placed(np.zeros((3, n)))
    with np.errstate(all="ignore"):
        run(kernels, "doubles", x, y, n, threads=n)
        twice, reciprocal = x[0] * x[1] + x[2], 1 / x[0]
        rough = np.abs(y[1] / reciprocal - 1)[:-6]
    a, b, c = ([Fraction(value) for value in row[:-6]] for row in x)
    assert same(y[0, :-6], np.array([float(p * q + r) for p, q, r in zip(a, b, c)]))
    assert (y[0, :64] != twice[:64]).all() and same(y[0, -6:], twice[-6:])
    assert 2**-22 < rough.mean() < rough.max() < 2**-19 and (y[1].view(np.uint64) & 0xFFFFFFFF == 0).all()
    assert same(y[2], np.copysign(x[0], x[1]))


def test_float64_multiply_adds_are_fused(kernels):
    """Products that all but cancel, halfway cases of the sum, and far smaller addends; and what is no number."""
    n, random = 256, np.random.default_rng(3)
    x = random.standard_normal((3, n)) * 2.0 ** random.integers(-40, 40, (3, n))
    x[2, : n // 2] = -(x[0] * x[1])[: n // 2] * random.choice([1, 1 + 2.0**-50], n // 2)
    x[2, n // 2 : 200] = (x[0] * x[1])[n // 2 : 200] * 2.0**53 * random.choice([1, -1], 200 - n // 2)
    exact = [float(Fraction(p) * Fraction(q) + Fraction(r)) for p, q, r in x.T.tolist()]
    x, y = placed(x), placed(np.zeros(n))
    run(kernels, "fused_double", x, y, n, threads=n)
    assert (y == exact).all() and (y != x[0] * x[1] + x[2]).sum() > n // 4
    x[:, :4] = [[np.inf, 0.0, np.nan, 1.0], [1.0, 3.0, 1.0, np.inf], [1.0, 5.0, 1.0, -np.inf]]
    run(kernels, "fused_double", x, y, n, threads=n)
    assert np.array_equal(y[:4], [np.inf, 5.0, np.nan, np.nan], equal_nan=True)
    x[:2, 0] = 1e-200
    with pytest.raises(Fault, match="beyond 2.900 or below"):
        run(kernels, "fused_double", x, y, n, threads=n)


def test_words_between_lanes_and_bytes_within_words(kernels):
    n = 64
    x = placed(np.random.default_rng(4).integers(0, 2**32, (3, n), np.uint32))
    y = placed(np.zeros((5, n), np.uint32))
    run(kernels, "words", x, y, n, threads=n)
    a, b, c = x
    lane, first = np.arange(n) % 32, np.arange(n) // 32 * 32
    assert (y[0] == a[first + np.where(lane < 29, lane + 3, lane)]).all()
    assert (y[1] == a[first + (np.arange(n) + 5) % 64 % 32]).all()
    for t in range(n):
        eight = int(a[t]) | int(b[t]) << 32
        assert y[2, t] == eight >> (int(c[t]) & 31) & 0xFFFFFFFF
        chosen = [eight >> 8 * (int(c[t]) >> 4 * i & 7) & 255 for i in range(4)]
        assert y[3, t] == sum(byte << 8 * i for i, byte in enumerate(chosen))
        spread = [255 * (byte >> 7) if int(c[t]) >> 4 * i & 8 else byte for i, byte in enumerate(chosen)]
        assert y[4, t] == sum(byte << 8 * i for i, byte in enumerate(spread))


def test_special_numbers(kernels):
    nan, inf = np.nan, np.inf
    special = [nan, inf, -inf, 0.0, -0.0, 1.0, -2.5, 0.5, 1.5, 3e38, 1e-40, -1e-40, -130.0, 130.0, 0.3, 2.5]
    x = placed(np.array(np.meshgrid(special, special), np.float32).reshape(2, 256))
    x = placed(np.concatenate([x, x[:1]]))
    y = placed(np.zeros((16, 256), np.float32))
    with np.errstate(all="ignore"):
        run(kernels, "floats", x, y, 256, threads=256)
        assert np.array_equal(y[1], x[0] / x[1], equal_nan=True)
        assert np.array_equal(y[8], np.fmax(x[0], x[1]), equal_nan=True)
        assert np.array_equal(y[9], np.maximum(x[0], x[1]), equal_nan=True)
        assert np.array_equal(y[10], np.fmin(x[0], x[1]), equal_nan=True)
        assert np.array_equal(y[11], np.clip(np.nan_to_num(x[0], nan=0.0), 0, 1))
        assert same(y[12], np.rint(x[0])) and same(y[13], np.trunc(x[0]))
        power = np.exp2(x[0].astype(np.float64)).astype(np.float32)
        power[np.abs(power) < 2.0**-126] = 0  # ex2.approx.ftz
        assert np.array_equal(y[14], power, equal_nan=True)


def test_approximations_can_be_moved(kernels):
    x = placed(np.random.default_rng(2).uniform(-20, 20, (3, 256)).astype(np.float32))
    y, moved = (placed(np.zeros((16, 256), np.float32)) for _ in range(2))
    run(kernels, "floats", x, y, 256, threads=256)
    run(kernels, "floats", x, moved, 256, threads=256, ulps=2)
    ulps = moved.view(np.int32) - y.view(np.int32)
    assert (np.abs(ulps[14]) == 2).all() and 64 < (ulps[14] > 0).sum() < 192
    assert (ulps[:14] == 0).all()


def test_formats_of_16_bits(kernels):
    bits = np.random.default_rng(3).integers(0, 2**32, (2, 512), dtype=np.uint32)
    bits[:, :8] = 0x7F800000, 0xFF800000, 0x7FC00000, 0x3F808000, 0x3F818000, 0x477FF000, 0x477FEFFF, 0x00000001
    bits[:, 256:] = bits[:, 256:] & 0x8FFFFFFF | 0x30000000  # what float16 holds
    x, y = placed(bits.view(np.float32)), placed(np.zeros((4, 512), np.uint32))
    with np.errstate(all="ignore"):
        run(kernels, "halves", x, y, 512, threads=512)
        numbers = y[0].view(np.uint16).reshape(-1, 2)[:, [0, 1]].T.astype(np.uint32) << 16
        nan = np.isnan(x)
        error = np.abs(numbers.view(np.float32).astype(np.float64) - x.astype(np.float64))
        spacing = np.spacing(np.abs(x).astype(np.float32)).astype(np.float64) * 2.0**15  # half of bfloat16's
        finite = np.isfinite(numbers.view(np.float32)) & ~nan
        assert (error[finite] <= spacing[finite]).all() and np.isnan(numbers.view(np.float32)[nan]).all()
        assert numbers[0, 3] == 0x3F800000 and numbers[0, 4] == 0x3F820000  # ties to even
        halves = y[1].view(np.float16).reshape(-1, 2).T
        assert np.array_equal(halves, x.astype(np.float16), equal_nan=True)
    low = (bits[0] & 0xFFFF).astype(np.uint16)
    assert (y[2] == low.astype(np.uint32) << 16).all()
    assert np.array_equal(y[3].view(np.float32), low.view(np.float16).astype(np.float32), equal_nan=True)


def test_integers(kernels):
    n, random = 256, np.random.default_rng(4)
    x = placed(random.integers(-(2**63), 2**63, (2, n)) >> random.integers(0, 63, (2, n)))
    x[:, :4] = [[0, -1, 2**63 - 1, -(2**63)], [1, -1, 64, 33]]
    y = placed(np.zeros((16, n), np.int64))
    run(kernels, "integers", x, y, n, threads=n)

    def signed(value, bits):
        return (value & (1 << bits) - 1) - (value >> bits - 1 & 1) * (1 << bits)

    for i in range(n):
        p, q = int(x[0, i]), int(x[1, i])
        a, b = signed(p, 32), signed(q, 32)
        quotient = abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1) if b else 0
        half = struct.unpack("<q", struct.pack("<d", float(p) * 0.5))[0]
        expected = [
            p * q, (a % 2**32) * (b % 2**32), (a % 2**32) * (b % 2**32) >> 32, a * b >> 32,
            p >> (b & 63), p % 2**64 >> (b & 63), p << (b & 63), a >> (b & 31), (a % 2**32 << (b & 31)) % 2**32,
            signed(quotient, 32), a - quotient * b if b else 0, 1 if p < q else 2, 1 if p % 2**64 < q % 2**64 else 2,
            signed(a, 16) + b % 256, min(a, b), half if p else 1,
        ]  # fmt: skip
        assert y[:, i].tolist() == [signed(value, 64) for value in expected], (p, q)


def run_text(body, shape=(32, 4)):
    """A kernel that writes to %rd3, the thread's row of y."""
    text = f"""
.visible .entry kernel(.param .u64 kernel_0)
{{
    .reg .b32 %r<9>; .reg .b64 %rd<4>; .reg .pred %p<3>;
    .shared .align 4 .b8 room[128];
    ld.param.u64 %rd1, [kernel_0];
    mov.u32 %r1, %tid.x;
    mul.wide.u32 %rd2, %r1, {4 * shape[1]};
    add.s64 %rd3, %rd1, %rd2;
    {body}
    ret;
}}"""
    y = placed(np.zeros(shape, np.uint32))
    Machine(Module(text), Launch("kernel", 1, len(y), params=struct.pack("<Q", y.ctypes.data)), [y]).run()
    return y


def test_memory_and_registers_begin_as_ones():
    """What nothing has written is NaN, so that a missing write shows; a predicate is true."""
    y = run_text(
        """
    mad.lo.s32 %r3, %r1, 4, room;
    @!%p1 bra SKIP;
    ld.shared.u32 %r3, [%r3];
    st.global.v2.u32 [%rd3], {%r2, %r3};
SKIP:"""
    )
    assert (y == [0xFFFFFFFF, 0xFFFFFFFF, 0, 0]).all()


def test_shifts_past_the_width_shift_out_everything():
    y = run_text(
        """
    mov.b32 %r2, -5; mov.b32 %r3, 32; mov.b32 %r4, 7;
    shl.b32 %r5, %r2, %r3; shr.u32 %r6, %r2, %r3; shr.s32 %r7, %r2, %r3; shr.s32 %r8, %r4, %r3;
    st.global.v4.u32 [%rd3], {%r5, %r6, %r7, %r8};"""
    )
    assert (y == [0, 0, 0xFFFFFFFF, 0]).all()


def test_braces_are_a_scope_of_registers_and_labels():
    block = "{ .reg .b32 own; mov.u32 own, 5; @%p1 bra over; mov.u32 own, 7; over: add.u32 %r2, %r2, own; }"
    y = run_text(
        f"""
    .reg .b32 own; mov.u32 own, 1; mov.u32 %r2, 0;
    setp.lt.u32 %p1, %r1, 16; {block}
    setp.lt.u32 %p1, %r1, 8; {block}
    st.global.v2.u32 [%rd3], {{%r2, own}};""",
        (32, 2),
    )
    assert (y == [[(5 if t < 16 else 7) + (5 if t < 8 else 7), 1] for t in range(32)]).all()


WGMMA = "wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {%r2, %r3, %r4, %r5}, %rd2, %rd2, %p1, "
REFUSED = {
    "mov.u32 %r2, nobody;": "unknown operand nobody",
    "add.s32 %r2, {%r1;": "cannot read",
    "add.sat.s32 %r2, %r1, %r1;": "a rounding of s32",
    "add.rz.f64 %rd2, %rd1, %rd1;": "a rounding of f64",
    "mul.wide.u64 %rd2, %rd1, %rd1;": "a product of 128 bits",
    "rsqrt.approx.ftz.f64 %rd2, %rd1;": "an approximation of f64",
    "sqrt.approx.ftz.f64 %rd2, %rd1;": "an approximation of f64",
    "fma.rz.f64 %rd2, %rd1, %rd1, %rd1;": "a rounding of f64",
    "shfl.sync.bfly.b32 %r2, %r1, 1, 0x1c1f, -1;": "a shuffle of part of a warp",
    "cvt.rz.f32.s32 %r2, %r1;": "unknown conversion",
    "bar.sync 1, 32;": "only barrier 0, of all threads, is known",
    "barrier.cluster.wait.acquire.aligned;": "waits at the cluster's barrier without having arrived",
    "mbarrier.arrive.shared::cta.b64 _, [room];": "there is no mbarrier at shared byte 0",
    "cp.async.bulk.global.shared::cta.bulk_group [%rd1], [room], 24;": "misaligned: a bulk copy of 24 bytes",
    "setp.lt.u32 %p1, %r1, 64; @%p1 wgmma.commit_group.sync.aligned;": "wgmma by part of a warpgroup",
    WGMMA + "1, 1, 0, 0;": "unknown descriptor",
    WGMMA + "1, 1, 1, 0;": "unknown operands",
    "mov.b64 %rd2, 0x4000000000003FFF;" + WGMMA + "1, 1, 0, 0;": "out of bounds: a tile",
}


@pytest.mark.parametrize("body", REFUSED)
def test_what_it_does_not_know_is_a_fault(body):
    with pytest.raises(Fault, match=REFUSED[body]):
        run_text(body, (128, 4))


def test_half_a_warpgroup_and_arrays_with_gaps_are_refused():
    with pytest.raises(Fault, match="whole warps"):
        run_text("wgmma.fence.sync.aligned;", (64, 4))
    with pytest.raises(ValueError, match="arrays must be contiguous"):
        Machine(Module(".entry k() {ret;}"), Launch("k", 1, 32), [np.zeros((4, 4))[:, ::2]])


def test_a_box_of_a_matrix_lies_swizzled_and_is_zero_outside(kernels):
    x = placed(np.arange(1, 1 + 20 * 96, dtype=np.uint16).reshape(20, 96))

    def box(row, column):
        y = placed(np.zeros((8, 64), np.uint16))
        params = struct.pack("<6q", x.ctypes.data, 20, 96, 192, 8, 64).ljust(128, b"\0")
        params = (params + struct.pack("<Qii", y.ctypes.data, column, row)).ljust(192, b"\0")
        Machine(kernels, Launch("box", 1, 64, params=params), [x, y]).run()
        return y

    for row, column in ((0, 0), (5, 32), (15, 64)):
        expected = np.zeros((8, 64), np.uint16)
        part = x[row : row + 8, column : column + 64]
        expected[: part.shape[0], : part.shape[1]] = part
        assert (box(row, column) == expected).all()
    with pytest.raises(Fault, match="a box that begins outside its tensor"):
        box(-3, 0)


def head(kernels, broken=0, **choices):
    rows, columns, width, random = 256, 128, 320, np.random.default_rng(5)
    numbers = [random.integers(-4, 5, (n, width)).astype(np.float32) for n in (rows, columns)]
    x, w = (placed(each.view(np.uint16)[:, 1::2]) for each in numbers)  # bfloat16
    e = placed(np.zeros((rows, columns), np.float32))
    maps = [struct.pack("<6q", m.ctypes.data, len(m), width, 2 * width, n, 64) for m, n in ((x, 128), (w, 64))]
    params = b"".join(each.ljust(128, b"\0") for each in maps) + struct.pack("<Qii", e.ctypes.data, width, columns)
    params = params.ljust(kernels.entry("head_0").parameter_bytes, b"\0")
    launch = Launch(f"head_{broken}", (2, 1), 384, cluster=2, shared=3 * 32768 + 48, params=params)
    machine = Machine(kernels, launch, [x, w, e], **choices).run()
    assert (e == numbers[0] @ numbers[1].T).all()
    assert machine.flop == 2 * rows * columns * width
    assert machine.bytes["bulk read"] == 2 * (rows + columns) * width


@pytest.mark.parametrize("choices", EVERY_ORDER, ids=str)
def test_matrix_products_and_tensor_copies(kernels, choices):
    head(kernels, **choices)


BROKEN_HEADS = {
    1: "more threads arrive at the mbarrier|race: ",
    2: "race: .*, of a bulk load not waited for",
    3: "deadlock: .*waits at an mbarrier",
    5: "race: .*, that something has still to read",
    6: LEAVES,
}


@pytest.mark.parametrize("order", ["lowest", "highest", "random"])
@pytest.mark.parametrize("broken", BROKEN_HEADS)
def test_each_mistake_with_matrix_products_is_found(kernels, broken, order):
    with pytest.raises(Fault, match=BROKEN_HEADS[broken]):
        head(kernels, broken, order=order)


def test_a_wrong_stride_of_a_tile_gives_a_wrong_product(kernels):
    with pytest.raises(AssertionError):
        head(kernels, 4)
