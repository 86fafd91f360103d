"""OpenRLHF's PolicyLoss by our one definition: constructor, call and the five results, against its formulas in float64.

`theirs` spells out openrlhf/models/loss.py::PolicyLoss.forward and aggregate_loss, 0.11.2.
"""

import importlib
import inspect
import shutil
import warnings

import pytest
import torch

from redit_fast.integrations.openrlhf import PolicyLoss
from tests.losses.test_parity_peers import assert_same, rollouts

CORRECTIONS = [
    {},
    *({"is_correction_level": level, "is_correction_threshold": (0.7, 1.4)} for level in ("token", "seq")),
    {"is_correction_level": "token", "is_correction_mode": "clip", "is_correction_threshold": (0.7, 1.4)},
    *({"is_correction_level": level, "is_correction_gating": gating, "is_correction_threshold": (0.0, 0.1)}
      for level in ("token", "seq") for gating in ("binary_kl", "tv")),
]  # fmt: skip


def masked_mean(x, m, dim=None):
    return (x * m).sum(dim) / m.sum(dim)


def theirs(batch, logp, token_level_loss=True, policy_loss_type="ppo", clip_eps_low=0.2, clip_eps_high=0.2,
           dual_clip=None, is_correction_level="off", is_correction_mode="mask", is_correction_gating="ratio",
           is_correction_threshold=(0.5, 5.0), dp_size=1, batch_num_tokens=None, global_batch_size=None):  # fmt: skip
    m, A = batch.mask.double(), batch.advantages.double()[:, None].expand_as(batch.mask)
    old, sampled = batch.old.double(), batch.sampling.double()
    corrected = is_correction_level != "off"
    if policy_loss_type == "ppo":
        ratio = (logp - old).clamp(-20, 20).exp()
    else:
        log_ratio = logp - (sampled if corrected else old)
        ratio = ((log_ratio * m).sum(-1) / m.sum(-1).clamp(min=1)).exp().unsqueeze(-1) * m
    one, two = ratio * A, ratio.clamp(1 - clip_eps_low, 1 + clip_eps_high) * A
    least = torch.min(one, two)
    if dual_clip is not None:
        least = torch.where(A < 0, torch.max(least, dual_clip * A), least)
    loss, vllm_kl, share = -least, None, None
    if corrected and policy_loss_type == "ppo":
        (low, high), by_sequence = is_correction_threshold, is_correction_level == "seq"
        p, q = sampled.exp().clamp(1e-6, 1 - 1e-6), old.exp().clamp(1e-6, 1 - 1e-6)
        statistic = {
            "ratio": old - sampled,
            "binary_kl": p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log(),
            "tv": (p - q).abs(),
        }[is_correction_gating]
        if by_sequence:
            statistic = masked_mean(statistic, m, -1).unsqueeze(-1)
        statistic = statistic.exp() if is_correction_gating == "ratio" else statistic
        outside = ~((statistic >= low) & (statistic <= high))
        if is_correction_mode == "clip":
            loss = loss * statistic.clamp(low, high)
        else:
            loss = loss * torch.where(outside, 0.0, (old - sampled).exp())
        share = outside.double().mean() if by_sequence else masked_mean(outside.double(), m)
        vllm_kl = masked_mean(sampled - old, m)
    if token_level_loss and policy_loss_type == "ppo":
        total = masked_mean(loss, m) if batch_num_tokens is None else (loss * m).sum() / batch_num_tokens * dp_size
    else:
        means = (loss * m).sum(-1) / (m.sum(-1) + 1e-8)
        some = (m.sum(-1) > 0).double()
        total = masked_mean(means, some) if global_batch_size is None else means.sum() / global_batch_size * dp_size
    return total, masked_mean((two < one).double(), m), masked_mean(old - logp, m), vllm_kl, share


@pytest.mark.parametrize("correction", CORRECTIONS, ids=lambda c: "-".join(map(str, c.values())) or "off")
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"token_level_loss": False},
        {"policy_loss_type": "gspo"},
        {"clip_eps_low": 0.05, "clip_eps_high": 0.3, "dual_clip": 1.5},
    ],
    ids=["token", "sequence", "gspo", "dual"],
)
@pytest.mark.parametrize("globals_", [{}, {"dp_size": 2, "batch_num_tokens": 70.0, "global_batch_size": 12}])
def test_all_five_results_and_the_gradient_are_openrlhfs(options, correction, globals_):
    batch = rollouts()
    if correction.get("is_correction_level") == "seq":  # a sequence without tokens has no mean there: NaN
        batch.mask[5, 0] = True
    exact = batch.logp.double().requires_grad_()
    expected = theirs(batch, exact, **options, **correction, **globals_)
    logp = batch.logp.clone().requires_grad_()
    inputs = [x.masked_fill(~batch.mask, torch.nan) for x in (batch.old, batch.sampling)]  # never read where masked
    advantages = batch.advantages[:, None].expand_as(logp)
    found = PolicyLoss(**options, **correction)(
        logp, inputs[0], advantages, action_mask=batch.mask.long(), rollout_log_probs=inputs[1], **globals_
    )
    expected[0].backward()
    found[0].backward()
    for name, mine, their in zip(("loss", "clip_ratio", "ppo_kl", "vllm_kl", "is_filter_ratio"), found, expected):
        assert (mine is None) == (their is None), name
        if their is not None:
            assert mine.ndim == 0 and mine.item() == pytest.approx(their.item(), rel=1e-5, abs=1e-7), name
    assert_same(logp.grad, exact.grad, "gradient")


def test_the_signatures_are_openrlhfs_and_bad_arguments_are_refused_naming_them():
    assert list(inspect.signature(PolicyLoss).parameters) == [
        "clip_eps_low", "clip_eps_high", "dual_clip", "token_level_loss", "policy_loss_type", "is_correction_level",
        "is_correction_mode", "is_correction_gating", "is_correction_threshold"]  # fmt: skip
    assert list(inspect.signature(PolicyLoss.forward).parameters)[1:] == [
        "log_probs", "old_log_probs", "advantages", "action_mask", "rollout_log_probs", "dp_size", "batch_num_tokens",
        "global_batch_size"]  # fmt: skip
    for options, message in [
        ({"policy_loss_type": "grpo"}, "policy_loss_type must be one of 'ppo', 'gspo'; got 'grpo'"),
        ({"is_correction_level": "geo"}, "is_correction_level must be one of"),
        ({"is_correction_mode": "clip", "is_correction_level": "seq"}, "is_correction_mode='clip' needs"),
        (
            {"is_correction_level": "seq", "is_correction_gating": "tv"},
            "is_correction_threshold must be .*'tv', got .0.5",
        ),
        ({"dual_clip": 0.5}, "dual_clip"),
    ]:
        with pytest.raises(ValueError, match=message):
            PolicyLoss(**options)
    batch = rollouts()
    with pytest.raises(ValueError, match="rollout_log_probs is required by is_correction_level='token'"):
        PolicyLoss(is_correction_level="token")(batch.logp, batch.old, batch.advantages[:, None])


def test_an_older_openrlhf_is_refused_and_a_newer_one_warns(tmp_path, monkeypatch):
    """By the metadata that an installed one has; the class itself needs nothing of it."""
    PolicyLoss()
    monkeypatch.syspath_prepend(tmp_path)
    for version in ("0.10.9", "0.11.2", "0.11.2.post1", "0.12.0"):
        folder = tmp_path / f"openrlhf-{version}.dist-info"
        folder.mkdir()
        (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: openrlhf\nVersion: {version}\n")
        importlib.invalidate_caches()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            if version == "0.10.9":
                with pytest.raises(RuntimeError, match="got openrlhf 0.10.9, which is older .*; supported: 0.11.2$"):
                    PolicyLoss()
            else:
                PolicyLoss()
                PolicyLoss()
        assert [str(w.message).partition(",")[0] for w in caught] == (
            ["redit_fast.integrations.openrlhf got openrlhf 0.12.0"] if version == "0.12.0" else []
        )
        shutil.rmtree(folder)
