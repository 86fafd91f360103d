"""The one place that loads and runs reward functions that are not ours; what they raise becomes one sentence."""

from __future__ import annotations

import importlib
import site
import sys
import sysconfig
import traceback
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any

from redit_fast.foreign import text_of_error
from redit_fast.training.config_file import module_file


class RewardError(ValueError):
    """A reward function that cannot be loaded or called, or returned what is no reward; the message names it."""


_OURS = (str(Path(__file__).parents[2]), str(Path(importlib.__file__).parent), "<frozen ")
INSTALLED = (sysconfig.get_path("stdlib"), *site.getsitepackages(), site.getusersitepackages())


class UserCode:
    """The one place that runs code that is not ours: whatever it raises, but a Ctrl-C and a RewardError, becomes one
    sentence, with the deepest line of the user's own files where there is one."""

    def __init__(self, where: str):
        self.where = where

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind, error: BaseException | None, trace) -> None:
        if error is not None and not isinstance(error, KeyboardInterrupt | RewardError):
            raise RewardError(f"{self.where} raised {kind.__name__}: {text_of_error(error)}{_place(trace)}") from error


def _place(trace) -> str:
    """Of the user's own files, or of the installed package that the function is from: " (file:line: source)"."""
    frames = [frame for frame in traceback.extract_tb(trace) if not frame.filename.startswith(_OURS)]
    own = [frame for frame in frames if not frame.filename.startswith(INSTALLED)]
    return "".join(f" ({frame.filename}:{frame.lineno}: {frame.line})" for frame in (own[-1:] or frames[:1]))


def user_function(name: str) -> Callable:
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
        return Path(__file__).with_name("functions.py")
    folder, _, module = name.rpartition(":")[0].rpartition("/")
    module = module.removesuffix(".py")
    if file := module_file(Path(folder).resolve(), module):
        return file
    try:
        with UserCode(f"rewards: {name!r}: looking for {module}"):  # runs the packages that it is in
            loaded = sys.modules.get(module)
            found = find_spec(module) if loaded is None else loaded
            origin = getattr(found, "origin" if loaded is None else "__file__", None)
    except RewardError:
        return None
    return Path(origin) if origin and Path(origin).is_file() else None


def _module(folder: Path, module: str, name: str) -> ModuleType:
    file = module_file(folder, module)
    if file is None:
        try:
            with UserCode(f"rewards: {name!r}: importing {module}"):
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
    spec: Any = spec_from_file_location(key, file)
    sys.modules[key] = module_from_spec(spec)
    try:
        with UserCode(f"rewards: {name!r}: importing {file}"):
            spec.loader.exec_module(sys.modules[key])
    except RewardError:
        del sys.modules[key]
        raise
    return sys.modules[key]
