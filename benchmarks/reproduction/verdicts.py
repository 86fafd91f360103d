"""What the final runs of a claim come to, by the protocol's rules."""

from __future__ import annotations

import math
from statistics import median
from typing import NamedTuple

from . import statistics
from .claims import Claim, Comparison, Experiment
from .statistics import Paired, Signs
from .trials import Runs, Trial, closed

ALPHA = 0.05
LEAST = 10  # pairs of an interval
NEGLIGIBLE = 0.02  # a difference of shares that no user would choose a setting for
MOST_LEFT_OUT = 0.2  # of the pairs


class Row(NamedTuple):
    """A comparison."""

    task: str
    comparison: Comparison
    pairs: int  # of all seeds that have both runs
    left_out: int  # of them, because one of the two never reached what is measured
    middles: tuple[float | None, float | None]  # means of both arms; of times that some runs never reach, medians
    found: Paired | Signs | None  # None: fewer than LEAST pairs
    p: float | None  # Holm's, for a comparison of the claim; of a planted check as it is
    verdict: str


def rows(claim: Claim, runs: Runs) -> list[Row]:
    """Of every comparison, in the claim's order."""
    compared = [
        (experiment, comparison, *_pairs(experiment, comparison, runs))
        for experiment in claim.experiments
        for comparison in experiment.comparisons
    ]
    found = [_found(comparison, pairs) for _, comparison, pairs, _ in compared]
    ps = [None if each is None else each.p for each in found]
    family = [place for place, (_, comparison, _, _) in enumerate(compared) if comparison.role in ("claim", "other")]
    known = [p if (p := ps[place]) is not None else 1.0 for place in family]  # what is not run counts in their number
    for place, p in zip(family, statistics.holm(known), strict=True):
        ps[place] = None if found[place] is None else p
    return [
        Row(
            experiment.task, comparison, len(pairs) + left_out, left_out,
            _middles(experiment, comparison, runs), each, p,
            _verdict(experiment, comparison, each, p, len(pairs), left_out),
        )
        for (experiment, comparison, pairs, left_out), each, p in zip(compared, found, ps, strict=True)
    ]  # fmt: skip


def verdict(claim: Claim, runs: Runs) -> str:
    """Of a claim, from its rows: holds, holds in part, does not hold, cannot be told here, not run."""
    told = [row.verdict for row in deciding(claim, runs)]
    checks = [row for row in _open(claim, runs) if row.comparison.role in ("null", "effect")]
    if not told:
        return "cannot be told here"
    if "not run" in told or any(row.verdict == "not run" for row in checks):
        return "not run"
    if any(row.verdict == "fails" for row in checks):
        return "cannot be told here: a planted check fails"
    if all(each == "holds" for each in told):
        return "holds"
    if "holds" in told:
        return "holds in part"
    return "does not hold" if set(told) <= {"does not hold", "no difference"} else "cannot be told here"


def deciding(claim: Claim, runs: Runs) -> list[Row]:
    """The comparisons that the verdict comes from."""
    return [row for row in _open(claim, runs) if row.comparison.role == "claim"]


def _open(claim: Claim, runs: Runs) -> list[Row]:
    """The rows of the tasks whose gates are not closed."""
    shut = {experiment.task for experiment in claim.experiments if closed(experiment, runs)}
    return [row for row in rows(claim, runs) if row.task not in shut]


def values(experiment: Experiment, arm: str, measure: str, runs: Runs) -> dict[int, float | None]:
    """A measure of an arm's final runs, by seed."""
    keys = {seed: Trial(experiment.task, arm, None, seed, {}).key for seed in range(experiment.seeds)}
    return {seed: runs[key]["measures"].get(measure) for seed, key in keys.items() if key in runs}


def _pairs(
    experiment: Experiment, comparison: Comparison, runs: Runs
) -> tuple[list[tuple[float | None, float | None]], int]:
    """The pairs of the seeds that have both, and how many are left out: for a mean those without a number."""
    first = values(experiment, comparison.arm, comparison.measure, runs)
    second = values(experiment, comparison.against, comparison.measure, runs)
    pairs = [(first[seed], second[seed]) for seed in sorted(first.keys() & second.keys())]
    if comparison.statistic == "sign":
        return pairs, 0
    kept = [pair for pair in pairs if None not in pair]
    return kept, len(pairs) - len(kept)


def _found(comparison: Comparison, pairs: list[tuple[float | None, float | None]]) -> Paired | Signs | None:
    if len(pairs) < LEAST:
        return None
    if comparison.statistic == "sign":
        return statistics.signs(pairs)
    return statistics.paired([first - second for first, second in pairs if first is not None and second is not None])


def _middles(experiment: Experiment, comparison: Comparison, runs: Runs) -> tuple[float | None, float | None]:
    def middle(arm: str) -> float | None:
        found = list(values(experiment, arm, comparison.measure, runs).values())
        known = [value for value in found if value is not None]
        if comparison.statistic == "sign" and len(known) < len(found):
            found_at = median(math.inf if value is None else value for value in found)
            return found_at if found_at < math.inf else None
        return sum(known) / len(known) if known else None

    return middle(comparison.arm), middle(comparison.against)


def _verdict(
    experiment: Experiment, comparison: Comparison, found: Paired | Signs | None, p: float | None, used: int, out: int
) -> str:
    if used + out < experiment.seeds:
        return "not run"
    if found is None or p is None or out > MOST_LEFT_OUT * experiment.seeds:
        return "cannot be told"
    side = found.mean if isinstance(found, Paired) else found.above - found.below
    significant = p < ALPHA
    if comparison.role == "null":
        return "fails" if significant else "passes"
    if comparison.role == "effect":
        return "passes" if significant and side * comparison.expected > 0 else "fails"
    if significant:
        if comparison.expected:
            return "holds" if side * comparison.expected > 0 else "does not hold"
        return "above" if side > 0 else "below"
    small = isinstance(found, Paired) and max(abs(found.low), abs(found.high)) < NEGLIGIBLE
    return "no difference" if small else "cannot be told"
