"""What a second pass runs again: the micro-batches whose gradients .grad holds, as the first pass saw them."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from typing import Any

from torch import Tensor

from redit_fast.gr import gradients

CUT_SHORT = (
    "gr_gamma above 0 got a step after one whose backward passes were cut short by an exception, of which FSDP2 keeps "
    "a part that the second pass would not have: build the {} anew from a checkpoint"
)


class KeptBatches:
    """The micro-batches of the step under way whose backward pass returned. A host may catch an exception and go on, by
    another batch, a smaller one, or the whole step anew."""

    def __init__(self):
        self._batches: list = []
        self._written: dict[Tensor, tuple] = {}  # .grad after the last of them

    def keep(self, batch: object, params: Sequence[Tensor]) -> None:
        self._batches.append(batch)
        self._written = gradients.written(params)

    def match(self, params: Sequence[Tensor]) -> None:
        """Begins anew where the gradients were cleared.

        Raises:
            RuntimeError: .grad holds what none of the batches left there.
        """
        written = gradients.written(params)
        if written == self._written:
            return
        if any(gradients.of(p).any() for p in written):
            raise RuntimeError(
                "gr_gamma above 0 got a gradient that no whole backward pass of this step left in .grad, so that a "
                "second pass would not make it again: after an exception in a backward pass call zero_grad() before "
                "the next batch, and change no gradient between two batches"
            )
        self._batches, self._written = [], written

    def take(self, params: Sequence[Tensor]) -> list:
        """All of them, which are then forgotten."""
        self.match(params)
        batches, self._batches = self._batches, []
        return batches

    def __len__(self) -> int:
        return len(self._batches)


def same_tensors(data: Any) -> Any:
    """`data` with its containers copied at every depth, and the same tensors in them."""
    if isinstance(data, MutableMapping):
        copied = copy.copy(data)
        for name, value in data.items():
            copied[name] = same_tensors(value)
        return copied
    if isinstance(data, list):
        items = copy.copy(data)
        items[:] = [same_tensors(value) for value in data]
        return items
    if isinstance(data, tuple):
        values = [same_tensors(value) for value in data]
        return data._make(values) if hasattr(data, "_make") else type(data)(values)
    return data


class Versions:
    """Tells whether one of the tensors in `inputs` was written to since."""

    def __init__(self, inputs: object):
        self._tensors = [(name, x, x._version) for name, x in _named_tensors("inputs", inputs) if not x.is_inference()]

    def check(self) -> None:
        for name, tensor, version in self._tensors:
            if tensor._version != version:
                raise RuntimeError(
                    f"{name} was changed in place in the first of gradient regularisation's two passes, which must see "
                    "the same inputs: change a copy of it"
                )


def _named_tensors(name: str, data: object) -> Iterator[tuple[str, Tensor]]:
    if isinstance(data, Tensor):
        yield name, data
    elif isinstance(data, Mapping):
        for key, value in data.items():
            yield from _named_tensors(f"{name}[{key!r}]", value)
    elif isinstance(data, list | tuple):
        for i, value in enumerate(data):
            yield from _named_tensors(f"{name}[{i}]", value)
