"""A provider's step in a process of its own, so that its memory, its patches and its threads are its own."""

from __future__ import annotations

import math
import multiprocessing
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from multiprocessing.connection import Connection
from typing import Any

import torch
from torch import Tensor, nn

from . import oracle
from .clock import Peak, clock, resident, trim
from .measure import FAILURES, Absent, Errors, Wrong
from .step_cases import batches, expected, weights
from .step_hosts import LR, Host, Phases, Settings, own, restart, states

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
        self.tokens, self.phases, wrong = 0, Phases(timer), ""
        peak = Peak()
        if watch:
            peak.__enter__()
        found = Errors()
        try:
            self.host.step(turn, self.phases, rollout)
            if watch:
                peak.__exit__()
                peak.bytes += peak.before - self.base
            found = judge(self.host, self.settings, turn)
        except Wrong as why:
            wrong = str(why)
        return Step(found, self.phases.seconds, self.tokens, peak.bytes, wrong)


@torch.no_grad()
def judge(host: Host, settings: Settings, turn: int) -> Errors:
    """The largest error of a log-prob; of the gradient that the optimizer was given, which its first moment tells; of
    the embedding's worst row among the completions' tokens.

    Raises:
        Wrong: a weight was not updated as that gradient says.
    """
    right = expected(settings.case, turn, settings.gr)
    logp = host.logp()
    completions = batches(settings.case)[turn % 2].completions
    value, done = 0.0, 0
    for completion in completions:
        part = right.logp[done : done + len(completion)]
        done += len(completion)
        of = logp.get(tuple(completion))
        off = math.inf if of is None or len(of) != len(part) else (of.cpu().double() - part).abs().max().item()
        value = max(value, off) if off == off else off
    sums, rows = oracle.Sums(), oracle.Sums()
    used = torch.tensor(sorted({token for completion in completions for token in completion}))
    start = weights(settings.case)
    for name, p, state in states(host):
        gradient = own(state["exp_avg"]).float().cpu() / (1 - BETA1)
        sums.add(gradient.view(1, -1), right.gradient[name].double().view(1, -1))
        if "embed_tokens" in name:
            rows.add(gradient[used], right.gradient[name][used].double())
        if p.dtype == torch.float32:
            _check_update(name, start[name], p.cpu(), gradient)
    return Errors(value, sums.errors(None).gradient, rows.worst)


def _check_update(name: str, before: Tensor, after: Tensor, gradient: Tensor) -> None:
    """The first step of AdamW is the learning rate times g / (|g| + eps)."""
    moved = (before.double() - after.double()) / LR
    rounding = before.abs().max().item() * 2**-23 / LR
    off = (moved - gradient.double() / (gradient.double().abs() + EPS)).abs().max().item()
    if not off <= UPDATE + rounding:
        raise Wrong(f"{name} was not updated by its gradient: off by {off:.1e} of the learning rate")


def serve(connection: Connection, module: str, name: str, settings: Settings, threads: int, timer: str) -> None:
    """The process: builds the host, then answers (turn, rollout, watch) with a Step, or with what was raised."""
    quiet = os.open(os.devnull, os.O_WRONLY)
    os.dup2(quiet, 1)  # progress bars and notices of the libraries
    os.dup2(quiet, 2)
    torch.set_num_threads(threads)
    read = getattr(time, timer)
    try:
        factory = getattr(import_module(f"{__package__}.{module}"), name)
        factory.load()
        trim()
        base = 0 if settings.device == "cuda" else resident("VmRSS")
        measured = Measured(settings, factory, base)
        connection.send(None)
        while (asked := connection.recv()) is not None:
            turn, rollout, watch = asked
            connection.send(measured.step(turn, rollout, read, watch))
    except (*FAILURES, Absent) as error:
        kind = next(kind for kind in (*FAILURES, Absent) if isinstance(error, kind))  # its own may not be known there
        connection.send(kind(str(error)))


def taken(step: Step) -> Errors:
    """Hands a step's times and memory to the clock.

    Raises:
        Wrong: what no error describes.
    """
    clock.took(step.seconds, step.computed, step.peak)
    if step.wrong:
        raise Wrong(step.wrong)
    return step.errors


class Process:
    """The provider's process, seen from the benchmark's: ends with it."""

    def __init__(self, module: str, name: str, settings: Settings):
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        timer = clock.timer.__name__
        arguments = (theirs, module, name, settings, torch.get_num_threads(), timer)
        self.process = context.Process(target=serve, args=arguments, daemon=True)
        self.process.start()
        theirs.close()
        self._received()

    def _received(self) -> Any:
        try:
            found = self.connection.recv()
        except EOFError:
            raise RuntimeError(f"its process ended with exit code {self.process.exitcode}") from None
        if isinstance(found, Exception):
            raise found
        return found

    def __call__(self, turn: int, rollout: bool) -> Errors:
        """One step; its times are the clock's."""
        self.connection.send((turn, rollout, clock.watch))
        return taken(self._received())

    @property
    def alive(self) -> bool:
        return self.process.is_alive()

    def close(self) -> None:
        if self.alive:
            self.connection.send(None)
        self.process.join()
