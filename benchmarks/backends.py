"""Which of this package's backends are measured."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import redit_fast as rf
from redit_fast import backends

from .place import Place


def of_ours(op: str, place: Place) -> list[tuple[str, str]]:
    """(name in the tables, backend) of those that run the primitive `op` there, the default one first; the reference
    only where it is alone."""
    ready = [name for name in backends.NAMES if backends.refusal(op, name, place.device) is None]
    fast = [name for name in ready if name != "reference"] or ready
    return [("redit-fast" if i == 0 else f"redit-fast, {name}", name) for i, name in enumerate(fast)]


def forced(backend: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """The function on that backend, and its backward pass too."""

    def call(*args: Any, **kwargs: Any) -> Any:
        with rf.use_backend(backend):
            return function(*args, **kwargs)

    return call
