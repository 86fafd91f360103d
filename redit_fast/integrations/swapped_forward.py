"""A module's `forward` replaced on the instance, reversibly."""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import MethodType, TracebackType
from typing import Any, Self

from torch import Tensor, nn

from redit_fast.ops.linear_loss import linear_logp


class SwappedForward:
    """A model's `forward` replaced on the instance; `call` gets the forward that was there."""

    def __init__(self, model: nn.Module):
        self._model, self._own, self._before = model, model.__dict__.get("forward"), model.forward
        self._active = True
        handle = self

        @functools.wraps(type(model).forward)  # generate() and Trainer read the signature
        def forward(self, *args, **kwargs):
            before = handle._before
            if isinstance(before, MethodType):  # bound to the model; this may be a copy of it
                before = functools.partial(before.__func__, self)
            return handle.call(self, before, args, kwargs) if handle._active else before(*args, **kwargs)

        self._forward = model.forward = MethodType(forward, model)

    def call(self, model: Any, before: Callable, args: tuple, kwargs: dict) -> Any:
        raise NotImplementedError

    def remove(self) -> None:
        """Puts the model's own forward back. Where something else has wrapped `forward` since, that stays, around the
        model's own."""
        self._active = False
        if self._model.__dict__.get("forward") is not self._forward:
            return
        if self._own is None:
            del self._model.forward
        else:
            self._model.forward = self._own

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()


class ScoringHead(SwappedForward):
    """A linear head that returns `linear_logp` of its targets, not logits, for FSDP2: within a call of the module the
    weight is gathered, and what it gets as a gradient is reduced."""

    def __init__(self, head: nn.Linear, targets: Tensor, options: dict):
        self._targets, self._options = targets, options
        super().__init__(head)

    def call(self, model: Any, before: Callable, args: tuple, kwargs: dict) -> Any:
        (hidden,) = args
        bias = None if model.bias is None else model.bias.to(hidden.dtype)
        found = linear_logp(hidden, model.weight.to(hidden.dtype), self._targets, bias=bias, **self._options)
        return found.clone() if isinstance(found, Tensor) else tuple(x.clone() for x in found)  # it warns of views
