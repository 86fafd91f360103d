"""What only the compiled head can get wrong: tiles, blocks of rows, instruction sets, repair, what is written."""

import pytest
import torch

from redit_fast.backends import cpu, reference
from redit_fast.backends.cpu.linear_loss import TILE_ROWS
from redit_fast.backends.cpu.module import multiplies_bfloat16
from redit_fast.losses.transforms import LogitTransform
from tests.backends.test_token_loss_cpu import assert_near_bits, assert_same_bits, threads  # noqa: F401
from tests.counting import Recorder

refusal = cpu.why_not("exp_product", torch.device("cpu"))
pytestmark = pytest.mark.skipif(refusal is not None, reason=f"cpu: {refusal}")
TRANSFORMS = [LogitTransform(), LogitTransform(0.7, 0.5, 9.0)]


def chunk(rows, vocabulary, dtype, width=24):
    hidden, weight = torch.randn(rows, width).to(dtype), torch.randn(vocabulary, width).to(dtype)
    return hidden, weight, torch.randn(vocabulary).to(dtype), torch.randint(vocabulary, (rows,))


def run(module, hidden, weight, bias, targets, transform=TRANSFORMS[0], with_entropy=False, with_e=True):
    rows = len(hidden)
    dtype = torch.float32 if hidden.dtype == torch.float16 else hidden.dtype
    e = torch.full((rows, len(weight)), 7.0, dtype=dtype) if with_e else None
    logp, entropy, sums = torch.empty(rows), torch.empty(rows), torch.empty(3, rows)
    head = hidden, weight, bias, targets, transform
    module.exp_product(None if with_entropy else e, logp, entropy, sums, *head)
    if with_entropy:
        module.exp_product_grad(e, sums, entropy, *head, torch.linspace(-1, 1, rows), torch.linspace(2, 1, rows))
    return (logp, entropy, sums) if e is None else (logp, entropy, sums, e)


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("with_entropy", [False, True])
@pytest.mark.parametrize("vocabulary", [1, 31, 1023, 1024, 1025, 4133])  # below, at and above the tile of 1024 columns
def test_everything_it_writes_is_the_references(vocabulary, with_entropy, dtype, transform):
    arguments = chunk(33, vocabulary, dtype)
    ours, expected = (run(module, *arguments, transform, with_entropy) for module in (cpu, reference))
    # E: z_j - z_t of up to 40 and a target's logit summed in another order are 2e-5 each; bfloat16: one rounding apart
    coarse = 2**-7 if dtype == torch.bfloat16 else 4e-5
    for name, a, b in zip(("logp", "entropy", "sums", "e"), ours, expected, strict=True):
        scale = b.double().abs().amax(-1, keepdim=True)  # per row: a row's E spans up to e^40
        error = ((a.double() - b.double()).abs() / scale.clamp(min=1)).amax()
        assert error < (coarse if name == "e" else 1e-5), name
    assert vocabulary == 1 or expected[0].abs().max() > 1


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_instruction_sets_agree_and_those_that_fuse_to_the_bit(dtype, transform):
    arguments = chunk(40, 2100, dtype)
    results = []
    for name in cpu.instruction_sets():
        if name.endswith("bf16"):  # whose products are not torch's
            continue
        with cpu.use_instruction_set(name):
            results.append(run(cpu, *arguments, transform, with_entropy=True))
    assert_near_bits(results[0], results[-1], rtol=4e-5)  # the anchor too is a sum of products
    assert_same_bits(results[min(1, len(results) - 1)], results[-1], denormal=2**-120)  # which AVX-512 keeps


def test_a_row_has_the_same_bits_in_every_block_and_with_or_without_e(threads):  # noqa: F811
    threads(2)
    hidden, weight, bias, targets = chunk(16, 3000, torch.float32)
    alone = run(cpu, hidden, weight, bias, targets)
    times = 3 * TILE_ROWS * 2 // 16 + 1  # three blocks of rows and a piece of a fourth
    many = run(cpu, hidden.repeat(times, 1), weight, bias, targets.repeat(times))
    for a, b in zip(alone, many, strict=True):
        for copy in range(times):
            rows = slice(16 * copy, 16 * copy + 16)
            assert torch.equal(a, b[:, rows] if b.shape[0] == 3 else b[rows])
    assert_same_bits(alone[:3], run(cpu, hidden, weight, bias, targets, with_e=False))


def test_a_repaired_row_leaves_its_neighbours_alone(threads):  # noqa: F811
    threads(2)
    hidden, weight, bias, targets = chunk(300, 2500, torch.float32)
    clean = run(cpu, hidden, weight, bias, targets)
    repaired = torch.tensor([3, 299])  # in the first and in the last block of rows
    hidden[repaired] *= 30
    targets[repaired] = (hidden[repaired] @ weight.t() + bias).argmin(1)
    ours, expected = (run(module, hidden, weight, bias, targets) for module in (cpu, reference))
    assert (ours[0][repaired] < -40).all()
    torch.testing.assert_close(ours[0], expected[0], rtol=3e-6, atol=1e-5)
    torch.testing.assert_close(ours[3][repaired], expected[3][repaired], rtol=0, atol=1e-3)
    untouched = torch.ones(300, dtype=torch.bool)
    untouched[repaired] = False
    for a, b in zip(clean, ours, strict=True):
        assert torch.equal(a[..., untouched] if a.ndim == 2 and len(a) == 3 else a[untouched],
                           b[..., untouched] if b.ndim == 2 and len(b) == 3 else b[untouched])  # fmt: skip


def test_a_stray_target_is_nan_in_its_row_alone():
    hidden, weight, bias, targets = chunk(16, 50, torch.bfloat16)
    targets[5], targets[6] = 50, -3
    logp, entropy, sums, _ = run(cpu, hidden, weight, bias, targets)
    others = torch.tensor([r not in (5, 6) for r in range(16)])
    for rows in (logp, entropy, sums[2]):  # and the gradient with them, through beta
        assert rows[~others].isnan().all() and rows[others].isfinite().all()


@pytest.mark.parametrize("count", [1, 2])
def test_a_tile_of_logits_holds_at_most_1_mb_a_thread(threads, count):  # noqa: F811
    threads(count)
    hidden, weight, bias, targets = chunk(600, 5000, torch.float32, width=8)
    with Recorder() as recorder:
        run(cpu, hidden, weight, bias, targets, with_e=False)
    assert 5000 < max(recorder.sizes) * 4 <= count << 20


def test_strided_inputs_and_version_counters():
    hidden, weight, bias, targets = chunk(20, 70, torch.bfloat16)
    expected = run(cpu, hidden, weight, bias, targets)
    strided = [torch.stack([x, x], -1)[..., 1] for x in (hidden, weight, bias, targets)]
    assert_same_bits(run(cpu, *strided), expected)
    logp, entropy, sums, e = (torch.empty_like(x) for x in expected)
    head = hidden, weight, bias, targets, TRANSFORMS[0]
    cpu.exp_product(e, logp, entropy, sums, *head)
    assert [x._version for x in (logp, entropy, sums, e)] == [1, 1, 1, 1]
    cpu.exp_product_grad(e, sums, entropy, *head, logp, entropy)
    assert [x._version for x in (logp, entropy, sums, e)] == [1, 1, 1, 2]
    assert [x._version for x in (hidden, weight, bias, targets)] == [0, 0, 0, 0]


def torch_splits_few_rows_otherwise(dtype):
    """MKL on a Sapphire Rapids with two threads: below 384 rows. bfloat16 products are the module's own, where it has
    them."""
    if dtype == torch.bfloat16 and multiplies_bfloat16():
        return False
    x = torch.randn(512, 896)
    return any(not torch.equal(torch.mm(x[:16], w), torch.mm(x, w)[:16]) for w in (x.t(), x[:52].t()))


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_has_the_same_bits_in_any_multiple_of_16_rows_at_a_real_width(threads, count, dtype):  # noqa: F811
    threads(count)
    if torch_splits_few_rows_otherwise(dtype):
        pytest.skip("torch's float32 products change a row's bits with the number of rows on this processor")
    hidden, weight, bias, targets = chunk(count * TILE_ROWS + 32, 2100, dtype, width=896)
    all_rows = run(cpu, hidden, weight, bias, targets)
    for rows in (16, 112, TILE_ROWS - 16, TILE_ROWS, count * TILE_ROWS + 16):
        places = torch.randperm(len(hidden))[:rows]
        alone = run(cpu, hidden[places], weight, bias, targets[places])
        for a, b in zip(all_rows, alone, strict=True):
            assert torch.equal(a[:, places] if len(a) == 3 else a[places], b), rows
