"""The main job end to end: a user's model and JSONL, the run folder, every variant and loss, the demo."""

import json
import math
import os
from typing import get_args

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import redit_fast as rf
from redit_fast.cli import main
from redit_fast.losses.config import LossType
from redit_fast.training import config_file
from redit_fast.training.trainer import train
from tests.training.jobs import flags, lines_of


@pytest.mark.draws
def test_a_config_file_and_flags_train_a_users_model_on_a_users_data(settings, tmp_path, capsys):
    file = tmp_path / "job.yaml"
    file.write_text(json.dumps({key: value for key, value in settings.items() if key not in ("steps", "name")}))
    assert main(["train", "--config", str(file), "--steps", "3", "--name", "mine"]) == 0
    run = tmp_path / "mine"
    assert "Held-out accuracy after RL" in capsys.readouterr().out

    metrics = lines_of(run / "metrics.jsonl")
    assert [line["step"] for line in metrics] == [0, 1, 2, 3] and {line["schema"] for line in metrics} == {2}
    for line in metrics:
        parts = [value for key, value in line.items() if key.startswith("time/")]
        assert sum(parts) == pytest.approx(line["step_time"], rel=0.02)
    expected = {"loss", "reward", "reward/dithered_std", "grad_norm", "gr/step_cos", "gr/g1_norm",
                "frac_reward_zero_std", "adv/rms_dead_groups", "rewards/right_steps/mean",
                "rewards/right_steps/nan_frac", "completions/mean_length", "entropy", "ratio/mean",
                "tokens/generated", "learning_rate"}  # fmt: skip
    assert all(expected <= line.keys() for line in metrics[1:])
    assert all(line["gr/step_cos"] > 0.99 and line["ratio/mean"] == 1 for line in metrics[1:])
    assert ["accuracy/held_out" in line for line in metrics] == [True, False, True, True]

    samples = lines_of(run / "completions.jsonl")
    assert len(samples) == 3 * 12 and samples[0]["rewards"].keys() == {"correct_answer", "right_steps", "answer_format"}
    assert (run / "curves.png").stat().st_size > 10_000
    page = (run / "report.html").read_text()
    for title in ("Reward", "Accuracy", "Loss", "Entropy", "Gradient norm", "Perturbation", "Tokens a second"):
        assert f"<figcaption><span>{title}" in page
    stored = config_file.load(run / "config.json")
    assert stored.steps == 3 and stored.group_size == 4

    last = run / "checkpoints" / "step-000003"
    model, tokenizer = AutoModelForCausalLM.from_pretrained(last), AutoTokenizer.from_pretrained(last)
    first = AutoModelForCausalLM.from_pretrained(run / "checkpoints" / "step-000000")
    moved = [not torch.equal(a, b) for a, b in zip(model.parameters(), first.parameters(), strict=True)]
    assert all(moved)
    text = "Ada has 3 coins. She buys 4 more.\n<think>3+4=7</think><answer>7</answer>"
    assert tokenizer(text)["input_ids"] == AutoTokenizer.from_pretrained(settings["model"])(text)["input_ids"]


def test_the_shipped_word_problems_train_with_the_shipped_config(settings, tmp_path, capsys):
    job = {key: settings[key] for key in ("model", "name", "out_dir", "steps", "prompts_per_step", "group_size",
                                          "max_completion_length", "eval_problems")}  # fmt: skip
    with pytest.warns(UserWarning, match="no chat template"):
        assert main(["train", "--config", "examples/word_problems.yaml", *flags(job)]) == 0
    samples = lines_of(tmp_path / "run" / "completions.jsonl")
    assert samples[0]["rewards"].keys() == {"numeric_answer", "xml_format"}
    assert config_file.load(tmp_path / "run" / "config.json").data == "examples/word_problems.jsonl"


def test_the_main_job_learns_what_its_reward_pays_for(settings, tmp_path):
    """From one digit in twenty tokens to nearly all: against the gradient, the share falls below a hundredth."""
    (tmp_path / "digits.py").write_text(
        "def share(prompts, completions, **columns):\n"
        "    return [sum(c.isdigit() for c in text) / max(1, len(text)) for text in completions]\n"
    )
    job = {
        **settings, "rewards": [f"{tmp_path}/digits:share"], "steps": 15, "prompts_per_step": 8, "group_size": 8,
        "learning_rate": 3e-3, "gr_gamma": 1e-3, "gr_epsilon": 1e-3, "eval_problems": 0, "checkpoint_every": 15,
    }  # fmt: skip
    train(config_file.load(overrides=job))
    rewards = [line["reward"] for line in lines_of(tmp_path / "run" / "metrics.jsonl")[1:]]
    assert rewards[0] < 0.1 and rewards[-1] > 0.5


VARIANTS = [
    {"gr_gamma": 0.0},
    {"dither_level": 0.0},
    {"dither_dead_groups": "skip"},
    {"gr_normalized": True},
    {"micro_batch_size": 5, "advantage_scale": "batch"},
]


@pytest.fixture
def varied(settings, tmp_path):
    """Settings with a reward that differs between the samples of a group."""
    (tmp_path / "varied.py").write_text(
        "def judge(prompts, completions, **columns):\n    return [float(len(c) % 3) for c in completions]\n"
    )
    return {**settings, "rewards": [f"{tmp_path}/varied:judge"]}


@pytest.mark.parametrize("change", VARIANTS, ids=str)
def test_every_variant_trains(varied, tmp_path, change):
    train(config_file.load(overrides={**varied, **change, "steps": 1}))
    line = lines_of(tmp_path / "run" / "metrics.jsonl")[1]
    assert math.isfinite(line["loss"]) and line["grad_norm"] > 0
    assert ("gr/step_cos" in line) == (change.get("gr_gamma") != 0.0)
    if change.get("dither_level") == 0.0:
        assert line["reward/dithered_std"] == line["reward_std"] and line["adv/rms_dead_groups"] == 0
    if change.get("dither_dead_groups") == "skip":
        assert line["adv/rms_dead_groups"] == 0


CLIPPED = ("clip_ratio/low_mean", "clip_ratio/high_mean", "clip_ratio/region_mean", "clip_ratio/low_min",
           "clip_ratio/high_max")  # fmt: skip
OWN_METRICS = {  # of the losses that do not clip as PPO does
    "cispo": ["cispo_clip_ratio"], "vespo": ["vespo/phi_seq_mean"],
    "sapo": [], "gpg": [], "reinforce": [], "kl_cov": [], "dro": [],
}  # fmt: skip


@pytest.mark.parametrize("loss_type", get_args(LossType))
def test_every_loss_type_trains(varied, tmp_path, monkeypatch, loss_type):
    """Three steps of two passes, the second with the first's old log-probs, so that there the ratio is not 1."""
    calls, loss = [], rf.linear_grpo_loss

    def recorded(*args, **options):
        out = loss(*args, **options)
        calls.append((options["step"], options["seed"], out.route, out.metrics["policy/on_policy"].item()))
        return out

    monkeypatch.setattr(rf, "linear_grpo_loss", recorded)
    run = {"loss_type": loss_type, "gr_pass2_ratio": "pass1", "steps": 3, "checkpoint_every": 3, "seed": 7}
    if loss_type == "dro":
        run["dro_beta"] = 0.5
    train(config_file.load(overrides={**varied, **run, "eval_problems": 0}))
    route = rf.LossConfig(loss_type, dro_beta=run.get("dro_beta")).route
    assert calls.pop(0) == (0, 7, route, 1.0)  # the trial before the run
    assert calls == [(step, 7, route, float(first)) for step in range(3) for first in (True, False)]
    expected = {*OWN_METRICS.get(loss_type, CLIPPED)}
    for line in lines_of(tmp_path / "run" / "metrics.jsonl")[1:]:
        assert math.isfinite(line["loss"]) and 0 < line["grad_norm"] < math.inf and line["gr/step_cos"] > 0.9
        assert line["gr/g2_norm"] > 0 and line["gr/skipped_steps"] == 0
        assert line["ratio/mean"] == 1 and line["policy/on_policy"] == 1 and line["entropy"] > 0
        assert {key for key in line if "clip_ratio" in key or key.startswith("vespo")} == expected
        assert all(line[key] == (1 if key.startswith("vespo") else 0) for key in expected)
    before, after = (load_file(tmp_path / f"run/checkpoints/step-00000{n}/model.safetensors") for n in (0, 3))
    assert all(not torch.equal(before[name], after[name]) for name in before)


def test_the_demo_starts_from_nothing_and_its_pieces_fit(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    demo = config_file.load(overrides={"steps": 1, "warm_start_steps": 2, "eval_problems": 8, "prompts_per_step": 2})
    summary = train(demo)
    assert os.listdir(tmp_path / "runs") == ["demo"] and summary["accuracy_after"] is not None
    assert train(demo)["steps"] == 1 and sorted(os.listdir(tmp_path / "runs")) == ["demo", "demo-2"]
