"""verl 0.9.1: every policy loss against verl's own function, in value, gradient and metrics, with the actor's real
configuration; and through verl's own ppo_loss on nested tensors.
"""

import inspect
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("verl", reason="verl 0.9.1 is not installed")
from omegaconf import OmegaConf
from tensordict import TensorDict
from verl.trainer.ppo.core_algos import POLICY_LOSS_REGISTRY
from verl.utils import tensordict_utils as tu
from verl.workers.config import FSDPActorConfig, PolicyLossConfig
from verl.workers.utils.losses import ppo_loss

import redit_fast.integrations.verl  # noqa: F401
from redit_fast.integrations.verl.loss import NAMES
from redit_fast.losses.peers import PRESETS
from tests.losses.test_parity_peers import assert_same, rollouts

MODES = ["token-mean", "token-sum", "seq-mean-token-sum", "seq-mean-token-sum-norm", "seq-mean-token-mean"]
GLOBAL = {"dp_size": 2, "batch_num_tokens": 61, "global_batch_size": 11, "loss_scale_factor": 16}
LOSS_OPTIONS = {  # under which something happens in the six sequences
    "vanilla": {"clip_ratio_c": 1.2},
    "dppo_tv": {"clip_ratio_c": 20.0, "clip_ratio_low": 0.05, "clip_ratio_high": 0.03},
    "dppo_kl": {"clip_ratio_c": 20.0, "clip_ratio_low": 0.02, "clip_ratio_high": 0.01},
    "sapo": {"tau_neg": 1.5},
    "clip_cov": {"policy_loss": PolicyLossConfig(clip_cov_ratio=1.0, clip_cov_lb=0.2, clip_cov_ub=0.9)},
    "kl_cov": {"policy_loss": PolicyLossConfig(kl_cov_ratio=0.2)},
    "dro": {"policy_loss": PolicyLossConfig(dro_beta=0.3)},
}


def actor(**options):
    return FSDPActorConfig(rollout_n=4, ppo_micro_batch_size_per_gpu=2, **options)


def test_every_loss_of_verl_has_one_of_ours_with_the_same_arguments():
    theirs = {name for name in POLICY_LOSS_REGISTRY if not name.startswith("redit_")}
    assert theirs == {*NAMES, "bypass_mode"}
    mine = {PRESETS["verl"].names.get(name, name) for name in (*NAMES, "grpo", "dr_grpo", "reinforce")}
    assert mine >= set(PRESETS["verl"].losses)  # grpo and dr_grpo: vanilla by loss_agg_mode; reinforce: bypass_mode
    for name in theirs:
        ours = inspect.signature(POLICY_LOSS_REGISTRY[f"redit_{name}"]).parameters
        assert list(ours) == list(inspect.signature(POLICY_LOSS_REGISTRY[name]).parameters)


def call(name, data, config, mode, weights=None, **changed):
    at = data.logp.clone().requires_grad_()
    inputs = {
        "old_log_prob": data.old,
        "advantages": data.advantages[:, None] * data.mask,
        "response_mask": data.mask,
        "rollout_is_weights": weights,
        **changed,
    }
    loss, metrics = POLICY_LOSS_REGISTRY[name](log_prob=at, loss_agg_mode=mode, config=config, **inputs)
    loss.backward()
    return loss, at.grad, metrics


def assert_same_call(ours, theirs):
    assert_same(ours[0], theirs[0], "loss")
    assert_same(ours[1], theirs[1], "gradient")
    assert list(ours[2]) == list(theirs[2]) and all(type(value) is float for value in ours[2].values())
    assert ours[2] == pytest.approx(theirs[2], rel=1e-5, abs=1e-7)


@pytest.mark.parametrize("info", [{}, GLOBAL], ids=["local", "global"])
@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", NAMES)
def test_value_gradient_and_metrics_are_those_of_verls_function(name, mode, weighted, info):
    data = rollouts()
    config = actor(global_batch_info=info, **LOSS_OPTIONS.get(name, {}))
    weights = (data.old - data.sampling).exp().clamp(max=2.0) if weighted else None
    ours, theirs = (call(each, data, config, mode, weights) for each in (f"redit_{name}", name))
    assert_same_call(ours, theirs)
    if name not in ("gpg", "kl_cov", "dro", "sapo"):
        assert theirs[2]["actor/pg_clipfrac"] > 0
    if name in ("vanilla", "geo_mean"):
        assert theirs[2]["actor/pg_clipfrac_lower"] > 0


@pytest.mark.parametrize("name", NAMES)
def test_a_far_log_ratio_is_limited_and_reported_as_by_verl(name):
    data = rollouts()
    data.logp[0, 2] -= 30
    config = actor(**LOSS_OPTIONS.get(name, {}))
    assert_same_call(*(call(each, data, config, "token-mean") for each in (f"redit_{name}", name)))


@pytest.mark.parametrize("loss_type", ["ppo_clip", "reinforce"])
@pytest.mark.parametrize(("weights", "rejection"), [(None, None), ("token", None), ("sequence", "seq_mean_k1")])
def test_bypass_mode_is_verls(loss_type, weights, rejection):
    correction = {"loss_type": loss_type, "rollout_is": weights, "rollout_rs": rejection,
                  "rollout_rs_threshold": "0.9_1.1" if rejection else None}  # fmt: skip
    policy_loss = OmegaConf.create({**vars(PolicyLossConfig()), "rollout_correction": correction})
    config = actor(policy_loss=policy_loss)
    ours, theirs = (call(name, rollouts(), config, "token-mean") for name in ("redit_bypass_mode", "bypass_mode"))
    assert_same_call(ours, theirs)
    assert "actor/ppo_kl" in theirs[2] and any(key.startswith("rollout_corr/") for key in theirs[2])


def test_masked_positions_are_never_read():
    data = rollouts()
    for name in NAMES:
        config = actor(**LOSS_OPTIONS.get(name, {}))
        clean = call(f"redit_{name}", data, config, "seq-mean-token-mean", torch.ones_like(data.logp))
        dirty = SimpleNamespace(**vars(data))
        dirty.logp, dirty.old = (torch.where(data.mask, x, torch.nan) for x in (data.logp, data.old))
        weights = torch.where(data.mask, 1.0, torch.nan)
        same = call(f"redit_{name}", dirty, config, "seq-mean-token-mean", weights)
        assert torch.equal(same[0], clean[0]) and torch.equal(same[1], clean[1]) and same[2] == clean[2], name


def test_clip_cov_draws_its_tokens_from_torchs_generator():
    data = rollouts()
    config = actor(policy_loss=PolicyLossConfig(clip_cov_ratio=0.1, clip_cov_lb=0.2, clip_cov_ub=0.9))

    def losses():
        torch.manual_seed(3)
        return [call("redit_clip_cov", data, config, "token-mean")[0].item() for _ in range(6)]

    drawn = losses()
    assert len(set(drawn)) > 1 and losses() == drawn


@pytest.mark.parametrize(
    ("name", "options", "error", "message"),
    [
        ("dppo_tv", {}, NotImplementedError, r"loss_mode='redit_dppo_tv' needs actor\.clip_ratio_c=20, got 3\.0"),
        ("vanilla", {"clip_ratio_c": 1.0}, ValueError, r"^actor\.clip_ratio_c must be above 1, got 1\.0"),
        ("dro", {}, ValueError, r"^actor\.policy_loss\.dro_beta is required"),
        ("sapo", {"tau_pos": 0.0}, ValueError, r"^actor\.tau_pos must be finite and above 0, got 0\.0"),
        ("gspo", {"clip_ratio_low": -0.1}, ValueError, r"^actor\.clip_ratio_low must be finite and at least 0"),
    ],
)
def test_what_a_loss_cannot_take_is_named_as_verl_names_it(name, options, error, message):
    with pytest.raises(error, match=message):
        call(f"redit_{name}", rollouts(), actor(**options), "token-mean")


def test_options_left_none_are_what_verl_takes_for_them():
    none = PolicyLossConfig(clip_cov_ratio=None, clip_cov_lb=None, kl_cov_ratio=None, ppo_kl_coef=None)
    config = actor(clip_ratio=0.1, clip_ratio_low=None, clip_ratio_high=None, policy_loss=none)
    for name in ("vanilla", "gspo", "kl_cov", "clip_cov"):
        ours, theirs = (call(each, rollouts(), config, "token-mean") for each in (f"redit_{name}", name))
        assert_same_call(ours, theirs)
    with pytest.raises(ValueError, match="config is required by loss_mode='redit_vanilla'"):
        call("redit_vanilla", rollouts(), None, "token-mean")


def micro_batch(data):
    """What verl's engine hands to ppo_loss: nested tensors, prompts of three tokens before the responses."""
    lengths = [8, 5, 8, 3, 7, 6]

    def nested(rows):
        return torch.nested.as_nested_tensor(list(rows), layout=torch.jagged)

    fields = {
        "prompts": [torch.zeros(3, dtype=torch.long)] * 6,
        "responses": [torch.zeros(length, dtype=torch.long) for length in lengths],
        "response_mask": [row[:length].long() for row, length in zip(data.mask, lengths)],
        "old_log_probs": [row[:length] for row, length in zip(data.old, lengths)],
        "ref_log_prob": [row[:length] for row, length in zip(data.ref, lengths)],
        "advantages": [a.expand(length) for a, length in zip(data.advantages, lengths)],
    }
    td = TensorDict({name: nested(rows) for name, rows in fields.items()}, batch_size=6)
    tu.assign_non_tensor(td, dp_size=2, batch_num_tokens=61, global_batch_size=11)
    at = [torch.cat([torch.zeros(2), row[:length], torch.zeros(1)]) for row, length in zip(data.logp, lengths)]
    return td, nested(at)


@pytest.mark.parametrize(("name", "mode"), [("vanilla", "token-mean"), ("gspo", "seq-mean-token-mean")])
def test_verls_ppo_loss_with_entropy_and_kl_takes_ours_from_its_registry(name, mode):
    found = []
    for each in (f"redit_{name}", name):
        config = actor(loss_agg_mode=mode, entropy_coeff=0.01, use_kl_loss=True, kl_loss_coef=0.1,
                       policy_loss=PolicyLossConfig(loss_mode=each))  # fmt: skip
        data, at = micro_batch(rollouts())
        values = at.values().detach().requires_grad_()
        log_probs = torch.nested.nested_tensor_from_jagged(values, at.offsets())
        loss, metrics = ppo_loss(config, {"log_probs": log_probs, "entropy": at.detach() ** 2}, data)
        loss.backward()
        found.append((loss, values.grad, {key: getattr(value, "values", value) for key, value in metrics.items()}))
    assert_same(found[0][0], found[1][0], "loss")
    assert_same(found[0][1], found[1][1], "gradient")
    assert list(found[0][2]) == list(found[1][2]) and "actor/pg_clipfrac" in found[0][2]
