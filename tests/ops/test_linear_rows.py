"""The rows of the head: skipped, masked, packed, sliced, and independent of each other, on every backend."""

import itertools
import math

import pytest
import torch

import redit_fast as rf
from redit_fast.ops import chunks
from tests.conftest import few
from tests.counting import Recorder, flops
from tests.ops.test_linear_loss import DTYPES, assert_right, head, head_oracle, leaves, oracle_gradients
from tests.ops.test_token_loss import LOSSES
from tests.tolerance import relative

OPS = ("exp_product", "scale_in_place")


@pytest.mark.parametrize("used", [0, 1, 16, 33, 100, 128])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_without_a_coefficient_skip_the_gradient_products(backend, countable, monkeypatch, used, dtype):
    monkeypatch.setattr(chunks, "whole_chunks", lambda device: False)  # tests/ops/test_linear_whole.py counts those
    rows, vocabulary, width = few(backend, 128, 32), 300, 24
    used = used * rows // 128
    hidden, weight, _, targets = head(rows, vocabulary, width, dtype)
    advantages = torch.zeros(rows)
    places = torch.randperm(rows)[:used]
    advantages[places] = torch.randn(used)
    product, needed = 2 * rows * vocabulary * width, -(-used // 16) * 16 / rows
    config, out = rf.LossConfig(), None

    def fused(advantages=advantages):
        nonlocal out
        inputs = leaves(hidden, weight)
        out = rf.linear_grpo_loss(*inputs, targets, advantages, config=config)
        out.loss.backward()
        return inputs

    def logp():
        (rf.linear_logp(*leaves(hidden, weight), targets) * advantages).sum().backward()

    def logp_and_entropy():
        logp, entropy = rf.linear_logp(*leaves(hidden, weight), targets, entropy="grad")
        ((logp - entropy) * advantages).sum().backward()

    def in_place():
        rf.linear_grpo_loss_and_grad_(
            hidden, weight, targets, advantages, config=config, weight_grad=torch.zeros(vocabulary, width)
        )

    assert flops(fused) == flops(in_place) == (1 + 2 * needed) * product
    assert out.metrics["head/frac_rows_skipped"] == 1 - used / rows
    assert flops(logp) == flops(logp_and_entropy) == (1 + 3 * needed) * product
    x, w = fused()
    full, _ = fused(torch.where(advantages == 0, 1.0, advantages))
    assert torch.equal(x.grad[places], full.grad[places])  # the same bits as among rows that all have one
    assert (x.grad[advantages == 0] == 0).all() and (full.grad != 0).any(1).all()
    if used == 0:
        assert (w.grad == 0).all()
        return

    def oracle_loss(x, w):
        return rf.policy_loss(head_oracle(x, w, None, targets)[0], advantages, config=config).loss

    assert_right(w.grad, oracle_gradients(oracle_loss, hidden, weight)[1], 1)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_has_the_same_bits_whatever_the_other_rows(backend, device, dtype):
    """On a GPU, whose library chooses the kernel by shape, among chunks of one size."""
    on_gpu = device == "cuda"
    count, vocabulary, width = (700, 32_000, 512) if on_gpu else (few(backend, 100, 40), few(backend, 1000, 300), 24)
    hidden, weight, bias, targets = head(count, vocabulary, width, dtype, 0.1 if on_gpu else 1.0)
    advantages = torch.randn(count)
    config = rf.LossConfig("dapo")

    def run(rows, chunk_rows=256 if on_gpu else None):
        options = {"bias": bias, "chunk_rows": chunk_rows}
        x = hidden[rows].clone().requires_grad_()
        logp, entropy = rf.linear_logp(x, weight, targets[rows], entropy="metric", **options)
        (grad,) = torch.autograd.grad((logp * advantages[rows]).sum(), x)
        out = rf.linear_grpo_loss(x, weight, targets[rows], advantages[rows], config=config, normalizer=1, **options)
        out.loss.backward()
        return logp.detach(), entropy, grad, out.logp, x.grad

    whole = run(torch.arange(count))
    for rows in (torch.tensor([0]), torch.tensor([count - 1]), torch.arange(20, 37), torch.randperm(count)):
        for part, full in zip(run(rows), whole):
            assert torch.equal(part, full[rows])
    assert torch.equal(whole[0], whole[3])  # both routes: the same bits
    if not on_gpu:
        assert all(map(torch.equal, run(torch.arange(count), chunk_rows=count), whole))


@pytest.mark.parametrize("dtype", DTYPES)
def test_repeats_give_the_same_bits(backend, device, dtype):
    on_gpu = device == "cuda"
    rows, vocabulary, width = (700, 32_000, 512) if on_gpu else (few(backend, 100, 20), 1000, 24)
    hidden, weight, bias, targets = head(rows, vocabulary, width, dtype, 0.1 if on_gpu else 1.0)
    advantages = torch.randn(rows)

    def run():
        inputs = leaves(hidden, weight, bias)
        out = rf.linear_grpo_loss(
            *inputs[:2], targets, advantages, bias=inputs[2], config=rf.LossConfig(), chunk_rows=rows // 3
        )
        out.loss.backward()
        return out.logp, *(x.grad for x in inputs)

    first = run()
    assert all((x != 0).any() for x in first)
    for _ in range(9 if on_gpu else 1):
        assert all(map(torch.equal, run(), first))


@pytest.mark.parametrize("rows", [60, 500])
def test_the_chunks_change_the_gradient_of_the_weight_by_float32_rounding_alone(backend, rows):
    """One chunk sums it in its product and rounds once, several in float32: bfloat16's last bit turns now and then."""
    rows = few(backend, rows, 52)
    hidden, weight, _, targets = head(rows, few(backend, 2000, 520), 24, torch.bfloat16)
    advantages, grads = torch.randn(rows), []
    for chunk_rows in (None, 16):
        x, w = leaves(hidden, weight)
        rf.linear_grpo_loss(x, w, targets, advantages, config=rf.LossConfig(), chunk_rows=chunk_rows).loss.backward()
        grads.append(w.grad)
    assert (grads[0] != 0).any() and relative(*grads) < 1e-4  # a bfloat16 has 4e-3


def test_masked_and_ignored_rows_cost_nothing_and_are_never_read(backend):
    hidden, weight, bias, targets = head(60, 300, 24, torch.float32)
    mask = torch.rand(60) > 0.5
    clean, dirty = leaves(hidden, torch.where(mask[:, None], hidden, math.nan))
    wild = torch.where(mask, targets, -100)
    config, advantages = rf.LossConfig("grpo"), torch.randn(1)
    a = rf.linear_grpo_loss(clean, weight, targets, advantages, mask=mask, config=config)
    b = rf.linear_grpo_loss(dirty, weight, wild, advantages, config=config)
    a.loss.backward(), b.loss.backward()
    assert torch.equal(a.loss, b.loss) and torch.equal(clean.grad, dirty.grad) and (dirty.grad[~mask] == 0).all()
    assert mask.sum() % 16 != 0 and a.metrics["head/frac_rows_skipped"] == 0  # the padding is no row
    assert torch.equal(rf.linear_logp(dirty, weight, wild), rf.linear_logp(clean, weight, targets, mask=mask))


@pytest.mark.parametrize("coefficient", [1.0, 0.0])
def test_a_poisoned_row_is_nan_alone_and_reaches_the_weight_only_with_a_coefficient(backend, coefficient):
    """A frozen head has its gradient ready before the coefficients are known."""
    hidden, weight, _, targets = head(40, 300, 24, torch.float32)
    hidden[7, 3] = math.nan
    upstream, others = torch.ones(40), torch.arange(40) != 7
    upstream[7] = coefficient
    (x, w), (y,) = leaves(hidden, weight), leaves(hidden)
    rf.linear_logp(x, w, targets).backward(upstream)
    rf.linear_logp(y, weight, targets).backward(upstream)
    assert torch.isfinite(w.grad).all() == (coefficient == 0)
    for grad in (x.grad, y.grad):
        assert torch.isfinite(grad[others]).all() and (grad[others] != 0).any(1).all()
        assert (grad[7] == 0).all() if coefficient == 0 else grad[7].isnan().any()


def test_padded_and_packed_and_sliced_rows_are_the_same(backend):
    """`hidden[:, :-1]` of a model is not contiguous."""
    hidden, weight, bias, targets = head(60, 300, 24, torch.float32)
    packed = hidden.contiguous()
    wide = torch.cat([packed.view(4, 15, 24), torch.full((4, 1, 24), math.nan)], 1).requires_grad_()
    x = packed.clone().requires_grad_()
    a = rf.linear_grpo_loss(x, weight, targets, torch.ones(60), bias=bias, config=rf.LossConfig())
    b = rf.linear_grpo_loss(wide[:, :-1], weight, targets.view(4, 15), torch.ones(4), bias=bias, config=rf.LossConfig())
    a.loss.backward(), b.loss.backward()
    assert torch.equal(a.loss, b.loss) and torch.equal(a.logp, b.logp.flatten())
    assert torch.equal(x.grad.view(4, 15, 24), wide.grad[:, :-1]) and (wide.grad[:, -1] == 0).all()
    one = rf.linear_logp(packed[3], weight, targets[3], bias=bias)
    assert one.shape == () and torch.equal(one, a.logp[3])


def test_a_fully_masked_batch_gives_zero_loss_and_zero_gradients(backend):
    hidden, weight, bias, targets = head(20, 31, 8, torch.float32)
    for config, normalizer in itertools.product(LOSSES.values(), (None, torch.zeros(20).sum(), math.nan)):
        inputs = leaves(hidden, weight, bias)
        rows = dict(mask=torch.zeros(20), config=config, ref_logp=torch.zeros(20), sampling_logp=torch.zeros(20),
                    normalizer=normalizer)  # fmt: skip
        out = rf.linear_grpo_loss(inputs[0], inputs[1], targets, torch.ones(20), bias=inputs[2], **rows)
        out.loss.backward()
        assert out.loss == 0 and all((x.grad == 0).all() for x in inputs)
        assert all(torch.isfinite(value) for value in out.metrics.values())
        grads = torch.zeros_like(weight), torch.zeros_like(bias)
        out, hidden_grad = rf.linear_grpo_loss_and_grad_(
            hidden, weight, targets, torch.ones(20), bias=bias, weight_grad=grads[0], bias_grad=grads[1], **rows
        )
        assert out.loss == 0 and all((grad == 0).all() for grad in (hidden_grad, *grads))


@pytest.mark.parametrize("rows", [256, 1024])
def test_nothing_larger_than_a_chunk_of_logits_ever_exists(backend, rows):
    rows = few(backend, rows, 96)
    hidden, weight, _, targets = head(rows, 5000, 8, torch.float32)
    with Recorder() as recorder:
        x, w = leaves(hidden, weight)
        rf.linear_grpo_loss(x, w, targets, torch.ones(rows), config=rf.LossConfig(), chunk_rows=32).loss.backward()
        rf.linear_logp(x, w, targets, chunk_rows=32).sum().backward()
    assert max(recorder.sizes) <= 32 * 5000 < rows * 5000


def between(x):
    """`x` with other numbers between its elements, and its last two axes in memory the other way round."""
    wide = torch.full((2 * x.shape[-1], *x.shape[:-1]), math.nan).to(x)
    out = wide[::2].movedim(0, -1)
    return out.copy_(x)


STRIDED = ["none", "hidden", "weight", "bias", "targets", "advantages", "mask"]


@pytest.mark.parametrize("strided", STRIDED)
def test_any_strides(backend, strided):
    """Of each tensor alone, so that no two wrong strides make up for each other. Some targets are improbable, whose
    rows are done again, and the cap reads the target's logit in the backward pass."""
    hidden, weight, bias, targets = head(40, 300, 16, torch.float32, 0.3)
    hidden = 20 * hidden
    targets[::4] = (hidden @ weight.t()).argmin(-1)[::4]
    given = {"hidden": hidden, "weight": weight, "bias": bias, "targets": targets}
    given |= {"advantages": torch.randn(40), "mask": torch.rand(40) > 0.2}
    if strided != "none":
        plain = given[strided]
        given[strided] = torch.stack([plain, plain], -1)[..., 0] if not plain.is_floating_point() else between(plain)
        assert torch.equal(given[strided], plain) and not given[strided].is_contiguous()
    ours = leaves(given["hidden"], given["weight"], given["bias"])
    if strided in ("hidden", "weight", "bias"):
        assert not ours[["hidden", "weight", "bias"].index(strided)].is_contiguous()
    transform = {"softcap": 30.0, "temperature": 0.5}
    logp, entropy = rf.linear_logp(
        *ours[:2], given["targets"], bias=ours[2], mask=given["mask"], entropy="grad", **transform
    )
    config = rf.LossConfig("dapo", **transform)
    fused = rf.linear_grpo_loss(*ours[:2], given["targets"], given["advantages"], bias=ours[2], mask=given["mask"],
                                config=config)  # fmt: skip
    ((logp - entropy) * given["advantages"]).sum().add(fused.loss).backward()

    def oracle_loss(*inputs):
        exact, entropies = head_oracle(*inputs, targets, **transform)
        mask, A = given["mask"], given["advantages"].double()
        on_policy = torch.exp(exact - exact.detach())
        return (torch.where(mask, exact - entropies, 0) * A).sum() - torch.where(
            mask, on_policy * A, 0
        ).sum() / mask.sum()

    for kind, (x, both) in enumerate(zip(ours, oracle_gradients(oracle_loss, hidden, weight, bias), strict=True)):
        assert_right(x.grad, both, kind)
