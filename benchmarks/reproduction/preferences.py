"""The task of G2: a reward model learned from few, noisy preferences, and the gold reward that it stands for.

Four letters are answered by twelve. Gold likes some pairs of letters more than others, by one table for all seeds,
likes the prompt's letters and dislikes repetitions. The start policy's samples hardly repeat, so that the reward model
cannot learn the last of these.
"""

from __future__ import annotations

import copy
import math
import random
from collections.abc import Callable
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedTokenizerBase as Tokenizer
from transformers import Qwen2ForCausalLM

from redit_fast.training.rewards import RewardFunction
from redit_fast.training.rollout.local import generate
from redit_fast.training.task import Task

from .sorting import LETTERS, STOP, letters, made, records, training_problem, warm_start

PROMPT, LENGTH = 4, 12
PAIRS, FRESH = 300, 500  # to learn from, and to choose the penalty by
NOISE = 0.3  # of a preference, in deviations of the gold reward
PENALTIES = (0.003, 0.01, 0.03, 0.1)  # on the reward model's squared weights
PLACES = {letter: place for place, letter in enumerate(LETTERS)}
FEATURES = len(LETTERS) ** 2 + 1

_rng = random.Random("the gold reward's table")
TABLE = [[_rng.gauss(0.0, 1.0) for _ in LETTERS] for _ in LETTERS]

Score = Callable[[str, str], float]  # of a prompt and its completion


def pairs_of(prompt: str, text: str) -> list[tuple[int, int]]:
    """The first twelve letters, each behind the one before it; the first behind the prompt's last."""
    chain = [PLACES[c] for c in prompt[PROMPT - 1] + text if c in PLACES]
    return list(pairwise(chain[: LENGTH + 1]))


def gold(prompt: str, text: str) -> float:
    pairs = pairs_of(prompt, text)
    written = [b for _, b in pairs]
    liked = sum(TABLE[a][b] for a, b in pairs)
    repeated = sum(max(0, written.count(letter) - 2) ** 2 for letter in set(written))
    covered = len(set(written) & {PLACES[c] for c in prompt[:PROMPT]}) / PROMPT
    return (liked - 0.8 * repeated) / LENGTH + 0.5 * covered - 0.1 * (LENGTH - len(written))


def features(prompt: str, text: str) -> Tensor:
    """(FEATURES,) float64: how often each pair stands there, and how many letters are the prompt's."""
    found = [0.0] * FEATURES
    own = {PLACES[c] for c in prompt[:PROMPT]}
    for a, b in pairs_of(prompt, text):
        found[a * len(LETTERS) + b] += 1
        found[-1] += b in own
    return torch.tensor(found, dtype=torch.float64)


def demonstration(rng: random.Random, done: float) -> tuple[str, str]:
    """Letters by the table, those written already a third as likely each time, the prompt's more."""
    drawn = training_problem(partial(letters, PROMPT), rng)
    last, written = PLACES[drawn[-1]], [0] * len(LETTERS)
    text = ""
    for _ in range(LENGTH):
        weights = [
            math.exp(0.5 * TABLE[last][i]) * 0.3 ** written[i] * (1.6 if letter in drawn else 1.0)
            for i, letter in enumerate(LETTERS)
        ]
        (last,) = rng.choices(range(len(LETTERS)), weights)
        written[last] += 1
        text += LETTERS[last]
    return drawn + STOP, text


def samples(
    model: Qwen2ForCausalLM, tokenizer: Tokenizer, prompts: list[str], each: int, seed: int, step: int
) -> list[str]:
    ids = [tokenizer(prompt)["input_ids"] for prompt in prompts]
    rollout = generate(
        model, tokenizer.eos_token_id, ids, group_size=each, max_new_tokens=LENGTH + 1, seed=seed, step=step
    )
    return tokenizer.batch_decode(rollout.completions, skip_special_tokens=True)


def learned(
    model: Qwen2ForCausalLM, tokenizer: Tokenizer, seed: int
) -> tuple[Tensor, tuple[float, float], tuple[float, float]]:
    """The reward model's weights; mean and deviation, over the start policy's samples, of its rewards and of gold."""
    rng = random.Random(f"{seed} preferences")
    prompts = [training_problem(partial(letters, PROMPT), rng) + STOP for _ in range(PAIRS + FRESH)]
    texts = samples(model, tokenizer, prompts, 2, seed, 0)
    doubled = [prompt for prompt in prompts for _ in range(2)]
    true = torch.tensor([gold(*pair) for pair in zip(doubled, texts, strict=True)], dtype=torch.float64)
    seen = torch.stack([features(*pair) for pair in zip(doubled, texts, strict=True)])
    better, apart = true[0::2] - true[1::2], seen[0::2] - seen[1::2]
    chances = torch.sigmoid(better[:PAIRS] / (NOISE * true.std()))
    told = torch.tensor([float(rng.random() < chance) for chance in chances.tolist()], dtype=torch.float64)
    found = [_fitted(apart[:PAIRS], told, penalty) for penalty in PENALTIES]
    right = [((apart[PAIRS:] @ weights > 0) == (better[PAIRS:] > 0)).double().mean().item() for weights in found]
    weights = found[right.index(max(right))]
    paid = seen @ weights
    return weights, (paid.mean().item(), paid.std().item()), (true.mean().item(), true.std().item())


def _fitted(apart: Tensor, told: Tensor, penalty: float) -> Tensor:
    """Bradley and Terry's model: P(first is better) = sigmoid(weights . (its features less the second's))."""
    weights = torch.zeros(FEATURES, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([weights], max_iter=100, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = F.binary_cross_entropy_with_logits(apart @ weights, told) + penalty * weights.square().sum() / 2
        value.backward()
        return value

    optimizer.step(loss)
    return weights.detach()


def each(score: Score) -> Callable[..., list[float]]:
    """A reward function of a score."""

    def reward(prompts, completions, **columns) -> list[float]:
        return [score(prompt, text) for prompt, text in zip(prompts, completions, strict=True)]

    return reward


def agreeing(proxy: Score, true: Score) -> Callable[..., list[float]]:
    """1 for both of two neighbours, samples of one prompt, that both rewards put in the same order, 0.5 where one puts
    them level: the mean is the reward model's accuracy on the policy's own samples."""

    def agrees(prompts, completions, **columns) -> list[float]:
        scored = [(proxy(*pair), true(*pair)) for pair in zip(prompts, completions, strict=True)]
        found: list[float] = []
        for (p, g), (q, h) in zip(scored[0::2], scored[1::2], strict=False):
            sign = (p - q) * (g - h)
            found += [1.0 if sign > 0 else 0.0 if sign < 0 else 0.5] * 2
        return found + [0.5] * (len(scored) - len(found))

    return agrees


def beating(start: dict[str, float], true: Score) -> Callable[..., list[float]]:
    """1 where a completion is better by gold than the start policy's of the same prompt, 0.5 where it is level."""

    def wins(prompts, completions, **columns) -> list[float]:
        found = [(true(*pair), start[pair[0]]) for pair in zip(prompts, completions, strict=True)]
        return [1.0 if now > before else 0.0 if now < before else 0.5 for now, before in found]

    return wins


def preferred(seed: int) -> Task:
    """The policy is trained on the reward model alone; both rewards are in deviations of the start policy's."""
    model, tokenizer = made(LETTERS, seed, 64, 4)
    warm_start(model, tokenizer, demonstration, steps=150, seed=seed, falls=True)
    weights, (paid, by), (mean, deviation) = learned(model, tokenizer, seed)

    def proxy(prompt: str, text: str) -> float:
        return (float(features(prompt, text) @ weights) - paid) / by

    def true(prompt: str, text: str) -> float:
        return (gold(prompt, text) - mean) / deviation

    drawn = records(partial(letters, PROMPT), seed)
    prompts = [record["prompt"] for record in [*drawn.train, *drawn.held_out]]
    first = zip(prompts, samples(model, tokenizer, prompts, 1, seed, 1), strict=True)
    start = {prompt: true(prompt, text) for prompt, text in first}
    functions = [
        RewardFunction("proxy", each(proxy)),
        RewardFunction("gold", each(true)),
        RewardFunction("agrees", agreeing(proxy, true)),
        RewardFunction("wins", beating(start, true)),
    ]
    return Task(f"PREFERENCES, seed {seed}", lambda: (copy.deepcopy(model), tokenizer), drawn, functions)
