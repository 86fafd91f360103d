"""What a run's numbers warn of: a sentence each, and the section of docs/choosing.md that says what to do."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from statistics import fmean
from typing import NamedTuple

from redit_fast.training.config import TrainConfig
from redit_fast.training.report.panels import COSINE, as_number

FEWEST = 10  # steps; of fewer a fifth is one, which is no trend
CUT_OFF, DEAD = 0.1, 0.5  # shares
ENTROPY, LEARNED = 0.1, 0.9  # of the entropy at the beginning; an accuracy at which a low one is what it should be
ERRORS = 2.0  # standard errors that the held-out accuracy must have fallen by


class Finding(NamedTuple):
    sentence: str
    section: str


def of_run(config: TrainConfig, metrics: Sequence[dict], problems: int) -> list[Finding]:
    """Of the last fifth of the steps, some of it beside the first fifth; none of a run of fewer than ten.

    Args:
        metrics: its lines, under the names of today's schema.
        problems: how many are held out.
    """
    steps = [row for row in metrics if row["step"] > 0]
    if len(steps) < FEWEST:
        return []
    size = len(steps) // 5
    first, last = steps[:size], steps[-size:]
    found = [*_of_last(config, last), *_of_both(first, last), *_gamed(metrics, first, last, problems)]
    return [Finding(sentence, f"docs/choosing.md#{anchor}") for sentence, anchor in found]


def _of_last(config: TrainConfig, last: Sequence[dict]) -> Iterator[tuple[str, str]]:
    of = f"in the last {len(last)} steps"
    if (share := _mean(last, "completions/clipped_ratio")) > CUT_OFF:
        yield f"{share:.0%} of the completions {of} were cut off", "completions-that-are-cut-off"
    if (share := _mean(last, "frac_reward_zero_std")) > DEAD:
        trains = config.dither_level and config.dither_dead_groups in ("apply", "only")
        what = "whose advantages are noise" if trains else "which teach nothing"
        yield f"{share:.0%} of the groups {of} had equal rewards, {what}", "dead-groups"
    if (cosine := _mean(last, "gr/step_cos")) < COSINE[0]:
        yield f"rounding turns GR's step: its cosine was {cosine:.2f} {of}", "gamma-and-epsilon"


def _of_both(first: Sequence[dict], last: Sequence[dict]) -> Iterator[tuple[str, str]]:
    before, after, accuracy = _mean(first, "entropy"), _mean(last, "entropy"), _mean(last, "accuracy/train")
    if after < ENTROPY * before and accuracy < LEARNED:
        yield f"entropy fell from {before:.2g} to {after:.2g} nats, with {accuracy:.0%} of the answers right", "entropy"


def _gamed(
    metrics: Sequence[dict], first: Sequence[dict], last: Sequence[dict], problems: int
) -> Iterator[tuple[str, str]]:
    held_out = _numbers(metrics, "accuracy/held_out")
    if not held_out or not problems:
        return
    best, now = max(held_out), held_out[-1]
    error = math.sqrt(max(0.0, best * (1 - best) + now * (1 - now)) / problems)
    if best - now > ERRORS * error and _mean(last, "reward") > _mean(first, "reward"):
        yield (
            f"the reward rose, and the held-out accuracy fell from {best:.1%} to {now:.1%}",
            "the-reward-rises-the-held-out-accuracy-falls",
        )


def _mean(rows: Sequence[dict], key: str) -> float:
    """NaN, with which no comparison holds, where no row has it."""
    values = _numbers(rows, key)
    return fmean(values) if values else math.nan


def _numbers(rows: Sequence[dict], key: str) -> list[float]:
    return [value for row in rows if math.isfinite(value := as_number(row.get(key)))]
