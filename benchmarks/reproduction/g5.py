"""G5: attempts owed to GR where it is not better in G3, with the trials that G3's tuning chose: learning rates twice as
high, runs twice as long, a model four times as wide."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from itertools import product

from .claims import Arm, Claim, Comparison, Experiment
from .g3 import HACKED, HIGH, LOW, judged

METHODS = ("GR, fresh", "GR, pass1")
FASTER: Mapping[str, float] = {"learning_rate": 2, "steps": 0.5}
LONGER: Mapping[str, float] = {"steps": 2}
ATTEMPTED = tuple(
    Comparison(gr, other, measure, "sign" if measure == HACKED else "t", role="claim", expected=1)
    for gr, other, measure in product(METHODS, ("none", "KL"), (LOW, HIGH, HACKED))
)
CHECKS = (
    Comparison("none again", "none", HIGH, role="null"),
    Comparison("KL .3, 3e-4", "none, 3e-4", HACKED, "sign", role="effect", expected=1),
)


def attempt(
    task: str, kind: str, seconds: float, of_others: Mapping[str, float], of_gr: Mapping[str, float]
) -> Experiment:
    """The methods of G3's claim, each with the trial that it has there, times factors."""
    home = judged(task)
    arms = [
        Arm(name, home.arm(name).settings, like=name, times=of_gr if name in METHODS else of_others)
        for name in ("none", "KL", *METHODS)
    ]
    return replace(
        home,
        task=f"{task} {kind}",
        arms=tuple(arms),
        comparisons=ATTEMPTED,
        seconds=seconds,
        gate=None,
        tuned=home,
    )


WIDE = attempt("PHRASE", "WIDE", 27, {}, {})
CHECKED = replace(
    WIDE,
    arms=(*WIDE.arms, *map(judged("PHRASE").arm, ("none again", "none, 3e-4", "KL .3, 3e-4"))),
    comparisons=(*WIDE.comparisons, *CHECKS),
)
CLAIM = Claim(
    "G5",
    "Does GR keep the policy from a judge's weakness at higher rates, in longer runs, in a wider model?",
    "GR does in longer, wider runs",
    "as G3, with a learning rate of 5e-6 against 3e-6, 1000 steps, 1.5B parameters",
    (
        "take GR under the conditions of the rows that hold.",
        "as for G3: higher rates, longer runs and a wider model do not change it.",
    ),
    (
        *(attempt(task, "FASTER", 10, {}, FASTER) for task in ("PHRASE", "COPY")),
        *(attempt(task, "LONGER", 25, LONGER, LONGER) for task in ("PHRASE", "COPY")),
        CHECKED,
    ),
    after="G3",
)
