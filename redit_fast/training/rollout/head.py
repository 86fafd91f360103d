"""A rollout's head on a CPU: its weight is put in oneDNN's layout once a rollout, where `F.linear` does so for every
token. At 32 rows that takes half the time: 6 of 12 ms for a weight of 50257 x 128, 20 of 43 for one of 32000 x 896.
"""

from __future__ import annotations

import platform
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

LEAST_WEIGHTS = 2**20  # of a head: a smaller one stays in the caches, where there is nothing to win
LEAST_TOKENS = 8  # of a rollout: putting it in that layout takes as long as two tokens' heads


@contextmanager
def in_blocks(model: nn.Module, rows: int, tokens: int) -> Iterator[None]:
    """Inside, the head of `model` works on a copy of its weight, for rollouts of so many rows and tokens. Heads that
    are no plain float32 `nn.Linear`, and those of other processors than x86, are left as they are."""
    find: Any = getattr(model, "get_output_embeddings", lambda: None)
    head = find()
    if tokens < LEAST_TOKENS or not _fits(head):
        yield
        return
    blocks = torch.ops.mkldnn._reorder_linear_weight(head.weight, rows)

    def forward(x: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, blocks, head.bias, "none", [], "")

    head.forward = forward
    try:
        yield
    finally:
        del head.forward


def _fits(head: object) -> bool:
    return (
        type(head) is nn.Linear
        and "forward" not in vars(head)
        and head.weight.device.type == "cpu"
        and type(head.weight.data) is Tensor  # not sharded over ranks
        and head.weight.dtype == torch.float32
        and head.weight.numel() >= LEAST_WEIGHTS
        and not torch.is_autocast_enabled("cpu")
        and platform.machine() in ("x86_64", "AMD64")
        and torch.backends.mkldnn.is_available()
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    )
