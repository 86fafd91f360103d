"""A run's folder and its files, its clock and its answer to Ctrl-C and SIGTERM."""

from __future__ import annotations

import json
import math
import os
import platform
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

from redit_fast.signals import handled
from redit_fast.training import report

SCHEMA = 2  # of the lines in metrics.jsonl and completions.jsonl: docs/metrics.md
LOCK = ".lock"
OF_A_START = {LOCK, "inputs.json", ".inputs.json", ".config.json"}  # what one that was killed may leave


class TakenError(ValueError):
    """The folder of a new run is not free."""


@contextmanager
def claimed(run: Path, *, new: bool) -> Iterator[Callable[[], None]]:
    """Holds a run's folder, which a `new` run makes, for this process alone: until the block ends or the process does.

    What it gives is called before the run writes: a folder that was removed or moved since, and may be another run's
    now, is left alone.

    Raises:
        TakenError: another process holds it, or the folder of a new run has files in it.
        NotImplementedError: on Windows.
    """
    try:
        import fcntl
    except ImportError:
        raise NotImplementedError(
            "redit-fast train needs Linux or macOS: this Python has no fcntl, which locks a run's folder"
        ) from None
    if new:
        refuse_taken(run)
        try:
            run.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(f"out_dir {run.parent}: {error.strerror}: needs a folder to write to") from None
    try:
        lock = (run / LOCK).open("a+b", buffering=0)
    except OSError as error:
        raise ValueError(f"{run / LOCK}: {error.strerror}: needs a file, which locks the run's folder") from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.seek(0)
            holder = lock.read().decode() or "another process"
            ends = "give another --name" if new else "--resume goes on with it once that has ended"
            raise TakenError(f"{run} holds a run that {holder} is at work on: {ends}") from None
        except OSError as error:
            raise ValueError(
                f"{run}: its file system locks no files ({error.strerror}), so that a second process could write into "
                "the run: give an --out-dir on another"
            ) from None
        if new:
            refuse_taken(run)  # now that nobody else can change it

        def is_here() -> bool:
            try:
                return os.path.samestat(os.fstat(lock.fileno()), os.stat(run / LOCK))
            except FileNotFoundError:
                return False

        def check() -> None:
            if not is_here():
                raise TakenError(f"{run} was removed or moved while the run was at work in it: nothing more is written")

        if not is_here():
            raise TakenError(f"{run} was removed by the process that made it: start again")
        with naming(run / LOCK):
            lock.truncate(0)
            lock.write(f"process {os.getpid()} on {platform.node()}".encode())
        # A process that a reward function has forked may outlive this one, and must not hold the folder then.
        os.register_at_fork(after_in_child=lock.close)
        yield check


def refuse_taken(run: Path) -> None:
    if (run / "config.json").exists():
        raise TakenError(f"{run} holds a run already: add --resume to go on with it, or give another --name")
    if run.is_dir() and set(os.listdir(run)) - OF_A_START:
        raise TakenError(f"{run} is a folder with other files in it: give another --name")
    if run.exists() and not run.is_dir():
        raise TakenError(f"{run} is a file, a run needs a folder: give another --name")


def remove(run: Path) -> None:
    """Takes back a run that has saved nothing; a file that is not the run's stays."""
    for name in ("config.json", "inputs.json", "metrics.jsonl", "completions.jsonl", LOCK):
        (run / name).unlink(missing_ok=True)
    for folder in (run / "checkpoints", run):
        if folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """An OSError of the code inside names the file: what a full disk gives a write does not."""
    try:
        yield
    except OSError as error:
        if error.filename is not None or error.strerror is None:
            raise
        raise OSError(f"{path}: {error.strerror}") from None


def append(path: Path, lines: list[dict]) -> None:
    """One write for all lines, so that a kill leaves at most a cut-off last one."""
    text = "".join(json.dumps(without_nan(line)) + "\n" for line in lines)
    with naming(path), path.open("a", encoding="utf-8") as file:
        file.write(text)


def without_nan(value: object) -> object:
    if isinstance(value, dict):
        return {key: without_nan(item) for key, item in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def keep_lines_until(run: Path, step: int, files: Sequence[str] = ("metrics.jsonl", "completions.jsonl")) -> None:
    """Drops the lines past the checkpoint that a run resumes from, a cut-off one too."""
    for name in files:
        kept = [line for line in report.rows(run / name) if line["step"] <= step]
        replace(run / name, "".join(json.dumps(line) + "\n" for line in kept))


def complete(path: Path, step: int, metrics: dict, times: dict[str, float]) -> dict:
    """Puts what an evaluation gave into the line of `step`, the last one, which is made where there is none, and
    returns it."""
    lines = report.rows(path)
    there = lines and lines[-1]["step"] == step
    line = report.in_todays_names(lines.pop()) if there else {"step": step}
    line = {"schema": SCHEMA} | line
    line |= metrics | {name: line.get(name, 0.0) + seconds for name, seconds in times.items()}
    replace(path, "".join(json.dumps(without_nan(line)) + "\n" for line in [*lines, line]))
    return line


def replace(path: Path, text: str) -> None:
    draft = path.with_name(f".{path.name}")
    with naming(path):
        draft.write_text(text, "utf-8")
    os.replace(draft, path)


class Clock:
    """Seconds of each phase of a step; what is in none is `other`."""

    def __init__(self):
        self.start, self.seconds = time.perf_counter(), {}

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.seconds[phase] = self.seconds.get(phase, 0.0) + time.perf_counter() - start

    def times(self) -> dict[str, float]:
        total = time.perf_counter() - self.start
        parts = self.seconds | {"other": total - sum(self.seconds.values())}
        return {f"time/{phase}": seconds for phase, seconds in parts.items()} | {"step_time": total}


@contextmanager
def uninterrupted(*, last: bool = False) -> Iterator[None]:
    """Holds a stop back until the block is done: parameters, optimizer and files change together or not at all.

    With `last`, of a run that is stopping already, what came is dropped.
    """
    came = []
    with handled(lambda before: lambda number, _: came.append(number)):
        yield
    if came and not last:
        signal.raise_signal(came[0])
