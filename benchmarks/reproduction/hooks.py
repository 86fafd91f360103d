"""What arms change that no setting does: the advantages that R2 and R3 train on, and G4's masters."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook

import redit_fast as rf
from redit_fast.training.config import TrainConfig
from redit_fast.training.sampling import Samples
from redit_fast.training.task import AdvantagesHook

LEVEL = 0.05
SCALES = [1.0, 0.5, 0.25]  # of the three rewards
HookOf = Callable[[TrainConfig], AdvantagesHook]


def _advantages(
    config: TrainConfig, samples: Samples, step: int, scores: torch.Tensor, **options: Any
) -> rf.Advantages:
    options |= {"scale": config.advantage_scale, "sample_ids": samples.ids}
    return rf.group_advantages(scores, group_size=config.group_size, step=step, **options)


def noise_on(which: Literal["all", "dead"]) -> HookOf:
    """Gaussian noise on the advantages, of all groups or of the dead ones, of the size that dithering gives them."""

    def hook_of(config: TrainConfig) -> AdvantagesHook:
        dither = rf.Dither(level=LEVEL, seed=config.seed)

        def hook(clean: rf.Advantages, samples: Samples, step: int) -> rf.Advantages:
            dithered = _advantages(config, samples, step, samples.scores, dither=dither)
            chosen = torch.ones_like(clean.dead) if which == "all" else clean.dead
            if not chosen.any():
                return clean
            size = (dithered.values - clean.values)[chosen].square().mean().sqrt()
            generator = torch.Generator().manual_seed((config.seed << 32) + step)
            noise = size * torch.randn(len(clean.values), generator=generator)
            return clean._replace(values=torch.where(chosen, clean.values + noise, clean.values))

        return hook

    return hook_of


def until(last: int) -> HookOf:
    """The dithered advantages up to a step, clean ones after it."""

    def hook_of(config: TrainConfig) -> AdvantagesHook:
        def hook(dithered: rf.Advantages, samples: Samples, step: int) -> rf.Advantages:
            return dithered if step < last else _advantages(config, samples, step, samples.scores)

        return hook

    return hook_of


def on_the_sum(config: TrainConfig) -> AdvantagesHook:
    """Noise on the sum of the rewards, of the size that noise on each of them has in it."""
    scale = sum(each * each for each in SCALES) ** 0.5
    dither = rf.Dither(level=LEVEL, reward_scale=scale, seed=config.seed)

    def hook(clean: rf.Advantages, samples: Samples, step: int) -> rf.Advantages:
        return _advantages(config, samples, step, samples.scores.sum(1), dither=dither)

    return hook


def gdpo(level: float, dead_groups: Literal["apply", "skip"] = "apply") -> HookOf:
    """Every reward normalised in its group, then summed, then normalised over the step."""

    def hook_of(config: TrainConfig) -> AdvantagesHook:
        dither = rf.Dither(level=level, reward_scale=SCALES, dead_groups=dead_groups, seed=config.seed)

        def hook(clean: rf.Advantages, samples: Samples, step: int) -> rf.Advantages:
            return _advantages(config, samples, step, samples.scores, dither=dither, combine="normalize_then_sum")

        return hook

    return hook_of


@contextmanager
def masters_cut() -> Iterator[None]:
    """Inside, float32 masters are cut to their bfloat16 weights after every step, as in the GR paper's code."""

    @torch.no_grad()
    def cut(optimizer: Optimizer, *_: object) -> None:
        for p, state in optimizer.state.items():
            if "master" in state:
                state["master"].copy_(p)

    handle = register_optimizer_step_post_hook(cut)
    try:
        yield
    finally:
        handle.remove()
