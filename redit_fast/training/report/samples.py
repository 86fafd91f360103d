"""Completions that a report shows: the best and the worst of a few steps."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

STEPS = 4  # the first, the last and those a third of the way apart
COMPLETION, PROMPT, LINES = 1000, 400, 20  # characters and lines of a long text's end; its beginning has twice as many


class SampleError(ValueError):
    """A line is not that of a sample."""


class Text(NamedTuple):
    """A text, of a long one its two ends."""

    beginning: str
    left_out: int  # characters
    end: str

    @classmethod
    def of(cls, whole: str, size: int) -> Text:
        beginning = "\n".join(whole[: 2 * size].split("\n")[: 2 * LINES])
        rest = whole[len(beginning) :]
        end = "\n".join(rest[-size:].split("\n")[-LINES:])
        return cls(beginning, len(rest) - len(end), end)


@dataclass(frozen=True)
class Sample:
    number: int  # among all of its step
    total: float  # the weighted sum of its rewards
    rewards: dict[str, float | None]
    advantage: float | None
    prompt: Text
    completion: Text


@dataclass
class Step:
    step: int
    count: int
    best: Sample
    worst: Sample


def chosen(lines: Iterable[dict], weights: list[float]) -> list[Step]:
    """Some steps of a run, from its completions; no others are held in memory.

    Args:
        weights: of the reward functions.

    Raises:
        SampleError: a line lacks something.
    """
    steps: dict[int, Step] = {}
    for line in lines:
        sample = _sample(line, weights)
        step = steps.setdefault(line["step"], Step(line["step"], 0, sample, sample))
        step.count += 1
        if sample.total > step.best.total:
            step.best = sample
        if sample.total < step.worst.total:
            step.worst = sample
    all_steps = list(steps.values())
    places = [round(i * (len(all_steps) - 1) / (STEPS - 1)) for i in range(STEPS)] if all_steps else []
    return [all_steps[place] for place in sorted(set(places))]


def _sample(line: dict, weights: list[float]) -> Sample:
    try:
        rewards, advantage = line["rewards"], line["advantage"]
        if not all(value is None or isinstance(value, int | float) for value in (*rewards.values(), advantage)):
            raise TypeError
        total = sum(w * r for w, r in zip(weights, rewards.values(), strict=True) if r is not None)
        texts = Text.of(line["prompt"].strip(), PROMPT), Text.of(line["completion"], COMPLETION)
        return Sample(line["sample"], total, rewards, advantage, *texts)
    except (AttributeError, KeyError, TypeError, ValueError):
        raise SampleError(f"a sample of step {line['step']} lacks its texts, its advantage or a reward") from None
