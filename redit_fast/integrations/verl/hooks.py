"""Functions of verl that ours stand in for, and back."""

from __future__ import annotations

from types import ModuleType
from typing import Any

# Theirs by ours. As an attribute of ours it would go along with functools.wraps onto what another plugin puts around
# it, and taking ours back would drop that too.
_THEIRS: dict[Any, Any] = {}


def replace(owner: type | ModuleType, name: str, ours: Any) -> None:
    _THEIRS[ours] = getattr(owner, name)
    setattr(owner, name, ours)


def is_replaced(owner: type | ModuleType, name: str) -> bool:
    """Also where something else was put around ours since."""
    function = getattr(owner, name, None)
    while function is not None and function not in _THEIRS:
        function = getattr(function, "__wrapped__", None)
    return function is not None


def take_back(owner: type | ModuleType | None, name: str) -> None:
    """Nothing where ours is not there, or something else around it."""
    function = getattr(owner, name, None)
    if function in _THEIRS:
        setattr(owner, name, _THEIRS[function])
