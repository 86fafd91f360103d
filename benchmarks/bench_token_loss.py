"""Log-probs and losses from logits: pytest benchmarks --benchmark-only

512 rows of a vocabulary of 32000, float32 (66 MB) and bfloat16. Every timed call's output is checked. The baselines are
log_softmax + gather and its autograd backward, and x.sum(), which reads the same bytes.
"""

import pytest
import torch

import redit_fast as rf
from redit_fast import backends

ROWS, VOCABULARY = 512, 32000
OPS = ("token_logp", "token_logp_grad", "token_loss")


def batch(dtype):
    generator = torch.Generator().manual_seed(0)
    logits = (torch.randn(ROWS, VOCABULARY, generator=generator) * 3).to(dtype)
    targets = torch.randint(VOCABULARY, (ROWS,), generator=generator)
    return logits, targets, torch.randn(ROWS, generator=generator)


def log_softmax_logp(logits, targets):
    return torch.log_softmax(logits.float(), -1).gather(1, targets[:, None]).squeeze(1)


def policy_gradient(logits, targets, advantages):
    """On policy the loss's gradient is that of -mean(A logp)."""
    leaf = logits.detach().requires_grad_()
    (-log_softmax_logp(leaf, targets) * advantages).mean().backward()
    return leaf.grad


def force(backend):
    for op in OPS:
        refusal = backends._backend(backend).why_not(op, torch.device("cpu"))
        if refusal:
            pytest.skip(f"{backend}: {refusal}")
    return rf.use_backend(backend)


DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
BACKENDS = pytest.mark.parametrize("backend", backends.NAMES)


@DTYPES
@BACKENDS
def test_logp(benchmark, backend, dtype):
    logits, targets, _ = batch(dtype)
    with force(backend):
        out = benchmark(rf.token_logp, logits, targets)
    torch.testing.assert_close(out, log_softmax_logp(logits, targets), rtol=0, atol=2e-5)


@DTYPES
@pytest.mark.parametrize("inplace", [True, False], ids=["in place", "fresh"])
@BACKENDS
def test_loss_and_gradient(benchmark, backend, inplace, dtype):
    logits, targets, advantages = batch(dtype)
    expected = policy_gradient(logits, targets, advantages)

    def leaf():
        return ((logits.clone() if inplace else logits).requires_grad_(),), {}

    def step(leaf):
        out = rf.grpo_loss(leaf, targets, advantages, config=rf.LossConfig(), inplace=inplace)
        return torch.autograd.grad(out.loss, leaf)[0]

    with force(backend):
        grad = benchmark.pedantic(step, setup=leaf, rounds=5, warmup_rounds=1)
    torch.testing.assert_close(grad, expected, rtol=1e-2, atol=1e-5 * expected.abs().max().item())


@DTYPES
def test_log_softmax_gather(benchmark, dtype):
    logits, targets, _ = batch(dtype)
    out = benchmark(log_softmax_logp, logits, targets)
    torch.testing.assert_close(out, rf.token_logp(logits, targets), rtol=0, atol=2e-5)


@DTYPES
def test_log_softmax_gather_and_gradient(benchmark, dtype):
    arguments = batch(dtype)
    grad = benchmark.pedantic(policy_gradient, arguments, rounds=5, warmup_rounds=1)
    assert grad.sum(1).abs().max() < 1e-3 < grad.abs().max()


@DTYPES
def test_sum(benchmark, dtype):
    logits, _, _ = batch(dtype)
    assert torch.isfinite(benchmark(logits.sum))
