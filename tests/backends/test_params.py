"""Passes over parameters against the reference, on every backend but it: bits, sums, edges of formats, layouts."""

import math
from importlib import import_module

import pytest
import torch

from redit_fast.backends import reference
from tests.conftest import skip_float64
from tests.grid import DEVICES, pairs
from tests.tolerance import assert_gradient_no_worse, assert_no_worse

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
SIZES = [1, 0, 7, 1023, 1025, 65536, 65537, 70_001]  # below and past 16 lanes, a block of 1024, a chunk of 65536
# Of float32, in which cpu adds up to 64 products at a time and triton 8. A sum is one number, of which PyTorch's own
# error is chance, 0 now and then: a limit of its own.
SUM_ROUNDING = 2.4e-7
OFFSETS = [0, 1, 1, 8, 1031, 2**33 + 3, 2**33 + 65_539, 13]


OPS = ("squared_norm", "perturb", "combine", "adamw")


@pytest.fixture(params=[pair for pair in pairs(DEVICES) if not pair.id.startswith("reference")])
def place(request):
    return request.param


@pytest.fixture
def backend(request, backend):
    """The backend's module."""
    options = request.node.callspec.params
    for name in ("dtype", "grad_dtype"):
        skip_float64(backend, options.get(name))
    return import_module(f"redit_fast.backends.{backend}")


def sum_rounding(dtype):
    return 1e-12 if dtype == torch.float64 else SUM_ROUNDING


def tensors(dtype, scale=1.0, sizes=SIZES):
    return [(torch.randn(n, dtype=torch.float64) * scale).to(dtype) for n in sizes]


def scalar(value):
    return torch.tensor(value, dtype=torch.float64)


def perturbed(module, params, grads, scale=0.37, rounding="stochastic", compute_dtype=None, offsets=OFFSETS, factor=1):
    """Perturbed copies of the parameters, with a factor other than 1 the scaled gradients after them, and the sums."""
    params, sums = [p.clone() for p in params], torch.full((4,), math.nan, dtype=torch.float64)
    scaled = [g.clone() for g in grads]
    module.perturb(
        sums, params, scaled, offsets, scalar(scale), factor, rounding, 2**64 - 9, torch.tensor(5), compute_dtype
    )  # fmt: skip
    if factor != 1:
        return params + scaled, sums
    torch.testing.assert_close(scaled, grads, rtol=0, atol=0, equal_nan=True)
    return params, sums


def combined(module, firsts, grads, ratio=0.3):
    grads, sums = [g.clone() for g in grads], torch.full((3,), math.nan, dtype=torch.float64)
    module.combine(sums, firsts, grads, ratio)
    return grads, sums


def adamw_state(dtype, sizes=SIZES):
    params, grads = tensors(dtype, sizes=sizes), tensors(dtype, 1e-2, sizes)
    low = dtype in (torch.bfloat16, torch.float16)
    wide = torch.promote_types(dtype, torch.float32)
    masters = [p.float() + torch.randn(p.shape) * 1e-4 if low else None for p in params]
    m, v = tensors(wide, 1e-2, sizes), [x.square() for x in tensors(wide, 1e-2, sizes)]
    steps = [torch.tensor(float(i)) for i in range(len(sizes))]
    return params, masters, grads, m, v, steps


def run_adamw(module, state, finite=True, beta1=0.9, factor=0.7):
    copies = [[None if x is None else x.clone() for x in row] for row in state]
    module.adamw(*copies, scalar(factor), torch.tensor(finite), 1e-2, beta1, 0.999, 1e-8, 0.1)
    return copies


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rounding", ["stochastic", "nearest"])
@pytest.mark.parametrize("compute_dtype", [None, *DTYPES])
def test_perturbed_bits_and_sums_equal_the_reference(backend, dtype, rounding, compute_dtype):
    params, grads = tensors(dtype), tensors(dtype, 1e-2)
    options = {"rounding": rounding, "compute_dtype": compute_dtype}
    ours, sums = perturbed(backend, params, grads, **options)
    theirs, expected = perturbed(reference, params, grads, **options)
    assert all(map(torch.equal, ours, theirs))
    assert not any(p.numel() and torch.equal(p, q) for p, q in zip(ours[3:], params[3:]))
    assert expected.min() > 0
    torch.testing.assert_close(sums, expected, rtol=sum_rounding(dtype), atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rounding", ["stochastic", "nearest"])
def test_every_half_and_every_edge_of_the_format_is_rounded_as_the_reference_does(backend, dtype, rounding):
    """All 65536 values as parameters: subnormal, infinite, NaN, and steps that overflow."""
    every = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
    for scale in (1e-8, 1.0, 3e4, 3e38):
        grads = [torch.randn(len(every)).to(dtype)]
        ours, _ = perturbed(backend, [every], grads, scale, rounding, offsets=[3])
        theirs, _ = perturbed(reference, [every], grads, scale, rounding, offsets=[3])
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_scale_of_zero_changes_nothing_where_the_gradient_is_nan(backend, dtype):
    params, grads = tensors(dtype), tensors(dtype)
    for g in grads:
        g[::2] = math.nan
    for module in (backend, reference):
        ours, sums = perturbed(module, params, grads, scale=0.0, factor=0.5)
        torch.testing.assert_close(ours, params + grads, rtol=0, atol=0, equal_nan=True)
        assert sums.tolist() == [0.0] * 4


@pytest.mark.parametrize("grad_dtype", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_perturbation_scales_the_gradients_behind_it(backend, dtype, grad_dtype):
    params, grads = tensors(dtype), tensors(grad_dtype, 1e-2)
    kept, sums = perturbed(backend, params, grads)
    ours, scaled_sums = perturbed(backend, params, grads, factor=-2 / 3)
    theirs, _ = perturbed(reference, params, grads, factor=-2 / 3)
    assert all(map(torch.equal, ours, theirs)) and torch.equal(sums, scaled_sums)
    assert all(map(torch.equal, ours, kept))
    scaled, unscaled = torch.cat(ours[len(grads) :]), torch.cat(grads)
    wide = unscaled.to(torch.promote_types(grad_dtype, torch.float32))
    assert_no_worse(scaled, (wide * (-2 / 3)).to(grad_dtype), unscaled.double() * (-2 / 3), floor=1e-9)


@pytest.mark.parametrize("dtype", DTYPES)
def test_combined_bits_and_sums_equal_the_reference(backend, dtype):
    firsts, grads = tensors(dtype), tensors(dtype, 3.0)
    ours, sums = combined(backend, firsts, grads)
    theirs, expected = combined(reference, firsts, grads)
    assert all(map(torch.equal, ours, theirs))
    torch.testing.assert_close(sums, expected, rtol=sum_rounding(dtype), atol=0)
    g1, g2, both = (torch.cat(x).to(torch.promote_types(dtype, torch.float32)) for x in (firsts, grads, ours))
    exact = 0.7 * g1.double() + 0.3 * g2.double()
    assert_no_worse(both, (0.7 * g1 + 0.3 * g2).to(dtype), exact, floor=2 * torch.finfo(g1.dtype).eps)
    squares = [x.double().square().sum() for x in (g2, g2 - g1, both)]
    torch.testing.assert_close(sums, torch.stack(squares), rtol=sum_rounding(dtype), atol=0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_norm_is_that_of_float64(backend, dtype):
    values = tensors(dtype, 3.0)
    out, rounding = scalar(math.nan), sum_rounding(dtype)
    backend.squared_norm(out, values)
    torch.testing.assert_close(out, sum(x.double().square().sum() for x in values), rtol=rounding, atol=0)
    backend.squared_norm(out, [torch.zeros(0, dtype=dtype)])
    assert out == 0
    backend.squared_norm(out, [values[-1], torch.full((2,), math.inf, dtype=dtype)])
    assert out == math.inf


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("beta1", [0.9, 0.3, 0.0])
def test_an_adamw_step_errs_as_the_reference_does(backend, dtype, beta1):
    """By norm against a step in float64 on the same numbers; each element, whose own error is chance, is within 4 ulp
    of the reference, and in float64 that is all there is."""
    state = adamw_state(dtype)
    ours, theirs = run_adamw(backend, state, beta1=beta1), run_adamw(reference, state, beta1=beta1)
    params, masters, grads, m, v, steps = state
    weights = [p if master is None else master for p, master in zip(params, masters)]
    wide = [[x.double() for x in row] for row in (weights, grads, m, v)]
    exact = run_adamw(reference, [wide[0], [None] * len(weights), *wide[1:], steps], beta1=beta1)
    updated = 0 if masters[0] is None else 1
    for row, right in ((updated, exact[0]), (3, exact[3]), (4, exact[4])):
        if dtype != torch.float64:
            assert_gradient_no_worse(*map(torch.cat, (ours[row], theirs[row], right)), floor=1e-9)
        for x, y, old in zip(ours[row], theirs[row], state[row]):
            # Sums of old value and change cancel, so an ulp is one of their sizes.
            assert ((x - y).abs() <= 4 * torch.finfo(x.dtype).eps * (y.abs() + old.abs())).all()
            assert not x.numel() or not torch.equal(x, old)
    for p, master in zip(ours[0], ours[1]):
        assert master is None or torch.equal(p, master.to(dtype))
    assert ours[5] == theirs[5] and [s.item() for s in ours[5]] == [i + 1 for i in range(len(SIZES))]


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_step_that_is_not_finite_only_writes_the_master_back(backend, dtype):
    state = adamw_state(dtype)
    ours = run_adamw(backend, state, finite=False, factor=math.nan)
    for after, before in zip(ours[1:], state[1:]):
        assert all(x is y is None or torch.equal(x, y) for x, y in zip(after, before))
    for p, master, before in zip(ours[0], ours[1], state[0]):
        assert torch.equal(p, before if master is None else master.to(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("grad_dtype", DTYPES)
def test_gradients_of_another_dtype_are_converted(backend, dtype, grad_dtype):
    params, grads = tensors(dtype), tensors(grad_dtype, 1e-2)
    ours, sums = perturbed(backend, params, grads)
    theirs, expected = perturbed(reference, params, grads)
    assert all(map(torch.equal, ours, theirs)) and expected.min() > 0
    torch.testing.assert_close(sums, expected, rtol=sum_rounding(dtype), atol=0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_transposed_and_channels_last_tensors_are_counted_in_row_major_order(backend, dtype):
    def layouts(x):
        wide = torch.zeros(x.numel() * 2, dtype=x.dtype)[::2].copy_(x.flatten())
        channels_last = x.view(2, 3, 5, 7).contiguous(memory_format=torch.channels_last)
        return [x.view(14, 15).t().contiguous().t(), channels_last, wide]

    values, slopes = torch.randn(210).to(dtype), torch.randn(210).to(dtype)
    expected, _ = perturbed(reference, [values], [slopes], offsets=[3])
    for p, g in zip(layouts(values), layouts(slopes)):
        assert not p.is_contiguous()
        strides, sums = p.stride(), torch.zeros(4, dtype=torch.float64)
        backend.perturb(sums, [p], [g], [3], scalar(0.37), 0.5, "stochastic", 2**64 - 9, torch.tensor(5), None)
        assert torch.equal(p.flatten(), expected[0]) and p.stride() == strides
        assert torch.equal(g.flatten(), slopes * 0.5)
        norm = scalar(0.0)
        backend.squared_norm(norm, [g])
        torch.testing.assert_close(norm, 0.25 * slopes.double().square().sum(), rtol=2.4e-7, atol=0)
        backend.combine(sums[:3], [p], [g], 0.25)
        assert torch.equal(g.flatten(), combined(reference, expected[:1], [slopes * 0.5], 0.25)[0][0])
    state = adamw_state(dtype, [210])
    expected = run_adamw(backend, state)
    for kind in range(3):
        row = [[x if x is None else layouts(x)[kind] if x.dim() else x.clone() for x in part] for part in state]
        backend.adamw(*row, scalar(0.7), torch.tensor(True), 1e-2, 0.9, 0.999, 1e-8, 0.1)
        for part, wanted in zip(row, expected):
            assert all(x is y is None or torch.equal(x.flatten(), y.flatten()) for x, y in zip(part, wanted))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_everything_written_is_known_to_autograd(backend, dtype):
    params, masters, grads, m, v, steps = adamw_state(dtype, [5, 9])
    sums, norm = torch.zeros(4, dtype=torch.float64), scalar(0.0)
    written = [sums, norm, *params]
    versions = [x._version for x in written + grads]
    backend.squared_norm(norm, grads)
    backend.perturb(sums, params, grads, [0, 5], scalar(1.0), 1.0, "nearest", 0, torch.tensor(0), None)
    assert [x._version for x in written + grads] == [version + 1 for version in versions[:4]] + versions[4:]
    backend.perturb(sums, params, grads, [0, 5], scalar(1.0), 0.5, "nearest", 0, torch.tensor(0), None)
    backend.combine(sums[:3], params, grads, 0.5)
    assert [g._version for g in grads] == [version + 2 for version in versions[4:]]
    versions[4:] = [g._version for g in grads]
    written = [x for x in (*params, *masters, *m, *v, *steps) if x is not None]
    before = [x._version for x in written]
    leaf = torch.ones(5, requires_grad=True)
    product_of_old_values = leaf * params[0]
    backend.adamw(params, masters, grads, m, v, steps, scalar(1.0), torch.tensor(True), 1e-2, 0.9, 0.999, 1e-8, 0.0)
    assert [x._version for x in written] == [version + 1 for version in before]
    assert [g._version for g in grads] == versions[4:]
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product_of_old_values.sum().backward()


def test_a_dtype_without_a_version_and_a_wrong_shape_are_refused_by_name_before_anything_is_written(backend):
    p, sums = torch.ones(4), torch.zeros(4, dtype=torch.float64)
    with pytest.raises(NotImplementedError, match="float8"):
        backend.squared_norm(scalar(0.0), [torch.zeros(4).to(torch.float8_e4m3fn)])
    with pytest.raises(ValueError, match="grads"):
        backend.perturb(sums, [p], [torch.ones(3)], [0], scalar(1.0), 0.5, "nearest", 0, torch.tensor(0), None)
    for first in (torch.ones(3), torch.ones(4, dtype=torch.bfloat16)):
        with pytest.raises(ValueError, match="firsts"):
            backend.combine(sums[:3], [first], [p], 0.5)
    none, one = [None], [torch.zeros(())]
    for m in (torch.zeros(4, dtype=torch.float16), torch.zeros(3)):
        with pytest.raises(ValueError, match="exp_avgs"):
            backend.adamw([p], none, [p], [m], [p], one, scalar(1.0), torch.tensor(True), 1e-2, 0.9, 0.999, 1e-8, 0.0)
    assert torch.equal(p, torch.ones(4)) and one[0] == 0
