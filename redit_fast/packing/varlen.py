"""The one call on a GPU for segments of many lengths: flash-attn 2, 3 or 4, or the kernel that torch brings.

What runs is looked for at the first call, newest first, by the device's architecture; nothing is imported before.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import cache
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

Name = Literal["flash-attn 3", "flash-attn 4", "flash-attn 2", "torch varlen_attn"]
NAMES: tuple[Name, ...] = get_args(Name)
FULL = -1  # of a window in torch
DTYPES = (torch.float16, torch.bfloat16)
NEEDS = {"torch varlen_attn": {"window_size", "enable_gqa"}}  # of a signature, which change between releases
OF_FLASH_ATTN = {"cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k", "softmax_scale", "causal",
                 "window_size", "softcap"}  # fmt: skip


class Kernel(NamedTuple):
    name: Name
    call: Callable[..., Any]


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bounds: tuple[Tensor, Tensor],
    counts: tuple[int, int],
    scale: float,
    window: int | None,
    softcap: float | None,
) -> Tensor:
    """(T, H, D): causal attention, aligned to the last key, of each segment's queries (T, H, D) to its keys (U, K, D).

    Args:
        bounds: int32 (S + 1,): where the segments' queries and keys begin, and the last ones end.
        counts: the most queries and keys of a segment.
        window: how many keys a query sees, its own among them; None: all.

    Raises:
        NotImplementedError: one sentence: no kernel is there, or none that does it.
    """
    kernel = found(torch.cuda.get_device_capability(query.device), softcap is not None)
    if query.dtype not in DTYPES:
        raise NotImplementedError(f"{kernel.name} is for float16 and bfloat16, got {query.dtype}")
    left = FULL if window is None else window - 1
    if kernel.name == "torch varlen_attn":
        return kernel.call(query, key, value, *bounds, *counts, scale=scale, window_size=(left, 0), enable_gqa=True)
    options: dict[str, Any] = {"softmax_scale": scale, "causal": True}
    if window is not None:
        options["window_size"] = (left, 0)
    if softcap is not None:
        options["softcap"] = softcap
    out = kernel.call(
        query,
        key,
        value,
        cu_seqlens_q=bounds[0],
        cu_seqlens_k=bounds[1],
        max_seqlen_q=counts[0],
        max_seqlen_k=counts[1],
        **options,
    )
    return out[0] if isinstance(out, tuple) else out  # flash-attn 4, and old releases of 3, give the sums too


def found(capability: tuple[int, int], softcap: bool = False) -> Kernel:
    """The kernel that runs on a GPU of that capability.

    Raises:
        NotImplementedError: none does; why each does not.
    """
    refused = {}
    for name in NAMES:
        why = refusal(name, capability, softcap)
        if why is None:
            return Kernel(name, _imported(name))
        refused[name] = why
    raise NotImplementedError("; ".join(f"{name}: {why}" for name, why in refused.items()))


def refusal(name: Name, capability: tuple[int, int], softcap: bool = False) -> str | None:
    """Why a kernel does not run on a GPU of that capability; None where it does."""
    major, minor = capability
    if name == "flash-attn 3" and major != 9:
        return f"is for GPUs of capability 9.0, this has {major}.{minor}"
    if name == "flash-attn 4" and major not in (9, 10):
        return f"is for GPUs of capabilities 9.0 and 10.x, this has {major}.{minor}"
    if major < 8:
        return f"needs a GPU of capability 8.0, this has {major}.{minor}"
    if softcap and name in ("flash-attn 4", "torch varlen_attn"):
        return "has no softcap for rows of many lengths, flash-attn 2 and 3 have"
    return _missing(name)


@cache
def _missing(name: Name) -> str | None:
    try:
        call = _imported(name)
    except ImportError as error:  # a build for another torch raises it too, and says more
        return f"cannot be imported: {error}"
    lacks = NEEDS.get(name, OF_FLASH_ATTN) - inspect.signature(call).parameters.keys()
    return f"the installed release has no {' and no '.join(sorted(lacks))}" if lacks else None


def _imported(name: Name) -> Callable[..., Any]:
    if name == "flash-attn 3":
        from flash_attn_interface import flash_attn_varlen_func
    elif name == "flash-attn 4":
        from flash_attn.cute import flash_attn_varlen_func
    elif name == "flash-attn 2":
        from flash_attn import flash_attn_varlen_func
    else:
        from torch.nn.attention.varlen import varlen_attn as flash_attn_varlen_func
    return flash_attn_varlen_func
