"""One call that runs in a thread of its own."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future, wait
from typing import Generic, TypeVar

T = TypeVar("T")


class Ahead(Generic[T]):
    """`begin` starts a call, `take` gives what it returns or raises what it raises.

    The thread ends with the process: one of a pool would be waited for at its end, where a server that is silent would
    hold up a stop.
    """

    def __init__(self) -> None:
        self._found: Future[T] | None = None

    @property
    def begun(self) -> bool:
        """Whether there is something to take."""
        return self._found is not None

    def begin(self, work: Callable[[], T]) -> None:
        found: Future[T] = Future()

        def run() -> None:
            try:
                found.set_result(work())
            except BaseException as error:  # noqa: BLE001  `take` raises it
                found.set_exception(error)

        self._found = found
        threading.Thread(target=run, name="rollout ahead", daemon=True).start()

    def wait(self) -> None:
        """Until the call is over, if there is one. A stop ends the waiting."""
        if self._found is not None:
            wait([self._found])

    def take(self) -> T:
        if self._found is None:
            raise RuntimeError("nothing has begun")
        found, self._found = self._found, None
        return found.result()
