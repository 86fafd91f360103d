"""The GR paper's central figure, in numbers: does the gradient's norm, or the curvature, tell a reward model's
accuracy?

Both change as runs go on, so a correlation within runs says little: the step's number has one too. What a measurement
tells beyond it is at equal step: the correlation of a run's deviations from the mean of all runs at each step, and that
over runs. A partial correlation given the step's number would not do: it finds one in any two courses that rise and
fall alike.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from . import statistics
from .claims import Curve
from .statistics import Paired

ACCURACY, STEP = "agrees", "progress"
MEASURED = ("signal", "curvature")


class Told(NamedTuple):
    """Spearman's correlations of a measurement with the accuracy, each a mean with its interval; None where runs that
    have one are fewer than `least`."""

    within: Paired | None  # of a run
    step: Paired | None  # of the step's number, in its place
    more: Paired | None  # the size of the first less that of the second
    deviations: Paired | None  # of a run, from the mean of all at each step
    at_equal_step: Paired | None  # over runs, the mean over the steps


def told(curves: Sequence[Curve], measured: str, least: int) -> Told:
    """Of an arm's runs, which were probed at the same steps."""
    within = [statistics.rank_correlation(curve[measured], curve[ACCURACY]) for curve in curves]
    step = [statistics.rank_correlation(curve[STEP], curve[ACCURACY]) for curve in curves]
    apart = [_deviations([curve[name] for curve in curves]) for name in (measured, ACCURACY)]
    deviations = [statistics.rank_correlation(a, b) for a, b in zip(*apart, strict=True)]
    more = [abs(a) - abs(b) for a, b in zip(within, step, strict=True) if a is not None and b is not None]

    def mean(values: Sequence[float | None]) -> Paired | None:
        known = [value for value in values if value is not None]
        return statistics.paired(known) if len(known) >= least else None

    def over_runs(left_out: int | None) -> float:
        kept = [curve for number, curve in enumerate(curves) if number != left_out]
        columns = zip(*(zip(curve[measured], curve[ACCURACY], strict=True) for curve in kept), strict=True)
        found = [statistics.rank_correlation(*zip(*column, strict=True)) for column in columns]
        known = [value for value in found if value is not None]
        return sum(known) / len(known) if known else 0.0

    equal = statistics.jackknifed(len(curves), over_runs) if len(curves) >= least else None
    return Told(mean(within), mean(step), mean(more), mean(deviations), equal)


def _deviations(runs: Sequence[Sequence[float]]) -> list[list[float]]:
    """Of each run's values from their mean over the runs."""
    means = [sum(column) / len(column) for column in zip(*runs, strict=True)]
    return [[value - mean for value, mean in zip(run, means, strict=True)] for run in runs]
