"""Group advantages from rewards: redit-fast bench advantages

Eight completions a prompt and three rewards in float64, clean and dithered; nobody else has dithering. Rewards are
halves from 0 to 1: some groups are dead.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

import redit_fast as rf
from redit_fast.noise import noise

from . import peers
from .backends import forced, of_ours
from .clock import clock
from .measure import Errors, Provider, Run, Table
from .place import Place
from .roofline import Work

GROUP, REWARDS, STEP = 8, 3, 3
DITHER = rf.Dither()
SIZES = {  # prompts; prompts of the series
    "cpu": ((16, 1024), (64, 128, 256, 512, 2048)),
    "quick": ((128,), (16, 32, 64, 128, 256)),
    "cuda": ((128, 1024), (64, 256, 1024, 4096, 16_384)),
    "dry": ((4,), (2, 4, 8)),
}
BARE = "it checks nothing, takes no unscored rewards and gives neither statistics nor dead groups"
CAUSES = {
    "TRL, GRPOTrainer's lines": "it checks nothing, and much of our call is Python before the kernel",
    "the bare formula": BARE,
    "its torch.compile": BARE,
}


def tables(place: Place, size: str) -> Iterator[Table]:
    many, series = SIZES[size]
    for prompts in many:
        yield table(place, prompts, 51 if size != "dry" else 3)
    for prompts in series:
        yield table(place, prompts, 25 if size != "dry" else 3, axis="P")


def exact(rewards: Tensor, eps: float, dither: bool) -> Tensor:
    """(N,) in float64. Equal clean rewards without dither give 0."""
    ids = torch.arange(len(rewards), device=rewards.device)
    half_range = DITHER.level_at(STEP)
    drawn = [noise("gaussian", half_range, DITHER.seed, ids, k, STEP) for k in range(REWARDS)] if dither else []
    total = (rewards + torch.stack(drawn, 1) if dither else rewards).sum(1).view(-1, GROUP)
    centred = total - total.mean(1, keepdim=True)
    return (centred / (total.std(1, keepdim=True) + eps)).flatten()


def table(place: Place, prompts: int, rounds: int, axis: str = "") -> Table:
    samples = prompts * GROUP
    batches = [
        torch.randint(0, 3, (samples, REWARDS), generator=place.generator(turn), device=place.device).double() / 2
        for turn in range(2)
    ]

    def provider(
        name: str,
        load: Callable[[], Callable[[Tensor], Tensor]],
        ours: bool = False,
        eps: float = 1e-4,
        dither: bool = False,
        prepare: Callable[[Tensor], Any] = lambda rewards: rewards,
    ) -> Provider:
        wanted = [exact(rewards, eps, dither) for rewards in batches]

        def build() -> Run:
            advantages, inputs = load(), [prepare(rewards) for rewards in batches]

            def run(turn: int, thorough: bool) -> Errors:
                with clock:
                    out = advantages(inputs[turn % 2])
                return Errors((out.double() - wanted[turn % 2]).abs().max().item())

            return run

        return Provider(name, build, ours, CAUSES.get(name, ""))

    def ours(backend: str, dither: bool) -> Callable[[Tensor], Tensor]:
        compute = forced(backend, rf.group_advantages)
        dithered = DITHER if dither else None
        return lambda rewards: compute(rewards, group_size=GROUP, dither=dithered, step=STEP).values

    def verl() -> Callable[[Tensor], Tensor]:
        import numpy as np

        index = np.array([f"prompt-{i // GROUP}" for i in range(samples)], dtype=object)  # its uid of each sample
        estimator = peers.verl_advantages(place)
        return lambda total: estimator(total, index)

    backends = [*of_ours("group_advantages", place)]
    if not any(backend == "reference" for _, backend in backends):
        backends.append(("reference", "reference"))
    providers = [
        provider(f"{name}, {'dithered' if dither else 'clean'}", partial(ours, backend, dither), True,
                 dither=dither)
        for name, backend in backends for dither in (False, True)
    ]  # fmt: skip
    providers.append(provider("TRL, GRPOTrainer's lines", lambda: peers.trl_advantages(place, GROUP, REWARDS),
                              prepare=lambda rewards: rewards.float()))  # fmt: skip
    providers.append(provider("the bare formula", lambda: lambda rewards: peers.bare_advantages(rewards, GROUP)))
    if not axis:
        compiled = torch.compile(peers.bare_advantages)
        providers.append(provider("its torch.compile", lambda: lambda rewards: compiled(rewards, GROUP)))
    if not axis and prompts <= 128:  # it takes 20 us a sample
        providers.append(provider("verl, grpo estimator", verl, eps=1e-6, prepare=lambda rewards: rewards.sum(1)))
    work = Work(reads=8 * REWARDS * samples, writes=samples * (5 * 4 + 1))
    return Table("advantages", "advantages", {"P": prompts, "G": GROUP, "K": REWARDS}, "float64", work, providers,
                 "advantage", Errors(1e-4), rounds, axis)  # fmt: skip


if __name__ == "__main__":
    from .command import main

    sys.exit(main("advantages", tables))
