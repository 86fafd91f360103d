"""R2: what of dithering acts? At one learning rate, without tuning: no method is to be the best here."""

from __future__ import annotations

from . import hooks
from .claims import Arm, Claim, Comparison, Experiment, Settings
from .r1 import LEARNING, SHARED, SUCCESS

RATE, HIGH = 1e-4, 4e-4
OFF: Settings = {"learning_rate": RATE}
ON: Settings = {"learning_rate": RATE, "dither_level": hooks.LEVEL}
FORGETS: Settings = {"adam_beta2": 0.9}  # of ten gradients, where 0.999 is of a thousand
UNSCALED: Settings = {"advantage_scale": "none"}


def against(arm: str, other: str = "none") -> Comparison:
    return Comparison(arm, other, "mean success")


RARE = Experiment(
    task="RARE",
    settings={**SHARED, "steps": 400, "max_completion_length": 5},
    arms=(
        Arm("none", OFF),
        Arm("level .05", ON),
        Arm("level .001", ON | {"dither_level": 1e-3}),
        Arm("level .5", ON | {"dither_level": 0.5}),
        Arm("level 2", ON | {"dither_level": 2.0}),
        Arm("noise on all", OFF, hook=hooks.noise_on("all")),
        Arm("noise on dead groups", OFF, hook=hooks.noise_on("dead")),
        Arm("off after 100", ON, hook=hooks.until(100)),
        Arm("none, no scale", OFF | UNSCALED),
        Arm("level .05, no scale", ON | UNSCALED),
        Arm("none, high rate", {"learning_rate": HIGH}),
        Arm("level .05, high rate", ON | {"learning_rate": HIGH}),
        Arm("none, beta2 .9", OFF | FORGETS),
        Arm("level .05, beta2 .9", ON | FORGETS),
        Arm("none again", OFF, other_seed=True),
    ),
    comparisons=(
        Comparison("level .05", "none", "mean success", role="claim", expected=1),
        against("level .001", "level .05"),
        against("level .5", "level .05"),
        against("level 2", "level .05"),
        against("noise on all", "level .05"),
        against("noise on dead groups", "level .05"),
        against("off after 100"),
        against("level .05, no scale", "none, no scale"),
        against("level .05, high rate", "none, high rate"),
        against("level .05, beta2 .9", "none, beta2 .9"),
        Comparison("none again", "none", "mean success", role="null"),
        Comparison("none, high rate", "none", "mean success", role="effect", expected=1),
    ),
    objective="mean success",
    seeds=10,
    seconds=17,
    measures=LEARNING,
    curve=SUCCESS,
)
CLAIM = Claim(
    "R2",
    "What acts: the noise in dead groups, the noise in all, its level, its time?",
    "level 0.05 is best",
    "levels around 0.05 are best, larger ones smooth too much",
    (
        "start from `dither_level: 0.05`.",
        "no `dither_level` makes up for the noise that dead groups get; the rows say what it comes from.",
    ),
    (RARE,),
)
