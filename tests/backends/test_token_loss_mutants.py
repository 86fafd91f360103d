"""Mistakes made in the token-loss kernels on purpose, each compiled and run: a fault of tests/ptx or a wrong result."""

import os
import re
import subprocess

import pytest
import torch

from tests import ROOT, cuda
from tests.backends.test_token_loss_cuda import TWO_BLOCKS, hostile, logp_of, loss_of, placed, same
from tests.cuda import NVCC, ORDERS, flags
from tests.ptx import Fault, Module

pytestmark = [
    pytest.mark.skipif(NVCC is None, reason="nvcc is not installed"),
    pytest.mark.skipif("KERNEL_ARCHS" not in os.environ, reason="only `make kernel-gates` compiles them"),
    pytest.mark.usefixtures("cuda"),
]
WRONG = "a wrong result"
# What it is, the text, what takes its place, and what is reported.
CLUSTER = [
    ("as it is", "", "", None),
    (
        "no barrier before the warps' sums are read",
        "        shared.warps.put(sums.others, sums.weighted);\n        __syncthreads();\n",
        "        shared.warps.put(sums.others, sums.weighted);\n",
        "race: .* shared byte",
    ),
    (
        "no barrier of the cluster before its sums are read",
        "device::sync_cluster();\n      }\n      if (t < 32) {\n        const bool writes",
        "}\n      if (t < 32) {\n        const bool writes",
        "race: .* shared byte",
    ),
    (
        "no wait for a bulk load",
        "device::mbarrier_wait(&shared.full[n % kStages], n / kStages & 1);",
        "",
        "bulk load not waited for",
    ),
    (
        "no wait until a buffer has been read",
        "device::bulk_wait_read<kStages - 2>();",
        "{}",
        "race: .* something has still to read",
    ),
    (
        "no barrier before the bulk store",
        "device::fence_async();\n      __syncthreads();",
        "device::fence_async();",
        "race: .* shared byte|no fence.proxy.async",
    ),
    (
        "no proxy fence",
        "device::fence_async();\n      __syncthreads();",
        "__syncthreads();",
        "no fence.proxy.async",
    ),
    ("a parity that never changes", "n / kStages & 1", "0", "deadlock|not waited for"),
    (
        "one place for two exchanges",
        "turn ^= 1;\n        const Gap",
        "const Gap",
        "race: .* shared byte",
    ),
    ("no barrier between rows", "__syncthreads();  // the edges and", "// ", "race: .* shared byte"),
    (
        "a slice one granule too long",
        "load_to = whole < granules ? whole : granules",
        "load_to = granules",
        "out of bounds: .* global",
    ),
    (
        "a slice that begins a granule too early",
        "load_from = shift && from == 0 ? 1 : 0",
        "load_from = 0",
        "out of bounds: .* global",
    ),
    (
        "a gradient that begins a granule too early",
        "store_from = shift ? 1 : 0",
        "store_from = 0",
        f"out of bounds: .* global|race: .* element|{WRONG}",
    ),
    (
        "one vector past the row",
        "row_end = vocabulary - from() * kWide",
        "row_end = vocabulary - from() * kWide + kWide",
        WRONG,
    ),
    ("no edges of the next row", "        prepare(n + 1);\n", "", f"{WRONG}|deadlock"),
    (
        "the target among the others",
        "for (int i = 0; i < 2; ++i) {  // in",
        "for (int i = 0; i < 1; ++i) {  // in",
        WRONG,
    ),
    (
        "no barrier in a slide",
        "    __syncthreads();\n    if (i < count + back) granules[v] = x;",
        "    if (i < count + back) granules[v] = x;",
        "race: .* shared byte",
    ),
    (
        "no barrier before a slide back",
        "          __syncthreads();\n          slide<Type, true",
        "          slide<Type, true",
        "race: .* shared byte",
    ),
    (
        "a slide back from the first on",
        "back ? max(count - i, 0)",
        "back ? min(i, count)",
        f"race: .* shared byte|{WRONG}",
    ),
    ("an end during the last bulk store", "if (kStore && t == 0) device::bulk_wait<0>();", "", "leaves during"),
]
BLOCK = [
    ("as it is", "", "", None),
    (
        "no barrier before the warps' sums are read",
        "__syncthreads();\n        if (t < 32) {\n          double",
        "if (t < 32) {\n          double",
        "race: .* shared byte",
    ),
    (
        "no barrier before the row's end is read",
        "__syncthreads();\n        end = shared_end;",
        "end = shared_end;",
        "race: .* shared byte",
    ),
    ("one place for two rows' beginnings", "row += gridDim.x, turn ^= 1)", "row += gridDim.x)", "race: .* shared byte"),
    ("no granule after a warp's last", "if (in.shift && lane == 31) next[k]", "if (false) next[k]", WRONG),
    (
        "a vector past the row's whole granules",
        "whole_to = dense ? int((int64_t(count)",
        "whole_to = dense ? 1 + int((int64_t(count)",
        "out of bounds: .* global",
    ),
]
KEPT = {"token_loss_cluster": r"512, 6|LOGP\(type, Type, capped, 512", "token_loss": "."}


def compiled(name, text, replacement, folder):
    """Of bfloat16 alone, and of the kernels that these rows take."""
    source = (ROOT / "csrc" / "cuda" / f"{name}.cu").read_text()
    assert source.count(text) >= 1, text
    source = source.replace(text, replacement, 1)
    source = re.split(r"#define REDIT_\w+_LIST", source)[0] + "}  // namespace redit\n"
    source = re.sub(r"^REDIT_(CLUSTERS|TYPE)\((?!bfloat16,).*\n", "", source, flags=re.M)
    source = re.sub(rf"^  REDIT_CLUSTER(?!.*({KEPT[name]})).*\n", "", source, flags=re.M)
    file = folder / f"{name}.cu"
    file.write_text(source)
    command = [NVCC, "-ptx", "-arch=sm_90a", *flags(ROOT / "csrc" / "cuda" / f"{name}.cu"), file, "-o", folder / "ptx"]
    subprocess.run(command, check=True)
    return Module((folder / "ptx").read_text())


def reported(expected, **kernel):
    """What the first of the runs that is not right reports, else None."""
    for order in ORDERS:
        for function, results in expected.items():
            try:
                found, _ = function(*inputs(), order=order, **kernel)
            except Fault as fault:
                return str(fault)
            if not same(found, results):
                return WRONG
    return None


def inputs():
    logits, targets = hostile(8, TWO_BLOCKS + 5)
    return placed(logits, torch.bfloat16, shift=3, odd=1), targets


@pytest.fixture(scope="module")
def expected():
    """By the kernels that read twice, as they are."""
    return {}


FEW = {"token_loss_cluster": dict(clusters=1), "token_loss": dict(clusters=0, multiprocessors=2)}  # several rows each
MUTANTS = [("token_loss_cluster", mutant) for mutant in CLUSTER] + [("token_loss", mutant) for mutant in BLOCK]


@pytest.mark.parametrize(("name", "mutant"), MUTANTS, ids=[f"{name}: {mutant[0]}" for name, mutant in MUTANTS])
def test_each_mistake_is_found(expected, name, mutant, tmp_path, monkeypatch):
    _, text, replacement, message = mutant
    if not expected:
        expected |= {function: function(*inputs(), clusters=0)[0] for function in (loss_of, logp_of)}
    broken, whole = compiled(name, text, replacement, tmp_path), cuda.kernels
    monkeypatch.setattr(cuda, "kernels", lambda file, target: broken if file == name else whole(file, target))
    found = reported(expected, **FEW[name])
    assert found is None if message is None else found and re.search(message, found), found
