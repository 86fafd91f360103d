"""`redit-fast eval`: pass@k and mean rewards of a checkpoint on a file of problems, each with a 95 % interval.

pass@k is the unbiased estimator of Chen et al. (2021, arXiv 2107.03374, equation 1): of n answers to a problem c are
right, and 1 - C(n - c, k) / C(n, k) is the chance that one of k of them is. The intervals are over problems, by the
bootstrap: what would vary with another draw of problems from the same source. A problem's own answers are no further
draws of problems, and means of shares near 0 or 1 are not normal.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

import torch
from torch import Tensor

from redit_fast.training import generation, runs
from redit_fast.training.config import TrainConfig
from redit_fast.training.plain_text import aligned, say
from redit_fast.training.report.summary import environment

SHARE = 0.95
RESAMPLES = 2000  # of the problems: another 2000 move an interval's end by 1.5 % of its width
TOGETHER = 2**22  # numbers that are drawn at once


def evaluate(source: str, given: Mapping[str, object], *, samples: int = 1, out: Path | None = None) -> dict:
    """Answers each problem `samples` times, and prints what comes of it.

    Args:
        source, given: as in `generation.generate`. One answer is the most likely one, unless a temperature is given.
        out: a new file for what is returned, as JSON; None writes none.

    Returns:
        "pass@k": {k: ...}, "reward" and "rewards": {name: ...}, with the mean, low and high of each, the latter None
        where they are not known; and what they are of.

    Raises:
        ValueError: one sentence, before anything is written, but RewardError and EngineError.
        OSError: the disk is full; it names the file.
    """
    greedy = samples == 1 and "temperature" not in given
    folder, settings = generation.settings_of("eval", source, given, samples=samples, greedy=greedy)
    if out is not None:
        generation.refuse_taken(out)
    scores: list[Tensor] = []
    lengths: list[int] = []
    cut_off = 0
    with ExitStack() as held:
        job = generation.opened("eval", folder, settings, samples, held)
        file = None if out is None else held.enter_context(generation.new_file(out))
        for call in job.sampled(samples, greedy=greedy):
            scores.append(call.scores)
            lengths += map(len, call.rollout.completions)
            cut_off += call.rollout.finished.count(False)
        names = [function.name for function in job.parts.functions]
        found = {
            "checkpoint": str(folder) if folder.is_dir() else source,
            "data": settings.data,
            "problems": len(job.parts.dataset.train),
            "skipped": job.parts.dataset.skipped,
            "samples": samples,
            "temperature": 0.0 if greedy else settings.temperature,
            "top_p": settings.top_p,
            "seed": settings.seed,
            "max_completion_length": settings.max_completion_length,
            "mean_length": sum(lengths) / len(lengths),
            "cut_off": cut_off / len(lengths),
            **measured(torch.cat(scores).view(-1, samples, len(names)), names, settings),
            **environment(),
        }
        try:
            if out is not None and file is not None:
                with runs.naming(out), runs.uninterrupted():
                    generation.append(file, json.dumps(found) + "\n")
        finally:  # a full disk is no reason to lose them
            say(table(found))
    return found


def measured(scores: Tensor, names: Sequence[str], settings: TrainConfig) -> dict:
    """pass@k and mean rewards of scores (P, n, K), n answers to each of P problems; NaN where one is unscored."""
    samples = scores.shape[1]
    right = (scores[..., 0] > 0).sum(1).tolist()
    weights = scores.new_tensor(settings.reward_weights or [1.0] * len(names))
    totals = torch.where(scores.isnan().all(-1), torch.nan, (scores * weights).nansum(-1))
    columns = {}
    for k in sizes(samples):
        of = {c: pass_at(k, samples, c) for c in set(right)}
        columns[f"pass@{k}"] = scores.new_tensor([of[c] for c in right])
    columns |= {"reward": totals.nanmean(1)}
    columns |= {f"rewards/{name}": column.nanmean(1) for name, column in zip(names, scores.unbind(-1), strict=True)}
    of_problems = torch.stack(list(columns.values()), 1)
    lows, highs = interval(of_problems, settings.seed).tolist()
    numbers = {
        name: {"mean": _known(mean), "low": _known(low), "high": _known(high)}
        for name, mean, low, high in zip(columns, of_problems.nanmean(0).tolist(), lows, highs, strict=True)
    }
    unscored = scores.isnan().sum((0, 1)).tolist()
    return {
        "pass@k": {str(k): numbers[f"pass@{k}"] for k in sizes(samples)},
        "reward": numbers["reward"],
        "rewards": {
            name: numbers[f"rewards/{name}"] | {"unscored": count} for name, count in zip(names, unscored, strict=True)
        },
    }


def sizes(samples: int) -> list[int]:
    """The k of pass@k: the powers of two up to `samples`, and that itself."""
    powers = [2**i for i in range(samples.bit_length())]
    return powers if powers[-1] == samples else [*powers, samples]


def pass_at(k: int, n: int, c: int) -> float:
    """1 - C(n - c, k) / C(n, k): the chance that of k answers, drawn from n of which c are right, one is right."""
    return 1 - math.prod((n - c - i) / (n - i) for i in range(k))


def interval(values: Tensor, seed: int) -> Tensor:
    """(2, M): the ends of the middle `SHARE` of the means of values (P, M) over problems that are drawn anew, with
    replacement; NaN where all are equal, of which no draw shows what other problems would give. A value that is NaN is
    none."""
    problems = len(values)
    known = ~values.isnan()
    filled, there = torch.where(known, values, 0.0), known.to(values.dtype)
    generator = torch.Generator("cpu").manual_seed(seed % 2**63)
    means, together = [], max(1, TOGETHER // problems)
    for start in range(0, RESAMPLES, together):
        shape = min(together, RESAMPLES - start), problems
        drawn = torch.randint(problems, shape, generator=generator, device="cpu")
        counts = values.new_zeros(shape).scatter_add_(1, drawn, values.new_ones(shape))
        means.append((counts @ filled) / (counts @ there))
    ends = values.new_tensor([(1 - SHARE) / 2, (1 + SHARE) / 2])
    equal = torch.where(known, values, -torch.inf).amax(0) <= torch.where(known, values, torch.inf).amin(0)
    return torch.where(equal, torch.nan, torch.cat(means).nanquantile(ends, dim=0))


def _known(value: float) -> float | None:
    return value if math.isfinite(value) else None


def table(found: Mapping) -> str:
    """What `evaluate` returns, for a terminal."""
    samples, problems = found["samples"], found["problems"]
    how = (
        f"{samples} answer{'s' if samples > 1 else ''} each at temperature {found['temperature']:g}"
        if found["temperature"]
        else "greedy"
    )
    rows = [("", "mean", f"{SHARE:.0%} interval", "")]
    for k, numbers in found["pass@k"].items():
        rows.append((f"pass@{k}", *_words(numbers), ""))
    rows.append(("reward", *_words(found["reward"]), ""))
    for name, numbers in found["rewards"].items():
        count = numbers["unscored"]
        rows.append((f"rewards/{name}", *_words(numbers), f"{count} of {problems * samples} unscored" if count else ""))
    lengths = f"{found['mean_length']:.1f} tokens on average, {found['cut_off']:.1%} cut off"
    return f"{problems} problems, {how}; {lengths}\n{aligned(rows)}"


def _words(numbers: Mapping) -> tuple[str, str]:
    mean, low, high = numbers["mean"], numbers["low"], numbers["high"]
    return "none" if mean is None else f"{mean:.4f}", "unknown" if low is None else f"{low:.4f} to {high:.4f}"
