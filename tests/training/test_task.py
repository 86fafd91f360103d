"""What Python code gives a run: a task in the place of the demo, and a hook on the advantages."""

import dataclasses

import pytest
import torch

from redit_fast.cli import main
from redit_fast.training import builtin, data, report, rewards, setup
from redit_fast.training.config import TrainConfig
from redit_fast.training.rewards.user_code import RewardError
from redit_fast.training.task import Task
from redit_fast.training.trainer import train
from tests.conftest import REWARDS
from tests.training.jobs import lines_of
from tests.training.test_stops import assert_equal_checkpoints, timeless

NAMES = [name.rpartition(":")[2] for name in REWARDS]
TRAIN = builtin.records(setup.TRAIN_PROBLEMS, held_out=False, seed=0)
DEMO = data.Dataset(TRAIN, builtin.records(5, held_out=True, seed=0))


def built():
    return builtin.build(0)


@pytest.fixture
def task():
    return Task("the demo again", built, DEMO, rewards.resolve(REWARDS, ["answer", "steps"]))


@pytest.fixture
def job(tmp_path):
    return {
        "out_dir": str(tmp_path), "steps": 4, "warm_start_steps": 0, "prompts_per_step": 3, "group_size": 4,
        "max_completion_length": 8, "eval_problems": 5, "eval_every": 2, "checkpoint_every": 2, "learning_rate": 1e-3,
    }  # fmt: skip


def test_a_task_of_the_demos_parts_is_the_demo_to_the_bit_but_without_a_report(job, task, tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(report, "write", drawn.append)
    train(TrainConfig(**job, name="demo", rewards=REWARDS))
    train(TrainConfig(**job, name="task", rewards=NAMES), task=task)
    assert_equal_checkpoints(*(tmp_path / name / "checkpoints/step-000004" for name in ("demo", "task")))
    assert timeless(tmp_path / "demo" / "metrics.jsonl") == timeless(tmp_path / "task" / "metrics.jsonl")
    assert [path.name for path in drawn] == ["demo"]


def test_a_run_of_a_task_goes_on_with_the_task_alone(job, task, tmp_path, capsys):
    train(TrainConfig(**job, name="straight", rewards=NAMES), task=task)
    half = TrainConfig(**{**job, "steps": 2}, name="halves", rewards=NAMES)
    train(half, task=task)
    whole = half.model_copy(update={"steps": 4})
    for other, words in (
        (None, "began with task the demo again from Python, and goes on with the same"),
        (dataclasses.replace(task, name="another"), "began with task the demo again from Python"),
    ):
        with pytest.raises(ValueError, match=words):
            train(whole, resume=True, task=other)
    assert main(["train", "--resume", "--out-dir", job["out_dir"], "--name", "halves"]) == 2
    assert "began with task the demo again from Python" in capsys.readouterr().err
    train(whole, resume=True, task=task)
    assert_equal_checkpoints(*(tmp_path / name / "checkpoints/step-000004" for name in ("straight", "halves")))
    assert timeless(tmp_path / "straight" / "metrics.jsonl") == timeless(tmp_path / "halves" / "metrics.jsonl")
    train(TrainConfig(**{**job, "steps": 2}, name="demo", rewards=REWARDS))
    with pytest.raises(ValueError, match="began with no task and no advantages_hook from Python"):
        train(TrainConfig(**job, name="demo", rewards=REWARDS), resume=True, task=dataclasses.replace(
            task, functions=[dataclasses.replace(f, name=name) for f, name in zip(task.functions, REWARDS)]
        ))  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"warm_start_steps": 3}, "warm_start_steps: got 3 with the task the demo again, whose `build` has its own"),
        ({"rewards": NAMES[:2]}, "rewards: got ['correct_answer', 'right_steps'], the task the demo again has"),
        ({"model": "m", "data": "d"}, "model: got m with the task the demo again, which brings its own"),
    ],
)
def test_a_config_that_does_not_fit_a_task_is_refused_before_anything_is_made(job, task, tmp_path, changes, sentence):
    with pytest.raises(ValueError) as error:
        train(TrainConfig(**{**job, "rewards": NAMES, **changes}, name="run"), task=task)
    assert sentence in str(error.value) and "\n" not in str(error.value)
    with pytest.raises(ValueError, match="its dataset has no records"):
        train(TrainConfig(**job, rewards=NAMES), task=dataclasses.replace(task, dataset=data.Dataset([], [])))
    assert not list(tmp_path.iterdir())


def test_a_step_trains_on_what_the_hook_returns(job, task, tmp_path):
    steps = []

    def hook(advantages, samples, step):
        steps.append(step)
        assert samples.scores.shape == (12, 3) and len(samples.texts) == 12
        return advantages._replace(values=torch.linspace(-1, 1, 12))

    train(TrainConfig(**job, name="plain", rewards=NAMES, gr_gamma=0.0), task=task)
    train(TrainConfig(**job, name="hooked", rewards=NAMES, gr_gamma=0.0), task=task, advantages_hook=hook)
    assert steps == [0, 1, 2, 3]
    trained_on = [row["advantage"] for row in lines_of(tmp_path / "hooked" / "completions.jsonl")]
    assert trained_on == torch.linspace(-1, 1, 12).tolist() * 4
    longer = TrainConfig(**{**job, "steps": 5}, name="hooked", rewards=NAMES, gr_gamma=0.0)
    with pytest.raises(ValueError, match="began with task the demo again and advantages_hook from Python"):
        train(longer, resume=True, task=task)
    train(longer, resume=True, task=task, advantages_hook=hook)
    assert steps == [0, 1, 2, 3, 4]
    norms = [lines_of(tmp_path / name / "metrics.jsonl")[1]["grad_norm"] for name in ("plain", "hooked")]
    assert norms[0] != norms[1] and norms[1] > 0


def test_a_hook_that_fails_is_said_in_a_sentence_after_a_checkpoint(job, task, tmp_path):
    def raises(advantages, samples, step):
        return 1 / (1 - step)

    def too_few(advantages, samples, step):
        return advantages._replace(values=advantages.values[1:])

    def not_finite(advantages, samples, step):
        return advantages._replace(values=advantages.values / 0)

    for number, (hook, words) in enumerate(
        [
            (raises, "advantages_hook returned .*needs an Advantages"),
            (lambda *_: 1 / 0, "advantages_hook raised ZeroDivisionError"),
            (too_few, "advantages_hook returned values .*needs 12 finite ones"),
            (not_finite, "needs 12 finite ones"),
        ]
    ):
        with pytest.raises(RewardError, match=words) as error:
            train(TrainConfig(**job, name=f"run-{number}", rewards=NAMES), task=task, advantages_hook=hook)
        assert "\n" not in str(error.value)
        assert (tmp_path / f"run-{number}" / "checkpoints" / "step-000000").is_dir()
