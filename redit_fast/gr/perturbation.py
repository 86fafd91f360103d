"""The step theta -> theta + delta: its launch, its metrics as the forward pass sees it, and the warning when rounding
swallows it.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from types import TracebackType

import torch
from torch import Tensor

from redit_fast.backends import primitive, reference
from redit_fast.gr import shards
from redit_fast.gr.config import GR, Rounding

LOW_PRECISION = (torch.bfloat16, torch.float16)


class Perturbation:
    """What `perturb()` returns: true when a second pass is wanted; as a context manager it restores on any
    exception."""

    def __init__(self, restore: Callable[[], None], wanted: bool):
        self._restore, self._wanted = restore, wanted

    def __bool__(self) -> bool:
        return self._wanted

    def __enter__(self) -> Perturbation:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            self._restore()


def move(
    params: list[Tensor],
    trainable: list[Tensor],
    step: Tensor,
    fold: float,
    gr: GR,
    seed: int,
    completed: Tensor,
) -> shards.Sums:
    """Parameters += step .grad, then .grad *= fold; this rank's sums (4,) of `step_metrics`. The stochastic
    rounding counts elements in the concatenation of all `trainable` parameters, of which `params` are some."""
    offsets, total = {}, 0
    for p in trainable:
        offsets[p], total = total, total + p.numel()

    def launch(out: Tensor, members: list[Tensor]) -> None:
        runs: list = []
        for p in members:
            exact = gr.rounding == "stochastic" and p.dtype in LOW_PRECISION
            runs += shards.pieces(p, offsets[p], exact)
        weights, grads, begins = map(list, zip(*runs, strict=True))
        primitive(reference.perturb, out.device)(
            out, weights, grads, begins, step, fold, gr.rounding, seed, completed, gr.compute_dtype
        )

    return shards.summed(params, 4, launch)


def drop_stale(params: list[Tensor]) -> None:
    """Drops what the next forward pass would use in place of `params`: casts of autocast, gathered shards of FSDP2."""
    torch.clear_autocast_cache()
    shards.drop_gathered(params)


def step_metrics(sums: Tensor, count: int) -> dict[str, Tensor]:
    """From (4,) <applied, intended>, |applied|^2, |intended|^2 and the number of weights moved, of `count`."""
    dot, applied, intended, moved = sums
    return {
        "gr/step_gain": dot / intended,
        "gr/step_cos": dot / (applied * intended).sqrt(),
        "gr/step_norm_ratio": (applied / intended).sqrt(),
        "gr/frac_moved": moved / count,
    }


def warn_if_swallowed(metrics: dict[str, float], epsilon: float, rounding: Rounding) -> None:
    cosine = metrics.get("gr/step_cos", 1.0)
    nothing = metrics.get("gr/step_norm_ratio") == 0  # the cosine is NaN then
    if cosine < 0.9 or nothing:
        found = (
            "nothing of the perturbation is applied"
            if nothing
            else f"the applied perturbation has cosine {cosine:.2f} with the intended one"
        )
        stochastic = "rounding='stochastic', " if rounding == "nearest" else ""
        warnings.warn(
            f"{found}: rounding swallows it. Use a larger epsilon than {epsilon:.3g}, epsilon='auto', "
            f"{stochastic}or float32 parameters and compute",
            stacklevel=4,
        )
