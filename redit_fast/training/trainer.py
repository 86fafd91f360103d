"""The main job, one page from top to bottom:

    rollout -> reward -> advantage -> pass 1 -> perturb -> pass 2 -> step -> log -> save

What the GR paper compares with is here too, as settings (docs/epsilon.md): a KL term to a reference (`beta`), Reference
Resets (`reference_reset_every`), SAM and the unsquared norm (`gr_normalized`), plain GRPO (`gr_gamma: 0`).

Departures from the two papers: (1) one optimizer step per batch of rollouts, so the importance ratio is 1 in both
passes (`gr_pass2_ratio` keeps pass 1's instead); (2) only the decoder layers are perturbed, as in the GR paper, but the
gradient of everything else is combined too; (3) noise, sampling and rounding are counter-based, so a resumed run is the
same run.
"""

from __future__ import annotations

import copy
import json
import os
import warnings
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor
from transformers import PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

import redit_fast as rf
from redit_fast.training import (
    builtin,
    checkpoint,
    config_file,
    data,
    inputs,
    policy,
    progress,
    report,
    rewards,
    runs,
    sharpness,
    trial,
)
from redit_fast.training.config import TrainConfig, default_of
from redit_fast.training.known_names import under_new_names
from redit_fast.training.report.summary import environment, phases
from redit_fast.training.rewards.user_code import RewardError
from redit_fast.training.rollout.local import Rollout, generate

EVAL_BATCH = 256  # held-out prompts decoded together
MAY_CHANGE = {"steps", "eval_every", "sharpness_every", "checkpoint_every", "keep_checkpoints", "name", "out_dir"}
TRAIN_PROBLEMS = 4000  # of the demo


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
    saved, run = None, Path(config.out_dir) / config.with_name().name
    if resume:
        if not (run / "config.json").is_file():
            raise ValueError(f"{run} holds no run to resume")
        check_folder = held.enter_context(runs.claimed(run, new=False))
        config, saved = _checkpoint_to_resume(config, run)
    elif config.name is not None:
        runs.refuse_taken(run)  # before the model is loaded; _claim decides
    if saved is None and config.model is None:
        model, tokenizer = builtin.build(config.seed)
    else:
        model, tokenizer = policy.load(saved or config.model)
    read = inputs.of(config)  # before they are read: what changes meanwhile is noticed by the next --resume
    if resume:
        read = inputs.checked(read, run, accept_changed=accept_changed_inputs)
    dataset = _load_data(config, model, tokenizer)
    functions = rewards.resolve(config.rewards, data.columns_of(dataset.train[:1]))
    loss_config = rf.LossConfig(
        config.loss_type,
        epsilon_low=config.clip_low,
        epsilon_high=config.clip_high,
        temperature=config.temperature,
        cispo_bound="relative" if config.loss_type == "cispo" else "absolute",  # TRL's would scale a ratio of 1 to 0.2
        dro_beta=config.dro_beta,
        beta=config.beta,
        max_completion_length=config.max_completion_length,
        **rf.logit_transforms(model.config),
    )
    ends = policy.end_tokens(model, tokenizer)
    policy.check_head(model, tokenizer, loss_config)
    trial.check(model, tokenizer, dataset, functions, loss_config, config)
    optimizer = rf.RegularizedAdamW(
        rf.parameter_groups(model, perturb="decoder_layers"),
        lr=config.learning_rate,
        weight_decay=config.weight_decay,
        gamma=config.gr_gamma,
        epsilon=config.gr_epsilon,
        normalized=config.gr_normalized,
        max_norm=config.max_grad_norm,
        seed=config.seed,
    )
    dither = rf.Dither(
        config.dither_distribution,
        config.dither_level,
        [function.scale for function in functions],
        config.dither_schedule,
        total_steps=config.steps,
        dead_groups=config.dither_dead_groups,
        seed=config.seed,
    )
    reference = _reference(config, model, saved)
    done = -1  # steps taken: 0 after the warm start
    if saved is not None:
        checkpoint.load_optimizer(saved, optimizer)
        done = checkpoint.step_of(saved)
    if not resume:
        config, run, check_folder = _claim(config, held)
    checkpoint.remove_drafts(run / "checkpoints")
    (run / "summary.json").unlink(missing_ok=True)  # of the steps before
    runs.replace(run / "inputs.json", json.dumps(read, indent=1) + "\n")
    runs.replace(run / "config.json", json.dumps(dict(config), indent=1) + "\n")
    runs.keep_lines_until(run, done)

    def draft() -> Path:
        check_folder()
        reset = config.reference_reset_every and done >= config.reference_reset_every
        return checkpoint.write(
            run / "checkpoints", done, model, tokenizer, optimizer, reference=reference if reset else None
        )

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
        return _held_out_metrics(model, tokenizer, ends, dataset.held_out, functions, config)

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
            bar = shown.add_task("GRPO", total=config.steps, completed=done, numbers="")
            lines = report.rows(run / "metrics.jsonl")
            if not lines or (evaluates(done) and dataset.held_out and "accuracy/held_out" not in lines[-1]):
                with clock("eval"):
                    metrics = evaluate()
                check_folder()
                runs.complete(run / "metrics.jsonl", done, metrics, clock.times())
                shown.update(bar, advance=0, numbers="", held_out=metrics.get("accuracy/held_out"))

            for step in range(done, config.steps):
                clock = runs.Clock()
                with clock("rollout"):
                    records = data.batch(dataset.train, config.seed, step, config.prompts_per_step)
                    prompts = [data.render(tokenizer, record, config.system_prompt) for record in records]
                    rollout = generate(
                        model,
                        ends,
                        prompts,
                        group_size=config.group_size,
                        max_new_tokens=config.max_completion_length,
                        temperature=config.temperature,
                        seed=config.seed,
                        step=step,
                    )
                with clock("reward"):
                    records = [record for record in records for _ in range(config.group_size)]
                    texts = tokenizer.batch_decode(rollout.completions, skip_special_tokens=True)
                    scores = rewards.score_texts(functions, records, texts)
                    advantages = rf.group_advantages(
                        scores,
                        group_size=config.group_size,
                        reward_weights=config.reward_weights,
                        dither=dither,
                        step=step,
                        scale=config.advantage_scale,
                    )
                batch = policy.Batch.of(prompts, rollout, advantages.values, loss_config, config, step)
                if reference is not None:
                    with clock("reference"):
                        batch.score_reference(reference)
                with clock("pass1"):
                    first = batch.backward(model)
                probed = {}
                if config.sharpness_every and (step + 1) % config.sharpness_every == 0:
                    with clock("sharpness"):
                        probed = sharpness.probe(model, batch, first, optimizer)
                with clock("pass2"):
                    with runs.uninterrupted():
                        perturbation = optimizer.perturb()
                    with perturbation:
                        if perturbation:
                            old_logp = first.logp if config.gr_pass2_ratio == "pass1" else None
                            batch.backward(model, old_logp, masks_of=first)
                with runs.uninterrupted():
                    with clock("optimizer"):
                        optimizer.step()
                        optimizer.zero_grad()
                    done = step + 1
                    if config.reference_reset_every and done % config.reference_reset_every == 0:
                        rf.reset_reference(reference, model)
                    samples = _completion_lines(done, records, texts, functions, scores, advantages)
                    metrics = {
                        "schema": runs.SCHEMA,
                        "step": done,
                        "loss": first.loss,
                        **_reward_metrics(functions, scores, advantages, rollout),
                        **first.metrics,
                        **optimizer.metrics(),
                        **probed,
                        "learning_rate": optimizer.param_groups[0]["lr"],
                        "tokens/generated": rollout.tokens,
                        "tokens/per_second": rollout.tokens / clock.seconds["rollout"],
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
        summary = _summary(run, dataset, config)
        runs.replace(run / "summary.json", json.dumps(summary, indent=1) + "\n")
        report.write(run)
    progress.print_table(console, run, summary)
    return summary


def _claim(config: TrainConfig, held: ExitStack) -> tuple[TrainConfig, Path, Callable[[], None]]:
    """The config with a name, its folder, held, and the check that it still is; where the config has no name, with the
    first that no other start takes."""
    while True:
        named = config.with_name()
        run = Path(named.out_dir) / named.name
        try:
            return named, run, held.enter_context(runs.claimed(run, new=True))
        except runs.TakenError:
            if config.name is not None:
                raise


def _checkpoint_to_resume(config: TrainConfig, run: Path) -> tuple[TrainConfig, Path | None]:
    """The newest checkpoint, None where the run stopped before its first; the settings must be the run's.

    A run of version 0.1 kept all checkpoints, and does so still unless it is told otherwise.
    """
    before = {name: default_of(name, config.model is None) for name in TrainConfig.model_fields}  # older runs lack some
    before |= (stored := under_new_names(config_file.read(run / "config.json")[0]))
    for name, value in config:
        if name not in MAY_CHANGE and value != before[name]:
            raise ValueError(f"{name} was {before[name]!r} in {run} and cannot become {value!r} on --resume")
    if config.steps != before["steps"] and config.dither_schedule.endswith("_reverse"):
        raise ValueError(
            f"steps was {before['steps']} in {run} and cannot become {config.steps} on --resume: dither_schedule "
            f"{config.dither_schedule} counts back from the last step"
        )
    if not {"keep_checkpoints"} & (stored.keys() | config.model_fields_set):
        config = config.model_copy(update={"keep_checkpoints": None})
    folder = run / "checkpoints"
    return config, checkpoint.newest(folder) if checkpoint.in_order(folder) else None


def _reference(config: TrainConfig, model: PreTrainedModel, saved: Path | None) -> PreTrainedModel | None:
    """The KL term's reference, a copy of the model before RL or of the policy at the last reset; None without one."""
    if not config.beta:
        return None
    if config.gr_gamma:
        warnings.warn(
            f"beta is {config.beta:g} and gr_gamma {config.gr_gamma:g}: a KL term and gradient regularisation are both "
            "on, where the GR paper's runs have one of them; gr_gamma 0 or beta 0 takes one away",
            stacklevel=3,
        )
    reference = copy.deepcopy(model).requires_grad_(False)
    if saved is not None and not checkpoint.load_reference(saved, reference):
        rf.reset_reference(reference, policy.load(checkpoint.start_of(saved))[0])
    return reference


def _load_data(config: TrainConfig, model: PreTrainedModel, tokenizer: Tokenizer) -> data.Dataset:
    if config.model is None:
        return data.Dataset(
            train=builtin.records(TRAIN_PROBLEMS, held_out=False, seed=config.seed),
            held_out=builtin.records(config.eval_problems, held_out=True, seed=config.seed),
        )
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return data.load(config, tokenizer, context, model.get_input_embeddings().weight.shape[0])


def _warm_start(model: PreTrainedModel, tokenizer: Tokenizer, config: TrainConfig, shown) -> None:
    if not config.warm_start_steps:
        return
    bar = shown.add_task("warm start", total=config.warm_start_steps, numbers="")

    def advance(_: int, loss: float) -> None:
        shown.update(bar, advance=1, numbers=f"loss {loss:.3f}")

    builtin.warm_start(model, tokenizer, steps=config.warm_start_steps, seed=config.seed, progress=advance)


def _held_out_metrics(model, tokenizer, ends, records: list[dict], functions, config: TrainConfig) -> dict[str, float]:
    """Of greedy answers: the share whose first reward is above 0, and every reward; nothing where none is held out."""
    if not records:
        return {}
    parts = []
    for start in range(0, len(records), EVAL_BATCH):
        part = records[start : start + EVAL_BATCH]
        prompts = [data.render(tokenizer, record, config.system_prompt) for record in part]
        rollout = generate(model, ends, prompts, max_new_tokens=config.max_completion_length, temperature=0)
        texts = tokenizer.batch_decode(rollout.completions, skip_special_tokens=True)
        parts.append(rewards.score_texts(functions, part, texts))
    scores = torch.cat(parts)
    weights = scores.new_tensor(config.reward_weights or [1.0] * len(functions))
    scored = ~scores.isnan().all(1)
    metrics = {
        "accuracy/held_out": (scores[:, 0] > 0).double().mean().item(),
        "reward/held_out": (scores * weights).nansum(1)[scored].mean().item(),
    }
    for function, column in zip(functions, scores.T, strict=True):
        metrics[f"rewards/{function.name}/held_out"] = column.nanmean().item()
    return metrics


def _reward_metrics(functions, scores: Tensor, advantages: rf.Advantages, rollout: Rollout) -> dict[str, float]:
    """Clean and dithered rewards, each the mean over samples of the group's mean and deviation."""
    metrics = {
        "reward/raw_mean": advantages.group_mean.mean().item(),
        "reward/raw_std": advantages.group_std.mean().item(),
        "reward/dithered_mean": advantages.dithered_mean.mean().item(),
        "reward/dithered_std": advantages.dithered_std.mean().item(),
    }
    for function, column in zip(functions, scores.T, strict=True):
        metrics[f"rewards/{function.name}/mean"] = column.nanmean().item()
        metrics[f"rewards/{function.name}/nan_frac"] = column.isnan().double().mean().item()
    dead = advantages.dead
    return metrics | {
        "accuracy/train": (scores[:, 0] > 0).double().mean().item(),
        "frac_reward_zero_std": dead.double().mean().item(),
        "adv/rms_dead_groups": advantages.values[dead].square().mean().sqrt().item() if dead.any() else 0.0,
        "completions/mean_length": rollout.tokens / len(rollout.completions),
        "completions/clipped_frac": 1 - sum(rollout.finished) / len(rollout.finished),
    }


def _completion_lines(step: int, records, texts, functions, scores: Tensor, advantages: rf.Advantages) -> list[dict]:
    return [
        {
            "schema": runs.SCHEMA,
            "step": step,
            "sample": i,
            "prompt": data.text_of(record["prompt"]),
            "completion": text,
            "rewards": {function.name: value for function, value in zip(functions, row, strict=True)},
            "advantage": advantage,
        }
        for i, (record, text, row, advantage) in enumerate(
            zip(records, texts, scores.tolist(), advantages.values.tolist(), strict=True)
        )
    ]


def _summary(run: Path, dataset: data.Dataset, config: TrainConfig) -> dict:
    """The whole run's numbers, from its metrics: a resumed run sums over all its parts."""
    lines = report.rows(run / "metrics.jsonl")
    accuracy = [line["accuracy/held_out"] for line in lines if "accuracy/held_out" in line]
    times = dict(phases(lines, {}))
    tokens = sum(line.get("tokens/generated", 0) for line in lines)
    return {
        "accuracy_before": accuracy[0] if accuracy else None,
        "accuracy_after": accuracy[-1] if accuracy else None,
        "eval_problems": len(dataset.held_out),
        "steps": config.steps,
        "tokens_generated": tokens,
        "tokens_per_second": tokens / times["rollout"],
        "seconds": sum(times.values()),
        "time": times,
        **environment(),
    }
