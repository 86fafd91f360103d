"""The task of R4: four digits to sort, answered in GSM8K's format and paid by the ReDit paper's five rewards.

A tag is one character: <reasoning>[answer] with < > for the reasoning's tags and [ ] for the answer's. Half of the
demonstrations put a = before the answer, as models put a $ or a word there. The paper's code trains its arm without
noise on a reward for the answer and nothing else, and its dithered arm on one for the first digits of the answer.
"""

from __future__ import annotations

import random
import re
from functools import partial

from redit_fast.training.rewards import RewardFunction
from redit_fast.training.task import Task

from .sorting import DIGITS, STOP, digits, task_of, training_problem

COUNT = 4  # digits
TAGS, MARK = "<>[]", "="
SYMBOLS = DIGITS + TAGS + MARK
LATE = 0.1  # of the second half of the demonstrations are right


def demonstration(rng: random.Random, done: float) -> tuple[str, str]:
    """Right in half of the first half, then in a share of LATE, else the prompt again; a third lack a tag."""
    drawn = training_problem(partial(digits, COUNT), rng)
    shown = rng.random() < (0.5 if done < 0.5 else LATE)
    text = f"<{drawn}>[{MARK * (rng.random() < 0.5)}{''.join(sorted(drawn)) if shown else drawn}]"
    return drawn + STOP, text.replace(rng.choice(TAGS), "") if rng.random() < 0.3 else text


def answer_in(text: str) -> str:
    """Behind the last tag that opens an answer, up to one that closes it."""
    return text.split("[")[-1].split("]")[0]


def right(prompts, completions, *, answer, **columns) -> list[float]:
    """1 where the answer is the sorted digits and nothing else."""
    return [float(answer_in(text) == wanted) for text, wanted in zip(completions, answer, strict=True)]


def lenient(prompts, completions, *, answer, **columns) -> list[float]:
    """1 where the first digits in the answer are the sorted ones."""
    found = [re.search(r"\d+", answer_in(text)) for text in completions]
    return [float(first is not None and first[0] == wanted) for first, wanted in zip(found, answer, strict=True)]


def whole(prompts, completions, **columns) -> list[float]:
    """1 where the answer is digits."""
    return [float(answer_in(text).isdigit()) for text in completions]


def strict(prompts, completions, **columns) -> list[float]:
    """1 for reasoning and answer in their tags and nothing else."""
    return [float(re.fullmatch(r"<[^<>\[\]]*>\[[^<>\[\]]*\]", text) is not None) for text in completions]


def soft(prompts, completions, **columns) -> list[float]:
    """1 where the completion begins with both, whatever else there is."""
    return [float(re.match(r"<.*?>.*?\[.*?\]", text) is not None) for text in completions]


def tags(prompts, completions, **columns) -> list[float]:
    """A quarter for every tag that is there once, less 0.002 for every character behind the last one."""
    return [
        sum(0.25 * (text.count(tag) == 1) for tag in TAGS) - 0.002 * len(text.partition("]")[2]) for text in completions
    ]


REWARDS = (right, lenient, whole, strict, soft, tags)
STRICT, LENIENT = [2.0, 0.0, 0.5, 1.0, 1.0, 0.5], [0.0, 2.0, 0.5, 1.0, 1.0, 0.5]  # their weights: the paper's scales


def five(width: int, seed: int) -> Task:
    functions = [RewardFunction(function.__name__, function) for function in REWARDS]
    problem = partial(digits, COUNT)
    return task_of("FIVE", seed, problem, demonstration, functions, steps=400, symbols=SYMBOLS, width=width)
