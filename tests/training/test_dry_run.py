"""`redit-fast train --dry-run`: the plan is the run's, nothing is written, and the memory that it predicts is taken."""

import ctypes
import gc
import platform
import re
from contextlib import ExitStack

import pytest
import torch
from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

from redit_fast.cli import main
from redit_fast.packing.plan import Budget
from redit_fast.training import config_file, dry_run, memory, policy, report, sampling, setup
from redit_fast.training.batch import Batch
from redit_fast.training.distributed import Ranks
from redit_fast.training.plain_text import visible
from redit_fast.training.runs import Clock
from redit_fast.training.trainer import train
from tests.counting import Peak
from tests.packing.models import FAMILIES, WHOLE, batch_of, model_of
from tests.training import processes
from tests.training.jobs import flags, lines_of


def planned(settings, capsys, *more):
    """The rows of the plan, and all that was printed."""
    assert main(["train", *flags(settings), "--dry-run", *more]) == 0
    said = capsys.readouterr().out
    return dict(re.findall(r"^(\S+(?: \S+)*) {2,}(\S.*)$", said, re.M)), said


def files_in(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


def test_the_plan_is_what_the_run_then_does_and_nothing_is_written(settings, tmp_path, capsys):
    job = {**settings, "steps": 3, "eval_every": 2, "keep_checkpoints": "none"}
    before = files_in(tmp_path)
    plan, said = planned(job, capsys)
    assert files_in(tmp_path) == before
    train(config_file.load(overrides={**job, "keep_checkpoints": None}))
    lines = lines_of(tmp_path / "run/metrics.jsonl")
    first = [line for line in lines_of(tmp_path / "run/completions.jsonl") if line["step"] == 1]
    for sample in (0, 6, 11):
        assert visible(first[sample]["completion"]) in said
    assert plan["reward"] == f"{lines[1]['reward']:.3f} on average, deviation in a group {lines[1]['reward_std']:.3f}"
    assert plan["dead groups"] == f"{round(3 * lines[1]['frac_reward_zero_std'])} of 3"
    for name in ("correct_answer", "right_steps", "answer_format"):
        assert plan[f"rewards/{name}"] == f"{lines[1][f'rewards/{name}/mean']:.3f}, 0 of 12 unscored"
    tokens = (lines[1][f"tokens/{name}"] for name in ("generated", "useful", "computed"))
    assert plan["tokens of a step"] == "{:,} generated, {:,} useful, {:,} computed in a pass".format(*tokens)
    assert plan["evaluations"] == str(sum("accuracy/held_out" in line for line in lines)) == "3"
    assert plan["data"] == "55 prompts, 5 held out"
    checkpoints = list((tmp_path / "run/checkpoints").iterdir())
    assert plan["checkpoints"].startswith(f"{len(checkpoints)}, of which 4 at most stay: ")
    size = float(re.search(r"stay: (\S+) MB each", plan["checkpoints"])[1])
    on_disk = sum((checkpoints[0] / f"{name}.safetensors").stat().st_size for name in ("model", "optimizer"))
    assert size == pytest.approx(on_disk / 1e6, rel=0.02, abs=0.1)
    assert plan["parameters"] == "243,264, of which 243,264 are trained"  # docs/demo.md has them
    assert re.match(r"\S+ s: rollout .*, first passes .*, second passes ", plan["a step takes"])


@pytest.mark.parametrize("steps", [1, 7, 8, 9])
@pytest.mark.parametrize("every", [1, 3, 8, 20])
def test_evaluations_and_checkpoints_are_counted_as_the_trainer_makes_them(steps, every):
    assert dry_run.times(steps, every) == sum(step == steps or step % every == 0 for step in range(steps + 1))


def test_a_demo_says_that_its_warm_start_is_not_tried(tmp_path, capsys):
    few = {"out_dir": tmp_path, "eval_problems": 8, "prompts_per_step": 2, "group_size": 2, "max_completion_length": 4}
    plan, _ = planned(few, capsys)
    assert "600 steps before them, not tried here" in plan["warm start"] and not list(tmp_path.iterdir())
    assert plan["model"] == "the embedded demo (qwen2)" and "second passes" in plan["a step takes"]


def test_what_a_run_would_be_refused_for_is_said(settings, tmp_path, capsys, monkeypatch):
    taken = tmp_path / "run"
    taken.mkdir()
    (taken / "config.json").write_text("{}")
    for more, sentence in (
        ([], f"{taken} holds a run already"),
        (["--name", "new", "--data", "none.jsonl"], "data none.jsonl: No such file"),
        (["--name", "new", "--rewards", "nonsense"], "rewards: 'nonsense' is neither"),
        (["--resume"], "--dry-run is of a run that begins, --resume goes on with one"),
    ):
        others = {name: value for name, value in settings.items() if f"--{name}" not in more}
        assert main(["train", *flags(others), "--dry-run", *more]) == 2
        assert sentence in capsys.readouterr().err.splitlines()[-1]
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["train", *flags({**settings, "name": "new"}), "--dry-run"]) == 2
    assert "--dry-run is one process: start it without torchrun" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]


def parts_of(settings, **more):
    """What a step of such a run is predicted to take."""
    config = config_file.load(overrides={**settings, **more})
    parts = setup.parts(config, None)
    with ExitStack() as held:
        engine = setup.engine(config, parts, held, Ranks())
        source = sampling.Source(
            engine, parts.model, parts.tokenizer, parts.dataset.train, parts.functions, config, Ranks()
        )
        drawn = source.draw(0, 0, Clock())
    ones = torch.ones(len(drawn.texts), dtype=torch.float32)
    packed = parts.why_padded is None
    batch = Batch.of(drawn.prompts, drawn.rollout, ones, parts.loss_config, config, 0, packed=packed)
    return memory.predicted(parts.model, setup.optimizer(config, parts.model), batch, config, 5), parts.model


def test_each_part_of_the_memory_is_that_of_its_tensors(settings):
    found, model = parts_of(settings)
    whole = sum(p.numel() for p in model.parameters())
    moved = sum(p.numel() for p in model.model.layers.parameters())
    assert found.weights >= 4 * whole and found.gradients == 4 * whole
    assert (found.optimizer, found.copies, found.reference) == (8 * whole, 4 * moved, 0)
    plain, _ = parts_of(settings, gr_gamma=0.0, beta=0.1)
    assert (plain.copies, plain.reference) == (0, plain.weights)
    half, _ = parts_of(settings, dtype="bfloat16")
    assert (half.optimizer, half.copies, half.gradients) == (12 * whole, 0, 2 * whole)
    again, _ = parts_of(settings, checkpoint_activations=True)
    assert again.activations < 0.8 * found.activations
    twice, _ = parts_of(settings, prompts_per_step=6)
    assert twice.activations == pytest.approx(2 * found.activations, rel=0.2)
    assert twice.rollout > found.rollout and twice.head > found.head
    split, _ = parts_of(settings, prompts_per_step=6, micro_batch_size=12)
    assert split.activations < 0.7 * twice.activations
    longer, _ = parts_of(settings, max_completion_length=24)
    assert longer.rollout > found.rollout


def test_adapters_alone_have_gradients_and_state(settings):
    pytest.importorskip("peft", reason="peft is not installed: adapters need it")
    found, model = parts_of(settings, lora_rank=2)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert (found.gradients, found.optimizer, found.copies) == (4 * trained, 8 * trained, 4 * trained)
    assert trained < 0.1 * sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(
    "kind", [*FAMILIES, "llama, padded", "llama, checkpointed", "llama, two micro-batches", "llama, wide"]
)
def test_a_training_pass_takes_the_tensors_that_are_predicted(kind):
    """Counted one by one, in a pass of 15 samples. A checkpointed layer's own share is that of an average layer."""
    settings = {"model": "-", "data": "-", "rewards": ["exact_answer"], "group_size": 3, "prompts_per_step": 5}
    config = config_file.load(overrides={**settings, "checkpoint_activations": "checkpointed" in kind, "gr_gamma": 0.0})
    wide = {"intermediate_size": 2000, "num_hidden_layers": 1} if "wide" in kind else {}
    model = model_of(kind.partition(",")[0], **wide)
    if config.checkpoint_activations:
        policy.checkpoint_activations(model)
    budget = Budget(samples=9) if "micro-batches" in kind else WHOLE
    batch = batch_of(model=model, packed="padded" not in kind, budget=budget)
    found = memory.predicted(model, setup.optimizer(config, model), batch, config)
    with Peak() as peak:
        batch.backward(model)
    assert found.passes == pytest.approx(peak.bytes, rel=0.2 if config.checkpoint_activations else 0.15)


def a_large_vocabulary(folder, tokenizer_of):
    """A tiny model whose head has 50257 rows, with a tokenizer that knows some of them."""
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_of)
    config = Qwen2Config(
        vocab_size=50257, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, tie_word_embeddings=True, bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    Qwen2ForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def took(words, file, gives_back):
    """Writes the bytes that a run has at most above those after its parts are loaded.

    With `gives_back` what the C library's allocator frees is the system's at once: tensors alone are left.
    """
    parts, base = setup.parts, []

    def loaded(*args):
        found = parts(*args)
        gc.collect()
        with open("/proc/self/clear_refs", "w") as reset:
            reset.write("5")  # VmHWM is what there is now
        base.append(status("VmRSS"))
        return found

    if gives_back:
        m_trim_threshold, m_mmap_threshold = -1, -3
        assert ctypes.CDLL(None).mallopt(m_mmap_threshold, 1 << 16) == 1
        assert ctypes.CDLL(None).mallopt(m_trim_threshold, 1 << 17) == 1
    setup.parts, report.write = loaded, lambda run: None
    code = processes.train(words)
    with open(file, "w") as out:
        out.write(str(status("VmHWM") - base[0]))
    return code


def status(name):
    with open("/proc/self/status") as file:
        return 1024 * int(re.search(rf"{name}:\s+(\d+) kB", file.read())[1])


def measured(job, file, gives_back):
    process = processes.context.Process(target=took, args=(flags(job), str(file), gives_back))
    process.start()
    process.join(120)
    assert process.exitcode == 0
    return float(file.read_text())


@pytest.mark.skipif(
    platform.libc_ver()[0] != "glibc", reason="mallopt and the peak of a process are glibc's and Linux's"
)
@pytest.mark.parametrize("case", ["the demo", "a vocabulary of 50257"])
def test_the_predicted_memory_is_what_two_steps_take(case, settings, tmp_path, capsys):
    """Of the second step the optimizer's state is part. Without the demo's warm start, which has no rollout. What the
    allocator keeps varies from run to run for the large vocabulary (docs/train.md)."""
    job = {"out_dir": str(tmp_path / "runs"), "name": "run", "steps": 2, "eval_problems": 16, "warm_start_steps": 0}
    if case != "the demo":
        model = a_large_vocabulary(tmp_path / "large", settings["model"])
        job = {**settings, **job, "model": str(model), "prompts_per_step": 8, "group_size": 8,
               "max_completion_length": 16}  # fmt: skip
    plan, _ = planned(job, capsys)
    told = re.match(r"(\S+) MB above the loaded weights, .*: (\S+) MB of tensors", plan["memory at once"])
    whole, tensors = (float(size) * 1e6 for size in told.groups())
    assert tensors == pytest.approx(measured(job, tmp_path / "took", True), rel=0.15)
    if case == "the demo":
        assert whole == pytest.approx(measured({**job, "name": "again"}, tmp_path / "took", False), rel=0.15)
