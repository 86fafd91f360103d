"""R4: attempts owed to the ReDit paper: its KL term, its schedules, larger groups."""

from __future__ import annotations

from . import hooks
from .claims import Arm, Claim, Comparison, Experiment, Settings
from .r1 import LEARNING, SHARED, SUCCESS

PLACES: dict[str, Settings] = {
    "": {},
    "KL .04": {"beta": 0.04},
    "groups of 16": {"group_size": 16, "prompts_per_step": 4},
    "groups of 32": {"group_size": 32, "prompts_per_step": 2},
}
SCHEDULES = ("cosine_reverse",)
ON: Settings = {"dither_level": hooks.LEVEL}
NOISE = {place: f"gaussian {place}".strip() for place in PLACES}
PLAIN = {place: f"none {place}".strip() for place in PLACES}
TRIALS = tuple({"learning_rate": rate} for rate in (7.5e-5, 1.5e-4, 3e-4, 6e-4))

UNDER = Experiment(
    task="UNDER",
    settings={**SHARED, "steps": 800, "max_completion_length": 6},
    tuning={"steps": 400},
    arms=(
        *(Arm(PLAIN[place], settings, TRIALS) for place, settings in PLACES.items()),
        *(Arm(NOISE[place], settings | ON, TRIALS) for place, settings in PLACES.items()),
        *(Arm(name, {"dither_level": 0.1, "dither_schedule": name}, TRIALS) for name in SCHEDULES),
        Arm("none again", like="none", other_seed=True),
        Arm("rate 1.5e-4", {"learning_rate": 1.5e-4}),
        Arm("rate 3e-4", {"learning_rate": 3e-4}),
    ),
    comparisons=(
        *(Comparison(NOISE[place], PLAIN[place], "mean success", role="claim", expected=1) for place in PLACES),
        *(Comparison(name, "none", "mean success", role="claim", expected=1) for name in SCHEDULES),
        Comparison("none again", "none", "mean success", role="null"),
        Comparison("rate 3e-4", "rate 1.5e-4", "mean success", role="effect", expected=1),
    ),
    measures=LEARNING,
    curve=SUCCESS,
    objective="mean success",
    seeds=10,
    seconds=40,
)
CLAIM = Claim(
    "R4",
    "Do dithered rewards help in a setting nearer to the paper's?",
    "in about a tenth of the steps, with a KL term of 0.04",
    (UNDER,),
)
