"""torch.amp.GradScaler around a step of two passes: perturb(grad_scaler=scaler), scaler.step(optimizer)."""

from __future__ import annotations

import torch
from torch import Tensor

from redit_fast.gr.shards import local


def loss_scale(scaler: torch.amp.GradScaler | None, device: torch.device) -> Tensor | None:
    """What `scaler` multiplies the loss by, () float64 on the device; None where there is none or it is disabled."""
    if scaler is None or not scaler.is_enabled():
        return None
    return scaler.scale(torch.ones((), dtype=torch.float32, device=device)).double()


def leave_a_mark(params: list[Tensor], finite: Tensor) -> None:
    """GradScaler looks for infinities in .grad after both passes, when the first pass's are gone: so the second pass
    adds to zeros in the smallest parameter's, or to infinities where the first pass was not finite."""
    smallest = min(params, key=Tensor.numel)
    smallest.grad = torch.zeros_like(smallest)
    local(smallest.grad).masked_fill_(~finite, torch.inf)


def scale_in_step(optimizer: torch.optim.Optimizer, of_perturb: Tensor | None, perturbed: bool) -> Tensor | None:
    """The scale of the gradients, which scaler.step() sets for the time of its call of step(); the misuses raise."""
    now = getattr(optimizer, "grad_scale", None)
    if of_perturb is not None and now is None:
        raise RuntimeError(
            "perturb() was given a grad_scaler: call scaler.step(optimizer), without scaler.unscale_(optimizer)"
        )
    if perturbed and of_perturb is None and now is not None:
        raise RuntimeError("scaler.step() after perturb() without it: call perturb(grad_scaler=scaler)")
    return None if now is None else now.double()


def forget(optimizer: torch.optim.Optimizer) -> None:
    """scaler.step() does not take back what it set when step() raises, and would multiply the next scale by it."""
    for name in ("grad_scale", "found_inf"):
        vars(optimizer).pop(name, None)
