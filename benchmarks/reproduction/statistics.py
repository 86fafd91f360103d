"""Paired comparisons over seeds: Student's t, the sign test, Holm's correction. In plain Python."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple


class Paired(NamedTuple):
    """Of paired differences: how many, their mean with a 95 % interval, and the two-sided p that it is 0."""

    pairs: int
    mean: float
    low: float
    high: float
    p: float


class Signs(NamedTuple):
    """Of pairs: in how many the first is above, below and level, and the two-sided p that neither is likelier."""

    above: int
    below: int
    level: int
    p: float


def paired(differences: Sequence[float]) -> Paired:
    """By Student's t. Equal differences have an interval of no width, and p 0 unless they are 0.

    Raises:
        ValueError: fewer than two, or one that is not finite.
    """
    count = len(differences)
    if count < 2 or not all(map(math.isfinite, differences)):
        raise ValueError(f"differences must be two finite numbers or more, got {differences}")
    mean = math.fsum(differences) / count
    error = math.sqrt(math.fsum((value - mean) ** 2 for value in differences) / (count - 1) / count)
    if error == 0:
        return Paired(count, mean, mean, mean, 0.0 if mean else 1.0)
    half = t_within(0.95, count - 1) * error
    return Paired(count, mean, mean - half, mean + half, 1 - t_share(abs(mean) / error, count - 1))


def signs(pairs: Sequence[tuple[float | None, float | None]]) -> Signs:
    """Of (first, second); None was never reached, so above every number and level with None. Level pairs do not count
    in p, which is the exact binomial one."""
    values = [tuple(math.inf if value is None else value for value in pair) for pair in pairs]
    above = sum(first > second for first, second in values)
    below = sum(first < second for first, second in values)
    decided = above + below
    tail = sum(math.comb(decided, k) for k in range(min(above, below) + 1)) / 2**decided
    return Signs(above, below, len(pairs) - decided, min(1.0, 2 * tail))


def holm(ps: Sequence[float]) -> list[float]:
    """The p values corrected for their number by Holm's step-down method, in the given order."""
    corrected, most = [0.0] * len(ps), 0.0
    for rank, place in enumerate(sorted(range(len(ps)), key=ps.__getitem__)):
        most = max(most, min(1.0, (len(ps) - rank) * ps[place]))
        corrected[place] = most
    return corrected


def rank_correlation(first: Sequence[float], second: Sequence[float]) -> float | None:
    """Spearman's, equal values having their mean rank; None where one of the two does not vary."""
    a, b = _ranks(first), _ranks(second)
    spread = sum(x * x for x in a) * sum(y * y for y in b)
    return sum(x * y for x, y in zip(a, b, strict=True)) / math.sqrt(spread) if spread else None


def jackknifed(count: int, value_without: Callable[[int | None], float]) -> Paired:
    """The jackknife's mean of a figure of `count` runs, with its interval by Student's t and p, from the values that it
    has without each of them; None: with all."""
    whole = value_without(None)
    return paired([count * whole - (count - 1) * value_without(run) for run in range(count)])


def _ranks(values: Sequence[float]) -> list[float]:
    """From their mean on."""
    ordered, middle = sorted(values), (len(values) - 1) / 2
    return [ordered.index(value) + (ordered.count(value) - 1) / 2 - middle for value in values]


def t_share(t: float, freedom: int) -> float:
    """P(|T| <= t) of Student's t with whole degrees of freedom, by Abramowitz and Stegun 26.7.3 and 26.7.4."""
    angle = math.atan(t / math.sqrt(freedom))
    sine, cosine = math.sin(angle), math.cos(angle)
    odd = freedom % 2
    term, total = (cosine, 0.0) if odd else (1.0, 0.0)
    for k in range(1 + odd, freedom, 2):  # the powers of the cosine are 1, 3, ... or 0, 2, ...
        total += term
        term *= cosine * cosine * k / (k + 1)
    return 2 / math.pi * (angle + sine * total) if odd else sine * total


def t_within(share: float, freedom: int) -> float:
    """The t with P(|T| <= t) = share, by bisection."""
    low, high = 0.0, 1.0
    while t_share(high, freedom) < share:
        high *= 2
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if t_share(middle, freedom) < share else (low, middle)
    return high
