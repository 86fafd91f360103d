"""A step that ranks share, from prompts to updated weights: redit-fast bench ranks

The same step, with GR, of the same frozen prompts, lengths and completions is dealt to 1, 2, ... processes of one
thread each, as torchrun starts them. What is compared is the whole step: each rank samples completions for its share of
the prompts, then whole groups are dealt. Beside them, in the same rounds, one process takes the step by itself. On a
CPU the ranks share its cores: where these are fewer, the series says what dividing costs, not how it scales.

A step's gradient is compared on every rank with float64, as in the suite step, and with that of one process.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Literal

import torch

from . import bench_step
from .measure import Provider, Run, Table
from .place import Place
from .step_cases import Case, prepare
from .step_hosts import Settings
from .step_ranks import Ranks, start
from .step_worker import Libraries, taken
from .table import PHASES

LENGTHS = "gsm8k"
COUNTS = {"cpu": (1, 2, 3, 4, 5), "quick": (1, 2, 3), "cuda": (1, 2, 3, 4, 5, 6, 7, 8), "dry": (1, 2)}
ROUNDS = {"cpu": 5, "quick": 2, "cuda": 5, "dry": 2}
STRATEGIES: tuple[Literal["ddp", "fsdp2"], ...] = ("ddp", "fsdp2")
# Of ranks from one process: float32 sums of the same terms in another order were up to 1.0e-6 apart, and one of five
# ranks whose share is wrong by 1e-4 is 2e-5 off.
LIMITS = bench_step.LIMITS[torch.float32]._replace(ranks=3e-6)
FASTER = "its ranks compute at the same time"


def tables(place: Place, size: str) -> Iterator[Table]:
    device = place.device.type
    libraries = Libraries(device)
    try:
        with tempfile.TemporaryDirectory() as folder:
            case = replace(bench_step.case_of(LENGTHS, place, size), folder=folder)
            prepare(case, place.device, torch.float32)
            settings = Settings(case, device, "float32", gr=True)
            Ranks([libraries.begin("step_ranks", "One", settings, 1)]).close()
            for count in COUNTS[size]:
                if device == "cpu" or count <= torch.cuda.device_count():
                    yield from of_count(settings, count, ROUNDS[size], libraries)
    finally:
        libraries.close()


def of_count(settings: Settings, count: int, rounds: int, libraries: Libraries) -> Iterator[Table]:
    case, threads, running = settings.case, torch.get_num_threads(), []

    def builder(own: Settings, threads: int) -> Callable[[], Run]:
        def build() -> Run:
            ranks = start(libraries, own, threads)
            running.append(ranks)
            return lambda turn, thorough: taken(ranks(turn), *PHASES)

        return build

    providers = [Provider("one process", builder(settings, 1), True)]
    if settings.device == "cpu" and threads > 1:
        providers.append(Provider(f"one process, {threads} threads", builder(settings, threads), True))
    for strategy in STRATEGIES:
        own = replace(settings, size=count, strategy=strategy)
        providers.append(Provider(f"ranks, {strategy}", builder(own, 1), True))
    try:
        yield table(case, count, providers, rounds)
    finally:
        for ranks in running:
            ranks.close()


def table(case: Case, count: int, providers: list[Provider], rounds: int) -> Table:
    sizes = {"ranks": count, "R": case.scored, "useful": case.useful, "least": case.least, "V": case.vocabulary}
    work = bench_step.work(case, rollout=True, passes=2)
    return Table("ranks", f"step with GR, lengths {case.name}", sizes, "float32", work, providers, "log-prob", LIMITS,
                 rounds, "ranks", case.useful)  # fmt: skip


if __name__ == "__main__":
    from .command import main

    sys.exit(main("ranks", tables))
