"""`redit-fast merge`: the adapters of a checkpoint and the model that they belong to as one plain model."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any

import torch

from redit_fast import extras
from redit_fast.foreign import Foreign
from redit_fast.training import checkpoint, lora, policy
from redit_fast.training.new_folder import new_folder


def merge(folder: Path, out: Path | None = None) -> Path:
    """Writes a plain model, the base with the adapters of a checkpoint in its weights, in the base's dtype.

    Args:
        out: a new folder; the checkpoint's with -merged at its end by default.

    Raises:
        ValueError: no whole checkpoint with adapters, another base than theirs, or a folder that is there already.
        OSError: the folder cannot be written; nothing is left.
        MissingExtra: peft is not installed.
    """
    extras.need("lora", "redit-fast merge")
    from peft import PeftModel
    from transformers import AutoConfig, AutoTokenizer

    if not folder.is_dir():
        raise ValueError(f"checkpoint {folder}: no such folder")
    out = out or folder.with_name(f"{folder.name}-merged")
    if os.path.lexists(out):
        raise ValueError(f"{out} is there already and stays as it is")
    checkpoint.check(folder)
    name = lora.read_base(folder).model
    model, _ = policy.load(name, "cpu", "float32")
    lora.check_base(folder, lora.base_of(name))
    kept = AutoConfig.from_pretrained(str(policy.folder_of(name)), local_files_only=True).dtype or torch.float32
    with Foreign(f"checkpoint {folder} cannot be merged"), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of transformers 5.24, about what peft 0.21 asks it
        merged: Any = PeftModel.from_pretrained(model, str(folder)).merge_and_unload()
    tokenizer = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False, local_files_only=True)
    with new_folder(out, "OUT") as draft:
        merged.to(kept).save_pretrained(draft)
        tokenizer.save_pretrained(draft)
    return out
