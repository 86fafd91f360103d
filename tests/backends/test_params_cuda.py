"""csrc/cuda/params.cu, its PTX run by tests/ptx: bits that no order of the warps, grid or address changes."""

import math
import os
import re
import subprocess
from itertools import product

import pytest
import torch

from redit_fast.backends import cpu, cuda, reference
from redit_fast.backends.cuda import module
from tests import ROOT
from tests import cuda as interpreter
from tests.backends.test_params import adamw_state, combined, perturbed, run_adamw, scalar, sum_rounding, tensors
from tests.cuda import NVCC, ORDERS, TARGETS, choose, compiled, cubin, flags, other_release
from tests.ptx import Fault, Module
from tools.known_answers import philox

pytestmark = [pytest.mark.skipif(NVCC is None, reason="nvcc is not installed"), pytest.mark.usefixtures("cuda")]
SOURCE = ROOT / "csrc" / "cuda" / "params.cu"
ROW = re.compile(r"//   (\w+) +(\d+) +(\d+) +(\d+) +(\d+) +(\d+)\n")  # of the table in its comment
TABLE = {row[0]: list(map(int, row[1:])) for row in ROW.findall(SOURCE.read_text())}
ARCHES = os.environ.get("KERNEL_ARCHS", "90").split()
FLOATS = [torch.float32, torch.bfloat16, torch.float16]
CHUNK = module.compiled.weights_per_chunk if module.compiled else 0
SMALL = [300, 1, 257, 2049, 5, 64, 8, 77, 1030]


def multiprocessors(monkeypatch, count):
    monkeypatch.setattr(module, "described", module.described._replace(multiprocessors=count))


def every_types(sizes=SMALL):
    """Parameters and gradients of every combination of types."""
    pairs = [(p, g, n) for (p, g), n in zip(product(FLOATS, FLOATS), sizes, strict=True)]
    return [torch.randn(n).to(p) for p, _, n in pairs], [(torch.randn(n) * 1e-2).to(g) for _, g, n in pairs]


def offsets_of(params, start=2**40 + 3):
    offsets = [start]
    for p in params[:-1]:
        offsets.append(offsets[-1] + p.numel())
    return offsets


def adamw_of(params, grads):
    wide = [p.float() for p in params]
    masters = [w + 1e-4 if p.dtype != torch.float32 else None for w, p in zip(wide, params)]
    m, v = [w * 1e-2 for w in wide], [w.square() * 1e-4 for w in wide]
    return params, masters, grads, m, v, [torch.tensor(float(i)) for i in range(len(params))]


def every_pass(backend, params, grads, **options):
    """Everything that the passes write: sums, then weights and gradients, then the state of AdamW."""
    norm = scalar(math.nan)
    backend.squared_norm(norm, params)
    moved, sums = perturbed(backend, params, grads, factor=0.3, offsets=offsets_of(params), **options)
    both, gaps = combined(backend, params, [p * 0.7 for p in params])
    state = [x for row in run_adamw(backend, adamw_of(params, grads)) for x in row if x is not None]
    return [norm, sums, gaps], moved + both, state


@pytest.mark.parametrize("rounding", ["stochastic", "nearest"])
def test_every_order_of_the_warps_gives_the_same_bits(monkeypatch, rounding):
    """Four blocks: some take chunks of several tensors."""
    multiprocessors(monkeypatch, 1)
    params, grads = every_types()
    options = {"rounding": rounding, "compute_dtype": torch.bfloat16}
    expected, first = every_pass(reference, params, grads, **options), None
    assert expected[0][1].min() > 0
    for order in ORDERS:
        with choose(order=order) as machines:
            sums, weights, state = every_pass(cuda, params, grads, **options)
        assert all(map(torch.equal, weights, expected[1]))
        torch.testing.assert_close(sums, expected[0], rtol=sum_rounding(torch.float32), atol=0)
        first = first or (sums, state)
        assert all(map(torch.equal, sums + state, first[0] + first[1]))
    kernels = {machine.kernel for machine in machines}
    assert len(kernels) == 9 + 9 + 3 + 3 + 2


def test_several_chunks_of_a_tensor_for_each_block_give_the_bits_of_any_grid(monkeypatch):
    sizes, found = [5 * CHUNK + 9, 1, CHUNK], []
    params, grads = tensors(torch.bfloat16, sizes=sizes), tensors(torch.bfloat16, 1e-2, sizes)
    for count in (1, 2, 132):
        multiprocessors(monkeypatch, count)
        with choose() as machines:
            sums, weights, state = every_pass(cuda, params, grads)
        assert max(machine.blocks for machine in machines) == min(4 * count, 8)
        found.append([*sums, *weights, *state])
    assert all(all(map(torch.equal, other, found[0])) for other in found[1:])
    assert all(map(torch.equal, found[0][3:9], perturbed(reference, params, grads, factor=0.3,
                                                         offsets=offsets_of(params))[0]))  # fmt: skip


@pytest.mark.parametrize("size", [CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK])
def test_sizes_at_a_chunk_s_edge(size):
    params, grads = tensors(torch.bfloat16, sizes=[size]), tensors(torch.bfloat16, 1e-2, [size])
    expected = every_pass(reference, params, grads)
    sums, weights, _ = every_pass(cuda, params, grads)
    assert all(map(torch.equal, weights, expected[1]))
    torch.testing.assert_close(sums, expected[0], rtol=sum_rounding(torch.float32), atol=0)


@pytest.mark.parametrize(("dtype", "grad_dtype"), list(product(FLOATS, FLOATS)))
def test_a_tensor_at_any_address_has_the_bits_of_an_aligned_one(dtype, grad_dtype):
    """Slices of larger tensors, which the interpreter lets nobody leave: 2 to 14 bytes past a multiple of 16."""
    n = 600
    p, g = torch.randn(n).to(dtype), (torch.randn(n) * 1e-2).to(grad_dtype)
    expected = every_pass(cuda, [p], [g])
    for first, second in ((1, 0), (0, 1), (1, 1), (2, 3), (4, 4), (5, 7)):
        slices = [torch.zeros(n + 8, dtype=x.dtype)[shift:][:n].copy_(x) for x, shift in ((p, first), (g, second))]
        assert all(x.data_ptr() % 16 == k * x.element_size() % 16 for x, k in zip(slices, (first, second)))
        norm, (moved, sums) = scalar(math.nan), run_perturb_in_place(*slices)
        assert torch.equal(sums, expected[0][1]) and all(map(torch.equal, moved, expected[1][:2]))
        slices = [x.copy_(y) for x, y in zip(slices, (p, g))]
        cuda.squared_norm(norm, slices[:1])
        assert torch.equal(norm, expected[0][0])
        state = adamw_of(slices[:1], slices[1:])
        cuda.adamw(*state, scalar(0.7), torch.tensor(True), 1e-2, 0.9, 0.999, 1e-8, 0.1)
        written = [x for row in state for x in row if x is not None]
        assert all(map(torch.equal, written, expected[2]))


def run_perturb_in_place(p, g):
    sums = torch.empty(4, dtype=torch.float64)
    cuda.perturb(sums, [p], [g], [2**40 + 3], scalar(0.37), 0.3, "stochastic", 2**64 - 9, torch.tensor(5), None)
    return [p, g], sums


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("seed", "offset", "step"),
    [(42, 7 * 8, 5)] + [(0xA4093822 | 0x299F31D0 << 32, 8 * (2**29 - 2) + k, 2**32 - 1) for k in range(8)]
    + [(2**64 - 1, 2**40 + 3, 0), (9, 2**62 + 6, 1)],
)  # fmt: skip
def test_known_halves_round_up_exactly_from_where_they_should(dtype, seed, offset, step):
    """A weight of 1 and a step to d dropped bits beyond it: up if the half of Philox, in plain Python, and d make one
    more. The first case is one of known_answers.json; the others' calls lie on both sides of 2^29 and beyond 2^40."""
    if offset == 56:
        assert f"{philox(seed, 7, 0x10000, step)[0]:08x}" == "20c12eff"
    bits, n = 16 if dtype == torch.bfloat16 else 13, 40
    words = {call: philox(seed, call, 0x10000, step) for call in {(offset + i) // 8 for i in range(n)}}
    places = [offset + i for i in range(n)]
    halves = [words[at // 8][at % 8 // 2] >> 16 * (at % 2) & (1 << bits) - 1 for at in places]
    for up in (True, False):
        dropped = [min(max((1 << bits) - half - (not up), 0), (1 << bits) - 1) for half in halves]
        exact = (torch.tensor(dropped) | 0x3F800000).to(torch.int32).view(torch.float32)
        p = torch.ones(n).to(dtype)
        (moved,), _ = perturbed_with(p, exact - 1, offset, seed, step)
        one = torch.ones((), dtype=dtype).view(torch.int16)
        wanted = torch.tensor([half + d >= 1 << bits for half, d in zip(halves, dropped)])
        assert wanted.sum() >= n - 1 if up else not wanted.any()
        assert torch.equal(moved.view(torch.int16) - one, wanted.to(torch.int16))


def perturbed_with(p, g, offset, seed, step):
    params, sums = [p], torch.empty(4, dtype=torch.float64)
    cuda.perturb(sums, params, [g], [offset], scalar(1.0), 1, "stochastic", seed, torch.tensor(step), None)
    return params, sums


def test_hundreds_of_tensors_are_several_launches_with_tables_of_their_own(monkeypatch):
    sizes = [1 + i % 20 for i in range(620)]
    params, grads = tensors(torch.bfloat16, sizes=sizes), tensors(torch.bfloat16, 1e-2, sizes)
    expected = every_pass(reference, params, grads)
    with choose() as machines:
        sums, weights, state = every_pass(cuda, params, grads)
    assert all(map(torch.equal, weights, expected[1]))
    torch.testing.assert_close(sums, expected[0], rtol=sum_rounding(torch.float32), atol=0)
    torch.testing.assert_close(state, expected[2], rtol=1e-6, atol=1e-7)
    launches = [machine.kernel.split("_")[1] for machine in machines]
    assert {kind: launches.count(kind) for kind in launches} == {
        "norm": 4, "perturb": 7, "combine": 5, "scalars": 2, "adamw": 10, "sum": 3
    }  # fmt: skip
    assert state[-1] == 620 and len({float(step) for step in state[-620:]}) == 620  # each its own count


def test_nothing_and_empty_tensors_are_fine():
    empty, one = torch.empty(0), torch.ones(())
    for lists in ([], [empty], [empty, empty.bfloat16()]):
        norm, sums, steps = scalar(math.nan), torch.full((4,), math.nan).double(), [torch.zeros(()) for _ in lists]
        cuda.squared_norm(norm, lists)
        cuda.perturb(sums, lists, lists, [0] * len(lists), scalar(1.0), 0.5, "nearest", 0, torch.tensor(0), None)
        assert norm == 0 and sums.tolist() == [0.0] * 4
        sums.fill_(math.nan)
        cuda.combine(sums[:3], lists, lists, 0.5)
        assert sums[:3].tolist() == [0.0] * 3
        wide = [x.float() for x in lists]
        cuda.adamw(lists, wide, lists, wide, wide, steps, one.double(), torch.tensor(True), 0.1, 0.9, 0.99, 1e-8, 0.0)
        assert all(step == 1 for step in steps)


def test_a_launch_reads_the_step_s_numbers_when_it_runs(monkeypatch):
    """As a CUDA graph does that is captured once and replayed: nothing of them is in the launch."""
    kept = []
    monkeypatch.setattr(module, "run_launches", lambda *launch: kept.append(launch))
    p, g, state = torch.randn(300).bfloat16(), torch.randn(300).bfloat16(), adamw_state(torch.bfloat16, [300])
    expected_p, scale, step = p.clone(), scalar(0.0), torch.tensor(1)
    sums, factor, finite = torch.zeros(4, dtype=torch.float64), scalar(math.nan), torch.tensor(False)
    cuda.perturb(sums, [p], [g], [0], scale, 1, "stochastic", 3, step, None)
    cuda.adamw(*state, factor, finite, 1e-2, 0.9, 0.999, 1e-8, 0.1)
    expected = [[None if x is None else x.clone() for x in row] for row in state]
    scale.fill_(0.1), step.fill_(7), factor.fill_(0.7), finite.fill_(True)
    for replay in range(2):
        for launch in kept:
            interpreter.interpret(*launch)
        reference.perturb(torch.zeros(4).double(), [expected_p], [g], [0], scale, 1, "stochastic", 3, step, None)
        reference.adamw(*expected, factor, finite, 1e-2, 0.9, 0.999, 1e-8, 0.1)
        assert torch.equal(p, expected_p) and sums.min() > 0
        assert state[5] == expected[5] == [replay + 1]
        for ours, theirs in zip(state[1:5], expected[1:5]):
            torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-8)
        step += 1


@pytest.mark.skipif(cpu.why_not("adamw", torch.device("cpu")) is not None, reason="the C++ backend is not built")
@pytest.mark.parametrize("beta1", [0.9, 0.3])
@pytest.mark.parametrize("dtype", FLOATS)
def test_an_adamw_step_has_the_bits_of_the_c_plus_plus_backend(dtype, beta1):
    state = adamw_state(dtype, [9, 4100, 70])
    ours, theirs = (run_adamw(backend, state, beta1=beta1) for backend in (cuda, cpu))
    for row, expected in zip(ours, theirs):
        assert all(x is y is None or torch.equal(x, y) for x, y in zip(row, expected))
    weights = 0 if state[1][0] is None else 1
    for row in (weights, 3, 4, 5):
        assert not any(map(torch.equal, ours[row], state[row]))


def test_a_float32_parameter_may_have_a_master():
    state = adamw_state(torch.float32, [70])
    state = [state[0], [state[0][0] + 1], *state[2:]]
    ours, theirs = run_adamw(cuda, state), run_adamw(reference, state)
    assert torch.equal(ours[0][0], ours[1][0]) and not torch.equal(ours[0][0], state[0][0])
    torch.testing.assert_close(ours[:2], theirs[:2], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("dtype", FLOATS)
def test_bytes_are_what_the_kernel_s_comment_says_16_at_a_time(dtype):
    n, narrow = 2 * CHUNK, torch.finfo(dtype).bits // 8
    (p,), (g,) = tensors(dtype, sizes=[n]), tensors(dtype, 1e-2, [n])
    a_thread = 2 * 256  # of one address for a block's threads, or of sums

    def moved(name, function, *arguments, **options):
        with choose() as machines:
            function(cuda, *arguments, **options)
        (machine,) = (machine for machine in machines if machine.kernel.startswith(f"params_{name}_"))
        wide = sum(
            count * (16 if "v4" in opcode else 8) for opcode, count in machine.instructions.items() if "cs.v" in opcode
        )
        assert not any("u16" in opcode or "cs.u32" in opcode for opcode in machine.instructions if ".cs" in opcode)
        return wide / n, machine.bytes["global read"] - wide_read(machine), machine.bytes["global written"] / n

    def wide_read(machine):
        return sum(
            n * (16 if "v4" in op else 8) for op, n in machine.instructions.items() if op.startswith("ld.global.cs")
        )

    wide, rest, _ = moved("perturb", perturbed, [p], [g], offsets=[0])
    assert wide == 3 * narrow and rest <= 12 * a_thread
    wide, rest, written = moved("perturb", perturbed, [p], [g], offsets=[0], factor=0.5)
    assert wide == 4 * narrow and written < 2 * narrow + 0.01
    wide, rest, _ = moved("combine", combined, [p], [g])
    assert wide == 3 * narrow and rest == 0
    wide, rest, _ = moved("norm", lambda backend: backend.squared_norm(scalar(0.0), [p]))
    assert wide == narrow and rest == 0
    wide, rest, written = moved("adamw", run_adamw, adamw_state(dtype, [n]))
    assert wide == 28 and rest <= 41 * a_thread and written == (14 if narrow == 2 else 12)


def test_no_multiply_add_is_fused_and_nothing_is_approximate():
    ptx = compiled("params", "sm_90a").read_text()
    assert len(re.findall(r"\bmul(?:\.rn)?\.f32", ptx)) > 100
    assert "fma" not in ptx and "approx" not in ptx and ".ftz" not in ptx and "atom" not in ptx


def test_a_large_model_fills_the_device_and_a_launch_has_the_threads_of_the_table(monkeypatch):
    multiprocessors(monkeypatch, 132)
    kept = []
    monkeypatch.setattr(module, "run_launches", lambda launches, _: kept.extend(launches))
    p = torch.empty(600 * CHUNK, dtype=torch.bfloat16)  # 39 MB, of which nothing is touched
    state = [torch.empty(600 * CHUNK) for _ in range(3)]
    cuda.squared_norm(scalar(0.0), [p])
    cuda.perturb(torch.zeros(4).double(), [p], [p], [0], scalar(1.0), 1, "nearest", 0, torch.tensor(0), None)
    cuda.combine(torch.zeros(3).double(), [p], [p], 0.5)
    cuda.adamw([p], state[:1], [p], *([x] for x in state[1:]), [torch.zeros(())], scalar(1.0), torch.tensor(True),
               0.1, 0.9, 0.99, 1e-8, 0.0)  # fmt: skip
    assert {launch.kernel.split("_")[1] for launch in kept} == set(TABLE)
    for launch in kept:
        kind = launch.kernel.split("_")[1]
        assert launch.threads == TABLE[kind][0] and launch.shared == 0 and launch.cluster == 1
        assert launch.blocks == {"sum": launch.blocks, "scalars": 1}.get(kind, 528)
        assert len(launch.params) <= 4096


def test_what_does_not_fit_is_refused_by_name_before_anything_is_launched():
    p, sums, room = torch.ones(8), torch.zeros(4, dtype=torch.float64), torch.zeros(4, dtype=torch.float64)
    table, view, device = cuda.params.table, module.view, module.device_of(p)
    wide = torch.ones(8, dtype=torch.float64)
    numbers, options = [view(scalar(1.0)), view(torch.tensor(1))], cuda.params.PerturbOptions(0.5, "nearest", 0, -1)
    build = module.compiled
    with pytest.raises(ValueError, match=r"^partials must be float64 of 1 x 4, got float64 of 1 x 3"):
        build.perturb(view(sums), table([p]), table([p]), [0], numbers, options, view(room[:3]), device)
    with pytest.raises(ValueError, match=r"^params\[0\] must be float32, bfloat16 or float16, got float64"):
        build.perturb(view(sums), table([wide]), table([p]), [0], numbers, options, view(room), device)
    with pytest.raises(ValueError, match=r"^grads\[0\] must be float32, bfloat16 or float16, got float64"):
        build.perturb(view(sums), table([p]), table([wide]), [0], numbers, options, view(room), device)
    with pytest.raises(ValueError, match=r"^scale must be float64"):
        cuda.perturb(sums, [p], [p], [0], torch.tensor(1.0), 0.5, "nearest", 0, torch.tensor(1), None)
    with pytest.raises(ValueError, match=r"^step must be int64"):
        cuda.perturb(sums, [p], [p], [0], scalar(1.0), 0.5, "nearest", 0, torch.tensor(1.0), None)
    for call in (
        lambda: build.squared_norm(view(sums[:1]), table([wide]), view(room[:1]), device),
        lambda: build.combine(view(sums[:3]), table([wide]), table([wide]), 0.5, view(room[:3]), device),
    ):
        with pytest.raises(ValueError, match="must be float32, bfloat16 or float16, got float64"):
            call()
    step, short = torch.zeros(()), torch.zeros(9)
    lists = [table([x]) for x in (p, None, p, p, p, step)]
    step_numbers = [view(scalar(1.0)), view(torch.tensor(True))]
    with pytest.raises(ValueError, match=r"^scalars must be float32 of 1 x 10, got float32 of 1 x 9"):
        build.adamw(lists, step_numbers, cuda.params.AdamwOptions(0.1, 0.9, 0.99, 1e-8, 0.1), view(short), device)
    assert p.eq(1).all() and not sums.any()


@pytest.mark.skipif(other_release(), reason="the table is of nvcc 13.0")
@pytest.mark.parametrize("arch", ARCHES)
def test_no_register_is_spilled_and_the_table_is_kept(arch):
    column = {"80": 2, "90": 3, "100": 4}[arch]
    report = cubin("params", TARGETS[arch]).with_suffix(".log").read_text()
    kernels = re.findall(r"'params_([a-z]+)\w*' for.*?(\d+) bytes stack.*?Used (\d+) registers([^\n]*)", report, re.S)
    assert len(kernels) == 26
    most = {kind: [TABLE[kind][0], 0, 0] for kind, *_ in kernels}
    for kind, stack, registers, more in kernels:
        shared = re.search(r"(\d+) bytes smem", more)
        most[kind][1:] = [max(most[kind][1], int(shared[1]) if shared else 0), max(most[kind][2], int(registers))]
        assert stack == "0", kind
    assert most == {kind: [*row[:2], row[column]] for kind, row in TABLE.items()}


MUTANTS = {
    "no barrier before the warps' sums are read": ("param_chunks.h", "  __syncthreads();\n", "", "race"),
    "one room for the sums of two chunks": ("param_chunks.h", "    turn ^= 1;\n", "", "race"),
    "a whole vector past the end": ("param_chunks.h", "wide ? n / count * count", "wide ? n", "out of bounds"),
    "wide accesses at any address": ("param_chunks.h", "uintptr_t>(data) % 16 == 0", "uintptr_t>(data) % 2 == 0",
                                     "misaligned"),
    "the next call's halves from this call": ("params.cu", "call + 1, k", "call, k", "bits"),
    "one half too far": ("params.cu", "shift & 1 ?", "shift & 3 ?", "bits"),
    "the second tensor from its first chunk on again": ("param_chunks.h", "int64_t(chunk - its.first_chunk)",
                                                        "int64_t(chunk)", "out of bounds|bits"),
    "a fused multiply-add": ("params.cu", "before + change", "__fmaf_rn(scale, v.g[i], before)", "bits"),
}  # fmt: skip


@pytest.mark.skipif("KERNEL_ARCHS" not in os.environ, reason="3 s of nvcc a mutant: make kernel-gates")
@pytest.mark.parametrize("mutant", MUTANTS)
def test_a_mistake_in_the_kernels_is_found(monkeypatch, tmp_path, mutant):
    file, right, wrong, found = MUTANTS[mutant]
    texts = {name: (ROOT / "csrc" / "cuda" / name).read_text() for name in ("params.cu", "param_chunks.h")}
    assert right in texts[file]
    texts[file] = texts[file].replace(right, wrong)
    for name, text in texts.items():
        (tmp_path / name).write_text(text.replace('"cuda/param_chunks.h"', '"param_chunks.h"'))
    subprocess.run([NVCC, "-ptx", "-arch=sm_90a", *flags(SOURCE), tmp_path / "params.cu", "-o", tmp_path / "x"],
                   check=True, capture_output=True)  # fmt: skip
    mutated = Module((tmp_path / "x").read_text())
    monkeypatch.setattr(interpreter, "kernels", lambda name, target: mutated)
    multiprocessors(monkeypatch, 1)
    params, grads = every_types()
    params += [torch.zeros(50, dtype=torch.bfloat16)[1:].copy_(torch.randn(49))] + tensors(
        torch.bfloat16, sizes=[9] * 8
    )
    grads += [x.clone() * 1e-2 for x in params[9:]]
    expected = every_pass(reference, params, grads)
    try:
        for order in ORDERS:
            with choose(order=order):
                _, weights, _ = every_pass(cuda, params, grads)
            assert all(map(torch.equal, weights, expected[1])), "bits"
    except (Fault, AssertionError) as error:
        assert re.search(found, str(error)), error
    else:
        pytest.fail("not found")
