"""The shipped reward functions. `answer` is the column of that name: a number or text; of GSM8K's texts the part behind
"####"."""

from __future__ import annotations

import re
from collections.abc import Callable
from decimal import Decimal
from numbers import Real
from typing import Any

from redit_fast.training.data import text_of
from redit_fast.training.rewards import answers
from redit_fast.training.rewards.math_answer import CHILD, Question


def extract_answer(completion: str) -> str:
    """The text between the last <answer> and the </answer> behind it; all of it where there is neither."""
    return completion.split("<answer>")[-1].split("</answer>")[0].strip()


def reference_answer(answer: object) -> str:
    """The part behind "####", without thousands separators and dollar signs, where there is one; else all of it."""
    text = str(answer)
    return text.split("####")[1].replace(",", "").replace("$", "").strip() if "####" in text else text.strip()


def _check_text(answer: object) -> None:
    if isinstance(answer, bool) or not isinstance(answer, str | Real) or not reference_answer(answer):
        raise ValueError(f"the column 'answer' needs text or a number, got {answer!r:.80}")


def _number(answer: object) -> answers.Number:
    number = answers.the_number(answer)
    if number is None:
        raise ValueError(
            "the column 'answer' needs one number, such as 72, -1,234.50, 3/4, 2 1/2, 50% or 1e5, also with a unit or "
            f"behind ####, got {answer!r:.80}"
        )
    return number


def column_checked(check: Callable[[object], object]) -> Callable[[Any], Any]:
    """`check` raises where a value of the column `answer` is unfit; it sees the whole data before a run starts."""

    def mark(function: Any) -> Any:
        function.check_column = check
        return function

    return mark


def full_scale(reward_scale: float) -> Callable[[Any], Any]:
    """Of the rewards, where it is not 1: the dither level is relative to it."""

    def mark(function: Any) -> Any:
        function.reward_scale = reward_scale
        return function

    return mark


@column_checked(_check_text)
def exact_answer(prompts, completions, answer, **columns) -> list[float]:
    """1.0 where the extracted answer equals the column `answer`, character by character."""
    found = [extract_answer(text_of(completion)) for completion in completions]
    return [float(text == reference_answer(right)) for text, right in zip(found, answer, strict=True)]


@column_checked(_number)
def numeric_answer(prompts, completions, answer, **columns) -> list[float]:
    """1.0 where the last number of the extracted answer equals the column `answer`, as exact fractions.

    Both are read whole or not at all: `redit_fast.training.rewards.answers`.
    """
    found = [answers.last_number(extract_answer(text_of(completion))) for completion in completions]
    return [float(_number(right).equals(number)) for number, right in zip(found, answer, strict=True)]


@column_checked(_check_text)
def math(prompts, completions, answer, **columns) -> list[float | None]:
    r"""1.0 where the completion's answer equals the column `answer` as mathematics, by math-verify: 1/2, 0.5 and
    \frac{1}{2}, sets, intervals, matrices, equations.

    The answer is what is between answer tags, else what math-verify finds: the last formula with \boxed{}, several of
    these without dollar signs as a set, else the last formula or number. `answer` may be LaTeX, boxed or bare.
    None where `answer` cannot be read as mathematics, and where the comparison has not come to an end
    (`math_answer.DEADLINE`).
    """
    texts = [text_of(completion) for completion in completions]
    return [
        CHILD.answer(Question(_written(right), extract_answer(text), "<answer>" in text))
        for text, right in zip(texts, answer, strict=True)
    ]


def _written(answer: object) -> str:
    """A number without an exponent, which LaTeX has none of; of text what `reference_answer` takes."""
    return f"{Decimal(repr(answer)):f}" if isinstance(answer, float) else reference_answer(answer)


_BLOCKS = re.compile(r"<(think|reasoning)>.*?</\1>\s*<answer>.*?</answer>", re.DOTALL)


def xml_format(prompts, completions, **columns) -> list[float]:
    """1.0 for <think>...</think><answer>...</answer> (or <reasoning>) and nothing else; 0.5 with text around it."""
    texts = [text_of(completion).strip() for completion in completions]
    return [1.0 if _BLOCKS.fullmatch(text) else 0.5 if _BLOCKS.search(text) else 0.0 for text in texts]


# The GSM8K set of the ReDit scripts and of the GR paper: five functions, full scales 2, 0.5, 1, 1 and 0.5. The scripts'
# format patterns run with re.MULTILINE, whose $ also accepts text below the answer; here the whole completion must fit.


@full_scale(2.0)
@column_checked(_check_text)
def gsm8k_correctness(prompts, completions, answer, **columns) -> list[float]:
    """2.0 where the extracted answer equals the column `answer` as text: the scripts' clean baseline, for both arms."""
    return [2.0 * value for value in exact_answer(prompts, completions, answer)]


@full_scale(0.5)
def gsm8k_int(prompts, completions, **columns) -> list[float]:
    """0.5 where the extracted answer is digits alone."""
    return [0.5 if extract_answer(text_of(completion)).isdigit() else 0.0 for completion in completions]


def gsm8k_strict_format(prompts, completions, **columns) -> list[float]:
    """1.0 for the two blocks, each tag on a line of its own."""
    pattern = re.compile(r"<reasoning>\n.*?\n</reasoning>\n<answer>\n.*?</answer>", re.DOTALL)
    return [float(bool(pattern.fullmatch(text_of(completion).strip()))) for completion in completions]


def gsm8k_soft_format(prompts, completions, **columns) -> list[float]:
    """1.0 for the two blocks in order, whatever is between them."""
    pattern = re.compile(r"<reasoning>.*?</reasoning>.*?<answer>.*?</answer>", re.DOTALL)
    return [float(bool(pattern.fullmatch(text_of(completion).strip()))) for completion in completions]


@full_scale(0.5)
def gsm8k_xmlcount(prompts, completions, **columns) -> list[float]:
    """0.125 for each of the four tags that is there once on its own line, less 0.001 per character behind the last."""
    rewards = []
    for text in map(text_of, completions):
        tags = ("<reasoning>\n", "\n</reasoning>\n", "\n<answer>\n", "\n</answer>")
        reward = 0.125 * sum(text.count(tag) == 1 for tag in tags)
        if text.count(tags[-1]) == 1:
            reward -= 0.001 * (len(text.split(tags[-1])[1]) - 1)
        rewards.append(reward)
    return rewards


SHIPPED = {
    fn.__name__: fn
    for fn in (
        exact_answer,
        numeric_answer,
        math,
        xml_format,
        gsm8k_correctness,
        gsm8k_int,
        gsm8k_strict_format,
        gsm8k_soft_format,
        gsm8k_xmlcount,
    )
}
