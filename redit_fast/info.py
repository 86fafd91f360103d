"""What `redit-fast info` prints: versions, devices, what each backend runs or the sentence why not, and what to type.

`found()` is what is there, for --json as it is; `text()` is the same in lines of at most 80 columns.
"""

from __future__ import annotations

import os
import platform
import re
import textwrap
from collections.abc import Iterable, Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

import redit_fast
from redit_fast import backends
from redit_fast.backends import cpu
from redit_fast.backends.cuda import module as cuda
from redit_fast.packing import varlen

WIDTH = 80
PACKAGES = ("torch", "triton", "transformers")
ATTENTION = (
    "flash-attn",
    "flash-attn-3",
    "flash-attn-4",
    "xformers",
    "kernels",
)  # beside torch's own; transformers takes them by name
OPTIONAL = ("trl", "verl", "openrlhf", "unsloth", "accelerate", "peft", "deepspeed", "liger-kernel", "vllm")
SETTINGS = ("REDIT_FAST_BACKEND", "REDIT_FAST_CUDA_INTERPRET", "TRITON_INTERPRET", "CUDA_VISIBLE_DEVICES")


def _versions(packages: Iterable[str]) -> dict[str, str | None]:
    found: dict[str, str | None] = {}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    return found


def _cuda_module() -> dict[str, Any]:
    if cuda.missing:
        return {"missing": cuda.missing}
    major, minor = divmod(cuda.compiled.toolkit // 10, 100)
    return {"toolkit": f"{major}.{minor}", "architectures": cuda.compiled.architectures.split()}


def _gpus() -> dict[str, dict[str, str]]:
    gpus = {}
    for index in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(index)
        gpus[f"cuda:{index}"] = {"name": torch.cuda.get_device_name(index), "architecture": f"sm_{major}{minor}"}
    return gpus


def _packed_rows(gpus: Iterable[str]) -> dict[str, dict[str, str]]:
    """The attention of packed rows, by device: what runs, or the sentence why not; on a GPU the first "ok" does."""
    found: dict[str, dict[str, str]] = {"cpu": {"SDPA a segment": "ok"}}
    for device in gpus:
        capability = torch.cuda.get_device_capability(int(device.rpartition(":")[2]))
        found[device] = {name: varlen.refusal(name, capability) or "ok" for name in varlen.NAMES}
    return found


def _triton_cache() -> str:
    """As Triton looks for it."""
    home = os.environ.get("TRITON_HOME") or Path.home()
    return os.environ.get("TRITON_CACHE_DIR") or str(Path(home, ".triton", "cache"))


def found() -> dict[str, Any]:
    gpus = _gpus()
    kinds = {tuple(gpu.values()): device for device, gpu in reversed(gpus.items())}  # of equal ones the first speaks
    states: dict[str, dict[str, dict[str, str]]] = {}
    for device in ("cpu", *sorted(kinds.values())):
        states[device] = {name: {} for name in backends.NAMES}
        for op, backend, state in backends.report(device):
            states[device][backend][op] = state
    sets = cpu.instruction_sets()
    return {
        "versions": {"redit-fast": redit_fast.__version__, "python": platform.python_version(), **_versions(PACKAGES)},
        "threads": torch.get_num_threads(),
        "instruction_sets": list(sets),
        "instruction_set": sets[-1] if sets else None,
        "gpus": gpus,
        "torch_cuda": torch.version.cuda,
        "cuda_module": _cuda_module(),
        "triton_cache": _triton_cache(),
        "attention": _versions(ATTENTION),
        "packed_rows": _packed_rows(sorted(kinds.values())),
        "optional": _versions(OPTIONAL),
        "settings": {name: os.environ[name] for name in SETTINGS if name in os.environ},
        "backends": states,
        "type": {state: commands(state) for _, state in _refusals(states) if commands(state)},
    }


def commands(sentence: str) -> list[str]:
    """What it says to type, between backquotes."""
    return re.findall(r"`([^`]+)`", sentence)


def _refusals(states: dict[str, dict[str, dict[str, str]]]) -> list[tuple[str, str]]:
    """(backend, sentence), each once."""
    each = ((name, state) for of in states.values() for name, ops in of.items() for state in ops.values())
    return list(dict.fromkeys((name, state) for name, state in each if state != "ok"))


def _wrapped(words: str, then: str = "  ") -> list[str]:
    return textwrap.wrap(words, WIDTH, subsequent_indent=then, break_on_hyphens=False)


def _there(packages: dict[str, str | None]) -> str:
    """Names and versions, then what is not installed."""
    missing = [name for name, number in packages.items() if number is None]
    words = [f"{name} {number}" for name, number in packages.items() if number is not None]
    return ", ".join(words + ([f"not installed: {', '.join(missing)}"] if missing else []))


def _head(info: dict[str, Any]) -> Iterator[str]:
    cuda_of_torch = f"of CUDA {info['torch_cuda']}" if info["torch_cuda"] else "without CUDA"
    yield _there(info["versions"])
    runs = f"runs {info['instruction_set']}, has {', '.join(info['instruction_sets'])}"
    yield f"C++ module: {runs if info['instruction_sets'] else 'none'}; {info['threads']} threads"
    for device, gpu in info["gpus"].items():
        yield f"{device}: {gpu['name']}, {gpu['architecture']}"
    if not info["gpus"]:
        yield f"GPU: none that torch, a build {cuda_of_torch}, can use"
    module = info["cuda_module"]
    yield "CUDA module: " + (
        "none" if "missing" in module else f"CUDA {module['toolkit']}, for {', '.join(module['architectures'])}"
    )
    yield f"Triton's cache: {info['triton_cache']}"
    yield f"attention: torch's own, {_there(info['attention'])}"
    for device, kernels in info["packed_rows"].items():
        runs = next((name for name, state in kernels.items() if state == "ok"), "none, rows are padded")
        others = "".join(f"; {name} {state}" for name, state in kernels.items() if state != "ok")
        yield f"packed rows on {device}: {runs}{others}"
    yield f"optional: {_there(info['optional'])}"
    for name, value in info["settings"].items():
        yield f"set: {name}={value}"


def text(info: dict[str, Any]) -> str:
    lines = [line for words in _head(info) for line in _wrapped(words)]
    refusals = _refusals(info["backends"])
    for device, states in info["backends"].items():
        lines += ["", _row(f"on {device}", states)]
        for op in backends.PRIMITIVES:
            answers = [(name, ops[op]) for name, ops in states.items()]
            lines.append(_row(op, ["ok" if x[1] == "ok" else f"[{refusals.index(x) + 1}]" for x in answers]))
    for number, (name, sentence) in enumerate(refusals, 1):
        lines += ["", *_wrapped(f"[{number}] {name}: {sentence}", then="    ")]
        for command in commands(sentence):
            parts = textwrap.wrap(command, WIDTH - 8, break_on_hyphens=False)
            lines += (" \\\n".join(["    $ " + parts[0], *("      " + part for part in parts[1:])])).splitlines()
    return "\n".join(lines)


def _row(first: str, cells: Iterable[str]) -> str:
    return (f"{first:18}" + "".join(f"{cell:11}" for cell in cells)).rstrip()
