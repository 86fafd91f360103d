"""The CUDA backend on a machine without a GPU: refusals, and the shared test bodies on the PTX of its kernels."""

import os
import re
import subprocess
import sys

import pytest
import torch

import redit_fast as rf
from redit_fast import backends
from redit_fast.backends import cuda as backend
from redit_fast.backends import reference
from redit_fast.backends.cuda import module
from tests import NO_PLUGINS, ROOT
from tests.cuda import NVCC

HEAD = ["linear_loss", "linear_rows", "linear_whole", "heads"]
# A process each, which takes 4 CPU seconds to begin.
SUITES = {
    "the head": HEAD,
    "the rest": ["token_loss", "hostile_logits", "primitives", "no_grad", "params", "regularize", "advantages"],
}
# `make test` interprets one case a regime. Of the head: of three dtypes float32, whose products are torch's, and in the
# cases that are named bfloat16, whose product is our own and takes 2 s a launch; of the rows with a coefficient some.
OWN_PRODUCT = ("log_probs and grpo-kl", "grad-needs0", "same_bits_whatever", "padded_beyond")
REPEATED_OF_HEAD = (
    "dtype2",
    f"(dtype1 and not ({') and not ('.join(OWN_PRODUCT)}))",
    "rounding_alone[cuda-60",
    "(skip_the_gradient and not (dtype0-33 or dtype0-128))",
)
# Of the others: of three dtypes bfloat16 (where none is named it is float32); of 50257 columns and more one row; every
# loss form once; of the peaks one short of the repair and one past it; hostile hidden states of one size, in float32
# (torch's product) and bfloat16 (our own); of the advantages what test_advantages_cuda.py has not in every order.
REPEATED = (
    "(dtype0 and not from_hidden)", "dtype2", "50257-dtype1", "shape4-dtype1", "(from_logits and 50257)",
    "(from_logits and 151936 and (up or down))", "(from_hidden and not 127)",
    "many_unequal", "0.0-0-",
    "bits_wherever_it_stands[cuda-2]", "same_bits[cuda-50257]", "(nan_alone and 50257 and True)",
    *(f"improbable_targets[cuda-{std}]" for std in ("0.1", "10.0", "100.0")), "(is_policy_loss and 1000)",
    *(f"({test} and not cuda-dapo])" for test in ("micro_batches", "known_upstream_gradient", "fully_masked")),
)  # fmt: skip


def cases(suites):
    if "KERNEL_ARCHS" in os.environ:
        return "cuda"
    return " and not ".join(["cuda", *(REPEATED_OF_HEAD if suites is HEAD else REPEATED)])


built = pytest.mark.skipif(module.missing is not None, reason=f"cuda: {module.missing}")


@built
@pytest.mark.skipif(NVCC is None, reason="nvcc is not installed")
@pytest.mark.parametrize("suites", SUITES.values(), ids=SUITES)
def test_the_kernels_pass_the_test_bodies_of_every_backend(suites):
    """In a process of its own, since the grid of backends is made when tests are collected."""
    files = [file for suite in suites for file in (ROOT / "tests").glob(f"*/test_{suite}.py")]
    command = [sys.executable, "-m", "pytest", "-v", "-p", "no:cacheprovider", "-k", cases(suites), *files]
    environment = os.environ | {"REDIT_FAST_CUDA_INTERPRET": "1", "OMP_NUM_THREADS": "1", **NO_PLUGINS}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    ran = set(re.findall(r"test_(\w+)\.py::.*cuda.* PASSED", done.stdout))
    assert done.returncode == 0 and ran == set(suites), done.stdout + done.stderr


@built
def test_cpu_tensors_are_refused_with_a_sentence():
    with (
        rf.use_backend("cuda"),
        pytest.raises(NotImplementedError, match="cuda: computes on CUDA tensors only, got cpu"),
    ):
        rf.group_advantages(torch.rand(8), group_size=4)


@built
def test_without_an_interpreter_that_is_the_sentence(monkeypatch):
    monkeypatch.setenv("REDIT_FAST_CUDA_INTERPRET", "1")
    monkeypatch.setattr(module, "run_launches", None)
    with rf.use_backend("cuda"), pytest.raises(NotImplementedError, match="no interpreter is"):
        rf.group_advantages(torch.rand(8), group_size=4)
    assert "on CPU tensors only" in backend.why_not("group_advantages", torch.device("cuda"))


@built
def test_a_driver_that_is_not_there_is_one_sentence_and_triton_is_next(monkeypatch):
    if torch.cuda.is_available():
        pytest.skip("this machine has a driver")
    sentence = backend.why_not("group_advantages", torch.device("cuda", 0))
    assert "finds no driver or an older one (device 0: cudaErrorInsufficientDriver: " in sentence
    assert "install a newer driver, or build with a toolkit that is not newer than" in sentence
    monkeypatch.setattr(backends.import_module("redit_fast.backends.triton"), "why_not", lambda op, device: None)
    chosen = backends.primitive(reference.group_advantages, torch.device("cuda", 0))
    assert chosen.__module__ == "redit_fast.backends.triton.advantages"


@pytest.mark.parametrize(
    ("architecture", "targets"),
    [
        (90, "sm_80 sm_90a"), (90, "sm_90"), (90, "compute_80"), (90, "sm_80 compute_90a"), (86, "sm_80"),
        (120, "sm_80 sm_90a sm_100 compute_100"), (103, "sm_100"), (103, "sm_100f"), (103, "compute_100f"),
    ],
)  # fmt: skip
def test_architectures_that_run(monkeypatch, architecture, targets):
    assert refusal_on(monkeypatch, architecture, targets) is None


@pytest.mark.parametrize(
    ("architecture", "targets"),
    [
        (90, "sm_80"), (80, "sm_86"), (80, "sm_90a compute_90"), (100, "sm_90a compute_90a"), (75, "sm_80"),
        (120, "sm_100f compute_100f"),
    ],
)  # fmt: skip
def test_architectures_that_do_not(monkeypatch, architecture, targets):
    sentence = refusal_on(monkeypatch, architecture, targets)
    name = f"{architecture // 10}.{architecture % 10}"
    best = {"9.0": "9.0a"}.get(name, name)  # plain 9.0 has no wgmma
    assert targets in sentence and f"TORCH_CUDA_ARCH_LIST={best} " in sentence


def refusal_on(monkeypatch, architecture, targets):
    class compiled:
        architectures, toolkit = targets, 13000

        @staticmethod
        def device(index):
            return (index, architecture, 132, 232448, 0)

    monkeypatch.setattr(module, "compiled", compiled)
    module._device.cache_clear(), module.why_no_kernels.cache_clear()
    try:
        return module.why_no_kernels(0)
    finally:
        module._device.cache_clear(), module.why_no_kernels.cache_clear()
