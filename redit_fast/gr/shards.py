"""Parameters that are DTensors (FSDP2, tensor parallelism): this rank's piece, its place in the whole, and sums over
the ranks. A plain tensor is its own piece, the same on every rank, and is never communicated (DDP).
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator
from functools import reduce
from typing import TYPE_CHECKING, Any, TypeGuard, cast

import torch
from torch import Tensor, nn

if TYPE_CHECKING:  # they load torch.distributed
    from torch.distributed.tensor import DTensor

Sums = dict  # device mesh, or None for plain tensors -> this rank's sums (width,) float64


def is_shard(tensor: object) -> TypeGuard[DTensor]:
    return hasattr(tensor, "device_mesh")


def local(tensor: Tensor) -> Tensor:
    """The piece of `tensor` that lies on this rank, sharing its memory."""
    return tensor.to_local() if is_shard(tensor) else tensor


def version(tensor: Tensor) -> tuple[int, int, int]:
    """Differs after every write that torch counts, and after `p.data = other`. An operation on a DTensor counts on the
    DTensor, one on its piece on the piece."""
    piece = local(tensor)
    return tensor._version, piece._version, piece.data_ptr()


def meshes_of(params: list[Tensor]) -> list:
    """The device meshes of sharded parameters, equal on every rank and in the same order."""
    return list(dict.fromkeys(p.device_mesh for p in params if is_shard(p)))


def check_placed_alike(params: list[Tensor]) -> None:
    for p in params:
        together = is_shard(p) == is_shard(p.grad)
        if not together or (is_shard(p) and is_shard(p.grad) and p.placements != p.grad.placements):
            raise ValueError(
                f"a parameter is placed as {getattr(p, 'placements', 'a plain tensor')} and its gradient as "
                f"{getattr(p.grad, 'placements', 'a plain tensor')}: redistribute the gradient to the parameter's "
                "placements first"
            )


def summed(params: list[Tensor], width: int, launch: Callable[[Tensor, list[Tensor]], None]) -> Sums:
    """The sums that `launch(out, members)` writes for the members of one mesh. What several ranks hold alike counts
    once over all of them."""
    members: dict = {}
    for p in params:
        sizes = zip(p.placements, p.device_mesh.shape, strict=True) if is_shard(p) else []
        replicas = math.prod(size for placement, size in sizes if placement.is_replicate())
        members.setdefault((getattr(p, "device_mesh", None), replicas), []).append(p)
    sums: Sums = {}
    for (mesh, replicas), alike in members.items():
        out = torch.zeros(width, dtype=torch.float64, device=alike[0].device)
        launch(out, alike)
        out = out / replicas if replicas > 1 else out
        sums[mesh] = sums[mesh] + out if mesh in sums else out
    return sums


def across_ranks(meshes: list, device: torch.device, rows: list[tuple[int, Sums]]) -> list[Tensor]:
    """Every row's sums, of the given width (1: a number), over the ranks of all meshes: one all-reduce for all rows
    together, one per dimension of a mesh."""
    joined = []
    for mesh in [None, *meshes]:
        nothing = torch.zeros((), dtype=torch.float64, device=device)
        joined.append(torch.cat([sums.get(mesh, nothing.expand(width)) for width, sums in rows]))
        for group in mesh.get_all_groups() if mesh is not None else []:
            torch.distributed.all_reduce(joined[-1], group=group)
    return [row.squeeze() for row in reduce(torch.add, joined).split([width for width, _ in rows])]


def pieces(p: Tensor, offset: int, exact: bool) -> Iterator[tuple[Tensor, Tensor, int]]:
    """The runs of this rank's piece of `p` that are contiguous in the whole, with their gradients and first element, if
    the whole begins at `offset`: one run, or rows where another dimension than the first is sharded. Without `exact`
    the element is not asked for."""
    weights, grads = local(p), local(cast(Tensor, p.grad))
    if not exact or not is_shard(p):
        yield weights, grads, offset
        return
    first, split = starts(p), [d for d in range(p.ndim) if weights.shape[d] != p.shape[d]]
    strides = [math.prod(p.shape[d + 1 :]) for d in range(p.ndim)]
    offset += sum(start * stride for start, stride in zip(first, strides, strict=True))
    outer = weights.shape[: max(split, default=0)]
    runs = math.prod(outer)
    for run, (some, slopes) in enumerate(zip(weights.view(runs, -1), grads.view(runs, -1), strict=True)):
        begin = offset
        for d in reversed(range(len(outer))):
            run, index = divmod(run, outer[d])
            begin += index * strides[d]
        yield some, slopes, begin


def starts(p: Any) -> list[int]:
    """In every dimension, the whole's index of the first element of this rank's piece."""
    found, sizes = [0] * p.ndim, list(p.shape)
    placements: Any = p.placements if is_shard(p) else ()
    for i, placement in enumerate(placements):
        if placement.is_replicate():
            continue
        if type(placement).__name__ != "Shard":
            raise NotImplementedError(
                f"stochastic rounding does not place {placement} in the whole parameter: use rounding='nearest', or "
                "shard the dimension over one mesh dimension only"
            )
        size = -(-sizes[placement.dim] // p.device_mesh.size(i))  # torch.chunk
        begin = min(size * p.device_mesh.get_local_rank(i), sizes[placement.dim])
        found[placement.dim] += begin
        sizes[placement.dim] = min(size, sizes[placement.dim] - begin)
    return found


def drop_gathered(params: list[Tensor]) -> None:
    """Frees the weights that FSDP2 keeps gathered (set_reshard_after_backward(False)): the next forward pass would run
    on them, and not on the shards that were just written."""
    if any(map(is_shard, params)):
        for module in _sharded_modules():
            if any(p.requires_grad for p in module.parameters()):
                module.reshard()


def drop_gathered_of(model: nn.Module) -> None:
    """Also where a module around `model` holds them, as one does in whose forward the loss is computed."""
    if "torch.distributed.fsdp" in sys.modules:
        own = set(model.parameters())
        for module in _sharded_modules():
            if not own.isdisjoint(module.parameters()):
                module.reshard()


def _sharded_modules() -> list[Any]:  # modules that are FSDPModules too
    from torch.distributed._composable_state import _module_state_mapping  # a parameter does not know its module
    from torch.distributed.fsdp import FSDPModule

    return [module for module in list(_module_state_mapping) if isinstance(module, FSDPModule)]


DEEPSPEED = (
    "DeepSpeed reduces, clips and steps inside its own engine, where no second backward pass fits: use DDP or FSDP2 "
    "(torch.distributed.fsdp.fully_shard)"
)


def refuse_other_engines(optimizer: object) -> None:
    """DeepSpeed and FSDP1 hide parameters and gradients from an optimizer that has to move the one by the other."""
    params = [p for group in getattr(optimizer, "param_groups", []) for p in group["params"]]
    of_zero = any(hasattr(p, "ds_id") or hasattr(p, "_hp_mapping") for p in params)  # stage 3; stages 1 and 2
    if of_zero or type(optimizer).__module__.startswith("deepspeed"):
        raise NotImplementedError(DEEPSPEED)
    if any(getattr(p, "_is_flat_param", False) or getattr(p, "_fsdp_flattened", False) for p in params):
        raise NotImplementedError(
            "FSDP1's flat parameters do not say which rank holds what: use FSDP2 (torch.distributed.fsdp.fully_shard)"
        )
