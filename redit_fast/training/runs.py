"""The files of a run, its clock and its answer to Ctrl-C."""

from __future__ import annotations

import json
import math
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from redit_fast.training import report

SCHEMA = 1  # of the lines in metrics.jsonl and completions.jsonl: docs/metrics.md


def append(path: Path, lines: list[dict]) -> None:
    """One write for all lines, so that a kill leaves at most a cut-off last one."""
    text = "".join(json.dumps(_without_nan(line)) + "\n" for line in lines)
    with path.open("a", encoding="utf-8") as file:
        file.write(text)


def _without_nan(value: object) -> object:
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def keep_lines_until(run: Path, step: int) -> None:
    """Drops the lines past the checkpoint that a run resumes from, a cut-off one too."""
    for name in ("metrics.jsonl", "completions.jsonl"):
        kept = [line for line in report.rows(run / name) if line["step"] <= step]
        replace(run / name, "".join(json.dumps(line) + "\n" for line in kept))


def replace(path: Path, text: str) -> None:
    draft = path.with_name(f".{path.name}")
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
        return {f"time/{phase}": seconds for phase, seconds in parts.items()} | {"time/step": total}


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Holds a Ctrl-C back until the block is done: parameters, optimizer and files change together or not at all."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    pressed = []
    handler = signal.signal(signal.SIGINT, lambda *_: pressed.append(True))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
    if pressed:
        raise KeyboardInterrupt
