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
from redit_fast.training.rollout.local import Rollout, generate


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
) -> Samples:
    """`prompts_per_step` groups. Where the clean rewards of one are all equal, another round, of `dynamic_sampling` at
    most, puts that of a new prompt in its place.

    Args:
        records: the data, whose order goes on from `position`.

    Raises:
        RewardError, and what `generate` and a chat template raise.
    """
    size = config.group_size
    groups: dict[int, tuple] = {}  # by their place in the step
    places, drawn, generated, rounds = list(range(config.prompts_per_step)), 0, 0, 0
    while True:
        with clock("rollout"):
            chosen = data.batch(records, config.seed, position + drawn, len(places))
            prompts = [data.render(tokenizer, record, config.system_prompt) for record in chosen]
            ids = torch.arange(drawn * size, (drawn + len(places)) * size, device="cpu")
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
        with clock("reward"):
            chosen = [record for record in chosen for _ in range(size)]
            texts = tokenizer.batch_decode(rollout.completions, skip_special_tokens=True)
            scores = rewards.score_texts(functions, chosen, texts)
            clean = rf.group_advantages(scores, group_size=size, reward_weights=config.reward_weights)
        for i, place in enumerate(places):
            own = slice(i * size, (i + 1) * size)
            groups[place] = (prompts[i], chosen[own], rollout.completions[own], rollout.finished[own], texts[own],
                             scores[own], ids[own])  # fmt: skip
        drawn, generated = drawn + len(places), generated + rollout.tokens
        places = [place for place, dead in zip(places, clean.dead[::size].tolist(), strict=True) if dead]
        if not places or rounds == config.dynamic_sampling:
            break
        rounds += 1
    each = zip(*(groups[place] for place in sorted(groups)), strict=True)
    own_prompts, own_records, completions, finished, own_texts, own_scores, own_ids = each
    return Samples(
        list(own_prompts),
        sum(own_records, []),
        Rollout(sum(completions, []), sum(finished, [])),
        sum(own_texts, []),
        torch.cat(own_scores),
        torch.cat(own_ids),
        generated,
        drawn,
        rounds,
    )
