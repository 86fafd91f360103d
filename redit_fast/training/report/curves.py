"""The picture of a run."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import cycle
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from redit_fast.training.config import TrainConfig

BLUE, ORANGE, GREEN, GREY = "#33658a", "#c8743c", "#4f8a68", "#8b929a"
STYLE: dict[Any, Any] = {
    "font.size": 9,
    "axes.titlesize": 9.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 8,
    "axes.labelcolor": "#4a525a",
    "axes.edgecolor": "#9aa1a8",
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "grid.color": "#e4e7ea",
    "grid.linewidth": 0.8,
    "axes.axisbelow": True,
    "xtick.color": "#4a525a",
    "ytick.color": "#4a525a",
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "lines.linewidth": 1.6,
    "text.parse_math": False,  # a run may be called $x$
}
REWARD_COLOURS = (GREEN, BLUE, ORANGE, "#7d6b91", GREY)
DOTS = (0, (2, 1.5))
MARK = {"color": GREY, "linewidth": 0.9, "linestyle": "--"}
LONG_RUN = 100  # steps from which on curves are smoothed


def draw(config: TrainConfig, metrics: Sequence[dict]) -> Figure:
    """Nine panels over the steps: reward, accuracy, length, gradient norm, perturbation cosine, dead groups, and what
    tells whether the reward is gamed: training reward with true accuracy below the gradient norm, each reward,
    sharpness."""
    figure = Figure(figsize=(11, 8.6))
    # By hand: a layout engine draws everything twice, 0.4 s.
    figure.subplots_adjust(0.075, 0.06, 0.985, 0.965, wspace=0.3, hspace=0.27)
    reward, accuracy, length, norm, cosine, dead, gamed, each, sharp = figure.subplots(3, 3, sharex=True).flat

    _panel(reward, "Reward", "reward, mean \u00b1 std")
    steps, low, high = _band(metrics, "reward", "reward_std")
    reward.fill_between(steps, low, high, color=BLUE, alpha=0.13, linewidth=0)
    _line(reward, metrics, "reward", BLUE, "clean")
    if config.dither_level:
        steps, low, high = _band(metrics, "reward/dithered_mean", "reward/dithered_std")
        for edge in (low, high):
            reward.plot(steps, edge, color=ORANGE, linewidth=0.8, linestyle=DOTS)
        steps, mean = _series(metrics, "reward/dithered_mean")
        reward.plot(steps, _smooth(mean), color=ORANGE, label="dithered", linestyle=DOTS)

    _panel(accuracy, "Accuracy", "share correct")
    _line(accuracy, metrics, "accuracy/train", BLUE, "training, sampled")
    answers = "greedy" if config.eval_samples == 1 else "sampled"
    _line(accuracy, metrics, "accuracy/held_out", GREEN, f"held out, {answers}", marker="o", markersize=4)
    if config.eval_samples > 1:
        passed = f"held out, pass@{config.eval_samples}"
        _line(accuracy, metrics, "accuracy/held_out_pass_at_k", ORANGE, passed, marker="o", markersize=4)
    accuracy.set_ylim(0, 1.02)

    _panel(length, "Completion length", "tokens, mean")
    _line(length, metrics, "completions/mean_length", BLUE)
    length.set_ylim(bottom=0)

    _panel(norm, "Gradient norm", "norm before clipping")
    _line(norm, metrics, "grad_norm", BLUE, "all parameters")
    norm.set_ylim(bottom=0)
    if config.max_grad_norm is not None and any(
        (row.get("grad_norm") or 0.0) > config.max_grad_norm for row in metrics
    ):
        norm.axhline(config.max_grad_norm, label=f"clipped to {config.max_grad_norm:g}", **MARK)

    _panel(cosine, "Applied vs intended perturbation", "cosine")
    if config.gr_gamma:
        _line(cosine, metrics, "gr/step_cos", BLUE)
        cosine.axhline(0.9, **MARK)
        cosine.text(0.98, 0.9015, "warning below 0.9", transform=cosine.get_yaxis_transform(), ha="right", color=GREY)
        cosine.set_ylim(top=1.005)
    else:
        cosine.text(0.5, 0.5, "no perturbation: gr_gamma is 0", transform=cosine.transAxes, ha="center", color=GREY)

    _panel(dead, "Dead groups (equal clean rewards)", "share of groups")
    _line(dead, metrics, "frac_reward_zero_std", BLUE)
    dead.set_ylim(0, 1.02)

    _panel(gamed, "Training reward against the truth", "reward; share correct")
    _line(gamed, metrics, "reward", BLUE, "training reward")
    _line(gamed, metrics, "accuracy/held_out", GREEN, "held-out acc.", marker="o", markersize=4)
    gamed.set_ylim(bottom=min(0.0, gamed.get_ylim()[0]))

    _panel(each, "Each reward (dots: held out)", "mean reward")
    rewards = [key for row in metrics[-1:] for key in row if key.startswith("rewards/") and key.endswith("/mean")]
    for key, colour in zip(rewards, cycle(REWARD_COLOURS), strict=False):
        _line(each, metrics, key, colour, key.split("/", 1)[1].removesuffix("/mean"))
        steps, held_out = _series(metrics, key.removesuffix("mean") + "held_out")
        each.plot(steps, held_out, "o", color=colour, markersize=4)

    _panel(sharp, "Sharpness along the gradient", "|H g| / |g|")
    if config.sharpness_every:
        _line(sharp, metrics, "sharpness/curvature", BLUE, marker="o", markersize=4)
        sharp.set_ylim(bottom=0)
    else:
        sharp.text(0.5, 0.5, "not probed: sharpness_every is 0", transform=sharp.transAxes, ha="center", color=GREY)

    for axes in (gamed, each, sharp):
        axes.set_xlabel("step")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    for axes in (reward, norm, gamed, each, sharp):  # room for the legend
        low, high = axes.get_ylim()
        labels = axes.get_legend_handles_labels()[1]
        columns = 1 if axes is each else 2
        axes.set_ylim(top=high + (high - low) * (1 + math.ceil(len(labels) / columns)) / 12)
        if labels:
            axes.legend(loc="upper left", ncols=columns, columnspacing=1)
    accuracy.legend(loc="best")
    return figure


def _panel(axes: Axes, title: str, label: str) -> None:
    axes.set_title(title)
    axes.set_ylabel(label)


def _series(metrics: Sequence[dict], *keys: str) -> tuple[list[float], ...]:
    """Steps and values of the rows that have all `keys`; null is NaN, a gap in the curve."""
    found = [row for row in metrics if all(key in row for key in keys)]
    values = ([math.nan if row[key] is None else row[key] for row in found] for key in keys)
    return [row["step"] for row in found], *values


def _band(metrics: Sequence[dict], *mean_and_std: str) -> tuple[list[float], ...]:
    """Steps, mean - std and mean + std, smoothed in a long run."""
    steps, mean, std = _series(metrics, *mean_and_std)
    low, high = ([m + side * s for m, s in zip(mean, std, strict=True)] for side in (-1, 1))
    return steps, _smooth(low), _smooth(high)


def _line(axes: Axes, metrics: Sequence[dict], key: str, colour: str, label: str | None = None, **style) -> None:
    """A curve; in a long run smoothed, with the steps themselves faint behind it."""
    steps, values = _series(metrics, key)
    if len(steps) > LONG_RUN:
        axes.plot(steps, values, color=colour, alpha=0.25, linewidth=0.8)
    axes.plot(steps, _smooth(values), color=colour, label=label, **style)


def _smooth(values: list[float]) -> list[float]:
    """The mean of the finite values within an eightieth of a long run; a short one as it is."""
    if len(values) <= LONG_RUN:
        return values
    reach = len(values) // 80
    windows = ([v for v in values[max(0, i - reach) : i + reach + 1] if math.isfinite(v)] for i in range(len(values)))
    return [sum(window) / len(window) if window else math.nan for window in windows]
