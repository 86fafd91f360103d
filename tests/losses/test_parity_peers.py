"""verl, OpenRLHF and Liger: presets against their formulas, written out here, and against Liger's own code on the CPU.

Each function names the file and function of the peer (verl 0.9.1, OpenRLHF 0.11.2, liger-kernel 0.8.5) that it spells
out. Everything is float64 and differentiated by autograd; ours is float32.
"""

from types import SimpleNamespace

import pytest
import torch

import redit_fast as rf
from redit_fast.losses.config import LossConfig
from redit_fast.losses.peers import PRESETS

ROWS, LENGTH = 6, 8


def rollouts(seed=0):
    """Six completions of different lengths, one with holes and one without any scored token."""
    torch.manual_seed(seed)
    logp = -3 * torch.rand(ROWS, LENGTH) - 0.05
    mask = torch.arange(LENGTH) < torch.tensor([8, 5, 8, 3, 7, 6])[:, None]
    mask[2, 2:5] = False
    mask[5] = False
    return SimpleNamespace(
        logp=logp,
        old=(logp + 0.5 * torch.randn(ROWS, LENGTH)).clamp(max=-0.01),
        ref=logp + 0.6 * torch.randn(ROWS, LENGTH),
        sampling=logp + 0.5 * torch.randn(ROWS, LENGTH),
        entropy=torch.rand(ROWS, LENGTH) * 2,
        advantages=torch.tensor([1.5, -0.7, 0.4, -2.0, 0.9, 1.1]),
        mask=mask,
        sequences=5,  # with scored tokens
    )


def assert_same(ours, theirs, what):
    """float32: 1e-5 of a gradient and 2e-6 of its largest entry; 1e-5 of a loss and 1e-7, the terms of its sum being of
    size 1. On a quantity that is not small."""
    ours, theirs = torch.as_tensor(ours).detach().double(), torch.as_tensor(theirs).detach().double()
    scale = theirs.abs().max().item()
    assert scale > 1e-3, f"{what} is {scale:.1e} at the peer: nothing is compared"
    atol = 2e-6 * scale if theirs.ndim else 1e-7
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=atol, msg=lambda text: f"{what}: {text}")


def assert_parity(config, formula, batch, on_policy=False, normalizer=None):
    """`formula(logp, old, A, m, batch)` is the peer's whole loss; float64."""
    theirs_at = batch.logp.double().requires_grad_()
    old = theirs_at.detach() if on_policy else batch.old.double()
    theirs = formula(theirs_at, old, batch.advantages.double()[:, None], batch.mask.double(), batch)
    theirs.backward()
    ours_at = batch.logp.clone().requires_grad_()
    ours = rf.policy_loss(
        ours_at,
        batch.advantages,
        old_logp=None if on_policy else batch.old,
        ref_logp=batch.ref if config.beta else None,
        sampling_logp=None if config.correction == "none" else batch.sampling,
        entropy=batch.entropy,
        mask=batch.mask,
        normalizer=normalizer or (batch.sequences if config.denominator != "tokens" else None),
        config=config,
    )
    ours.loss.backward()
    assert_same(ours.loss, theirs, "loss")
    assert_same(ours_at.grad, theirs_at.grad, "gradient")
    return theirs, theirs_at.grad


# verl


def token_mean(x, m):
    """verl/trainer/ppo/core_algos.py::agg_loss, "token-mean"; openrlhf/models/loss.py::aggregate_loss by token"""
    return (x * m).sum() / m.sum()


def sequence_mean(x, m):
    """agg_loss, "seq-mean-token-mean": fully masked sequences do not count; aggregate_loss, token_level_loss=False."""
    per_sequence = (x * m).sum(1) / (m.sum(1) + 1e-8)
    return per_sequence.sum() / (m.sum(1) > 0).sum()


def sequence_sum_norm(x, m):
    """agg_loss, "seq-mean-token-sum-norm" with loss_scale_factor 16."""
    return (x * m).sum() / (m.sum(1) > 0).sum() / 16


def ratio_of(logp, old):
    return (logp - old).clamp(-20, 20).exp()


def clipped(logp, old, A, low, high):
    r = ratio_of(logp, old)
    return torch.maximum(-A * r, -A * r.clamp(1 - low, 1 + high))


def verl_vanilla(logp, old, A, m, low=0.2, high=0.2, c=3.0):
    """core_algos.py::compute_policy_loss_vanilla"""
    once = clipped(logp, old, A, low, high)
    return torch.where(A < 0, torch.minimum(once, -A * c), once)


def verl_gspo(logp, old, A, m, low=0.2, high=0.2):
    """core_algos.py::compute_policy_loss_gspo"""
    mean = ((logp - old) * m).sum(1, keepdim=True) / m.sum(1, keepdim=True).clamp(min=1)
    r = (logp - logp.detach() + mean.detach()).clamp(max=10).exp()
    return torch.maximum(-A * r, -A * r.clamp(1 - low, 1 + high))


def verl_sapo(logp, old, A, m, pos=1.0, neg=1.05):
    """core_algos.py::compute_policy_loss_sapo"""
    tau = torch.where(A > 0, pos, neg)
    return -A * torch.sigmoid(tau * (ratio_of(logp, old) - 1)) * 4 / tau


def verl_cispo(logp, old, A, m, low=0.2, high=0.2):
    """core_algos.py::compute_policy_loss_cispo"""
    return -ratio_of(logp, old).clamp(1 - low, 1 + high).detach() * A * logp


def verl_gpg(logp, old, A, m):
    """core_algos.py::compute_policy_loss_gpg, compute_policy_loss_reinforce"""
    return -A * logp


def verl_dro(logp, old, A, m, beta=0.3):
    """core_algos.py::compute_policy_loss_dro"""
    return -A * logp + beta / 2 * (logp - old) ** 2


def verl_geo_mean(logp, old, A, m, low=0.2, high=0.2):
    """core_algos.py::compute_policy_loss_geo_mean: per sequence, spread over its tokens"""
    sign, d = A.sign(), logp - old
    nearer = sign * torch.minimum(sign * d, sign * d.clamp(-low, high))
    count = m.sum(1, keepdim=True) + 1e-8
    advantage = (A * m).sum(1, keepdim=True) / count
    return (-advantage * ((nearer * m).sum(1, keepdim=True) / count).exp()).expand_as(m)


def covariance(logp, A, m):
    """core_algos.py::compute_policy_loss_clip_cov, compute_policy_loss_kl_cov"""
    return ((A - (A * m).sum() / m.sum()) * (logp - (logp * m).sum() / m.sum())).detach()


def verl_clip_cov_all(logp, old, A, m, lb=0.2, ub=0.9):
    """core_algos.py::compute_policy_loss_clip_cov with clip_cov_ratio=1: every candidate of its random sample"""
    r, cov = (logp - old).exp(), covariance(logp, A, m)
    plain, limited = -A * r, -A * r.clamp(0.8, 1.2)
    candidates = (m > 0) & ~(limited > plain) & (cov > lb) & (cov < ub)
    assert 3 < candidates.sum() < 20
    return torch.maximum(plain, limited) * ~candidates


def verl_kl_cov(logp, old, A, m, share=0.2, coef=0.1):
    """core_algos.py::compute_policy_loss_kl_cov"""
    cov = covariance(logp, A, m).masked_fill(m == 0, -torch.inf)
    chosen = torch.zeros_like(cov).flatten()
    chosen[cov.flatten().topk(max(1, int(m.sum() * share))).indices] = 1
    return -A * (logp - old).exp() + coef * (logp - old).abs() * chosen.view_as(cov)


def verl_kl(logp, ref, kind):
    """core_algos.py::kl_penalty_forward, below its limit of 10 on k3"""
    d = logp - ref
    if kind == "k3":
        value = (-d).clamp(-20, 20).exp() + d - 1
        assert value.max() < 10
        return value
    return {"k1": d, "k2": d**2 / 2, "abs": d.abs()}[kind]


def rollout_weights(old, sampling, m, mode, cap, floor):
    """verl/trainer/ppo/rollout_corr_helper.py::compute_rollout_correction_weights; a string "floor_cap" is IcePop."""
    gap = (old - sampling).double()
    gap = ((gap * m).sum(1, keepdim=True) if mode.startswith("sequence") else gap).clamp(-20, 20)
    weights = gap.exp().expand_as(m) * m
    return weights.clamp(max=cap) if mode.endswith("truncate") else weights * ((weights >= floor) & (weights <= cap))


VERL = {  # LossConfig.loss_type -> (formula, aggregation, overrides that the formula assumes)
    "dapo": (verl_vanilla, token_mean, {}),
    "grpo": (verl_vanilla, sequence_mean, {}),
    "dr_grpo": (verl_vanilla, sequence_sum_norm, {"max_completion_length": 16}),
    "gspo_token": (verl_gspo, sequence_mean, {}),
    "sapo": (verl_sapo, sequence_mean, {}),
    "cispo": (verl_cispo, token_mean, {}),
    "gpg": (verl_gpg, token_mean, {}),
    "reinforce": (verl_gpg, token_mean, {}),
    "dro": (verl_dro, token_mean, {"dro_beta": 0.3}),
    "gmpo": (verl_geo_mean, sequence_mean, {}),
    "clip_cov": (verl_clip_cov_all, token_mean, {"clip_cov_ratio": 1.0, "clip_cov_lb": 0.2, "clip_cov_ub": 0.9}),
    "kl_cov": (verl_kl_cov, token_mean, {"kl_cov_ratio": 0.2}),
}


def denominator(loss_type, batch):
    return batch.sequences * 16 if loss_type == "dr_grpo" else None


def test_every_verl_loss_of_the_preset_is_here():
    assert set(VERL) == set(PRESETS["verl"].losses)


@pytest.mark.parametrize("on_policy", [False, True], ids=["off policy", "on policy"])
@pytest.mark.parametrize("loss_type", VERL)
def test_verl(loss_type, on_policy):
    formula, aggregate, assumed = VERL[loss_type]
    batch = rollouts()
    if loss_type == "gmpo":  # torch.mean over all sequences, the empty one too
        batch.sequences = ROWS

        def aggregate(x, m):
            return x.mean(1).mean()

    def loss(logp, old, A, m, batch):
        return aggregate(formula(logp, old, A, m), m)

    config = LossConfig.like("verl", loss_type=loss_type, **assumed)
    assert_parity(config, loss, batch, on_policy, denominator(loss_type, batch))


@pytest.mark.parametrize("loss_type", [each for each in VERL if each != "gmpo"])
@pytest.mark.parametrize("kind", ["k1", "k2", "k3", "abs"])
def test_verl_kl_loss(loss_type, kind):
    """verl/workers/utils/losses.py::ppo_loss: aggregated on its own, as the loss is (kl_loss_coef, kl_loss_type)."""
    formula, aggregate, assumed = VERL[loss_type]

    def loss(logp, old, A, m, batch):
        return aggregate(formula(logp, old, A, m), m) + 0.2 * aggregate(verl_kl(logp, batch.ref.double(), kind), m)

    batch = rollouts()
    config = LossConfig.like("verl", loss_type=loss_type, beta=0.2, kl=kind, **assumed)
    assert_parity(config, loss, batch, normalizer=denominator(loss_type, batch))


@pytest.mark.parametrize("loss_type", [each for each in VERL if each not in ("gmpo", "reinforce")])
@pytest.mark.parametrize(
    ("mode", "bounds"),
    [("token_truncate", {}), ("token_truncate", {"correction_cap": 1.1}), ("sequence_truncate", {}),
     ("token_mask", {"correction_floor": 0.5}), ("sequence_mask", {"correction_floor": 0.4, "correction_cap": 3.0})],
)  # fmt: skip
def test_verl_rollout_correction(loss_type, mode, bounds):
    formula, aggregate, assumed = VERL[loss_type]
    cap, floor = bounds.get("correction_cap", 2.0), bounds.get("correction_floor", 0.0)

    def loss(logp, old, A, m, batch):
        weights = rollout_weights(batch.old, batch.sampling, m, mode, cap, floor)
        assert ((weights == 0) & (m > 0)).any() or (weights == cap).any()
        return aggregate(formula(logp, old, A, m) * weights, m) + 0.2 * aggregate(verl_kl(logp, batch.ref, "k3"), m)

    batch = rollouts()
    config = LossConfig.like("verl", loss_type=loss_type, correction=mode, beta=0.2, **bounds, **assumed)
    assert_parity(config, loss, batch, normalizer=denominator(loss_type, batch))


@pytest.mark.parametrize("mode", ["sequence_truncate", "sequence_mask"])
def test_verl_rollout_correction_of_geo_mean(mode):
    """core_algos.py::compute_policy_loss_geo_mean: the geometric mean of a sequence's weights, all of them the same."""

    def loss(logp, old, A, m, batch):
        weights = rollout_weights(batch.old, batch.sampling, m, mode, 2.0, 0.0)
        mean = (((weights + 1e-10).log() * m).sum(1) / (m.sum(1) + 1e-8)).exp()
        return (verl_geo_mean(logp, old, A, m)[:, 0] * mean).mean()

    batch = rollouts()
    batch.sequences = ROWS
    assert_parity(LossConfig.like("verl", loss_type="geo_mean", correction=mode), loss, batch)
    with pytest.raises(NotImplementedError, match="correction='token_truncate'"):
        LossConfig.like("verl", loss_type="geo_mean", correction="token_truncate")


@pytest.mark.parametrize("mode", ["token_truncate", "sequence_truncate"])
def test_verl_rollout_correction_of_reinforce(mode):
    """core_algos.py::compute_policy_loss_bypass_mode: old is the sampler's, the weights are current / sampler; here
    that is a call without old_logp."""

    def loss(logp, old, A, m, batch):
        return token_mean(verl_gpg(logp, old, A, m) * rollout_weights(batch.logp, batch.sampling, m, mode, 2.0, 0), m)

    assert_parity(LossConfig.like("verl", loss_type="reinforce", correction=mode), loss, rollouts(), on_policy=True)


@pytest.mark.parametrize(
    ("loss_type", "options", "arguments"),
    [
        ("dapo", {"epsilon_low": 0.1, "epsilon_high": 0.4}, {"low": 0.1, "high": 0.4}),
        ("dapo", {"dual_clip": 1.2}, {"c": 1.2}),
        ("gspo_token", {"epsilon_low": 0.02, "epsilon_high": 0.01}, {"low": 0.02, "high": 0.01}),
        ("cispo", {"epsilon_low": 0.5, "epsilon_high": 0.1}, {"low": 0.5, "high": 0.1}),
        ("gmpo", {"epsilon_low": 0.1, "epsilon_high": 0.4}, {"low": 0.1, "high": 0.4}),
        ("sapo", {"sapo_temperature_pos": 2.0, "sapo_temperature_neg": 3.0}, {"pos": 2.0, "neg": 3.0}),
        ("kl_cov", {"kl_cov_coef": 0.7, "kl_cov_ratio": 0.4}, {"coef": 0.7, "share": 0.4}),
    ],
)
def test_verl_options(loss_type, options, arguments):
    formula, aggregate, _ = VERL[loss_type]
    batch = rollouts(1)
    if loss_type == "gmpo":
        batch.mask[5, :4] = True
        batch.sequences = ROWS

    def loss(logp, old, A, m, batch):
        values = formula(logp, old, A, m, **arguments)
        assert not torch.equal(values * m, formula(logp, old, A, m) * m)
        return aggregate(values, m)

    assert_parity(LossConfig.like("verl", loss_type=loss_type, **options), loss, batch)


def test_verl_entropy_bonus():
    """ppo_loss: aggregated as the loss is, which is ours where that is per token; elsewhere the preset refuses it."""

    def loss(logp, old, A, m, batch):
        return token_mean(verl_vanilla(logp, old, A, m), m) - 0.05 * token_mean(batch.entropy, m)

    assert_parity(LossConfig.like("verl", loss_type="dapo", entropy_coef=0.05), loss, rollouts())
    with pytest.raises(NotImplementedError, match="entropy_coef"):
        LossConfig.like("verl", loss_type="grpo", entropy_coef=0.05)


def test_verl_clip_cov_samples_among_its_candidates():
    """compute_policy_loss_clip_cov: max(int(ratio tokens), 1) of them get no gradient; which ones is chance."""
    batch = rollouts()
    logp = batch.logp.clone().requires_grad_()
    config = LossConfig.like("verl", loss_type="clip_cov", clip_cov_ratio=0.1, clip_cov_lb=0.2, clip_cov_ub=0.9)
    rf.policy_loss(logp, batch.advantages, old_logp=batch.old, mask=batch.mask, config=config).loss.backward()
    A, m = batch.advantages[:, None], batch.mask
    plain, limited = -A * (batch.logp - batch.old).exp(), -A * (batch.logp - batch.old).exp().clamp(0.8, 1.2)
    cov = covariance(batch.logp, A, m.float())
    candidates = m & ~(limited > plain) & (cov > 0.2) & (cov < 0.9)
    dropped = m & (logp.grad == 0) & ~(limited > plain)
    assert dropped.sum() == max(int(0.1 * m.sum()), 1) < candidates.sum()
    assert not (dropped & ~candidates).any()


@pytest.mark.parametrize("loss_type", ["dppo_tv", "dppo_kl"])
def test_verl_dppo_is_ours_with_its_clip_ratio_c_at_20(loss_type):
    """core_algos.py::compute_policy_loss_dppo_tv, compute_policy_loss_dppo_kl. Their truncation is verl's clip_ratio_c,
    of which ActorConfig's 3.0 is not ours: the preset says so."""

    def loss(logp, old, A, m, batch, c=20.0):
        p, p_old = logp.detach().exp(), old.exp()
        if loss_type == "dppo_tv":
            positive, negative = p - p_old <= 0.1, p - p_old >= -0.03
        else:
            kl = p_old * (old - logp) + (1 - p_old) * ((1 - p_old + 1e-8) / (1 - p + 1e-8)).log()
            positive, negative = (kl <= 0.1) | (p <= p_old), (kl <= 0.03) | (p >= p_old)
        keep = torch.where(A > 0, positive, negative)
        assert (m * ~keep * (A > 0)).any() and (m * ~keep * (A < 0)).any()
        return token_mean(-A * ratio_of(logp, old).clamp(max=c).detach() * logp * keep, m)

    batch = rollouts()
    batch.logp[0, 0], batch.old[0, 0] = -2.2, -3.8  # ratio 5, a step of 0.09
    batch.logp[0, 1], batch.old[0, 1] = -0.1, -2.0  # a step of 0.8
    config = LossConfig(loss_type=loss_type, epsilon_low=0.03, epsilon_high=0.1)
    theirs, _ = assert_parity(config, loss, batch)
    arguments = (batch.logp, batch.old, batch.advantages[:, None], batch.mask.float(), batch)
    assert (loss(*arguments, c=3.0) - theirs).abs() > 1e-3
    with pytest.raises(NotImplementedError, match="clip_ratio_c"):
        LossConfig.like("verl", loss_type=loss_type)


def test_verl_defaults_that_small_batches_do_not_show():
    """verl/workers/config/actor.py::PolicyLossConfig"""
    clip_cov, kl_cov = LossConfig.like("verl", loss_type="clip_cov"), LossConfig.like("verl", loss_type="kl_cov")
    assert (clip_cov.clip_cov_ratio, clip_cov.clip_cov_lb, clip_cov.clip_cov_ub) == (2e-4, 1.0, 5.0)
    assert (kl_cov.kl_cov_ratio, kl_cov.kl_cov_coef) == (2e-4, 0.1)


def test_verl_advantages():
    """core_algos.py::compute_grpo_outcome_advantage"""
    rewards = torch.tensor([1.0, 0, 0.5, 2, 0.25, 0, 0, 1e-3])
    groups = rewards.double().view(2, 4)
    expected = (groups - groups.mean(1, keepdim=True)) / (groups.std(1, keepdim=True) + 1e-6)
    ours = rf.group_advantages(rewards, group_size=4, **rf.advantage_options("verl")).values
    assert_same(ours, expected.flatten(), "advantages")


# OpenRLHF


def openrlhf_ppo(logp, old, A, m, low=0.2, high=0.2, dual_clip=None):
    """openrlhf/models/loss.py::PolicyLoss.forward, policy_loss_type "ppo" """
    r = ratio_of(logp, old)
    least = torch.minimum(r * A, r.clamp(1 - low, 1 + high) * A)
    if dual_clip is not None:
        least = torch.where(A < 0, torch.maximum(least, dual_clip * A), least)
    return -least


def openrlhf_gspo(logp, old, A, m, low=0.2, high=0.2, dual_clip=None):
    """PolicyLoss.forward, policy_loss_type "gspo": gradient through the sequence's mean"""
    mean = ((logp - old) * m).sum(1, keepdim=True) / m.sum(1, keepdim=True).clamp(min=1)
    r = mean.exp() * m
    least = torch.minimum(r * A, r.clamp(1 - low, 1 + high) * A)
    if dual_clip is not None:
        least = torch.where(A < 0, torch.maximum(least, dual_clip * A), least)
    return -least


OPENRLHF = {
    "dapo": (openrlhf_ppo, token_mean),
    "grpo": (openrlhf_ppo, sequence_mean),
    "gspo": (openrlhf_gspo, sequence_mean),
}


@pytest.mark.parametrize("on_policy", [False, True], ids=["off policy", "on policy"])
@pytest.mark.parametrize("loss_type", OPENRLHF)
@pytest.mark.parametrize(
    ("options", "arguments"),
    [({}, {}), ({"epsilon_low": 0.05, "epsilon_high": 0.1}, {"low": 0.05, "high": 0.1}),
     ({"dual_clip": 1.1}, {"dual_clip": 1.1})],
)  # fmt: skip
def test_openrlhf(loss_type, options, arguments, on_policy):
    formula, aggregate = OPENRLHF[loss_type]
    assert set(OPENRLHF) == set(PRESETS["openrlhf"].losses)

    def loss(logp, old, A, m, batch):
        return aggregate(formula(logp, old, A, m, **arguments), m)

    assert_parity(LossConfig.like("openrlhf", loss_type=loss_type, **options), loss, rollouts(), on_policy)


@pytest.mark.parametrize("kind", ["k1", "k2", "k3"])
def test_openrlhf_kl_loss(kind):
    """openrlhf/models/utils.py::compute_approx_kl, below its limit of 10, and trainer/ray/ppo_actor.py::training_step:
    a mean over the tokens whatever the loss is, so that the presets by sequence refuse it."""

    def loss(logp, old, A, m, batch):
        d = logp - batch.ref.double()
        kl = {"k1": d, "k2": d**2 / 2, "k3": (-d.clamp(min=-10)).exp() - 1 + d}[kind]
        assert kl.abs().max() < 10
        return token_mean(openrlhf_ppo(logp, old, A, m), m) + 0.2 * token_mean(kl, m)

    options = {} if kind == "k1" else {"kl": kind}
    assert_parity(LossConfig.like("openrlhf", loss_type="ppo", beta=0.2, **options), loss, rollouts())
    for loss_type in ("grpo", "gspo"):
        with pytest.raises(NotImplementedError, match="beta"):
            LossConfig.like("openrlhf", loss_type=loss_type, beta=0.2)
    with pytest.raises(NotImplementedError, match="kl='abs'"):
        LossConfig.like("openrlhf", loss_type="ppo", beta=0.2, kl="abs")


@pytest.mark.parametrize("loss_type", OPENRLHF)
def test_openrlhf_entropy_bonus(loss_type):
    """trainer/ray/ppo_actor.py::training_step: a mean over the tokens"""
    formula, aggregate = OPENRLHF[loss_type]

    def loss(logp, old, A, m, batch):
        return aggregate(formula(logp, old, A, m), m) - 0.05 * token_mean(batch.entropy, m)

    assert_parity(LossConfig.like("openrlhf", loss_type=loss_type, entropy_coef=0.05), loss, rollouts())


@pytest.mark.parametrize("loss_type", ["dapo", "grpo"])
@pytest.mark.parametrize("mode", ["token_truncate", "token_mask"])
@pytest.mark.parametrize("bounds", [(0.5, 5.0), (0.8, 1.2)], ids=str)
def test_openrlhf_correction(loss_type, mode, bounds):
    """PolicyLoss.forward, is_correction_level "token", mode "clip" or "mask" """
    formula, aggregate = OPENRLHF[loss_type]
    low, high = bounds

    def loss(logp, old, A, m, batch):
        w = (batch.old - batch.sampling).double().exp()
        assert ((w < low) & (m > 0)).any()
        w = w.clamp(low, high) if mode == "token_truncate" else w * ((w >= low) & (w <= high))
        return aggregate(w * formula(logp, old, A, m), m)

    options = {} if bounds == (0.5, 5.0) else {"correction_floor": low, "correction_cap": high}
    assert_parity(LossConfig.like("openrlhf", loss_type=loss_type, correction=mode, **options), loss, rollouts())
    for refused in ("sequence_mask", "sequence_truncate"):  # a sequence's geometric mean decides, the token's w remains
        with pytest.raises(NotImplementedError, match=f"correction='{refused}'"):
            LossConfig.like("openrlhf", loss_type=loss_type, correction=refused)
    with pytest.raises(NotImplementedError, match="correction"):  # there the sampler's log-probs replace the old ones
        LossConfig.like("openrlhf", loss_type="gspo", correction=mode)


def test_openrlhf_advantages():
    """openrlhf/trainer/ppo_utils/experience_maker.py::compute_advantages_and_returns, group_norm"""
    rewards = torch.tensor([1.0, 0, 0.5, 2, 0.25, 0, 0, 1e-3])
    groups = rewards.double().view(2, 4)
    expected = (groups - groups.mean(1, keepdim=True)) / (groups.std(1, keepdim=True) + 1e-9)
    options = rf.advantage_options("openrlhf")
    assert_same(rf.group_advantages(rewards, group_size=4, **options).values, expected.flatten(), "advantages")
    tiny = 2e-6 * rewards  # in the first group the deviation is so small that the eps shows
    ours = rf.group_advantages(tiny, group_size=4, **options).values[:4]
    groups = tiny.double().view(2, 4)[0]
    assert_same(ours, (groups - groups.mean()) / (groups.std() + 1e-9), "advantages")


# Liger, its own code


@pytest.fixture(scope="module")
def liger():
    module = pytest.importorskip("liger_kernel.chunked_loss.grpo_loss", reason="liger-kernel is not installed")
    from importlib.metadata import version

    if version("liger-kernel") != PRESETS["liger"].version:
        pytest.skip(f"liger-kernel {version('liger-kernel')} is not the {PRESETS['liger'].version} of the preset")
    return module


LIGER_NAMES = {"kl_ratio_correction": "use_bias_correction_kl", "importance": "importance_sampling_level"}
LIGER_NEEDS = {"dr_grpo": {"max_completion_length": 16}}
HIDDEN, VOCABULARY = 24, 53


def liger_arguments(loss_type, overrides):
    theirs = {LIGER_NAMES.get(name, name): value for name, value in overrides.items()}
    if loss_type == "gspo":
        return {"loss_type": "grpo", "importance_sampling_level": "sequence", **theirs}
    return {"loss_type": loss_type, **theirs}


def liger_problem(seed=0):
    batch = rollouts(seed)
    hidden, weight = torch.randn(ROWS, LENGTH, HIDDEN), 0.3 * torch.randn(VOCABULARY, HIDDEN)
    targets, bias = torch.randint(VOCABULARY, (ROWS, LENGTH)), 0.1 * torch.randn(VOCABULARY)
    exact = torch.log_softmax(hidden.double() @ weight.double().T + bias.double(), -1)
    exact = exact.gather(-1, targets[..., None])[..., 0].float()
    batch.old, batch.ref = batch.old + exact - batch.logp, batch.ref + exact - batch.logp
    batch.sampling = batch.sampling + exact - batch.logp
    return batch, hidden, weight, bias, targets


def run_liger(liger, arguments, problem, ratio=None, items=None, loss_type=None):
    batch, hidden, weight, bias, targets = problem
    leaves = [each.clone().requires_grad_() for each in (hidden, weight, bias)]
    module = liger.LigerFusedLinearGRPOLoss(compiled=False, **arguments)
    loss, _ = module(
        leaves[0],
        leaves[1],
        targets,
        batch.mask.float(),
        batch.advantages,
        bias=leaves[2],
        ref_per_token_logps=batch.ref,
        old_per_token_logps=batch.old,
        vllm_is_ratio=ratio,
        num_items_in_batch=items,
    )
    loss.backward()
    return loss, [each.grad for each in leaves]


def run_ours(config, problem, normalizer=None):
    batch, hidden, weight, bias, targets = problem
    leaves = [each.clone().requires_grad_() for each in (hidden, weight, bias)]
    out = rf.linear_grpo_loss(
        leaves[0],
        leaves[1],
        targets,
        batch.advantages,
        bias=leaves[2],
        old_logp=batch.old,
        ref_logp=batch.ref if config.beta else None,
        sampling_logp=batch.sampling if config.correction != "none" else None,
        mask=batch.mask,
        normalizer=normalizer,
        config=config,
    )
    out.loss.backward()
    return out.loss, [each.grad for each in leaves]


def assert_liger_parity(liger, loss_type, overrides, ratio=None, items=None, ours_too=None, bites=True, seed=0):
    problem, needs = liger_problem(seed), LIGER_NEEDS.get(loss_type, {})
    theirs = run_liger(liger, liger_arguments(loss_type, {**needs, **overrides}), problem, ratio, items)
    config = LossConfig.like("liger", loss_type=loss_type, **needs, **overrides, **(ours_too or {}))
    ours = run_ours(config, problem, items)
    if bites:
        base = run_liger(liger, liger_arguments(loss_type, needs), problem)
        assert (base[1][0] - theirs[1][0]).abs().max() > 1e-5, "the option changes nothing in Liger"
    assert_same(ours[0], theirs[0], "loss")
    for name, a, b in zip(("hidden", "weight", "bias"), ours[1], theirs[1]):
        assert ((a - b).norm() / b.norm()).item() < 1e-5 and b.norm() > 1e-3, f"gradient by {name}"


LIGER = tuple(PRESETS["liger"].losses)


@pytest.mark.parametrize("loss_type", LIGER)
def test_liger(liger, loss_type):
    assert_liger_parity(liger, loss_type, {}, bites=False)


@pytest.mark.parametrize("loss_type", LIGER)
@pytest.mark.parametrize("options", [{"beta": 0.0}, {"beta": 0.3}, {"beta": 0.3, "kl_ratio_correction": True}], ids=str)
def test_liger_kl(liger, loss_type, options):
    assert_liger_parity(liger, loss_type, options)


@pytest.mark.parametrize("loss_type", [each for each in LIGER if each not in ("sapo", "vespo")])
def test_liger_clipping(liger, loss_type):
    if loss_type == "cispo":
        assert_liger_parity(liger, loss_type, {"epsilon_high": 1.1})
        return
    for option in ({"epsilon_high": 0.05}, {"epsilon_low": 0.6}, {"delta": 1.1}):
        assert_liger_parity(liger, loss_type, option, seed=4)


@pytest.mark.parametrize("loss_type", ["grpo", "bnpo", "dr_grpo", "dapo"])
def test_liger_sequence_importance(liger, loss_type):
    assert_liger_parity(liger, loss_type, {"importance": "sequence"})


@pytest.mark.parametrize(
    ("loss_type", "options"),
    [("sapo", {"sapo_temperature_pos": 2.0}), ("sapo", {"sapo_temperature_neg": 2.0}), ("vespo", {"vespo_k_pos": 1.2}),
     ("vespo", {"vespo_lambda_pos": 1.2}), ("vespo", {"vespo_k_neg": 1.2}), ("vespo", {"vespo_lambda_neg": 1.2})],
)  # fmt: skip
def test_liger_parameters(liger, loss_type, options):
    assert_liger_parity(liger, loss_type, options)


@pytest.mark.parametrize("loss_type", LIGER)
@pytest.mark.parametrize("mode", ["token_truncate", "token_mask", "sequence_truncate", "sequence_mask"])
def test_liger_takes_the_samplers_correction_as_a_ratio(liger, loss_type, mode):
    if loss_type == "vespo" and mode.startswith("sequence"):
        with pytest.raises(NotImplementedError, match="correction"):
            LossConfig.like("liger", loss_type="vespo", correction=mode)
        return
    batch = liger_problem()[0]
    ratio = rollout_weights(batch.old, batch.sampling, batch.mask.double(), mode, 1.5, 0.0).float()
    ratio = torch.where(batch.mask, ratio, 1.0)
    correction = {"correction": mode, "correction_cap": 1.5}
    assert_liger_parity(liger, loss_type, {}, ratio=ratio, ours_too=correction)


@pytest.mark.parametrize("loss_type", ["dapo", "cispo", "vespo"])
def test_liger_num_items_in_batch_is_the_normalizer(liger, loss_type):
    assert_liger_parity(liger, loss_type, {}, items=torch.tensor(211.0))


def test_liger_luspo_depends_on_the_padding_and_is_refused(liger):
    """chunked_loss/grpo_loss.py::ppo_loss_fn: the token-level loss is summed over padding positions too."""
    batch, hidden, weight, bias, targets = liger_problem()
    narrow = run_liger(liger, {"loss_type": "luspo"}, (batch, hidden, weight, bias, targets))[0]
    for name in ("old", "ref", "mask"):
        setattr(batch, name, torch.nn.functional.pad(getattr(batch, name), (0, 2)))
    wider = (
        batch,
        torch.nn.functional.pad(hidden, (0, 0, 0, 2)),
        weight,
        bias,
        torch.nn.functional.pad(targets, (0, 2)),
    )
    assert (run_liger(liger, {"loss_type": "luspo"}, wider)[0] - narrow).abs() > 1e-2
    with pytest.raises(NotImplementedError, match="luspo.*padding"):
        LossConfig.like("liger", loss_type="luspo")


def test_the_liger_presets_defaults_are_those_of_its_class(liger):
    from inspect import signature

    theirs = {
        name: each.default for name, each in signature(liger.LigerFusedLinearGRPOLoss.__init__).parameters.items()
    }
    rows = PRESETS["liger"].losses
    compared = 0
    for row in rows.values():
        for name, value in row.options.items():
            if not name.startswith("correction"):  # a ready-made ratio in Liger
                assert value == theirs[LIGER_NAMES.get(name, name)], name
                compared += 1
    assert compared > 30 and theirs["loss_type"] == PRESETS["liger"].loss_type
