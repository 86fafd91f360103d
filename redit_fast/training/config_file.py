"""Configuration files: their keys and values, each with its place, and the settings that they make.

Every problem is a ValueError of one sentence that names the field, its place in the file, and for an unknown key the
closest valid one.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TypeVar

import yaml
from pydantic import ValidationError

from redit_fast.checks import given
from redit_fast.known_names import RENAMED, hint, under_new_names
from redit_fast.training import config_errors
from redit_fast.training.config import TrainConfig
from redit_fast.training.config_values import is_url, loaded_reward
from redit_fast.training.reward_model.config import RewardModelConfig
from redit_fast.training.settings import Settings

Kind = TypeVar("Kind", bound=Settings)


def load(path: str | Path | None = None, overrides: Mapping[str, object] | None = None) -> TrainConfig:
    """The config in the YAML or JSON file `path` (None: all defaults), with `overrides` in place of its values.

    Relative paths of the file and reward modules are looked up in the current folder, then in the file's.
    Warns of names that have changed (`known_names.RENAMED`), but in a run's own config.json, of version 0.1 too.

    Raises:
        ValueError: one sentence that names the field and, where the problem is in the file, file and line.
    """
    return load_as(TrainConfig, path, overrides)


def load_as(kind: type[Kind], path: str | Path | None = None, overrides: Mapping[str, object] | None = None) -> Kind:
    """The same for the settings of another command."""
    return _checked(kind, *_gathered(kind, path, overrides or {}))


def of_run(run: Path) -> TrainConfig | RewardModelConfig:
    """The settings in a run's config.json, whichever command made it."""
    file = run / "config.json"
    return load_as(_kind_of(read(file)[0]), file)


def _kind_of(values: Mapping[str, object]) -> type[TrainConfig] | type[RewardModelConfig]:
    return RewardModelConfig if "pairs_per_step" in values else TrainConfig


def printed(path: str | Path | None = None, overrides: Mapping[str, object] | None = None) -> str:
    """`load(path, overrides).to_yaml()`, also where the data or rewards of a model of one's own are still missing.

    Raises:
        ValueError: as `load`, of what is there.
    """
    values, where, notes = _gathered(TrainConfig, path, overrides or {})
    sized = values.get("reward_weights") or values.get("reward_scales")
    stand_ins = {"data": "-", "rewards": ["-"] * (len(sized) if sized and isinstance(sized, list) else 1)}
    unset = [name for name in stand_ins if values.get("model") is not None and values.get(name) is None]
    return _checked(TrainConfig, values | {name: stand_ins[name] for name in unset}, where, notes).to_yaml(unset)


def _gathered(
    kind: type[Settings], path: str | Path | None, overrides: Mapping[str, object]
) -> tuple[dict, Callable, list[str]]:
    """The file's values with the overrides in their place, where each is in the file, and what to say of old names."""
    values, places = ({}, {}) if path is None else read(Path(path))
    if path is not None and Path(path).name == "config.json" and Path(path).with_name("metrics.jsonl").is_file():
        if (made := _kind_of(values)) is not kind:
            raise ValueError(f"{Path(path).parent} holds a run of `redit-fast {made.COMMAND}`")
        values, places = under_new_names(values), under_new_names(places)  # a run's own
    said = [*_old_names(values, places), *_old_names(overrides, {})]
    values, overrides = ({RENAMED.get(name, name): v for name, v in given.items()} for given in (values, overrides))
    places |= {RENAMED[name]: place for name, place in places.items() if name in RENAMED}

    def where(field: str) -> str:
        return "" if field in overrides else places.get(field, "")

    for key in [*values, *overrides]:
        if key not in kind.model_fields:
            raise ValueError(f"{where(key)}unknown key {key!r}{hint(key, kind.model_fields, repr)}")
    folder = Path() if path is None else Path(path).parent
    for field in ("model", "data", "eval_data", "judge_template"):
        if isinstance(values.get(field), str):
            values[field] = placed(values[field], folder)
    values.update(overrides)
    if isinstance(values.get("rewards"), list):
        values["rewards"] = [placed_reward(reward, folder) for reward in values["rewards"]]
    return values, where, said


def _old_names(settings: Mapping[str, object], places: Mapping[str, str]) -> Iterator[str]:
    for old in [name for name in settings if name in RENAMED]:
        place, new = places.get(old, ""), RENAMED[old]
        if new in settings:
            raise ValueError(f"{place}{old} is another name of {new}, which is set too: needs one of them")
        yield f"{place}{old} is called {new} now"


def _checked(kind: type[Kind], values: dict, where: Callable[[str], str], said: list[str]) -> Kind:
    try:
        config = kind.model_validate(values)
        for sentence in said:
            warnings.warn(sentence, stacklevel=4)
        return config
    except ValidationError as error:
        field, sentence = config_errors.first(error)
    raise ValueError(where(field) + sentence)


def read(path: Path) -> tuple[dict, dict]:
    """The top-level mapping of a YAML or JSON file, and the place of each key. Tags build no objects.

    Raises:
        ValueError: one sentence with the file and, where there is one, line and column.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
        # JSON goes to its own reader: YAML reads an escaped surrogate pair as two characters.
        pairs = _json_pairs(text) if path.suffix == ".json" else _yaml_pairs(text)
    except OSError as error:
        raise ValueError(f"config {path}: {error.strerror}") from None
    except yaml.MarkedYAMLError as error:
        mark = given(error.problem_mark)
        problem = ", ".join(filter(None, (error.context, error.problem)))
        raise ValueError(f"{path}:{mark.line + 1}:{mark.column + 1}: {problem}") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}:{error.lineno}:{error.colno}: {error.msg}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # not UTF-8, control characters
        raise ValueError(f"config {path}: {' '.join(str(error).split())}") from None
    if pairs is None:
        raise ValueError(f"config {path}: needs keys and values at its top level")
    values, places = {}, {}
    for key, value, line in pairs:
        place = f"{path}: " if line is None else f"{path}:{line}: "
        if not isinstance(key, str):
            raise ValueError(f"{place}key {key!r} is not text")
        if key in values:
            raise ValueError(f"{place}key {key!r} is there twice")
        values[key], places[key] = value, place
    return values, places


def _yaml_pairs(text: str) -> list[tuple] | None:
    loader = yaml.SafeLoader(text)
    node = loader.get_single_node()
    if node is None:
        return []
    if not isinstance(node, yaml.MappingNode):
        return None
    return [(_value(loader, key), _value(loader, value), key.start_mark.line + 1) for key, value in node.value]


def _value(loader: yaml.SafeLoader, node: yaml.Node) -> object:
    try:
        return loader.construct_document(node)
    except (AttributeError, LookupError, TypeError, ValueError) as error:  # !!timestamp x, !!bool x, 2026-13-45
        problem = str(error) if isinstance(error, ValueError) else "the value is not what its tag says"
        raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark) from None


def _json_pairs(text: str) -> list[tuple] | None:
    loaded = json.loads(text, object_pairs_hook=distinct)
    return [(key, value, None) for key, value in loaded.items()] if isinstance(loaded, dict) else None


def distinct(pairs: list[tuple[str, object]]) -> dict:
    """A JSON object, of which json.loads would silently keep the last of two equal keys; its `object_pairs_hook`."""
    found = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"key {key!r} is there twice")
        found[key] = value
    return found


def module_file(folder: Path, module: str) -> Path | None:
    """The file of `package.module` below `folder`, or None."""
    if not all(module.split(".")):
        return None
    base = folder.joinpath(*module.split("."))
    return next((file for file in (base.with_name(base.name + ".py"), base / "__init__.py") if file.is_file()), None)


def placed(value: str, folder: Path) -> str:
    """`value`, or its path below `folder` when it exists there and not in the current folder."""
    return str(folder / value) if not Path(value).exists() and (folder / value).exists() else value


def is_function_name(place: str) -> bool:
    """Whether what is behind `model:` or `judge:` may be meant as one, for there is no such folder."""
    return place.isidentifier() and not Path(place).exists()


def clash(reward: str, module: Path) -> str:
    """Of `model:function`, which names the reward model in a folder `function`, where there is a module `model`."""
    kind, _, name = reward.partition(":")
    folder = os.path.relpath(module.parents[module.name == "__init__.py"])
    return (
        f"rewards: {reward!r} is a {kind} in the folder {name!r}, which is not there: for a function of {module} write "
        f"{f'{folder}/{reward}'!r}"
    )


def placed_reward(reward: object, folder: Path) -> object:
    """`module:function`, or `FOLDER/module:function` when the module is in `folder` and not in the current one; the
    path of `model:PATH` and `judge:PATH` as `placed`."""
    if not isinstance(reward, str) or ":" not in reward:
        return reward
    if loaded := loaded_reward(reward):
        kind, place = loaded
        place = place if is_url(place) else placed(place, folder)
        if (own := module_file(folder, kind)) and is_function_name(place):
            raise ValueError(clash(reward, own))
        return f"{kind}:{place}"
    sub, _, module = reward.rpartition(":")[0].rpartition("/")
    here, there = module_file(Path(sub), module), module_file(folder / sub, module)
    return f"{(folder / sub).as_posix()}/{module}:{reward.rpartition(':')[2]}" if here is None and there else reward
