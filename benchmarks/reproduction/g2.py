"""G2: a reward model learned from preferences. Is there more gold reward with gradient regularisation?"""

from __future__ import annotations

from itertools import product

from . import curves
from .claims import Arm, Claim, Comparison, Experiment, Gate
from .methods import RATE, methods

LOW, HIGH = (f"gold at proxy {level:g}" for level in curves.DEVIATIONS)
END, NORM = "gold at the end", "gradient norm"
GAMMAS = (0.03, 0.1, 0.3, 1.0)
PLANTED = Arm("KL .1, 3e-4", {"learning_rate": RATE, "steps": 120, "beta": 0.1})

PREFERENCES = Experiment(
    task="PREFERENCES",
    settings={
        "steps": 120, "learning_rate": RATE, "prompts_per_step": 16, "group_size": 8, "max_completion_length": 13,
        "advantage_scale": "none", "sharpness_every": 10, "reward_weights": [1.0, 0.0, 0.0, 0.0],
    },
    arms=(*methods(120, GAMMAS), PLANTED),
    comparisons=(
        *(
            Comparison(gr, other, measure, role="claim", expected=1)
            for gr, other, measure in product(("GR, fresh", "GR, pass1"), ("none", "KL", "resets"), (LOW, HIGH, END))
        ),
        *(Comparison(method, "none", END) for method in ("KL", "resets", "SAM")),
        *(Comparison(method, "none", "wins at the end") for method in ("GR, fresh", "GR, pass1", "KL", "resets")),
        *(Comparison(method, "none", NORM, expected=-1) for method in ("resets", "GR, fresh", "GR, pass1")),
        Comparison("none again", "none", END, role="null"),
        Comparison("KL .1, 3e-4", "none, 3e-4", END, role="effect", expected=1),
    ),
    measures=curves.drifted,
    curve=curves.drifting,
    objective=END,
    seeds=16,
    seconds=17,
    gate=Gate("none", 2, "lost", range(1000, 1010), 9),  # trial 2: at RATE
)  # fmt: skip
CLAIM = Claim(
    "G2",
    "Is GR better than a KL term and resets against a learned reward model?",
    "GR withstands learned rewards",
    "win rate 29.2 % with GR, 27.6 with a KL term, 27.1 with resets (1.5B, AlpacaFarm)",
    (
        "against a learned reward model take GR (`gr_gamma`) in the place of a KL term.",
        "against a learned reward model keep a KL term (`beta`), with Reference Resets (`reference_reset_every`).",
    ),
    (PREFERENCES,),
)
