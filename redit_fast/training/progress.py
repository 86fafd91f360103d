"""What a run shows while it goes: a bar on a terminal, elsewhere plain lines, so that a log is alive."""

from __future__ import annotations

import threading
import time
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from rich.console import Console, ConsoleOptions, RenderResult
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

EVERY = 10.0  # seconds between two lines
LEAST = 10  # columns of a bar that has times and numbers beside it


class Task(NamedTuple):
    """What is shown of a task, in one piece for the thread that shows it. An evaluation is no step: the time that is
    left is told by the mean of each."""

    name: str
    total: int
    first: int  # what was done at its beginning
    done: int
    evaluations: int  # to come
    numbers: str
    began: float
    since: float  # when the last step, with its evaluation, was over
    steps_took: float = 0.0  # seconds
    evaluated: int = 0
    evaluations_took: float = 0.0

    def after(self, now: float, advance: int, numbers: str, evaluation: float | None) -> Task:
        """With `advance` steps more, the last with an evaluation of so many seconds; with 0 there was that alone."""
        took = max(0.0, now - self.since - (evaluation or 0.0)) if advance else 0.0
        return self._replace(
            done=self.done + advance,
            evaluations=self.evaluations - (evaluation is not None and advance > 0),
            numbers=numbers,
            since=now,
            steps_took=self.steps_took + took,
            evaluated=self.evaluated + (evaluation is not None),
            evaluations_took=self.evaluations_took + (evaluation or 0.0),
        )

    def elapsed(self, now: float) -> str:
        return _clock((self.since if self.done >= self.total else now) - self.began)

    def left(self, now: float) -> str | None:
        """None before the first step. It never rises while a step or an evaluation goes on, however long that takes."""
        if self.done == self.first:
            return None
        step = self.steps_took / (self.done - self.first)
        ahead = (self.total - self.done) * step + self.evaluations * self.evaluations_took / max(1, self.evaluated)
        return _clock(max(ahead - (now - self.since), ahead - step, 0.0))


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}"


class Shown:
    """The tasks of a run, of which the last is at work. By itself it shows nothing."""

    def __init__(self):
        self.tasks: list[Task] = []

    def __enter__(self) -> Shown:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        pass

    def add_task(self, name: str, *, total: int, completed: int = 0, numbers: str = "", evaluations: int = 0) -> int:
        """Returns its number.

        Args:
            evaluations: how many are to come.
        """
        now = time.monotonic()
        self.tasks.append(Task(name, total, completed, completed, evaluations, numbers, now, now))
        return len(self.tasks) - 1

    def update(
        self,
        task: int,
        *,
        advance: int,
        numbers: str,
        held_out: float | None = None,
        evaluation: float | None = None,
    ) -> None:
        """Of the task of that number, `advance` more are done.

        Args:
            held_out: the accuracy, where there was an evaluation.
            evaluation: the seconds that this took.
        """
        self.tasks[task] = self.tasks[task].after(time.monotonic(), advance, numbers, evaluation)


class Lines(Shown):
    """Lines on stdout: one every 10 s and one at each evaluation."""

    def __init__(self):
        super().__init__()
        self._start, self._over = time.monotonic(), threading.Event()
        self._thread = threading.Thread(target=self._tick, daemon=True)  # a step alone may take minutes

    def __enter__(self) -> Lines:
        self._thread.start()
        return self

    def stop(self) -> None:
        self._over.set()

    def update(self, task: int, *, held_out: float | None = None, **more) -> None:
        super().update(task, **more)
        if held_out is not None:
            self._print(f"held out {held_out:.1%}")

    def _tick(self) -> None:
        while not self._over.wait(EVERY):
            self._print()

    def _print(self, more: str = "") -> None:
        if not self.tasks or self._over.is_set():
            return
        task, now = self.tasks[-1], time.monotonic()
        left = f"{left} left" if (left := task.left(now)) else ""
        words = filter(None, (f"{task.name} {task.done}/{task.total}", task.numbers, more, left))
        try:
            print(f"{_clock(now - self._start)} {', '.join(words)}", flush=True)
        except OSError as error:  # whoever read them has gone: no reason to lose the run
            self._over.set()
            warnings.warn(f"no more lines on stdout ({error.strerror}); the run goes on", stacklevel=2)


class Bar(Shown):
    """A bar for each task, as wide as the terminal allows beside its times and numbers, or above them."""

    def __init__(self, console: Console):
        super().__init__()
        self._live = Live(self, console=console, refresh_per_second=4)

    def __enter__(self) -> Bar:
        self._live.start()
        return self

    def stop(self) -> None:
        self._live.stop()

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        tasks, now, width = list(self.tasks), time.monotonic(), options.max_width
        longest = max((len(task.name) for task in tasks), default=0)
        for task in tasks:
            name, beside = f"{task.name:{longest}}", [f"{task.done}/{task.total}"]
            below: list[str] = []
            times = f"elapsed {task.elapsed(now)}, left {task.left(now) or '-:--:--'}"
            for text in filter(None, (times, task.numbers)):
                fits = not below and longest + LEAST + sum(1 + len(part) for part in (*beside, text)) < width
                (beside if fits else below).append(text)
            room = width - longest - 1 - sum(1 + len(part) for part in beside)
            line = Table.grid(padding=(0, 1))
            line.add_row(Text(name), ProgressBar(task.total, task.done, width=max(1, room)), *map(Text, beside))
            yield line
            yield from map(Text, below)


def shown(console: Console) -> Shown:
    if console.quiet:  # the first rank shows
        return Shown()
    return Bar(console) if console.is_interactive or console.is_jupyter else Lines()


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
    console.print(f"the report: {run / 'report.html'}", highlight=False, soft_wrap=True)
