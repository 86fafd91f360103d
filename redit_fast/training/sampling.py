"""The samples of a step and their rewards, with the further rounds of `dynamic_sampling`."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

import redit_fast as rf
from redit_fast.training import data, rewards, runs
from redit_fast.training.config import TrainConfig
from redit_fast.training.distributed import Ranks
from redit_fast.training.rollout import Rollout
from redit_fast.training.rollout.local import generate


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


def draw(
    model: PreTrainedModel,
    tokenizer: Tokenizer,
    ends: list[int],
    records: list[dict],
    functions: list[rewards.RewardFunction],
    config: TrainConfig,
    *,
    step: int,
    position: int,
    clock: runs.Clock,
    ranks: Ranks,
) -> Samples:
    """`prompts_per_step` groups, on every rank. Where the clean rewards of one are all equal, another round, of
    `dynamic_sampling` at most, puts that of a new prompt in its place. Each rank samples and scores its share.

    Args:
        records: the data, whose order goes on from `position`.

    Raises:
        RewardError, and what `generate` and a chat template raise.
    """
    size = config.group_size
    groups: dict[int, tuple] = {}  # by their place in the step
    places, drawn, generated, rounds = list(range(config.prompts_per_step)), 0, 0, 0
    while True:
        chosen = data.batch(records, config.seed, position + drawn, len(places))
        ids = torch.arange(drawn * size, (drawn + len(places)) * size, device="cpu")
        own = ranks.share(len(places))
        own_ids = ids[own.start * size : own.stop * size]

        def sampled(records=chosen[own.start : own.stop], ids=own_ids) -> tuple[list[list[int]], Rollout]:
            prompts = [data.render(tokenizer, record, config.system_prompt) for record in records]
            if not prompts:  # more ranks than prompts
                return [], Rollout([], [])
            rollout = generate(
                model,
                ends,
                prompts,
                group_size=size,
                max_new_tokens=config.max_completion_length,
                temperature=config.temperature,
                top_p=config.top_p,
                seed=config.seed,
                step=step,
                sample_ids=ids,
            )
            return prompts, rollout

        with clock("rollout"), ranks.whole(model):
            shares = ranks.gathered(sampled, stoppable=True)
        prompts = [prompt for prompts, _ in shares for prompt in prompts]
        completions = [completion for _, rollout in shares for completion in rollout.completions]
        finished = [flag for _, rollout in shares for flag in rollout.finished]
        chosen = [record for record in chosen for _ in range(size)]
        mine = slice(own.start * size, own.stop * size)

        def scored(records=chosen[mine], completions=completions[mine]) -> tuple[list[str], Tensor]:
            texts = tokenizer.batch_decode(completions, skip_special_tokens=True)
            if not texts:
                return [], torch.empty(0, len(functions), dtype=torch.float64, device="cpu")
            return texts, rewards.score_texts(functions, records, texts)

        with clock("reward"):
            found = ranks.gathered(scored, stoppable=True)
            texts = [text for texts, _ in found for text in texts]
            scores = torch.cat([scores for _, scores in found])
            clean = rf.group_advantages(scores, group_size=size, reward_weights=config.reward_weights)
        for i, place in enumerate(places):
            group = slice(i * size, (i + 1) * size)
            groups[place] = (prompts[i], chosen[group], completions[group], finished[group], texts[group],
                             scores[group], ids[group])  # fmt: skip
        drawn, generated = drawn + len(places), generated + sum(map(len, completions))
        places = [place for place, dead in zip(places, clean.dead[::size].tolist(), strict=True) if dead]
        if not places or rounds == config.dynamic_sampling:
            break
        rounds += 1
    each = zip(*(groups[place] for place in sorted(groups)), strict=True)
    their_prompts, their_records, their_completions, their_finished, their_texts, their_scores, their_ids = each
    return Samples(
        list(their_prompts),
        sum(their_records, []),
        Rollout(sum(their_completions, []), sum(their_finished, [])),
        sum(their_texts, []),
        torch.cat(their_scores),
        torch.cat(their_ids),
        generated,
        drawn,
        rounds,
    )
