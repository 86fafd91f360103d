"""epsilon="auto": max(0.001, the smallest power of two whose step keeps cosine 0.95 after rounding), found by
trying."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable

from torch import Tensor

from redit_fast.gr.config import PUBLISHED
from redit_fast.gr.perturbation import step_metrics
from redit_fast.gr.shards import Sums

COSINE = 0.95
LENGTH = 0.02  # the step is at most this share of |theta|
EVERY = 100  # steps from one search to the next


def search(cap: float, attempt: Callable[[float], Sums], across_ranks: Callable[..., list[Tensor]]) -> float | None:
    """Tries every candidate, each rank on its shards, by `attempt`, which returns the sums of `step_metrics`; waits for
    the device. None where g1 or theta is 0 or not finite: there is no cap then."""
    if not 0 < cap < math.inf:
        return None
    tried = candidates(cap)
    rows = [(4, attempt(epsilon)) for epsilon in tried]
    sums = across_ranks(*rows) if rows else []
    cosines = [step_metrics(row, 1)["gr/step_cos"].item() for row in sums]
    return choose(dict(zip(tried, cosines, strict=True)), cap)


def candidates(cap: float) -> list[float]:
    """Powers of two up to `cap`, from the one that is below 0.001; at most 2^20."""
    return [2.0**k for k in range(-10, min(math.floor(math.log2(cap)), 20) + 1)]


def choose(cosines: dict[float, float], cap: float) -> float:
    """From the cosine of every candidate; capped with a warning."""
    kept = [epsilon for epsilon, cosine in cosines.items() if cosine >= COSINE]
    epsilon = max(PUBLISHED, min(kept)) if kept else math.inf
    if epsilon > cap:
        reached = f"the cosine is {max(cosines.values()):.2f} at most" if cosines else "0.001 is past it"
        warnings.warn(
            f"epsilon='auto' stops at {cap:.3g}, where the step is {LENGTH} |theta|: {reached}. Use "
            "rounding='stochastic', or float32 parameters and compute",
            stacklevel=8,
        )
    return min(epsilon, cap)
