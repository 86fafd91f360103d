"""R4: attempts owed to the ReDit paper: its KL term, its schedules, larger groups, its rewards, LoRA."""

from __future__ import annotations

from dataclasses import replace

from . import hooks
from .claims import Arm, Claim, Comparison, Experiment, Settings
from .five import LENIENT, STRICT
from .r1 import LEARNING, SHARED, SUCCESS

PLACES: dict[str, Settings] = {
    "": {},
    "KL .04": {"beta": 0.04},
    "groups of 16": {"group_size": 16, "prompts_per_step": 4},
}
SCHEDULES = ("cosine_reverse",)
ON: Settings = {"dither_level": hooks.LEVEL}
NOISE = {place: f"gaussian {place}".strip() for place in PLACES}
PLAIN = {place: f"none {place}".strip() for place in PLACES}


def rates(*each: float) -> tuple[Settings, ...]:
    return tuple({"learning_rate": rate} for rate in each)


TRIALS = rates(7.5e-5, 1.5e-4, 3e-4, 6e-4)
UNDER = Experiment(
    task="UNDER",
    settings={**SHARED, "steps": 400, "max_completion_length": 6},
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
    seconds=17,
)
ANSWERS: Settings = {**SHARED, "steps": 300, "max_completion_length": 14}
PAID, EASILY = {"reward_weights": STRICT}, {"reward_weights": LENIENT}
FIVE = Experiment(
    task="FIVE",
    settings=ANSWERS,
    arms=(
        Arm("none", PAID, TRIALS),
        Arm("gaussian", PAID | ON, TRIALS),
        Arm("none, lenient", EASILY, TRIALS),
        Arm("gaussian, lenient", EASILY | ON, TRIALS),
        Arm("none again", PAID, like="none", other_seed=True),
    ),
    comparisons=(
        Comparison("gaussian", "none", "mean success", role="claim", expected=1),
        Comparison("gaussian, lenient", "none", "mean success", expected=1),  # as the public code has it
        Comparison("none, lenient", "none", "mean success"),
        Comparison("gaussian, lenient", "none, lenient", "mean success", expected=1),
        Comparison("none again", "none", "mean success", role="null"),
    ),
    measures=LEARNING,
    curve=SUCCESS,
    objective="mean success",
    seeds=10,
    seconds=18,
)
LORA_TRIALS = rates(1e-4, 3e-4, 1e-3, 3e-3)
ADAPTED: Settings = {"lora_rank": 8, "lora_alpha": 64, "reward_weights": STRICT}
LORA = replace(
    FIVE,
    task="FIVE WIDE",
    settings=ANSWERS | ADAPTED,
    arms=(
        Arm("none", {}, LORA_TRIALS),
        Arm("gaussian", ON, LORA_TRIALS),
        Arm("none again", like="none", other_seed=True),
    ),
    comparisons=(
        Comparison("gaussian", "none", "mean success", role="claim", expected=1),
        Comparison("none again", "none", "mean success", role="null"),
    ),
    seconds=28,
)
CLAIM = Claim(
    "R4",
    "Do dithered rewards help in a setting nearer to the paper's?",
    "dithering helps in its paper's settings",
    "in about a tenth of the steps, with a KL term of 0.04",
    (
        "take the paper's setting with dithering: `dither_level: 0.05` and what the rows name that hold.",
        "the paper's KL term, schedules, groups, rewards and LoRA are no reason to switch dithering on.",
    ),
    (UNDER, FIVE, LORA),
)
