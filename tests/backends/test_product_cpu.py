"""The C++ products of bfloat16 matrices: float32 sums, any strides, bits that depend on nothing else."""

import pytest
import torch

import redit_fast as rf
from redit_fast.backends import cpu
from redit_fast.backends.addresses import view
from redit_fast.backends.cpu.module import compiled
from tests.backends.test_token_loss_cpu import threads  # noqa: F401
from tests.ops.test_linear_loss import exact_logp, head, leaves
from tests.tolerance import relative


@pytest.fixture(params=["avx512_bf16", "amx_bf16"])
def own(request):
    """Products by each instruction set that has them."""
    if request.param not in cpu.instruction_sets():
        pytest.skip(f"this processor or build has no bfloat16 products by {request.param}")
    with cpu.use_instruction_set(request.param):
        yield request.param


# one; below, at and above 6, 32 and 96 rows, a tile of 32 columns, a panel of 64, 16 panels, a tile of 32 and a block
# of 512 along the sums; odd ones
SIZES = [(1, 1, 1), (5, 7, 3), (6, 512, 64), (7, 513, 65), (32, 32, 32), (33, 33, 31), (96, 544, 1100), (97, 64, 2050),
         (16, 896, 1000), (131, 1500, 33), (0, 8, 4), (4, 8, 0)]  # fmt: skip


def layouts(matrix):
    """Row by row, column by column, every other column of a larger one."""
    wide = torch.full((matrix.shape[0], 2 * matrix.shape[1] + 1), torch.nan, dtype=matrix.dtype)
    wide[:, 1::2] = matrix
    return matrix, matrix.t().contiguous().t(), wide[:, 1::2]


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_it_adds_the_product(own, size):
    rows, depth, columns = size
    a, b = torch.randn(rows, depth).bfloat16(), torch.randn(depth, columns).bfloat16()
    start, exact = torch.randn(rows, columns), a.double() @ b.double()
    found = []
    for left in layouts(a):
        for right in layouts(b):
            wide = torch.full((rows, columns + 3), 7.0)
            wide[:, :columns] = start
            cpu.addmm(wide[:, :columns], left, right)
            assert (wide[:, columns:] == 7).all()
            found.append(wide[:, :columns])
    for out in found:
        assert torch.equal(out, found[0])
        torch.testing.assert_close(out.double(), start.double() + exact, rtol=0, atol=1e-6 * (depth + 20))
    assert 0 in size or (found[0] != start).all()


@pytest.mark.parametrize("count", [1, 2, 5])
def test_an_elements_bits_depend_on_its_row_and_column_alone(own, threads, count):  # noqa: F811
    threads(count)
    a, b = torch.randn(100, 700).bfloat16(), torch.randn(700, 300).bfloat16()
    whole = torch.zeros(100, 300)
    cpu.addmm(whole, a, b)
    for rows, columns in ((slice(3, 4), slice(0, 300)), (slice(50, 67), slice(130, 131)), (slice(0, 99), slice(7, 90))):
        part = torch.zeros(a[rows].shape[0], b[:, columns].shape[1])
        cpu.addmm(part, a[rows], b[:, columns])
        assert torch.equal(part, whole[rows, columns])


def test_a_product_of_no_columns_adds_nothing_and_is_refused_where_it_would_write(own):
    a, b, out = torch.empty(4, 0).bfloat16(), torch.empty(0, 5).bfloat16(), torch.ones(4, 5)
    cpu.addmm(out, a, b)
    assert (out == 1).all()
    with pytest.raises(ValueError, match="a must have at least one column"):
        compiled.product(view(out), False, view(a), view(b), own == "amx_bf16", (1, -1))


def test_nan_and_infinity_stay_in_their_rows(own):
    a, b, out = torch.ones(9, 40).bfloat16(), torch.ones(40, 70).bfloat16(), torch.zeros(9, 70)
    a[4, 39], a[5, 0] = torch.nan, torch.inf
    cpu.addmm(out, a, b)
    assert out[4].isnan().all() and (out[5] == torch.inf).all() and (out[[0, 1, 2, 3, 6, 7, 8]] == 40).all()


@pytest.mark.skipif(cpu.why_not("exp_product", torch.device("cpu")) is not None, reason="cpu: no C++ module")
def test_the_head_is_as_right_on_processors_without_them(countable):
    hidden, weight, bias, targets = head(90, 1100, 24, torch.bfloat16)
    ours, exact = leaves(hidden, weight, bias), leaves(hidden.double(), weight.double(), bias.double())
    with rf.use_backend("cpu"):
        logp = rf.linear_logp(ours[0], ours[1], targets, bias=ours[2], chunk_rows=32)
    true, _ = exact_logp(*exact, targets)
    assert (logp - true).abs().max() < 1e-5
    upstream = torch.randn(90)
    logp.backward(upstream), true.backward(upstream.double())
    for x, y, limit in zip(ours, exact, (3e-3, 4e-3, 4e-3), strict=True):
        assert relative(x.grad, y.grad) < limit
