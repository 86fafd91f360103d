"""Model FLOPs: those of a pass's products on its tokens, without padding and without what is computed again.

A weight takes 2 a token in the forward pass, a layer's attention 4 times its width for each pair of a query and a key
that it sees; the backward pass takes twice as many again, for a weight that is not trained as many.
"""

from __future__ import annotations

import re
from typing import NamedTuple

import torch
from torch import nn
from transformers import PreTrainedModel

from redit_fast.training.batch import Batch
from redit_fast.training.policy import head_of

# A second, of bfloat16 and float16 products without sparsity, by the data sheets.
PEAKS = {
    "NVIDIA A100": 312e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H100 NVL": 835e12,
    "NVIDIA H100": 989e12,
    "NVIDIA H200 NVL": 836e12,
    "NVIDIA H200": 989e12,
    "NVIDIA GH200": 989e12,
    "NVIDIA B200": 2250e12,
    "NVIDIA L40S": 362e12,
    "NVIDIA L4": 121e12,
}


class Shape(NamedTuple):
    decoder: int  # weights that a token meets
    head: int  # weights that a scored token meets beside them
    layers: list[tuple[int, int | None]]  # of each (width of the queries, the most keys that one sees)
    frozen: int  # of the decoder's those that are not trained
    frozen_head: int


def of(model: PreTrainedModel) -> Shape | None:
    """None for experts and recurrent layers, which have weights of three dimensions, and for latent attention."""
    body, config = model.get_decoder(), model.config.get_text_config()
    if any(p.ndim > 2 for p in body.parameters()) or getattr(config, "kv_lora_rank", None):
        return None
    linear = [module for module in body.modules() if not isinstance(module, nn.Embedding)]
    weights = [p for module in linear for p in module.parameters(recurse=False) if p.ndim == 2]
    head = head_of(model).weight
    heads = config.num_attention_heads
    width = heads * (getattr(config, "head_dim", None) or config.hidden_size // heads)
    window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    kinds = getattr(config, "layer_types", None) or ["sliding_attention"] * config.num_hidden_layers
    layers = [(width, window if kind == "sliding_attention" else None) for kind in kinds]
    frozen = sum(p.numel() for p in weights if not p.requires_grad)
    decoder = sum(p.numel() for p in weights)
    return Shape(decoder, head.numel(), layers, frozen, 0 if head.requires_grad else head.numel())


def of_pass(shape: Shape, batch: Batch, *, second: bool = False) -> int:
    """Of a first pass over the batch, or of a second one, which leaves out the samples without a gradient; of all ranks
    together."""
    total = 0
    for micro, graph in (each for plan in batch.plans for each in plan):
        if not micro.samples or (second and not graph):
            continue
        spans = [(segment.start, segment.length) for segment in micro.segments]
        spans = spans or [(0, len(batch.sequences[i]) - 1) for i in micro.samples]
        tokens, scored = sum(length for _, length in spans), sum(batch.lengths[i] for i in micro.samples)
        weights = shape.decoder * tokens + shape.head * scored
        if graph:
            total -= 2 * (shape.frozen * tokens + shape.frozen_head * scored)
        windows = {window for _, window in shape.layers}
        seen = {window: sum(_pairs(*span, window) for span in spans) for window in windows}
        attention = sum(2 * width * seen[window] for width, window in shape.layers)
        total += (6 if graph else 2) * (weights + attention)
    return total


def _pairs(start: int, length: int, window: int | None) -> int:
    """Of each of `length` tokens from `start` on, the keys that it sees: those before it and itself, or a window of
    them."""

    def before(end: int) -> int:
        inside = end if window is None else min(end, window)
        return inside * (inside + 1) // 2 + (end - inside) * inside

    return before(start + length) - before(start)


def peak(model: PreTrainedModel) -> float | None:
    """FLOPs a second of the device that the model is on; None where they are not known."""
    if model.device.type != "cuda" or model.dtype not in (torch.bfloat16, torch.float16):
        return None
    name = torch.cuda.get_device_name(model.device)
    known = (most for device, most in PEAKS.items() if re.match(rf"{device}\b", name))
    return None if "MIG" in name else next(known, None)
