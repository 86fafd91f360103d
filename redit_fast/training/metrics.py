"""What a run writes of a step, of an evaluation, and at its end."""

from __future__ import annotations

import warnings
from contextlib import nullcontext
from pathlib import Path

import torch
from torch import Tensor

import redit_fast as rf
from redit_fast.training import data, flops, report, rewards, runs
from redit_fast.training.batch import Batch, Pass
from redit_fast.training.config import TrainConfig
from redit_fast.training.config_values import LOCAL
from redit_fast.training.distributed import Ranks
from redit_fast.training.report.summary import environment, totals
from redit_fast.training.rollout import Engine
from redit_fast.training.sampling import Samples

EVAL_BATCH = 256  # answers that the local engine decodes together, unless one prompt has more
EVAL_STEP = 2**32 - 1  # of the random numbers: no training step has it, and every evaluation has the same
# Mean of |policy - sampler| above which a run warns, in nats. bfloat16 rounding alone gave 0.04 on models of random
# weights, and 1e-6 is what two float32 engines have.
LOGP_DIFFERENCE = 0.1
LAST = {"learning_rate", "gr/epsilon", "gr/skipped_steps"}  # settings and a count so far: no means of them


def held_out_metrics(
    engine: Engine, model, tokenizer, records: list[dict], functions, config: TrainConfig, ranks: Ranks
) -> dict[str, float]:
    """Of `eval_samples` answers, greedy where it is 1: the share whose first reward is above 0, that of problems with
    such an answer (pass@k), and every reward; nothing where none is held out. Each rank answers its share."""
    if not records:
        return {}
    k = config.eval_samples
    own = ranks.share(len(records))
    mine = records[own.start : own.stop]

    def scores_of_mine() -> Tensor:
        return _held_out_scores(engine, tokenizer, mine, own.start, functions, config)

    with nullcontext() if config.server else ranks.whole(model):
        scores = torch.cat(ranks.gathered(scores_of_mine, stoppable=True))
    weights = scores.new_tensor(config.reward_weights or [1.0] * len(functions))
    scored = ~scores.isnan().all(1)
    right = scores[:, 0] > 0
    passed = {"accuracy/held_out_pass_at_k": right.view(-1, k).any(1).double().mean().item()} if k > 1 else {}
    metrics = passed | {
        "accuracy/held_out": right.double().mean().item(),
        "reward/held_out": (scores * weights).nansum(1)[scored].mean().item(),
    }
    for function, column in zip(functions, scores.T, strict=True):
        metrics[f"rewards/{function.name}/held_out"] = column.nanmean().item()
    return metrics


def _held_out_scores(
    engine: Engine, tokenizer, records: list[dict], first: int, functions, config: TrainConfig
) -> Tensor:
    """(n, K): of the answers to some of the held-out records, the place of whose first one among all is `first`."""
    k = config.eval_samples
    parts = [torch.empty(0, len(functions), dtype=torch.float64, device="cpu")]
    together = max(1, EVAL_BATCH // k) if config.rollout == LOCAL else max(1, len(records))
    for start in range(0, len(records), together):
        part = records[start : start + together]
        prompts = [data.render(tokenizer, record, config.system_prompt) for record in part]
        rollout = engine.generate(
            prompts,
            group_size=k,
            max_new_tokens=config.max_completion_length,
            temperature=config.temperature if k > 1 else 0,
            top_p=config.top_p,
            seed=config.seed,
            step=EVAL_STEP,
            sample_ids=torch.arange(k * len(part), device="cpu") + (first + start) * k,
        )
        texts = tokenizer.batch_decode(rollout.completions, skip_special_tokens=True)
        parts.append(rewards.score_texts(functions, [record for record in part for _ in range(k)], texts))
    return torch.cat(parts)


def reward_metrics(functions, samples: Samples, advantages: rf.Advantages, config: TrainConfig) -> dict[str, float]:
    """Clean and dithered rewards, each the mean over samples of the group's mean and deviation; completions, and the
    rounds that they took."""
    rollout, scores = samples.rollout, samples.scores
    metrics: dict[str, float] = {}
    if config.dynamic_sampling:
        metrics = {"sampling/rounds": samples.rounds, "sampling/prompts": samples.drawn}
    metrics |= {
        "reward": advantages.group_mean.mean().item(),
        "reward_std": advantages.group_std.mean().item(),
        "reward/dithered_mean": advantages.dithered_mean.mean().item(),
        "reward/dithered_std": advantages.dithered_std.mean().item(),
    }
    for function, column in zip(functions, scores.T, strict=True):
        metrics[f"rewards/{function.name}/mean"] = column.nanmean().item()
        scored = column[~column.isnan()]
        metrics[f"rewards/{function.name}/std"] = scored.std().item() if len(scored) > 1 else 0.0
        metrics[f"rewards/{function.name}/nan_frac"] = column.isnan().double().mean().item()
    dead, lengths = advantages.dead, [len(completion) for completion in rollout.completions]
    return metrics | {
        "accuracy/train": (scores[:, 0] > 0).double().mean().item(),
        "frac_reward_zero_std": dead.double().mean().item(),
        "adv/rms_dead_groups": advantages.values[dead].square().mean().sqrt().item() if dead.any() else 0.0,
        "completions/mean_length": rollout.tokens / len(lengths),
        "completions/min_length": min(lengths),
        "completions/max_length": max(lengths),
        "completions/clipped_ratio": 1 - sum(rollout.finished) / len(rollout.finished),
    }


def over_updates(each: list[dict[str, float]]) -> dict[str, float]:
    """Of the updates that a step has made: means over those that have the metric, of an extreme the extreme."""
    found = {}
    for name in dict.fromkeys(name for metrics in each for name in metrics):
        values = [metrics[name] for metrics in each if name in metrics]
        if name in LAST:
            found[name] = values[-1]
        elif name.endswith(("_max", "/max", "/max_abs_dev")):
            found[name] = max(values)
        else:
            found[name] = min(values) if name.endswith(("_min", "/min")) else sum(values) / len(values)
    return found


def sampling_metrics(batch: Batch, first: Pass, steps_behind: float | None) -> dict[str, float]:
    """How far the policy's log-probs, those of the first pass, are from the sampler's, and the share of tokens whose
    weight the correction changes; nothing where the sampler gives no log-probs.

    Args:
        steps_behind: of the weights that sampled; None: they never are.
    """
    behind = {} if steps_behind is None else {"sampling/steps_behind": steps_behind}
    if batch.sampling_logp is None:
        return behind
    gap = first.logp.detach().cpu().double() - batch.sampling_logp.double()
    known = gap.isfinite()  # not of masked completions
    gap = torch.where(known, gap, 0.0)
    found = {
        "sampling/sampling_logp_difference/mean": gap.abs().sum() / known.sum().clamp(min=1),
        "sampling/sampling_logp_difference/max": gap.abs().max(),
    }
    if batch.settings.correction != "none":
        if batch.settings.correction.startswith("sequence"):
            lengths = torch.tensor(batch.lengths, device="cpu")
            gap = torch.stack([part.sum() for part in gap.split(batch.lengths)]).repeat_interleave(lengths)
        floor, cap = batch.settings.correction_range
        weight = gap.exp()
        changed = known & ((weight < floor) | (weight > cap))
        found["sampling/frac_corrected"] = changed.sum() / known.sum().clamp(min=1)
    return {name: value.item() for name, value in found.items()} | behind


def warn_of_another_sampler(metrics: dict[str, float], config: TrainConfig) -> bool:
    """Whether the sampler's log-probs are so far from the policy's that it is worth a warning, which this gives."""
    mean = metrics.get("sampling/sampling_logp_difference/mean", 0.0)
    if mean <= LOGP_DIFFERENCE:
        return False
    stale = "a learning rate that is high for samples of older weights, " if config.rollout_ahead else ""
    warnings.warn(
        f"log-probs of the sampler, rollout {config.rollout}, are {mean:.2g} off the policy's on average, where "
        f"rounding makes less than {LOGP_DIFFERENCE:g}; usual causes: {stale}another dtype or a quantised model at the "
        "sampler, another attention, weights that were not synchronised, log-probs of logits that were not divided by "
        "the temperature",
        stacklevel=2,
    )
    return True


def work_metrics(
    batch: Batch,
    generated: int,
    seconds: dict[str, float],
    passes: tuple[int, int],
    shape: flops.Shape | None,
    peak: float | None,
) -> dict[str, float]:
    """Tokens and model FLOPs of a step, and how many a second.

    Args:
        seconds: by phase.
        passes: how many first and second ones the step had.
        peak: FLOPs a second that the device can do.
    """
    in_passes = seconds["pass1"] + seconds["pass2"]
    computed = [sum(micro.tokens for micro, _ in plan) for plan in batch.plans]
    ranks = len(computed)
    found = {
        "tokens/useful": batch.useful_tokens,
        "tokens/computed": sum(computed),
        **({"tokens/rank_max_over_mean": max(computed) * ranks / sum(computed)} if ranks > 1 and any(computed) else {}),
        "tokens/generated": generated,
        "tokens/per_second_rollout": generated / seconds["rollout"],
        "tokens/per_second_update": batch.useful_tokens * passes[0] / (in_passes + seconds["optimizer"]),
    }
    if shape is not None:
        done = passes[0] * flops.of_pass(shape, batch) + passes[1] * flops.of_pass(shape, batch, second=True)
        found["flops/model"] = done
        if peak is not None:
            found["flops/share_of_peak"] = done / in_passes / peak / ranks
    return found


def completion_lines(step: int, samples: Samples, functions, advantages: rf.Advantages) -> list[dict]:
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
        for i, record, text, row, advantage in zip(
            samples.ids.tolist(),
            samples.records,
            samples.texts,
            samples.scores.tolist(),
            advantages.values.tolist(),
            strict=True,
        )
    ]


def summary_of(run: Path, dataset: data.Dataset, config: TrainConfig) -> dict:
    """The whole run's numbers, from its metrics: a resumed run sums over all its parts."""
    return {
        **totals(report.metrics_of(run)),
        "eval_problems": len(dataset.held_out),
        "eval_samples": config.eval_samples,
        "steps": config.steps,
        **environment(),
    }
