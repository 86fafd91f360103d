"""What only a GPU can show; `make gpu-check` runs it, elsewhere every test skips."""

import math

import pytest
import torch

import redit_fast as rf
from redit_fast import backends, selftest

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
CONFIG = rf.LossConfig()


@pytest.fixture(params=[name for name in backends.NAMES if name not in ("cpu", "reference")])
def backend(request):
    refusal = backends.refusal("token_loss", request.param, torch.device("cuda"))
    if refusal:
        pytest.skip(f"{request.param}: {refusal}")
    with rf.use_backend(request.param):
        yield request.param


def token_batch(rows, vocabulary, dtype=torch.bfloat16):
    torch.manual_seed(0)
    logits = torch.empty(rows, vocabulary, dtype=dtype, device="cuda").normal_(std=3)
    return logits, torch.randint(vocabulary, (rows,), device="cuda"), torch.randn(rows, device="cuda")


def loss_and_gradient(logits, targets, advantages):
    leaf = logits.detach().requires_grad_()
    out = rf.grpo_loss(leaf, targets, advantages, config=CONFIG, normalizer=1.0)
    out.loss.backward()
    return out.logp, out.entropy, leaf.grad


def test_every_op_agrees_with_the_reference():
    results = [result for result in selftest.run() if result.device == "cuda"]
    assert results and all(result.passed for result in results), results


def test_more_than_2_to_the_31_logits(backend):
    """14,200 x 151,936; the last row has the bits that it has alone."""
    logits, targets, advantages = token_batch(14_200, 151_936)
    last = loss_and_gradient(logits[-1:].clone(), targets[-1:], advantages[-1:])
    leaf = logits.requires_grad_()
    out = rf.grpo_loss(leaf, targets, advantages, config=CONFIG, normalizer=1.0, inplace=True)
    out.loss.backward()
    assert torch.equal(out.logp[-1:], last[0]) and torch.equal(leaf.grad[-1:], last[2]) and (last[2] != 0).any()


def test_70000_rows(backend):
    inputs = token_batch(70_000, 64)
    logp, entropy, grad = loss_and_gradient(*inputs)
    with rf.use_backend("reference"):
        expected = loss_and_gradient(*inputs)
    assert (logp - expected[0]).abs().max() < 1e-5 and (entropy - expected[1]).abs().max() < 2e-5
    assert (grad.float() - expected[2].float()).norm() < 4e-3 * expected[2].float().norm()


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_poisoned_row_is_nan_alone(backend, value):
    logits, targets, advantages = token_batch(64, 50_257)
    logits[7, 11] = value
    targets[7] = 12
    logp, _, grad = loss_and_gradient(logits, targets, advantages)
    others = torch.arange(64, device="cuda") != 7
    assert logp[7].isnan() and grad[7].isnan().any()
    assert torch.isfinite(logp[others]).all() and torch.isfinite(grad[others]).all()


def test_any_strides_give_the_same_bits(backend):
    wide, targets, advantages = token_batch(33, 2 * 1003)
    for view in (wide[:, ::2], wide[:, 1::2], wide[:, :1003].t().contiguous().t()):
        found, expected = (loss_and_gradient(x, targets % 1003, advantages) for x in (view, view.contiguous()))
        assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize("vocabulary", [50_257, 151_936])
def test_50_repeats_give_the_same_bits(backend, vocabulary):
    inputs = token_batch(300, vocabulary)
    first = loss_and_gradient(*inputs)
    for _ in range(49):
        assert all(map(torch.equal, loss_and_gradient(*inputs), first))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_head_repeats_bit_by_bit_and_is_exact(backend, dtype):
    torch.manual_seed(0)
    hidden, weight = (
        torch.randn(700, 512, device="cuda").to(dtype),
        0.1 * torch.randn(32_000, 512, device="cuda").to(dtype),
    )
    targets, advantages = torch.randint(32_000, (700,), device="cuda"), torch.randn(700, device="cuda")
    found = []
    for _ in range(10):
        x, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        out = rf.linear_grpo_loss(x, w, targets, advantages, config=CONFIG, chunk_rows=256)
        out.loss.backward()
        found.append((out.logp, x.grad, w.grad))
    assert all(all(map(torch.equal, each, found[0])) for each in found)
    exact = torch.log_softmax(hidden.double() @ weight.double().t(), -1).gather(1, targets[:, None]).squeeze(1)
    assert (found[0][0] - exact).abs().max() < (1e-5 if dtype != torch.float32 else 1e-4)  # TF32 is the user's setting
    for grad in found[0][1:]:
        assert torch.isfinite(grad).all() and (grad != 0).any()


@pytest.mark.parametrize("vocabulary", [50_257, 151_936])
def test_a_row_has_the_same_bits_alone_and_among_many(backend, vocabulary):
    """Alone its tiles are programs, among 300 it is a program's."""
    logits, targets, advantages = token_batch(300, vocabulary)
    whole = loss_and_gradient(logits, targets, advantages)
    for rows in (slice(0, 1), slice(7, 9), slice(100, 220)):
        part = loss_and_gradient(logits[rows], targets[rows], advantages[rows])
        assert all(torch.equal(ours, theirs[rows]) for ours, theirs in zip(part, whole))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_head_gives_a_row_the_same_bits_whatever_the_others(backend, dtype):
    torch.manual_seed(0)
    hidden, weight = torch.randn(700, 512, device="cuda").to(dtype), torch.randn(32_000, 512, device="cuda").to(dtype)
    targets, advantages = torch.randint(32_000, (700,), device="cuda"), torch.randn(700, device="cuda")

    def run(rows):
        x = hidden[rows].clone().requires_grad_()
        options = dict(config=CONFIG, normalizer=1.0, chunk_rows=256)
        out = rf.linear_grpo_loss(x, 0.1 * weight, targets[rows], advantages[rows], **options)
        out.loss.backward()
        return out.logp, out.entropy, x.grad

    whole = run(slice(None))
    for rows in (slice(0, 1), slice(250, 300), slice(3, 700)):
        assert all(torch.equal(ours, theirs[rows]) for ours, theirs in zip(run(rows), whole))


def test_the_head_is_captured_in_a_cuda_graph(backend):
    """And replayed on other numbers, with rows masked then that were not before."""
    if backend == "reference":
        pytest.skip("the reference asks which rows need repair")
    torch.manual_seed(0)
    hidden, weight = torch.randn(300, 256, device="cuda").bfloat16(), torch.randn(32_000, 256, device="cuda").bfloat16()
    targets, advantages = torch.randint(32_000, (300,), device="cuda"), torch.randn(300, device="cuda")
    x, w = hidden.clone().requires_grad_(), (0.1 * weight).requires_grad_()

    def loss():
        x.grad = w.grad = None
        out = rf.linear_grpo_loss(x, w, targets, advantages, config=CONFIG, chunk_rows=128)
        out.loss.backward()
        return out.loss.detach(), out.logp, x.grad, w.grad

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        loss()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = loss()
    with torch.no_grad():
        x.copy_(hidden.flip(0))
        targets[50:90] = -100
    graph.replay()
    found = [tensor.clone() for tensor in captured]
    for ours, theirs in zip(found, loss()):
        assert (ours.float() - theirs.float()).norm() < 1e-3 * theirs.float().norm()
    assert (found[1][50:90] == 0).all()


def test_a_step_waits_for_nothing(backend):
    """From the parameters' gradients to the new parameters without the host asking the device."""
    params = [torch.nn.Parameter(torch.randn(1 << 20, device="cuda").bfloat16()) for _ in range(4)]
    optimizer = rf.RegularizedAdamW(params, lr=1e-3, gamma=1e-3, epsilon=1e-3)

    def step():
        for p in params:
            p.grad = torch.ones_like(p)
        if optimizer.perturb():
            for p in params:
                p.grad = torch.ones_like(p)
        optimizer.step()

    step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
