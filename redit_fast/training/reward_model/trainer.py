"""`redit-fast reward-model`, one page from top to bottom: a reward model from pairs of a better and a worse answer.

    pairs -> pass 1 -> perturb -> pass 2 -> step -> log -> save

The loss is Bradley and Terry's with margin and centring, the optimizer that of `redit-fast train`, GR included. A run's
folder is that of `redit-fast train`, and each of its checkpoints is a folder that `model:PATH` takes as a reward.
"""

from __future__ import annotations

import json
from contextlib import ExitStack
from pathlib import Path

from rich.console import Console

from redit_fast.training import (
    checkpoint,
    data,
    inputs,
    progress,
    report,
    runs,
    setup,
    trackers,
)
from redit_fast.training.distributed import Ranks, launched
from redit_fast.training.report.reward_model import closing_rows
from redit_fast.training.report.summary import environment, totals
from redit_fast.training.reward_model import setup as reward_model_setup
from redit_fast.training.reward_model.batch import PairBatch, held_out_metrics, metrics_of, warn_of_no_number
from redit_fast.training.reward_model.config import RewardModelConfig


def train(config: RewardModelConfig, resume: bool = False, accept_changed_inputs: bool = False) -> dict:
    """Runs or resumes a run and returns its summary; everything it leaves is in out_dir/name.

    Args:
        accept_changed_inputs: to go on with a run whose data or start model has changed since.

    Raises:
        ValueError: bad input, or a run that another process is at work on, before anything is written.
        KeyboardInterrupt: Ctrl-C, after a checkpoint; its message is the command that goes on. A subclass of it that a
            handler of SIGTERM raises is answered alike.
    """
    if launched():
        raise ValueError("redit-fast reward-model is one process: start it without torchrun")
    with ExitStack() as held:  # the run's folder, until it ends
        return _train(config, resume, accept_changed_inputs, held)


def _train(config: RewardModelConfig, resume: bool, accept_changed_inputs: bool, held: ExitStack) -> dict:
    saved: Path | None = None
    if resume:
        config, saved, check_folder = reward_model_setup.resumed(config, held)
    elif config.name is not None:
        runs.refuse_taken(setup.folder_of(config))  # before the model is loaded; claim decides
    read = inputs.of_pairs(config)  # before they are: what changes meanwhile --resume will notice
    if resume:
        read = inputs.checked(read, setup.folder_of(config), accept_changed=accept_changed_inputs)
    parts = reward_model_setup.parts(config, saved)
    model, pairs, packed = parts.model, parts.pairs, parts.why_padded is None
    optimizer = setup.optimizer(config, model)
    if saved is not None:
        checkpoint.load_optimizer(saved, optimizer)
    learning_rate = setup.learning_rate(config)
    done = 0 if saved is None else checkpoint.step_of(saved)
    if not resume:
        config, check_folder = setup.claim(config, held, Ranks())
    run = setup.folder_of(config)

    def draft() -> Path:
        check_folder()
        position = done * config.pairs_per_step
        return checkpoint.write(run / "checkpoints", done, model, parts.tokenizer, optimizer, position=position)

    def publish(written: Path) -> None:
        published = checkpoint.publish(written)
        if config.keep_checkpoints is not None:
            lines = report.rows(run / "metrics.jsonl")
            accuracy = {line["step"]: line["accuracy/held_out"] for line in lines if "accuracy/held_out" in line}
            checkpoint.prune(published, config.keep_checkpoints, accuracy)

    def record(save: bool) -> None:
        """The line of the step that is done between its checkpoint's draft and its name."""
        with clock("checkpoint"):
            written = draft() if save else None
        check_folder()
        runs.append(run / "metrics.jsonl", [line := metrics | clock.times()])
        track(line)
        if written is not None:
            publish(written)

    def evaluates(step: int) -> bool:
        return step == config.steps or step % config.eval_every == 0

    check_folder()
    checkpoint.remove_drafts(run / "checkpoints")
    (run / "summary.json").unlink(missing_ok=True)  # of the steps before
    runs.replace(run / "inputs.json", json.dumps(inputs.completed(read, config), indent=1) + "\n")
    runs.replace(run / "config.json", json.dumps(dict(config), indent=1) + "\n")
    runs.keep_lines_until(run, done, ("metrics.jsonl",))
    console = Console()
    if pairs.skipped:
        console.print(f"{pairs.skipped} pairs have a text that is too long and are left out")
    if parts.why_padded is not None and config.packing == "auto":
        console.print(f"rows are padded, not packed: {parts.why_padded}", soft_wrap=True)
    warned = False  # of a loss that is not finite
    unwritten = False  # whether a step is done whose line is not written
    with progress.shown(console) as shown:
        try:
            evaluations = -(-config.steps // config.eval_every) - done // config.eval_every
            bar = shown.add_task("steps", total=config.steps, completed=done, evaluations=evaluations)
            lines = report.rows(run / "metrics.jsonl")
            completed: dict | None = None  # the line of what is done, where an evaluation was missing
            if not lines or (evaluates(done) and pairs.held_out and "accuracy/held_out" not in lines[-1]):
                clock = runs.Clock()
                with clock("eval"):
                    metrics: dict[str, float] = held_out_metrics(model, pairs.held_out, config, packed=packed)
                check_folder()
                completed = runs.complete(run / "metrics.jsonl", done, metrics, clock.times())
                held_out, took = metrics.get("accuracy/held_out"), clock.seconds["eval"]
                shown.update(bar, advance=0, numbers="", held_out=held_out, evaluation=took)
            track = held.enter_context(trackers.opened(config, run, done, completed, Ranks()))
            tokens = lines[-1].get("num_tokens", 0) if lines else 0

            for step in range(done, config.steps):
                clock = runs.Clock()
                chosen = data.batch(pairs.train, config.seed, step * config.pairs_per_step, config.pairs_per_step)
                batch = PairBatch.of(chosen, config, step, packed=packed)
                with clock("pass1"):
                    rewards, losses = batch.backward(model)
                for group in optimizer.param_groups:
                    group["lr"] = learning_rate(step)
                with clock("pass2"):
                    with runs.uninterrupted():
                        perturbation = optimizer.perturb()
                    with perturbation:
                        if perturbation:
                            batch.backward(model)
                with runs.uninterrupted():
                    with clock("optimizer"):
                        optimizer.step()
                        optimizer.zero_grad()
                    done, unwritten = step + 1, True
                    tokens += batch.useful_tokens
                    seconds = sum(clock.seconds.values())
                    metrics = {
                        "schema": runs.SCHEMA,
                        "step": done,
                        **metrics_of(rewards, losses, "train"),
                        **optimizer.metrics(),
                        "learning_rate": learning_rate(step),
                        "num_tokens": tokens,
                        "tokens/useful": batch.useful_tokens,
                        "tokens/computed": sum(part.micro.tokens for part in batch.parts),
                        "tokens/per_second_update": batch.useful_tokens / seconds,
                    }
                if evaluates(done):
                    with clock("eval"):  # a stop cuts it short, and --resume makes up for it
                        metrics |= held_out_metrics(model, pairs.held_out, config, packed=packed)
                warned = warned or warn_of_no_number(metrics)
                with runs.uninterrupted():
                    record(save=done == config.steps or done % config.checkpoint_every == 0)
                    unwritten = False
                numbers = f"loss {metrics['loss/train']:.3f}, accuracy {metrics['accuracy/train']:.0%}"
                held_out, took = metrics.get("accuracy/held_out"), clock.seconds.get("eval")
                shown.update(bar, advance=1, numbers=numbers, held_out=held_out, evaluation=took)
        except KeyboardInterrupt as stop:
            with runs.uninterrupted(last=True):
                optimizer.restore()
                if unwritten:
                    record(save=True)
                else:
                    publish(draft())
                shown.stop()
            left = f"stopped after step {done} of {config.steps}, saved in {run}"
            stop.args = (f"{left}; to go on: {config.resume_command()}",)
            raise
    with runs.uninterrupted():
        check_folder()
        summary = {
            **totals(report.metrics_of(run)),
            "eval_pairs": len(pairs.held_out),
            "steps": config.steps,
            "tokens": tokens,
            **environment(),
        }
        runs.replace(run / "summary.json", json.dumps(summary, indent=1) + "\n")
        report.write(run)
    progress.print_table(console, run, closing_rows(summary), summary["time"])
    return summary
