"""R3: several rewards. Noise on each or on their sum, and under GDPO. At one learning rate, without tuning."""

from __future__ import annotations

from . import hooks
from .claims import Arm, Claim, Comparison, Experiment, Settings
from .r1 import LEARNING, SHARED, SUCCESS

RATE: Settings = {"learning_rate": 1e-4}
THREE = Experiment(
    task="THREE",
    settings={**SHARED, "steps": 400, "max_completion_length": 5},
    arms=(
        Arm("none", RATE),
        Arm("on each", RATE | {"dither_level": hooks.LEVEL}),
        Arm("on the sum", RATE, hook=hooks.on_the_sum),
        Arm("GDPO", RATE, hook=hooks.gdpo(0.0)),
        Arm("GDPO, on each", RATE, hook=hooks.gdpo(hooks.LEVEL)),
        Arm("GDPO, on each, skip", RATE, hook=hooks.gdpo(hooks.LEVEL, "skip")),
        Arm("none again", RATE, other_seed=True),
        Arm("twice the rate", {"learning_rate": 2e-4}),
    ),
    comparisons=(
        Comparison("on each", "none", "mean success", role="claim", expected=1),
        Comparison("on the sum", "on each", "mean success"),
        Comparison("GDPO, on each", "GDPO", "mean success", role="claim", expected=1),
        Comparison("GDPO, on each, skip", "GDPO", "mean success"),
        Comparison("none again", "none", "mean success", role="null"),
        Comparison("twice the rate", "none", "mean success", role="effect", expected=1),
    ),
    objective="mean success",
    seeds=10,
    seconds=18,
    measures=LEARNING,
    curve=SUCCESS,
)
CLAIM = Claim(
    "R3",
    "Does it matter that each of several rewards has its own noise?",
    "noise on each reward helps",
    "noise on every reward, before they are summed",
    (
        "with several rewards switch dithering on, and set `reward_scales`.",
        "with several rewards leave dithering off (`dither_level: 0`).",
    ),
    (THREE,),
)
