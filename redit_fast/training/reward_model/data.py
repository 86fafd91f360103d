"""Pairs of a better and a worse answer to a prompt, from a file: checked, as tokens, with a part held out.

A record is a dict with `prompt`, `chosen` and `rejected`, all texts or all lists of chat messages, and in all records
or in none a number `margin`, by which the chosen one is to be ahead. Other columns have no part.
"""

from __future__ import annotations

import json
import math
import random
import warnings
from dataclasses import dataclass
from typing import Any

import jinja2
from transformers import PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from redit_fast.checks import as_float
from redit_fast.foreign import Foreign
from redit_fast.training import data
from redit_fast.training.config_checks import LARGEST
from redit_fast.training.reward_model.config import RewardModelConfig
from redit_fast.training.rewards.model import context_of, tokens_of

ANSWERS = ("chosen", "rejected")


@dataclass(frozen=True)
class Pair:
    chosen: list[int]  # tokens of prompt and answer
    rejected: list[int]
    margin: float


@dataclass(frozen=True)
class Pairs:
    """Those to train on and to evaluate on; `skipped` counts those that are left out since a text is too long."""

    train: list[Pair]
    held_out: list[Pair]
    skipped: int


def load(config: RewardModelConfig, model: PreTrainedModel, tokenizer: Tokenizer) -> Pairs:
    """The pairs of `config.data`, of which a part is held out by `config.seed`, or with an `eval_data` all of them.
    Pairs of one prompt stay together.

    Warns where a file has chat messages and the tokenizer no chat template, where nothing is held out, and of pairs
    whose two texts are the same tokens.

    Raises:
        ValueError: one sentence with file and line, for a column that is missing or of another kind, a text that is too
            long, an empty file.
    """
    kept, skipped = _that_fit(config.data, config, model, tokenizer)
    apart: list[tuple[dict, Pair]] = []
    skipped_apart = 0
    if config.eval_data is not None:
        apart, skipped_apart = _that_fit(config.eval_data, config, model, tokenizer)
    records = [record for record, _ in kept + apart]
    if tokenizer.chat_template is None and any(not isinstance(record["prompt"], str) for record in records):
        warnings.warn("the tokenizer has no chat template: chat messages are read as plain text", stacklevel=2)
    if same := sum(pair.chosen == pair.rejected for _, pair in kept + apart):
        warnings.warn(f"{same} pairs have two texts of the same tokens, of which nothing is learned", stacklevel=2)
    if config.eval_data is not None:
        chosen = random.Random(f"{config.seed} eval").sample(range(len(apart)), min(config.eval_pairs, len(apart)))
        held_out = [apart[i][1] for i in sorted(chosen)]
        return Pairs([pair for _, pair in kept], held_out, skipped + skipped_apart)
    pair_of = {id(record): pair for record, pair in kept}
    train, held_out = (
        [pair_of[id(record)] for record in part]
        for part in data.split([record for record, _ in kept], config.eval_pairs, config.seed)
    )
    if config.eval_pairs and not held_out:
        warnings.warn(
            f"{config.data}: none of its {len(kept)} pairs is held out, since at most a fifth is and pairs of one "
            "prompt stay together, so accuracy on held-out pairs is not measured; eval_pairs 0 is the same without "
            "this warning",
            stacklevel=2,
        )
    return Pairs(train, held_out, skipped)


def _that_fit(
    path: str, config: RewardModelConfig, model: PreTrainedModel, tokenizer: Tokenizer
) -> tuple[list[tuple[dict, Pair]], int]:
    """(record, pair) for each of a file, and how many `long_pairs` has left out."""
    limits = [limit for limit in (config.max_length, context_of(model)) if limit is not None]
    rows = model.get_input_embeddings().weight.shape[0]
    kept, skipped = [], 0
    for line, record in data.read(path, config.columns):
        place = f"{path}:{line}"
        _check(place, record)
        part = "tokenizer" if isinstance(record["prompt"], str) else "chat template"
        texts: dict[str, list[int]] = {}
        for name in ANSWERS:
            with Foreign(f"{place}: the {part} refuses {name!r}", plain=jinja2.TemplateError):
                texts[name] = tokens_of(tokenizer, model, record["prompt"], record[name])
            if not texts[name]:
                raise ValueError(f"{place}: the tokenizer makes no tokens of prompt and {name!r}")
            if max(texts[name]) >= rows:
                token = tokenizer.decode([max(texts[name])])
                raise ValueError(
                    f"{place}: prompt and {name!r} have token {max(texts[name])} ({token!r}), the model's embedding "
                    f"only has {rows} rows"
                )
        longest = max(ANSWERS, key=lambda name: len(texts[name]))
        if len(texts[longest]) <= min(limits, default=math.inf):
            kept.append((record, Pair(**texts, margin=float(record.get("margin", 0.0)))))
        elif config.long_pairs == "skip":
            skipped += 1
        else:
            raise ValueError(
                f"{place}: prompt and {longest!r} have {len(texts[longest])} tokens, the most that fit are "
                f"{min(limits)} (long_pairs: skip leaves such pairs out)"
            )
    if not kept:
        raise ValueError(f"{path}: every one of its {skipped} pairs has a text longer than {min(limits)} tokens")
    return kept, skipped


def _check(place: str, record: dict[str, Any]) -> None:
    for name in ANSWERS:
        if name not in record:
            raise ValueError(f"{place}: no column {name!r}, found {', '.join(map(repr, record))}")
        answer = record[name]
        if isinstance(record["prompt"], str) != isinstance(answer, str) or not (
            isinstance(answer, str) or (isinstance(answer, list) and answer and all(map(data.is_message, answer)))
        ):
            needs = "text" if isinstance(record["prompt"], str) else "a list of chat messages"
            raise ValueError(f"{place}: {name!r} needs {needs}, as the prompt is, got {json.dumps(answer)[:60]}")
        if any("\ud800" <= character <= "\udfff" for character in data.text_of(answer)):
            raise ValueError(f"{place}: {name!r} has half of a surrogate pair, which is no character")
    margin = record.get("margin", 0.0)
    if isinstance(margin, bool) or not isinstance(margin, int | float) or not abs(as_float(margin)) <= LARGEST:
        raise ValueError(
            f"{place}: 'margin' needs a number that float32 has, up to {LARGEST:.1e}, got {json.dumps(margin)[:60]}"
        )
