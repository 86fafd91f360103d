"""Packed rows give the log-probs and gradients of padded ones, family by family; the whole grid of losses on one."""

import dataclasses
import os
from typing import get_args

import pytest
import torch

import redit_fast as rf
from redit_fast.losses.config import LossType
from redit_fast.packing.plan import Budget
from redit_fast.training.policy import checkpoint_activations
from tests.packing.models import FAMILIES, batch_of, exact_logp, gradient, model_of

GATES = "PACKING_GATES" in os.environ  # make packing-gates: every family in every setting


def passes(model, packed, **options):
    """Log-probs and gradients of one pass."""
    model.zero_grad()
    done = batch_of(packed=packed, model=model, **options).backward(model)
    return done.logp, gradient(model)


def assert_equal(model, **options):
    """The rule: against float64 at most 1.25 times the padded rows' error and 5e-6, and a gradient as theirs."""
    exact = exact_logp(model, batch_of(model=model, **options))
    logp, grad = passes(model, True, **options)
    padded_logp, padded_grad = passes(model, False, **options)
    limit = 1.25 * (padded_logp - exact).abs().max() + 5e-6
    assert (logp - exact).abs().max() <= limit and exact.std() > 0.2
    assert (grad - padded_grad).norm() <= 1e-5 * padded_grad.norm() and padded_grad.norm() > 1e-3


SETTINGS = {
    "one micro-batch": {},
    "a group above the budget": {
        "budget": Budget(tokens=30)
    },  # three completions of up to 19 tokens and a prompt of 12 to 14
    "one group": {"samples": range(3)},
    "one sample": {"samples": [0]},
    "completions of one token": {"samples": [1, 4]},
}


@pytest.mark.parametrize("kind", FAMILIES)
@pytest.mark.parametrize("setting", SETTINGS if GATES else ["one micro-batch"])
def test_packed_is_padded(kind, setting):
    assert_equal(model_of(kind), **SETTINGS[setting])


@pytest.mark.parametrize("setting", list(SETTINGS)[1:])
def test_packed_is_padded_in_every_setting(setting):
    if setting == "a group above the budget":
        assert [len(micro.samples) for micro, _ in batch_of(budget=Budget(tokens=30)).micro_batches].count(1) > 3
    assert_equal(model_of("qwen2"), **SETTINGS[setting])


@pytest.mark.parametrize("kind", FAMILIES if GATES else ["qwen2", "gemma2"])
def test_packed_is_padded_with_layers_that_are_computed_again(kind):
    model = model_of(kind)
    plain = passes(model, True)
    checkpoint_activations(model)
    for one, other in zip(plain, passes(model, True)):
        assert torch.equal(one, other)


def test_what_the_families_have_matters():
    """Windows, softcaps, shared beginnings: without them the log-probs would be others, so that the tests would see."""
    without = {
        "mistral": {"sliding_window": None}, "gemma2": {"attn_logit_softcapping": None},
        "granite": {"attention_multiplier": 1.0}, "qwen2": {"use_sliding_window": False},
    }  # fmt: skip
    for kind, change in without.items():
        (logp, _), (other, _) = (passes(model_of(kind, **more), True) for more in ({}, change))
        assert (logp - other).abs().max() > 0.01, kind


@pytest.mark.parametrize("loss_type", get_args(LossType))
@pytest.mark.parametrize("beta", [0.0, 0.1], ids=["", "kl"])
def test_every_loss_with_and_without_kl_in_both_passes_of_gr(loss_type, beta):
    settings = rf.LossConfig(
        loss_type, beta=beta, dro_beta=0.5 if loss_type == "dro" else None, max_completion_length=20
    )
    found = []
    for packed in (True, False):
        model = model_of("qwen2")
        batch = batch_of(settings, packed)
        batch = dataclasses.replace(batch, advantages=torch.where(torch.arange(15) % 4 == 0, 0.0, batch.advantages))
        if beta:
            batch.score_reference(model_of("qwen2", initializer_range=0.21))
        optimizer = rf.RegularizedAdamW(rf.parameter_groups(model), gamma=0.02, epsilon=0.02)
        first = batch.backward(model)
        grads = [gradient(model)]
        with optimizer.perturb() as perturbed:
            assert perturbed
            second = batch.backward(model, first.logp, masks_of=first)
            grads.append(gradient(model))
        found.append((first, second, grads))
    (one, second, ours), (other, _, theirs) = found
    assert one.loss == pytest.approx(other.loss, rel=1e-4, abs=1e-5)
    assert one.metrics == pytest.approx(other.metrics, rel=1e-3, abs=1e-5)
    assert second.logp.isnan().any() == batch.settings.silent_at_zero and (second.tokens < one.tokens) == (
        batch.settings.silent_at_zero
    )
    for grad, padded in zip(ours, theirs):
        assert (grad - padded).norm() <= 1e-5 * padded.norm() and padded.norm() > 1e-4
    assert (ours[0] - ours[1]).norm() > 1e-3 * ours[0].norm()  # theta + epsilon g1 is another place


@pytest.mark.parametrize("kind", FAMILIES if GATES else ["qwen2", "gemma2", "granite"])
def test_in_bfloat16_packed_rows_err_no_more_than_padded_ones(kind):
    """Against float32 with the same weights, over four steps: mean errors, since single ones are roundings."""
    model = model_of(kind).bfloat16()
    exact = model_of(kind)
    exact.load_state_dict(model.state_dict())
    errors = {True: 0.0, False: 0.0}
    for seed in range(4):
        with torch.no_grad():
            right = batch_of(packed=False, model=exact, seed=seed).logp(exact)
        for packed in errors:
            found = batch_of(packed=packed, model=model, seed=seed).logp(model)
            errors[packed] += (found - right).abs().mean().item()
    assert 1e-3 < errors[True] <= 1.25 * errors[False]
