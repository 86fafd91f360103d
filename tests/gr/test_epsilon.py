"""Which epsilon survives rounding: the search of epsilon="auto", and the warning about one that does not."""

import copy
import math
import warnings

import pytest
import torch
from torch import nn

from redit_fast.gr.epsilon import candidates, choose
from tests.gr.test_regularize import LOW, adamw, sgd


def measured(make, p, grad, epsilon, **gr):
    """Metrics of one perturbation, after which the parameters are checked to be back."""
    before = p.detach().clone()
    opt = make([p], gamma=1e-3, epsilon=epsilon, perturb_max_norm=1e9, **gr)
    p.grad = grad.clone()
    assert opt.perturb()
    applied = (p - before).double()
    opt.restore()
    assert torch.equal(p, before) and applied.any()
    metrics = opt.metrics()
    if not gr.get("compute_dtype"):
        assert metrics["gr/step_cos"] == pytest.approx(
            torch.cosine_similarity(applied, grad.double(), 0).item(), rel=1e-3
        )
    return metrics


@pytest.mark.parametrize("make", [sgd, adamw])
@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("options", [{}, {"normalized": True}, {"rounding": "nearest"}])
def test_auto_is_the_smallest_power_of_two_whose_step_keeps_cosine_095(backend, make, dtype, options, recwarn):
    p = nn.Parameter((torch.randn(20_000) * 0.02).to(dtype))
    grad = (torch.randn(20_000) * 3e-4).to(dtype)
    chosen = measured(make, p, grad, "auto", **options)
    epsilon = chosen["gr/epsilon"]
    assert chosen["gr/step_cos"] >= 0.95 and math.log2(epsilon).is_integer() and epsilon > 1e-3
    assert not recwarn.list
    smaller = {**options, "epsilon": epsilon / 2}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # below 0.9 in one of these
        assert measured(make, p, grad, **smaller)["gr/step_cos"] < 0.95


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_a_step_of_which_nothing_is_applied_is_warned_about(backend, rounding):
    """Its cosine is 0 / 0. What is on already is no advice."""
    p = nn.Parameter(torch.ones(1000))
    opt = sgd([p], gamma=1e-9, epsilon=1e-9, rounding=rounding)
    p.grad = torch.rand(1000)
    opt.perturb()
    expected = r"^nothing of the perturbation is applied: rounding swallows .* than 1e-09,"
    with pytest.warns(UserWarning, match=expected) as said:
        metrics = opt.metrics()
    assert ("rounding='stochastic'" in str(said[0].message)) == (rounding == "nearest")
    assert metrics["gr/frac_moved"] == 0 and math.isnan(metrics["gr/step_cos"])


def test_auto_is_the_published_epsilon_where_that_survives(backend, recwarn):
    p = nn.Parameter(torch.randn(1000) * 0.02)
    assert measured(adamw, p, torch.randn(1000) * 0.1, "auto")["gr/epsilon"] == 1e-3
    opt = adamw([p], gamma=1e-3, epsilon="auto")
    for value in (0.1, 0.2):
        p.grad = torch.full_like(p, value)
        if value == 0.1:
            assert opt.perturb()
    opt.step()
    assert opt.metrics()["gr/penalty_ratio"] == pytest.approx(1, rel=1e-5)  # keep_first_grad is its default
    assert not recwarn.list


def test_auto_is_measured_in_the_compute_dtype(backend):
    p = nn.Parameter(torch.randn(1000) * 0.02)
    metrics = measured(adamw, p, torch.randn(1000) * 1e-2, "auto", compute_dtype=torch.bfloat16)
    assert metrics["gr/epsilon"] > 1e-3 and metrics["gr/step_cos"] >= 0.95


def test_auto_stops_where_the_step_is_two_percent_of_the_parameters(backend):
    p = nn.Parameter(torch.randn(100) * 1e-3)
    grad = torch.randn(100)
    with pytest.warns(UserWarning, match=r"0\.02 \|theta\|") as caught:
        metrics = measured(sgd, p, grad, "auto")
    assert caught[0].filename == __file__  # the caller's line
    assert metrics["gr/epsilon"] * grad.norm() == pytest.approx(0.02 * p.norm().item(), rel=1e-5)


def test_the_choice_from_cosines():
    assert candidates(0.02) == [2.0**k for k in range(-10, -5)] and candidates(9e-4) == []
    assert choose({2.0**-10: 0.96, 2.0**-9: 0.99}, cap=1.0) == 1e-3
    assert choose({2.0**-10: 0.5, 2.0**-9: 0.949, 2.0**-8: 0.95}, cap=1.0) == 2.0**-8
    with pytest.warns(UserWarning, match="cosine is 0.50 at most"):
        assert choose({2.0**-10: 0.4, 2.0**-9: 0.5}, cap=0.003) == 0.003
    with pytest.warns(UserWarning, match="0.001 is past it"):
        assert choose({}, cap=1e-4) == 1e-4


def test_auto_is_looked_for_again_after_100_steps_and_survives_a_restart(backend):
    p = nn.Parameter((torch.randn(64) * 0.02).bfloat16())
    size, chosen = [1e-3], []

    def take_steps(opt, count):
        for _ in range(count):
            p.grad = torch.full_like(p, size[0])
            assert opt.perturb()
            p.grad = torch.full_like(p, size[0]) if p.grad is None else p.grad + size[0]
            opt.step()
            opt.zero_grad()
            chosen.append(opt.epsilon)

    opt = adamw([p], lr=0.0, gamma=1e-3, epsilon="auto")
    take_steps(opt, 1)
    size[0] = 1e-1
    take_steps(opt, 50)
    state = copy.deepcopy(opt.state_dict())
    opt = adamw([p], lr=0.0, gamma=1e-3, epsilon="auto")
    opt.load_state_dict(state)
    take_steps(opt, 50)
    assert len(set(chosen[:100])) == 1 and chosen[100] <= chosen[0] / 32


@pytest.mark.parametrize("bad", [math.nan, 0.0])
def test_auto_waits_for_a_gradient_that_it_can_judge(backend, bad):
    p = nn.Parameter((torch.randn(500) * 0.02).bfloat16())
    opt = adamw([p], gamma=1e-3, epsilon="auto")
    epsilons = []
    for value in (bad, 1.0):
        p.grad = (torch.randn(500) * 1e-3 * value).bfloat16()
        assert opt.perturb()
        p.grad = torch.zeros_like(p)
        opt.step()
        opt.zero_grad()
        epsilons.append(opt.epsilon)
    assert epsilons[0] == 1e-3 < epsilons[1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_published_settings_of_half_a_billion_bfloat16_parameters_are_warned_about(backend, dtype, recwarn):
    """Scaled down: |g| = 1 and epsilon = 0.001 on 5e8 parameters are steps of 4.5e-8 on weights of 0.02. As published
    (rounded to nearest) the cosine is 0.03; float32 keeps the step, and is silent."""
    count = 400_000
    p = nn.Parameter((torch.randn(count) * 0.02).to(dtype))
    grad = torch.randn(count).to(dtype) * 5e8**-0.5
    metrics = measured(adamw, p, grad, 1e-3, rounding="nearest")
    if dtype == torch.float32:
        assert metrics["gr/step_cos"] > 0.99 and not recwarn.list
    else:
        assert metrics["gr/step_cos"] < 0.1
        assert "epsilon='auto'" in str(recwarn.pop(UserWarning).message)
