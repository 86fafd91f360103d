"""What the report of a reward model's run draws and tells: the panels of its curves, and its closing table."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial

from redit_fast.training.report.panels import COSINE, Panel, Section, curve_of
from redit_fast.training.report.summary import duration
from redit_fast.training.reward_model.config import RewardModelConfig


def sections(config: RewardModelConfig, metrics: Sequence[dict]) -> list[Section]:
    """The panels that a run has numbers for."""
    found = [("Pairs", _pairs(metrics)), ("Optimizer and speed", _work(config, metrics))]
    drawn = [Section(title, [panel for panel in panels if panel.curves]) for title, panels in found]
    return [section for section in drawn if section.panels]


def _pairs(metrics: Sequence[dict]) -> list[Panel]:
    def both(name: str) -> list:
        held_out = curve_of(metrics, f"{name}/held_out", "held out", "green", dots=True)
        return curve_of(metrics, f"{name}/train", "training", "blue") + held_out

    return [
        Panel("Accuracy", "share; chosen ahead", both("accuracy"), bottom=0, top=1),
        Panel("Loss", "Bradley-Terry", both("loss"), bottom=0),
        Panel("Margin", "chosen less rejected", both("margin")),
        Panel("Mean reward", "of both texts", both("mean_reward")),
    ]


def _work(config: RewardModelConfig, metrics: Sequence[dict]) -> list[Panel]:
    curve = partial(curve_of, metrics)
    norm, most = curve("grad_norm"), config.max_grad_norm or math.inf
    clipped = any(value > most for one in norm for value in [*one.values, *one.high])
    mark = (most, f"clipped to {most:g}") if clipped else None
    norms = curve("gr/g1_norm", "first", "blue") + curve("gr/g2_norm", "second", "orange", dashed=True)
    tokens = curve("tokens/useful", "useful", "blue") + curve("tokens/computed", "computed", "orange")
    scheduled = config.lr_scheduler_type != "constant"
    after_start = [row for row in metrics if row["step"] > 0]
    return [
        Panel("Gradient norm", "before clipping", norm, bottom=0, mark=mark),
        Panel("Norms of both passes", "at θ and θ + ε g", norms, bottom=0),
        Panel("Perturbation", "cosine, applied to intended", curve("gr/step_cos"), top=1, mark=COSINE),
        Panel("Learning rate", "", curve("learning_rate") if scheduled else [], bottom=0),
        Panel("Tokens of a step", "", tokens, bottom=0),
        Panel("Tokens a second", "", curve("tokens/per_second_update"), bottom=0),
        Panel("Time of a step", "seconds", curve_of(after_start, "step_time"), bottom=0),
    ]


def closing_rows(summary: dict, then: str = "after training") -> list[tuple[str, str]]:
    """The closing table of a run, (what, value), from its summary; what the summary lacks is left out."""

    def known(*names: str) -> bool:
        return all(summary.get(name) is not None for name in names)

    table = []
    if known("accuracy_before", "accuracy_after"):
        table.append(("Accuracy on held-out pairs before training", f"{summary['accuracy_before']:.1%}"))
        table.append((f"Accuracy on held-out pairs {then}", f"{summary['accuracy_after']:.1%}"))
    if known("eval_pairs"):
        table.append(("Held-out pairs", f"{summary['eval_pairs']:,}"))
    if known("steps"):
        table.append(("Steps", f"{summary['steps']:,}"))
    if known("tokens"):
        table.append(("Tokens", f"{summary['tokens']:,}"))
    if known("seconds"):
        table.append(("Time", duration(summary["seconds"])))
    return table
