"""Signals around code that is not ours."""

from __future__ import annotations

import functools
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

STOPS = ("SIGINT", "SIGTERM", "SIGHUP")  # Ctrl-C; Slurm, Kubernetes and kill; a terminal that was closed
Handler = Callable[[int, FrameType | None], object]


@functools.cache
def _reset_in_children() -> None:
    """A child that has just begun to wait for a lock does not come to a handler in Python: the pool that ends it waits
    for ever. So a forked child starts with the default where `in_this_process` made the handler."""

    def reset() -> None:
        for name in STOPS:
            number = getattr(signal, name, None)
            if number is not None and hasattr(signal.getsignal(number), "of_this_process"):
                signal.signal(number, signal.SIG_DFL)

    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=reset)


def in_this_process(handler: Handler) -> Handler:
    """`handler`, but in a process that is forked from this one, such as a worker of a pool, what the signal does by
    default: its parent ends it so."""
    _reset_in_children()
    owner = os.getpid()

    def handle(number: int, frame: FrameType | None) -> None:
        if os.getpid() == owner:
            handler(number, frame)
        else:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)  # it came before the reset

    handle.of_this_process = True  # type: ignore[attr-defined]
    return handle


@contextmanager
def handled(handler_of: Callable[[Any], Handler | None]) -> Iterator[None]:
    """Inside, each of STOPS has the handler that `handler_of` makes of the one before; None leaves that one. Outside
    the main thread, which alone may set handlers, nothing."""
    before = {}
    if threading.current_thread() is threading.main_thread():
        before = {number: signal.getsignal(number) for name in STOPS if (number := getattr(signal, name, None))}
    pythons = {number: handler for number, handler in before.items() if handler is not None}
    ours = {number: ours for number, handler in pythons.items() if (ours := handler_of(handler)) is not None}
    for number, handler in ours.items():
        signal.signal(number, in_this_process(handler))
    try:
        yield
    finally:
        for number in ours:
            signal.signal(number, before[number])


@contextmanager
def remembered() -> Iterator[None]:
    """A stop that the code inside swallows, as a bare `except:` does, comes again when the block is done."""
    came: list[int] = []

    def handler_of(earlier: Any) -> Handler | None:
        def note(number: int, frame: FrameType | None) -> None:
            came.append(number)
            earlier(number, frame)

        return note if callable(earlier) else None

    with handled(handler_of):
        yield
    if came:
        signal.raise_signal(came[0])
