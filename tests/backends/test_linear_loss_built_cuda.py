"""What nvcc makes of the head's kernels: registers and bytes as their comments say, and each mistake in the ring of the
product found by tests/ptx."""

import re
import subprocess

import pytest
import torch

from redit_fast.backends import reference
from redit_fast.backends.cuda import linear_loss as ours
from tests import ROOT
from tests import cuda as compiler
from tests.backends.test_linear_loss_cuda import ARCHES, BF16, Head, described, head, launched, run, slow
from tests.cuda import EMPTY, NVCC, ORDERS, TARGETS, choose, cubin, flags, other_release
from tests.ptx import Fault, Module
from tests.tolerance import relative

__all__ = ["launched"]  # a fixture
pytestmark = [pytest.mark.skipif(NVCC is None, reason="nvcc is not installed"), pytest.mark.usefixtures("cuda")]

ANY = "race|deadlock|more threads arrive"
# Of the ring's kernel: what is replaced, and by what; the fault, or None where only the numbers are wrong.
MUTANTS = {
    "wrong stride of a tile": ("wgmma_tile(stage.w + k, 1024)", "wgmma_tile(stage.w + k, 512)", None),
    "no wait for an empty stage": (
        "device::mbarrier_wait(ring.empty + turn.stage, turn.parity ^ 1);",
        "",
        ANY,
    ),
    "no wait for a full stage": ("device::mbarrier_wait(ring.full + turn.stage, turn.parity);", "", ANY),
    "multicast to one block": ("column, full, 3)", "column, full, 1)", "deadlock"),
    "a stage released too early": ("if (s > 0) release(before);", "release(turn.stage);", ANY),
    "the parity never turns": ("stage = 0, parity ^= 1;", "stage = 0;", ANY),
    "no barrier of the cluster at the end": (
        "device::sync_cluster();  // nobody writes",
        "// nobody writes",
        "block . leaves, thread .* of block . reached into it|has left",
    ),
    "one part past the last": ("count(pairs * p.parts)", "count(pairs * (p.parts + 1))", "race|out of bounds"),
}


@slow
@pytest.mark.skipif("90" not in ARCHES, reason="the product is of sm_90a alone, and KERNEL_ARCHS is without 90")
@pytest.mark.parametrize("name", MUTANTS)
def test_each_mistake_in_the_ring_is_found(name, monkeypatch, tmp_path):
    right, wrong, fault = MUTANTS[name]
    source = ROOT / "csrc" / "cuda" / "linear_loss_product.cu"
    text = source.read_text()
    assert text.count(right) == 1
    mutant = tmp_path / source.name
    mutant.write_text(text.replace(right, wrong))
    ptx = tmp_path / "mutant.ptx"
    subprocess.run([NVCC, "-ptx", "-arch=sm_90a", *flags(source), mutant, "-o", ptx], check=True)
    module_of, broken = compiler.kernels, Module(ptx.read_text())
    monkeypatch.setattr(
        compiler, "kernels", lambda file, target: broken if file == source.stem else module_of(file, target)
    )
    described(monkeypatch, clusters=1)
    inputs = head(12, 257, 320, scale=320**-0.5)
    expected, found = run(reference, inputs), []
    for order in ORDERS:
        try:
            with choose(order=order):
                results = run(ours, inputs)
            found.append(relative(results.e, expected.e) > 0.05)
        except Fault as caught:
            assert fault and re.search(fault, str(caught)), caught
            found.append(True)
    assert any(found)


# Of the comments of both files.
ROW = re.compile(r"//   (\w+) +(\d+) +(\d+) +([-\d]+) +([-\d]+) +([-\d]+)\n")
FILES = ("linear_loss", "linear_loss_product")
TABLES = {
    file: {row[0]: row[1:] for row in ROW.findall((ROOT / "csrc" / "cuda" / f"{file}.cu").read_text())}
    for file in FILES
}


def test_a_launch_has_the_threads_and_bytes_of_the_table(launched, monkeypatch):
    """A vocabulary that is large enough for tiles of 4096 columns."""
    monkeypatch.setattr(ours, "_product", lambda out, hidden, weight: None)
    inputs = Head(*(torch.zeros(shape, dtype=BF16) for shape in ((2, 8), (262144, 8))), None, torch.zeros(2).long())
    for clusters in (0, 1):
        described(monkeypatch, clusters=clusters)
        run(ours, inputs)
    assert set(launched) == {f"linear_loss_{name}" for table in TABLES.values() for name in table}
    for file, table in TABLES.items():
        for name, (threads, shared, *_) in table.items():
            launch = launched[f"linear_loss_{name}"]
            dynamic = int(shared) if file == "linear_loss_product" else 0
            assert (launch.threads, launch.shared) == (int(threads), dynamic), name


@pytest.mark.skipif(other_release(), reason="the table is of nvcc 13.0")
@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("arch", ARCHES)
def test_no_register_is_spilled_and_the_table_is_kept(arch, file):
    column = {"80": 2, "90": 3, "100": 4}[arch]
    table = TABLES[file]
    report = cubin(file, TARGETS[arch]).with_suffix(".log").read_text()
    pattern = r"'linear_loss_(\w+)' for.*?(\d+) bytes stack.*?Used (\d+) registers(?:[^\n]*?(\d+) bytes smem)?"
    found = re.findall(pattern, report, re.S)
    assert {kernel for kernel, *_ in found} == set(table)
    assert "spill" not in re.sub(r"\b0 bytes spill", "", report) and "warning" not in report
    for kernel, stack, registers, shared in found:
        assert stack == "0" and int(registers) <= int(table[kernel][column].replace("-", EMPTY)), kernel
        if file == "linear_loss":
            assert int(shared or 0) == int(table[kernel][1]), kernel


@slow
@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100", "compute_90"])
def test_without_the_features_of_sm_90a_there_is_no_product(target, tmp_path):
    source = ROOT / "csrc" / "cuda" / "linear_loss_product.cu"
    subprocess.run([NVCC, "-ptx", f"-arch={target}", *flags(source), source, "-o", tmp_path / "ptx"], check=True)
    ptx = (tmp_path / "ptx").read_text()
    assert ptx.count(".entry") == 2 and "wgmma" not in ptx and "mbarrier" not in ptx
