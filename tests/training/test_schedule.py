"""The learning rate over the steps, layers that are computed again in the backward pass, dtype and device."""

import pytest
import torch
from safetensors.torch import load_file
from transformers import Qwen2ForCausalLM, get_scheduler
from transformers.models.qwen2.modeling_qwen2 import Qwen2MLP

from redit_fast.cli import main
from redit_fast.training import builtin, config, config_file, report, setup
from redit_fast.training.trainer import train
from tests.training.jobs import flags, lines_of


@pytest.fixture(autouse=True)
def without_pictures(monkeypatch):
    """Half a second a run."""
    monkeypatch.setattr(report, "write", lambda run: None)


@pytest.mark.parametrize("name", config.choices("lr_scheduler_type"))
@pytest.mark.parametrize("warmup", [0, 4])
def test_the_learning_rate_is_the_one_that_transformers_gives_its_optimizers(name, warmup):
    if name == "constant" and warmup:
        with pytest.raises(ValueError, match="warmup_steps: got 4, lr_scheduler_type constant has none"):
            config_file.load(overrides={"lr_scheduler_type": name, "warmup_steps": warmup})
        return
    made = config_file.load(
        overrides={"lr_scheduler_type": name, "warmup_steps": warmup, "steps": 10, "learning_rate": 0.3}
    )
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=0.3)
    schedule, ours = get_scheduler(name, optimizer, warmup, 10), setup.learning_rate(made)
    for step in range(10):
        assert ours(step) == optimizer.param_groups[0]["lr"]
        optimizer.step()
        schedule.step()
    assert (ours(0) == 0) == (warmup > 0) and (ours(9) < 0.3) == ("constant" not in name)


def test_the_optimizer_has_the_decays_of_the_settings():
    made = config_file.load(overrides={"adam_beta1": 0.8, "adam_beta2": 0.9})
    model, _ = builtin.build(0)
    groups = setup.optimizer(made, model).param_groups
    assert {group["betas"] for group in groups} == {(0.8, 0.9)}
    assert {group["betas"] for group in setup.optimizer(config_file.load(), model).param_groups} == {(0.9, 0.999)}


def test_a_run_has_it_in_its_steps_and_its_metrics_and_goes_on_with_it(settings, tmp_path, capsys):
    job = {**settings, "eval_problems": 0, "steps": 4, "lr_scheduler_type": "constant_with_warmup", "warmup_steps": 2}
    job |= {"keep_checkpoints": "none"}
    train(config_file.load(overrides={**job, "steps": 2, "keep_checkpoints": None}))
    assert main(["train", "--resume", *flags(job)]) == 0
    assert [line["learning_rate"] for line in lines_of(tmp_path / "run" / "metrics.jsonl")[1:]] == [0, 5e-4, 1e-3, 1e-3]
    weights = [load_file(tmp_path / f"run/checkpoints/step-00000{n}/model.safetensors") for n in range(3)]
    moved = [[not torch.equal(one[name], other[name]) for name in one] for one, other in zip(weights, weights[1:])]
    assert not any(moved[0]) and all(moved[1])  # nothing at a learning rate of 0
    capsys.readouterr()
    job = {**settings, "name": "falling", "eval_problems": 0, "steps": 1, "lr_scheduler_type": "linear"}
    train(config_file.load(overrides=job))
    assert main(["train", "--resume", *flags({**job, "steps": 2})]) == 2
    assert "steps was 1 in" in (error := capsys.readouterr().err) and "lr_scheduler_type linear ends at" in error


def test_layers_that_are_computed_again_give_the_same_run(settings, tmp_path, monkeypatch, capsys):
    calls, forward = [], Qwen2MLP.forward

    def counted(self, *args, **options):
        calls.append(torch.is_grad_enabled())
        return forward(self, *args, **options)

    monkeypatch.setattr(Qwen2MLP, "forward", counted)
    counts = []
    for name, again in (("kept", False), ("again", True)):
        calls.clear()
        train(config_file.load(overrides={**settings, "name": name, "checkpoint_activations": again, "steps": 1}))
        counts.append(sum(calls))
    ours, theirs = (
        load_file(tmp_path / f"{name}/checkpoints/step-000001/model.safetensors") for name in ("kept", "again")
    )
    assert all(torch.equal(ours[name], theirs[name]) for name in ours) and counts[1] == 2 * counts[0] > 0
    monkeypatch.setattr(Qwen2ForCausalLM, "supports_gradient_checkpointing", False)
    capsys.readouterr()
    assert main(["train", *flags({**settings, "name": "other"}), "--checkpoint-activations"]) == 2
    error = capsys.readouterr().err.strip()
    assert "(qwen2) cannot be trained: Qwen2ForCausalLM does not support" in error and len(error.splitlines()) == 1


def test_a_run_in_bfloat16_has_it_in_its_checkpoints_and_resumes_bit_by_bit(settings, tmp_path):
    job = {**settings, "dtype": "bfloat16", "steps": 4, "checkpoint_every": 4, "beta": 0.1, "reference_reset_every": 3}
    with pytest.warns(UserWarning, match="a KL term and gradient regularisation are both"):
        train(config_file.load(overrides={**job, "name": "straight"}))
        train(config_file.load(overrides={**job, "name": "halves", "steps": 2}))
        assert main(["train", "--resume", *flags({**job, "name": "halves"})]) == 0
    for file in ("model", "optimizer", "reference"):
        ours, theirs = (
            load_file(tmp_path / run / f"checkpoints/step-000004/{file}.safetensors") for run in ("straight", "halves")
        )
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
        assert file == "optimizer" or {tensor.dtype for tensor in ours.values()} == {torch.bfloat16}
    assert {
        name.split(".")[1] for name in load_file(tmp_path / "straight/checkpoints/step-000004/optimizer.safetensors")
    } > {"master"}
    demo = {"device": "cpu", "dtype": "bfloat16", "steps": 1, "warm_start_steps": 1, "eval_problems": 0}
    train(config_file.load(overrides={**demo, "prompts_per_step": 1, "out_dir": str(tmp_path), "name": "demo"}))
    weights = load_file(tmp_path / "demo/checkpoints/step-000001/model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.bfloat16}


def test_a_gpu_that_is_not_there_is_refused_before_anything_is_written(settings, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for more in ([*flags(settings)], ["--out-dir", str(tmp_path)]):
        assert main(["train", *more, "--device", "cuda"]) == 2
        error = capsys.readouterr().err.strip()
        assert "device is cuda, and torch finds no GPU" in error and len(error.splitlines()) == 1
    assert not (tmp_path / "run").exists() and not (tmp_path / "demo").exists()
