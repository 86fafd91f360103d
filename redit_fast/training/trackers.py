"""The lines of metrics.jsonl in TensorBoard, wandb and trackio too (`track`): the same keys, without what is null.

Each works in a thread of its own: one that raises, or waits for a network or for a key to be typed, holds up no step.
"""

from __future__ import annotations

import math
import os
import threading
import time
import uuid
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from queue import SimpleQueue

from redit_fast.foreign import Foreign
from redit_fast.training import runs
from redit_fast.training.config import TrainConfig
from redit_fast.training.distributed import Ranks
from redit_fast.training.reward_model.config import RewardModelConfig

PROJECT = "redit-fast"
CLOSING = 30.0  # seconds that all have, when the run is over, to send what they still have
Log = Callable[[int, dict[str, float]], object]  # of a step, the numbers by their keys
Close = Callable[[], object]


@contextmanager
def opened(
    config: TrainConfig | RewardModelConfig, run: Path, done: int, completed: dict | None, ranks: Ranks
) -> Iterator[Callable[[dict], None]]:
    """What gives a line of metrics.jsonl to the trackers, on the first rank. They append to what they have of the run;
    at the end of the block they are closed.

    Args:
        done: the step that the run begins at or goes on from.
        completed: that step's line, where it was not there or has been completed; it is given to them.

    Warns once of a tracker that raises, and of one that at the end has not taken all in `CLOSING` seconds.
    """
    first = done if completed else done + 1
    at_work = [_Tracker(name, config, run, first) for name in (ranks.first and config.track) or ()]

    def track(line: dict) -> None:
        numbers = {key: value for key, value in line.items() if key not in ("schema", "step") and _is_number(value)}
        for tracker in at_work:
            tracker.steps.put((line["step"], dict(numbers)))

    if completed:
        track(completed)
    try:
        yield track
    finally:
        with runs.uninterrupted(last=True):
            _close(at_work)


def _is_number(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


def _close(at_work: list[_Tracker]) -> None:
    end = time.monotonic() + CLOSING
    for tracker in at_work:
        tracker.steps.put(None)
    for tracker in at_work:
        tracker.thread.join(max(0.0, end - time.monotonic()))
        if tracker.thread.is_alive():
            tracker.left = True
            warnings.warn(
                f"track {tracker.name}: it has not taken the run's last numbers in {CLOSING:g} s and is left; "
                "metrics.jsonl has all of them",
                stacklevel=2,
            )


class _Tracker:
    def __init__(self, name: str, config: TrainConfig | RewardModelConfig, run: Path, first: int):
        self.name, self.left = name, False
        self.steps: SimpleQueue[tuple[int, dict[str, float]] | None] = SimpleQueue()  # None: there are no more
        self.thread = threading.Thread(target=self._work, args=(config, run, first), daemon=True)
        self.thread.start()

    def _work(self, config: TrainConfig | RewardModelConfig, run: Path, first: int) -> None:
        try:
            with Foreign(f"track {self.name}"):
                log, close = OPEN[self.name](config, run, first)
                while (of_step := self.steps.get()) is not None:
                    log(*of_step)
                close()
        except (ValueError, KeyboardInterrupt) as error:  # a Ctrl-C is the main thread's
            if not self.left:
                said = error if isinstance(error, ValueError) else f"track {self.name}: KeyboardInterrupt"
                more = "it gets no more numbers, the run goes on and metrics.jsonl has all"
                warnings.warn(f"{said}; {more}", stacklevel=2)


def _tensorboard(config: TrainConfig | RewardModelConfig, run: Path, first: int) -> tuple[Log, Close]:
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(str(run / "tensorboard"), purge_step=first)

    def log(step: int, numbers: dict[str, float]) -> None:
        for key, value in numbers.items():
            writer.add_scalar(key, value, step)
        writer.flush()  # a kill then loses no step that metrics.jsonl has

    return log, writer.close


def _wandb(config: TrainConfig | RewardModelConfig, run: Path, first: int) -> tuple[Log, Close]:
    import wandb

    there = wandb.init(
        project=os.environ.get("WANDB_PROJECT", PROJECT),
        name=config.name,
        id=_id(run, "wandb"),
        resume="allow",
        dir=str(run),
        config=config.model_dump(),
        # It would take over stdout, where the bar is, and wait for a network at the end of the process.
        settings=wandb.Settings(
            console="off", quiet=True, init_timeout=CLOSING * 2 / 3, finish_timeout=CLOSING * 2 / 3
        ),
    )
    there.define_metric("*", step_metric="step")  # its own step would drop those that a killed run takes again
    return lambda step, numbers: there.log({"step": step, **numbers}), there.finish


def _trackio(config: TrainConfig | RewardModelConfig, run: Path, first: int) -> tuple[Log, Close]:
    import trackio

    there = trackio.init(
        project=os.environ.get("TRACKIO_PROJECT", PROJECT),
        name=f"{config.name}-{_id(run, 'trackio')}",  # by which it knows a run
        resume="allow",
        config=config.model_dump(),
        embed=False,
    )
    return lambda step, numbers: there.log(numbers, step=step), there.finish


OPEN: dict[str, Callable[[TrainConfig | RewardModelConfig, Path, int], tuple[Log, Close]]] = {
    "tensorboard": _tensorboard,
    "wandb": _wandb,
    "trackio": _trackio,
}


def _id(run: Path, tracker: str) -> str:
    """What the tracker knows the run by, also after `--resume`."""
    file = run / f".{tracker}-id"
    if not file.exists():
        runs.replace(file, uuid.uuid4().hex[:8])
    return file.read_text("utf-8")
