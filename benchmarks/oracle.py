"""What results are compared with: log-probs, and gradients of -mean(A logp), in float64 from the rounded inputs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from .measure import Errors
from .place import Place

ROWS_AT_ONCE = {"cpu": 32, "cuda": 512}  # of float64 logits
SAMPLED = 16  # rows of a gradient that are compared in every round; all are in the first and the last


class Batch(NamedTuple):
    """One of two sets of targets (B, T) and advantages (B,) that take turns, with the log-probs in float64 (B, T)."""

    targets: Tensor
    advantages: Tensor
    exact: Tensor


def draw(place: Place, sequences: int, length: int, vocabulary: int, turn: int) -> tuple[Tensor, Tensor]:
    """Targets (B, T) and an advantage for each sequence (B,)."""
    generator = place.generator(1 + turn)
    targets = torch.randint(vocabulary, (sequences, length), generator=generator, device=place.device)
    return targets, torch.randn(sequences, generator=generator, device=place.device)


def rows_at_once(device: torch.device) -> int:
    return ROWS_AT_ONCE[device.type]


def slices(rows: int, device: torch.device) -> Iterator[slice]:
    step = rows_at_once(device)
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))


def log_probs(logits: Tensor, targets: Tensor) -> Tensor:
    """(rows,) in float64 of logits (rows, V) in float64."""
    return logits.gather(1, targets[:, None]).squeeze(1) - logits.logsumexp(1)


def slopes(logits: Tensor, targets: Tensor, coefficients: Tensor) -> Tensor:
    """(rows, V) in float64: the gradient of sum(coefficients * logp) for logits (rows, V) in float64."""
    found = torch.softmax(logits, 1).neg_()
    found.scatter_add_(1, targets[:, None], torch.ones_like(found[:, :1]))
    return found.mul_(coefficients[:, None])


def coefficients(batch: Batch) -> Tensor:
    """(R,) in float64: the derivative of -mean(A logp) for each row's log-prob."""
    length = batch.targets.shape[1]
    return -batch.advantages.double().repeat_interleave(length) / batch.targets.numel()


def value_error(logp: Tensor | None, batch: Batch) -> float | None:
    if logp is None:
        return None
    return (logp.detach().double().view(batch.exact.shape) - batch.exact).abs().max().item()


def chosen(rows: int, turn: int, thorough: bool, device: torch.device) -> Tensor:
    """Row numbers, in order: all, or some that change with the turn."""
    if thorough or rows <= SAMPLED:
        return torch.arange(rows, device=device)
    return ((torch.arange(SAMPLED) * rows) // SAMPLED + turn % (rows // SAMPLED)).to(device)


class Sums:
    """Squares of errors and of what is exact, added up over rows; and the worst row."""

    def __init__(self) -> None:
        self.wrong = self.square = self.worst = 0.0

    def add(self, found: Tensor, exact: Tensor) -> None:
        """(rows, ...) of the gradient and the same in float64."""
        wrong = (found.double() - exact).flatten(1).square().sum(1)
        square = exact.flatten(1).square().sum(1)
        self.wrong += wrong.sum().item()
        self.square += square.sum().item()
        rows = torch.where(square > 0, wrong / square, wrong)  # an exact row of zeros has to be zeros
        self.worst = _worse(self.worst, rows.max().item() ** 0.5)

    def errors(self, value: float | None) -> Errors:
        return Errors(value, (self.wrong / self.square) ** 0.5, self.worst)


def _worse(a: float, b: float) -> float:
    return b if b != b else max(a, b)


def worst(*errors: Errors) -> Errors:
    """Of several parts of a result."""
    found = []
    for values in zip(*errors, strict=True):
        known = [value for value in values if value is not None]
        found.append(next((v for v in known if v != v), max(known)) if known else None)
    return Errors(*found)
