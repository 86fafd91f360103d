"""No option is silently ignored: each field of LossConfig changes the result or raises, on every backend and route."""

import math
from dataclasses import fields
from typing import get_args

import pytest
import torch

import redit_fast as rf
from redit_fast.losses.config import LossType

OPS = ("token_logp", "token_logp_grad", "token_loss", "scale_in_place", "exp_product")
TYPES = get_args(LossType)
CHANGES = {
    "loss_type": None,  # to sapo, or from it
    "importance": "sequence",
    "epsilon_low": 0.05,
    "epsilon_high": 0.4,
    "delta": 1.1,
    "dual_clip": 1.1,
    "cispo_bound": "relative",
    "beta": 0.5,
    "kl": "k1",
    "kl_ratio_correction": True,
    "entropy_coef": 0.5,
    "correction": "token_mask",
    "correction_cap": 1.2,
    "correction_floor": 1.1,
    "off_policy_mask_threshold": 0.01,
    "top_entropy_quantile": 0.5,
    "sapo_temperature_pos": 2.0,
    "sapo_temperature_neg": 2.0,
    "vespo_k_pos": 1.0,
    "vespo_lambda_pos": 1.0,
    "vespo_k_neg": 1.0,
    "vespo_lambda_neg": 1.0,
    "clip_cov_ratio": 0.5,
    "clip_cov_lb": 0.5,
    "clip_cov_ub": 1.0,
    "kl_cov_ratio": 0.5,
    "kl_cov_coef": 2.0,
    "dro_beta": 0.1,
    "max_completion_length": 5,
    "temperature": 2.0,
    "logit_scale": 2.0,
    "softcap": 3.0,
}
REQUIRED = {
    "dr_grpo": {"max_completion_length": 9},
    "dro": {"dro_beta": 0.5},
    "cispo": {"epsilon_high": 1.2},
    "dppo_tv": {"epsilon_low": 0.005, "epsilon_high": 0.005},
    "dppo_kl": {"epsilon_low": 0.01, "epsilon_high": 0.01},
    "clip_cov": {"clip_cov_ratio": 0.1, "clip_cov_lb": 0.05},
}
PARENTS = {
    "kl": {"beta": 0.1},
    "kl_ratio_correction": {"beta": 0.1},
    "correction_cap": {"correction": "token_truncate"},
    "correction_floor": {"correction": "token_truncate"},
}


@pytest.mark.parametrize("loss_type", TYPES)
def test_a_config_comes_back_from_its_text(loss_type):
    """As torch's operators are given it."""
    config = rf.LossConfig(loss_type, correction="token_mask", correction_cap=math.inf, **REQUIRED.get(loss_type, {}))
    assert rf.LossConfig.of(config.text) == config and rf.LossConfig.like("trl") == rf.LossConfig.of(
        rf.LossConfig.like("trl").text
    )


def test_every_field_and_every_loss_type_is_classified():
    """A new field fails here until it has a change above, and the test below judges it."""
    assert set(CHANGES) == {field.name for field in fields(rf.LossConfig) if not field.name.startswith("_")}
    assert set(REQUIRED) < set(TYPES)


def head():
    """8 sequences of 8 tokens; their policies differ per sequence and per token, so that every mask has work to do."""
    hidden, weight, targets = torch.randn(8, 8, 8), torch.randn(11, 8), torch.randint(11, (8, 8))
    logp = rf.token_logp(hidden @ weight.t(), targets)
    old, ref, sampling = ((logp + 0.3 * torch.randn(8, 1) + 0.3 * torch.randn(8, 8)).clamp(max=-0.01) for _ in range(3))
    return hidden, weight, targets, torch.randn(8), old, ref, sampling


def result(route, inputs, config):
    """Loss and gradient, one after the other."""
    hidden, weight, targets, advantages, old, ref, sampling = inputs
    leaf = hidden.clone().requires_grad_()
    kwargs = dict(old_logp=old, ref_logp=ref, sampling_logp=sampling, config=config)
    if route == "logits":
        out = rf.grpo_loss(leaf @ weight.t(), targets, advantages, **kwargs)
    else:
        out = rf.linear_grpo_loss(leaf, weight, targets, advantages, **kwargs)
    assert out.route == config.route
    out.loss.backward()
    return torch.cat([out.loss.detach()[None], leaf.grad.flatten()])


@pytest.mark.parametrize("loss_type", TYPES)
@pytest.mark.parametrize("route", ["logits", "hidden"])
def test_flipping_any_field_changes_the_result_or_raises_naming_it(backend, loss_type, route):
    inputs, base, changed, raised = head(), {"loss_type": loss_type, **REQUIRED.get(loss_type, {})}, set(), set()
    plain = result(route, inputs, rf.LossConfig(**base))
    for field, value in CHANGES.items():
        parent, before = PARENTS.get(field, {}), plain
        if parent:
            before = result(route, inputs, rf.LossConfig(**base, **parent))
        flipped = {**base, **parent, field: value}
        if field == "loss_type":
            flipped = {"loss_type": "grpo" if loss_type == "sapo" else "sapo"}
        try:
            config = rf.LossConfig(**flipped)
        except (ValueError, NotImplementedError) as error:
            assert field in str(error)
            raised.add(field)
            continue
        if not torch.allclose(before, result(route, inputs, config), rtol=1e-3, atol=1e-6):
            changed.add(field)
    silent = set(CHANGES) - changed - raised
    assert silent == (set() if loss_type == "dr_grpo" else {"max_completion_length"})
    assert {"loss_type", "beta", "correction", "off_policy_mask_threshold", "temperature"} <= changed


ROUTES = {
    "fused": [
        *({"loss_type": t} for t in ("grpo", "bnpo", "dr_grpo", "dapo", "luspo", "cispo", "sapo", "gpg", "reinforce",
                                     "dppo_tv", "dppo_kl")),
        {"loss_type": "dro", "dro_beta": 1.0},
        {"beta": 0.1, "kl": "k1", "kl_ratio_correction": True},
        {"correction": "token_truncate"},
        {"correction": "token_mask"},
        {"delta": 2.0},
        {"dual_clip": 3.0},
    ],
    "logp": [
        *({"loss_type": t} for t in ("gspo", "gspo_token", "gmpo", "rloo", "vespo", "clip_cov", "kl_cov")),
        {"importance": "sequence"},
        {"entropy_coef": 0.1},
        {"top_entropy_quantile": 0.5},
        {"off_policy_mask_threshold": 0.5},
        {"correction": "sequence_truncate"},
        {"correction": "sequence_mask"},
    ],
}  # fmt: skip


def test_the_route_is_fused_exactly_for_token_level_losses():
    for route, options in ROUTES.items():
        for option in options:
            assert rf.LossConfig(**option).route == route, option
    named = [option.get("loss_type") for options in ROUTES.values() for option in options]
    assert set(named) - {None} == set(TYPES)


@pytest.mark.parametrize(
    ("options", "error", "name"),
    [
        ({"loss_type": "ppo"}, ValueError, "loss_type"),
        ({"importance": "word"}, ValueError, "importance"),
        ({"kl": "k4"}, ValueError, "kl"),
        ({"correction": "mask"}, ValueError, "correction"),
        ({"cispo_bound": "loose"}, ValueError, "cispo_bound"),
        ({"kl_ratio_correction": 1}, TypeError, "kl_ratio_correction"),
        ({"epsilon_low": -1.0}, ValueError, "epsilon_low"),
        ({"epsilon_low": "0.2"}, TypeError, "epsilon_low"),
        ({"epsilon_low": None}, TypeError, "epsilon_low"),
        ({"delta": 0.0}, ValueError, "delta"),
        ({"delta": 2.0, "dual_clip": 3.0}, ValueError, "dual_clip and delta"),
        ({"dual_clip": 1.0}, ValueError, "dual_clip"),
        ({"temperature": 0.0}, ValueError, "temperature"),
        ({"softcap": -3.0}, ValueError, "softcap"),
        ({"beta": math.nan}, ValueError, "beta"),
        ({"entropy_coef": math.inf}, ValueError, "entropy_coef"),
        ({"correction_cap": 0.0}, ValueError, "correction_cap"),
        ({"correction_cap": math.nan}, ValueError, "correction_cap"),
        ({"correction_floor": 4.0}, ValueError, "correction_floor"),
        ({"off_policy_mask_threshold": -1.0}, ValueError, "off_policy_mask_threshold"),
        ({"top_entropy_quantile": 1.1}, ValueError, "top_entropy_quantile"),
        ({"loss_type": "sapo", "sapo_temperature_pos": 0.0}, ValueError, "sapo_temperature_pos"),
        ({"loss_type": "vespo", "vespo_lambda_neg": 0.0}, ValueError, "vespo_lambda_neg"),
        ({"loss_type": "vespo", "correction": "sequence_mask"}, NotImplementedError, "correction"),
        ({"loss_type": "clip_cov", "clip_cov_ratio": 2.0}, ValueError, "clip_cov_ratio"),
        ({"loss_type": "clip_cov", "clip_cov_lb": 6.0}, ValueError, "clip_cov_lb"),
        ({"loss_type": "kl_cov", "kl_cov_ratio": 0.0}, ValueError, "kl_cov_ratio"),
        ({"loss_type": "dro"}, ValueError, "dro_beta"),
        ({"loss_type": "gspo", "importance": "sequence"}, ValueError, "importance"),
        ({"loss_type": "cispo", "delta": 2.0}, ValueError, "delta"),
        ({"loss_type": "cispo", "epsilon_low": 0.1, "epsilon_high": 2.0}, ValueError, "epsilon_low"),
        ({"max_completion_length": 0}, ValueError, "max_completion_length"),
        ({"max_completion_length": 1.5}, TypeError, "max_completion_length"),
    ],
)
def test_a_bad_config_names_the_field_when_it_is_built(options, error, name):
    with pytest.raises(error, match=name) as caught:
        rf.LossConfig(**options)
    assert "\n" not in str(caught.value)


def test_children_are_accepted_and_inert_while_their_parent_is_off():
    children = {"kl": "k1", "kl_ratio_correction": True, "correction_cap": math.inf, "correction_floor": 0.5}
    inputs = head()
    plain = result("logits", inputs, rf.LossConfig())
    for field, value in children.items():
        assert torch.equal(result("logits", inputs, rf.LossConfig(**{field: value})), plain)


@pytest.mark.parametrize(
    "options",
    [{"loss_type": loss_type} for loss_type in TYPES if loss_type != "kl_cov"]
    + [{"beta": 0.1}, {"entropy_coef": 0.1}, {"top_entropy_quantile": 0.5}, {"dual_clip": 1.1}, {"delta": 1.1},
       {"off_policy_mask_threshold": 0.01}, {"importance": "sequence"}, {"loss_type": "sapo", "importance": "sequence"},
       {"correction": "token_mask"}, {"correction": "sequence_truncate"},
       {"loss_type": "kl_cov", "kl_cov_ratio": 0.5}],
    ids=str,
)  # fmt: skip
def test_silent_at_zero_says_whether_sequences_of_advantage_0_may_go_without_a_graph(options):
    base = REQUIRED.get(options.get("loss_type"), {})
    config = rf.LossConfig(**{**base, **options})
    hidden, weight, targets, advantages, old, ref, sampling = head()
    entropy = torch.rand(8, 8)
    advantages[[0, 3, 4]] = 0

    def slopes(sequences):
        logp = rf.token_logp(hidden @ weight.t(), targets)[sequences].requires_grad_()
        bonus = entropy[sequences].clone().requires_grad_()
        rf.policy_loss(
            logp,
            advantages[sequences],
            old_logp=old[sequences],
            ref_logp=ref[sequences],
            sampling_logp=sampling[sequences],
            entropy=bonus,
            config=config,
            normalizer=8.0,
        ).loss.backward()
        return logp.grad if bonus.grad is None else logp.grad + bonus.grad

    silent, others = advantages == 0, advantages != 0
    whole = slopes(torch.arange(8))
    unmoved = (whole[silent] == 0).all() and torch.equal(whole[others], slopes(torch.nonzero(others).flatten()))
    assert config.silent_at_zero == unmoved
