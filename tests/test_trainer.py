"""The main job end to end: a user's model and JSONL, the run folder, resume, Ctrl-C, kill -9, a full disk, bad
input."""

import json
import math
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import get_args

import pytest
import torch
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM, AutoTokenizer

import redit_fast as rf
from redit_fast import head
from redit_fast.cli import main
from redit_fast.loss_config import LossType
from redit_fast.training import builtin, checkpoint, config, policy
from redit_fast.training.rollout import generate
from redit_fast.training.trainer import train

REWARDS = [f"redit_fast.training.builtin:{name}" for name in ("correct_answer", "right_steps", "answer_format")]


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory):
    """A tiny model with dropout and its own tokenizer, as a user would bring them."""
    folder = tmp_path_factory.mktemp("model")
    model, tokenizer = builtin.build(0)
    builtin.warm_start(model, tokenizer, steps=4, seed=0)
    model.config.attention_dropout = 0.1
    model.config.max_position_embeddings = 1024
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def problems(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "problems.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in builtin.records(60, held_out=False, seed=0)))
    return path


@pytest.fixture
def settings(model_folder, problems, tmp_path):
    return {
        "model": str(model_folder), "data": str(problems), "rewards": REWARDS, "out_dir": str(tmp_path), "name": "run",
        "steps": 2, "prompts_per_step": 3, "group_size": 4, "max_completion_length": 12, "eval_problems": 5,
        "learning_rate": 1e-3, "checkpoint_every": 1, "eval_every": 2, "gamma": 0.1, "epsilon": 0.1,
    }  # fmt: skip


def lines_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def flags(settings):
    words = []
    for name, value in settings.items():
        words += [f"--{name.replace('_', '-')}", *map(str, value if isinstance(value, list) else [value])]
    return words


def launch(settings, *more, **options):
    command = [sys.executable, "-m", "redit_fast", "train", *flags(settings), *more]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)


def test_a_config_file_and_flags_train_a_users_model_on_a_users_data(settings, tmp_path, capsys):
    file = tmp_path / "job.yaml"
    file.write_text(json.dumps({key: value for key, value in settings.items() if key not in ("steps", "name")}))
    assert main(["train", "--config", str(file), "--steps", "3", "--name", "mine"]) == 0
    run = tmp_path / "mine"
    assert "Held-out accuracy after RL" in capsys.readouterr().out

    metrics = lines_of(run / "metrics.jsonl")
    assert [line["step"] for line in metrics] == [0, 1, 2, 3] and {line["schema"] for line in metrics} == {1}
    for line in metrics:
        parts = [value for key, value in line.items() if key.startswith("time/") and key != "time/step"]
        assert sum(parts) == pytest.approx(line["time/step"], rel=0.02)
    expected = {"loss", "reward/raw_mean", "reward/dithered_std", "grad_norm", "gr/step_cos", "gr/g1_norm",
                "frac_reward_zero_std", "adv/rms_dead_groups", "rewards/right_steps/mean",
                "rewards/right_steps/nan_frac", "completions/mean_length", "entropy", "ratio/mean",
                "tokens/generated", "learning_rate"}  # fmt: skip
    assert all(expected <= line.keys() for line in metrics[1:])
    assert all(line["gr/step_cos"] > 0.99 and line["ratio/mean"] == 1 for line in metrics[1:])
    assert ["accuracy/held_out" in line for line in metrics] == [True, False, True, True]

    samples = lines_of(run / "completions.jsonl")
    assert len(samples) == 3 * 12 and samples[0]["rewards"].keys() == {"correct_answer", "right_steps", "answer_format"}
    assert (run / "curves.png").stat().st_size > 10_000 and "data:image/png;base64," in (
        run / "report.html"
    ).read_text()
    stored = config.load(run / "config.json")
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
    assert config.load(tmp_path / "run" / "config.json").data == "examples/word_problems.jsonl"


def test_rollout_log_probs_are_those_that_the_loss_sees(model_folder):
    """What sampling drew from and what the loss scores are one distribution: padding, positions and cache agree."""
    model, tokenizer = policy.load(Path(model_folder))
    prompts = tokenizer([record["prompt"] for record in builtin.records(5, held_out=False, seed=3)])["input_ids"]
    rollout = generate(model, 0, prompts, group_size=2, max_new_tokens=9, seed=1)
    run = config.TrainConfig(model="m", data="d", rewards=["exact_answer"], group_size=2, steps=1)
    batch = policy.Batch.of(prompts, rollout, torch.ones(10), rf.LossConfig(), run, 0)
    model.config.attention_dropout = 0.0
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.0
    logp = batch.backward(model).logp
    for i, part in enumerate(logp.split(batch.lengths)):
        ids = torch.tensor(prompts[i // 2] + rollout.completions[i])[None]
        with torch.no_grad():
            expected = torch.log_softmax(model(ids).logits[0, :-1].float(), -1).gather(1, ids[0, 1:, None])[:, 0]
        torch.testing.assert_close(part, expected[-len(part) :], rtol=0, atol=1e-4)


@pytest.mark.parametrize("loss_type", ["dapo", "grpo", "dr_grpo", "luspo"])
def test_micro_batches_give_the_same_gradient(model_folder, loss_type):
    gradients, settings = [], rf.LossConfig(loss_type, max_completion_length=9)
    for micro in (None, 3):
        model, tokenizer = policy.load(Path(model_folder))
        model.config.attention_dropout = 0.0
        for layer in model.model.layers:
            layer.self_attn.attention_dropout = 0.0
        prompts = tokenizer([record["prompt"] for record in builtin.records(4, held_out=False, seed=3)])["input_ids"]
        rollout = generate(model, 0, prompts, group_size=2, max_new_tokens=9, seed=1)
        run = config.TrainConfig(model="m", data="d", rewards=["exact_answer"], group_size=2, micro_batch_size=micro)
        batch = policy.Batch.of(prompts, rollout, torch.linspace(0, 1, 8), settings, run, 0)
        done = batch.backward(model)
        ends = torch.tensor([0, *batch.lengths]).cumsum(0)
        whole = rf.policy_loss(done.logp, batch.advantages, cu_seqlens=ends, config=settings)
        assert done.loss == pytest.approx(whole.loss.item(), rel=1e-5)
        gradients.append((done.loss, torch.cat([p.grad.flatten() for p in model.parameters()])))
    assert gradients[0][0] == pytest.approx(gradients[1][0], rel=1e-5)
    torch.testing.assert_close(gradients[0][1], gradients[1][1], rtol=1e-4, atol=1e-6)


def batch_of(model_folder, advantages, settings, dropout=0.0, **options):
    """A loaded model, and a step's batch of rollouts with these advantages."""
    model, tokenizer = policy.load(Path(model_folder))
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = dropout
    prompts = tokenizer([record["prompt"] for record in builtin.records(4, held_out=False, seed=3)])["input_ids"]
    rollout = generate(model, 0, prompts, group_size=len(advantages) // 4, max_new_tokens=9, seed=1)
    run = config.TrainConfig(model="m", data="d", rewards=["exact_answer"], group_size=len(advantages) // 4, **options)
    return model, policy.Batch.of(prompts, rollout, torch.tensor(advantages), settings, run, 0)


def gradient(model):
    return torch.cat([p.grad.flatten() for p in model.parameters()])


MIXED = [0.0, 1.0, -0.5, 0.0, 0.0, 2.0, -1.0, 0.0]


@pytest.fixture
def hidden_rows(monkeypatch):
    """(rows, whether they have a graph) of every call of the loss."""
    calls, loss = [], rf.linear_grpo_loss

    def recorded(hidden, *args, **options):
        calls.append((len(hidden), hidden.requires_grad))
        return loss(hidden, *args, **options)

    monkeypatch.setattr(rf, "linear_grpo_loss", recorded)
    return calls


@pytest.mark.parametrize("micro", [None, 3])
@pytest.mark.parametrize("loss_type", ["dapo", "grpo", "gspo", "dro"])
def test_samples_with_an_advantage_of_0_run_without_a_graph(model_folder, hidden_rows, loss_type, micro, monkeypatch):
    settings = rf.LossConfig(loss_type, dro_beta=0.5 if loss_type == "dro" else None)
    passes = []
    for silent in (settings.silent_at_zero, False):
        monkeypatch.setattr(rf.LossConfig, "silent_at_zero", silent)
        model, batch = batch_of(model_folder, MIXED, settings, micro_batch_size=micro)
        hidden_rows.clear()
        done = batch.backward(model)
        passes.append((done, gradient(model), list(hidden_rows)))
    (ours, grad, calls), (all_with_graph, expected, _) = passes
    rows = {graph: sum(count for count, has_graph in calls if has_graph == graph) for graph in (True, False)}
    zero = sum(length for length, a in zip(batch.lengths, MIXED, strict=True) if a == 0)
    assert rows == ({True: sum(batch.lengths), False: 0} if loss_type == "dro"
                    else {True: sum(batch.lengths) - zero, False: zero})  # fmt: skip
    assert (grad - expected).norm() < 1e-6 * expected.norm() > 0
    assert ours.loss == pytest.approx(all_with_graph.loss, rel=1e-6)
    torch.testing.assert_close(ours.logp, all_with_graph.logp, rtol=0, atol=1e-5)  # each in its sample's place
    assert ours.metrics == pytest.approx(all_with_graph.metrics, rel=1e-5)
    if settings.route == "fused":
        assert ours.metrics["head/frac_rows_skipped"] == pytest.approx(zero / sum(batch.lengths))


def test_both_passes_drop_the_same_with_and_without_a_graph(model_folder):
    model, batch = batch_of(model_folder, MIXED, rf.LossConfig(), dropout=0.3, micro_batch_size=3)
    first, second = batch.backward(model), batch.backward(model)
    assert torch.equal(first.logp, second.logp)
    assert second.metrics["ratio/max_abs_dev"] == batch.backward(model, first.logp).metrics["ratio/max_abs_dev"] == 0


def test_a_step_of_zero_advantages_has_zero_gradients(model_folder, hidden_rows):
    """Not None, which the optimizer would refuse."""
    model, batch = batch_of(model_folder, [0.0] * 8, rf.LossConfig())
    batch.backward(model)
    assert hidden_rows == [(sum(batch.lengths), True)] and (gradient(model) == 0).all()


class Elements(TorchDispatchMode):
    """The elements of every tensor that an operation gives."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.seen |= {tensor.numel() for tensor in tree_leaves(out) if isinstance(tensor, torch.Tensor)}
        return out


@pytest.mark.parametrize("loss_type", ["dapo", "gspo"])
@pytest.mark.parametrize("micro", [None, 8])
def test_no_tensor_as_large_as_the_logits_exists_in_a_training_step(monkeypatch, loss_type, micro):
    """On the built-in task, its vocabulary widened and the chunk narrowed so that nothing else comes near."""
    model, tokenizer = builtin.build(0)
    model.resize_token_embeddings(8191)
    monkeypatch.setattr(head, "CHUNK_BYTES", 32 * 8191 * 4)
    prompts = tokenizer([record["prompt"] for record in builtin.records(2, held_out=False, seed=3)])["input_ids"]
    rollout = generate(model, 0, prompts, group_size=8, max_new_tokens=20, seed=1)
    run = config.TrainConfig(group_size=8, micro_batch_size=micro)
    batch = policy.Batch.of(prompts, rollout, torch.linspace(-1, 1, 16), rf.LossConfig(loss_type), run, 0)
    with Elements() as recorder:
        first = batch.backward(model)
        batch.backward(model, first.logp)
    rows = min(sum(batch.lengths[start : start + 8]) for start in (0, 8))  # of the smallest micro-batch
    assert rows > 96  # so that the logits are larger than the weight
    assert 32 * 8191 in recorder.seen and max(recorder.seen) <= 96 * 8191 < rows * 8191
    for n in range(16):
        assert (rows + n) * 8191 not in recorder.seen


class AdaptedHead(torch.nn.Module):
    """As peft wraps a layer: what it shows as `weight` is not all of it."""

    def __init__(self, base_layer):
        super().__init__()
        self.base_layer = base_layer
        self.lora_A, self.lora_B = torch.nn.Linear(96, 2, bias=False), torch.nn.Linear(2, 1, bias=False)
        torch.nn.init.zeros_(self.lora_B.weight)

    weight = property(lambda self: self.base_layer.weight)
    bias = property(lambda self: self.base_layer.bias)

    def forward(self, hidden):
        return self.base_layer(hidden) + self.lora_B(self.lora_A(hidden))


def test_an_adapter_on_the_head_is_refused_before_training(model_folder):
    """A fresh adapter changes no log-prob, so that only its type tells."""
    model, batch = batch_of(model_folder, MIXED, rf.LossConfig())
    policy.check_head(model, AutoTokenizer.from_pretrained(model_folder), rf.LossConfig())
    model.set_output_embeddings(AdaptedHead(model.lm_head))
    with pytest.raises(ValueError, match=r"AdaptedHead.*merge_and_unload.*target_modules"):
        policy.check_head(model, AutoTokenizer.from_pretrained(model_folder), rf.LossConfig())
    with pytest.raises(ValueError, match="AdaptedHead"):
        batch.backward(model)


def test_ten_steps_are_five_a_fresh_process_and_five_more_bit_by_bit(settings, tmp_path):
    """Dither, GR with its second pass, dropout, sampling, data order and AdamW's state included."""
    straight = {**settings, "name": "straight", "steps": 10, "checkpoint_every": 5}
    halves = {**settings, "name": "halves", "checkpoint_every": 5}
    for job, more in ((straight, ()), ({**halves, "steps": 5}, ()), ({**halves, "steps": 10}, ("--resume",))):
        process = launch(job, *more)
        _, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors
    a, b = (tmp_path / name for name in ("straight", "halves"))
    for file in ("model.safetensors", "optimizer.safetensors"):
        one, other = (load_file(run / "checkpoints" / "step-000010" / file) for run in (a, b))
        assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    assert (a / "completions.jsonl").read_text() == (b / "completions.jsonl").read_text()

    def timeless(line):
        return {
            key: value for key, value in line.items() if not key.startswith(("time/", "tokens/per", "accuracy/held"))
        }

    assert list(map(timeless, lines_of(a / "metrics.jsonl"))) == list(map(timeless, lines_of(b / "metrics.jsonl")))


def test_kill_9_at_any_moment_never_damages_an_older_checkpoint(settings, tmp_path):
    job, run = {**settings, "steps": 500}, tmp_path / "run"
    complete = set()
    for attempt in range(3):
        process = launch(job, *(["--resume"] if attempt else []))
        target = max(complete, default=-1) + 2 + attempt
        deadline = time.monotonic() + 300
        while not (run / "checkpoints" / f"step-{target:06d}").exists():
            assert process.poll() is None and time.monotonic() < deadline, process.communicate()
            time.sleep(0.01)
        time.sleep(0.07 * attempt)  # somewhere in the next step or its checkpoint
        process.kill()
        process.wait()
        for step in complete:
            assert checkpoint._damage(run / "checkpoints" / f"step-{step:06d}") is None
        newest = checkpoint.newest(run / "checkpoints")
        assert checkpoint.step_of(newest) >= target
        complete |= {int(path.name[5:]) for path in (run / "checkpoints").glob("step-*")}
        written = (run / "metrics.jsonl").read_text()
        steps = [json.loads(line)["step"] for line in written.split("\n")[:-1]]
        assert steps == sorted(set(steps))
    done = checkpoint.step_of(newest)
    train(config.load(overrides={**job, "steps": done + 1}), resume=True)
    assert [line["step"] for line in lines_of(run / "metrics.jsonl")] == list(range(done + 2))


def test_a_checkpoint_that_exists_has_all_the_lines_that_lead_to_it(settings, monkeypatch):
    publish, steps = checkpoint.publish, []

    def publish_after_reading(draft):
        run = draft.parent.parent
        steps.append(checkpoint.step_of(draft))
        assert lines_of(run / "metrics.jsonl")[-1]["step"] == steps[-1]
        assert steps[-1] == 0 or lines_of(run / "completions.jsonl")[-1]["step"] == steps[-1]
        return publish(draft)

    monkeypatch.setattr(checkpoint, "publish", publish_after_reading)
    train(config.load(overrides=settings))
    assert steps == list(range(settings["steps"] + 1))


def test_ctrl_c_saves_prints_the_resume_command_and_exits_with_130(settings, tmp_path):
    job = {**settings, "steps": 500, "checkpoint_every": 400}
    process = launch(job)
    deadline = time.monotonic() + 300
    metrics = tmp_path / "run" / "metrics.jsonl"
    while not metrics.exists() or metrics.read_text().count("\n") < 3:
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 130 and "Traceback" not in errors
    done = checkpoint.step_of(checkpoint.newest(tmp_path / "run" / "checkpoints"))
    assert done >= 2 and f"after step {done} of 500" in errors
    assert f"redit-fast train --resume --name run --out-dir {tmp_path}" in errors
    assert main(["train", "--resume", "--name", "run", "--out-dir", str(tmp_path), "--steps", str(done + 1)]) == 0
    assert [line["step"] for line in lines_of(metrics)] == list(range(done + 2))


def test_a_full_disk_is_one_line_and_the_older_checkpoint_stays(settings, tmp_path):
    train(config.load(overrides={**settings, "steps": 1}))

    def small_files():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))

    process = launch({**settings, "steps": 3}, "--resume", preexec_fn=small_files)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 2 and len(errors.strip().splitlines()) == 1, errors
    assert "large" in errors and checkpoint.step_of(checkpoint.newest(tmp_path / "run" / "checkpoints")) == 1
    train(config.load(overrides={**settings, "steps": 2}), resume=True)


def test_a_damaged_newest_checkpoint_is_named_and_the_one_before_used(settings, tmp_path):
    train(config.load(overrides=settings))
    newest = tmp_path / "run" / "checkpoints" / "step-000002"
    weights = newest / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100] + b"\0" * 100)
    with pytest.warns(UserWarning, match=r"step-000002 is damaged \(model.safetensors has changed\)"):
        summary = train(config.load(overrides=settings), resume=True)
    assert summary["steps"] == 2 and checkpoint._damage(newest) is None
    assert [line["step"] for line in lines_of(tmp_path / "run" / "metrics.jsonl")] == [0, 1, 2]


def run_with_reward(settings, tmp_path, body, capsys):
    (tmp_path / "mine.py").write_text(f"import math\ndef judge(prompts, completions, **columns):\n    {body}\n")
    job = {**settings, "rewards": [f"{tmp_path}/mine:judge"]}
    code = main(["train", *flags(job)])
    sys.modules.pop("mine", None)
    return code, capsys.readouterr().err


@pytest.mark.parametrize(
    ("body", "complaint"),
    [
        ("raise KeyError('oops')", "KeyError"),
        ("return [1.0]", "returned 1 rewards for"),
        ("return [math.inf] * len(completions)", "inf"),
        ("return ['good'] * len(completions)", "'good'"),
        ("return 1.0", "float"),
    ],
)
def test_a_reward_that_fails_stops_the_run_in_one_line_after_a_checkpoint(settings, tmp_path, capsys, body, complaint):
    code, errors = run_with_reward({**settings, "eval_problems": 0}, tmp_path, body, capsys)
    assert code == 2 and "judge" in errors and complaint in errors and len(errors.strip().splitlines()) == 1
    assert checkpoint.step_of(checkpoint.newest(tmp_path / "run" / "checkpoints")) == 0


def test_unscored_samples_are_counted_and_the_run_goes_on(settings, tmp_path, capsys):
    body = "return [None if i % 4 == 0 else float(len(str(c)) % 3) for i, c in enumerate(completions)]"
    with pytest.warns(UserWarning, match="'judge' left .* samples unscored"):
        code, _ = run_with_reward(settings, tmp_path, body, capsys)
    assert code == 0
    assert [line["rewards/judge/nan_frac"] for line in lines_of(tmp_path / "run" / "metrics.jsonl")[1:]] == [0.25, 0.25]


def test_an_existing_run_is_never_overwritten(settings, tmp_path, capsys):
    train(config.load(overrides={**settings, "steps": 1}))
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    assert main(["train", *flags(settings)]) == 2 and "--resume" in capsys.readouterr().err
    assert main(["train", *flags({**settings, "learning_rate": 0.5}), "--resume"]) == 2
    assert "learning_rate was 0.001" in capsys.readouterr().err
    assert main(["train", *flags({**settings, "name": "other"}), "--resume"]) == 2
    assert "no run to resume" in capsys.readouterr().err
    assert before == {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}


def test_nothing_is_written_when_the_start_fails(settings, tmp_path, capsys):
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"prompt": "a"}\n' * 36 + '{"prompt": }\n')
    for change, complaint in [
        ({"data": str(bad)}, "bad.jsonl:37"),
        ({"model": str(tmp_path / "nowhere")}, "nowhere"),
        ({"rewards": ["no_such_reward"]}, "no_such_reward"),
        ({"max_completion_length": 1010}, "tokens"),
        ({"max_prompt_length": 3}, "tokens"),
    ]:
        assert main(["train", *flags({**settings, **change})]) == 2
        errors = capsys.readouterr().err
        assert complaint in errors and len(errors.strip().splitlines()) == 1, errors
        assert not (tmp_path / "run").exists()


def test_a_models_own_code_is_not_run_and_pickled_weights_are_refused(settings, model_folder, tmp_path, capsys):
    evil = tmp_path / "evil"
    evil.mkdir()
    for path in Path(model_folder).iterdir():
        (evil / path.name).write_bytes(path.read_bytes())
    described = json.loads((evil / "config.json").read_text())
    described |= {"model_type": "evil", "auto_map": {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M"}}
    (evil / "config.json").write_text(json.dumps(described))
    (evil / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    assert main(["train", *flags({**settings, "model": str(evil)})]) == 2
    assert not (tmp_path / "ran").exists() and len(capsys.readouterr().err.strip().splitlines()) == 1

    pickled = tmp_path / "pickled"
    pickled.mkdir()
    for path in Path(model_folder).glob("*.json"):
        (pickled / path.name).write_bytes(path.read_bytes())
    torch.save(load_file(Path(model_folder) / "model.safetensors"), pickled / "pytorch_model.bin")
    assert main(["train", *flags({**settings, "model": str(pickled)})]) == 2
    assert "pickled weights" in capsys.readouterr().err


def test_a_hostile_pickle_beside_a_checkpoint_is_never_opened(settings, tmp_path):
    train(config.load(overrides={**settings, "steps": 1}))
    newest = tmp_path / "run" / "checkpoints" / "step-000001"
    (newest / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'touch " + str(tmp_path / "ran").encode() + b"'\ntR.")
    train(config.load(overrides=settings), resume=True)
    assert not (tmp_path / "ran").exists()


VARIANTS = [
    {"gamma": 0.0},
    {"dither_level": 0.0},
    {"dead_groups": "skip"},
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
    train(config.load(overrides={**varied, **change, "steps": 1}))
    line = lines_of(tmp_path / "run" / "metrics.jsonl")[1]
    assert math.isfinite(line["loss"]) and line["grad_norm"] > 0
    assert ("gr/step_cos" in line) == (change.get("gamma") != 0.0)
    if change.get("dither_level") == 0.0:
        assert line["reward/dithered_std"] == line["reward/raw_std"] and line["adv/rms_dead_groups"] == 0
    if change.get("dead_groups") == "skip":
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
    run = {"loss_type": loss_type, "pass2_ratio": "pass1", "steps": 3, "checkpoint_every": 3, "seed": 7}
    if loss_type == "dro":
        run["dro_beta"] = 0.5
    train(config.load(overrides={**varied, **run, "eval_problems": 0}))
    route = rf.LossConfig(loss_type, dro_beta=run.get("dro_beta")).route
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
    demo = config.load(overrides={"steps": 1, "warm_start_steps": 2, "eval_problems": 8, "prompts_per_step": 2})
    summary = train(demo)
    assert os.listdir(tmp_path / "runs") == ["demo"] and summary["accuracy_after"] is not None
    assert train(demo)["steps"] == 1 and sorted(os.listdir(tmp_path / "runs")) == ["demo", "demo-2"]
