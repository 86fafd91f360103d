"""Reward functions: the shipped ones, those of the user, and the scoring of a batch.

A reward function is `fn(prompts, completions, **columns) -> list[float | None]`, TRL's convention: prompts and
completions are texts, or chat messages where the data has chat messages; every other column of the data comes as a list
under its name; None or NaN leaves a sample unscored. Its optional attribute `reward_scale` is the full scale of its
rewards (1.0 without), which the dither level is relative to. Reward functions run as they are: there is no sandbox, but
each gets a deep copy of its own of everything, so that what it changes reaches no other and not the data.
"""

from __future__ import annotations

import copy
import importlib
import inspect
import math
import re
import site
import sys
import sysconfig
import traceback
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from numbers import Real
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

from redit_fast.foreign import text_of_error
from redit_fast.signals import remembered
from redit_fast.training import answers, data
from redit_fast.training.config import module_file
from redit_fast.training.data import Prompt, text_of


class RewardError(ValueError):
    """A reward function that cannot be loaded or called, or returned what is no reward; the message names it."""


@dataclass
class RewardFunction:
    """A function under its name in the metrics, with the full scale of its rewards (`Dither.reward_scale`)."""

    name: str
    fn: Callable[..., Sequence[float | None]]
    scale: float = 1.0
    warned: bool = False  # of unscored samples


def resolve(names: Sequence[str], columns: Iterable[str]) -> list[RewardFunction]:
    """The functions behind `names`, each a shipped one or `package.module:function`, also with `FOLDER/` in front.

    A module is looked up in its folder (the current one where none is given), then on sys.path. `columns` are those of
    the data besides `prompt`; a function that does not take exactly these is refused here, before anything runs.

    Raises:
        RewardError: one sentence naming the function, and the module that was looked for.
    """
    functions = []
    for name in names:
        fn = _user_function(name) if ":" in name else SHIPPED.get(name)
        if fn is None:
            raise RewardError(
                f"rewards: {name!r} is neither package.module:function nor a shipped function ({', '.join(SHIPPED)})"
            )
        with _UserCode(f"rewards: reward_scale of {name!r}"):
            scale = getattr(fn, "reward_scale", 1.0)
            fits, told = isinstance(scale, Real) and 0 < scale <= sys.float_info.max, f"{scale!r:.80}"
        if not fits:
            raise RewardError(f"rewards: reward_scale of {name!r} is {told}, needs a positive number")
        columns = list(columns)
        try:
            inspect.signature(fn).bind(prompts=[], completions=[], **dict.fromkeys(columns, []))
        except TypeError as error:
            raise RewardError(f"rewards: {name!r}: {error}; the data has the columns {', '.join(columns)}") from None
        except ValueError:  # of builtins
            raise RewardError(f"rewards: {name!r} does not say which arguments it takes, needs a function") from None
        functions.append(RewardFunction(name.rpartition(":")[2], fn, float(scale)))
    twice = {f.name for f in functions if sum(f.name == other.name for other in functions) > 1}
    if twice:
        raise RewardError(f"rewards: more than one function is named {min(twice)!r}, the metrics need distinct names")
    return functions


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
    scores = torch.empty(len(completions), len(functions), dtype=torch.float64)
    for k, function in enumerate(functions):
        with remembered():
            values = _rewards(function, prompts, completions, columns)
        scores[:, k] = torch.tensor(values, dtype=torch.float64)
        unscored = int(scores[:, k].isnan().sum())
        if unscored and not function.warned:
            function.warned = True
            warnings.warn(
                f"reward function {function.name!r} left {unscored} of {len(scores)} samples unscored (None or NaN); "
                f"rewards/{function.name}/nan_frac counts them from here on",
                stacklevel=2,
            )
    return scores


def score_texts(functions: Sequence[RewardFunction], records: Sequence[dict], texts: Sequence[str]) -> Tensor:
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
        with _UserCode(f"reward function {function.name!r}"):
            values = call(slice(None))
    except RewardError:
        for i in range(len(completions)):  # which sample it was: one at a time
            with _UserCode(f"reward function {function.name!r}, sample {i}"):
                call(slice(i, i + 1))
        raise
    if inspect.isawaitable(values):
        getattr(values, "close", lambda: None)()  # a coroutine that is only dropped says so on the terminal
        raise RewardError(f"reward function {function.name!r} is asynchronous, needs one that returns a list")
    with _UserCode(f"reward function {function.name!r}: reading what it returned"):
        values = values.tolist() if hasattr(values, "tolist") else values  # of a tensor or an array
        values = list(values) if isinstance(values, (list, tuple)) else values
    if not isinstance(values, (list, tuple)):
        raise RewardError(f"reward function {function.name!r} returned {type(values).__name__}, needs a list")
    if len(values) != len(completions):
        raise RewardError(
            f"reward function {function.name!r} returned {len(values)} rewards for {len(completions)} samples"
        )
    return [_number(function, i, value) for i, value in enumerate(values)]


def _number(function: RewardFunction, sample: int, value: object) -> float:
    with _UserCode(f"reward function {function.name!r}: reading what it returned for sample {sample}"):
        value = value.item() if getattr(value, "ndim", None) == 0 else value  # of a tensor or an array
        if value is None:
            return math.nan
        if isinstance(value, Real) and not abs(value) > sys.float_info.max:  # NaN passes
            return float(value)
        told = repr(value)
    raise RewardError(
        f"reward function {function.name!r} returned {told} for sample {sample}, needs a finite number, None or NaN"
    )


_OURS = (str(Path(__file__).parent.parent), str(Path(importlib.__file__).parent), "<frozen ")
INSTALLED = (sysconfig.get_path("stdlib"), *site.getsitepackages(), site.getusersitepackages())


class _UserCode:
    """The one place that runs code that is not ours: whatever it raises, but a Ctrl-C, becomes one sentence, with the
    deepest line of the user's own files where there is one."""

    def __init__(self, where: str):
        self.where = where

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind, error: BaseException | None, trace) -> None:
        if error is not None and not isinstance(error, KeyboardInterrupt):
            raise RewardError(f"{self.where} raised {kind.__name__}: {text_of_error(error)}{_place(trace)}") from error


def _place(trace) -> str:
    """Of the user's own files, or of the installed package that the function is from: " (file:line: source)"."""
    frames = [frame for frame in traceback.extract_tb(trace) if not frame.filename.startswith(_OURS)]
    own = [frame for frame in frames if not frame.filename.startswith(INSTALLED)]
    return "".join(f" ({frame.filename}:{frame.lineno}: {frame.line})" for frame in (own[-1:] or frames[:1]))


def _user_function(name: str) -> Callable:
    path, _, function = name.rpartition(":")
    folder, _, module_name = path.rpartition("/")
    if not module_name or not function:
        raise RewardError(f"rewards: {name!r} lacks a name, needs package.module:function")
    module = _module(Path(folder).resolve(), module_name.removesuffix(".py"), name)
    fn = getattr(module, function, None)
    if not callable(fn):
        raise RewardError(f"rewards: {name!r}: {module.__file__ or module.__path__[0]} has no function {function!r}")
    return fn


def source_of(name: str) -> Path | None:
    """The file of the module that the reward function `name` is of, before it is loaded; None where there is none."""
    if ":" not in name:
        return Path(__file__)
    folder, _, module = name.rpartition(":")[0].rpartition("/")
    module = module.removesuffix(".py")
    if file := module_file(Path(folder).resolve(), module):
        return file
    try:
        with _UserCode(f"rewards: {name!r}: looking for {module}"):  # runs the packages that it is in
            loaded = sys.modules.get(module)
            origin = find_spec(module).origin if loaded is None else loaded.__file__
    except RewardError:
        return None
    return Path(origin) if origin and Path(origin).is_file() else None


def _module(folder: Path, module: str, name: str) -> ModuleType:
    file = module_file(folder, module)
    if file is None:
        try:
            with _UserCode(f"rewards: {name!r}: importing {module}"):
                return import_module(module)
        except RewardError as error:
            if isinstance(error.__cause__, ModuleNotFoundError) and f"{module}.".startswith(f"{error.__cause__.name}."):
                raise RewardError(f"rewards: {name!r}: no module {module!r} in {folder} or on sys.path") from None
            raise
    loaded = sys.modules.get(module)
    if loaded is not None and getattr(loaded, "__file__", None) == str(file):
        return loaded
    # By file, so that neither a standard module nor another folder's of the same name can take its place.
    key = module if loaded is None else f"{module}@{file}"
    if key in sys.modules:
        return sys.modules[key]
    if str(folder) not in sys.path:
        sys.path.append(str(folder))  # for its own imports
    spec = spec_from_file_location(key, file)
    sys.modules[key] = module_from_spec(spec)
    try:
        with _UserCode(f"rewards: {name!r}: importing {file}"):
            spec.loader.exec_module(sys.modules[key])
    except RewardError:
        del sys.modules[key]
        raise
    return sys.modules[key]


# The shipped functions. `answer` is the column of that name: a number or text; of GSM8K's texts the part behind "####".


def extract_answer(completion: str) -> str:
    """The text between the last <answer> and the </answer> behind it; all of it where there is neither."""
    return completion.split("<answer>")[-1].split("</answer>")[0].strip()


def reference_answer(answer: object) -> str:
    """The part behind "####", without thousands separators and dollar signs, where there is one; else all of it."""
    text = str(answer)
    return text.split("####")[1].replace(",", "").replace("$", "").strip() if "####" in text else text.strip()


def exact_answer(prompts, completions, answer, **columns) -> list[float]:
    """1.0 where the extracted answer equals the column `answer`, character by character."""
    found = [extract_answer(text_of(completion)) for completion in completions]
    return [float(text == reference_answer(right)) for text, right in zip(found, answer, strict=True)]


def numeric_answer(prompts, completions, answer, **columns) -> list[float]:
    """1.0 where the last number of the extracted answer equals the column `answer`, as exact fractions.

    Both are read whole or not at all: `redit_fast.training.answers`.
    """
    for right in answer:
        numeric_answer.check_column(right)
    found = [answers.last_number(extract_answer(text_of(completion))) for completion in completions]
    return [float(answers.the_number(right).equals(number)) for number, right in zip(found, answer, strict=True)]


_BLOCKS = re.compile(r"<(think|reasoning)>.*?</\1>\s*<answer>.*?</answer>", re.DOTALL)


def xml_format(prompts, completions, **columns) -> list[float]:
    """1.0 for <think>...</think><answer>...</answer> (or <reasoning>) and nothing else; 0.5 with text around it."""
    texts = [text_of(completion).strip() for completion in completions]
    return [1.0 if _BLOCKS.fullmatch(text) else 0.5 if _BLOCKS.search(text) else 0.0 for text in texts]


# The GSM8K set of the ReDit scripts and of the GR paper: five functions, full scales 2, 0.5, 1, 1 and 0.5. The scripts'
# format patterns run with re.MULTILINE, whose $ also accepts text below the answer; here the whole completion must fit.


def gsm8k_correctness(prompts, completions, answer, **columns) -> list[float]:
    """2.0 where the extracted answer equals the column `answer` as text: the scripts' clean baseline, for both arms."""
    return [2.0 * value for value in exact_answer(prompts, completions, answer)]


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


def _check_text(answer: object) -> None:
    if isinstance(answer, bool) or not isinstance(answer, str | Real) or not reference_answer(answer):
        raise ValueError(f"the column 'answer' needs text or a number, got {answer!r:.80}")


def _check_number(answer: object) -> None:
    if answers.the_number(answer) is None:
        raise ValueError(
            "the column 'answer' needs one number, such as 72, -1,234.50, 3/4, 2 1/2, 50% or 1e5, also with a unit or "
            f"behind ####, got {answer!r:.80}"
        )


# What a value of the column `answer` must be; looked at for the whole data before a run starts.
exact_answer.check_column = gsm8k_correctness.check_column = _check_text
numeric_answer.check_column = _check_number

gsm8k_correctness.reward_scale = 2.0
gsm8k_int.reward_scale = 0.5
gsm8k_xmlcount.reward_scale = 0.5

SHIPPED = {
    fn.__name__: fn
    for fn in (
        exact_answer,
        numeric_answer,
        xml_format,
        gsm8k_correctness,
        gsm8k_int,
        gsm8k_strict_format,
        gsm8k_soft_format,
        gsm8k_xmlcount,
    )
}
