"""The choices of settings, whether a value was meant as its field takes it, and its words on a command line."""

from __future__ import annotations

import itertools
import os
import re
from decimal import Decimal
from pathlib import Path
from types import NoneType
from typing import Annotated, Any, Literal, get_args, get_origin

from pydantic import Field

from redit_fast.gr.config import GR
from redit_fast.known_names import flag

DType = Literal["auto", "float32", "bfloat16", "float16"]
Device = Literal["auto", "cpu", "cuda"]
Strategy = Literal["ddp", "fsdp2"]
Packing = Literal["auto", "on", "off"]
Overlong = Literal["keep", "mask"]
DataFormat = Literal["gsm8k", "math"]
Tracker = Literal["tensorboard", "wandb", "trackio"]
LOCAL, PAGED = "local", "paged"  # rollouts in the process that trains; any other is a server's URL
JUDGE_KEY = "REDIT_FAST_JUDGE_API_KEY"  # of a judge's server, beside rollout.connection's own
LOADED = ("model", "judge")  # rewards that load or ask a model: a prefix, then its path or a judge's URL
LearningRateSchedule = Literal["constant", "constant_with_warmup", "linear", "cosine", "inverse_sqrt"]


def check_as_meant(value: object, kinds: set[object]) -> None:
    """Raises a ValueError for what pydantic would read as something else, in `value` or its items."""
    # pydantic reads 8.0, b"8" and "1_0" as integers, 1 and "t" as true, true as 1; YAML reads `no` as false.
    for item in value if isinstance(value, list | tuple) else [value]:
        if bool in kinds:
            if not isinstance(item, bool) and not (item is None and NoneType in kinds):
                raise ValueError("needs true or false")
        elif isinstance(item, bool):
            raise ValueError("needs a number or quoted text, not a truth value")
        elif isinstance(item, bytes):
            raise ValueError("needs a number or text, not bytes")
        elif int in kinds and not (
            re.fullmatch("[+-]?[0-9]+", item) if isinstance(item, str) else isinstance(item, int | NoneType)
        ):
            raise ValueError("needs an integer")
        elif float in kinds and not (
            "_" not in item if isinstance(item, str) else isinstance(item, int | float | NoneType)
        ):
            raise ValueError("needs a number")
        elif isinstance(item, str) and "\0" in item:
            raise ValueError("needs text without null characters")


def kinds_of(annotation: object) -> set[object]:
    """The types that a field's values have, or its items'."""
    if get_origin(annotation) is Annotated:
        return kinds_of(get_args(annotation)[0])
    return {kind for part in get_args(annotation) for kind in kinds_of(part)} or {annotation}


def of_gr(name: str, more: str = "", **limits: Any) -> Any:
    """A field with the default and the help text of a field of `GR`."""
    source = GR.__dataclass_fields__[name]
    default: Any = source.default
    return Field(default, description=source.metadata["help"] + more, **limits)


def flag_words(name: str, value: object) -> list[str]:
    """A field and its value as words of the command line, where a word that begins with a dash would be a flag."""
    values = value if isinstance(value, list) else ["none" if value is None else value]
    items = [f"{Decimal(repr(item)):f}" if isinstance(item, float) and item < 0 else str(item) for item in values]
    if len(items) == 1 and items[0].startswith("-"):
        return [f"{flag(name)}={items[0]}"]
    return [flag(name), *items]


def is_component(name: str) -> bool:
    shown = name.isprintable() and name == name.strip()  # also no bytes that are not UTF-8
    return shown and name not in ("", ".", "..") and not set(name) & set("/\\") and len(name.encode()) <= 200


def loaded_reward(reward: str) -> tuple[str, str] | None:
    """The prefix of `model:PATH` or `judge:PATH_OR_URL` and what is behind it; None of any other reward."""
    kind, colon, place = reward.partition(":")
    return (kind, place) if colon and kind in LOADED else None


def is_url(place: str) -> bool:
    return "://" in place or place.startswith(("http:", "https:"))


def name_after(model: str) -> str:
    """The last part of a model's path, with the run's name in front of a checkpoint's."""
    folder = Path(os.path.abspath(model))  # `..` and `.` have a name too
    run = folder.parent.parent.name if folder.parent.name == "checkpoints" else ""
    return "-".join(filter(None, (run, folder.name)))


def free_name(model: str | None, out_dir: str) -> str:
    """The first of demo, demo-2, ..., or of the same after the model, that nothing in `out_dir` has."""
    stem = "demo" if model is None else name_after(model) or "run"
    names = (stem if n == 1 else f"{stem}-{n}" for n in itertools.count(1))
    return next(name for name in names if not os.path.lexists(Path(out_dir, name)))
