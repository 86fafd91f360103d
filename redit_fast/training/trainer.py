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
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from rich.console import Console
from transformers import PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

import redit_fast as rf
from redit_fast.training import (
    builtin,
    checkpoint,
    distributed,
    inputs,
    lora,
    progress,
    report,
    runs,
    sampling,
    setup,
    sharpness,
    trackers,
)
from redit_fast.training.batch import Batch
from redit_fast.training.config import TrainConfig
from redit_fast.training.distributed import Ranks
from redit_fast.training.metrics import (
    completion_lines,
    held_out_metrics,
    over_updates,
    reward_metrics,
    sampling_metrics,
    summary_of,
    warn_of_another_sampler,
    work_metrics,
)
from redit_fast.training.report.summary import closing_rows
from redit_fast.training.rewards.user_code import RewardError
from redit_fast.training.rollout import EngineError
from redit_fast.training.task import AdvantagesHook, Task, hooked


def train(
    config: TrainConfig,
    resume: bool = False,
    accept_changed_inputs: bool = False,
    *,
    task: Task | None = None,
    advantages_hook: AdvantagesHook | None = None,
) -> dict:
    """Runs or resumes a run and returns its summary; everything it leaves is in out_dir/name.

    Args:
        accept_changed_inputs: to go on with a run whose data, reward modules or start model have changed since.
        task: what is trained in the place of the embedded demo.
        advantages_hook: a step trains on what it makes of the advantages, the same on every rank. A run that goes on
            needs both again.

    Raises:
        ValueError: bad input, or a run that another process is at work on, before anything is written; RewardError
            and EngineError during the run, after a checkpoint.
        KeyboardInterrupt: Ctrl-C, after a checkpoint, of which the warm start has none; its message is the command that
            goes on. A subclass of it that a handler of SIGTERM raises is answered alike.
    """
    if task is not None:
        task.check(config)
    device = setup.device_of(config)
    with distributed.started(config.strategy, device) as ranks, ExitStack() as held:  # the run's folder, until it ends
        return _train(config, resume, accept_changed_inputs, task, advantages_hook, held, ranks, device)


def _train(
    config: TrainConfig,
    resume: bool,
    accept_changed_inputs: bool,
    task: Task | None,
    advantages_hook: AdvantagesHook | None,
    held: ExitStack,
    ranks: Ranks,
    device: str,
) -> dict:
    saved: Path | None = None
    if resume:
        config, saved, check_folder = setup.resumed(config, held, ranks)
    elif config.name is not None:
        ranks.by_first(lambda: runs.refuse_taken(setup.folder_of(config)))  # before the model is loaded; claim decides

    def inputs_now() -> inputs.Inputs:
        now = inputs.of(config, task.name if task else None, hook=advantages_hook is not None)
        if not resume:
            return now
        adapters = config.lora_rank is not None
        return inputs.checked(now, setup.folder_of(config), accept_changed=accept_changed_inputs, adapters=adapters)

    read = ranks.by_first(inputs_now, stoppable=True)  # before they are: what changes meanwhile --resume will notice
    parts = ranks.alone(lambda: setup.parts(config, saved, task), stoppable=True)
    model, tokenizer, dataset, functions = parts.model, parts.tokenizer, parts.dataset, parts.functions
    engine = setup.engine(config, parts, held, ranks)
    source = sampling.Source(engine, model, tokenizer, dataset.train, functions, config, ranks)
    learning_rate, dither = setup.learning_rate(config), setup.dither(config, functions)
    keeps_logp = config.updates_per_rollout > 1 or config.gr_pass2_ratio == "pass1"  # of the rollout, in pass 2
    done, position = -1, 0  # steps taken: 0 after the warm start; prompts drawn
    if saved is not None:
        done = checkpoint.step_of(saved)
        position = checkpoint.position_of(saved, config.prompts_per_step)
    if not resume:
        config, check_folder = setup.claim(config, held, ranks)
    run = setup.folder_of(config)

    def begin() -> None:
        checkpoint.remove_drafts(run / "checkpoints")
        (run / "summary.json").unlink(missing_ok=True)  # of the steps before
        runs.replace(run / "inputs.json", json.dumps(inputs.completed(read, config), indent=1) + "\n")
        runs.replace(run / "config.json", json.dumps(dict(config), indent=1) + "\n")
        runs.keep_lines_until(run, done)

    def draft() -> Path:
        ranks.by_first(check_folder)
        reset = config.reference_reset_every and done >= config.reference_reset_every
        kept = reference if reset else None
        folder = run / "checkpoints"
        return checkpoint.write(
            folder, done, model, tokenizer, optimizer, kept, position=position, base=parts.base, ranks=ranks
        )

    def record(save: bool) -> None:
        """The lines of the step that is done between its checkpoint's draft and its name."""

        def lines() -> None:
            check_folder()
            runs.append(run / "completions.jsonl", samples)
            runs.append(run / "metrics.jsonl", [line := metrics | clock.times()])
            track(line)
            if written is not None:
                publish(written)

        with clock("checkpoint"):
            written = draft() if save else None
        ranks.by_first(lines)

    def evaluate() -> dict[str, float]:
        return held_out_metrics(engine, model, tokenizer, dataset.held_out, functions, config, ranks)

    def publish(written: Path) -> None:
        published = checkpoint.publish(written)
        if config.keep_checkpoints is not None:
            lines = report.rows(run / "metrics.jsonl")
            accuracy = {line["step"]: line["accuracy/held_out"] for line in lines if "accuracy/held_out" in line}
            checkpoint.prune(published, config.keep_checkpoints, accuracy)

    def evaluates(step: int) -> bool:
        return step == config.steps or step % config.eval_every == 0

    ranks.by_first(begin)
    console = Console(quiet=not ranks.first)
    if dataset.skipped:
        console.print(f"{dataset.skipped} prompts are too long and left out")
    if parts.why_padded is not None and config.packing == "auto":
        console.print(f"rows are padded, not packed: {parts.why_padded}", soft_wrap=True)
    optimizer: Any = None
    warned = False  # of the sampler's log-probs
    with progress.shown(console) as shown:
        try:
            clock, samples = runs.Clock(), []  # of the step that is done and not yet recorded
            if done < 0:
                with clock("warm_start"):
                    ranks.alone(lambda: _warm_start(model, tokenizer, config, shown), stoppable=True)
            if config.strategy == "fsdp2":
                model.to("cpu")  # so that no GPU holds a whole reference beside it
            reference: Any = ranks.alone(lambda: setup.reference(config, model, saved), stoppable=True)
            ranks.prepare(model, device)
            if reference is not None and reference is not model:
                ranks.prepare(reference, device)
            optimizer = setup.optimizer(config, model)
            if saved is not None:
                ranks.alone(lambda: checkpoint.load_optimizer(saved, optimizer))
            if done < 0:
                with runs.uninterrupted(), clock("checkpoint"):
                    done = 0
                    written = draft()
                    ranks.by_first(lambda: publish(written))
            evaluations = -(-config.steps // config.eval_every) - done // config.eval_every
            bar = shown.add_task("GRPO", total=config.steps, completed=done, evaluations=evaluations)
            lines = ranks.by_first(lambda: report.rows(run / "metrics.jsonl"))
            completed: dict | None = None  # the line of what is done, where an evaluation was missing
            if not lines or (evaluates(done) and dataset.held_out and "accuracy/held_out" not in lines[-1]):
                with clock("eval"):
                    metrics = evaluate()

                def complete() -> dict:
                    check_folder()
                    return runs.complete(run / "metrics.jsonl", done, metrics, clock.times())

                completed = ranks.by_first(complete)
                held_out, took = metrics.get("accuracy/held_out"), clock.seconds["eval"]
                shown.update(bar, advance=0, numbers="", held_out=held_out, evaluation=took)
            track = held.enter_context(trackers.opened(config, run, done, completed, ranks))
            tokens = lines[-1].get("num_tokens", 0) if lines else 0

            for step in range(done, config.steps):
                clock = runs.Clock()
                drawn = source.draw(step, position, clock)
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
                    if advantages_hook is not None:
                        advantages = hooked(advantages_hook, advantages, drawn, step)
                values, packed = advantages.values, parts.why_padded is None
                batch = Batch.of(
                    drawn.prompts, drawn.rollout, values, parts.loss_config, config, step, packed=packed, ranks=ranks
                )
                if reference is not None:
                    with clock("reference"), lora.switched_off(reference):
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
                                probed = sharpness.probe(model, batch, first, optimizer, config.group_size)
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
                        **sampling_metrics(batch, first, drawn.behind if config.rollout_ahead else None),
                        **probed,
                        "num_tokens": tokens,
                        **work_metrics(batch, drawn.generated, clock.seconds, passes, parts.shape, parts.peak),
                    }
                warned = warned or warn_of_another_sampler(metrics, config)
                source.sync(clock)  # a stop that comes now saves this step
                if evaluates(done):
                    with clock("eval"):  # can take minutes: a stop cuts it short, and --resume makes up for it
                        metrics |= evaluate()
                with runs.uninterrupted():
                    record(save=done == config.steps or done % config.checkpoint_every == 0)
                    samples = []
                held_out, took = metrics.get("accuracy/held_out"), clock.seconds.get("eval")
                shown.update(bar, advance=1, numbers=progress.numbers(metrics), held_out=held_out, evaluation=took)
        except (KeyboardInterrupt, RewardError, EngineError) as stop:
            with runs.uninterrupted(last=True):
                if samples:
                    optimizer.restore()
                    record(save=True)
                elif done < 0:

                    def take_back() -> None:
                        check_folder()
                        runs.remove(run)

                    ranks.by_first(take_back)
                elif optimizer is not None:
                    optimizer.restore()
                    written = draft()
                    ranks.by_first(lambda: publish(written))
                shown.stop()
            if not isinstance(stop, KeyboardInterrupt):
                raise
            if done < 0:
                again = config.command() if task is None else "the same call"
                words = f"stopped in the warm start, nothing is saved; to start again: {again}"
            else:
                left = f"stopped after step {done} of {config.steps}, saved in {run}"
                again = config.resume_command() if task is None else "the same call with resume=True"
                words = f"{left}; to go on: {again}"
            stop.args = (words,)
            raise

    def finish() -> dict:
        check_folder()
        summary = summary_of(run, dataset, config)
        runs.replace(run / "summary.json", json.dumps(summary, indent=1) + "\n")
        if task is None:
            report.write(run)
        return summary

    with runs.uninterrupted():
        summary = ranks.by_first(finish)
    progress.print_table(console, run, closing_rows(summary), summary["time"])
    return summary


def _warm_start(model: PreTrainedModel, tokenizer: Tokenizer, config: TrainConfig, shown) -> None:
    if not config.warm_start_steps:
        return
    bar = shown.add_task("warm start", total=config.warm_start_steps)

    def advance(_: int, loss: float) -> None:
        shown.update(bar, advance=1, numbers=f"loss {loss:.3f}")

    builtin.warm_start(model, tokenizer, steps=config.warm_start_steps, seed=config.seed, progress=advance)
