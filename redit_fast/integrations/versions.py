"""Whether a host is one that an integration was written for: its version, and the methods that are overridden."""

from __future__ import annotations

import inspect
import re
import warnings
from functools import cache
from types import ModuleType


def check_version(integration: str, library: str, version: str, supported: str) -> None:
    """`supported` names one version, or the lowest and the highest; "5.23" stands for every 5.23.x.

    Raises:
        RuntimeError: an older library. A newer one warns, once a process: its methods may still fit.
    """
    found = f"redit_fast.integrations.{integration} got {library} {version}"
    parts, lowest, highest = _numbers(version)[0], _numbers(supported)[0], _numbers(supported)[-1]
    if parts[: len(lowest)] < lowest:
        raise RuntimeError(f"{found}, which is older than it supports; supported: {supported}")
    if parts[: len(highest)] > highest:
        _warn_once(f"{found}, which is newer than what it was tested with; supported: {supported}")


def _numbers(text: str) -> list[tuple[int, ...]]:
    return [tuple(map(int, digits.split("."))) for digits in re.findall(r"\d+(?:\.\d+)*", text)]


@cache
def _warn_once(message: str) -> None:
    warnings.warn(message, stacklevel=4)


def check_hooks(
    integration: str, library: ModuleType, hooks: dict[str, list[str]], owner: type | ModuleType, supported: str
) -> None:
    """`check_version`, and raises where a method that the integration overrides is not the one that it was written
    for."""
    for name, expected in hooks.items():
        method = getattr(owner, name, None)
        found = [] if method is None else list(inspect.signature(method).parameters)
        if found not in (expected, ["self", "args", "kwargs"]):  # the latter: Unsloth's, which pass everything on
            raise RuntimeError(
                f"redit_fast.integrations.{integration} got {library.__name__} {library.__version__}, whose "
                f"{owner.__name__}.{name} is not ({', '.join(expected)}); supported: {supported}"
            )
    check_version(integration, library.__name__, library.__version__, supported)
