"""`redit-fast train --dry-run`: all that a run loads, its first step tried, and the plan of the rest. Nothing is
written, and the weights end with the process."""

from __future__ import annotations

from contextlib import ExitStack

import redit_fast as rf
from redit_fast.training import data, inputs, lora, memory, metrics, rewards, runs, sampling, setup
from redit_fast.training.batch import Batch
from redit_fast.training.config import TrainConfig
from redit_fast.training.distributed import Ranks, launched
from redit_fast.training.plain_text import say, scored, visible
from redit_fast.training.report.samples import Text
from redit_fast.training.report.summary import duration

Row = tuple[str, str]
NAMES = 20  # characters of a row's name, so that all parts of the plan have one column of values
SHOWN = 300  # characters at the end of a completion; its beginning has twice as many
MEMORY = {  # what is told of each part
    "weights": "weights",
    "optimizer": "AdamW's state",
    "copies": "copies for GR",
    "reference": "reference",
    "gradients": "gradients",
    "activations": "activations",
    "head": "the head's chunk of logits, with its gradients",
    "rollout": "cache and logits of a rollout",
}


def dry_run(config: TrainConfig) -> None:
    """Prints the plan of a run: first what the loaded parts tell, then what the first step's samples and passes do.

    Raises:
        ValueError: what a run would be refused for, one sentence; RewardError and EngineError in the first step.
    """
    if launched():
        raise ValueError("--dry-run is one process: start it without torchrun")
    if config.name is not None:
        runs.refuse_taken(setup.folder_of(config))
    inputs.of(config)
    # In this process nothing runs ahead, and without a warm-up the first step has its second pass.
    config = config.model_copy(update={"rollout_ahead": 0, "gr_gamma_warmup_steps": 0})
    clock = runs.Clock()
    with ExitStack() as held:
        parts = setup.parts(config, None)
        optimizer = setup.optimizer(config, parts.model)
        say(_table([*_of_model(config, parts), *_of_data(config, parts), *_of_steps(config, parts, optimizer)]))
        engine = setup.engine(config, parts, held, Ranks())
        source = sampling.Source(
            engine, parts.model, parts.tokenizer, parts.dataset.train, parts.functions, config, Ranks()
        )
        drawn = source.draw(0, 0, clock)
        advantages = rf.group_advantages(
            drawn.scores,
            group_size=config.group_size,
            reward_weights=config.reward_weights,
            dither=setup.dither(config, parts.functions),
            step=0,
            sample_ids=drawn.ids,
            scale=config.advantage_scale,
        )
        packed = parts.why_padded is None
        batch = Batch.of(drawn.prompts, drawn.rollout, advantages.values, parts.loss_config, config, 0, packed=packed)
        found = metrics.reward_metrics(parts.functions, drawn, advantages, config)
        say(f"{_completions(drawn, parts.functions)}\n")
        say(_table([*_of_rewards(config, parts, drawn, found), *_of_batch(batch, drawn, found)]))
        held_out = len(parts.dataset.held_out)
        say(_table(_of_memory(memory.predicted(parts.model, optimizer, batch, config, held_out))))
        _update(config, parts, optimizer, batch, clock)
        say(_table(_of_time(config, parts, batch, clock.seconds)))


def _update(
    config: TrainConfig, parts: setup.Parts, optimizer: rf.RegularizedAdamW, batch: Batch, clock: runs.Clock
) -> None:
    """A step's passes and optimizer step, as the trainer takes them."""
    reference = setup.reference(config, parts.model, None)
    if reference is not None:
        with clock("reference"), lora.switched_off(reference):
            batch.score_reference(reference)
    with clock("pass1"):
        first = batch.backward(parts.model)
    keeps_logp = config.updates_per_rollout > 1 or config.gr_pass2_ratio == "pass1"
    with clock("pass2"):
        perturbation = optimizer.perturb()
        with perturbation:
            if perturbation:
                batch.backward(parts.model, first.logp if keeps_logp else None, masks_of=first)
    with clock("optimizer"):
        optimizer.step()


def _table(rows: list[Row]) -> str:
    return "\n".join(f"{name:<{NAMES}}  {visible(' '.join(value.split()))}" for name, value in rows)


def _of_model(config: TrainConfig, parts: setup.Parts) -> list[Row]:
    model = parts.model
    each = [(p.numel(), p.requires_grad) for p in model.parameters()]
    trained = sum(count for count, on in each if on)
    rows = "packed" if parts.why_padded is None else f"padded: {parts.why_padded}"
    return [
        ("model", f"{config.model or 'the embedded demo'} ({model.config.model_type})"),
        ("parameters", f"{sum(count for count, _ in each):,}, of which {trained:,} are trained"),
        ("device, dtype", f"{model.device}, {str(model.dtype).removeprefix('torch.')}"),
        ("rows", rows),
    ]


def _of_data(config: TrainConfig, parts: setup.Parts) -> list[Row]:
    train, held_out = parts.dataset.train, parts.dataset.held_out
    longest = max(len(data.render(parts.tokenizer, record, config.system_prompt)) for record in train + held_out)
    skipped = f", {parts.dataset.skipped} too long and left out" if parts.dataset.skipped else ""
    return [
        ("data", f"{len(train):,} prompts, {len(held_out):,} held out{skipped}"),
        ("longest prompt", f"{longest:,} tokens; completions have {config.max_completion_length:,} at most"),
    ]


def _of_steps(config: TrainConfig, parts: setup.Parts, optimizer: rf.RegularizedAdamW) -> list[Row]:
    epochs = config.steps * config.prompts_per_step / len(parts.dataset.train)
    rows = [("steps", f"{config.steps:,} of {config.prompts_per_step} x {config.group_size} completions, "
                      f"{epochs:.2g} times through the data")]  # fmt: skip
    if config.warm_start_steps:
        before = (
            f"{config.warm_start_steps:,} steps before them, not tried here: completions are of the model before it"
        )
        rows.append(("warm start", before))
    written = times(config.steps, config.checkpoint_every)
    kept = written if config.keep_checkpoints is None else min(written, config.keep_checkpoints + 2)
    size = checkpoint_bytes(config, parts, optimizer)
    return [
        *rows,
        ("evaluations", str(times(config.steps, config.eval_every) if parts.dataset.held_out else 0)),
        (
            "checkpoints",
            f"{written:,}, of which {kept:,} at most stay: {_size(size)} each, {_size(kept * size)} in all",
        ),
    ]


def times(steps: int, every: int) -> int:
    """How often something is done that is done at step 0, every so many steps and at the last."""
    return 1 + steps // every + (steps % every > 0)


def checkpoint_bytes(config: TrainConfig, parts: setup.Parts, optimizer: rf.RegularizedAdamW) -> int:
    """Of weights, or adapters, and the optimizer's state, and after a reset the reference; not of the tokenizer."""
    trained = [p for group in optimizer.param_groups for p in group["params"]]
    saved = trained if config.lora_rank is not None else list(parts.model.parameters())
    copies = 2 if config.reference_reset_every else 1
    return copies * sum(map(memory.bytes_of, saved)) + sum(map(memory.state_of, trained))


def _completions(drawn: sampling.Samples, functions: list[rewards.RewardFunction]) -> str:
    """The first, the middle and the last of the step."""
    parts = []
    for i in sorted({0, len(drawn.texts) // 2, len(drawn.texts) - 1}):
        text = Text.of(drawn.texts[i], SHOWN)
        left_out = f"\n[{text.left_out:,} characters]\n" if text.left_out else ""
        told = scored(functions, drawn.scores[i].tolist())
        parts.append(f"\n--- completion {i}: {told}\n{visible(text.beginning)}{left_out}{visible(text.end)}")
    return "\n".join(parts)


def _of_rewards(config: TrainConfig, parts: setup.Parts, drawn: sampling.Samples, found: dict[str, float]) -> list[Row]:
    rows = [("reward", f"{found['reward']:.3f} on average, deviation in a group {found['reward_std']:.3f}")]
    for function, column in zip(parts.functions, drawn.scores.T, strict=True):
        mean, unscored = found[f"rewards/{function.name}/mean"], int(column.isnan().sum())
        rows.append((f"rewards/{function.name}", f"{mean:.3f}, {unscored:,} of {len(column):,} unscored"))
    dead = round(found["frac_reward_zero_std"] * config.prompts_per_step)
    return [*rows, ("dead groups", f"{dead:,} of {config.prompts_per_step:,}")]


def _of_batch(batch: Batch, drawn: sampling.Samples, found: dict[str, float]) -> list[Row]:
    mean, cut_off = found["completions/mean_length"], found["completions/clipped_ratio"]
    tokens = [micro.tokens for micro, _ in batch.micro_batches]
    counts = f"{drawn.generated:,} generated, {batch.useful_tokens:,} useful, {sum(tokens):,} computed in a pass"
    return [
        ("completions", f"{mean:.1f} tokens on average, {cut_off:.0%} cut off"),
        ("tokens of a step", counts),
        ("micro-batches", f"{len(tokens):,}, the largest of {max(tokens, default=0):,} tokens"),
    ]


def _of_memory(found: memory.Memory) -> list[Row]:
    parts = ", ".join(f"{words} {_size(size)}" for name, words in MEMORY.items() if (size := getattr(found, name)))
    where = "training passes" if found.passes >= found.rollout else "rollout"
    kept = (
        f"{_size(found.tensors)} of tensors, and what the C library keeps of freed ones" if found.on_cpu else "tensors"
    )
    return [
        ("memory, predicted", parts),
        ("memory at once", f"{_size(found.peak)} above the loaded weights, in the {where}: {kept}"),
    ]


def _of_time(config: TrainConfig, parts: setup.Parts, batch: Batch, seconds: dict[str, float]) -> list[Row]:
    """By this one step, whose kernels and caches were cold."""
    updates = config.updates_per_rollout
    each = {
        "rollout": seconds["rollout"],
        "rewards": seconds["reward"],
        "reference": seconds.get("reference", 0.0),
        "first passes": updates * seconds["pass1"],
        "second passes": updates * seconds["pass2"] / config.gr_every_k_steps if config.gr_gamma else 0.0,
        "optimizer": updates * seconds["optimizer"],
    }
    step, answers = sum(each.values()), len(parts.dataset.held_out) * config.eval_samples
    evaluation = (seconds["rollout"] + seconds["reward"]) * answers / len(batch.prompts)
    whole = config.steps * step + times(config.steps, config.eval_every) * evaluation
    told = ", ".join(f"{name} {duration(value)}" for name, value in each.items() if value)
    return [
        ("a step takes", f"{duration(step)}: {told}"),
        ("the run takes", f"about {duration(whole)} with its evaluations, without writing checkpoints"),
    ]


def _size(count: float) -> str:
    return f"{count / 1e6:.1f} MB" if count < 1e9 else f"{count / 1e9:.2f} GB"
