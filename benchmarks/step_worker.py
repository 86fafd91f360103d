"""A provider's step in a process of its own, so that its memory, its patches and its threads are its own.

On a CPU that process is a fork of one that has imported the provider's libraries, which takes six seconds each time.
A GPU that such an import has touched cannot be used in a fork: there each provider imports its own.
"""

from __future__ import annotations

import math
import multiprocessing
import os
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from importlib import import_module
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from multiprocessing.reduction import recv_handle, send_handle
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from . import oracle
from .clock import Peak, clock, resident, trim
from .collectives import Dealt, Sent
from .measure import FAILURES, Absent, Errors, Wrong
from .step_cases import TURNS, batches, expected, weights
from .step_hosts import LR, Host, Phases, Settings, restart, states, whole

BETA1, BETA2, EPS = 0.9, 0.999, 1e-8  # torch's AdamW and ours
UPDATE = 1e-2  # by which a weight's update may be off, in learning rates: it is a rounded difference of weights


@dataclass
class Step:
    """What the process of a provider sends back."""

    errors: Errors
    seconds: dict[str, float]  # by phase
    computed: int  # tokens, by the decoder, without those of the rollout
    peak: float  # bytes, above the process that has loaded its libraries
    wrong: str = ""
    collectives: int = 0  # of one rank of several, where they are counted
    sent: float = 0.0  # bytes
    dealt: Dealt | None = None  # of all ranks together


class Measured:
    """A host whose steps are timed and compared."""

    def __init__(self, settings: Settings, host: Callable[[Settings], Host], base: int = 0):
        self.settings, self.base = settings, base
        self.host = host(settings)
        self.tokens = 0
        # A layer's, since packing is put between the decoder and its layers.
        self.host.model.get_submodule("model.layers.0").register_forward_hook(self._count)

    def _count(self, layer: nn.Module, args: tuple, output: Any) -> None:
        if self.phases.current != "rollout":
            self.tokens += args[0].shape[:2].numel()

    def step(self, turn: int, rollout: bool, timer: Callable[[], float], watch: bool) -> Step:
        case = self.settings.case
        restart(self.host, case)
        ranks = self.settings.strategy is not None
        if ranks:
            torch.distributed.barrier()
        self.tokens, self.phases, wrong = 0, Phases(timer), ""
        sent = Sent(self.settings.size)
        peak = Peak()
        if watch:
            peak.__enter__()
        found = Errors()
        try:
            with sent if watch and ranks else nullcontext():
                self.host.step(turn, self.phases, rollout)
            if watch:
                peak.__exit__()
                peak.bytes += peak.before - self.base
            found = judge(self.host, self.settings, turn)
        except Wrong as why:
            wrong = str(why)
        return Step(found, self.phases.seconds, self.tokens, peak.bytes, wrong, sent.collectives, sent.bytes)


@torch.no_grad()
def judge(host: Host, settings: Settings, turn: int) -> Errors:
    """The largest error of a log-prob; of the gradient that the optimizer was given, which its first moment tells; of
    the embedding's worst row among the completions' tokens; and on ranks, of the gradient from that of one process.

    Raises:
        Wrong: a weight was not updated as that gradient says.
    """
    right = expected(settings.case, turn, host.pass2 if settings.gr else "none")
    logp = host.logp()
    completions = batches(settings.case)[turn % 2].completions
    value, done = 0.0, 0
    for completion in completions:
        part = right.logp[done : done + len(completion)]
        done += len(completion)
        of = logp.get(tuple(completion))
        off = math.inf if of is None or len(of) != len(part) else (of.cpu().double() - part).abs().max().item()
        value = max(value, off) if off == off else off
    sums, rows, apart = oracle.Sums(), oracle.Sums(), oracle.Sums()
    used = torch.tensor(sorted({token for completion in completions for token in completion}))
    start = weights(settings.case)
    alone = None if settings.strategy is None else load_file(file_of_one(settings, turn))
    # All before anything is judged, since a rank that finds something wrong would leave the others waiting.
    found = [(name, whole(p), given(state)) for name, p, state in states(host)]
    for name, p, gradient in found:
        if alone is not None:
            apart.add(gradient.view(1, -1), alone[name].view(1, -1).double())
        sums.add(gradient.view(1, -1), right.gradient[name].double().view(1, -1))
        if "embed_tokens" in name:
            rows.add(gradient[used], right.gradient[name][used].double())
        if p.dtype == torch.float32:
            _check_update(name, start[name], p.cpu(), gradient)
    ranks = None if alone is None else apart.errors(None).gradient
    return Errors(value, sums.errors(None).gradient, rows.worst, ranks)


def given(state: Mapping[str, Tensor]) -> Tensor:
    """The gradient that the optimizer was given in its first step, of a parameter's state."""
    return whole(state["exp_avg"]).float().cpu() / (1 - BETA1)


def file_of_one(settings: Settings, turn: int) -> Path:
    """Where the gradients of one process are, with which those of several are compared."""
    return Path(settings.case.folder) / f"one-{turn % TURNS}.safetensors"


def _check_update(name: str, before: Tensor, after: Tensor, gradient: Tensor) -> None:
    """The first step of AdamW is the learning rate times g / (|g| + eps)."""
    moved = (before.double() - after.double()) / LR
    rounding = before.abs().max().item() * 2**-23 / LR
    off = (moved - gradient.double() / (gradient.double().abs() + EPS)).abs().max().item()
    if not off <= UPDATE + rounding:
        raise Wrong(f"{name} was not updated by its gradient: off by {off:.1e} of the learning rate")


def library(connection: Connection, module: str, device: str, timer: str) -> None:
    """The process of a module: imports what its providers need when the first of them is asked for, then forks, for
    each (provider, settings, threads) that comes with a connection, the process that serves it."""
    quiet = os.open(os.devnull, os.O_WRONLY)
    os.dup2(quiet, 1)  # progress bars and notices of the libraries
    os.dup2(quiet, 2)
    loaded, fork = False, multiprocessing.get_context("fork")
    with suppress(EOFError):  # the benchmark has ended
        while (asked := connection.recv()) is not None:
            name, settings, threads = asked
            theirs = Connection(recv_handle(connection))
            try:
                factory = getattr(import_module(f"{__package__}.{module}"), name)
                if not loaded:
                    factory.load()
                    loaded = True
            except (*FAILURES, Absent) as error:
                theirs.send(_known(error))
            else:
                arguments = (theirs, factory, settings, threads, getattr(time, timer))
                if device == "cpu":
                    fork.Process(target=serve, args=arguments, daemon=True).start()
                else:
                    serve(*arguments)
            theirs.close()


def serve(connection: Connection, factory: Any, settings: Settings, threads: int, timer: Callable[[], float]) -> None:
    """Builds the host, then answers (turn, rollout, watch) with a Step, or with what was raised, until None comes."""
    torch.set_num_threads(threads)  # not before the fork, in which threads are missing
    try:
        trim()
        base = 0 if settings.device == "cuda" else resident("VmRSS")
        measured = Measured(settings, factory, base)
        connection.send(None)
        while (asked := connection.recv()) is not None:
            turn, rollout, watch = asked
            connection.send(measured.step(turn, rollout, timer, watch))
    except EOFError:  # the benchmark has ended
        return
    except (*FAILURES, Absent) as error:
        connection.send(_known(error))


def _known(error: Exception) -> Exception:
    """Its class may not be known in the other process."""
    return next(kind for kind in (*FAILURES, Absent) if isinstance(error, kind))(str(error))


def taken(step: Step, *phases: str) -> Errors:
    """Hands a step's times, of these phases, and its memory to the clock.

    Raises:
        Wrong: what no error describes.
    """
    parts = {phase: s for phase, s in step.seconds.items() if phase in phases}
    clock.took(parts, step.computed, step.peak, step.dealt)
    if step.wrong:
        raise Wrong(step.wrong)
    return step.errors


class Libraries:
    """The processes that import, seen from the benchmark's; they end with it."""

    def __init__(self, device: str):
        self.device = device
        self.started: dict[str, tuple[BaseProcess, Connection]] = {}

    def start(self, module: str, name: str, settings: Settings) -> Process:
        """A process for that provider, which is ready."""
        process = self.begin(module, name, settings, torch.get_num_threads())
        process.received()
        return process

    def begin(self, module: str, name: str, settings: Settings, threads: int) -> Process:
        """A process that is about to be ready, and then says so; of a module that was started before, a fork on a CPU.
        Ranks are ready when all have begun."""
        key = module if self.device == "cpu" else f"{module}.{name}.{settings}"
        if key not in self.started:
            context = multiprocessing.get_context("spawn")
            connection, theirs = context.Pipe()
            arguments = (theirs, module, self.device, clock.timer.__name__)
            started = context.Process(target=library, args=arguments)
            started.start()
            theirs.close()
            self.started[key] = started, connection
        process, connection = self.started[key]
        ours, theirs = multiprocessing.Pipe()
        connection.send((name, settings, threads))
        send_handle(connection, theirs.fileno(), process.pid)
        theirs.close()
        return Process(ours)

    def close(self) -> None:
        for _, connection in self.started.values():
            with suppress(OSError):  # it has ended
                connection.send(None)
        for process, _ in self.started.values():
            process.join()


class Process:
    """The provider's process, seen from the benchmark's: ends with it."""

    def __init__(self, connection: Connection):
        self.connection, self.alive = connection, True

    def received(self) -> Any:
        """What it answers.

        Raises:
            What it has raised, of FAILURES and Absent; RuntimeError: it has ended.
        """
        try:
            found = self.connection.recv()
        except EOFError:
            self.alive = False
            raise RuntimeError("its process was ended, perhaps for want of memory") from None
        if isinstance(found, Exception):
            self.alive = False
            raise found
        return found

    def ask(self, turn: int, rollout: bool) -> None:
        self.connection.send((turn, rollout, clock.watch))

    def __call__(self, turn: int, rollout: bool) -> Step:
        self.ask(turn, rollout)
        return self.received()

    def close(self) -> None:
        if self.alive:
            self.connection.send(None)
        self.connection.close()
