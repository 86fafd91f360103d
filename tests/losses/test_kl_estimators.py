"""The KL table of docs/losses.md, entry by entry: a million samples of a categorical of five tokens through
`policy_loss` with advantage 0 and beta 1, against enumeration in float64. The seed is fixed and the draws are
counter-based: the same everywhere."""

import functools
import math
from typing import get_args

import pytest
import torch

import redit_fast as rf
from redit_fast.losses.config import KL
from redit_fast.noise import counter_uniform
from tests.losses.kl_estimators import ESTIMATORS, EXPECTATIONS, LOGITS, OLD, REFERENCES, REVERSE, exact, spread

BATCHES, SIZE = 100, 10_000
SIGMAS = 3  # what is right is nearer than this
FAR = 10  # what is wrong is further away than this


@functools.cache
def draws(off_policy):
    """(BATCHES, SIZE) tokens from softmax(OLD) or softmax(LOGITS)."""
    uniform = counter_uniform(0, torch.arange(BATCHES * SIZE), 0, 0)
    edges = (OLD if off_policy else LOGITS).softmax(0).cumsum(0)
    return torch.searchsorted(edges[:-1].contiguous(), uniform, right=True).view(BATCHES, SIZE)


def value_and_gradient(kl, ratio, reference, tokens, off_policy):
    """() and (V,): the mean over the tokens, and its gradient by the logits."""
    logits = LOGITS.clone().requires_grad_()
    out = rf.policy_loss(
        logits.log_softmax(0)[tokens],
        torch.zeros(1),
        old_logp=OLD.log_softmax(0)[tokens] if off_policy else None,
        ref_logp=REFERENCES[reference].log_softmax(0)[tokens],
        config=rf.LossConfig(beta=1.0, kl=kl, kl_ratio_correction=ratio),
    )
    out.loss.backward()
    return out.loss.detach(), logits.grad


@functools.cache
def estimate(kl, ratio, reference, off_policy=False):
    """(1 + V,) twice: value and gradient over all samples, and their standard errors from the batches."""
    batches = (value_and_gradient(kl, ratio, reference, tokens, off_policy) for tokens in draws(off_policy))
    found = torch.stack([torch.cat([value[None], gradient]) for value, gradient in batches])
    return found.mean(0), found.std(0) / math.sqrt(BATCHES)


def off_by(found, error, wanted):
    """The largest distance in standard errors. 1e-7 is float32's own rounding."""
    return ((found - wanted).abs() / (error + 1e-7)).max().item()


each_estimator = pytest.mark.parametrize("row", ESTIMATORS, ids=lambda row: row.kl + "-ratio" * row.ratio)
each_reference = pytest.mark.parametrize("reference", list(REFERENCES))


def test_the_table_has_every_estimator_once():
    assert [(row.kl, row.ratio) for row in ESTIMATORS] == [(kl, r) for kl in get_args(KL) for r in (False, True)]


@each_reference
@each_estimator
def test_value_and_gradient_have_the_means_of_the_table(row, reference):
    found, error = estimate(row.kl, row.ratio, reference)
    assert off_by(found[0], error[0], exact(row.value, reference)[0]) < SIGMAS
    assert off_by(found[1:], error[1:], exact(row.gradient, reference)[1]) < SIGMAS


@each_estimator
def test_they_have_no_other_mean(row):
    """Where the policies are far apart all candidates differ: what the table calls biased is, and by how much."""
    found, error = estimate(row.kl, row.ratio, "far")
    for name in EXPECTATIONS:
        value, gradient = exact(name, "far")
        assert name == row.value or off_by(found[0], error[0], value) > FAR
        assert name == row.gradient or off_by(found[1:], error[1:], gradient) > FAR
    assert row.unbiased_value == (off_by(found[0], error[0], exact(REVERSE, "far")[0]) < SIGMAS)
    assert row.unbiased_gradient == (off_by(found[1:], error[1:], exact(REVERSE, "far")[1]) < SIGMAS)


@each_estimator
def test_off_policy_the_means_stay_where_the_table_says_so(row):
    found, error = estimate(row.kl, row.ratio, "far", off_policy=True)
    value = off_by(found[0], error[0], exact(row.value, "far")[0])
    gradient = off_by(found[1:], error[1:], exact(row.gradient, "far")[1])
    assert max(value, gradient) < SIGMAS if row.off_policy else min(value, gradient) > FAR


@each_reference
@each_estimator
def test_a_sample_spreads_as_the_table_says(row, reference):
    """The deviation of 100 batch means is itself uncertain by 7 %."""
    value, gradient = spread(row, reference)
    _, error = estimate(row.kl, row.ratio, reference)
    one_sample = error * math.sqrt(BATCHES * SIZE)
    assert one_sample[0].item() == pytest.approx(value, rel=0.21)
    assert one_sample[1:].norm().item() == pytest.approx(gradient, rel=0.21)


@each_reference
@each_estimator
def test_the_sign_of_a_single_value(row, reference):
    values = [value_and_gradient(row.kl, row.ratio, reference, torch.tensor([t]), False)[0] for t in range(len(LOGITS))]
    assert (min(values) >= 0) == row.at_least_0


@each_reference
def test_on_policy_k3_with_the_ratio_has_the_gradient_of_k2_sample_by_sample(reference):
    for token in range(len(LOGITS)):
        one = torch.tensor([token])
        k2, k3, k1 = (
            value_and_gradient(kl, ratio, reference, one, False)[1]
            for kl, ratio in (("k2", False), ("k3", True), ("k1", True))
        )
        score = torch.eye(len(LOGITS), dtype=LOGITS.dtype)[token] - LOGITS.softmax(0)
        assert k2.norm() > 1e-2 and torch.allclose(k2, k3, rtol=1e-5, atol=1e-6)
        assert torch.allclose(k1, k2 + score, rtol=1e-5, atol=1e-6)
