"""The second pass of gradient regularisation replays the first: its rollouts, its masks, its old log-probs."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

import redit_fast as rf
from redit_fast.training import config_file, report
from redit_fast.training.trainer import train
from tests.training.jobs import lines_of
from tests.training.test_batch import MIXED, batch_of, gradient
from tests.training.test_stops import timeless


@pytest.fixture
def job(settings, tmp_path, monkeypatch):
    """A run with a reward that differs in a group and leaves a line for each call; without pictures, for the time."""
    (tmp_path / "counted.py").write_text(
        "def judge(prompts, completions, **columns):\n"
        f"    open({str(tmp_path / 'calls')!r}, 'a').write(f'{{len(completions)}}\\n')\n"
        "    return [float(len(c) % 3) for c in completions]\n"
    )
    monkeypatch.setattr(report, "write", lambda run: None)
    return {**settings, "rewards": [f"{tmp_path}/counted:judge"], "checkpoint_every": 100}


@pytest.fixture
def calls(monkeypatch):
    """The arguments and log-probs of every call of the loss."""
    found, loss = [], rf.linear_grpo_loss

    def recorded(*args, **options):
        out = loss(*args, **options)
        found.append({**options, "logp": out.logp, "entropy": out.entropy})
        return out

    monkeypatch.setattr(rf, "linear_grpo_loss", recorded)
    return found


@pytest.mark.parametrize("ratio", ["fresh", "pass1"])
def test_pass_2_takes_its_own_log_probs_as_the_old_ones_or_those_of_pass_1(job, calls, tmp_path, ratio):
    train(config_file.load(overrides={**job, "gr_pass2_ratio": ratio, "eval_problems": 0}))
    assert len(calls) == 5  # the trial's pass, then two steps of two passes
    for first, second in zip(calls[1::2], calls[2::2]):
        assert first["old_logp"] is None and first["masks_of"] is None
        assert not torch.equal(first["logp"], second["logp"])  # theta + epsilon g1
        if ratio == "fresh":
            assert second["old_logp"] is None
        else:
            assert torch.equal(second["old_logp"], first["logp"])
        for name in ("logp", "entropy"):
            assert torch.equal(first[name], getattr(second["masks_of"], name))
    assert (tmp_path / "calls").read_text() == "2\n" + "12\n" * 2  # by the trial, then once a step


def test_the_second_pass_is_left_out_where_gr_says_so_and_resumes_so(job, calls, tmp_path):
    """At step 1 gamma is 0, as its warm-up begins; steps 2 and 4 are none of every other one."""
    change = {"gr_every_k_steps": 2, "gr_gamma_warmup_steps": 2, "gr_rounding": "nearest", "gr_keep_first_grad": True}
    settings = config_file.load(overrides={**job, **change, "steps": 4, "eval_problems": 0})
    train(settings.model_copy(update={"name": "whole"}))
    assert len(calls) == 1 + 4 + 1  # the trial's, four first passes and the second one of step 3
    lines = lines_of(tmp_path / "whole" / "metrics.jsonl")[1:]
    assert ["gr/step_cos" in line for line in lines] == [False, False, True, False]
    assert lines[2]["gr/penalty_ratio"] > 0
    train(settings.model_copy(update={"name": "halves", "steps": 2}))
    train(settings.model_copy(update={"name": "halves"}), resume=True)
    assert timeless(tmp_path / "whole" / "metrics.jsonl") == timeless(tmp_path / "halves" / "metrics.jsonl")


def test_a_fresh_ratio_is_1_and_pass_1s_weighs_the_tokens(model_folder):
    """The gradients of both by autograd: -A grad logp, and -A r grad logp where the clip lets it pass."""
    model, batch = batch_of(model_folder, MIXED, rf.LossConfig())
    first = batch.backward(model)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05 * torch.randn_like(p))
    model.zero_grad()
    grads = []
    for old in (None, first.logp):
        second = batch.backward(model, old, masks_of=first)
        grads.append(gradient(model))
        model.zero_grad()
    advantages = batch.advantages.repeat_interleave(torch.tensor(batch.lengths))
    ratio = torch.where(advantages == 0, 1.0, (second.logp - first.logp).exp())  # those are left out
    clipped = ((ratio > 1.2) & (advantages > 0)) | ((ratio < 0.8) & (advantages < 0))
    assert 0.05 < clipped.float().mean() < 0.95
    logps = []
    for tokens, length in zip(batch.sequences, batch.lengths):
        logp = torch.log_softmax(model(tokens[None]).logits[0, :-1], -1).gather(1, tokens[1:, None])[:, 0]
        logps.append(logp[-length:])
    logp = torch.cat(logps)
    for weight, found in zip((torch.ones_like(ratio), torch.where(clipped, 0.0, ratio)), grads):
        model.zero_grad()
        (-(weight * advantages * logp).sum() / len(logp)).backward(retain_graph=True)
        assert (found - gradient(model)).norm() < 1e-4 * found.norm()


def test_the_clip_range_acts_where_the_ratio_is_not_1(job, calls, tmp_path):
    """In a second pass that keeps the first one's log-probs, and nowhere else."""
    ended = {}
    for ratio in ("fresh", "pass1"):
        for clip in ({}, {"clip_low": 1e-6, "clip_high": 2e-6}):
            run = {**job, "name": f"{ratio}-{len(clip)}", "gr_pass2_ratio": ratio, "gr_gamma": 0.5, "gr_epsilon": 0.5}
            train(config_file.load(overrides={**run, **clip, "steps": 1, "eval_problems": 0}))
            low, high = 1 - clip.get("clip_low", 0.2), 1 + clip.get("clip_high", 0.2)
            assert [call["config"].clip_range for call in calls[-2:]] == [(low, high)] * 2
            ended[ratio, len(clip)] = load_file(tmp_path / run["name"] / "checkpoints/step-000001/model.safetensors")
    same = {ratio: [torch.equal(ended[ratio, 0][name], ended[ratio, 2][name]) for name in ended[ratio, 0]]
            for ratio in ("fresh", "pass1")}  # fmt: skip
    assert all(same["fresh"]) and not any(same["pass1"])


def test_logged_losses_and_metrics_are_those_of_pass_1(job, tmp_path):
    lines = []
    for gamma in (0.0, 0.5):
        run = {"name": f"gamma-{gamma}", "gr_gamma": gamma, "gr_epsilon": 0.5, "steps": 1}
        train(config_file.load(overrides={**job, **run}))
        lines.append(timeless(tmp_path / f"gamma-{gamma}" / "metrics.jsonl")[1])
    without, with_gr = ({k: v for k, v in line.items() if k[:3] not in ("gr/", "gra", "flo")} for line in lines)
    held_out = [key for key in without if "held_out" in key]  # after the step, which differs
    assert len(held_out) == 3 and without["loss"] != 0
    assert [without.pop(key) for key in held_out] and [with_gr.pop(key) for key in held_out]
    assert without == with_gr and lines[0]["grad_norm"] != lines[1]["grad_norm"]


WIDE = {"epsilon_low": 0.99, "epsilon_high": 99.0}  # so that the ratio takes no gradient away
MASKS = {
    "clip_cov": rf.LossConfig("clip_cov", clip_cov_ratio=0.2, clip_cov_lb=0.1, clip_cov_ub=3.0, **WIDE),
    "kl_cov": rf.LossConfig("kl_cov", kl_cov_ratio=0.2, kl_cov_coef=100.0),
    "top entropy": rf.LossConfig("dapo", top_entropy_quantile=0.3, **WIDE),
    "gmpo, top entropy": rf.LossConfig("gmpo", top_entropy_quantile=0.3, epsilon_low=9.0),
    "off policy": rf.LossConfig("dapo", off_policy_mask_threshold=0.0, **WIDE),
}


def output(logp, entropy):
    return rf.LossOutput(torch.zeros(()), logp, entropy, {}, "logp")


@pytest.mark.parametrize("name", MASKS)
def test_masks_are_those_of_the_pass_they_are_given(name):
    """Which tokens a mask takes shows in the gradient: 0 there, or, in kl_cov, the penalty's, which outweighs A."""
    settings = MASKS[name]
    old, advantages = -3 * torch.rand(8, 20) - 0.1, torch.randn(8)
    first, second = (old + 0.5 * torch.randn_like(old) for _ in range(2))
    entropies = torch.rand(2, 8, 20)

    def chosen(logp, entropy, masks_of=None):
        logp = logp.clone().requires_grad_()
        rf.policy_loss(logp, advantages, old_logp=old, entropy=entropy, masks_of=masks_of, config=settings,
                       normalizer=1.0).loss.backward()  # fmt: skip
        return logp.grad.abs() > 20 if name == "kl_cov" else logp.grad != 0

    of_first, of_second = chosen(first, entropies[0]), chosen(second, entropies[1])
    assert of_first.any() and not of_first.all() and not torch.equal(of_first, of_second)
    replayed = chosen(second, entropies[1], output(first, entropies[0]))
    assert torch.equal(replayed, of_first)


def test_masks_of_that_do_not_fit_are_named():
    logp, entropy = torch.zeros(2, 3), torch.zeros(2, 3)
    for settings, masks_of, words in (
        (MASKS["top entropy"], output(logp, None), "masks_of needs its entropy with top_entropy_quantile=0.3"),
        (MASKS["clip_cov"], output(logp[:1], None), r"masks_of\.logp must have shape \(2, 3\), got \(1, 3\)"),
    ):
        with pytest.raises(ValueError, match=words):
            rf.policy_loss(logp, torch.ones(2), entropy=entropy, masks_of=masks_of, config=settings)


@pytest.mark.parametrize("micro", [None, 3])
def test_clip_cov_drops_the_same_tokens_in_both_passes_of_a_step(model_folder, calls, micro):
    """Through the trainer's passes, micro-batch by micro-batch: at theta + delta another choice would be made."""
    settings = replace(MASKS["clip_cov"], clip_cov_lb=0.01)
    model, batch = batch_of(model_folder, MIXED, settings, micro_batch_size=micro)
    first = batch.backward(model)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.02 * torch.randn_like(p))
    batch.backward(model, first.logp, masks_of=first)
    half = len(calls) // 2
    differ = 0
    for one, other in zip(calls[:half], calls[half:]):
        assert torch.equal(other["masks_of"].logp, one["logp"])
        picks = []
        for masks_of in (None, other["masks_of"]):
            logp = (one if masks_of is None else other)["logp"].clone().requires_grad_()
            advantages = torch.randn(len(one["cu_seqlens"]) - 1, generator=torch.Generator().manual_seed(0))
            keep = {key: one[key] for key in ("cu_seqlens", "step", "seed")}
            old = None if masks_of is None else other["old_logp"]
            rf.policy_loss(logp, advantages, old_logp=old, masks_of=masks_of, config=settings, **keep).loss.backward()
            picks.append(logp.grad == 0)
        differ += int((picks[0] & ~picks[1]).sum())  # dropped in the first pass, not in the second
        assert picks[0].any()
    assert differ == 0


def test_the_closing_table_and_the_metrics_tell_the_share_of_pass_2(job, tmp_path, capsys):
    train(config_file.load(overrides={**job, "eval_problems": 0}))
    times = json.loads((tmp_path / "run" / "summary.json").read_text())["time"]
    lines = lines_of(tmp_path / "run" / "metrics.jsonl")
    assert times["pass2"] == pytest.approx(sum(line["time/pass2"] for line in lines[1:]))
    share = times["pass2"] / sum(times.values())
    assert 0 < share < 1 and f"{times['pass2']:.1f} s ({share:.0%})" in capsys.readouterr().out
