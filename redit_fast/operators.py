"""torch.ops.redit_fast: ops that torch.compile calls without looking inside. They write into their arguments."""

from __future__ import annotations

from collections.abc import Callable

import torch


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
