"""The Triton backend on a machine without a GPU: refusals, the shared test bodies in Triton's interpreter, and what
Triton compiles when the launchers are called: in bfloat16 for sm_90, under `make kernel-gates` in every dtype for sm_80
and sm_100 too."""

import dataclasses
import os
import re
import subprocess
import sys

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import redit_fast as rf
from redit_fast import backends
from redit_fast.backends import cuda, reference
from redit_fast.backends import triton as backend
from redit_fast.losses.transforms import LogitTransform
from tests import NO_PLUGINS, ROOT
from tests.backends.test_params import adamw_state, scalar, tensors
from tests.ops.test_token_loss import LOSSES

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")
launch_module = pytest.importorskip("redit_fast.kernels.launch")
tokens = pytest.importorskip("redit_fast.kernels.token_loss")
JITFunction = pytest.importorskip("triton.runtime.jit").JITFunction

FUSED = [config for name, config in LOSSES.items() if name not in ("gspo", "entropy")]

# The longest first.
SUITES = {
    "the head": ["linear_loss", "linear_rows", "linear_whole", "heads"],
    "logits": ["token_loss", "primitives", "triton_traffic"],
    "advantages": ["advantages", "triton_interpreted"],
    "parameters": ["params", "regularize"],
}

# `make test` interprets one case a regime: of three dtypes the second, bfloat16; of the head, whose kernels know no
# loss, two losses, and 50257 columns under softcap alone; of its inputs all at once need gradients, which are dense and
# strided; of its strides those of what kernels read; of the rows with a coefficient one and all; of the peaks one short
# of the repair and one past it; of the token losses every form once, and one of them in each way to call it; of the
# advantages' divisors the default one, and of their shuffled groups those of test_triton_interpreted.py; of the
# modes without gradients and of a process's defaults nothing.
ALL = "KERNEL_ARCHS" in os.environ
SUITES |= {"modes": ["no_grad", "default_device"]} if ALL else {}  # which are about the ops, not about their kernels
SUITES = SUITES if ALL else {"all": sum(SUITES.values(), [])}  # a process takes 5 CPU seconds to begin
REPEATED = (
    "dtype0", "dtype2", "triton-0.0-0-", "changes_nothing[triton-float64]", "changes_nothing[triton-bfloat16]",
    "(linear_grpo_loss_is_policy_loss and not grpo-kl and not entropy)",
    "(every_loss_type_has_the_gradients and not triton-gspo])",
    "(linear_logp_is_float32_exact and transform0 and 50257)",
    *(f"skip_the_gradient_products[triton-dtype1-{used}]" for used in (0, 16, 33, 100)),
    *(f"improbable_targets[triton-{std}]" for std in ("0.1", "10.0", "100.0")),
    "(every_subset_of_inputs and not needs0)",
    *(f"(any_upstream_gradient and {kind})" for kind in ("one-hot", "zeros", "expanded", "from")),
    *(f"any_strides[triton-{name}]" for name in ("none", "targets", "advantages", "mask")),
    "(is_policy_loss and 1000)",
    *(f"({test} and not triton-dapo])" for test in ("micro_batches", "known_upstream_gradient", "fully_masked")),
    "ever_exists[triton-1024]", "many_unequal",
)  # fmt: skip
CASES = "triton" if ALL else " and not ".join(["triton", *REPEATED])
DTYPES = [torch.float32, torch.bfloat16, torch.float16] if ALL else [torch.bfloat16]

interpreted = os.environ.get("TRITON_INTERPRET") == "1"
compiled = pytest.mark.skipif(interpreted, reason="TRITON_INTERPRET is set: kernels were decorated to be interpreted")


@compiled
@pytest.mark.parametrize("suites", SUITES.values(), ids=SUITES)
def test_the_interpreter_passes_the_test_bodies_of_every_backend(suites):
    """In a process of its own, since kernels are decorated when they are imported."""
    files = [file for suite in suites for file in (ROOT / "tests").glob(f"*/test_{suite}.py")]
    command = [sys.executable, "-m", "pytest", "-v", "-p", "no:cacheprovider", "-k", CASES, *files]
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", **NO_PLUGINS}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    ran = set(re.findall(r"test_(\w+)\.py::.* PASSED", done.stdout))
    assert done.returncode == 0 and ran == set(suites), done.stdout + done.stderr


@compiled
def test_cpu_tensors_are_refused_with_a_sentence():
    for op in backends.PRIMITIVES:
        refusal = backend.why_not(op, torch.device("cpu"))
        assert "CUDA tensors" in refusal and "TRITON_INTERPRET=1" in refusal
    with rf.use_backend("triton"), pytest.raises(NotImplementedError, match="triton: computes on CUDA tensors"):
        rf.group_advantages(torch.rand(8), group_size=4)


@compiled
def test_cuda_tensors_get_triton(monkeypatch):
    """Where the CUDA backend, first in the order, refuses."""
    monkeypatch.setattr(cuda, "why_not", lambda op, device: "was not built")
    for op in backends.PRIMITIVES:
        assert backends.primitive(getattr(reference, op), torch.device("cuda")) is getattr(backend, op)


def test_without_triton_the_sentence_says_how_to_get_it_and_the_reference_takes_over():
    script = """
import sys
sys.modules["triton"] = None
import torch
from redit_fast import backends
from redit_fast.backends import reference
print(backends.refusal("perturb", "triton", torch.device("cuda")))
print(backends.primitive(reference.perturb, torch.device("cuda")).__module__)
"""
    result = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    sentence, module = result.stdout.splitlines()
    assert "pip install triton" in sentence and module == "redit_fast.backends.reference.params"


# What the launchers compile.


class Target:
    """A driver without a device."""

    def __init__(self, arch):
        self.arch = arch

    def get_current_target(self):
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self):
        return self.arch

    def get_current_stream(self, device):
        return 0


@pytest.fixture(params=map(int, os.environ.get("KERNEL_ARCHS", "90").split()), ids=lambda arch: f"sm_{arch}")
def kernels(request, monkeypatch):
    """Every launch compiles for the architecture and lands here, by kernel name, instead of running."""
    from triton.runtime.driver import driver

    launched, run = {}, JITFunction.run

    def compile(self, *args, grid, warmup, **options):
        assert len(grid) == 1, "data only on grid axis 0"
        kernel = run(self, *args, grid=grid, warmup=True, **options)
        launched.setdefault(self.__name__, set()).add(kernel)
        return kernel

    monkeypatch.setattr(driver, "_active", Target(request.param))
    monkeypatch.setattr(JITFunction, "run", compile)
    return launched


def registers(kernel, tmp_path):
    from triton import knobs

    (tmp_path / "kernel.cubin").write_bytes(kernel.asm["cubin"])
    command = [knobs.nvidia.cuobjdump.path, "-res-usage", tmp_path / "kernel.cubin"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return int(re.search(r"REG:(\d+)", done.stdout + done.stderr)[1])


def assert_no_spills(kernel):
    """No local memory, and no atomics."""
    assert not re.findall(r"\b(?:STL|LDL|ATOM|ATOMG|ATOMS|RED)\b", kernel.asm["sass"])


def assert_clean(kernel):
    """Nor a fused multiply-add; float32 division and roots rounded as IEEE says."""
    assert_no_spills(kernel)
    assert "fma." not in kernel.asm["ptx"]
    assert not re.findall(r"(?:div|sqrt)\.(?:full|approx)\S*", kernel.asm["ptx"])


def count(kernel, instruction):
    """With hints to the caches between its name and its width or without."""
    name, _, width = instruction.rpartition(".")
    return len(re.findall(rf"\b{re.escape(name)}\S*\.{width}\b", kernel.asm["sass"]))


def innermost_loops(sass):
    """The instructions of each, on the way that skips what a branch forward can skip."""
    lines = [line.strip() for line in sass.splitlines()]
    places = {line[:-1]: i for i, line in enumerate(lines) if re.fullmatch(r"\w+:", line)}
    code = [i for i, line in enumerate(lines) if line.endswith(";")]
    places |= {hex(16 * n): i for n, i in enumerate(code)}  # an instruction has 16 bytes
    found = ((i, re.search(r"\bBRA(?:\.U)? (?:\S+, )?(\w+);", lines[i])) for i in code)
    targets = {i: m[1] for i, m in found if m}
    assert set(targets.values()) <= set(places)  # Triton 3.6 finds none of beyond 64 KB, where no fast loop is
    jumps = {i: places[target] for i, target in targets.items()}
    loops = [(start, end) for end, start in jumps.items() if start < end]
    for start, end in loops:
        if any(start < inner and last < end for inner, last in loops):
            continue
        taken, i = [], start
        while i <= end:
            if lines[i].endswith(";"):
                taken.append(re.sub(r"^\S+\s+(?:@\S+\s+)?", "", lines[i]))
            i = jumps[i] if i < jumps.get(i, i) <= end else i + 1
        yield taken


# Bytes a clock and SM: of a copy on an H200, 4 TB/s, and on an A100 of all that its memory has.
COPY = {80: 2.04e12 / 108 / 1.41e9, 90: 4.0e12 / 132 / 1.755e9, 100: 4.0e12 / 132 / 1.755e9}


def assert_instructions_hide_behind_the_bytes(kernel):
    """A loop's instructions, 4 warps of 32 lanes a clock, take less than 70 % of the time of its bytes."""
    for loop in innermost_loops(kernel.asm["sass"]):
        accesses = sum(bool(re.match(r"(?:LDG|STG)\.E\S*\.128", instruction)) for instruction in loop)
        most = 0.7 * 128 / COPY[kernel.metadata.target.arch] * 16 * accesses
        assert accesses == 0 or len(loop) < most, (kernel.name, len(loop), most)


@compiled
@pytest.mark.parametrize("dtype", DTYPES)
def test_parameter_passes_compile_without_spills_and_with_accesses_of_16_bytes(kernels, dtype, tmp_path):
    """In flight on an SM, at 65536 registers: 4 blocks of 128 threads with 32 bytes each are 16 KB a step."""
    sizes = [4096, 8 * 1024 + 16]
    params, grads, sums = tensors(dtype, sizes=sizes), tensors(dtype, sizes=sizes), torch.zeros(4, dtype=torch.float64)
    backend.squared_norm(scalar(0.0), grads)
    for compute_dtype in (None, torch.bfloat16):
        before = set(kernels.get("_perturb_kernel", ()))
        for rounding in ("stochastic", "nearest"):
            for factor in (1.0, 0.5):
                args = scalar(1.0), factor, rounding, 7, torch.tensor(5), compute_dtype
                backend.perturb(sums, params, grads, [0, 4096], *args)
    cast = kernels["_perturb_kernel"] - before  # float16 seen in bfloat16 takes 80 % of its bytes' time
    backend.combine(sums[:3], params, grads, 0.5)
    p, masters, g, m, v, steps = adamw_state(dtype, sizes)
    args = scalar(1.0), torch.tensor(True), 1e-2, 0.9, 0.999, 1e-8, 0.1
    backend.adamw(p, masters, g, m, v, steps, *args)
    wide = 2 if dtype == torch.float32 else 1  # accesses of 16 bytes for 8 weights
    for name, loads, stores, most in (
        ("_squared_norm_kernel", wide, 0, 64),
        ("_perturb_kernel", 2 * wide, wide, 80),
        ("_combine_kernel", 2 * wide, wide, 64),
        ("_adamw_kernel", 8 if wide == 2 else 7, 6 if wide == 2 else 7, 128),
    ):
        for kernel in kernels[name]:
            assert_clean(kernel)
            assert count(kernel, "LDG.E.128") >= loads and count(kernel, "STG.E.128") >= stores, name
            assert registers(kernel, tmp_path) <= most, name
            if kernel not in cast:
                assert_instructions_hide_behind_the_bytes(kernel)
    assert_clean(*kernels["_sum_kernel"])
    assert_clean(*kernels["_count_steps_kernel"])


@compiled
def test_other_sizes_and_numbers_of_tensors_compile_nothing_more(kernels):
    seen = []
    for sizes in ([4096], [1, 17, 70_001], [8] * 33, [65536, 3, 5]):
        x = tensors(torch.bfloat16, sizes=sizes)
        sums = torch.zeros(4, dtype=torch.float64)
        backend.perturb(sums, x, x, [8 * i for i in range(len(x))], scalar(1.0), 0.5, "stochastic", 7, scalar(0), None)
        backend.squared_norm(scalar(0.0), x)
        seen.append({name: len(found) for name, found in kernels.items()})
    assert seen[-1] == {"_perturb_kernel": 1, "_sum_kernel": 1, "_squared_norm_kernel": 1}, seen


@compiled
@pytest.mark.parametrize("distribution", ["gaussian", "uniform"] if ALL else ["gaussian"])
def test_advantages_compile_without_spills_and_with_ieee_division_and_roots(kernels, distribution):
    gentle = rf.Dither(distribution)

    def run(n=64, dither=gentle, **options):
        with rf.use_backend("triton"):
            rf.group_advantages(torch.rand(n, 2), group_size=8, dither=dither, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backend, "why_not", lambda op, device: None)
        for policy in ("apply", "skip", "center_only", "only"):
            run(dither=rf.Dither(distribution, dead_groups=policy))
        run(dither=None)
        run(scale="batch", baseline="leave_one_out")
        run(scale="none")
        run(combine="normalize_then_sum")
        before = {name: len(found) for name, found in kernels.items()}
        for n in (8, 16, 120, 4096):
            run(n)
            run(n, combine="normalize_then_sum")
            run(n, scale="batch", baseline="leave_one_out")
    assert {name: len(found) for name, found in kernels.items()} == before
    assert before["_sum_kernel"] == 7 and before["_normalize_kernel"] == 1
    for found in kernels.values():
        for kernel in found:
            assert_clean(kernel)


class Work(TorchDispatchMode):
    """Names the operators of torch that compute or copy something of 64 elements and more."""

    def __init__(self):
        super().__init__()
        self.done = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        name, sizes = func.overloadpacket.__name__, [x.numel() for x in (*args, result) if isinstance(x, torch.Tensor)]
        if not func.is_view and name != "empty" and max(sizes, default=0) >= 64:
            self.done.append(name)
        return result


@compiled
def test_advantages_of_consecutive_groups_are_one_launch(kernels, monkeypatch):
    monkeypatch.setattr(backend, "why_not", lambda op, device: None)
    launches, run = [], JITFunction.run
    monkeypatch.setattr(JITFunction, "run", lambda self, *a, **k: launches.append(self.__name__) or run(self, *a, **k))
    rewards = torch.rand(64, 1, dtype=torch.float64)
    options = dict(group_size=8, dither=rf.Dither())
    with rf.use_backend("triton"):
        rf.group_advantages(rewards, **options)  # the table of numbers stays on the device
        with Work() as work:
            rf.group_advantages(rewards, **options)
            assert launches == 2 * ["_sum_kernel"] and work.done == []
            rf.group_advantages(rewards, group_ids=torch.arange(64) % 8)
    assert "sort" in work.done


V = 151_936


def assert_limited_by_memory(kernel, width, most_registers):
    """In a pass over the logits, instructions (4 warps of 32 lanes a clock) and exponentials (16 a clock) take less
    than 70 % of the time of its bytes, 2 or 4 read an element or as many written; a step has 32 KB on the way."""
    block, warps, programs = tokens.tiles(V, width)[0]
    threads, waste = 32 * warps, -(-V // block) * block / V
    assert kernel.metadata.num_warps == warps and programs == 1
    assert most_registers * threads <= 65536
    clocks, passes = 0.7 * width / COPY[kernel.metadata.target.arch], 0
    for loop in innermost_loops(kernel.asm["sass"]):
        exponentials = sum("MUFU.EX2" in instruction for instruction in loop)
        if exponentials == 0:
            continue
        assert exponentials == block // threads
        assert len(loop) / exponentials * waste < 128 * clocks, len(loop) / exponentials
        assert 1 * waste < 16 * clocks
        loads = sum(bool(re.match(r"LDG\.E\S*\.128", instruction)) for instruction in loop)
        assert loads * 16 * threads >= 32768
        passes += 1
    return passes


def all_or_some(dtype, cases):
    """The shipped defaults only, but under `make kernel-gates`, and there in bfloat16 only: all."""
    return cases if dtype == torch.bfloat16 and "KERNEL_ARCHS" in os.environ else cases[:2]


@compiled
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("softcap", [None, 30.0])
def test_token_kernels_are_limited_by_memory(kernels, dtype, softcap, tmp_path, monkeypatch):
    """Under softcap by exponentials: 3 an element and pass, 2 ms for 16384 rows of V = 151936."""
    monkeypatch.setattr(tokens, "processors", lambda device: 1)
    logits, grad, targets = torch.empty(2, V, dtype=dtype), torch.empty(2, V, dtype=dtype), torch.zeros(2).long()
    rows, sums, transform = torch.zeros(2), torch.zeros(3, 2), rf.LossConfig(softcap=softcap).transform
    for entropy in (None, rows):
        backend.token_logp(rows, entropy, sums, logits, targets, transform)
        backend.token_logp_grad(grad, logits, targets, sums, rows, entropy, entropy, transform)
    for out in (None, grad):
        for config in all_or_some(dtype, FUSED):
            config = dataclasses.replace(config, softcap=softcap)
            backend.token_loss(rows[0], rows, rows, out, logits, targets, *[rows] * 5, config, torch.tensor(1.0))
    backend.scale_in_place(grad, torch.tensor(2.0))
    width = dtype.itemsize
    for name, passes, stores in (("_logp_kernel", 2, 0), ("_grad_kernel", 1, 4), ("_loss_kernel", 2, 0)):
        for kernel in kernels[name]:
            assert_no_spills(kernel)
            assert count(kernel, "LDG.E.128") >= 4 and count(kernel, "STG.E.128") >= stores, name
            if softcap is None:
                found = assert_limited_by_memory(kernel, width, registers(kernel, tmp_path))
                assert found == passes or (name == "_loss_kernel" and found == 3), (name, found)
    assert sum(count(kernel, "STG.E.128") > 0 for kernel in kernels["_loss_kernel"]) * 2 == len(kernels["_loss_kernel"])
    assert_no_spills(*kernels["_total_kernel"])
    assert_no_spills(*kernels["_scale_kernel"])
    assert all(count(kernel, "LDG.E.128") == count(kernel, "STG.E.128") > 0 for kernel in kernels["_scale_kernel"])


@compiled
@pytest.mark.parametrize("dtype", DTYPES)
def test_kernels_of_few_rows_compile_without_spills_and_with_accesses_of_16_bytes(kernels, dtype, monkeypatch):
    monkeypatch.setattr(tokens, "processors", lambda device: 132)
    logits, targets, rows = torch.empty(2, V, dtype=dtype), torch.zeros(2).long(), torch.zeros(2)
    for softcap in (None, 30.0):
        config = rf.LossConfig(softcap=softcap)
        for entropy in (None, rows):
            backend.token_logp(rows, entropy, torch.zeros(3, 2), logits, targets, config.transform)
        for grad in (None, logits):
            backend.token_loss(rows[0], rows, rows, grad, logits, targets, *[rows] * 5, config, torch.tensor(1.0))
    assert {name: len(found) for name, found in kernels.items()} == {
        "_lanes_kernel": 4, "_logp_kernel": 4, "_loss_kernel": 4, "_grad_kernel": 2, "_total_kernel": 1
    }  # fmt: skip
    for found in kernels.values():
        for kernel in found:
            assert_no_spills(kernel)
    for kernel in kernels["_lanes_kernel"]:
        assert count(kernel, "LDG.E.128") >= 4 and count(kernel, "STG.E.128") >= 1


@compiled
def test_kernels_without_a_smaller_tile_fit_any_device(kernels, tmp_path, monkeypatch):
    """Those of parameters, advantages, the head and scale_in_place: half of a processor's registers, 48 KB at most."""
    monkeypatch.setattr("redit_fast.kernels.linear_loss._product", lambda *args: None)
    monkeypatch.setattr(backend, "why_not", lambda op, device: None)
    x = tensors(torch.bfloat16, sizes=[4096])
    backend.squared_norm(scalar(0.0), x)
    backend.perturb(torch.zeros(4).double(), x, x, [0], scalar(1.0), 0.5, "stochastic", 7, scalar(0), None)
    backend.combine(torch.zeros(3).double(), x, x, 0.5)
    p, *state = adamw_state(torch.bfloat16, [4096])
    backend.adamw(p, *state, scalar(1.0), torch.tensor(True), 1e-2, 0.9, 0.999, 1e-8, 0.1)
    with rf.use_backend("triton"):
        for combine in ("sum_then_normalize", "normalize_then_sum"):
            rf.group_advantages(torch.rand(64, 2), group_size=8, dither=rf.Dither(), combine=combine)
        rf.group_advantages(torch.rand(64, 2), group_size=8, scale="batch")
    hidden, weight, rows = torch.empty(16, 64).bfloat16(), torch.empty(V, 64).bfloat16(), torch.zeros(16)
    e, transform = torch.empty(16, V, dtype=torch.bfloat16), rf.LossConfig(softcap=30.0).transform
    sums, inputs = torch.zeros(3, 16), (hidden, weight, torch.empty(V).bfloat16(), rows.long(), transform)
    backend.exp_product(e, rows, rows, sums, *inputs)
    backend.exp_product_grad(e, sums, rows, *inputs, rows, rows)
    backend.scale_in_place(e, torch.tensor(2.0))
    assert len(kernels) == 16, sorted(kernels)

    def fits(kernel):
        used = 32 * kernel.metadata.num_warps * registers(kernel, tmp_path)
        return used <= 32768 and kernel.metadata.shared <= 48 << 10

    assert [kernel.name for found in kernels.values() for kernel in found if not fits(kernel)] == []
    backend.token_logp(rows[:1], None, torch.zeros(3, 1), e[:1], rows[:1].long(), transform)
    assert not any(map(fits, kernels["_logp_kernel"]))  # which has smaller tiles


@compiled
@pytest.mark.parametrize("dtype", DTYPES)
def test_head_kernels_compile_without_spills_and_with_accesses_of_16_bytes(kernels, dtype, monkeypatch):
    monkeypatch.setattr("redit_fast.kernels.linear_loss._product", lambda *args: None)
    hidden, weight, targets = torch.empty(16, 64, dtype=dtype), torch.empty(V, 64, dtype=dtype), torch.zeros(16).long()
    e, bias = torch.empty(16, V, dtype=torch.float32 if dtype == torch.float16 else dtype), torch.empty(V, dtype=dtype)
    rows, sums = torch.zeros(16), torch.zeros(3, 16)
    for transform in (rf.LossConfig().transform, rf.LossConfig(softcap=30.0).transform):
        for out, added in ((None, None), (e, bias), (e, None)):
            backend.exp_product(out, rows, rows, sums, hidden, weight, added, targets, transform)
        for h in (None, rows):
            backend.exp_product_grad(e, sums, rows, hidden, weight, None, targets, transform, rows, h)
    assert len(kernels["_tile_kernel"]) == 8  # sums; sums and E, with and without the bias; E alone; times softcap
    for found in kernels.values():
        for kernel in found:
            assert_no_spills(kernel)
    for kernel in kernels["_tile_kernel"]:
        assert count(kernel, "LDG.E.128") >= 4


@compiled
def test_other_numbers_of_rows_and_hyper_parameters_compile_nothing_more(kernels, monkeypatch):
    monkeypatch.setattr(tokens, "processors", lambda device: 132)
    seen = []
    for n in (1, 2, 3, 16, 17, 64, 100, 128):
        logits, targets = torch.empty(n, 40_000, dtype=torch.bfloat16), torch.zeros(n).long()
        rows, sums = torch.zeros(n), torch.zeros(3, n)
        backend.token_logp(rows, None, sums, logits, targets, LogitTransform(1 + n / 100))
        backend.token_logp_grad(logits, logits, targets, sums, rows, None, None, LogitTransform(1 + n / 100))
        config = rf.LossConfig(epsilon_low=0.1 + n / 1000, delta=2.0 + n)
        backend.token_loss(rows[0], rows, rows, logits, logits, targets, *[rows] * 5, config, torch.tensor(1.0))
        seen.append({name: len(found) for name, found in kernels.items()})
    once, twice = ("_grad_kernel", "_total_kernel"), ("_logp_kernel", "_loss_kernel", "_lanes_kernel")
    assert seen[-1] == dict.fromkeys(once, 1) | dict.fromkeys(twice, 2), seen  # few rows and many; with entropy


@compiled
def test_a_tile_too_large_for_the_device_makes_way_for_a_smaller_one():
    from triton.runtime.errors import OutOfResources

    tried = []

    def launch(block, warps):
        tried.append(block)
        if block > 100:
            raise OutOfResources(block, 100, "registers")

    launch_module.first_that_fits(launch, [(400, 4), (200, 2), (50, 1), (25, 1)])
    assert tried == [400, 200, 50]
    with pytest.raises(NotImplementedError, match="registers"):
        launch_module.first_that_fits(launch, [(400, 4), (200, 2)])


@compiled
def test_the_gates_find_what_they_look_for(kernels, monkeypatch):
    from redit_fast.kernels import params as passes

    odd = [torch.zeros(4097, dtype=torch.bfloat16)[1:]]
    backend.squared_norm(scalar(0.0), odd)
    (narrow,) = kernels["_squared_norm_kernel"]
    assert_clean(narrow)
    assert count(narrow, "LDG.E.128") == 0
    x = tensors(torch.bfloat16, sizes=[4096])
    for options in ({"enable_fp_fusion": True}, {"enable_fp_fusion": False, "maxnreg": 24}):
        monkeypatch.setattr(passes, "LAUNCH", {"num_warps": 4, **options})
        kernels.clear()
        backend.combine(torch.zeros(3, dtype=torch.float64), x, x, 0.5)
        with pytest.raises(AssertionError):
            assert_clean(*kernels["_combine_kernel"])
    triton.jit(atomic_kernel)[(1,)](torch.zeros(1), torch.zeros(1))
    with pytest.raises(AssertionError):
        assert_clean(*kernels["atomic_kernel"])


@compiled
def test_the_gate_of_the_token_kernels_finds_narrow_accesses_and_more_exponentials(kernels, tmp_path):
    targets, rows, sums = torch.zeros(2).long(), torch.zeros(2), torch.zeros(3, 2)

    def compiled_kernel(logits, **transform):
        kernels.clear()
        backend.token_logp(rows, rows, sums, logits, targets, LogitTransform(**transform))
        return *kernels["_logp_kernel"], 2, registers(*kernels["_logp_kernel"], tmp_path)

    aligned, odd = torch.empty(2, V, dtype=torch.bfloat16), torch.empty(2, V + 1, dtype=torch.bfloat16)[:, :V]
    assert assert_limited_by_memory(*compiled_kernel(aligned)) == 2
    for broken in (compiled_kernel(odd), compiled_kernel(aligned, softcap=30.0)):
        with pytest.raises(AssertionError):
            assert_limited_by_memory(*broken)
    kernel, width, _ = compiled_kernel(aligned)
    with pytest.raises(AssertionError):
        assert_limited_by_memory(kernel, width, 129)


def atomic_kernel(out_ptr, x_ptr):
    tl.atomic_add(out_ptr, tl.load(x_ptr))
