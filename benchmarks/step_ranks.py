"""A step of this package's trainer that several processes share, and these seen from the benchmark's."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from datetime import timedelta
from importlib import import_module
from multiprocessing.connection import wait
from statistics import mean
from typing import Any

import torch
from safetensors.torch import save_file

from .clock import clock
from .collectives import Dealt
from .measure import FAILURES, worst
from .step_cases import TURNS
from .step_hosts import Phases, Settings, Trainer, restart, states
from .step_worker import Libraries, Process, Step, file_of_one, given


class OnRanks(Trainer):
    """What torchrun starts, as one of its processes; without a strategy, as the only one."""

    patience = timedelta(seconds=60)  # of a rank for the others: then it says so, and the step has no number

    @staticmethod
    def load() -> None:
        Trainer.load()
        for name in ("torch.distributed.fsdp", "torch.distributed.tensor"):
            import_module(name)

    def __init__(self, settings: Settings):
        if settings.strategy is not None:
            if settings.device == "cuda":
                torch.cuda.set_device(settings.rank)
            store = torch.distributed.FileStore(settings.meeting, settings.size)
            torch.distributed.init_process_group(
                "gloo" if settings.device == "cpu" else "cpu:gloo,cuda:nccl", store=store, rank=settings.rank,
                world_size=settings.size, timeout=self.patience,
            )  # fmt: skip
        super().__init__(settings)
        self.step(0, Phases(time.perf_counter), rollout=False)  # in the first one DDP makes its buckets again


class One(Trainer):
    """One process, which writes the gradients that those of several are compared with."""

    def __init__(self, settings: Settings):
        super().__init__(settings)
        for turn in range(TURNS):
            restart(self, settings.case)
            self.step(turn, Phases(time.perf_counter), rollout=False)
            save_file({name: given(state) for name, _, state in states(self)}, file_of_one(settings, turn))


def start(libraries: Libraries, settings: Settings, threads: int) -> Ranks:
    """The `settings.size` processes of a step, all of them ready."""
    meeting = f"{tempfile.mkdtemp(dir=settings.case.folder)}/store"
    own = [replace(settings, rank=rank, meeting=meeting) for rank in range(settings.size)]
    return Ranks([libraries.begin("step_ranks", "OnRanks", each, threads) for each in own])


class Ranks:
    """The processes that share a step. A step takes as long as the slowest of them."""

    def __init__(self, processes: Sequence[Process]):
        self.processes = processes
        self._received()

    def __call__(self, turn: int) -> Step:
        for process in self.processes:
            process.ask(turn, rollout=True)
        return merged(self._received())

    def _received(self) -> list[Step]:
        """What all answer, by rank.

        Raises:
            RuntimeError: what the first one to raise has raised. The others find their connections to it broken, or
                lose their patience.
        """
        found: dict[int, Step] = {}
        errors: list[str] = []
        waiting: dict[Any, int] = {process.connection: rank for rank, process in enumerate(self.processes)}
        while waiting:
            for connection in wait(waiting):
                rank = waiting.pop(connection)
                try:
                    found[rank] = self.processes[rank].received()
                except FAILURES as error:
                    errors.append(f"rank {rank}: {type(error).__name__}: {error}")
        if errors:
            raise RuntimeError(errors[0])
        return [found[rank] for rank in range(len(found))]

    def close(self) -> None:
        for process in self.processes:
            process.close()


def merged(steps: Sequence[Step]) -> Step:
    """Of all ranks: the slowest one's times, or under a clock of CPU time all ranks' together; the worst errors, all
    tokens, the most memory."""
    seconds = max((step.seconds for step in steps), key=lambda each: sum(each.values()))
    if clock.timer is time.process_time:
        seconds = {phase: sum(step.seconds[phase] for step in steps) for phase in seconds}
    wrong = next((f"rank {rank}: {step.wrong}" for rank, step in enumerate(steps) if step.wrong), "")
    computed, dealt = [step.computed for step in steps], None
    if not wrong:
        sent = max(step.sent for step in steps) / 1e6
        dealt = Dealt(max(computed) / mean(computed), max(step.collectives for step in steps), sent)
    errors, peak = worst(*(step.errors for step in steps)), max(step.peak for step in steps)
    return Step(errors, seconds, sum(computed), peak, wrong, dealt=dealt)
