"""R1: do dithered rewards reach the level of plain GRPO sooner?"""

from __future__ import annotations

from functools import partial

from . import curves
from .claims import Arm, Claim, Comparison, Experiment, Settings

GAUSSIAN: Settings = {"dither_level": 0.05}
METHODS: dict[str, Settings] = {
    "none": {},
    "gaussian": GAUSSIAN,
    "uniform": GAUSSIAN | {"dither_distribution": "uniform"},
    "skip": GAUSSIAN | {"dither_dead_groups": "skip"},
    "center_only": GAUSSIAN | {"dither_dead_groups": "center_only"},
    "only": GAUSSIAN | {"dither_dead_groups": "only"},
    "dynamic sampling": {"dynamic_sampling": 1},
}
SHARED: Settings = {"prompts_per_step": 8, "group_size": 8, "eval_every": 20}
LEARNING, SUCCESS = partial(curves.learning, "right"), partial(curves.success, "right")


def arms(names: tuple[str, ...], rates: tuple[float, ...]) -> tuple[Arm, ...]:
    """Every method at every learning rate."""
    return tuple(Arm(name, METHODS[name], tuple({"learning_rate": rate} for rate in rates)) for name in names)


SOONER = (
    Comparison("gaussian", "none", "mean success", role="claim", expected=1),
    Comparison("uniform", "none", "mean success", role="claim", expected=1),
    Comparison("gaussian", "none", "steps to 50 %", "sign", role="claim", expected=-1),
    Comparison("only", "none", "mean success", expected=1),
    Comparison("skip", "none", "mean success"),
    Comparison("center_only", "none", "mean success"),
    Comparison("dynamic sampling", "none", "mean success"),
    Comparison("none again", "none", "mean success", role="null"),
)
AGAIN = Arm("none again", like="none", other_seed=True)

RARE = Experiment(
    task="RARE",
    settings={**SHARED, "steps": 800, "max_completion_length": 5},
    tuning={"steps": 400},
    arms=(
        *arms(tuple(METHODS), (2e-4, 4e-4, 8e-4, 1e-4)),
        AGAIN,
        Arm("rate 1e-4", {"learning_rate": 1e-4}),
        Arm("rate 2e-4", {"learning_rate": 2e-4}),
    ),
    comparisons=(*SOONER, Comparison("rate 2e-4", "rate 1e-4", "mean success", role="effect", expected=1)),
    objective="mean success",
    seeds=10,
    seconds=34,
    measures=LEARNING,
    curve=SUCCESS,
)
UNDER = Experiment(
    task="UNDER",
    settings={**SHARED, "steps": 800, "max_completion_length": 6},
    tuning={"steps": 400},
    arms=(*arms(tuple(METHODS), (3e-4, 6e-4, 1.2e-3, 1.5e-4, 7.5e-5)), AGAIN),
    comparisons=SOONER,
    objective="mean success",
    seeds=10,
    seconds=40,
    measures=LEARNING,
    curve=SUCCESS,
)
NEEDLE = Experiment(
    task="NEEDLE",
    settings={**SHARED, "steps": 500, "max_completion_length": 5},
    arms=arms(("none", "gaussian", "center_only"), (1e-4, 3e-4, 1e-3, 3e-5)),
    comparisons=(
        Comparison("gaussian", "none", "takes off", "sign", role="claim", expected=1),
        Comparison("center_only", "none", "takes off", "sign"),
    ),
    objective="mean success",
    seeds=30,
    seconds=21,
    measures=LEARNING,
    curve=SUCCESS,
)
CLAIM = Claim(
    "R1",
    "Do dithered rewards reach the level of plain GRPO sooner?",
    "dithering learns sooner",
    "in about a tenth of the steps",
    (
        "switch dithering on (`dither_level: 0.05`) where many groups have equal rewards.",
        "leave dithering off (`dither_level: 0`), or take `dither_dead_groups: skip`, if it makes no difference here.",
    ),
    (RARE, UNDER, NEEDLE),
)
