"""The main job, one page from top to bottom:

    rollout -> reward -> advantage -> pass 1 -> perturb -> pass 2 -> step -> log -> save

What the GR paper compares with is here too, as settings (docs/epsilon.md): a KL term to a reference (`beta`), Reference
Resets (`reference_reset_every`), SAM and the unsquared norm (`gr_normalized`), plain GRPO (`gr_gamma: 0`).

Departures from the two papers: (1) one optimizer step per batch of rollouts, so the importance ratio is 1 in both
passes (`gr_pass2_ratio` keeps pass 1's instead), unless `updates_per_rollout` asks for more; (2) only the decoder
layers are perturbed, as in the GR paper, but the gradient of everything else is combined too; (3) noise, sampling and
rounding are counter-based, so a resumed run is the same run.
"""

from __future__ import annotations

import json
import os
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from transformers import PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

import redit_fast as rf
from redit_fast.training import (
    builtin,
    checkpoint,
    data,
    flops,
    inputs,
    policy,
    progress,
    report,
    rewards,
    runs,
    sampling,
    setup,
    sharpness,
    trial,
)
from redit_fast.training.batch import Batch
from redit_fast.training.config import TrainConfig
from redit_fast.training.metrics import (
    completion_lines,
    held_out_metrics,
    over_updates,
    reward_metrics,
    summary_of,
    work_metrics,
)
from redit_fast.training.rewards.user_code import RewardError


def train(config: TrainConfig, resume: bool = False, accept_changed_inputs: bool = False) -> dict:
    """Runs or resumes a run and returns its summary; everything it leaves is in out_dir/name.

    Args:
        accept_changed_inputs: to go on with a run whose data, reward modules or start model have changed since.

    Raises:
        ValueError: bad input, or a run that another process is at work on, before anything is written; RewardError
            during the run, after a checkpoint.
        KeyboardInterrupt: Ctrl-C, after a checkpoint, of which the warm start has none; its message is the command that
            goes on. A subclass of it that a handler of SIGTERM raises is answered alike.
    """
    with ExitStack() as held:  # the run's folder, until the run ends
        return _train(config, resume, accept_changed_inputs, held)


def _train(config: TrainConfig, resume: bool, accept_changed_inputs: bool, held: ExitStack) -> dict:
    if (processes := os.environ.get("WORLD_SIZE") or "1") != "1":
        raise ValueError(
            f"WORLD_SIZE is {processes}: redit-fast train is one process, several are not supported yet; start it "
            "without torchrun"
        )
    saved, run = None, Path(config.out_dir) / str(config.with_name().name)
    if resume:
        if not (run / "config.json").is_file():
            raise ValueError(f"{run} holds no run to resume")
        check_folder = held.enter_context(runs.claimed(run, new=False))
        config, saved = setup.checkpoint_to_resume(config, run)
    elif config.name is not None:
        runs.refuse_taken(run)  # before the model is loaded; setup.claim decides
    device = "cpu" if config.model is None and config.device == "auto" else config.device
    if saved is None and config.model is None:
        model, tokenizer = builtin.build(config.seed)
        own: Any = {"device": policy.device_of(device), "dtype": getattr(torch, config.dtype, None)}
        model.to(**own)
    else:
        model, tokenizer = policy.load(saved or str(config.model), device, config.dtype)
    read = inputs.of(config)  # before they are read: what changes meanwhile is noticed by the next --resume
    if resume:
        read = inputs.checked(read, run, accept_changed=accept_changed_inputs)
    dataset = setup.dataset(config, model, tokenizer)
    functions = rewards.resolve(config.rewards, data.columns_of(dataset.train[:1]))
    loss_config = setup.loss_config(config, model)
    ends = policy.end_tokens(model, tokenizer)
    policy.check_head(model, tokenizer, loss_config)
    if config.checkpoint_activations:
        policy.checkpoint_activations(model)
    why_padded = trial.check(model, tokenizer, dataset, functions, loss_config, config)
    shape, peak = flops.of(model), flops.peak(model)
    optimizer = setup.optimizer(config, model)
    learning_rate = setup.learning_rate(config)
    dither = setup.dither(config, functions)
    reference: Any = setup.reference(config, model, saved)
    keeps_logp = config.updates_per_rollout > 1 or config.gr_pass2_ratio == "pass1"  # of the rollout, in pass 2
    done, position = -1, 0  # steps taken: 0 after the warm start; prompts drawn
    if saved is not None:
        checkpoint.load_optimizer(saved, optimizer)
        done = checkpoint.step_of(saved)
        position = checkpoint.position_of(saved, config.prompts_per_step)
    if not resume:
        config, run, check_folder = setup.claim(config, held)
    checkpoint.remove_drafts(run / "checkpoints")
    (run / "summary.json").unlink(missing_ok=True)  # of the steps before
    runs.replace(run / "inputs.json", json.dumps(read, indent=1) + "\n")
    runs.replace(run / "config.json", json.dumps(dict(config), indent=1) + "\n")
    runs.keep_lines_until(run, done)

    def draft() -> Path:
        check_folder()
        reset = config.reference_reset_every and done >= config.reference_reset_every
        kept = reference if reset else None
        return checkpoint.write(run / "checkpoints", done, model, tokenizer, optimizer, kept, position=position)

    def record(save: bool) -> None:
        """The lines of the step that is done between its checkpoint's draft and its name."""
        check_folder()
        with clock("checkpoint"):
            written = draft() if save else None
        runs.append(run / "completions.jsonl", samples)
        runs.append(run / "metrics.jsonl", [metrics | clock.times()])
        if written is not None:
            publish(written)

    def evaluate() -> dict[str, float]:
        return held_out_metrics(model, tokenizer, ends, dataset.held_out, functions, config)

    def publish(written: Path) -> None:
        published = checkpoint.publish(written)
        if config.keep_checkpoints is not None:
            lines = report.rows(run / "metrics.jsonl")
            accuracy = {line["step"]: line["accuracy/held_out"] for line in lines if "accuracy/held_out" in line}
            checkpoint.prune(published, config.keep_checkpoints, accuracy)

    def evaluates(step: int) -> bool:
        return step == config.steps or step % config.eval_every == 0

    console = Console()
    if dataset.skipped:
        console.print(f"{dataset.skipped} prompts are too long and left out")
    if why_padded is not None and config.packing == "auto":
        console.print(f"rows are padded, not packed: {why_padded}", soft_wrap=True)
    with progress.shown(console) as shown:
        try:
            clock, samples = runs.Clock(), []  # of the step that is done and not yet recorded
            if done < 0:
                with clock("warm_start"):
                    _warm_start(model, tokenizer, config, shown)
                if reference is not None:
                    rf.reset_reference(reference, model)
                with runs.uninterrupted(), clock("checkpoint"):
                    done = 0
                    checkpoint.publish(draft())
            bar: Any = shown.add_task("GRPO", total=config.steps, completed=done, numbers="")
            lines = report.rows(run / "metrics.jsonl")
            if not lines or (evaluates(done) and dataset.held_out and "accuracy/held_out" not in lines[-1]):
                with clock("eval"):
                    metrics = evaluate()
                check_folder()
                runs.complete(run / "metrics.jsonl", done, metrics, clock.times())
                shown.update(bar, advance=0, numbers="", held_out=metrics.get("accuracy/held_out"))
            tokens = lines[-1].get("num_tokens", 0) if lines else 0

            for step in range(done, config.steps):
                clock = runs.Clock()
                drawn = sampling.draw(
                    model, tokenizer, ends, dataset.train, functions, config, step=step, position=position, clock=clock
                )
                with clock("reward"):
                    advantages = rf.group_advantages(
                        drawn.scores,
                        group_size=config.group_size,
                        reward_weights=config.reward_weights,
                        dither=dither,
                        step=step,
                        sample_ids=drawn.ids,
                        scale=config.advantage_scale,
                    )
                values, packed = advantages.values, why_padded is None
                batch = Batch.of(drawn.prompts, drawn.rollout, values, loss_config, config, step, packed=packed)
                if reference is not None:
                    with clock("reference"):
                        batch.score_reference(reference)
                first: Any = None
                updates: list[dict[str, float]] = []
                probed, second_passes = {}, 0
                with ExitStack() as whole:  # from the first optimizer step on, a stop waits for the last
                    for number in range(step * config.updates_per_rollout, (step + 1) * config.updates_per_rollout):
                        with clock("pass1"):
                            one = batch.backward(model, first.logp if first else None)
                        first = first or one
                        if one is first and config.sharpness_every and (step + 1) % config.sharpness_every == 0:
                            with clock("sharpness"):
                                probed = sharpness.probe(model, batch, first, optimizer)
                        for group in optimizer.param_groups:
                            group["lr"] = learning_rate(number)
                        with clock("pass2"):
                            with runs.uninterrupted():
                                perturbation = optimizer.perturb()
                            with perturbation:
                                if perturbation:
                                    second_passes += 1
                                    batch.backward(model, first.logp if keeps_logp else None, masks_of=one)
                        if not updates:
                            whole.enter_context(runs.uninterrupted())
                        with clock("optimizer"):
                            optimizer.step()
                            optimizer.zero_grad()
                        numbers = {"loss": one.loss, **one.metrics, **optimizer.metrics()}
                        updates.append({**numbers, "learning_rate": learning_rate(number)})
                    done = step + 1
                    if config.reference_reset_every and done % config.reference_reset_every == 0:
                        rf.reset_reference(reference, model)
                    position += drawn.drawn
                    samples = completion_lines(done, drawn, functions, advantages)
                    tokens += sum(map(len, batch.sequences))
                    passes = len(updates), second_passes
                    metrics = {
                        "schema": runs.SCHEMA,
                        "step": done,
                        **reward_metrics(functions, drawn, advantages, config),
                        **over_updates(updates),
                        **probed,
                        "num_tokens": tokens,
                        **work_metrics(batch, first, drawn.generated, clock.seconds, passes, shape, peak),
                    }
                if evaluates(done):
                    with clock("eval"):  # can take minutes: a stop cuts it short, and --resume makes up for it
                        metrics |= evaluate()
                with runs.uninterrupted():
                    record(save=done == config.steps or done % config.checkpoint_every == 0)
                    samples = []
                held_out = metrics.get("accuracy/held_out")
                shown.update(bar, advance=1, numbers=progress.numbers(metrics), held_out=held_out)
        except (KeyboardInterrupt, RewardError) as stop:
            with runs.uninterrupted(last=True):
                optimizer.restore()
                if samples:
                    record(save=True)
                elif done >= 0:
                    publish(draft())
                else:
                    check_folder()
                    runs.remove(run)
                shown.stop()
            if isinstance(stop, RewardError):
                raise
            if done < 0:
                words = f"stopped in the warm start, nothing is saved; to start again: {config.command()}"
            else:
                left = f"stopped after step {done} of {config.steps}, saved in {run}"
                words = f"{left}; to go on: {config.resume_command()}"
            stop.args = (words,)
            raise

    with runs.uninterrupted():
        check_folder()
        summary = summary_of(run, dataset, config)
        runs.replace(run / "summary.json", json.dumps(summary, indent=1) + "\n")
        report.write(run)
    progress.print_table(console, run, summary)
    return summary


def _warm_start(model: PreTrainedModel, tokenizer: Tokenizer, config: TrainConfig, shown) -> None:
    if not config.warm_start_steps:
        return
    bar = shown.add_task("warm start", total=config.warm_start_steps, numbers="")

    def advance(_: int, loss: float) -> None:
        shown.update(bar, advance=1, numbers=f"loss {loss:.3f}")

    builtin.warm_start(model, tokenizer, steps=config.warm_start_steps, seed=config.seed, progress=advance)
