"""G4: do GR's published steps act when bfloat16 weights are rounded to nearest? At one setting, without tuning."""

from __future__ import annotations

from . import curves
from .claims import Arm, Claim, Comparison, Experiment, Settings
from .g3 import LOW, judged
from .hooks import masters_cut
from .methods import KEPT

GR: Settings = KEPT | {"gr_gamma": 0.1, "gr_pass2_ratio": "pass1"}
LOWERED: Settings = {"dtype": "bfloat16"}
PHRASE = Experiment(
    task="PHRASE",
    settings=judged("PHRASE").settings,
    arms=(
        Arm("none, float32"),
        Arm("GR, float32", GR),
        Arm("none, bfloat16", LOWERED),
        Arm("GR, nearest", LOWERED | GR | {"gr_rounding": "nearest"}),
        Arm("GR, stochastic", LOWERED | GR | {"gr_rounding": "stochastic"}),
        Arm("none, cut", LOWERED, around=masters_cut),
        Arm("GR, cut", LOWERED | GR | {"gr_rounding": "nearest"}, around=masters_cut),
        Arm("none again", other_seed=True),
    ),
    comparisons=(
        Comparison("GR, nearest", "none, bfloat16", LOW, role="claim", expected=1),
        Comparison("GR, stochastic", "none, bfloat16", LOW, expected=1),
        Comparison("GR, nearest", "GR, stochastic", LOW),
        Comparison("GR, cut", "none, bfloat16", LOW, role="claim", expected=1),
        Comparison("GR, cut", "none, cut", LOW),
        Comparison("none, cut", "none, bfloat16", LOW),
        Comparison("none again", "none, float32", LOW, role="null"),
        Comparison("GR, float32", "none, float32", LOW, role="effect", expected=1),
    ),
    measures=curves.gaming,
    curve=curves.hacking,
    objective="right at the proxies",
    seeds=12,
    seconds=15,
)
CLAIM = Claim(
    "G4",
    "Does GR act where bfloat16 weights are rounded to nearest?",
    "GR acts in rounded bfloat16",
    "all of its results are with such steps",
    (
        "`gr_rounding: nearest` may be kept where another engine rounds so.",
        "in bfloat16 keep `gr_rounding: stochastic`, or take a larger `gr_epsilon`.",
    ),
    (PHRASE,),
)
