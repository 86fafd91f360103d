"""The machine card: what the numbers were measured on."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from redit_fast import __version__

from .clock import CACHES, clock
from .place import Place

PEERS = ("triton", "transformers", "trl", "verl", "liger-kernel", "cut-cross-entropy", "quack-kernels", "unsloth")
GPU = ("name", "driver_version", "clocks.sm", "clocks.mem", "clocks.max.sm", "memory.total")


def card(place: Place) -> dict[str, Any]:
    return {
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "caches": _caches(),
        "threads": torch.get_num_threads(),
        "gpu": _gpu() if place.device.type == "cuda" else None,
        "clock": clock.timer.__name__,
        "python": platform.python_version(),
        "redit-fast": __version__,
        "torch": torch.__version__,
        "peers": {name: found for name in PEERS if (found := _version(name))},
        "commit": _commit(),
    }


def _cpu() -> str:
    try:
        names = re.findall(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    except OSError:
        names = []
    return names[0] if names else platform.processor() or platform.machine()


def _caches() -> dict[str, str]:
    """Name -> size, as Linux has them: L1 Data, L2 Unified."""
    found = {}
    for index in sorted(CACHES.glob("index*")):
        level, kind, size = ((index / name).read_text().strip() for name in ("level", "type", "size"))
        found[f"L{level} {kind}"] = size
    return found


def _gpu() -> dict[str, str]:
    if not shutil.which("nvidia-smi"):
        return {"name": torch.cuda.get_device_name()}
    query = ["nvidia-smi", f"--query-gpu={','.join(GPU)}", "--format=csv,noheader"]
    lines = subprocess.run(query, capture_output=True, text=True).stdout.splitlines()
    return dict(zip(GPU, lines[0].split(", "), strict=False)) if lines else {"name": torch.cuda.get_device_name()}


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _commit() -> str | None:
    """Of the checkout that this package runs from; None in an installation."""
    file = Path(__file__).resolve()
    folder = file.parent
    try:
        git = ["git", "-C", str(folder), "describe", "--always", "--dirty", "--abbrev=40"]
        inside = subprocess.run(["git", "-C", str(folder), "ls-files", "--error-unmatch", str(file)],
                                capture_output=True, text=True)  # fmt: skip
        done = subprocess.run(git, capture_output=True, text=True)
    except OSError:  # no git
        return None
    return done.stdout.strip() or None if inside.returncode == 0 else None
