"""What the ops need of autograd and torch.compile: torch.ops.redit_fast, ops that a graph calls without looking inside
and that write into their arguments; and the guards of a backward pass."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from redit_fast.checks import check_apart


def operator(*, mutates: tuple[str, ...]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Registers the function that it decorates, without its closing underscore, as an operator without autograd, for
    torch.compile. Outside the function is called as it is: an operator hides its products from FLOP counters."""

    def register(function: Callable[..., None]) -> Callable[..., None]:
        name = function.__name__.removesuffix("_")
        torch.library.define(f"redit_fast::{name}", torch.library.infer_schema(function, mutates_args=mutates))
        torch.library.impl(f"redit_fast::{name}", "default", function)
        torch.library.register_fake(f"redit_fast::{name}", lambda *arguments: None)
        compiled = getattr(torch.ops.redit_fast, name).default

        def call(*arguments: object) -> None:
            (compiled if torch.compiler.is_compiling() else function)(*arguments)

        return call

    return register


def refuse_double_backward() -> None:
    if torch.is_grad_enabled():  # autograd runs backward with gradients enabled only under create_graph=True
        raise RuntimeError(
            "this op has no second derivative, so create_graph=True does not work; gradient regularisation (GR) needs "
            "only first derivatives: use redit_fast.RegularizedAdamW or GradientRegularizer"
        )


def refuse_in_place(name: str, in_place: bool, logits: Tensor) -> None:
    if in_place and torch.compiler.is_compiling():
        raise ValueError(f"{name}=True does not work under torch.compile, which plans the memory itself; leave it out")
    if in_place:
        check_apart("logits", logits)


def refuse_second_backward(ctx) -> None:
    if ctx.spent:
        raise RuntimeError(
            "the gradient of this loss was computed in its forward pass and has been handed out; for a second backward "
            "compute the loss again"
        )
    ctx.spent = True
