"""The keys and values of a configuration file, each with its place."""

from __future__ import annotations

import json
from pathlib import Path

import yaml

from redit_fast.checks import given


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


def placed_reward(reward: object, folder: Path) -> object:
    """`module:function`, or `FOLDER/module:function` when the module is in `folder` and not in the current one."""
    if not isinstance(reward, str) or ":" not in reward:
        return reward
    sub, _, module = reward.rpartition(":")[0].rpartition("/")
    here, there = module_file(Path(sub), module), module_file(folder / sub, module)
    return f"{(folder / sub).as_posix()}/{module}:{reward.rpartition(':')[2]}" if here is None and there else reward
