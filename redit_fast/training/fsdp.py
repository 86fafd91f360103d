"""FSDP2 of a model: its layers are torch's units; the embeddings and the head are shards that each use gathers.

As parts of torch's root unit they would be whole during all of a pass, and tied they cannot be units of their own: one
would be whole from the lookup to the loss. Here the whole weight of a lookup is gone after it, and that of the loss
after its backward pass; the gradient of each use is reduced as soon as it is there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from redit_fast.gr.shards import is_shard


def shard(forward: nn.Module, model: PreTrainedModel, device: str, size: int) -> None:
    """Puts shards of the first rank's weights on `device` in the place of the model's parameters, one layer after the
    other: of a model on the CPU a GPU holds no more than a layer whole.

    Args:
        forward: around the model; every pass calls it, and takes the head's weights by `whole`.
        size: how many ranks there are.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
    from torch.distributed.tensor import Shard, distribute_tensor

    def place(tensors: Iterable[Tensor]) -> None:
        for tensor in tensors:
            tensor.data = tensor.data.to(device)
            torch.distributed.broadcast(tensor.data, 0)

    mesh = init_device_mesh(device, (size,))
    shards: dict[Tensor, nn.Parameter] = {}
    for module in _outside(model):
        for name, p in module.named_parameters(recurse=False):
            if p not in shards:
                shards[p] = nn.Parameter(distribute_tensor(p.detach().to(device), mesh, [Shard(0)]), p.requires_grad)
            setattr(module, name, shards[p])
        if isinstance(module, nn.Embedding):
            module.forward = _gathering(module, module.forward)  # type: ignore[method-assign]
    options: dict[str, Any] = {"mesh": mesh, "mp_policy": MixedPrecisionPolicy(reduce_dtype=torch.float32)}
    modules: list[Any] = []
    for layer in _layers(model):
        place([*layer.parameters(), *layer.buffers()])
        modules.append(fully_shard(layer, **options))
    place(tensor for tensor in [*forward.parameters(), *forward.buffers()] if not is_shard(tensor))
    modules.insert(0, fully_shard(forward, ignored_params=set(shards.values()), **options))
    for before, module in zip([modules[-1], *modules], modules, strict=False):
        # Torch would go by the order of all forward passes since the last backward one, decoding included, of which
        # a rank may have none: the ranks would not gather alike, and hang.
        module.set_modules_to_backward_prefetch([before])


def _layers(model: PreTrainedModel) -> list[nn.Module]:
    lists = [(f"{name}.", part) for name, part in model.named_modules() if isinstance(part, nn.ModuleList)]
    outermost = [part for name, part in lists if not any(name != of and name.startswith(of) for of, _ in lists)]
    return [layer for layers in outermost for layer in layers]


def _outside(model: PreTrainedModel) -> list[nn.Module]:
    """Of the layers: the embeddings and the head, which may share weights."""
    inside = {part for layer in _layers(model) for part in layer.modules()}
    parts = [part for part in model.get_decoder().modules() if isinstance(part, nn.Embedding) and part not in inside]
    return [*parts, model.get_output_embeddings()]


def whole(tensor: Any) -> Any:
    """The whole of a shard, whose gradient is the mean of the ranks'; anything else as it is."""
    return _Whole.apply(tensor) if is_shard(tensor) else tensor


class _Whole(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, shard: Any) -> Tensor:
        ctx.shard, piece, ranks = shard, shard.to_local(), shard.device_mesh.size()
        most = -(-len(shard) // ranks)  # rows of a piece; the last ones may have fewer
        all_gather = _renamed_in_2_13("all_gather_single", "all_gather_into_tensor")
        gathered = piece.new_empty(ranks * most, *piece.shape[1:])
        all_gather(gathered, _filled(piece, most), group=shard.device_mesh.get_group())
        return gathered[: len(shard)]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        from torch.distributed.tensor import DTensor

        mesh, ranks = ctx.shard.device_mesh, ctx.shard.device_mesh.size()
        most = -(-len(grad) // ranks)
        reduce_scatter = _renamed_in_2_13("reduce_scatter_single", "reduce_scatter_tensor")
        piece = grad.new_empty(most, *grad.shape[1:], dtype=torch.float32)
        reduce_scatter(piece, _filled(grad.float().contiguous(), ranks * most), group=mesh.get_group())
        own = piece[: len(ctx.shard.to_local())].div_(ranks).to(ctx.shard.dtype)
        return DTensor.from_local(
            own, mesh, ctx.shard.placements, run_check=False, shape=ctx.shard.shape, stride=ctx.shard.stride()
        )


def _renamed_in_2_13(name: str, before: str) -> Any:
    return getattr(torch.distributed, name, None) or getattr(torch.distributed, before)


def _filled(tensor: Tensor, rows: int) -> Tensor:
    missing = rows - len(tensor)
    return torch.cat([tensor, tensor.new_zeros(missing, *tensor.shape[1:])]) if missing else tensor


def _gathering(module: nn.Module, forward: Callable[..., Any]) -> Callable[..., Any]:
    def looked_up(*args: Any, **kwargs: Any) -> Any:
        with _replaced([module], whole):
            return forward(*args, **kwargs)

    return looked_up


@contextmanager
def _replaced(modules: Iterable[nn.Module], by: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Inside, the modules' own shards are what `by` makes of them, shared ones once."""
    places: list[tuple[Any, str, Tensor]] = [
        (module._parameters, name, p)
        for module in modules
        for name, p in module.named_parameters(recurse=False)
        if is_shard(p)
    ]
    made = {p: by(p) for p in dict.fromkeys(p for _, _, p in places)}
    for own, name, p in places:
        own[name] = made[p]
    try:
        yield
    finally:
        for own, name, p in places:
            own[name] = p


@contextmanager
def gathered(forward: nn.Module, model: PreTrainedModel) -> Iterator[None]:
    """Inside, each rank has all weights."""
    from torch.distributed.fsdp import FSDPModule

    with torch.no_grad():
        forward(lambda model: None)  # the first forward makes this module the root of the others
    modules: list[Any] = [module for module in forward.modules() if isinstance(module, FSDPModule)]
    for module in modules:
        module.set_reshard_after_forward(False, recurse=False)
        module.unshard()
    try:
        with _replaced(_outside(model), lambda p: nn.Parameter(whole(p.detach()), requires_grad=False)):
            yield
    finally:
        for module in modules:
            module.set_reshard_after_forward(module is not forward, recurse=False)
            module.reshard()
