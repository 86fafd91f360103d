"""What a run was started with, by content: its data, reward modules and start model, kept in inputs.json.

The settings name these files; a run that goes on with the same settings on other files is another run.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from pathlib import Path

from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import HFValidationError

from redit_fast.training import builtin, rewards
from redit_fast.training.config import TrainConfig

Inputs = dict[str, dict[str, str]]  # {kind: {file: its content in short}}
END = 2**20  # bytes at either end of a weights file
# What transformers reads of a model's folder besides the weights.
DESCRIPTIONS = (
    "config.json", "generation_config.json", "*.safetensors.index.json", "tokenizer*", "special_tokens_map.json",
    "added_tokens.json", "vocab*", "merges.txt", "*.model", "*.jinja", "chat_template.json",
)  # fmt: skip


def of(config: TrainConfig) -> Inputs:
    """Of every file that the run reads; a model that is not at hand has none."""
    modules = {}
    for name in config.rewards:
        if file := rewards.source_of(name):  # else loading it will say so
            modules[name.rpartition(":")[0] or name] = _digest(file, f"reward module {file}")
    if config.model is None:  # builtin.py makes the demo's model and data
        demo = _digest(Path(builtin.__file__), "the demo")
        return {"reward module": modules, "the demo": {builtin.__name__: demo}}
    data = {config.data: _digest(Path(config.data), f"data {config.data}")}
    return {"reward module": modules, "data": data, "model": _model(config.model)}


def checked(now: Inputs, run: Path, *, accept_changed: bool) -> Inputs:
    """What `run` is to go on with: `now`, which is what it began with, unless a change is accepted.

    Warns where that is not known: a run of version 0.1, a start model that is not at hand.

    Raises:
        ValueError: one that has changed, by name.
    """
    try:
        before = json.loads((run / "inputs.json").read_text("utf-8"))
    except FileNotFoundError:
        warnings.warn(f"{run} has no inputs.json: its data, rewards and model are taken as unchanged", stacklevel=2)
        return now
    except ValueError as error:
        raise ValueError(f"{run / 'inputs.json'}: malformed: {error}") from None
    if before.get("model") and not now["model"]:
        warnings.warn(
            f"the start model of {run} is not at hand, so whether it has changed is not known; the run goes on from "
            "its checkpoint, which has all of it",
            stacklevel=2,
        )
        now = now | {"model": before["model"]}
    for kind, files in () if accept_changed else before.items():
        for name in sorted(files.keys() | now[kind].keys()):
            if files.get(name) != now[kind].get(name):
                what = "is new" if name not in files else "is gone" if name not in now[kind] else "has changed"
                raise ValueError(
                    f"{kind} {name} {what} since {run} began: put back what it was, or go on with "
                    "--accept-changed-inputs"
                )
    return now


def _model(name: str) -> dict[str, str]:
    folder = Path(name).expanduser() if name.startswith("~/") else Path(name)
    if folder.is_dir():
        weights = {str(file): _weights(file) for file in folder.glob("*.safetensors") if file.is_file()}
        files = {file for pattern in DESCRIPTIONS for file in folder.glob(pattern) if file.is_file()}
        return weights | {str(file): _digest(file, f"model {file}") for file in files}
    try:
        cached = try_to_load_from_cache(name, "config.json")
    except HFValidationError:  # the path of a folder that is gone
        return {}
    return {name: f"commit {Path(cached).parent.name}"} if isinstance(cached, str) else {}


def _weights(file: Path) -> str:
    """By its size, its safetensors header and its ends: to read 15 GB takes a minute."""
    size = file.stat().st_size
    with file.open("rb") as read:
        header = read.read(min(size, int.from_bytes(read.read(8), "little")))
        read.seek(0)
        first = read.read(END)
        read.seek(max(0, size - END))
        digest = hashlib.sha256(header + first + read.read(END))
    return f"{size} bytes, sha256 of header and ends {digest.hexdigest()}"


def _digest(file: Path, what: str) -> str:
    try:
        with file.open("rb") as read:
            return f"sha256 {hashlib.file_digest(read, 'sha256').hexdigest()}"
    except OSError as error:
        raise ValueError(f"{what}: {error.strerror}") from None
