"""The forward and backward passes over the pairs of a step, and what pairs of rewards come to."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from redit_fast.packing import plan
from redit_fast.packing.attention import attending
from redit_fast.packing.plan import Budget, MicroBatch
from redit_fast.training.reward_model.config import RewardModelConfig
from redit_fast.training.reward_model.data import Pair
from redit_fast.training.rewards.model import scores, scores_of


def bradley_terry(rewards: Tensor, margin: Tensor, center: float) -> Tensor:
    """(P,): -log sigmoid(c - r - m) + center (c + r)^2 of each pair, as TRL 1.16's RewardTrainer.

    Args:
        rewards: (P, 2), floating point, chosen and rejected.
        margin: (P,).
    """
    chosen, rejected = rewards.unbind(1)
    return -F.logsigmoid(chosen - rejected - margin) + center * (chosen + rejected).square()


class Part(NamedTuple):
    """Pairs that are computed together."""

    pairs: list[int]
    micro: MicroBatch  # of their texts: 2 i is the chosen one of pair i, 2 i + 1 the rejected one


@dataclass
class PairBatch:
    """The pairs of a step, for a forward and backward pass as often as wanted."""

    pairs: list[Pair]
    packed: bool
    budget: int  # tokens in a pass, unless one pair has more
    center: float
    seed: int
    step: int

    @classmethod
    def of(cls, pairs: list[Pair], config: RewardModelConfig, step: int, *, packed: bool) -> PairBatch:
        return cls(pairs, packed, config.tokens_per_micro_batch, config.center_coefficient, config.seed, step)

    @cached_property
    def texts(self) -> list[list[int]]:
        return texts_of(self.pairs)

    @cached_property
    def margins(self) -> Tensor:
        """(P,) float32"""
        return margins_of(self.pairs)

    @property
    def useful_tokens(self) -> int:
        return sum(map(len, self.texts))

    @cached_property
    def parts(self) -> list[Part]:
        """The longest pairs first; both texts of a pair are together, since the loss is of their difference."""
        ones = [1] * len(self.texts)
        found = []
        for pairs in _split(self.pairs, self.budget, self.packed):
            chosen = [text for i in pairs for text in (2 * i, 2 * i + 1)]
            how = plan.packed if self.packed else plan.padded
            ((micro,),) = how(self.texts, ones, Budget(), chosen=chosen)
            found.append(Part(pairs, micro))
        return found

    def backward(self, model: PreTrainedModel) -> tuple[Tensor, Tensor]:
        """Adds the gradient of the mean of `bradley_terry` to .grad. Both passes of a step draw the same dropout.

        Returns:
            The rewards (P, 2) float32, chosen and rejected, and the loss of each pair (P,), on the CPU.
        """
        torch.manual_seed((self.seed + self.step) % 2**63)
        model.train()
        texts = [torch.tensor(ids, device="cpu") for ids in self.texts]
        rewards = torch.empty(len(self.pairs), 2, dtype=torch.float32, device="cpu")
        losses = torch.empty(len(self.pairs), dtype=torch.float32, device="cpu")
        with attending(model) if self.packed else nullcontext():
            for pairs, micro in self.parts:
                both = scores_of(model, texts, micro).view(-1, 2)
                loss = bradley_terry(both, self.margins[pairs].to(both.device), self.center)
                (loss.sum() / len(self.pairs)).backward()
                rewards[pairs], losses[pairs] = both.detach().cpu(), loss.detach().cpu()
        return rewards, losses


def texts_of(pairs: Sequence[Pair]) -> list[list[int]]:
    """The tokens of both texts of each, the chosen one first."""
    return [ids for pair in pairs for ids in (pair.chosen, pair.rejected)]


def margins_of(pairs: Sequence[Pair]) -> Tensor:
    return torch.tensor([pair.margin for pair in pairs], dtype=torch.float32, device="cpu")


def _split(pairs: Sequence[Pair], budget: int, packed: bool) -> Iterator[list[int]]:
    """The numbers of the pairs of each pass, in ascending order."""
    longest = [max(len(pair.chosen), len(pair.rejected)) for pair in pairs]
    computed = [len(pair.chosen) + len(pair.rejected) - _shared(pair) for pair in pairs]
    part: list[int] = []
    tokens = 0
    for i in sorted(range(len(pairs)), key=lambda i: -longest[i]):
        more = computed[i] if packed else 2 * longest[part[0] if part else i]
        if part and tokens + more > budget:
            yield sorted(part)
            part, tokens = [], 0
            more = computed[i] if packed else 2 * longest[i]
        part.append(i)
        tokens += more
    if part:
        yield sorted(part)


def _shared(pair: Pair) -> int:
    """Tokens that both texts begin with."""
    texts = zip(pair.chosen, pair.rejected, strict=False)
    return next((place for place, (a, b) in enumerate(texts) if a != b), min(len(pair.chosen), len(pair.rejected)))


def metrics_of(rewards: Tensor, losses: Tensor, of: str) -> dict[str, float]:
    """The mean loss; the share of pairs (P, 2) whose chosen text is ahead, by how much on average; the mean reward."""
    gaps = (rewards[:, 0] - rewards[:, 1]).double()
    return {
        f"loss/{of}": losses.double().mean().item(),
        f"accuracy/{of}": (gaps > 0).double().mean().item(),
        f"margin/{of}": gaps.mean().item(),
        f"mean_reward/{of}": rewards.double().mean().item(),
    }


def held_out_metrics(
    model: PreTrainedModel, pairs: Sequence[Pair], config: RewardModelConfig, *, packed: bool
) -> dict[str, float]:
    """`metrics_of` pairs that are not trained on, in eval mode; nothing where none is held out."""
    if not pairs:
        return {}
    rewards = scores(model, texts_of(pairs), config.tokens_per_micro_batch, packed).view(-1, 2)
    losses = bradley_terry(rewards, margins_of(pairs), config.center_coefficient)
    return metrics_of(rewards, losses, "held_out")


def warn_of_no_number(metrics: dict[str, float]) -> bool:
    """Whether a loss of the step is not finite, which this warns of."""
    if all(math.isfinite(metrics.get(f"loss/{of}", 0.0)) for of in ("train", "held_out")):
        return False
    warnings.warn(
        f"step {metrics['step']}: the loss is not finite; the run goes on, without the steps whose gradient is not "
        "finite (gr/skipped_steps), and its model may be of no use; the usual cause is too high a learning_rate",
        stacklevel=2,
    )
    return True
