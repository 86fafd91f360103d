"""Prompts from a file or the hub: reading, rendering, the held-out split and the batches.

A record is a dict: `prompt`, text or a list of chat messages {"role", "content"}, and any further columns, the same in
every record, which the reward functions receive as lists under their names.
"""

from __future__ import annotations

import copy
import json
import random
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import TypeVar

import jinja2
from transformers import PreTrainedTokenizerBase as Tokenizer

from redit_fast.foreign import Foreign
from redit_fast.training import data_files
from redit_fast.training.config import TrainConfig
from redit_fast.training.data_names import FORMATS, RESERVED, Format, names_of

Prompt = str | list[dict[str, str]]
T = TypeVar("T")


@dataclass(frozen=True)
class Dataset:
    """Records to train on and to evaluate on; `skipped` counts those left out because their prompt was too long.

    `numbered` has all of them in the files' order, each with FILE:LINE or FILE:ROW; it is empty where there is no file.
    """

    train: list[dict]
    held_out: list[dict]
    skipped: int = 0
    numbered: list[tuple[str, dict]] = field(default_factory=list)


def load(
    config: TrainConfig, tokenizer: Tokenizer, context: int | None = None, vocabulary: int | None = None
) -> Dataset:
    """The records of `config.data`, every prompt checked for its length, split by `config.seed`; with an `eval_data`
    all of them are trained on.

    Args:
        context: tokens that the model can attend to, prompt and completion together; None for no limit.
        vocabulary: tokens that the model's embedding has; None for no limit.

    Warns where a file has chat prompts and the tokenizer no chat template, and of prompts that are in both files.

    Raises:
        ValueError: one sentence with file, line and column, for a bad line, an empty file, a prompt that is too long or
            columns that differ between the files.
    """
    limit = context - config.max_completion_length if context is not None else None
    if limit is not None and limit < 1:
        raise ValueError(
            f"max_completion_length: got {config.max_completion_length}, which leaves no room for a prompt in the "
            f"model's context of {context} tokens"
        )
    if config.max_prompt_length is not None:
        limit = min(config.max_prompt_length, limit) if limit is not None else config.max_prompt_length
    kept, skipped = _that_fit(str(config.data), config, tokenizer, limit, vocabulary)
    apart: list[tuple[str, dict]] = []
    skipped_apart = 0
    if config.eval_data is not None:
        apart, skipped_apart = _that_fit(config.eval_data, config, tokenizer, limit, vocabulary)
        for column in sorted(kept[0][1].keys() ^ apart[0][1].keys()):
            (has, _), (lacks, _) = (kept[0], apart[0]) if column in kept[0][1] else (apart[0], kept[0])
            raise ValueError(f"{lacks}: column {column!r} is missing, {has} has it")
    records, others = [record for _, record in kept], [record for _, record in apart]
    if tokenizer.chat_template is None and any(not isinstance(record["prompt"], str) for record in records + others):
        warnings.warn("the tokenizer has no chat template: chat prompts are rendered as plain text", stacklevel=2)
    if config.eval_data is not None:
        trained = {_key(record) for record in records}
        if both := sum(_key(record) in trained for record in others):
            warnings.warn(
                f"{config.eval_data}: {both} of its prompts are in {config.data} too, so they are trained on",
                stacklevel=2,
            )
        chosen = random.Random(f"{config.seed} eval").sample(range(len(others)), min(config.eval_problems, len(others)))
        return Dataset(records, [others[i] for i in sorted(chosen)], skipped + skipped_apart, kept + apart)
    train, held_out = split(records, config.eval_problems, config.seed)
    if config.eval_problems and not held_out:
        warnings.warn(
            f"{config.data}: none of its {len(kept)} prompts is held out, since at most a fifth is and equal prompts "
            "stay together, so held-out accuracy is not measured; eval_problems 0 is the same without this warning",
            stacklevel=2,
        )
    return Dataset(train, held_out, skipped, kept)


def _that_fit(
    path: str, config: TrainConfig, tokenizer: Tokenizer, limit: int | None, vocabulary: int | None
) -> tuple[list[tuple[str, dict]], int]:
    """(FILE:LINE or FILE:ROW, record) for each of a file, and how many `long_prompts` has left out."""
    kept, skipped = [], 0
    for number, record in read(path, config.columns, config.data_format):
        place = f"{path}:{number}"
        part = "tokenizer" if isinstance(record["prompt"], str) else "chat template"
        with Foreign(f"{place}: the {part} refuses this prompt", plain=jinja2.TemplateError):
            ids = render(tokenizer, record, config.system_prompt)
        if not ids:
            raise ValueError(f"{place}: the tokenizer makes no tokens of this prompt")
        if vocabulary is not None and max(ids) >= vocabulary:
            token = tokenizer.decode([max(ids)])
            raise ValueError(
                f"{place}: the prompt has token {max(ids)} ({token!r}), the model's embedding only has "
                f"{vocabulary} rows"
            )
        if limit is None or len(ids) <= limit:
            kept.append((place, record))
        elif config.long_prompts == "skip":
            skipped += 1
        else:
            raise ValueError(
                f"{place}: the prompt has {len(ids)} tokens, the most that fit are {limit} "
                "(long_prompts: skip leaves such prompts out)"
            )
    if not kept:
        raise ValueError(f"{path}: every one of its {skipped} prompts is longer than {limit} tokens")
    return kept, skipped


def read(
    source: str | Path, columns: Sequence[str] | None = None, data_format: str | None = None
) -> list[tuple[int, dict]]:
    """(line or row number, record) for all of a file or a data set of the hub: `data_files.rows`.

    Args:
        columns: those to read, as NAME or NAME=COLUMN; None: all.
        data_format: the known set whose columns and answers it has, in place of `columns`.

    Raises:
        ValueError: one sentence with the source and, where there are such, line or row and column.
    """
    source, names = str(source), names_of(columns, data_format)
    records: list[tuple[int, dict]] = []
    for number, row in data_files.rows(source, None if names is None else set(names.values())):
        place = f"{source}:{number}"
        record = row if names is None else _renamed(place, row, names)
        if data_format is not None:
            record["answer"] = _answer(place, record["answer"], FORMATS[data_format])
        _check(place, record)
        first, before = records[0] if records else (number, record)
        for column in before.keys() ^ record.keys():
            has, lacks = (number, first) if column in record else (first, number)
            raise ValueError(f"{source}:{lacks}: column {column!r} is missing, line {has} has it")
        records.append((number, record))
    if not records:
        needs = "a JSON object with a prompt in each line" if source.endswith(".jsonl") else "rows with a prompt"
        raise ValueError(f"{source}: the file is empty, it needs {needs}")
    return records


def _renamed(place: str, row: dict, names: Mapping[str, str]) -> dict:
    for column in names.values():
        if column not in row:
            raise ValueError(f"{place}: no column {column!r}, found {', '.join(map(repr, row)) or 'none'}")
    return {name: row[column] for name, column in names.items()}


def _answer(place: str, text: object, of: Format) -> str:
    column, answer = of.columns["answer"], of.answer(text) if isinstance(text, str) else None
    if answer is None:
        raise ValueError(f"{place}: column {column!r} needs text with {of.needs}, got {text!r:.80}")
    return answer


def _check(place: str, record: dict) -> None:
    for column in RESERVED:
        if column in record:
            raise ValueError(f"{place}: column {column!r} is a reserved name, reward functions have an argument of it")
    if "prompt" not in record:
        raise ValueError(
            f"{place}: no column 'prompt', found {', '.join(map(repr, record)) or 'none'}; where it has another name, "
            "columns says which: prompt=question"
        )
    prompt = record["prompt"]
    if not isinstance(prompt, str) and not (isinstance(prompt, list) and prompt and all(map(is_message, prompt))):
        raise ValueError(
            f"{place}: the prompt needs text or a list of chat messages with text 'role' and 'content', "
            f"got {json.dumps(prompt)[:60]}"
        )
    if not text_of(prompt).strip():
        raise ValueError(f"{place}: the prompt is empty")
    if any("\ud800" <= character <= "\udfff" for character in text_of(prompt)):
        raise ValueError(f"{place}: the prompt has half of a surrogate pair, which is no character")


def is_message(message: object) -> bool:
    return isinstance(message, dict) and all(isinstance(message.get(key), str) for key in ("role", "content"))


def render(tokenizer: Tokenizer, record: dict, system_prompt: str | None = None) -> list[int]:
    """The token ids that the model continues.

    Chat messages go through the tokenizer's chat template, behind `system_prompt` as a system message unless they bring
    their own. Text is taken as it is, behind `system_prompt` and a blank line. A tokenizer without a chat template, as
    base models have, gets the messages' texts with blank lines between and after them. A final assistant message is not
    closed: the model continues it, as it would continue a `<think>` of its own.

    Raises:
        whatever a chat template may, jinja2.TemplateError where it refuses the messages.
    """
    prompt = copy.deepcopy(record["prompt"])  # a tokenizer's own code may change the messages
    if isinstance(prompt, str):
        return tokenizer(prompt if system_prompt is None else f"{system_prompt}\n\n{prompt}")["input_ids"]
    if system_prompt is not None and prompt[0]["role"] != "system":
        prompt = [{"role": "system", "content": system_prompt}, *prompt]
    opened = prompt[-1]["role"] == "assistant"
    if tokenizer.chat_template is None:
        text = "".join(f"{message['content']}\n\n" for message in prompt)
        return tokenizer(text.removesuffix("\n\n") if opened else text)["input_ids"]
    if not opened:
        return tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=False)
    text = tokenizer.apply_chat_template(prompt, continue_final_message=True, tokenize=False)
    ending = prompt[-1]["content"]
    if not text.endswith(ending):  # a template that trims contents took the newline of a `<think>`
        text = text.rstrip() + ending[len(ending.rstrip()) :]
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def completion(prompt: Prompt, text: str) -> Prompt:
    """A completion in the form that reward functions get: text for a text prompt, else one assistant message.

    It is the generated text alone, TRL's convention: an assistant message that the prompt ends with is not in it.
    """
    return text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]


def text_of(value: Prompt) -> str:
    """The text of a prompt or completion; the contents of chat messages, joined by blank lines."""
    return value if isinstance(value, str) else "\n\n".join(message["content"] for message in value)


def columns_of(records: list[dict]) -> dict[str, list]:
    """Every column but `prompt`, as the lists that reward functions get."""
    return {name: [record[name] for record in records] for name in records[0] if name != "prompt"}


def split(records: list[dict], eval_problems: int, seed: int) -> tuple[list[dict], list[dict]]:
    """(train, held out) in the file's order: `eval_problems` records drawn by `seed`, a fifth of all at most, go out.

    Records of equal prompts stay together, so a prompt is never on both sides.
    """
    groups: dict[str, list[int]] = {}
    for index, record in enumerate(records):
        groups.setdefault(_key(record), []).append(index)
    order = list(groups.values())
    random.Random(f"{seed} split").shuffle(order)
    room = min(eval_problems, len(records) // 5)
    chosen: set[int] = set()
    for group in order:
        if len(chosen) + len(group) <= room:
            chosen.update(group)
    held_out = [record for index, record in enumerate(records) if index in chosen]
    return [record for index, record in enumerate(records) if index not in chosen], held_out


def _key(record: dict) -> str:
    return json.dumps(record["prompt"], sort_keys=True)


def batch(records: list[T], seed: int, position: int, n: int) -> list[T]:
    """The `n` records from `position` on of one endless list, epoch after epoch, each epoch a permutation of its own: a
    pure function of its arguments, so that a resumed run needs the position alone."""
    chosen = []
    for place in range(position, position + n):
        epoch, index = divmod(place, len(records))
        chosen.append(records[_permutation(len(records), seed, epoch)[index]])
    return chosen


@lru_cache(maxsize=2)  # a batch touches two epochs at most, unless it is larger than the data
def _permutation(count: int, seed: int, epoch: int) -> list[int]:
    order = list(range(count))
    random.Random(f"{seed} {epoch}").shuffle(order)
    return order
