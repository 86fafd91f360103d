"""The samples of a step and their rewards, with further rounds (`dynamic_sampling`) and the next step's ahead."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

import redit_fast as rf
from redit_fast.training import data, rewards, runs
from redit_fast.training.config import TrainConfig
from redit_fast.training.distributed import Ranks
from redit_fast.training.rollout import Engine, EngineError, Rollout
from redit_fast.training.rollout.ahead import Ahead


@dataclass(frozen=True)
class Samples:
    """The groups of a step, one after the other. A sample's number among all that the step drew is in `ids`: random
    numbers and noise are by it."""

    prompts: list[list[int]]  # one a group
    records: list[dict]  # one a sample, as what follows
    rollout: Rollout
    texts: list[str]
    scores: Tensor  # (N, K)
    ids: Tensor  # (N,)
    generated: int  # tokens, also of groups that others have taken the place of
    drawn: int  # prompts
    rounds: int  # after the first
    behind: float  # steps that the weights which sampled are older than the policy, on average


@dataclass
class Source:
    """Where the samples of the steps come from. Each rank samples and scores its share."""

    engine: Engine
    model: PreTrainedModel
    tokenizer: Tokenizer
    records: list[dict]  # the data
    functions: list[rewards.RewardFunction]
    config: TrainConfig
    ranks: Ranks
    ahead: Ahead[tuple[list[list[int]], Rollout]] = field(default_factory=Ahead)  # this rank's share of the next step

    def draw(self, step: int, position: int, clock: runs.Clock) -> Samples:
        """`prompts_per_step` groups, on every rank. Where the clean rewards of one are all equal, another round, of
        `dynamic_sampling` at most, puts that of a new prompt in its place. With `rollout_ahead` the first round was
        begun at the end of the step before, and at the end that of the next one begins.

        Args:
            position: how many prompts of the data the steps have drawn.

        Raises:
            RewardError, EngineError, and what a chat template raises.
        """
        config, ranks, size = self.config, self.ranks, self.config.group_size
        groups: dict[int, tuple] = {}  # by their place in the step
        places, drawn, generated, rounds = list(range(config.prompts_per_step)), 0, 0, 0
        while True:
            behind = int(self.ahead.begun)
            chosen = data.batch(self.records, config.seed, position + drawn, len(places))
            ids = torch.arange(drawn * size, (drawn + len(places)) * size, device="cpu")
            own = ranks.share(len(places))

            def sampled(records=chosen, ids=ids) -> tuple[list[list[int]], Rollout]:
                return self.ahead.take() if self.ahead.begun else self._sampled(self._rendered(records), step, ids)

            with clock("rollout"), nullcontext() if config.server else ranks.whole(self.model):
                shares = ranks.gathered(sampled, stoppable=True)
            prompts = [prompt for prompts, _ in shares for prompt in prompts]
            rollout = Rollout.joined([rollout for _, rollout in shares])
            chosen = [record for record in chosen for _ in range(size)]
            mine = slice(own.start * size, own.stop * size)

            def scored(records=chosen[mine], completions=rollout.completions[mine]) -> tuple[list[str], Tensor]:
                texts = self.tokenizer.batch_decode(completions, skip_special_tokens=True)
                if not texts:
                    return [], torch.empty(0, len(self.functions), dtype=torch.float64, device="cpu")
                return texts, rewards.score_texts(self.functions, records, texts)

            with clock("reward"):
                found = ranks.gathered(scored, stoppable=True)
                texts = [text for texts, _ in found for text in texts]
                scores = torch.cat([scores for _, scores in found])
                clean = rf.group_advantages(scores, group_size=size, reward_weights=config.reward_weights)
            for i, place in enumerate(places):
                group = slice(i * size, (i + 1) * size)
                groups[place] = (
                    prompts[i], chosen[group], rollout.part(group), texts[group], scores[group], ids[group],
                    behind,
                )  # fmt: skip
            drawn, generated = drawn + len(places), generated + rollout.tokens
            places = [place for place, dead in zip(places, clean.dead[::size].tolist(), strict=True) if dead]
            if not places or rounds == config.dynamic_sampling:
                break
            rounds += 1
        if config.rollout_ahead and step + 1 < config.steps:
            self._begin(step + 1, position + drawn)
        each = zip(*(groups[place] for place in sorted(groups)), strict=True)
        their_prompts, their_records, their_rollouts, their_texts, their_scores, their_ids, their_behind = each
        return Samples(
            list(their_prompts),
            sum(their_records, []),
            Rollout.joined(their_rollouts),
            sum(their_texts, []),
            torch.cat(their_scores),
            torch.cat(their_ids),
            generated,
            drawn,
            rounds,
            sum(their_behind) / len(their_behind),
        )

    def sync(self, clock: runs.Clock) -> None:
        """The engine's weights are the model's. What runs ahead ends first: the weights of a sample are those of one
        step. All ranks call it.

        Raises:
            EngineError: one sentence.
        """
        with clock("sync") if self.config.server else nullcontext():
            if self.ahead.begun:
                self.ranks.alone(self.ahead.wait, stoppable=True)
            self.engine.sync(self.model)

    def _begin(self, step: int, position: int) -> None:
        """The prompts are rendered here: a tokenizer is not for two threads."""
        count = self.config.prompts_per_step
        chosen = data.batch(self.records, self.config.seed, position, count)
        prompts = self.ranks.alone(lambda: self._rendered(chosen))
        ids = torch.arange(count * self.config.group_size, device="cpu")
        self.ahead.begin(lambda: self._sampled(prompts, step, ids))

    def _rendered(self, records: list[dict]) -> list[list[int]]:
        """The prompts of this rank's share of a round."""
        own = self.ranks.share(len(records))
        mine = records[own.start : own.stop]
        return [data.render(self.tokenizer, record, self.config.system_prompt) for record in mine]

    def _sampled(self, prompts: list[list[int]], step: int, ids: Tensor) -> tuple[list[list[int]], Rollout]:
        """This rank's share of a round whose samples have the numbers `ids`."""
        config = self.config
        own = self.ranks.share(len(ids) // config.group_size)
        if not prompts:  # more ranks than prompts
            return [], Rollout([], [], [])
        rollout = self.engine.generate(
            prompts,
            group_size=config.group_size,
            max_new_tokens=config.max_completion_length,
            temperature=config.temperature,
            top_p=config.top_p,
            seed=config.seed,
            step=step,
            sample_ids=ids[own.start * config.group_size : own.stop * config.group_size],
        )
        if rollout.logp is None and config.sampler_correction != "none":
            raise EngineError(
                f"rollout {config.rollout} gives no log-probs, which correction {config.sampler_correction} compares "
                "with the policy's; correction none does without them"
            )
        return prompts, rollout
