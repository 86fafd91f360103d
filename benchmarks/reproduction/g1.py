"""G1: rules. Half a point for the format: does plain GRPO take it and lose the answer, and does GR not?"""

from __future__ import annotations

from dataclasses import replace
from itertools import product

from .claims import Claim, Comparison
from .g3 import END, HACKED, judged

FORMAT = replace(
    judged("FORMAT"),
    objective=END,
    comparisons=(
        *(
            Comparison(gr, other, END, role="claim", expected=1)
            for gr, other in product(("GR, fresh", "GR, pass1"), ("none", "KL"))
        ),
        Comparison("none again", "none", END, role="null"),
        Comparison("KL .3, 3e-4", "none, 3e-4", HACKED, "sign", role="effect", expected=1),
    ),
)
CLAIM = Claim(
    "G1",
    "Does GR keep correctness where a format is paid for?",
    "GR withstands format rewards",
    "a higher accuracy and a slightly lower format reward (GSM8K)",
    (
        "beside a reward for the format take GR (`gr_gamma`).",
        "a reward for the format is no reason for GR: lower its weight (`reward_weights`).",
    ),
    (FORMAT,),
)
