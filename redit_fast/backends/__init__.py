"""Which backend computes which primitive: one order per device, one sentence per refusal.

A backend is a module of this package. It exports primitives under the names below and `why_not(op, device)`, which
returns None, or the sentence why it cannot run `op` there. Primitives write into their first arguments and allocate no
outputs.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from importlib import import_module
from typing import ParamSpec, Protocol, cast

import torch

from redit_fast.checks import check_choice

PRIMITIVES = (
    "group_advantages",
    "token_logp",
    "token_logp_grad",
    "token_loss",
    "scale_in_place",
    "exp_product",
    "exp_product_grad",
    "addmm",
    "squared_norm",
    "perturb",
    "combine",
    "adamw",
)
NAMES = ("cpu", "cuda", "triton", "reference")
_ORDER = {"cpu": ("cpu", "reference"), "cuda": ("cuda", "triton", "reference")}  # every other device: reference
P = ParamSpec("P")
_forced: ContextVar[str | None] = ContextVar("redit_fast_backend", default=None)


class Backend(Protocol):
    """A backend's module. It exports each primitive too, under the name and with the arguments of the reference's."""

    def why_not(self, op: str, device: torch.device) -> str | None: ...


@cache
def _backend(name: str) -> Backend:
    if name not in NAMES:
        raise ValueError(f"REDIT_FAST_BACKEND must be one of {', '.join(NAMES)}, got {name!r}")
    return cast(Backend, import_module(f"{__name__}.{name}"))


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Force every op inside the `with` block onto one backend, without fallback.

    Raises:
        ValueError, TypeError: `name` is no backend.
        NotImplementedError: raised by the ops, with the backend's sentence, where it refuses.
    """
    check_choice("name", name, NAMES)
    token = _forced.set(name)
    try:
        yield
    finally:
        _forced.reset(token)


def forced() -> str | None:
    """The backend of the `use_backend` block that is open here; None outside."""
    return _forced.get()


def primitive(definition: Callable[P, None], device: torch.device) -> Callable[P, None]:
    """What computes the primitive that `definition`, of the reference, defines: the forced backend's function of that
    name and these arguments, else that of the first backend that does not refuse."""
    op = definition.__name__
    only = forced() or os.environ.get("REDIT_FAST_BACKEND")
    names = (only,) if only else _ORDER.get(device.type, ("reference",))
    refusals = []
    for name in names:
        backend = _backend(name)
        refusal = backend.why_not(op, device)
        if refusal is None:
            return getattr(backend, op)
        refusals.append(f"{name}: {refusal}")
    raise NotImplementedError(f"no backend runs {op} on {device}: {'; '.join(refusals)}")


def refusal(op: str, name: str, device: torch.device) -> str | None:
    """Why the backend `name` does not run `op` on `device`, or None."""
    return _backend(name).why_not(op, device)


def report(device: str = "cpu") -> list[tuple[str, str, str]]:
    """(op, backend, "ok" or the refusal) for every primitive and backend, as `redit-fast info` prints it."""
    return [(op, name, _backend(name).why_not(op, torch.device(device)) or "ok") for op in PRIMITIVES for name in NAMES]
