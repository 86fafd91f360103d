"""What a run shows while it goes: a bar on a terminal, elsewhere plain lines, so that a log is alive."""

from __future__ import annotations

import threading
import time
import warnings
from collections.abc import Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

EVERY = 10.0  # seconds between two lines


class Task(NamedTuple):
    """What a line is made of, in one piece for the thread that prints it."""

    name: str
    total: int
    first: int  # what was done at its beginning
    done: int
    numbers: str
    began: float


class Lines:
    """What the trainer uses of rich's Progress, as lines on stdout: one every 10 s and one at each evaluation."""

    def __init__(self):
        self._start, self._over = time.monotonic(), threading.Event()
        self._thread = threading.Thread(target=self._tick, daemon=True)  # a step alone may take minutes
        self._task = Task("", 0, 0, 0, "", 0.0)

    def __enter__(self) -> Lines:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        self._over.set()

    def add_task(self, description: str, *, total: int, completed: int = 0, numbers: str = "") -> int:
        self._task = Task(description, total, completed, completed, numbers, time.monotonic())
        return 0

    def update(self, _: int, *, advance: int, numbers: str, held_out: float | None = None) -> None:
        """`held_out`: the accuracy, where this step has an evaluation."""
        began = self._task.began if advance else time.monotonic()  # the first evaluation is no step
        self._task = self._task._replace(done=self._task.done + advance, numbers=numbers, began=began)
        if held_out is not None:
            self._print(f"held out {held_out:.1%}")

    def _tick(self) -> None:
        while not self._over.wait(EVERY):
            self._print()

    def _print(self, more: str = "") -> None:
        task, now, left = self._task, time.monotonic(), ""
        if not task.name or self._over.is_set():
            return
        if task.done > task.first:
            seconds = (now - task.began) / (task.done - task.first) * (task.total - task.done)
            left = f"{timedelta(seconds=round(seconds))} left"
        words = filter(None, (f"{task.name} {task.done}/{task.total}", task.numbers, more, left))
        try:
            print(f"{timedelta(seconds=round(now - self._start))} {', '.join(words)}", flush=True)
        except OSError as error:  # whoever read them has gone: no reason to lose the run
            self._over.set()
            warnings.warn(f"no more lines on stdout ({error.strerror}); the run goes on", stacklevel=2)


def shown(console: Console) -> Progress | Lines:
    if console.quiet:  # the first rank shows
        return Progress(disable=True)
    if not (console.is_interactive or console.is_jupyter):
        return Lines()
    return Progress(
        TextColumn("{task.description:>10}"),
        BarColumn(bar_width=10),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[numbers]}"),
        console=console,
    )


def numbers(metrics: dict[str, float]) -> str:
    accuracy, rate = metrics["accuracy/train"], metrics["tokens/per_second_rollout"]
    return f"reward {metrics['reward']:.2f}, accuracy {accuracy:.0%}, {rate:,.0f} tokens/s"


def print_table(console: Console, run: Path, rows: Sequence[tuple[str, str]], times: Mapping[str, float]) -> None:
    """The closing table, with the seconds of each phase."""
    table = Table(show_header=False, title=str(run), title_justify="left")
    for row in rows:
        table.add_row(*row)
    total = sum(times.values())
    for phase, seconds in times.items():
        table.add_row(f"time in {phase}", f"{seconds:.1f} s ({seconds / total:.0%})")
    console.print(table)
    console.print(f"pictures and samples: {run / 'report.html'}", highlight=False, soft_wrap=True)
