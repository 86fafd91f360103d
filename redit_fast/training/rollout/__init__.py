"""Where completions come from: what an engine is, and what it gives."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor


class EngineError(ValueError):
    """An engine cannot go on, or answers what it must not; one sentence. A run stops after a checkpoint."""


@dataclass(frozen=True)
class Rollout:
    """Completions in prompt order, the `group_size` samples of a prompt next to each other: sample = prompt * G + j.

    Attributes:
        completions: N token lists, at least one token each; the end token is kept where it was reached.
        finished: N flags; False means cut off at `max_new_tokens`.
        logp: for each token of each completion the sampler's own log-prob, a float32 number, under
            softmax(logits / temperature) of the whole vocabulary, also where `top_p` draws from a part of it. NaN where
            the engine does not know one. None: it gives none, as at temperature 0.
        tokens: completion tokens in all.
    """

    completions: list[list[int]]
    finished: list[bool]
    logp: list[list[float]] | None = None

    @property
    def tokens(self) -> int:
        return sum(map(len, self.completions))

    @classmethod
    def joined(cls, parts: Sequence[Rollout]) -> Rollout:
        """The samples of all parts, one after the other; without log-probs where a part that has samples has none."""
        logps = [part.logp for part in parts if part.completions]
        return cls(
            [completion for part in parts for completion in part.completions],
            [flag for part in parts for flag in part.finished],
            None if None in logps else [row for logp in logps for row in logp or ()],
        )

    def part(self, samples: slice) -> Rollout:
        return Rollout(
            self.completions[samples], self.finished[samples], None if self.logp is None else self.logp[samples]
        )


class Engine(Protocol):
    """What completions come from. Each rank has its own, for its share of the prompts.

    `sync` and `close` may be called any number of times, and `generate` between them.
    """

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        group_size: int,
        max_new_tokens: int,
        temperature: float,
        top_p: float,
        seed: int,
        step: int,
        sample_ids: Tensor,
    ) -> Rollout:
        """`group_size` completions of each prompt, by the weights of the last `sync`. A rank calls it by itself, inside
        `Ranks.whole`, and with `rollout_ahead` in a thread of its own.

        Args:
            prompts: P non-empty token lists; P is at least 1.
            temperature: divides the logits; 0 takes the most likely token.
            seed, step, sample_ids: of the random numbers. sample_ids is (P * group_size,) int64, and no two samples of
                a step have the same, on whichever rank.

        Raises:
            EngineError: one sentence.
        """
        ...

    def sync(self, model: Any) -> None:
        """The next completions are by the weights that `model` has now. All ranks call it together, outside of
        `Ranks.gathered`; no `generate` runs meanwhile.

        Raises:
            EngineError: one sentence, on all ranks.
        """
        ...

    def close(self) -> None:
        """Gives back what the engine holds and stops what it is at. A rank calls it by itself, also after an error or a
        stop, and while `generate` runs in another thread: that one then raises or ends."""
        ...
