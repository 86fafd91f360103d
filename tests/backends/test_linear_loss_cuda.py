"""The head in CUDA, csrc/cuda/linear_loss.cu and linear_loss_product.cu, its PTX run by tests/ptx: what only these
kernels can get wrong. `tiles`: products by torch; `product`: our own, of bfloat16 on sm_90a."""

import os
from typing import NamedTuple

import pytest
import torch

from redit_fast.backends import reference
from redit_fast.backends.cuda import linear_loss as ours
from redit_fast.backends.cuda import module
from redit_fast.losses.transforms import LogitTransform, TransformConstants
from tests.cuda import NVCC, ORDERS, TARGETS, choose
from tests.tolerance import relative

pytestmark = [pytest.mark.skipif(NVCC is None, reason="nvcc is not installed"), pytest.mark.usefixtures("cuda")]
ARCHES = os.environ.get("KERNEL_ARCHS", "90").split()
slow = pytest.mark.skipif("KERNEL_ARCHS" not in os.environ, reason="KERNEL_ARCHS is not set: make kernel-gates")
BF16, INF, NAN = torch.bfloat16, torch.inf, torch.nan
PLAIN, CAPPED = LogitTransform(), LogitTransform(0.7, 0.5, 9.0)


class Head(NamedTuple):
    hidden: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor | None
    targets: torch.Tensor


class Results(NamedTuple):
    e: torch.Tensor | None
    logp: torch.Tensor
    entropy: torch.Tensor
    sums: torch.Tensor
    grad: torch.Tensor  # E of the backward pass


def head(rows, vocabulary, width, dtype=BF16, bias=True, scale=1.0):
    hidden, weight = torch.randn(rows, width), scale * torch.randn(vocabulary, width)
    biases = torch.randn(vocabulary).to(dtype) if bias else None
    return Head(hidden.to(dtype), weight.to(dtype), biases, torch.randint(vocabulary, (rows,)))


def run(backend, head, transform=PLAIN, shape=None, sums=None):
    """Forward and backward pass; `shape` of the tensor that E is the left part of."""
    rows, vocabulary = len(head.hidden), len(head.weight)
    e_dtype = torch.float32 if head.hidden.dtype == torch.float16 else head.hidden.dtype
    e, grad = (torch.full(shape or (rows, vocabulary), NAN, dtype=e_dtype)[:, :vocabulary] for _ in range(2))
    logp, entropy, kept = torch.full((rows,), NAN), torch.full((rows,), NAN), torch.full((3, rows), NAN)
    backend.exp_product(e, logp, entropy, kept, *head, transform)
    upstream = torch.linspace(-1, 2, rows), torch.linspace(1, -2, rows)
    backend.exp_product_grad(grad, kept if sums is None else sums, entropy, *head, transform, *upstream)
    return Results(e, logp, entropy, kept, grad)


def described(monkeypatch, **fields):
    monkeypatch.setattr(module, "described", module.described._replace(**fields))


def kernels(machines):
    return [machine.kernel for machine in machines]


@pytest.fixture
def launched(monkeypatch):
    """The launches of a call, by kernel."""
    found = {}

    def record(launches, tensors):
        found.update({launch.kernel: launch for launch in launches})

    monkeypatch.setattr(module, "run_launches", record)
    return found


def same(x, y):
    return torch.equal(x.double().nan_to_num(nan=1e30), y.double().nan_to_num(nan=1e30))


def assert_close(found, expected, e_limit):
    for name, x, y in zip(Results._fields, found, expected):
        limit = e_limit if name in ("e", "grad") else 1e-5
        assert torch.equal(x.isnan(), y.isnan()) and torch.equal(x.isinf(), y.isinf()), name
        finite = y.isfinite()
        assert relative(x[finite], y[finite]) < limit, (name, relative(x[finite], y[finite]))


# Rows below, at and above the 128 of a block and the 256 of a cluster, columns about the 256 of a part, widths below,
# at and above the 64 of a stage and the 256 of the ring.
SIZES = [(1, 1, 8, PLAIN), (5, 255, 24, CAPPED), (20, 513, 72, PLAIN)]
LARGE = [(128, 256, 64, CAPPED), (130, 257, 256, PLAIN), (256, 511, 264, CAPPED), (257, 768, 320, PLAIN)]
PRODUCT = [f"linear_loss_{name}" for name in ("anchor", "product", "finish", "resume", "product_grad")]


@pytest.mark.parametrize(
    ("rows", "vocabulary", "width", "transform"), SIZES + [pytest.param(*size, marks=slow) for size in LARGE]
)
def test_the_product_is_the_reference_at_every_edge(rows, vocabulary, width, transform):
    inputs = head(rows, vocabulary, width, scale=width**-0.5)
    with choose(order="random", ulps=2) as machines:
        found = run(ours, inputs, transform)
    assert kernels(machines) == PRODUCT
    padded = -(-rows // 256) * -(-vocabulary // 256) * -(-width // 64) * 256 * 256 * 64
    assert [machine.flop for machine in machines if machine.flop] == [2 * padded] * 2
    if vocabulary == 1:
        assert (found.logp == 0).all() and (found.e == 0).all() and (found.grad == 0).all()
    else:
        assert_close(found, run(reference, inputs, transform), 3e-3)


def test_every_order_gives_the_product_the_same_bits(monkeypatch):
    """The ring comes round twice: a cluster alone has both parts, of five stages each."""
    described(monkeypatch, clusters=1)
    inputs, first = head(12, 257, 320, scale=320**-0.5), None
    for order, late in [("lowest", True), ("lowest", False), ("highest", True), ("random", False), ("random", True)]:
        with choose(order=order, late=late) as machines:
            found = run(ours, inputs)
        assert kernels(machines) == PRODUCT
        first = first or found
        assert all(map(same, found, first)), (order, late)


@pytest.mark.parametrize("dtype", [torch.float32, BF16, torch.float16])
def test_tiles_are_the_reference_in_every_order(monkeypatch, dtype):
    """Two tiles, the second of a whole part and of one column."""
    described(monkeypatch, clusters=0)
    inputs, first = head(6, 1281, 24, dtype, scale=0.3), None
    for order in ORDERS:
        with choose(order=order, ulps=2 * (order == "random")) as machines:
            found = run(ours, inputs, CAPPED if order == "random" else PLAIN)
        tiles = ["linear_loss_tile"] * 2, ["linear_loss_tile_grad"] * 2
        assert kernels(machines) == [
            "linear_loss_anchor",
            *tiles[0],
            "linear_loss_finish",
            "linear_loss_resume",
            *tiles[1],
        ]
        assert_close(found, run(reference, inputs, CAPPED if order == "random" else PLAIN), 3e-3)
        first = first or found
        assert order == "random" or all(map(same, found, first))


@slow
@pytest.mark.parametrize("arch", ARCHES)
@pytest.mark.parametrize("dtype", [torch.float32, BF16, torch.float16])
def test_every_architecture_is_the_reference(monkeypatch, arch, dtype):
    described(monkeypatch, architecture=int(arch))
    inputs = head(20, 600, 72, dtype, scale=0.1)
    with choose(target=TARGETS[arch], ulps=2) as machines:
        found = run(ours, inputs)
    assert ("linear_loss_product" in kernels(machines)) == (arch == "90" and dtype == BF16)
    assert_close(found, run(reference, inputs), 3e-3)


@pytest.mark.parametrize("way", ["tiles", "product"])
def test_any_row_with_any_peak_is_right(monkeypatch, way):
    """Rows seen from other anchors than the target: a logit far above it in the first or last part, a sum past e^40
    that no logit alone reaches, a target or all others of -inf, and the rows that are NaN."""
    described(monkeypatch, clusters=3 if way == "product" else 0)
    huge = 3e38  # twice this is an infinity, and nothing of it is not a number
    hidden, weight = torch.eye(16), torch.zeros(300, 16)
    weight[:, 0] = torch.linspace(-3, 3, 300)
    weight[5, 1], weight[299, 2], weight[[5, 260], 3] = 45.0, 1000.0, 60.0
    weight[:, 4], weight[9, 4] = 38.0, 0.0
    weight[9, 5], weight[:, 6], weight[9, 6], weight[:, 7] = -huge, -huge, 1.0, -huge
    weight[9, 8], weight[4, 9] = huge, huge
    weight[9, 11], weight[9, 12] = 50.0, -50.0
    weight[9, 15] = weight[256:, 15] = -huge  # the target, and all of a part
    hidden[5:10] *= 2
    hidden[15] *= 2
    hidden[10, 3] = NAN
    targets = torch.full((16,), 9)
    targets[13], targets[14] = 300, -1
    inputs = Head(hidden.to(BF16), weight.to(BF16), None, targets)
    with choose(order="random") as machines:
        found = run(ours, inputs)
    assert ("linear_loss_product" in kernels(machines)) == (way == "product")
    expected = run(reference, inputs)
    numbers = expected.logp.isfinite()
    assert (
        torch.nonzero(~numbers).flatten().tolist() == [5, 7, 8, 9, 10, 13, 14, 15] and (expected.logp < -40).sum() >= 5
    )
    assert torch.equal(found.sums[2].isnan(), expected.sums[2].isnan())  # which makes the gradient NaN, or not
    for name, x, y in zip(Results._fields, found, expected):
        x, y = (x[:, numbers], y[:, numbers]) if name == "sums" else (x, y)  # the anchor of a NaN is of no use
        limits = dict(rtol=8e-3, atol=0.0) if name in ("e", "grad") else dict(rtol=2e-6, atol=1e-5)
        torch.testing.assert_close(x.double(), y.double(), equal_nan=True, **limits)


@pytest.mark.parametrize("way", ["tiles", "product"])
def test_a_row_has_the_same_bits_alone(monkeypatch, way):
    described(monkeypatch, clusters=1 if way == "product" else 0)
    inputs = head(40, 300, 24)
    whole = run(ours, inputs)
    row = inputs._replace(hidden=inputs.hidden[17:18], targets=inputs.targets[17:18])
    if way == "tiles":  # below 8 rows torch's float32 products change bits with the number of rows
        row = inputs._replace(hidden=inputs.hidden[16:32], targets=inputs.targets[16:32])
    alone = run(ours, row, sums=None)
    place = 1 if way == "tiles" else 0
    for name in ("e", "logp", "entropy"):
        assert same(getattr(alone, name)[place], getattr(whole, name)[17]), name
    assert same(alone.sums[:, place], whole.sums[:, 17])


def strided(matrix, columns, step=1):
    """Into a matrix of so many columns, every one or every second of them."""
    room = torch.zeros(len(matrix), columns, dtype=matrix.dtype)
    room[:, : step * matrix.shape[1] : step] = matrix
    return room[:, : step * matrix.shape[1] : step]


@pytest.mark.parametrize("way", ["tiles", "product"])
def test_rows_of_e_may_begin_anywhere(monkeypatch, way):
    """In 4 bytes a thread, 16, or element by element."""
    described(monkeypatch, clusters=3 if way == "product" else 0)
    inputs, found = head(9, 264, 24), []
    for columns in (264, 266, 267):
        found.append(run(ours, inputs, shape=(9, columns)))
    assert all(map(same, found[0], found[1])) and all(map(same, found[0], found[2]))
    assert_close(found[0], run(reference, inputs), 3e-3)


def test_the_bits_do_not_depend_on_how_the_inputs_lie(monkeypatch):
    """hidden is copied where a tensor map does not take it, a weight tile by tile; the first has four parts."""
    described(monkeypatch, clusters=1)
    inputs = head(9, 1030, 24)
    plain = run(ours, inputs)
    for moved in (
        inputs._replace(hidden=strided(inputs.hidden, 30), weight=strided(inputs.weight, 48, 2)),  # rows of 60 bytes
        inputs._replace(weight=strided(inputs.weight, 36)),
    ):
        with choose() as machines:
            assert all(map(same, run(ours, moved), plain))
        assert kernels(machines).count("linear_loss_product") == 2


def test_what_the_product_does_not_take_goes_to_the_tiles(launched, monkeypatch):
    monkeypatch.setattr(ours, "_product", lambda out, hidden, weight: None)
    inputs = head(9, 300, 24)
    wide = torch.zeros(9, 301, dtype=BF16)

    def way(inputs, e=None):
        launched.clear()
        e = torch.zeros(len(inputs.hidden), len(inputs.weight), dtype=inputs.hidden.dtype) if e is None else e
        rows = len(inputs.hidden)
        ours.exp_product(e, torch.zeros(rows), None, torch.zeros(3, rows), *inputs, PLAIN)
        assert ("linear_loss_product" in launched) != ("linear_loss_tile" in launched)
        return "product" if "linear_loss_product" in launched else "tiles"

    assert way(inputs) == "product"
    assert way(inputs, wide[:, :300]) == "product"
    assert way(inputs._replace(weight=strided(inputs.weight, 40))) == "product"
    assert way(inputs, torch.zeros(9, 600, dtype=BF16)[:, ::2]) == "tiles"
    assert way(inputs, torch.zeros(9, 300)) == "tiles"
    assert way(head(9, 300, 25)) == "tiles" and way(head(9, 300, 24, torch.float16)) == "tiles"
    assert way(head(9, 300, 24, torch.float32)) == "tiles"
    for architecture in (80, 89, 100, 103, 120):
        described(monkeypatch, architecture=architecture)
        assert way(inputs) == "tiles"
    described(monkeypatch, architecture=90, clusters=0)  # no code for it, or no room
    assert way(inputs) == "tiles"
    described(monkeypatch, clusters=3, shared_bytes=101376)
    assert way(inputs) == "tiles"


def test_bytes_are_what_the_comments_say():
    """Two parts of 256 rows, a stage deep: each block loads its 16 KB of x and half of the 32 KB of w."""
    rows, vocabulary, width = 200, 512, 64
    inputs = head(rows, vocabulary, width, bias=False)
    with choose() as machines:
        run(ours, inputs)
    for machine in machines:
        if machine.flop:
            forward = machine.kernel == "linear_loss_product"
            assert machine.bytes["bulk read"] == 2 * 2 * 2 * 16384
            assert machine.bytes["global written"] == 2 * rows * vocabulary + forward * 16 * 2 * rows
            # 4 threads of each of 256 rows and each part read the row's state and its target.
            assert machine.bytes["global read"] == 2 * rows * 4 * (8 + (8 if forward else 20))
    with pytest.MonkeyPatch.context() as patch, choose() as machines:
        described(patch, clusters=0)
        run(ours, inputs)
    tile, grad = (next(m for m in machines if m.kernel == f"linear_loss_{name}") for name in ("tile", "tile_grad"))
    assert tile.bytes["global written"] == 2 * rows * vocabulary + 16 * 2 * rows
    assert grad.bytes["global written"] == 2 * rows * vocabulary
    assert 4 * rows * vocabulary < grad.bytes["global read"] <= 4.1 * rows * vocabulary + 32 * rows * vocabulary / 8


def test_a_violation_is_an_exception_by_name():
    """Rule 29: what reaches the binding is checked there."""
    inputs = head(5, 300, 24)
    e, logp, sums, g = torch.zeros(5, 300, dtype=BF16), torch.zeros(5), torch.zeros(3, 5), torch.zeros(5)
    scratch = [torch.zeros(30), torch.zeros(40), torch.zeros(5, 1024)]
    transform = TransformConstants.of(PLAIN)

    def forward(e=e, outputs=(logp, None, sums), inputs=inputs, scratch=(*scratch[:2], None), device=module.described):
        arguments = [module.view(e), *(module.views(*x) for x in (outputs, inputs)), transform]
        return module.compiled.exp_product(*arguments, module.views(*scratch), device)

    def backward(e=e, upstream=(sums, g, None, None), inputs=inputs, scratch=(scratch[0], None, None)):
        arguments = [module.view(e), *(module.views(*x) for x in (inputs, upstream)), transform]
        return module.compiled.exp_product_grad(*arguments, module.views(*scratch), module.described)

    rows, parts, logits = scratch
    hidden, weight, bias, targets = inputs
    sm_80, odd = module.described._replace(architecture=80), torch.zeros(300, 25, dtype=BF16)[:, :24]
    assert [len(part) for part in forward()] == [3, 0, 0] and [len(part) for part in backward()] == [2, 0, 0]
    assert [len(part) for part in forward(scratch=(rows, parts, logits), device=sm_80)] == [1, 1, 1]
    for wrong, name in [
        (lambda: forward(e=e[:, 1:]), "e must be"),
        (lambda: forward(e=e[:1].expand(5, 300)), "e is written"),
        (lambda: forward(e=e.double()), "e must be"),
        (lambda: backward(e=None), "e must be given"),
        (lambda: forward(outputs=(logp[1:], None, sums)), "logp must be"),
        (lambda: forward(outputs=(logp, logp[1:], sums)), "entropy must be"),
        (lambda: forward(outputs=(logp, None, sums[:2])), "sums must be"),
        (lambda: forward(inputs=(hidden.double(), weight, bias, targets)), "hidden must be"),
        (lambda: forward(inputs=(hidden[:0], weight, bias, targets)), "hidden must have at least one row"),
        (lambda: forward(inputs=(strided(hidden, 30), weight, bias, targets)), "hidden must be rows of 16 bytes"),
        (lambda: forward(inputs=(hidden, weight[:, 1:], bias, targets)), "weight must be"),
        (lambda: forward(inputs=(hidden, weight[:0], bias, targets)), "weight must have at least one row"),
        (lambda: forward(inputs=(hidden, odd, bias, targets)), "tile must be given"),
        (lambda: forward(inputs=(hidden, weight, bias[1:], targets)), "bias must be"),
        (lambda: forward(inputs=(hidden, weight, bias, targets.int())), "targets must be"),
        (lambda: forward(scratch=(rows[1:], parts, None)), "rows must be"),
        (lambda: forward(scratch=(rows, parts[4:], None)), "parts must be"),
        (lambda: forward(scratch=(rows, None, None)), "parts must be given"),
        (lambda: forward(scratch=(rows, torch.zeros(41)[1:], None)), "parts must begin"),
        (lambda: forward(scratch=(rows, parts, odd[:256])), "tile must be rows that begin"),
        (lambda: forward(scratch=(rows, parts, weight)), "tile must be of a multiple of 256"),
        (lambda: forward(scratch=(rows, parts, None), device=sm_80), "tile must be of a multiple of 256"),
        (lambda: forward(scratch=(rows, parts, logits[:, :1000]), device=sm_80), "tile must be of a multiple of 256"),
        (
            lambda: forward(scratch=(rows, parts, torch.zeros(5, 8192)), device=sm_80),
            "tile must be of a multiple of 256",
        ),
        (lambda: forward(scratch=(rows, parts, torch.zeros(5, 1026)[:, 1:1025]), device=sm_80), "tile must be rows"),
        (lambda: backward(upstream=(sums, g[1:], None, None)), "grad_logp must be"),
        (lambda: backward(upstream=(sums, g, g, None)), "entropy must be given"),
    ]:
        with pytest.raises(ValueError, match=name):
            wrong()
