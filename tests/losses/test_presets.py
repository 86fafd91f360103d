"""Presets: what they refuse, and that the documented tables are theirs. What they equal is in test_parity_*.py."""

from dataclasses import fields

import pytest
import torch

import redit_fast as rf
from redit_fast.losses.config import LossConfig
from redit_fast.losses.peers import NOTES, PRESETS, _fields
from tools.peers_doc import MARKER, PAGE, render

ROWS = [(peer, loss_type) for peer, preset in PRESETS.items() for loss_type in preset.losses]


@pytest.mark.parametrize(("peer", "loss_type"), ROWS)
def test_every_row_is_a_loss_config(peer, loss_type):
    config = LossConfig.like(peer, loss_type=loss_type, **({"dro_beta": 0.1} if loss_type == "dro" else {}))
    row = PRESETS[peer].losses[loss_type]
    assert config.loss_type == loss_type
    expected = {**row.options, **row.fixed} | ({"dro_beta": 0.1} if loss_type == "dro" else {})
    assert {name: getattr(config, name) for name in expected} == expected
    assert not set(row.options) & set(row.fixed)


def test_loss_config_like():
    config = LossConfig.like("trl", version="1.16.0", loss_type="grpo", beta=0.1)
    assert config == LossConfig(
        "grpo", beta=0.1, kl_ratio_correction=True, correction="sequence_mask", _correction_optional=True
    )


def test_presets_know_every_field():
    assert _fields() == {each.name for each in fields(LossConfig)} - {"loss_type", "_correction_optional"}
    assert all(set(preset.notes) == set(NOTES) for preset in PRESETS.values())


@pytest.mark.parametrize("peer", PRESETS)
def test_the_default_loss_is_dapo_of_each_peer(peer):
    assert LossConfig.like(peer) == LossConfig.like(peer, loss_type="dapo")


@pytest.mark.parametrize(
    ("peer", "theirs", "ours"),
    [
        ("verl", "vanilla", "dapo"),
        ("verl", "gspo", "gspo_token"),
        ("verl", "geo_mean", "gmpo"),
        ("openrlhf", "ppo", "dapo"),
    ],
)
def test_the_peers_own_names(peer, theirs, ours):
    assert LossConfig.like(peer, loss_type=theirs) == LossConfig.like(peer, loss_type=ours)


@pytest.mark.parametrize("peer", PRESETS)
def test_versions(peer):
    version = PRESETS[peer].version
    assert LossConfig.like(peer, version) == LossConfig.like(peer, version.rpartition(".")[0]) == LossConfig.like(peer)
    assert rf.advantage_options(peer, version) == rf.advantage_options(peer)
    for call in (LossConfig.like, rf.advantage_options):
        with pytest.raises(ValueError, match=f"version of {peer}.*'0.0.1'"):
            call(peer, "0.0.1")


@pytest.mark.parametrize(
    ("peer", "loss_type", "overrides", "error", "message"),
    [
        ("slime", None, {}, ValueError, "peer must be one of"),
        ("trl", "ppo2", {}, ValueError, "loss_type must be one of.*'ppo2'"),
        ("trl", "dro", {}, NotImplementedError, "loss_type='dro' is not a preset of trl 1.16.0"),
        ("trl", "gspo_token", {}, NotImplementedError, "removed"),
        ("trl", None, {"epsilon_lo": 0.1}, TypeError, "epsilon_lo .* did you mean epsilon_low"),
        ("trl", None, {"dual_clip": 3.0}, NotImplementedError, "dual_clip is not an option of trl"),
        ("trl", None, {"kl": "k1"}, NotImplementedError, "kl is not an option"),
        ("trl", "cispo", {"cispo_bound": "relative"}, NotImplementedError, "cispo_bound"),
        ("trl", "vespo", {"correction": "sequence_mask"}, NotImplementedError, "correction='sequence_mask'"),
        ("trl", "gmpo", {"off_policy_mask_threshold": 0.1}, NotImplementedError, "off_policy_mask_threshold"),
        ("trl", "rloo", {"beta": 0.1}, NotImplementedError, "beta is not an option"),
        ("verl", "dppo_tv", {}, NotImplementedError, "clip_ratio_c"),
        ("verl", "dro", {}, ValueError, "dro_beta"),
        ("verl", None, {"delta": 2.0}, NotImplementedError, "delta"),
        ("verl", None, {"kl_ratio_correction": True}, NotImplementedError, "kl_ratio_correction"),
        ("openrlhf", "dr_grpo", {}, NotImplementedError, "advantage estimator"),
        ("liger", None, {"entropy_coef": 0.1}, NotImplementedError, "entropy_coef"),
        ("liger", "cispo", {"importance": "sequence"}, NotImplementedError, "importance"),
        ("liger", "luspo", {}, NotImplementedError, "padding"),
    ],
)
def test_what_a_preset_cannot_reproduce_is_refused_by_name(peer, loss_type, overrides, error, message):
    with pytest.raises(error, match=message):
        LossConfig.like(peer, loss_type=loss_type, **overrides)


def test_the_model_and_the_run_are_the_callers():
    mine = {"max_completion_length": 99, "temperature": 0.7, "logit_scale": 2.0, "softcap": 30.0}
    config = LossConfig.like("verl", loss_type="dr_grpo", **mine)
    assert {name: getattr(config, name) for name in mine} == mine
    assert LossConfig.like("trl", kl="k3") == LossConfig.like("trl")  # a fixed option may be named at its value


def test_a_presets_correction_is_optional_and_the_callers_is_not():
    logp, advantages = torch.zeros(2, 3, requires_grad=True), torch.ones(2)
    sampling = torch.full((2, 3), -1.0)  # a sequence weight of e^3, above the cap of 3
    for config in (LossConfig.like("trl"), LossConfig.like("trl", correction_cap=2.0)):
        assert rf.policy_loss(logp, advantages, config=config).loss == -1
        assert rf.policy_loss(logp, advantages, sampling_logp=sampling, config=config).loss == 0
    with pytest.raises(ValueError, match="sampling_logp is required by correction='sequence_mask'"):
        rf.policy_loss(logp, advantages, config=LossConfig.like("trl", correction="sequence_mask"))


def test_advantage_options_are_arguments_and_a_fresh_dict():
    rewards = torch.tensor([0.0, 1, 0, 3])
    values = {
        peer: rf.group_advantages(1e-4 * rewards, group_size=4, **rf.advantage_options(peer)).values for peer in PRESETS
    }
    assert torch.equal(values["trl"], values["liger"])
    assert values["trl"].abs().max() < 0.9 * values["verl"].abs().max() < values["openrlhf"].abs().max()
    rf.advantage_options("trl")["eps"] = 1.0
    assert rf.advantage_options("trl")["eps"] == 1e-4


def test_the_documented_tables_are_the_presets():
    text = PAGE.read_text()
    tables = text[text.index(MARKER) + len(MARKER) :].lstrip("\n")
    assert tables == render(), "run python -m tools.peers_doc"
