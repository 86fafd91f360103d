"""`redit-fast to-verl`: a configuration of `redit-fast train` as data, rewards and a command for verl.

It writes a folder: train.parquet and test.parquet, which verl's RLHFDataset reads; rewards.py, whose compute_score
verl's reward manager calls; run.sh, verl's command with the options of `verl_options`. Neither verl nor a GPU is needed
for that, and the model's weights are not loaded.
"""

from __future__ import annotations

import json
import os
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn
from transformers import PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from redit_fast import __version__, extras
from redit_fast.training import data, lora, policy, rewards, verl_options
from redit_fast.training.config import TrainConfig
from redit_fast.training.config_file import module_file
from redit_fast.training.config_values import is_component
from redit_fast.training.data_names import hub_of
from redit_fast.training.new_folder import new_folder
from redit_fast.training.verl_options import Facts

UNWRITABLE = re.compile("[\0-\x1f\x7f\ud800-\udfff]")  # the last are what bytes that are not UTF-8 become
ONE_MESSAGE = "{{ messages[0]['content'] }}"  # a chat template that leaves a prompt as it is
REWARDS = '''# Rewards of {name} for verl's custom_reward_function, written by redit-fast {version}.
# verl asks for one completion at a time, from several threads: a call waits for the one before.
import json
import math
import threading

from redit_fast.training import rewards

NAMES = {names}
WEIGHTS = {weights}
COLUMNS = {columns}

functions = rewards.resolve(NAMES, COLUMNS)
one_at_a_time = threading.Lock()


def compute_score(data_source, solution_str, ground_truth, extra_info=None, **unused):
    """`ground_truth` is the line of the data, as JSON. The sum is what is trained on; acc is 1.0 where the first reward
    is above 0."""
    with one_at_a_time:
        scores = rewards.score_texts(functions, [json.loads(ground_truth)], [solution_str])[0].tolist()
    for function, score in zip(functions, scores):
        if math.isnan(score):
            raise ValueError(f"reward function {{function.name!r}} left a completion unscored, which verl leaves out")
    found = {{f"rewards/{{function.name}}": score for function, score in zip(functions, scores)}}
    total = math.fsum(weight * score for weight, score in zip(WEIGHTS, scores))
    return {{"score": total, "acc": float(scores[0] > 0), **found}}
'''
RUN = """#!/usr/bin/env bash
# {name} by verl {verl}, written by redit-fast {version}. What stands behind the command is added and wins:
#   bash run.sh trainer.nnodes=2 trainer.n_gpus_per_node=8 actor_rollout_ref.rollout.tensor_model_parallel_size=2
set -euo pipefail
options=(
{words}
)
exec python -m verl.trainer.main_ppo "${{options[@]}}" "$@"
"""


class Prompt(NamedTuple):
    messages: list[dict[str, str]]  # in verl's data
    template: str | None  # the chat template that they need; None: the tokenizer's own
    tokens: int


def to_verl(config: TrainConfig, folder: str | Path, name: str) -> Path:
    """Writes the folder and returns it, absolute.

    Args:
        name: of the run, where `config` has none.

    Raises:
        ValueError, MissingExtra: before anything is written: the folder is there already, verl cannot do what a
            setting says (each of them is named), or what `redit-fast train` refuses of a model, data and rewards.
        OSError: the folder cannot be written; nothing is left.
    """
    extras.need("data", "to-verl")
    name = config.name or name
    if not is_component(name):
        raise ValueError(f"name: {name!r}, after the configuration's file, is none that a run can have: give a --name")
    if not str(folder):
        raise ValueError("--out is empty, needs the name of a new folder")
    folder = Path(os.path.abspath(folder))
    if UNWRITABLE.search(str(folder)):
        raise ValueError(f"--out {str(folder)!r} has a control character or bytes that are not UTF-8, needs another")
    if os.path.lexists(folder):
        raise ValueError(f"{folder} is there already and stays as it is, needs another --out")
    _refuse(verl_options.refusals(config))
    source = str(config.model)
    home, tokenizer = policy.tokenizer_of(source)
    model = policy.skeleton(source, home, tokenizer)
    if config.lora_rank is not None:
        _check_targets(model, config)
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    records = data.load(config, tokenizer, context, model.get_input_embeddings().weight.shape[0])
    columns = data.columns_of(records.train[:1])
    functions = rewards.resolve(config.rewards, columns, config)
    prompts = [_prompt(tokenizer, record, config.system_prompt, place) for place, record in records.numbered]
    template = prompts[0].template
    for (place, _), prompt in zip(records.numbered, prompts, strict=True):
        if prompt.template != template:
            raise ValueError(
                f"{place}: verl has one chat template for all prompts, and this one needs another than that of "
                f"{records.numbered[0][0]}; needs text or chat messages in all of them"
            )
    facts = Facts(
        folder=folder,
        name=name,
        model=str(home.resolve()) if Path(source).expanduser().is_dir() else source,
        dtype=_dtype(config, model),
        prompts=len(records.train),
        held_out=len(records.held_out),
        longest=max(prompt.tokens for prompt in prompts),
        template=template,
        scales=[function.scale for function in functions],
    )
    _refuse(verl_options.refusals_of(config, facts))
    written = REWARDS.format(
        name=facts.name,
        version=__version__,
        names=[_absolute(reward) for reward in config.rewards],
        weights=config.reward_weights or [1.0] * len(functions),
        columns=list(columns),
    )
    messages = {id(record): prompt.messages for (_, record), prompt in zip(records.numbered, prompts, strict=True)}
    hub = hub_of(str(config.data))
    label = hub.name if hub else Path(str(config.data)).stem.encode("utf-8", "replace").decode()
    splits = {"train": records.train, "test": records.held_out}
    tables = {
        f"{split}.parquet": list(_lines(chosen, messages, split, label)) for split, chosen in splits.items() if chosen
    }
    _write(folder, tables, {"rewards.py": written, "run.sh": _command(config, facts)})
    return folder


def _refuse(sentences: list[str]) -> None:
    if sentences:
        raise ValueError(f"not for verl {verl_options.VERSION}: {'. '.join(sentences)}")


def _dtype(config: TrainConfig, model: PreTrainedModel) -> str:
    """What `auto` is on a GPU: the checkpoint's."""
    if config.dtype != "auto":
        return config.dtype
    dtype = str(model.config.get_text_config().dtype or model.config.dtype).removeprefix("torch.")
    if dtype not in verl_options.DTYPES:
        raise ValueError(f"dtype: got auto, and config.json of model {config.model} names none; set it")
    return dtype


def _check_targets(model: PreTrainedModel, config: TrainConfig) -> None:
    """verl hands the names to peft, which does not look at the decoder layers alone."""
    ours = set(lora.targets_of(model, config.lora_targets))
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    head = model.get_output_embeddings()
    theirs = [name for name in linear if model.get_submodule(name) is not head]
    if config.lora_targets is not None:
        theirs = [name for name in linear if any(f".{name}".endswith(f".{end}") for end in config.lora_targets)]
    for name in sorted(ours.symmetric_difference(theirs)):
        raise ValueError(
            f"lora_targets: got {config.lora_targets}, by which verl adapts {name} too, outside the decoder layers; "
            f"set names that are in these alone, such as {min(ours)}"
        )


def _prompt(tokenizer: Tokenizer, record: dict, system_prompt: str | None, place: str) -> Prompt:
    """Text, and chat messages where the tokenizer has no chat template, are one message, which ONE_MESSAGE leaves as it
    is.

    Raises:
        ValueError: verl would make other tokens of this prompt, in one sentence with its place.
    """
    expected = data.render(tokenizer, record, system_prompt)
    prompt = record["prompt"]
    if isinstance(prompt, str):
        return _as_one(tokenizer, prompt if system_prompt is None else f"{system_prompt}\n\n{prompt}", expected, place)
    messages = [{"role": message["role"], "content": message["content"]} for message in prompt]
    if system_prompt is not None and messages[0]["role"] != "system":
        messages = [{"role": "system", "content": system_prompt}, *messages]
    opened = messages[-1]["role"] == "assistant"
    if tokenizer.chat_template is None:
        text = "".join(f"{message['content']}\n\n" for message in messages)
        return _as_one(tokenizer, text.removesuffix("\n\n") if opened else text, expected, place)
    if opened:
        raise ValueError(
            f"{place}: the prompt ends with an assistant message, which verl closes and `redit-fast train` continues; "
            "take it out"
        )
    more = sorted({key for message in prompt for key in message} - {"role", "content"})
    if more and tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False) != expected:
        raise ValueError(
            f"{place}: the chat template reads {', '.join(map(repr, more))} of this prompt's messages, of which verl's "
            "data has role and content alone; take it out"
        )
    return Prompt(messages, None, len(expected))


def _as_one(tokenizer: Tokenizer, text: str, expected: list[int], place: str) -> Prompt:
    messages = [{"role": "user", "content": text}]
    for template in (ONE_MESSAGE, "{{ bos_token }}" + ONE_MESSAGE):
        found: Any = tokenizer.apply_chat_template(messages, chat_template=template, return_dict=False)
        if found == expected:
            return Prompt(messages, template, len(expected))
    raise ValueError(
        f"{place}: verl makes other tokens of this prompt: it adds none to a text but those of a chat template, and "
        "the tokenizer does; needs chat messages"
    )


def _absolute(reward: str) -> str:
    """With the folder of its module, where that is not on sys.path: verl's workers have another current folder."""
    if ":" not in reward:
        return reward
    path, _, function = reward.rpartition(":")
    folder, _, module = path.rpartition("/")
    if module_file(Path(folder).resolve(), module.removesuffix(".py")) is None:
        return reward
    return f"{Path(folder).resolve().as_posix()}/{module}:{function}"


def _command(config: TrainConfig, facts: Facts) -> str:
    words = [
        f"  {shlex.quote(f'{name}={hydra_value(value)}')}"
        for name, value in verl_options.options(config, facts).items()
    ]
    return RUN.format(name=facts.name, verl=verl_options.VERSION, version=__version__, words="\n".join(words))


def hydra_value(value: object) -> str:
    """A value in the grammar of hydra's command line, where a text that could be something else is between quotes."""
    if value is None:
        return "null"
    if isinstance(value, list):
        return f"[{','.join(map(hydra_value, value))}]"
    if not isinstance(value, str):
        return repr(value).lower() if isinstance(value, bool) else repr(value)
    if "${" in value:
        raise ValueError(f"{value!r} has ${{, which verl's configuration takes for a reference; needs a text without")
    if UNWRITABLE.search(value):
        raise ValueError(f"{value!r} has a control character or bytes that are not UTF-8; needs a text without")
    if re.fullmatch("(?i)(?!(null|true|false|inf|nan)$)[a-z/][a-z0-9_./-]*", value):
        return value
    # A backslash counts in front of a quote alone, and the closing one is one.
    return '"' + re.sub(r'(\\*)("|$)', lambda found: found[1] * 2 + found[2].replace('"', '\\"'), value) + '"'


def _lines(chosen: list[dict], messages: dict[int, list], split: str, source: str) -> Iterator[dict]:
    for index, record in enumerate(chosen):
        yield {
            "data_source": source,
            "prompt": messages[id(record)],
            # As JSON: columns of Parquet would give every line the keys and the types of all others.
            "reward_model": {"style": "rule", "ground_truth": json.dumps(record)},
            "extra_info": {"index": index, "split": split},
        }


def _write(folder: Path, tables: dict[str, list[dict]], texts: dict[str, str]) -> None:
    from pyarrow import Table, parquet

    with new_folder(folder, "--out") as draft:
        for name, lines in tables.items():
            parquet.write_table(Table.from_pylist(lines), draft / name)
        for name, text in texts.items():
            (draft / name).write_text(text, "utf-8")
