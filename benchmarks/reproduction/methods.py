"""What G2 and G3 compare: plain GRPO, a KL term, Reference Resets, GR by both ratios, SAM. Eight trials each."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product

from .claims import Arm, Settings

RATE = 3e-4
KEPT: Settings = {"gr_epsilon": 1e-3, "gr_keep_first_grad": True}  # so that the penalty ratio is known


def methods(steps: int, gammas: Sequence[float]) -> tuple[Arm, ...]:
    """All go as far, in steps times learning rate, as `steps` at RATE do."""

    def at(rate: float) -> Settings:
        return {"learning_rate": rate, "steps": round(steps * RATE / rate)}

    def both(*knobs: Settings) -> tuple[Settings, ...]:
        """Each at two learning rates."""
        return tuple({**knob, **at(rate)} for knob, rate in product(knobs, (RATE, RATE / 2)))

    rates = [float(f"{2 * RATE / 2 ** (k / 2):.3g}") for k in range(8)]
    resets = tuple(
        {**at(rate), "beta": beta, "reference_reset_every": round(period * RATE / rate)}
        for beta, period, rate in product((0.1, 0.3), (20, 40), (RATE, RATE / 2))
    )
    penalties = both(*({"gr_gamma": gamma} for gamma in gammas))
    return (
        Arm("none", trials=tuple(at(rate) for rate in rates)),
        Arm("KL", trials=both(*({"beta": beta} for beta in (0.03, 0.1, 0.3, 1.0)))),
        Arm("resets", trials=resets),
        Arm("GR, fresh", {**KEPT, "gr_pass2_ratio": "fresh"}, penalties),
        Arm("GR, pass1", {**KEPT, "gr_pass2_ratio": "pass1"}, penalties),
        Arm(
            "SAM",
            {"gr_normalized": True},
            both(*({"gr_gamma": radius, "gr_epsilon": radius} for radius in (0.003, 0.01, 0.03, 0.1))),
        ),
        Arm("none again", like="none", other_seed=True),
        Arm("none, 3e-4", at(RATE)),
    )
