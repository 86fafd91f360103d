"""A task in files, as a user has a model and data: the adapters of LoRA belong to a model in a folder."""

from __future__ import annotations

import json
from pathlib import Path

from redit_fast.training.task import Task

from .claims import Settings


def saved(task: Task, folder: Path) -> Settings:
    """Writes model, tokenizer and records, and returns what names them and the rewards in a config. Rewards must be
    functions of modules, under their own names."""
    model, tokenizer = task.build()
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    for name, records in (("train", task.dataset.train), ("held_out", task.dataset.held_out)):
        lines = "".join(json.dumps(record) + "\n" for record in records)
        (folder / f"{name}.jsonl").write_text(lines, "utf-8")
    return {
        "model": str(folder / "model"),
        "data": str(folder / "train.jsonl"),
        "eval_data": str(folder / "held_out.jsonl"),
        "rewards": [f"{function.fn.__module__}:{function.name}" for function in task.functions],
        "device": "cpu",
    }
