"""The Triton backend on a machine without a GPU: refusals, the shared test bodies in Triton's interpreter, and what
Triton compiles when the launchers are called: for sm_90, under `make kernel-gates` for sm_80 and sm_100 too."""

import os
import re
import subprocess
import sys

import pytest
import torch

import redit_fast as rf
from redit_fast import backends
from redit_fast.backends import triton as backend
from tests.test_floors import ROOT
from tests.test_params import adamw_state, scalar, tensors

tl = pytest.importorskip("triton.language")

interpreted = os.environ.get("TRITON_INTERPRET") == "1"
compiled = pytest.mark.skipif(interpreted, reason="TRITON_INTERPRET is set: kernels were decorated to be interpreted")


@compiled
@pytest.mark.parametrize("suite", ["advantages", "params", "regularize", "triton_interpreted"])
def test_the_interpreter_passes_the_test_bodies_of_every_backend(suite):
    """In a process of its own: kernels are decorated when they are imported."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "triton", f"tests/test_{suite}.py"]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert done.returncode == 0 and " passed" in done.stdout, done.stdout + done.stderr


@compiled
def test_cpu_tensors_and_missing_ops_are_refused_with_a_sentence():
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert "CUDA tensors" in backend.why_not("perturb", cpu) and "TRITON_INTERPRET=1" in backend.why_not("perturb", cpu)
    assert backend.why_not("perturb", cuda) is None
    assert backend.why_not("token_loss", cuda) == "token_loss has no Triton version yet"
    with rf.use_backend("triton"), pytest.raises(NotImplementedError, match="triton: computes on CUDA tensors"):
        rf.group_advantages(torch.rand(8), group_size=4)


@compiled
def test_cuda_tensors_get_triton_where_it_has_the_op_and_the_reference_elsewhere():
    cuda = torch.device("cuda")
    assert backends.primitive("group_advantages", cuda) is backend.group_advantages
    assert backends.primitive("token_loss", cuda).__module__.startswith("redit_fast.backends.reference")


def test_without_triton_the_sentence_says_how_to_get_it_and_the_reference_takes_over():
    script = """
import sys
sys.modules["triton"] = None
import torch
from redit_fast import backends
print(backends._backend("triton").why_not("perturb", torch.device("cuda")))
print(backends.primitive("perturb", torch.device("cuda")).__module__)
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
    from triton.runtime.jit import JITFunction

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


def assert_clean(kernel):
    """No spills or local memory, no atomics, no fused multiply-add; float32 division and roots rounded as IEEE says."""
    assert "fma." not in kernel.asm["ptx"]
    assert not re.findall(r"(?:div|sqrt)\.(?:full|approx)\S*", kernel.asm["ptx"])
    assert not re.findall(r"\b(?:STL|LDL|ATOM|ATOMG|ATOMS|RED)\b", kernel.asm["sass"])


def count(kernel, instruction):
    return len(re.findall(rf"\b{re.escape(instruction)}\b", kernel.asm["sass"]))


@compiled
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_parameter_passes_compile_without_spills_and_with_accesses_of_16_bytes(kernels, dtype, tmp_path):
    """In flight on an SM, at 65536 registers: 4 blocks of 128 threads with 32 bytes each are 16 KB a step."""
    sizes = [4096, 8 * 1024 + 16]
    params, grads, sums = tensors(dtype, sizes=sizes), tensors(dtype, sizes=sizes), torch.zeros(4, dtype=torch.float64)
    backend.squared_norm(scalar(0.0), grads)
    for rounding in ("stochastic", "nearest"):
        for factor in (1.0, 0.5):
            for compute_dtype in (None, torch.bfloat16):
                args = scalar(1.0), factor, rounding, 7, torch.tensor(5), compute_dtype
                backend.perturb(sums, params, grads, [0, 4096], *args)
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
@pytest.mark.parametrize("distribution", ["gaussian", "uniform"])
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


@compiled
def test_the_gates_find_what_they_look_for(kernels, monkeypatch):
    import triton

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


def atomic_kernel(out_ptr, x_ptr):
    tl.atomic_add(out_ptr, tl.load(x_ptr))
