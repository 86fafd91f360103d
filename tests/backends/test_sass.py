"""What ptxas makes of csrc/cuda: the opcodes of every kernel, by the disassemblers of tests/packages.txt."""

import os
import re

import pytest

from tests.budgets import assert_within, read, sass, why_not
from tests.cuda import CUOBJDUMP, NVCC, NVDISASM, SOURCES, TARGETS, compiled, opcodes, other_release

pytestmark = [
    pytest.mark.skipif(NVCC is None, reason="nvcc is not installed"),
    pytest.mark.skipif(CUOBJDUMP is None, reason="cuobjdump is not installed (nvidia-cuda-cuobjdump)"),
    pytest.mark.skipif(NVDISASM is None, reason="nvdisasm is not installed (nvidia-cuda-nvdisasm)"),
]
ARCHES = os.environ.get("KERNEL_ARCHS", "90").split()
CLUSTERS = [arch for arch in ARCHES if arch != "80"]  # which has none: its kernels are empty


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


@pytest.mark.parametrize("arch", ARCHES)
def test_no_kernel_has_more_instructions_than_its_budget(arch):
    stored = read()["sass"]
    if reason := why_not("sass", stored):
        pytest.skip(reason)
    unit = f"instructions, {TARGETS[arch]}"
    assert_within({name: {unit: units[unit]} for name, units in stored.items() if unit in units}, sass.of(arch))
