"""What the passes over parameters and the optimizer's steps are compared with, in closed form and float64."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from .measure import Wrong

LR, BETAS, EPS, DECAY = 1e-3, (0.9, 0.999), 1e-4, 0.1
ADAMW = {"lr": LR, "betas": BETAS, "eps": EPS, "weight_decay": DECAY}
AT_ONCE = 2**20  # elements in float64
SAMPLED = 2**18


def sign(turn: int) -> float:
    """Of the gradient in that turn: + + - - + + ..., so that old gradients and old momentum give other weights."""
    return 1.0 if turn // 2 % 2 == 0 else -1.0


def pieces(count: int, turn: int, thorough: bool) -> list[slice]:
    """Of so many elements: all, or some that change with the turn."""
    if thorough or count <= SAMPLED:
        return [slice(start, min(start + AT_ONCE, count)) for start in range(0, count, AT_ONCE)]
    start = turn * SAMPLED % (count - SAMPLED)
    return [slice(start, start + SAMPLED)]


def spacing(x: Tensor) -> Tensor:
    """The unit in the last place of each element, in float64."""
    digits = {torch.float32: 24, torch.bfloat16: 8, torch.float16: 11}[x.dtype]
    return torch.exp2((torch.frexp(x.double())[1] - digits).double())


def largest(errors: Iterable[float]) -> float:
    """NaN where one is."""
    known = list(errors)
    return next((error for error in known if error != error), max(known))


class Descent:
    """AdamW with the gradients s_1 g, s_2 g, ..., each s 1 or -1. Its second moment is then g^2 and its first c g with
    a known number c, both after their correction, so that a step is p (1 - lr decay) - lr c g / (|g| + eps)."""

    def __init__(self) -> None:
        self.steps, self.momentum = 0, 0.0

    def advance(self, sign: float) -> None:
        self.steps += 1
        self.momentum = BETAS[0] * self.momentum + (1 - BETAS[0]) * sign

    def error(self, before: Tensor, after: Tensor, gradient: Tensor) -> float:
        """Largest difference from this step's weights, as a share of the learning rate."""
        c = self.momentum / (1 - BETAS[0] ** self.steps)
        wanted = before.double() * (1 - LR * DECAY) - LR * c * gradient / (gradient.abs() + EPS)
        return (after.double() - wanted).abs().max().item() / LR


def check_perturbation(
    before: Sequence[Tensor], after: Sequence[Tensor], grads: Sequence[Tensor], scale: float, exact: bool
) -> None:
    """The step of pass 1 in the weights that were kept: all of scale * grads where `exact`, else (rounded to the
    nearest weight, which loses steps shorter than half a unit) some of it.

    Raises:
        Wrong: the weights did not move along the gradient, or not as far.
    """
    along = length = 0.0
    for p, moved, grad in zip(before, after, grads, strict=True):
        intended = scale * grad.double()
        along += ((moved.double() - p.double()) * intended).sum().item()
        length += intended.square().sum().item()
    gain = along / length
    if not (0.9 if exact else 0.0) < gain < 1.1:
        raise Wrong(f"pass 1 moved the weights by {gain:.2f} of the intended step")
