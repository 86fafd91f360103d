"""Where a benchmark runs."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch

Kind = Literal["cpu", "cuda"]


class Place(NamedTuple):
    """`kind` chooses sizes, dtypes and providers, `device` holds the tensors. They differ in a dry run alone: the
    providers of CUDA on CPU tensors."""

    kind: Kind
    device: torch.device

    def generator(self, seed: int) -> torch.Generator:
        return torch.Generator(self.device).manual_seed(seed)


def here(kind: Kind) -> Place:
    return Place(kind, torch.device(kind))
