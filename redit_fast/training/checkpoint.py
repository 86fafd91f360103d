"""Checkpoints: safetensors and JSON in a folder that `from_pretrained` loads, written whole or not at all.

checkpoints/step-000024/ holds the model (with LoRA its adapters, `lora`), the tokenizer, the optimizer
(`optimizer_files`), state.json and manifest.json with the SHA-256 of every other file, and after a Reference Reset
reference.safetensors, the KL term's reference. It is written under another name, flushed to disk and renamed, so a
crash leaves older ones alone. The trainer writes a step's metrics between the two: a checkpoint that exists has all the
lines that lead to it. Only step-000000 comes before its line, so that a first evaluation that fails does not cost the
warm start.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import warnings
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from redit_fast.training import lora, optimizer_files, runs
from redit_fast.training.distributed import Ranks

MANIFEST = "manifest.json"
REFERENCE = "reference.safetensors"


def write(
    folder: Path,
    step: int,
    model: PreTrainedModel,
    tokenizer: Tokenizer,
    optimizer: torch.optim.Optimizer,
    reference: PreTrainedModel | None = None,
    *,
    position: int,
    base: lora.Base | None = None,
    ranks: Ranks | None = None,
) -> Path:
    """A draft of `folder`/step-NNNNNN on disk, which `publish` makes a checkpoint.

    Args:
        position: how many prompts of the data the steps have drawn.
        base: of adapters, which are then in the place of the model.

    Raises:
        OSError: the disk is full or the folder is not writable; older checkpoints are untouched.
    """
    ranks = ranks or Ranks()
    target, draft = folder / f"step-{step:06d}", folder / f".draft-{step:06d}"
    ranks.by_first(lambda: _made_anew(draft))
    state = optimizer.state_dict()
    tensors = {f"{i}.{name}": tensor for i, values in state.pop("state").items() for name, tensor in values.items()}
    weights = ranks.state_of(model, trained=base is not None)
    kept = None if reference is None else ranks.state_of(reference)

    def own_files() -> optimizer_files.Pieces:
        try:
            with runs.naming(target):
                pieces = optimizer_files.write(draft, tensors, ranks)
                if ranks.first:
                    if base is None:
                        model.save_pretrained(draft, state_dict=weights)
                    else:
                        lora.save(draft, model, weights, base)
                    if reference is not None:
                        named = dict(reference.named_parameters())
                        save_file({name: kept[name] for name in named} if kept else named, draft / REFERENCE)
        except SafetensorError as error:
            raise OSError(f"checkpoint {target} could not be written: {error}") from None
        return pieces

    def others() -> None:
        with runs.naming(target):
            optimizer_files.write_index(draft, of_ranks)
            tokenizer.save_pretrained(draft)
            _write_json(draft / "state.json", {"step": step, "position": position, "optimizer": state})
            _write_json(draft / MANIFEST, {path.name: _digest(path) for path in sorted(draft.iterdir())})
            for path in [*draft.iterdir(), draft]:
                _flush(path)

    with ExitStack() as undo:  # a full disk is not left fuller
        undo.callback(shutil.rmtree, draft, ignore_errors=True)
        of_ranks = ranks.gathered(own_files)
        ranks.by_first(others)
        undo.pop_all()
    return draft


def _made_anew(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)


def publish(draft: Path) -> Path:
    """Gives a draft its checkpoint's name; a complete one of that name stays, since equal steps are equal."""
    target = draft.with_name(draft.name.replace(".draft", "step"))
    if target.exists() and damage(target) is None:
        shutil.rmtree(draft)
        return target
    shutil.rmtree(target, ignore_errors=True)
    os.replace(draft, target)
    _flush(draft.parent)
    return target


def prune(published: Path, keep: int, accuracy: Mapping[int, float]) -> None:
    """Removes the checkpoints before one that is published, all but the `keep` newest, which it counts among, the
    start, which is the KL term's reference, and the best by `accuracy`, {step: held-out accuracy}; of equals the first.
    """
    steps = {path: _number(path) for path in in_order(published.parent) if _number(path) <= _number(published)}
    measured = [path for path, step in steps.items() if step in accuracy]
    best = max(measured, key=lambda path: accuracy[steps[path]], default=None)
    for path in list(steps)[:-keep]:
        if steps[path] == 0 or path == best:
            continue
        draft = path.with_name(path.name.replace("step", ".draft"))  # so that a kill leaves no half of a checkpoint
        shutil.rmtree(draft, ignore_errors=True)
        os.replace(path, draft)
        shutil.rmtree(draft, ignore_errors=True)  # on NFS a file that somebody reads stays: remove_drafts is next


def in_order(folder: Path) -> list[Path]:
    """The checkpoints of a run, complete or not, by their steps: as text, step-1000000 is before step-999999."""
    return sorted((path for path in folder.glob("step-*") if _is_named(path)), key=_number)


def _is_named(path: Path) -> bool:
    """As a checkpoint, which step-000024-merged beside it is not."""
    return path.name.startswith("step-") and path.name[5:].isdecimal()


def _number(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def remove_drafts(folder: Path) -> None:
    """What a full disk or a kill left of checkpoints that were being written."""
    for draft in folder.glob(".draft-*"):
        shutil.rmtree(draft)


def newest(folder: Path) -> Path:
    """The newest checkpoint whose files are all there and unchanged; damaged newer ones are named in a warning.

    Raises:
        ValueError: there is none.
    """
    for path in reversed(in_order(folder)):
        found = damage(path)
        if found is None:
            return path
        warnings.warn(f"checkpoint {path} is damaged ({found}); trying the one before", stacklevel=2)
    raise ValueError(f"{folder} holds no complete checkpoint to resume from")


def step_of(path: Path) -> int:
    return json.loads((path / "state.json").read_text("utf-8"))["step"]


def position_of(path: Path, prompts_per_step: int) -> int:
    """How many prompts the steps have drawn; older checkpoints do not tell, since every step drew as many."""
    state = json.loads((path / "state.json").read_text("utf-8"))
    return state.get("position", state["step"] * prompts_per_step)


def load_optimizer(path: Path, optimizer: torch.optim.Optimizer) -> None:
    """Puts the checkpoint's optimizer state into `optimizer`, bit by bit, on however many ranks it was written."""
    state = json.loads((path / "state.json").read_text("utf-8"))["optimizer"]
    params = [p for group in optimizer.param_groups for p in group["params"]]
    state["state"] = {}
    for i, name, tensor in optimizer_files.read(path, params):
        state["state"].setdefault(i, {})[name] = tensor
    optimizer.load_state_dict(state)


@torch.no_grad()
def load_reference(path: Path, reference: PreTrainedModel) -> bool:
    """Puts the checkpoint's reference into `reference`, bit by bit; false where it has none, before the first reset."""
    if not (path / REFERENCE).is_file():
        return False
    tensors = load_file(path / REFERENCE)
    for name, parameter in reference.named_parameters():
        parameter.copy_(tensors[name])
    return True


def start_of(path: Path) -> Path:
    """The checkpoint before RL of the run that `path` is a checkpoint of.

    Raises:
        ValueError: it is not whole.
    """
    start = path.with_name("step-000000")
    if found := damage(start):
        raise ValueError(f"checkpoint {start}, the reference of the KL term, is damaged ({found})")
    return start


def run_config(path: Path) -> Path | None:
    """config.json of the run that a folder is a checkpoint of, or the model that was merged from one; None: of none."""
    file = path.parent.parent / "config.json"
    return file if path.parent.name == "checkpoints" and file.is_file() else None


def check(path: Path) -> None:
    """Raises a ValueError where a run's checkpoint, or a copy of one, is not as it was written. Other folders pass."""
    own = (path / "state.json").is_file() or (path / lora.BASE).is_file()
    if (own or (_is_named(path) and run_config(path))) and (found := damage(path)):
        raise ValueError(f"checkpoint {path} is damaged ({found})")


def damage(path: Path) -> str | None:
    """What is not as it was written; None: nothing."""
    try:
        manifest = json.loads((path / MANIFEST).read_text("utf-8"))
    except (OSError, ValueError, RecursionError):
        manifest = None
    if not isinstance(manifest, dict):
        return f"{MANIFEST} is missing or unreadable"
    for name, digest in manifest.items():
        if not (path / name).is_file():
            return f"{name} is missing"
        if _digest(path / name) != digest:
            return f"{name} has changed"
    return None


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _write_json(path: Path, value: object) -> None:
    with runs.naming(path):
        path.write_text(json.dumps(value, indent=1), "utf-8")


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
