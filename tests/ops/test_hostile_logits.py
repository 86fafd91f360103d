"""Logits that hurt (shifts of 1e4, -inf, ties, peaks) at every size of the grid, by every route, against float64."""

import math
from itertools import product

import pytest
import torch

import redit_fast as rf
from tests.conftest import few
from tests.ops.test_linear_loss import BFLOAT16_LIMITS, leaves
from tests.ops.test_token_loss import check_gradient, check_values, exact_loss, oracle
from tests.tolerance import assert_gradient_no_worse, assert_no_worse, relative

OPS = ("token_logp", "token_logp_grad", "token_loss", "scale_in_place")
SHAPES = [(0, 31), (7, 1), (7, 2), (7, 3), (1000, 31), (7, 127), (200, 1000), (3, 50257), (1, 151936)]
KINDS = ("plain", "up", "down", "minus infinity", "ties", "peaked")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# A row's rounding of E is averaged away over many: Frobenius limits need some.
HEAD_SHAPES = [(0, 31), (64, 1), (64, 2), (64, 3), (1000, 31), (64, 127), (200, 1000)]
HEADS = [*product(KINDS, HEAD_SHAPES), *product(("plain", "down", "ties"), [(16, 50257), (12, 151936)])]


def rows_of(kind, rows, vocabulary):
    """Logits (rows, vocabulary) and targets; `ties` puts the target up to 26.5 below equal logits, short of the
    repair."""
    logits, targets = 3 * torch.randn(rows, vocabulary), torch.randint(vocabulary, (rows,))
    if kind in ("up", "down"):
        logits += 1e4 if kind == "up" else -1e4
    elif kind == "minus infinity":
        logits[torch.rand(rows, vocabulary) < 0.5] = -math.inf
        logits[torch.arange(rows), targets] = 0
    elif kind == "ties":
        logits = torch.zeros(rows, vocabulary)
        logits[torch.arange(rows), targets] = torch.linspace(-26.5, 0, rows)
    elif kind == "peaked":
        logits[::2].scatter_(1, targets[::2, None], 15.0)
        logits[1::2, 0] = 60.0
    return logits, targets


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_from_logits(backend, kind, shape, dtype):
    shape = few(backend, shape[0]), shape[1]
    logits, targets = rows_of(kind, *shape)
    logits = logits.to(dtype).t().contiguous().t()  # neighbours lie `rows` elements apart
    check_values(logits, targets)
    leaf, advantages = logits.clone().requires_grad_(), torch.randn(shape[0])
    rf.grpo_loss(leaf, targets, advantages, config=rf.LossConfig()).loss.backward()
    if shape[0] == 0 or shape[1] == 1:
        assert (leaf.grad == 0).all()  # a vocabulary of one has no choice
        return
    check_gradient(logits, targets)
    exact, low = (
        exact_loss(logits, targets, advantages, x, config=rf.LossConfig())[1] for x in (torch.float64, torch.float32)
    )
    assert_no_worse(leaf.grad, low.to(dtype), exact, floor=2e-5 * exact.abs().max().item())


def head_of(kind, rows, vocabulary, dtype):
    """Hidden (rows, 8), weight, bias and targets with logits like those of `rows_of`."""
    hidden, weight, bias = torch.randn(rows, 8), torch.randn(vocabulary, 8), torch.randn(vocabulary)
    targets = torch.randint(vocabulary, (rows,))
    if kind in ("up", "down"):
        bias += 1e4 if kind == "up" else -1e4
    elif kind == "minus infinity":
        bias[torch.rand(vocabulary) < 0.5] = -math.inf
        bias[targets] = 0
    elif kind == "ties":
        weight[:], bias[:], bias[0] = weight[0], 0, -26.5
        targets[:] = 0
    elif kind == "peaked":
        hidden *= 5
    return *(x.to(dtype) for x in (hidden, weight, bias)), targets


@pytest.mark.ops("exp_product")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("kind", "shape"), HEADS, ids=str)
def test_from_hidden_states(backend, kind, shape, dtype):
    """As right as from logits in float32, where a bias of 1e4 leaves them 10 bits behind the point."""
    *inputs, targets = head_of(kind, *shape, dtype)
    ours, exact, low = leaves(*inputs), leaves(*(x.double() for x in inputs)), leaves(*(x.float() for x in inputs))
    logp, entropy = rf.linear_logp(ours[0], ours[1], targets, bias=ours[2], entropy="grad", chunk_rows=128)
    (true, true_entropy), (near, near_entropy) = (oracle(x @ w.t() + b, targets) for x, w, b in (exact, low))
    for found, right, other, floor in ((logp, true, near, 1e-5), (entropy, true_entropy, near_entropy, 2e-5)):
        rounded = 2.0**-11 if kind in ("up", "down") else 0.0  # half an ulp of 1e4
        allowed = max([floor, rounded, *(1.25 * (other - right).abs()).tolist()])
        torch.testing.assert_close(found.double(), right, rtol=0, atol=allowed)
    upstream = torch.rand(2, shape[0]) + 0.5  # of one sign: sums that cancel measure the rounding of E alone
    for (a, b), factors in (
        ((logp, entropy), upstream),
        ((true, true_entropy), upstream.double()),
        ((near, near_entropy), upstream),
    ):
        (a * factors[0] + 0.3 * b * factors[1]).sum().backward()
    for x, y, z, limit in zip(ours, exact, low, BFLOAT16_LIMITS, strict=True):
        if shape[0] == 0 or shape[1] == 1:
            assert (x.grad == 0).all()
        elif not (kind == "ties" and x is ours[0]):  # equal rows of the weight: the gradient of hidden cancels
            if dtype == torch.bfloat16:
                assert relative(x.grad, y.grad) < max(limit, 1.25 * relative(z.grad, y.grad) + 1e-6)
            else:
                assert_gradient_no_worse(x.grad, z.grad, y.grad)
