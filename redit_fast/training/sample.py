"""`redit-fast sample`: completions of one prompt by a checkpoint, on the terminal, with rewards where they can be
given."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack

import jinja2
from rich.console import Console
from transformers import PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from redit_fast.foreign import Foreign
from redit_fast.training import data, generation, rewards, setup
from redit_fast.training.config import TrainConfig
from redit_fast.training.plain_text import say, scored, visible
from redit_fast.training.rewards.user_code import RewardError


def sample(
    source: str,
    given: Mapping[str, object],
    *,
    prompt: str | None = None,
    row: int | None = None,
    chat: bool = False,
    samples: int = 4,
    greedy: bool = False,
) -> None:
    """Prints `samples` completions of a prompt, each with its rewards.

    Args:
        source, given, greedy: as in `generation.generate`. Without `rewards`, of a run or given, there are none.
        prompt: the text that is continued, by rewards that need no column; None: that of a row.
        row: the place of a prompt among those of `data`, from 1 on.
        chat: the prompt is what a user says, not the text that is continued.

    Raises:
        ValueError: one sentence.
    """
    needs, left_out = ["data"] if prompt is None else [], list[str]()
    folder, settings = generation.settings_of("sample", source, given, samples=samples, greedy=greedy, needs=needs)
    with ExitStack() as held:
        model, tokenizer = generation.loaded("sample", folder, settings)
        if prompt is None:
            place, record = _of_row(row or 0, settings, model, tokenizer)
            functions = rewards.resolve(_named(settings), data.columns_of([record]), settings)
        else:
            place, record = "prompt", {"prompt": [{"role": "user", "content": prompt}] if chat else prompt}
            functions, left_out = _without_columns(settings)
        if chat and tokenizer.chat_template is None:
            raise ValueError(f"--chat: the tokenizer of {source} has no chat template: give the whole text instead")
        ids = _ids(place, record, settings, model, tokenizer)
        dataset = data.Dataset([record], [], numbered=[(place, record)])
        job = generation.ready(settings, model, tokenizer, dataset, functions, held, Console(quiet=True))
        say(f"{place}, {len(ids)} tokens\n{visible(data.text_of(record['prompt']))}")
        for call in job.sampled(samples, greedy=greedy):
            for i, (_, number) in enumerate(call.places):
                say(f"\n--- {number + 1} of {samples}: {_told(call, i, functions)}\n{visible(call.texts[i])}")
        for sentence in left_out:
            say(f"\nleft out: {visible(sentence)}")


def _named(settings: TrainConfig) -> list[str]:
    return [name for name in settings.rewards if name != generation.UNSET]


def _of_row(row: int, settings: TrainConfig, model: PreTrainedModel, tokenizer: Tokenizer) -> tuple[str, dict]:
    """FILE:LINE and the record."""
    numbered = setup.dataset(settings, model, tokenizer).numbered
    if not 1 <= row <= len(numbered):
        raise ValueError(f"--row is {row}, needs a whole number from 1 to {len(numbered)}, the prompts of the data")
    return numbered[row - 1]


def _without_columns(settings: TrainConfig) -> tuple[list[rewards.RewardFunction], list[str]]:
    """The rewards that need no column, and why the others are left out."""
    functions, left_out = [], []
    for name in _named(settings):
        try:
            functions += rewards.resolve([name], [], settings)
        except RewardError as error:
            left_out.append(str(error))
    return functions, left_out


def _ids(place: str, record: dict, settings: TrainConfig, model: PreTrainedModel, tokenizer: Tokenizer) -> list[int]:
    """The prompt's tokens, after the checks that `data.load` makes of a file's."""
    text = data.text_of(record["prompt"])
    if not text.strip():
        raise ValueError(f"{place}: is empty, needs text")
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise ValueError(f"{place}: is not text in UTF-8")
    with Foreign(f"{place}: the tokenizer refuses it", plain=jinja2.TemplateError):
        ids = data.render(tokenizer, record, settings.system_prompt)
    rows = model.get_input_embeddings().weight.shape[0]
    if not ids or max(ids) >= rows:
        raise ValueError(f"{place}: the tokenizer makes no tokens of it that the model has")
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if context is not None and len(ids) + settings.max_completion_length > context:
        raise ValueError(
            f"{place}: has {len(ids)} tokens, which leave no room for {settings.max_completion_length} more in the "
            f"model's context of {context}: give a smaller --max-completion-length"
        )
    return ids


def _told(call: generation.Sampled, i: int, functions: list[rewards.RewardFunction]) -> str:
    """Of a completion, its length and rewards."""
    length = f"{len(call.rollout.completions[i])} tokens"
    ended = "" if call.rollout.finished[i] else "cut off"
    return ", ".join(filter(None, (length, ended, scored(functions, call.scores[i].tolist()))))
