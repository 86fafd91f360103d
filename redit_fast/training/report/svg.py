"""A panel as the shapes of an SVG drawing, whose colours are the page's."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import groupby

from redit_fast.training.report.panels import Curve, Panel

WIDTH, HEIGHT = 340, 190
LEFT, RIGHT, TOP, BOTTOM = 42, 8, 6, 20  # margins, for the numbers at the axes


@dataclass(frozen=True)
class Line:
    curve: Curve
    line: str  # paths
    band: str
    dots: list[tuple[float, float]]
    last: str


@dataclass(frozen=True)
class Drawing:
    panel: Panel
    lines: list[Line]
    columns: list[tuple[float, str]]  # x of a step's number, and that
    rows: list[tuple[float, str]]  # y of a level's
    mark: float | None  # y


def drawing(panel: Panel, steps: int) -> Drawing:
    """A panel over the steps from 0 to `steps`."""
    right, (low, high) = max(1, steps), panel.limits()

    def x(step: float) -> float:
        return round(LEFT + (WIDTH - LEFT - RIGHT) * step / right, 1)

    def y(value: float) -> float:
        return round(TOP + (HEIGHT - TOP - BOTTOM) * (high - value) / (high - low), 1)

    def line(curve: Curve) -> Line:
        runs = _runs(curve.steps, curve.values)
        bands = zip(_runs(curve.steps, curve.low), _runs(curve.steps, curve.high), strict=True)
        return Line(
            curve,
            " ".join(_path([(x(s), y(v)) for s, v in run]) for run in runs),
            " ".join(_path([(x(s), y(v)) for s, v in [*above, *reversed(below)]]) + "z" for below, above in bands),
            [(x(s), y(v)) for run in runs for s, v in run if curve.dots or len(run) == 1],
            number(curve.last(), digits=3),
        )

    return Drawing(
        panel,
        [line(curve) for curve in panel.curves],
        [(x(step), number(step)) for step in ticks(0, right, 5) if step == int(step)],
        [(y(level), number(level)) for level in ticks(low, high, 5)],
        y(panel.mark[0]) if panel.mark else None,
    )


def ticks(low: float, high: float, most: int) -> list[float]:
    """At most `most` + 1 round numbers in a range, a power of ten times 1, 2 or 5 apart."""
    rough = (high - low) / most
    power = 10.0 ** math.floor(math.log10(rough))
    gap = power * next(step for step in (1, 2, 5, 10) if step * power >= rough * (1 - 1e-9))
    first, last = math.ceil(low / gap - 1e-9), math.floor(high / gap + 1e-9)
    return [i * gap for i in range(first, last + 1)]


def number(value: float, digits: int = 6) -> str:
    """In few characters: 0.125, 12.5k, 3M."""
    size, unit = abs(value), ""
    if 999.5 <= size < 999500:
        value, unit = value / 1e3, "k"
    elif 999500 <= size < 9.995e8:
        value, unit = value / 1e6, "M"
    return f"{value:.{digits}g}{unit}".replace("-", "\N{MINUS SIGN}")


def _runs(steps: list[float], values: list[float]) -> list[list[tuple[float, float]]]:
    """The points between the gaps of a curve."""
    pairs: Iterable = zip(steps, values, strict=False)
    return [list(run) for finite, run in groupby(pairs, lambda pair: math.isfinite(pair[1])) if finite]


def _path(points: list[tuple[float, float]]) -> str:
    return "M" + " ".join(f"{x:g} {y:g}" for x, y in points)  # further points are lines
