"""What ptxas makes of csrc/cuda: the opcodes of every kernel, by the disassemblers of tests/packages.txt."""

import functools
import os
import re
import shutil
import subprocess
import sysconfig
from pathlib import Path

import pytest

from tests.cuda import NVCC, SOURCES, TARGETS, compiled, cubin, other_release

BIN = os.pathsep.join(map(str, Path(sysconfig.get_path("purelib"), "nvidia").glob("cu*/bin")))
PATH = os.pathsep.join([BIN, os.environ["PATH"]])
CUOBJDUMP, NVDISASM = (shutil.which(name, path=PATH) for name in ("cuobjdump", "nvdisasm"))
pytestmark = [
    pytest.mark.skipif(NVCC is None, reason="nvcc is not installed"),
    pytest.mark.skipif(CUOBJDUMP is None, reason="cuobjdump is not installed (nvidia-cuda-cuobjdump)"),
    pytest.mark.skipif(NVDISASM is None, reason="nvdisasm is not installed (nvidia-cuda-nvdisasm)"),
]
ARCHES = os.environ.get("KERNEL_ARCHS", "90").split()
CLUSTERS = [arch for arch in ARCHES if arch != "80"]  # which has none: its kernels are empty
INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", re.M)


@functools.cache
def opcodes(name, arch):
    """Of each kernel of csrc/cuda/`name`.cu all but those that only fill up; NVIDIA's own names, modifiers and all."""
    command = [CUOBJDUMP, "-sass", cubin(name, TARGETS[arch])]
    listing = subprocess.run(command, check=True, capture_output=True, text=True, env=os.environ | {"PATH": PATH})
    _, *kernels = re.split(r"^\s+Function : ", listing.stdout, flags=re.M)
    found = {text.split()[0]: [op for op in INSTRUCTION.findall(text) if op != "NOP"] for text in kernels}
    assert found and all("EXIT" in ops for ops in found.values())
    return found


def has(ops, pattern):
    return any(re.fullmatch(pattern, op) for op in ops)


@pytest.mark.parametrize("arch", ARCHES)
@pytest.mark.parametrize("name", SOURCES)
def test_no_kernel_has_local_memory_or_atomics(name, arch):
    """A spilled register is an STL. SYNCS, the mbarriers', are none, nor is REDUX, a warp's."""
    for kernel, ops in opcodes(name, arch).items():
        kinds = {op.split(".")[0] for op in ops}
        assert not kinds & {"LDL", "STL"}, kernel
        assert not [kind for kind in kinds if "ATOM" in kind or re.search("RED(?!UX)", kind)], kernel


@pytest.mark.parametrize("arch", ARCHES)
def test_rows_that_are_read_twice_move_16_bytes_at_once(arch):
    kernels = {kernel: ops for kernel, ops in opcodes("token_loss", arch).items() if kernel != "token_loss_total"}
    assert len(kernels) == 3 * (2 * 3 + 1)
    for kernel, ops in kernels.items():
        assert has(ops, r"LDG\.(\w+\.)*128.*"), kernel
        assert has(ops, r"STG\.(\w+\.)*128.*") == ("_logp_" not in kernel), kernel


@pytest.mark.parametrize("arch", CLUSTERS)
def test_rows_that_are_read_once_move_by_bulk_copies(arch):
    kernels = opcodes("token_loss_cluster", arch)
    assert len(kernels) == 6 * (5 + 2)
    for kernel, ops in kernels.items():
        assert has(ops, r"UBLKCP\.S\.G.*"), kernel
        assert has(ops, r"UBLKCP\.G\.S.*") == ("_logp_" not in kernel), kernel


@pytest.mark.skipif(other_release(), reason="the numbers are nvcc 13.0's")
@pytest.mark.parametrize("arch", CLUSTERS)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_instructions_an_element(dtype, arch):
    """What two vectors of eight a thread add to a kernel."""
    kernels = opcodes("token_loss_cluster", arch)
    less, some, more = (kernels[f"token_loss_cluster_512x{vectors}_{dtype}"] for vectors in (6, 8, 10))
    for first, second, most in ((less, some, 10), (some, more, 12.5)):
        assert second.count("MUFU.EX2") - first.count("MUFU.EX2") == 16
        assert (len(second) - len(first)) / 16 <= most


@pytest.mark.skipif("90" not in ARCHES, reason="KERNEL_ARCHS lacks 90: wgmma is of sm_90a alone")
def test_the_head_s_product_has_wgmma_multicast_and_registers_that_move():
    kernels = opcodes("linear_loss_product", "90")
    assert len(kernels) == 2
    for kernel, ops in kernels.items():
        for pattern in (
            r"HGMMA\..*BF16",
            r"UTMALDG\.2D\.MULTICAST",
            r"USETMAXREG\.TRY_ALLOC.*",
            r"USETMAXREG\.DEALLOC.*",
        ):
            assert has(ops, pattern), (kernel, pattern)


@pytest.mark.parametrize("arch", ARCHES)
def test_the_advantages_fuse_no_multiplication_with_an_addition(arch):
    """In PTX: ptxas makes divisions and roots of fused ones, whose results are those of the division."""
    ptx = compiled("advantages", TARGETS[arch]).read_text()
    assert len(re.findall(r"\bmul(?:\.rn)?\.f64", ptx)) > 50 and "fma" not in ptx
