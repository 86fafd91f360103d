"""What a gradient-regularised step does with .grad: checks, norms, keeping, clearing and combining."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import cast

import torch
from torch import Tensor

from redit_fast.backends import primitive, reference
from redit_fast.gr import shards
from redit_fast.gr.shards import local


def with_grad(params: list[Tensor]) -> list[Tensor]:
    params = [p for p in params if p.grad is not None]
    if not params:
        raise RuntimeError("no parameter has a gradient: call loss.backward() first")
    if any(p.grad.is_sparse for p in params if p.grad is not None):
        raise ValueError("sparse gradients are not supported: use dense embeddings")
    shards.check_placed_alike(params)
    return params


def written(params: Sequence[Tensor]) -> dict[Tensor, tuple]:
    """Differs after a backward pass that reached any of `params`."""
    return {p: (id(p.grad), shards.version(p.grad)) for p in params if p.grad is not None}


def of(p: Tensor) -> Tensor:
    return local(cast(Tensor, p.grad))


def squares(params: list[Tensor], tensor_of: Callable[[Tensor], Tensor] = of) -> shards.Sums:
    """This rank's sums of squares (1,), of gradients or of `tensor_of` parameters."""

    def launch(out: Tensor, members: list[Tensor]) -> None:
        primitive(reference.squared_norm, out.device)(out[0], [tensor_of(p) for p in members])

    return shards.summed(params, 1, launch)


def keep(params: list[Tensor]) -> dict[Tensor, Tensor]:
    """The gradients, for later: copied only where they are views, into which the second pass of
    DDP(gradient_as_bucket_view=True) writes."""
    return {p: grad.clone() if grad._is_view() else grad for p in params if (grad := p.grad) is not None}


def clear(params: list[Tensor]) -> None:
    for p in params:
        p.grad = None


def combine(params: list[Tensor], first: dict[Tensor, Tensor], ratio: float) -> tuple[list[Tensor], shards.Sums]:
    """.grad = (1 - ratio) first + ratio .grad for every parameter that has either; and the sums (3,) of the primitive
    `combine`."""
    params = list(dict.fromkeys([*params, *first]))
    for p in params:
        if p.grad is None:
            p.grad = torch.zeros_like(first[p])
        if p not in first:
            first[p] = torch.zeros_like(p.grad)

    def launch(out: Tensor, members: list[Tensor]) -> None:
        primitive(reference.combine, out.device)(
            out, [local(first[p]) for p in members], [of(p) for p in members], ratio
        )

    return params, shards.summed(params, 3, launch)


def multiply(params: list[Tensor], factor: Tensor) -> None:
    for p in params:
        wide = torch.promote_types(of(p).dtype, torch.float32)  # 1 / loss scale is not a float16
        of(p).copy_(of(p).to(wide) * factor.to(wide))
