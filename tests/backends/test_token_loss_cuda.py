"""csrc/cuda/token_loss.cu and token_loss_cluster.cu, their PTX run by tests/ptx: one set of bits in every order of the
warps, by every kernel, at every address; and the bytes, registers and launches that their comments name."""

import math
import os
import re
from itertools import product

import pytest
import torch

import redit_fast as rf
from redit_fast import backends
from redit_fast.backends import reference
from redit_fast.backends.cuda import module
from redit_fast.losses.transforms import LogitTransform
from tests import ROOT
from tests.cuda import EMPTY, NVCC, ORDERS, TARGETS, choose, cubin, other_release
from tests.ops.test_token_loss import oracle

pytestmark = [
    pytest.mark.skipif(NVCC is None, reason="nvcc is not installed"),
    pytest.mark.skipif(module.missing is not None, reason=f"cuda: {module.missing}"),
    pytest.mark.usefixtures("cuda"),
]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# `make test` takes one case a regime, `make kernel-gates` all of them.
ALL = "KERNEL_ARCHS" in os.environ
RUNS = list(product(ORDERS, (True, False)) if ALL else [*((order, True) for order in ORDERS), ("lowest", False)])
PLACES = [
    *product((1, 7, 8, 9, 1003, 4099), DTYPES, (None, 5.0))
] if ALL else [
    *((vocabulary, torch.bfloat16, None) for vocabulary in (1, 7, 8, 9, 4099)),
    (1003, torch.bfloat16, 5.0), (1003, torch.float32, None), (1003, torch.float16, None),
]  # fmt: skip
ARCHES = os.environ.get("KERNEL_ARCHS", "90").split()
TWO_BLOCKS = 38_700  # columns of 16 bits of which a cluster's two blocks have a slice each
H200, A100 = dict(architecture=90, multiprocessors=132), dict(architecture=80, multiprocessors=108, clusters=0)
CLUSTER, BLOCK = dict(clusters=3), dict(clusters=0)


def primitive(definition):
    return backends.primitive(definition, torch.device("cpu"))


def placed(rows, dtype, shift=0, odd=0):
    """A copy of rows (R, V): the first `shift` elements after a multiple of 16 bytes, the others `odd` elements farther
    apart than whole vectors."""
    count, vocabulary = rows.shape
    width = 16 // torch.empty(0, dtype=dtype).element_size()
    stride = -(-vocabulary // width) * width + odd
    room = torch.full((count * stride + 3 * width,), math.nan, dtype=dtype)
    first = -room.data_ptr() // room.element_size() % width + shift
    return room[first : first + count * stride].as_strided((count, vocabulary), (stride, 1)).copy_(rows)


def loss_of(logits, targets, grad=True, config=None, **kernel):
    """loss, logp, entropy and gradient by the kernel that a device like `kernel` gets, and the machines that ran it.
    The gradient has the logits' place; `grad` may be where it goes."""
    rows = len(logits)
    if grad is True:
        grad = logits.clone(memory_format=torch.preserve_format)
        grad = placed(torch.zeros(logits.shape), logits.dtype, shift_of(logits), odd_of(logits))
    outputs = torch.zeros(()), torch.zeros(rows), torch.zeros(rows), grad
    numbers = torch.linspace(0.5, 1, rows), torch.linspace(-1, 1, rows) + 0.01
    choices = {name: kernel.pop(name) for name in ("order", "seed", "late", "ulps", "target") if name in kernel}
    with pytest.MonkeyPatch.context() as patch, choose(**choices) as machines:
        patch.setattr(module, "described", module.described._replace(**kernel))
        primitive(reference.token_loss)(
            *outputs, logits, targets, *numbers, None, None, None, config or rf.LossConfig(), None
        )
    return outputs, machines


def logp_of(logits, targets, transform=None, **kernel):
    rows = len(logits)
    outputs = torch.zeros(rows), torch.zeros(rows), torch.zeros(3, rows)
    choices = {name: kernel.pop(name) for name in ("order", "seed", "late", "ulps", "target") if name in kernel}
    with pytest.MonkeyPatch.context() as patch, choose(**choices) as machines:
        patch.setattr(module, "described", module.described._replace(**kernel))
        primitive(reference.token_logp)(*outputs, logits, targets, transform or LogitTransform())
    return outputs, machines


def shift_of(x):
    return x.data_ptr() % 16 // x.element_size()


def odd_of(x):
    return x.stride(0) % (16 // x.element_size())


def same(ours, theirs):
    """NaN equals NaN."""
    return all(
        x is y is None or torch.equal(x.nan_to_num(nan=77.0), y.nan_to_num(nan=77.0)) for x, y in zip(ours, theirs)
    )


def hostile(rows, vocabulary):
    """Rows of every kind, and targets: plain, masked, repaired, stray, NaN, -inf among the others, zero coefficient."""
    torch.manual_seed(vocabulary)
    logits, targets = 3 * torch.randn(rows, vocabulary), torch.randint(vocabulary, (rows,))
    targets[1] = -100
    logits[2], logits[2, targets[2]] = 0.0, -60.0
    targets[3] = 2**40
    logits[4, vocabulary // 2] = math.nan
    logits[5, ::2] = -math.inf
    targets[5:8] = torch.tensor([1, 0, vocabulary - 1])
    return logits, targets


@pytest.mark.parametrize(("dtype", "vocabulary"), [(torch.bfloat16, TWO_BLOCKS + 5), (torch.float32, 1003)])
def test_three_orders_and_both_landings_give_the_same_bits(dtype, vocabulary):
    logits, targets = hostile(8, vocabulary)
    x = placed(logits, dtype, shift=3, odd=1)
    found = [
        [function(x, targets, order=order, late=late, clusters=2)[0] for function in (loss_of, logp_of)]
        for order, late in RUNS
    ]
    assert all(same(a, b) for results in found for a, b in zip(results, found[0]))
    assert torch.isfinite(found[0][0][1][[0, 1, 2, 5, 6, 7]]).all() and found[0][0][1][[3, 4]].isnan().all()


@pytest.mark.parametrize("order", ORDERS)
def test_two_readings_give_the_same_bits_in_three_orders(order):
    logits, targets = hostile(8, 5003)
    x = placed(logits, torch.bfloat16, shift=3, odd=1)
    for function in (loss_of, logp_of):
        assert same(function(x, targets, order=order, **BLOCK)[0], function(x, targets, **BLOCK)[0])


@pytest.mark.parametrize(("vocabulary", "dtype", "softcap"), PLACES)
def test_one_reading_and_two_give_the_same_bits_at_every_address(vocabulary, dtype, softcap):
    logits, targets = hostile(8, vocabulary) if vocabulary > 4 else (torch.randn(8, vocabulary), torch.zeros(8).long())
    config = rf.LossConfig(softcap=softcap)
    expected, _ = loss_of(placed(logits, dtype), targets, config=config, **CLUSTER)
    kept, _ = logp_of(placed(logits, dtype), targets, config.transform, **CLUSTER)
    assert same(kept[:2], expected[1:3])
    for shift in range(16 // expected[3].element_size()) if ALL else (0, 1, 3) if dtype == torch.float32 else (0, 3, 6):
        for kernel, name in ((CLUSTER, "cluster"), (BLOCK, "rows")):
            x = placed(logits, dtype, shift, odd=shift)
            found, machines = loss_of(x, targets, config=config, **kernel)
            assert same(found, expected) and name in machines[0].kernel, shift
            found, machines = logp_of(x, targets, config.transform, **kernel)
            assert same(found, kept) and ("cluster" in machines[0].kernel) == (kernel is CLUSTER)


@pytest.mark.parametrize("kernel", [CLUSTER, BLOCK], ids=["cluster", "block"])
def test_a_row_is_the_same_alone_and_among_forty(kernel):
    logits, targets = torch.randn(40, 1003) * 4, torch.randint(1003, (40,))
    logits[7], logits[7, targets[7]] = 0.0, -60.0  # repaired
    many, _ = loss_of(placed(logits, torch.bfloat16, odd=1), targets, **kernel)
    ones = torch.ones(1), torch.ones(1)
    assert many[3].abs().max() > 0.1
    for row in (0, 7, 13, 39):
        x = placed(logits[row : row + 1], torch.bfloat16, shift=row % 8)
        outputs = torch.zeros(()), torch.zeros(1), torch.zeros(1), torch.zeros_like(x)
        numbers = torch.linspace(0.5, 1, 40)[row : row + 1], torch.linspace(-1, 1, 40)[row : row + 1] + 0.01
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(module, "described", module.described._replace(**kernel))
            primitive(reference.token_loss)(
                *outputs, x, targets[row : row + 1], *numbers, None, None, None, rf.LossConfig(), None
            )
        assert same(outputs[1:], (many[1][row : row + 1], many[2][row : row + 1], many[3][row : row + 1])), ones


def test_the_loss_does_not_depend_on_the_grid():
    logits, targets = torch.randn(1100, 3), torch.randint(3, (1100,))
    losses = [loss_of(logits, targets, grad=None, clusters=0, multiprocessors=count)[0][0] for count in (5, 40)]
    with rf.use_backend("reference"):
        exact = loss_of(logits.double().float(), targets, grad=None)[0][0]
    assert torch.equal(*losses) and abs(losses[0] - exact) < 1e-5 * abs(exact) and losses[0] != 0


@pytest.mark.parametrize("ulps", [0, 2])
@pytest.mark.parametrize("softcap", [None, 5.0])
def test_right_too_where_the_device_s_approximations_are_2_ulp_off(ulps, softcap):
    """And equal logits as far below the target as the repair lets them, whose sums' rounding reaches the entropy."""
    logits, targets = torch.randn(8, 4099) * 3, torch.randint(4099, (8,))
    logits[4:] = 0.0
    logits[torch.arange(4, 8), targets[4:]] = -torch.linspace(0, 26.0, 4)
    exact_logp, exact_entropy = oracle(logits.double(), targets, softcap=softcap)
    for kernel in (CLUSTER, BLOCK):
        (_, logp, entropy, _), _ = loss_of(logits, targets, config=rf.LossConfig(softcap=softcap), ulps=ulps, **kernel)
        assert (logp - exact_logp).abs().max() < 1e-5 and (entropy - exact_entropy).abs().max() < 2e-5


def strided(rows, dtype):
    wide = torch.zeros(rows.shape[0], 2 * rows.shape[1], dtype=dtype)
    wide[:, 1::2] = rows
    return wide[:, 1::2]


@pytest.mark.parametrize("dtype", DTYPES if ALL else DTYPES[:2])
def test_any_strides_of_logits_and_gradient(dtype):
    """Each pair of places takes two readings but one, and gives the same bits; the logits may be the gradient."""
    logits, targets = hostile(8, 1003)
    expected, _ = loss_of(placed(logits, dtype), targets, **CLUSTER)
    by_columns = torch.zeros(8, 1003)
    places = [lambda x: placed(x, dtype, 3, 1), lambda x: strided(x, dtype), lambda x: x.to(dtype).t().contiguous().t()]
    for place, other in product(places, places):
        x, grad = place(logits), other(by_columns)
        found, (machine, _) = loss_of(x, targets, grad, **CLUSTER)
        assert same(found, expected) and ("cluster" in machine.kernel) == (place is other is places[0])
    for place in places:
        x = place(logits)
        found, _ = loss_of(x, targets, x, **CLUSTER)
        assert same(found, expected)


def test_a_gradient_that_lies_otherwise_than_its_row():
    logits, targets = hostile(8, 1003)
    expected, _ = loss_of(placed(logits, torch.bfloat16), targets, **CLUSTER)
    for shift, odd in ((1, 0), (0, 1)):
        grad = placed(torch.zeros(8, 1003), torch.bfloat16, shift, odd)
        found, (machine, _) = loss_of(placed(logits, torch.bfloat16), targets, grad, **CLUSTER)
        assert same(found, expected) and "rows" in machine.kernel


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocabulary", [1, 5, 1003, 40_003] if ALL else [5, 20_003])
def test_the_gradient_of_log_probs_is_that_of_the_loss(dtype, vocabulary):
    """With the loss's coefficients as upstream gradients; 20,003 columns are several spans."""
    logits, targets = torch.randn(3, vocabulary) * 3, torch.randint(vocabulary, (3,))
    x = placed(logits, dtype, shift=1, odd=1)
    (_, _, _, expected), _ = loss_of(x, targets, **BLOCK)
    (_, _, sums), _ = logp_of(x, targets)
    upstream = -torch.linspace(0.5, 1, 3) * (torch.linspace(-1, 1, 3) + 0.01)
    for grad in (
        placed(torch.zeros(3, vocabulary), dtype, shift=2, odd=3),
        strided(torch.zeros(3, vocabulary), dtype),
        x,
    ):
        primitive(reference.token_logp_grad)(grad, x, targets, sums, upstream, None, None, LogitTransform())
        assert torch.equal(grad, expected) and (vocabulary == 1 or (grad != 0).any())


@pytest.mark.parametrize("dtype", DTYPES)
def test_scale_in_place(dtype):
    for x in (torch.randn(2, 20_003), torch.randn(7), torch.randn(1), torch.randn(0, 5), torch.randn(5, 33)):
        for place in (lambda x: x.to(dtype), lambda x: x.to(dtype)[..., 1:], lambda x: x.to(dtype)[..., ::2], torch.t):
            mine = place(x).to(dtype).clone(memory_format=torch.preserve_format)
            expected = mine.clone()
            for factor in (torch.tensor(0.3), torch.tensor(-3, dtype=torch.float64), torch.tensor(2)):
                reference.scale_in_place(expected, factor)
                primitive(reference.scale_in_place)(mine, factor)
                assert torch.equal(mine, expected)
    with choose() as machines:
        primitive(reference.scale_in_place)(mine, torch.ones(()))
    assert machines[0].bytes["global written"] == 0 and machines[0].bytes["global read"] == 4 * machines[0].count


def moved(machine):
    """Bytes of global memory: read and written, by bulk copies too."""
    return [machine.bytes[f"global {way}"] + machine.bytes[f"bulk {way}"] for way in ("read", "written")]


@pytest.mark.parametrize("shift", [0, 3])
@pytest.mark.parametrize("vocabulary", [1000, 9001, TWO_BLOCKS + 5] if ALL else [1000, TWO_BLOCKS + 5])
def test_bytes_are_what_the_kernels_comments_say(vocabulary, shift):
    """2 V read and 2 V written a row, beside 32 bytes an edge and 200 a row and block."""
    logits, targets = torch.randn(3, vocabulary), torch.randint(vocabulary, (3,))
    x, edges = placed(logits, torch.bfloat16, shift, shift), 2 * 32
    for masked in (0, 3):
        targets[:masked] = -100
        read, written = 2 * vocabulary * (3 - masked), 2 * vocabulary * 3
        _, (machine, _) = loss_of(x, targets, **CLUSTER)
        beside = 3 * machine.cluster * (edges + 200)
        assert "cluster" in machine.kernel and machine.cluster == (2 if vocabulary > TWO_BLOCKS else 1)
        assert read <= moved(machine)[0] <= read + beside and written <= moved(machine)[1] <= written + beside
        assert (machine.bytes["bulk read"] > 0) == (masked == 0) and machine.bytes["bulk written"] > 0
        _, (machine,) = logp_of(x, targets, **CLUSTER)
        assert read <= moved(machine)[0] <= read + beside and moved(machine)[1] <= 3 * 200
        # Two readings; the next granule of each warp's last lane: 3 %; 64 bytes a thread beside, for a block's numbers.
        _, (machine, _) = loss_of(x, targets, **BLOCK)
        beside = 3 * (edges + 64 * machine.threads)
        most = 2 * read * (33 / 32 if shift else 1) + beside
        assert 2 * read <= moved(machine)[0] <= most and written <= moved(machine)[1] <= written + beside
        _, (machine,) = logp_of(x, targets, **BLOCK)
        assert read <= moved(machine)[0] <= read * (33 / 32 if shift else 1) + beside
        outputs = torch.zeros(3, vocabulary, dtype=torch.bfloat16)
        with choose() as machines:
            args = targets, torch.ones(3, 3), torch.ones(3), None, None, LogitTransform()
            primitive(reference.token_logp_grad)(outputs, x, *args)
        beside = 3 * (edges + 200) + 16 * -(-2 * vocabulary // 512) + 8 * 256 * machines[0].blocks
        assert read <= moved(machines[0])[0] <= read + beside and written <= moved(machines[0])[1] <= written + beside


def planned(monkeypatch, vocabulary, dtype, function=loss_of, grad=True, **device):
    """The launches for one row, which nothing runs."""
    launches = []
    monkeypatch.setattr(module, "run_launches", lambda found, _: launches.extend(found))
    x = torch.zeros(1, vocabulary, dtype=dtype)
    arguments = (x if grad is True else grad,) if function is loss_of else ()
    function(x, torch.zeros(1).long(), *arguments, **({"clusters": 5} | H200 | device))
    return launches


CLUSTERS = {  # vocabulary, dtype: blocks a row, vectors a slice, threads and vectors of a thread
    (151_936, torch.bfloat16): (4, 4748, "512x10"), (128_256, torch.bfloat16): (4, 4008, "512x8"),
    (50_257, torch.bfloat16): (2, 3142, "512x8"), (32_000, torch.float16): (1, 4000, "512x8"),
    (256_000, torch.bfloat16): (8, 4000, "512x8"), (151_936, torch.float32): (8, 4748, "512x10"),
    (10_233, torch.bfloat16): (1, 1280, "128x10"), (10_234, torch.bfloat16): (1, 1280, "512x4"),
    (38_665, torch.bfloat16): (1, 4834, "512x10"), (38_666, torch.bfloat16): (2, 2417, "512x6"),
    (309_320, torch.bfloat16): (8, 4834, "512x10"), (154_660, torch.float32): (8, 4834, "512x10"),
    (1, torch.float32): (1, 1, "128x10"),
}  # fmt: skip


@pytest.mark.parametrize(("case", "expected"), CLUSTERS.items(), ids=str)
def test_the_plan_takes_a_cluster_where_its_slices_fit(monkeypatch, case, expected):
    count, slice_vectors, kernel = expected
    kind = str(case[1])[6:]
    shared = 368 + 48 * (slice_vectors + 1)
    for function, name in ((loss_of, kernel), (logp_of, f"{kernel.split('x')[0]}_logp")):
        launch = planned(monkeypatch, *case, function)[0]
        assert launch.kernel == f"token_loss_cluster_{name}_{kind}" and launch.cluster == launch.blocks == count
        assert launch.shared == shared <= module.described.shared_bytes
        assert launch.threads == int(kernel.split("x")[0])
    assert [x.kernel for x in planned(monkeypatch, *case)][1:] == ["token_loss_total"]


BLOCKS = {  # what a device or a row lacks for a cluster
    "sm_80": dict(architecture=80), "sm_120 of a large slice": dict(architecture=120, shared_bytes=101_376),
    "no cluster fits": dict(clusters=0),
}  # fmt: skip


@pytest.mark.parametrize("device", BLOCKS.values(), ids=BLOCKS)
def test_the_plan_takes_a_block_elsewhere(monkeypatch, device):
    for function, name in ((loss_of, "rows"), (logp_of, "logp")):
        launch = planned(monkeypatch, 32_000, torch.bfloat16, function, **device)[0]
        assert launch.kernel == f"token_loss_{name}_bfloat16" and (launch.cluster, launch.threads) == (1, 512)
        assert launch.shared == 128
        small = planned(monkeypatch, 9_000, torch.bfloat16, function, **device)[0]
        assert ("cluster" in small.kernel) == (device.get("architecture") == 120) and small.threads == 128


@pytest.mark.parametrize(
    ("vocabulary", "dtype", "slices"),
    [(309_330, torch.bfloat16, 8), (154_670, torch.float32, 8), (400_000, torch.float16, 11),
     (2_000_000_000, torch.bfloat16, 384)],
)  # fmt: skip
def test_the_plan_takes_a_block_for_longer_rows(monkeypatch, vocabulary, dtype, slices):
    row = torch.zeros(1, dtype=dtype).expand(1, vocabulary)
    launches = []
    monkeypatch.setattr(module, "run_launches", lambda found, _: launches.extend(found))
    logp_of(row, torch.zeros(1).long(), **H200)
    assert launches[0].kernel.startswith("token_loss_logp") and launches[0].shared == 128 * slices


def test_the_grid_is_what_the_device_holds(monkeypatch):
    def launch(rows, vocabulary, **device):
        launches = []
        monkeypatch.setattr(module, "run_launches", lambda found, _: launches.extend(found))
        logp_of(torch.zeros(1, vocabulary).expand(rows, vocabulary), torch.zeros(rows).long(), **device)
        return launches[0].blocks

    assert launch(1000, 151_936, **H200, clusters=15) == 8 * 15 and launch(2, 151_936, **H200, clusters=15) == 16
    assert (
        launch(1000, 151_936, **A100) == 108 and launch(1000, 1000, **A100) == 4 * 108 and launch(3, 1000, **A100) == 3
    )


def test_more_columns_than_a_kernel_counts_are_refused():
    row, one = torch.zeros(1, 1, dtype=torch.bfloat16).expand(1, 2_000_000_001), torch.zeros(1)
    with pytest.raises(ValueError, match="logits must have at most 2000000000 columns, got 2000000001"):
        primitive(reference.token_logp)(one, None, torch.zeros(3, 1), row, one.long(), LogitTransform())


FILES = {name: ROOT / "csrc" / "cuda" / f"{name}.cu" for name in ("token_loss", "token_loss_cluster")}
TYPES = re.compile("^token_loss_|_(float32|bfloat16|float16)|_capped")


@pytest.mark.skipif(other_release(), reason="the table is of nvcc 13.0")
@pytest.mark.parametrize("arch", ARCHES)
@pytest.mark.parametrize("name", FILES)
def test_no_register_is_spilled_and_the_table_is_kept(arch, name):
    rows = re.findall(r"^//   (\w+) .*? ([-\d]+) +([-\d]+) +([-\d]+)$", FILES[name].read_text(), re.M)
    table = {kind: most[["80", "90", "100"].index(arch)].replace("-", EMPTY) for kind, *most in rows}
    report = cubin(name, TARGETS[arch]).with_suffix(".log").read_text()
    found = re.findall(r"'(\w+)' for.*?(\d+) bytes stack.*?Used (\d+) registers", report, re.S)
    assert len(table) >= 5 and {TYPES.sub("", kernel) for kernel, *_ in found} == set(table)
    for kernel, stack, registers in found:
        assert stack == "0" and int(registers) <= int(table[TYPES.sub("", kernel)]), (kernel, registers)
