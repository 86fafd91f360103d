"""The GR paper's central figure, in numbers: does the gradient's norm, or the curvature, tell a reward model's
accuracy?

Both change as a run goes on, so a correlation within runs says little: the step's number has one too. What a
measurement tells beyond it is a partial correlation within runs, and the correlation over runs at the same step.
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
    beyond: Paired | None  # of a run, given the step's number
    more: Paired | None  # the size of the first less that of the second
    at_equal_step: Paired | None  # over runs, the mean over the steps


def told(curves: Sequence[Curve], measured: str, least: int) -> Told:
    """Of an arm's runs, which were probed at the same steps."""
    within = [statistics.rank_correlation(curve[measured], curve[ACCURACY]) for curve in curves]
    step = [statistics.rank_correlation(curve[STEP], curve[ACCURACY]) for curve in curves]
    beyond = [statistics.partial_correlation(curve[measured], curve[ACCURACY], curve[STEP]) for curve in curves]
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
    return Told(mean(within), mean(step), mean(beyond), mean(more), equal)
