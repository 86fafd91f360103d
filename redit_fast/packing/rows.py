"""The hidden states that predict the completions of a micro-batch, from one pass over its packed rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from redit_fast.packing.attention import Segments
from redit_fast.packing.plan import MicroBatch


def scored_hidden(
    decoder: Callable[..., Any],
    sequences: Sequence[Tensor],
    lengths: Sequence[int],
    micro: MicroBatch,
    device: torch.device,
) -> Tensor:
    """(R, D): the last hidden states that predict the samples' completions, one after the other. Inside `attending`.

    Args:
        sequences: prompt and completion of every sample, on the CPU.
        lengths: of the completions.
    """
    parts = [sequences[segment.sample][segment.start :][: segment.length] for segment in micro.segments]
    counts = [segment.length for segment in micro.segments]
    hidden = decoder(
        torch.cat(parts)[None].to(device),
        position_ids=ranges([segment.start for segment in micro.segments], counts)[None].to(device),
        use_cache=False,
        segments=Segments(micro.segments, device),
    ).last_hidden_state[0]
    ends = torch.tensor([0, *counts], device="cpu").cumsum(0).tolist()
    starts, found = [], []
    for sample, end, leaf in zip(micro.samples, micro.prompt_ends, micro.leaves, strict=True):
        starts += [ends[end + 1] - 1, 0 if leaf is None else ends[leaf]]
        found += [1, lengths[sample] - 1]
    return hidden[ranges(starts, found).to(hidden.device)]


def difference(packed: Tensor, padded: Tensor, rounded: bool) -> str | None:
    """Why two passes' log-probs of the same tokens differ by more than their rounding, or None.

    Args:
        rounded: the pass computes in 16 bits, whose log-probs are off by up to 0.17.
    """
    off = (packed - padded).abs().max().item()
    if off < (0.3 if rounded else 1e-3):
        return None
    return f"the log-probs of packed rows are {off:.2g} off those of padded ones"


def ranges(starts: list[int], counts: list[int]) -> Tensor:
    """(sum of counts,) int64: start, start + 1, ... of each."""
    first, count = torch.tensor([starts, counts], dtype=torch.int64, device="cpu")
    before = count.cumsum(0) - count
    total = sum(counts)
    return torch.arange(total, device="cpu") + (first - before).repeat_interleave(count, output_size=total)
