"""What the ops need of autograd and torch.compile: torch.ops.redit_fast, ops that a graph calls without looking inside
and that write into their arguments; and the guards of a backward pass."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, Literal, ParamSpec, get_origin, get_type_hints

import torch
from torch import Tensor

from redit_fast.backends import forced, use_backend
from redit_fast.checks import check_apart

P = ParamSpec("P")


def operator(*, mutates: tuple[str, ...]) -> Callable[[Callable[P, None]], Callable[P, None]]:
    """Registers the function that it decorates, without its closing underscore, as an operator without autograd, for
    torch.compile. Outside the function is called as it is: an operator hides its products from FLOP counters.

    An operator takes tensors and numbers, so a named tuple among the function's arguments is one argument a field
    there; in `mutates` its name stands for all of them."""

    def register(function: Callable[P, None]) -> Callable[P, None]:
        name, kinds = function.__name__.removesuffix("_"), get_type_hints(function)
        del kinds["return"]
        fields = {argument: _fields(argument, kind) for argument, kind in kinds.items()}
        packed = {argument: kind for argument, kind in kinds.items() if hasattr(kind, "_fields")}

        write: Any = function

        def unpacked(*arguments: object) -> None:
            rest = iter(arguments)
            values = {argument: [next(rest) for _ in of] for argument, of in fields.items()}
            write(*(packed[name](*x) if name in packed else x[0] for name, x in values.items()))

        vars(unpacked)["__signature__"] = inspect.Signature(
            [parameter for of in fields.values() for parameter in of], return_annotation=None
        )
        written = [parameter.name for argument in mutates for parameter in fields[argument]]
        torch.library.define(f"redit_fast::{name}", torch.library.infer_schema(unpacked, mutates_args=written))
        torch.library.impl(f"redit_fast::{name}", "default", unpacked)
        torch.library.register_fake(f"redit_fast::{name}", lambda *arguments: None)
        compiled = getattr(torch.ops.redit_fast, name).default

        def call(*arguments: P.args, **_: P.kwargs) -> None:
            if not torch.compiler.is_compiling():
                return write(*arguments)
            flat: list[object] = []
            values: Any = arguments
            for argument, value in zip(kinds, values, strict=True):
                flat.extend(value if argument in packed else (value,))
            compiled(*flat)

        return call

    return register


def _fields(argument: str, kind: type) -> list[inspect.Parameter]:
    """What an argument is for an operator, which takes a choice as a str."""
    fields = get_type_hints(kind) if hasattr(kind, "_fields") else {argument: kind}
    return [
        inspect.Parameter(
            name, inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=str if get_origin(of) is Literal else of
        )
        for name, of in fields.items()
    ]


def remember_backend(ctx: Any) -> None:
    ctx.backend = None if torch.compiler.is_compiling() else forced()


def as_in_forward(backward: Callable[..., Any]) -> Callable[..., Any]:
    """`backward` on the backend that was forced in forward: of a GPU's tensors autograd calls it in a thread of its
    own, where no `use_backend` block is open."""

    @functools.wraps(backward)
    def run(ctx: Any, *upstream: Any) -> Any:
        if torch.compiler.is_compiling() or ctx.backend is None:
            return backward(ctx, *upstream)
        with use_backend(ctx.backend):
            return backward(ctx, *upstream)

    return run


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
