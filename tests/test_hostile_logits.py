"""Logits that hurt (shifts of 1e4, -inf, ties, peaks) at every size of the grid, by every route, against float64."""

import math

import pytest
import torch

import redit_fast as rf
from tests.test_token_loss import check_gradient, check_values, exact_loss
from tests.tolerance import assert_no_worse

OPS = ("token_logp", "token_logp_grad", "token_loss", "scale_in_place", "exp_product")
SHAPES = [(0, 31), (7, 1), (7, 2), (7, 3), (1000, 31), (7, 127), (200, 1000), (3, 50257), (1, 151936)]
KINDS = ("plain", "up", "down", "minus infinity", "ties", "peaked")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


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
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", KINDS)
def test_from_logits(backend, kind, shape, dtype):
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
