"""The CUDA backend without a GPU: the PTX that nvcc makes of csrc/cuda, run by tests/ptx on CPU tensors. conftest.py
puts `interpret` into the backend where REDIT_FAST_CUDA_INTERPRET is set; the fixture `cuda` does so for one test."""

import contextlib
import functools
import hashlib
import os
import re
import shutil
import subprocess
import sysconfig
from contextvars import ContextVar
from pathlib import Path

import torch

from tests import ROOT
from tests.ptx import Launch, Machine, Module

NVCC = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
BIN = os.pathsep.join(map(str, Path(sysconfig.get_path("purelib"), "nvidia").glob("cu*/bin")))
PATH = os.pathsep.join([BIN, os.environ["PATH"]])
CUOBJDUMP, NVDISASM = (shutil.which(name, path=PATH) for name in ("cuobjdump", "nvdisasm"))
INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", re.M)
ORDERS = ("lowest", "highest", "random")
TARGETS = {"80": "sm_80", "90": "sm_90a", "100": "sm_100"}  # of KERNEL_ARCHS
EMPTY = "4"  # registers of a kernel on an architecture that it is not for, "-" in the tables
# A kernel's name begins with its file's.
SOURCES = sorted((file.stem for file in (ROOT / "csrc" / "cuda").glob("*.cu")), key=len, reverse=True)
WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_choices: ContextVar[dict | None] = ContextVar("choices", default=None)


def flags(source):
    exact = ["-fmad=false"] * ("-fmad=false" in source.read_text())  # the file's own comment says so
    return ["-std=c++17", "-O3", f"-I{ROOT / 'csrc'}", *exact]


def compiled(name, target, *more, kind="ptx"):
    """The file that nvcc makes of csrc/cuda/`name`.cu, and beside it, `.log`, what nvcc says: kept in build/ until a
    source changes."""
    source = ROOT / "csrc" / "cuda" / f"{name}.cu"
    headers = sorted((ROOT / "csrc").glob("shared/*.h")) + sorted((ROOT / "csrc").glob("cuda/*.h"))
    command = [NVCC, f"-{kind}", f"-arch={target}", *flags(source), *more]
    key = hashlib.sha256("".join([*command, *(file.read_text() for file in [source, *headers])]).encode())
    path = ROOT / "build" / "ptx" / f"{name}-{target}-{key.hexdigest()[:16]}.{kind}"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        draft = path.with_suffix(f".{os.getpid()}")
        plain = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}  # of `make sanitize`
        done = subprocess.run([*command, source, "-o", draft], env=plain, stderr=subprocess.PIPE, text=True)
        assert done.returncode == 0, done.stderr
        path.with_suffix(".log").write_text(done.stderr)
        os.replace(draft, path)
    return path


def cubin(name, target):
    """Machine code; its `.log` has the registers of each kernel."""
    return compiled(name, target, "-Xptxas", "-v", kind="cubin")


@functools.cache
def opcodes(name, arch):
    """Of each kernel of csrc/cuda/`name`.cu all but those that only fill up; NVIDIA's own names, modifiers and all."""
    command = [CUOBJDUMP, "-sass", cubin(name, TARGETS[arch])]
    listing = subprocess.run(command, check=True, capture_output=True, text=True, env=os.environ | {"PATH": PATH})
    _, *kernels = re.split(r"^\s+Function : ", listing.stdout, flags=re.M)
    found = {text.split()[0]: [op for op in INSTRUCTION.findall(text) if op != "NOP"] for text in kernels}
    assert found and all("EXIT" in ops for ops in found.values())
    return found


def other_release():
    """ptxas of another release counts otherwise."""
    told = subprocess.run([NVCC, "--version"], capture_output=True, text=True).stdout if NVCC else ""
    return "release 13.0" not in told


@functools.cache
def kernels(name, target):
    return Module(compiled(name, target).read_text())


def arrays(tensors):
    """The memory of the tensors: of a matrix whose rows are apart, each row."""
    found = {}
    for tensor in tensors:
        if tensor.numel() == 0:
            continue
        words = tensor.detach().view(WORDS[tensor.element_size()])
        if words.ndim == 2 and words.stride(0) == 1:
            words = words.t()
        apart = words.ndim == 2 and words.stride(1) == 1 and not words.is_contiguous()
        found |= {row.data_ptr(): row.numpy() for row in (words if apart else [span(words)])}
    return list(found.values())


def span(words):
    """From the first element of a tensor to its last."""
    count = 1 + sum((size - 1) * stride for size, stride in zip(words.shape, words.stride()))
    return words.as_strided([count], [1])


def interpret(launches, tensors):
    choices = dict(_choices.get() or {})
    target, watched = choices.pop("target", "sm_90a"), choices.pop("watched", None)
    for launch in launches:
        size = launch.threads, launch.cluster, launch.shared, launch.params
        file = next(name for name in SOURCES if launch.kernel.startswith(name))
        machine = Machine(
            kernels(file, target), Launch(launch.kernel, launch.blocks, *size), arrays(tensors), **choices
        )
        machine.run()
        if watched is not None:
            watched.append(machine)


@contextlib.contextmanager
def choose(**choices):
    """Inside the block: `order`, `seed`, `late`, `ulps` of a Machine, and the `target` that nvcc compiles for. Gives
    the list of the machines that have run."""
    watched = []
    token = _choices.set((_choices.get() or {}) | choices | {"watched": watched})
    try:
        yield watched
    finally:
        _choices.reset(token)
