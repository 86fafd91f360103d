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
        self._forward: MethodType | None = None
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
        if self._forward is None or self._model.__dict__.get("forward") is not self._forward:
            return
        self._forward = None  # a cycle, which would keep what a handle holds until Python looks for cycles
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


class CalledHead(SwappedForward):
    """A linear head whose call computes `compute(hidden, weight, bias)`, not logits, for FSDP2: within a call of the
    module the weight is gathered, and what it gets as a gradient is reduced."""

    def __init__(self, head: nn.Linear, compute: Callable[[Tensor, Tensor, Tensor | None], Any]):
        self._compute = compute
        self.found: Any = None  # as computed; a mixed-precision policy casts what the call returns
        super().__init__(head)

    def call(self, model: Any, before: Callable, args: tuple, kwargs: dict) -> Any:
        (hidden,) = args
        found = self._compute(hidden, model.weight, model.bias)
        # FSDP2 hangs its hook on what is returned, and warns of views there.
        single = isinstance(found, Tensor)
        self.found = found.clone() if single else tuple(x.clone() if isinstance(x, Tensor) else x for x in found)
        return self.found


def within(
    head: nn.Linear | None,
    compute: Callable[[Tensor, Tensor, Tensor | None], Any],
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
) -> Any:
    """compute(hidden, weight, bias); by a call of `head` where one is given, with its weight and bias and `hidden` in
    the same dtype, whatever a mixed-precision policy casts it to."""
    if head is None:
        return compute(hidden, weight, bias)
    dtype = hidden.dtype
    with CalledHead(head, lambda hidden, weight, bias: compute(hidden.to(dtype), weight, bias)) as called:
        head(hidden)
    return called.found


class ScoringHead(CalledHead):
    """A linear head that computes `linear_logp` of its targets."""

    def __init__(self, head: nn.Linear, targets: Tensor, options: dict):
        self._targets, self._options = targets, options
        super().__init__(head, self._score)

    def _score(self, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Any:
        bias = None if bias is None else bias.to(hidden.dtype)
        return linear_logp(hidden, weight.to(hidden.dtype), self._targets, bias=bias, **self._options)
