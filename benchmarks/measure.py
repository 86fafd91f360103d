"""Providers measured side by side: in turn, round by round, in one process, and every timed result checked.

    def build():                              # what the provider holds, and the function that runs every round
        def run(turn, thorough):
            inputs = batches[turn % 2]        # they change, so that a result from the round before is a wrong one
            with clock:
                out = op(inputs)              # only this is timed
            return Errors(value=..., gradient=..., row=...)   # from float64; all of it where thorough, else a sample
        return run

    rows = measure(Table("token_loss", "forward, float32", ..., [Provider("redit-fast", build, ours=True), ...]))

The first run is compiled and loaded in, the second shows the memory; of whole steps, which take long, the first does.
Then each round times each provider twice, from
cold caches and, where it is short, from warm ones.

The rounds of a table are made in blocks that lie minutes apart, each on inputs and providers that are built anew. Where
memory lies, and what else the machine does, stays for a whole block: two runs differed by a factor of 3 in a ratio
whose rounds, all in one block, agreed to a fifth.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import reduce
from statistics import median, quantiles
from typing import Any, NamedTuple

from .clock import clock, held
from .collectives import Dealt
from .roofline import Work

# What a library of others raises where it cannot run: all but the interrupts and the memory errors of this process.
FAILURES = (RuntimeError, TypeError, ValueError, LookupError, AttributeError, ImportError, AssertionError, OSError)
WORST_ROW = 0.5  # relative error of one row of a gradient: a row left out has 1, one with the wrong sign 2
SHORT = 0.1  # seconds: what takes longer moves more than any cache holds, so that warm is cold
LEAST_ROUNDS = 2  # a spread needs two


class Absent(Exception):
    """A provider that cannot run here; the text is the one sentence that says why."""


class Wrong(Exception):
    """A result that no error describes: the text says what is wrong with it."""


class Errors(NamedTuple):
    """From float64. `value`: the largest absolute error of the result; `gradient`: relative, in the Frobenius norm;
    `row`: relative, of the gradient's worst row. `ranks`: relative, of the gradient from that of one process, not from
    float64. None: the provider gives none."""

    value: float | None = None
    gradient: float | None = None
    row: float | None = None
    ranks: float | None = None


Run = Callable[[int, bool], Errors]


@dataclass(frozen=True)
class Provider:
    name: str
    build: Callable[[], Run]
    ours: bool = False
    cause: str = ""  # one sentence: how it can be faster than ours


@dataclass(frozen=True)
class Table:
    """One op at one size. The first provider of ours is the one that the others are compared with."""

    suite: str
    title: str
    sizes: dict[str, int]
    dtype: str
    work: Work
    providers: list[Provider]
    value: str  # what Errors.value is of
    limits: Errors  # above which a provider is wrong
    rounds: int
    axis: str = ""  # the size that grows along a series of tables with this title
    tokens: int = 0  # of a whole step of training: those of its prompts and completions


@dataclass
class Row:
    name: str
    ours: bool
    status: str = "measured"  # or absent, wrong, failed: then `note` says why and there is no time
    note: str = ""
    ms: float | None = None  # from cold caches: median, and the 10th and 90th percentile of n
    p10: float | None = None
    p90: float | None = None
    n: int = 0
    warm_ms: float | None = None
    first_ms: float | None = None  # with compilation, loading and whatever else is done once
    peak_mb: float | None = None  # that one call adds at its peak, its results included
    held_mb: float | None = None  # that building it and its first call leave: state, copies, models
    value_error: float | None = None
    gradient_error: float | None = None
    ranks_error: float | None = None
    times: float | None = None  # how many times as long as ours, by the rounds
    times_p10: float | None = None
    times_p90: float | None = None
    share: float | None = None  # of the roofline
    cause: str = ""
    parts: dict[str, float] = field(default_factory=dict)  # of a whole step: median ms of each phase
    computed: int = 0  # tokens that its decoder took, outside the rollout
    dealt: Dealt | None = None  # of a step on ranks
    seconds: list[float] = field(default_factory=list, repr=False)

    def stored(self) -> dict[str, Any]:
        """For JSON, where NaN is null."""
        kept = {name: value for name, value in asdict(self).items() if name != "seconds"}
        return {name: None if isinstance(value, float) and math.isnan(value) else value for name, value in kept.items()}


def _unbuilt(turn: int, thorough: bool) -> Errors:
    raise AssertionError("between two blocks nothing runs")


class Runner:
    """A provider's worst errors and its times. Itself and its inputs are there in a block only."""

    def __init__(self, provider: Provider, limits: Errors):
        self.limits, self.cause = limits, provider.cause
        self.row = Row(provider.name, provider.ours)
        self.run: Run = _unbuilt
        self.warm: list[float] = []
        self.parts: list[dict[str, float]] = []
        self.turn = 0
        self.worst = Errors()

    def start(self, provider: Provider, long: bool) -> None:
        """Build it, run it once, in the first block twice unless a run is `long`; a failure becomes the row's note."""
        first, before = not self.row.seconds, held()
        try:
            self.run = provider.build()
            seconds = self.timed(thorough=True, watch=first and long)
            if first and self.row.status == "measured":
                self.row.first_ms = 1e3 * seconds
                if not long:
                    self.timed(watch=True)
                self.row.peak_mb, self.row.held_mb = clock.peak / 1e6, (clock.held - before) / 1e6
                self.row.computed, self.row.dealt = clock.tokens, clock.dealt
        except Absent as reason:
            self.refuse("absent", str(reason))
        except FAILURES as error:
            self.failed(error)

    def timed(self, *, cold: bool = False, watch: bool = False, thorough: bool = False, again: bool = False) -> float:
        """Seconds of one run, whose result is compared; `again`: on the inputs of the run before."""
        turn = self.turn - again
        self.turn = turn + 1
        clock.restart(cold=cold, watch=watch)
        try:
            self.judge(self.run(turn, thorough))
        except Wrong as why:
            self.refuse("wrong", f"wrong: {why}")
        return clock.seconds

    def judge(self, errors: Errors) -> None:
        self.worst = worst(self.worst, errors)
        self.row.value_error, self.row.gradient_error = self.worst.value, self.worst.gradient
        self.row.ranks_error = self.worst.ranks
        for what, found, limit in zip(Errors._fields, self.worst, self.limits, strict=True):
            if found is not None and limit is not None and not found <= limit:
                self.refuse("wrong", f"wrong: {what} error {found:.1e}, limit {limit:.0e}")

    def refuse(self, status: str, why: str) -> None:
        self.row.status, self.row.note = status, why

    def failed(self, error: BaseException) -> None:
        words = str(error).strip().splitlines()
        self.refuse("failed", f"{type(error).__name__}: {words[0][:150]}" if words else type(error).__name__)

    def round(self, thorough: bool) -> None:
        try:
            self.row.seconds.append(self.timed(cold=True, thorough=thorough))
            self.parts.append(clock.parts)
            if self.row.seconds[-1] < SHORT:
                self.warm.append(self.timed(again=True))
        except FAILURES as error:
            self.failed(error)


def worst(first: Errors, *others: Errors) -> Errors:
    return reduce(lambda a, b: Errors(*map(_larger, a, b)), others, first)


def _larger(a: float | None, b: float | None) -> float | None:
    """NaN is larger than any number."""
    if a is None or b is None:
        return b if a is None else a
    return a if math.isnan(a) or a >= b else b


class Measurement:
    """Of one table, block by block."""

    def __init__(self) -> None:
        self.runners: list[Runner] = []

    def block(self, table: Table, blocks: int = 1) -> None:
        """One of so many. `table` is the same each time, built anew."""
        self.runners = self.runners or [Runner(provider, table.limits) for provider in table.providers]
        for runner, provider in zip(self.runners, table.providers, strict=True):
            if runner.row.status == "measured":
                runner.start(provider, long=table.tokens > 0)
        rounds = -(-max(LEAST_ROUNDS, table.rounds) // blocks)
        for turn in range(rounds):
            for runner in self.runners:
                if runner.row.status == "measured":
                    runner.round(thorough=turn == rounds - 1)
        for runner in self.runners:
            runner.run = _unbuilt

    def rows(self) -> list[Row]:
        """Of all blocks so far, in the table's order."""
        main = next((runner for runner in self.runners if runner.row.ours), None)
        for runner in self.runners:
            _summarise(runner, main)
        return [runner.row for runner in self.runners]


def measure(table: Table) -> list[Row]:
    """All rounds in one block."""
    measurement = Measurement()
    measurement.block(table)
    return measurement.rows()


def _summarise(runner: Runner, main: Runner | None) -> None:
    row = runner.row
    if row.status != "measured":
        row.ms = row.p10 = row.p90 = row.warm_ms = row.first_ms = row.peak_mb = row.held_mb = None
        row.times = row.times_p10 = row.times_p90 = None  # an earlier block may have been right
        row.n, row.parts, row.computed, row.dealt = 0, {}, 0, None
        return
    row.p10, row.ms, row.p90 = (1e3 * x for x in _spread(row.seconds))
    row.n, row.warm_ms = len(row.seconds), 1e3 * median(runner.warm) if runner.warm else None
    row.parts = {name: 1e3 * median(parts[name] for parts in runner.parts) for name in runner.parts[-1]}
    if main is not None and main is not runner and main.row.status == "measured":
        pairs = zip(row.seconds, main.row.seconds, strict=True)
        row.times_p10, row.times, row.times_p90 = _spread([theirs / ours for theirs, ours in pairs])
        row.cause = runner.cause if row.times < 1 else ""


def _spread(values: list[float]) -> tuple[float, float, float]:
    tenths = quantiles(values, n=10, method="inclusive")
    return tenths[0], median(values), tenths[-1]
