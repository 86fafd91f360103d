"""What is drawn of a run: panels of curves over its steps. `curves` puts them into a picture, `svg` into the page."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import cycle
from statistics import fmean
from typing import Literal

from redit_fast.checks import as_float
from redit_fast.training.config import TrainConfig

Colour = Literal["blue", "orange", "green", "purple", "grey"]
REWARD_COLOURS: tuple[Colour, ...] = ("green", "blue", "orange", "purple", "grey")
POINTS = 100  # of a curve, at most: a longer one has the means of as many stretches
COSINE = (0.9, "warning below 0.9")
LARGEST = 1e300  # the difference of two such numbers is finite


@dataclass(frozen=True)
class Curve:
    """A series over the steps, with a band around it where it has one; NaN is a gap. Without a label it is the only one
    of its panel, or has the colour of the one that it belongs to."""

    label: str
    colour: Colour
    steps: list[float]
    values: list[float]
    low: list[float]
    high: list[float]
    dots: bool = False  # a few values, each with its dot
    dashed: bool = False
    thin: bool = False  # one of several that another curve is the mean of

    def last(self) -> float:
        return next((value for value in reversed(self.values) if math.isfinite(value)), math.nan)


@dataclass(frozen=True)
class Panel:
    title: str
    unit: str
    curves: list[Curve]
    bottom: float | None = None  # of the axis, unless a curve goes below it
    top: float | None = None
    mark: tuple[float, str] | None = None  # a level, and what it is

    def limits(self) -> tuple[float, float]:
        """Of the axis; with room above and below what is drawn where the panel does not say where it ends."""
        parts = [part for curve in self.curves for part in (curve.values, curve.low, curve.high)]
        drawn = [value for part in parts for value in part if math.isfinite(value)]
        drawn += [self.mark[0]] if self.mark else []
        low, high = (pick(drawn, default=0.0) for pick in (min, max))
        size = max(abs(low), abs(high))
        flat = high - low < max(1e-9 * size, 1e-200)  # its tick labels would all be one
        room = (size / 10 or 1.0) if flat else 0.06 * (high - low)
        below, above = low - room, high + room
        if self.bottom is not None and low >= self.bottom:
            below = self.bottom
        if self.top is not None and high <= self.top:
            above = self.top
        return below, above


@dataclass(frozen=True)
class Section:
    title: str
    panels: list[Panel]


def of_run(config: TrainConfig, metrics: Sequence[dict]) -> list[Section]:
    """The panels that a run has numbers for.

    Args:
        metrics: its lines, under the names of today's schema.
    """
    sections = []
    for title, panels in (
        ("Rewards", _rewards(config, metrics)),
        ("Policy", _policy(config, metrics)),
        ("Completions and speed", _work(metrics)),
    ):
        if drawn := [panel for panel in panels if panel.curves]:
            sections.append(Section(title, drawn))
    return sections


def _rewards(config: TrainConfig, metrics: Sequence[dict]) -> list[Panel]:
    curve = partial(curve_of, metrics)
    reward = curve("reward", "clean", "blue", around="reward_std")
    deviation = curve("reward_std", "clean", "blue")
    if config.dither_level:
        reward += curve("reward/dithered_mean", "dithered", "orange", dashed=True)
        deviation += curve("reward/dithered_std", "dithered", "orange", dashed=True)
    answers = "greedy" if config.eval_samples == 1 else "sampled"
    held_out = curve("accuracy/held_out", f"held out, {answers}", "green", dots=True)
    accuracy = curve("accuracy/train", "training, sampled", "blue") + held_out
    accuracy += curve("accuracy/held_out_pass_at_k", f"held out, pass@{config.eval_samples}", "orange", dots=True)
    truth = curve("reward", "training reward", "blue") + held_out if held_out else []
    names = dict.fromkeys(
        found[1] for row in metrics for key in row if (found := re.fullmatch("rewards/(.*)/mean", key))
    )
    each = []
    for name, colour in zip(names, cycle(REWARD_COLOURS), strict=False):
        each += curve(f"rewards/{name}/mean", name, colour)
        each += curve(f"rewards/{name}/held_out", "", colour, dots=True, dashed=True)
    return [
        Panel("Reward", "mean ± deviation in a group", reward),
        Panel("Deviation in a group", "of rewards", deviation, bottom=0),
        Panel("Dead groups", "share; equal rewards", curve("frac_reward_zero_std"), bottom=0, top=1),
        Panel("Accuracy", "share correct", accuracy, bottom=0, top=1),
        Panel("Each reward", "mean; dots: held out", each, bottom=0),
        Panel("Reward and truth", "reward; share correct", truth, bottom=0),
    ]


def _policy(config: TrainConfig, metrics: Sequence[dict]) -> list[Panel]:
    curve = partial(curve_of, metrics)
    several = config.updates_per_rollout > 1
    scheduled = config.lr_scheduler_type != "constant"
    norm, most = curve("grad_norm"), config.max_grad_norm or math.inf
    clipped = any(value > most for one in norm for value in [*one.values, *one.high])
    norms = curve("gr/g1_norm", "first", "blue") + curve("gr/g2_norm", "second", "orange", dashed=True)
    return [
        Panel("Loss", "of the first pass", curve("loss")),
        Panel("Entropy", "nats a token", curve("entropy"), bottom=0),
        Panel("KL to the reference", "nats a token", curve("kl"), bottom=0),
        Panel("Importance ratio", "largest distance from 1", curve("ratio/max_abs_dev") if several else [], bottom=0),
        Panel("Clipped tokens", "share", curve("clip_ratio/region_mean") if several else [], bottom=0),
        Panel("Learning rate", "", curve("learning_rate") if scheduled else [], bottom=0),
        Panel(
            "Gradient norm", "before clipping", norm, bottom=0, mark=(most, f"clipped to {most:g}") if clipped else None
        ),
        Panel("Norms of both passes", "at θ and θ + ε g", norms, bottom=0),
        Panel("Perturbation", "cosine, applied to intended", curve("gr/step_cos"), top=1, mark=COSINE),
        Panel("Sharpness", "|H g| / |g|", curve("sharpness/curvature", dots=True), bottom=0),
    ]


def _work(metrics: Sequence[dict]) -> list[Panel]:
    curve = partial(curve_of, metrics)
    length = curve("completions/mean_length", "mean", "blue") + curve("completions/max_length", "longest", "grey")
    tokens = [
        *curve("tokens/generated", "generated", "green"),
        *curve("tokens/useful", "useful", "blue"),
        *curve("tokens/computed", "computed", "orange"),
    ]
    rates = [
        *curve("tokens/per_second_rollout", "rollout", "green"),
        *curve("tokens/per_second_update", "update", "blue"),
    ]
    after_start = [row for row in metrics if row["step"] > 0]  # a warm start takes minutes
    return [
        Panel("Completion length", "tokens", length, bottom=0),
        Panel("Completions cut off", "share", curve("completions/clipped_ratio"), bottom=0, top=1),
        Panel("Tokens of a step", "", tokens, bottom=0),
        Panel("Tokens a second", "", rates, bottom=0),
        Panel("Share of the device's peak", "model FLOPs", curve("flops/share_of_peak"), bottom=0),
        Panel("Time of a step", "seconds", curve_of(after_start, "step_time"), bottom=0),
    ]


def curve_of(
    metrics: Sequence[dict],
    key: str,
    label: str = "",
    colour: Colour = "blue",
    *,
    around: str | None = None,
    dots: bool = False,
    dashed: bool = False,
) -> list[Curve]:
    """The curve of the rows that have `key`, with a band of `around` on either side; none where all are null.

    A curve of more than `POINTS` values has the mean of each stretch, and without `around` a band from the least to the
    greatest in it.
    """
    rows = [row for row in metrics if key in row]
    values = [as_number(row[key]) for row in rows]
    if not any(map(math.isfinite, values)):
        return []
    reach = [as_number(row.get(around)) for row in rows] if around else [0.0] * len(rows)
    size = math.ceil(len(rows) / POINTS)
    steps, means, lows, highs = [], [], [], []
    for start in range(0, len(rows), size):
        part = slice(start, start + size)
        finite = [value for value in values[part] if math.isfinite(value)]
        mean, half = _mean(finite), _mean([r for r in reach[part] if math.isfinite(r)])
        steps.append(fmean(row["step"] for row in rows[part]))
        means.append(mean)
        lows.append(mean - half if around else min(finite, default=math.nan))
        highs.append(mean + half if around else max(finite, default=math.nan))
    banded = around is not None or size > 1
    return [Curve(label, colour, steps, means, lows if banded else [], highs if banded else [], dots, dashed)]


def as_number(value: object) -> float:
    """NaN for null, and for what no axis has room for."""
    number = as_float(value) if isinstance(value, int | float) else math.nan
    return number if abs(number) < LARGEST else math.nan


def _mean(values: list[float]) -> float:
    return fmean(values) if values else math.nan
