"""Reward functions: loading and scoring. The shipped ones are in `functions`.

A reward function is `fn(prompts, completions, **columns) -> list[float | None]`, TRL's convention: prompts and
completions are texts, or chat messages where the data has chat messages; every other column of the data comes as a list
under its name; None or NaN leaves a sample unscored. Its optional attribute `reward_scale` is the full scale of its
rewards (1.0 without), which the dither level is relative to. Reward functions run as they are: there is no sandbox, but
each gets a deep copy of its own of everything, so that what it changes reaches no other and not the data.
"""

from __future__ import annotations

import copy
import inspect
import math
import sys
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any, cast

import torch
from torch import Tensor

from redit_fast import extras
from redit_fast.checks import as_float
from redit_fast.signals import remembered
from redit_fast.training import data
from redit_fast.training.config import TrainConfig
from redit_fast.training.config_file import clash, is_function_name
from redit_fast.training.config_values import loaded_reward, name_after
from redit_fast.training.data import Prompt
from redit_fast.training.rewards.functions import SHIPPED
from redit_fast.training.rewards.user_code import RewardError, UserCode, source_of, user_function


@dataclass
class RewardFunction:
    """A function under its name in the metrics, with the full scale of its rewards (`Dither.reward_scale`)."""

    name: str
    fn: Callable[..., Sequence[float | None]]
    scale: float = 1.0
    warned: bool = False  # of unscored samples


def resolve(names: Sequence[str], columns: Iterable[str], config: TrainConfig | None = None) -> list[RewardFunction]:
    """The functions behind `names`: shipped ones, `package.module:function`, also with `FOLDER/` in front, `model:PATH`
    and `judge:PATH_OR_URL`.

    A module is looked up in its folder (the current one where none is given), then on sys.path. `columns` are those of
    the data besides `prompt`; a function that does not take exactly these is refused here, before anything runs.

    Args:
        config: what a reward model and a judge are loaded with; without one they are refused.

    Raises:
        RewardError: one sentence naming the function, and the module that was looked for.
        ValueError: a reward model, a judge or its template cannot be loaded.
    """
    shown = [_short(name) for name in names]
    if twice := {name for name in shown if shown.count(name) > 1}:
        raise RewardError(f"rewards: more than one function is named {min(twice)!r}, the metrics need distinct names")
    functions: list[RewardFunction] = []
    scales = None if config is None else config.reward_scales
    for k, name in enumerate(names):
        fn = _found(name, config)
        with UserCode(f"rewards: reward_scale of {name!r}"):
            scale = getattr(fn, "reward_scale", 1.0)
            fits, told = isinstance(scale, Real) and 0 < as_float(scale) <= sys.float_info.max, f"{scale!r:.80}"
        if not fits:
            raise RewardError(f"rewards: reward_scale of {name!r} is {told}, needs a positive number")
        columns = list(columns)
        try:
            inspect.signature(fn).bind(prompts=[], completions=[], **dict.fromkeys(columns, []))
        except TypeError as error:
            raise RewardError(
                f"rewards: {name!r}: {error}; the data has the columns {', '.join(columns) or 'none'}"
            ) from None
        except ValueError:  # of builtins
            raise RewardError(f"rewards: {name!r} does not say which arguments it takes, needs a function") from None
        functions.append(RewardFunction(shown[k], fn, float(scale if scales is None else scales[k])))
    return functions


def _found(name: str, config: TrainConfig | None) -> Callable:
    if loaded := loaded_reward(name):
        kind, place = loaded
        if is_function_name(place) and (own := source_of(name)):
            raise RewardError(clash(name, own))
        if config is None:
            raise RewardError(f"rewards: {name!r} needs the settings of a run, which are not given here")
        if kind == "model":
            from redit_fast.training.rewards.model import RewardModel

            return RewardModel(place, config)
        from redit_fast.training.rewards.judge import Judge

        return Judge(place, config)
    if ":" in name:
        return user_function(name)
    if name not in SHIPPED:
        raise RewardError(
            f"rewards: {name!r} is neither package.module:function nor a shipped function ({', '.join(SHIPPED)}), "
            "model:PATH or judge:PATH_OR_URL"
        )
    if name == "math":
        extras.need("math", "the reward math")
    return SHIPPED[name]


def _short(name: str) -> str:
    """In the metrics: a function's own name, that after a reward model, and of a judge that word."""
    loaded = loaded_reward(name)
    if loaded is None:
        return name.rpartition(":")[2]
    kind, place = loaded
    return name_after(place) if kind == "model" else kind


def score(
    functions: Sequence[RewardFunction],
    prompts: Sequence[Prompt],
    completions: Sequence[Prompt],
    columns: Mapping[str, Sequence],
) -> Tensor:
    """The rewards of N completions by K functions: (N, K) float64 on the CPU, NaN where a sample is unscored.

    Raises:
        RewardError: a function raised, or returned anything but one number, None or NaN for each completion; the
            message names the function and the sample.
    """
    scores = torch.empty(len(completions), len(functions), dtype=torch.float64, device="cpu")
    for k, function in enumerate(functions):
        with remembered():
            values = _rewards(function, prompts, completions, columns)
        scores[:, k] = torch.tensor(values, dtype=torch.float64, device="cpu")
        unscored = int(scores[:, k].isnan().sum())
        if unscored and not function.warned:
            function.warned = True
            warnings.warn(
                f"reward function {function.name!r} left {unscored} of {len(scores)} samples unscored (None or NaN); "
                f"rewards/{function.name}/nan_frac counts them from here on",
                stacklevel=2,
            )
    return scores


def score_texts(functions: Sequence[RewardFunction], records: list[dict], texts: Sequence[str]) -> Tensor:
    """The rewards of completions given as text, one to each record of the data: `score`."""
    prompts = [record["prompt"] for record in records]
    completions = [data.completion(prompt, text) for prompt, text in zip(prompts, texts, strict=True)]
    return score(functions, prompts, completions, data.columns_of(records))


def _rewards(function: RewardFunction, prompts, completions, columns) -> list[float]:
    def call(rows: slice) -> object:
        # Value by value: the completions of a prompt share its objects, and a copy of the whole list keeps that.
        arguments = {"prompts": prompts, "completions": completions, **columns}
        return function.fn(**{name: [copy.deepcopy(v) for v in values[rows]] for name, values in arguments.items()})

    try:
        with UserCode(f"reward function {function.name!r}"):
            values = call(slice(None))
    except RewardError as error:
        if error.__cause__ is None:  # of a function of ours, whose words are enough
            raise
        for i in range(len(completions)):  # which sample it was: one at a time
            with UserCode(f"reward function {function.name!r}, sample {i}"):
                call(slice(i, i + 1))
        raise
    if inspect.isawaitable(values):
        getattr(values, "close", lambda: None)()  # a coroutine that is only dropped says so on the terminal
        raise RewardError(f"reward function {function.name!r} is asynchronous, needs one that returns a list")
    with UserCode(f"reward function {function.name!r}: reading what it returned"):
        values = values.tolist() if hasattr(values, "tolist") else values  # of a tensor or an array
        values = list(values) if isinstance(values, (list, tuple)) else values
    if not isinstance(values, (list, tuple)):
        raise RewardError(f"reward function {function.name!r} returned {type(values).__name__}, needs a list")
    if len(values) != len(completions):
        raise RewardError(
            f"reward function {function.name!r} returned {len(values)} rewards for {len(completions)} samples"
        )
    return [_number(function, i, value) for i, value in enumerate(values)]


def _number(function: RewardFunction, sample: int, value: Any) -> float:
    with UserCode(f"reward function {function.name!r}: reading what it returned for sample {sample}"):
        value = value.item() if getattr(value, "ndim", None) == 0 else value  # of a tensor or an array
        if value is None:
            return math.nan
        if isinstance(value, Real) and not abs(cast(Any, value)) > sys.float_info.max:  # NaN passes
            return float(value)
        told = repr(value)
    raise RewardError(
        f"reward function {function.name!r} returned {told} for sample {sample}, needs a finite number, None or NaN"
    )
