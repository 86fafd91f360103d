"""The attention of packed rows: each segment's queries see its path from the root and, causally, its own tokens.

It is one function in transformers' AttentionInterface, `redit_fast`, to which no mask belongs. On the CPU
it is SDPA a segment; on a GPU one call of a kernel for rows of many lengths (`varlen.py`).
"""

# ruff: noqa: E402  what is not installed is said before it is imported

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from redit_fast.extras import need

need("transformers", "redit_fast.packing.attention")

from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from redit_fast.packing import varlen
from redit_fast.packing.plan import Segment

NAME = "redit_fast"
DECODING = "redit_fast_decoding"  # SDPA whose mask is always made: transformers asks the device whether it hides any
CHECKPOINT = "_gradient_checkpointing_func"  # of a layer: torch's, by which transformers calls its forward
KINDS = {"full_attention", "sliding_attention"}  # of layers whose state is their keys and values


class UnpackableError(NotImplementedError):
    """The model has something that this attention does not do; one sentence."""


class Segments:
    """The segments of a micro-batch, as the decoder hands them to its layers' attention.

    Attributes:
        lengths: of the queries.
        paths: of each segment the places of those from the root down to itself.
        keys: how many each has.
    """

    def __init__(self, segments: Sequence[Segment], device: torch.device) -> None:
        self.device = device
        self.lengths = [segment.length for segment in segments]
        self.paths: list[tuple[int, ...]] = []
        self.keys: list[int] = []
        for place, segment in enumerate(segments):
            above = () if segment.parent is None else self.paths[segment.parent]
            self.paths.append((*above, place))
            self.keys.append(segment.start + segment.length)
        self._masks: dict[tuple[int | None, torch.dtype], Tensor] = {}
        self._bounds: tuple[Tensor, Tensor] | None = None
        self._index: Tensor | None = None

    @property
    def shared(self) -> bool:
        return any(len(path) > 1 for path in self.paths)

    def mask(self, queries: int, keys: int, window: int | None, dtype: torch.dtype) -> Tensor:
        """(queries, keys): 0 where a query sees a key, else -inf; a view of one of the longest path."""
        if (window, dtype) not in self._masks:
            longest = max(self.keys)
            seen = torch.ones(longest, longest, dtype=torch.bool, device=self.device).tril()
            if window is not None:
                seen &= ~torch.ones_like(seen).tril(-window)
            mask = torch.zeros(longest, longest, dtype=dtype, device=self.device)
            self._masks[window, dtype] = mask.masked_fill_(~seen, float("-inf"))
        return self._masks[window, dtype][keys - queries : keys, :keys]

    def bounds(self) -> tuple[Tensor, Tensor]:
        """int32: where the queries, and the gathered keys, of each segment begin, and where the last ones end."""
        if self._bounds is None:
            queries, keys = ([0, *counts] for counts in (self.lengths, self.keys))
            both = torch.tensor([queries, keys], dtype=torch.int32, device="cpu").cumsum(1, dtype=torch.int32)
            self._bounds = tuple(both.to(self.device, non_blocking=True))
        return self._bounds

    def index(self) -> Tensor:
        """int64: the rows of the keys of all segments, one path after the other."""
        if self._index is None:
            starts = torch.tensor([0, *self.lengths], device="cpu").cumsum(0).tolist()
            rows = [torch.arange(starts[i], starts[i + 1], device="cpu") for path in self.paths for i in path]
            self._index = torch.cat(rows).to(self.device, non_blocking=True)
        return self._index


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None = None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    segments: Segments | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """What a layer calls with query (1, H, T, D), key and value (1, K, T, D) and the decoder's `segments`.

    Returns:
        (1, T, H, D), and no weights.

    Raises:
        UnpackableError: something that it does not do, by name.
    """
    if segments is None:
        raise UnpackableError("its layers do not hand the decoder's arguments to their attention")
    if others.get("s_aux") is not None:
        raise UnpackableError("its attention has sinks")
    if others.get("position_bias") is not None:
        raise UnpackableError("its attention adds a bias to the scores")
    if attention_mask is not None:
        raise UnpackableError("its layers make a mask of their own")
    if dropout:
        raise UnpackableError("its attention has dropout")
    if len(query) != 1 or query.shape[2] != sum(segments.lengths):
        raise UnpackableError("its attention is of other tokens than those that the decoder is given")
    if sliding_window is None and _has_window(module):
        raise UnpackableError("its layers do not hand their window to their attention")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    attend = by_kernel if query.device.type == "cuda" else by_segment
    return attend(query, key, value, segments, scale, sliding_window, softcap), None


def by_segment(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    segments: Segments,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> Tensor:
    """(1, T, H, D) from (1, H, T, D)."""
    q, k, v = (part.split(segments.lengths, 2) for part in (query, key, value))  # whose backward pass is one copy
    parts: list[Tensor] = []
    for place, path in enumerate(segments.paths):
        ks, vs = (p[place] if len(path) == 1 else torch.cat([p[i] for i in path], 2) for p in (k, v))
        parts.append(_sdpa(q[place], ks, vs, segments, scale, window, softcap))
    return torch.cat(parts, 2).transpose(1, 2)


def by_kernel(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    segments: Segments,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> Tensor:
    """The same in one call, from keys and values that are gathered for each segment where some share theirs."""
    queries, keys, values = (part[0].transpose(0, 1) for part in (query, key, value))
    if torch.is_autocast_enabled(query.device.type):  # rotary embeddings in float32 have undone it
        dtype = torch.get_autocast_dtype(query.device.type)
        queries, keys, values = (part.to(dtype) for part in (queries, keys, values))
    if segments.shared:  # by indexing, whose backward pass adds up in a fixed order
        keys, values = keys[segments.index()], values[segments.index()]
    counts = max(segments.lengths), max(segments.keys)
    try:
        return varlen.attend(queries, keys, values, segments.bounds(), counts, scale, window, softcap)[None]
    except NotImplementedError as error:
        raise UnpackableError(str(error)) from None


def _has_window(layer: Any) -> bool:
    """By its model's config: a short row would not tell that it is missing."""
    config = getattr(layer, "config", None)
    kinds, place = getattr(config, "layer_types", None), getattr(layer, "layer_idx", None)
    sliding = kinds is None or place is None or kinds[place] == "sliding_attention"
    return sliding and getattr(config, "sliding_window", None) is not None


def _sdpa(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    segments: Segments,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> Tensor:
    queries, keys = query.shape[2], key.shape[2]
    if window is not None and window >= keys:
        window = None
    if softcap is not None:
        groups = query.shape[1] // key.shape[1]
        key, value = (part.repeat_interleave(groups, 1) for part in (key, value))
        scores = softcap * torch.tanh(query @ key.transpose(2, 3) * (scale / softcap))
        scores = scores + segments.mask(queries, keys, window, query.dtype)
        return torch.softmax(scores, -1, dtype=torch.float32).to(query.dtype) @ value
    above = keys - queries
    # SDPA's own causal mask is aligned to the first token, and the CPU's kernel skips half of the pairs under it. Where
    # the path is shorter than the segment, queries of 0 for it cost less than that saves.
    whole = window is None and (above == 0 or above < queries and query.device.type == "cpu")
    mask = None if whole or queries == 1 and window is None else segments.mask(queries, keys, window, query.dtype)
    query = F.pad(query, (0, 0, above, 0)) if whole and above else query
    out = F.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, is_causal=whole, scale=scale, enable_gqa=query.shape[1] != key.shape[1]
    )
    return out[:, :, above:] if whole else out


def _always_masked(*args: Any, **options: Any) -> Tensor | None:
    return sdpa_mask(*args, **{**options, "allow_is_causal_skip": False})


AttentionInterface.register(NAME, attention)
AttentionInterface.register(DECODING, sdpa_attention_forward)
AttentionMaskInterface.register(DECODING, _always_masked)


def refusal(model: PreTrainedModel) -> str | None:
    """Why the model cannot have this attention, as far as its class and settings tell."""
    if not model._can_set_attn_implementation():
        return "its layers do not take their attention from transformers' registry"
    kinds = set(getattr(model.config.get_text_config(), "layer_types", None) or ()) - KINDS
    if kinds or getattr(model, "_is_stateful", False):
        of_kind = f", in its layers of kind {', '.join(sorted(kinds))}" if kinds else ""
        return f"it keeps a state along the row{of_kind}"
    for name, module in model.named_modules():
        rates = {"p": module.p} if isinstance(module, nn.Dropout) else vars(module)
        for field, rate in rates.items():
            if (field == "p" or "dropout" in field) and isinstance(rate, float) and rate > 0:
                return f"it has dropout: {name}.{field} is {rate:g}"
    return None


@contextmanager
def attending(model: PreTrainedModel, name: str = NAME) -> Iterator[None]:
    """The model's layers with that attention, and with their own again behind it, whatever happens.

    A layer that gradient checkpointing computes again in a backward pass behind it has that attention there too.
    """
    configs = {id(part.config): part.config for part in model.modules() if isinstance(part, PreTrainedModel)}
    before = [(config, config._attn_implementation_internal) for config in configs.values()]
    kept = [(part, vars(part)[CHECKPOINT]) for part in model.modules() if CHECKPOINT in vars(part)]
    try:
        model.set_attn_implementation(name)
        for part, checkpoint in kept:
            setattr(part, CHECKPOINT, partial(_attending_again, model, name, checkpoint))
        yield
    finally:
        for config, own in before:
            config._attn_implementation_internal = own
        for part, checkpoint in kept:
            setattr(part, CHECKPOINT, checkpoint)


def _attending_again(
    model: PreTrainedModel, name: str, checkpoint: Callable[..., Any], layer: Callable[..., Any], *args: Any
) -> Any:
    def run(*args: Any) -> Any:
        if model.config._attn_implementation_internal == name:
            return layer(*args)
        with attending(model, name):
            return layer(*args)

    return checkpoint(run, *args)
