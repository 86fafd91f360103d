"""LoRA by peft: float32 adapters of low rank in a model whose own weights stay as they are.

They are put into the model itself, which is then still what transformers made: `redit_fast` sees no wrapper. A
checkpoint has the adapters in peft's two files, and in base.json what they belong to: the model's name and, in short,
the content of its weights. Without the adapters the model is the one before RL, the reference of a KL term.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from redit_fast.foreign import Foreign
from redit_fast.gr import shards
from redit_fast.training import inputs
from redit_fast.training.config import TrainConfig

WEIGHTS, BASE = "adapter_model.safetensors", "base.json"
NAME = "default"  # of the adapter, in peft
WRAPPED = "base_model.model."  # before the names of weights in peft's files


class Base(NamedTuple):
    """What adapters belong to."""

    model: str  # a folder, absolute, or a name on the hub
    content: dict[str, str]  # {file: its content in short}


def base_of(model: str) -> Base:
    """Of a model that is loaded, so that one of the hub is in its cache."""
    folder = Path(model).expanduser()
    return Base(os.path.abspath(folder) if folder.is_dir() else model, inputs.weights_of(model))


def attach(model: PreTrainedModel, config: TrainConfig, base: Base) -> None:
    """Puts adapters that change nothing yet into the linear layers of the decoder layers, and freezes all else.

    Raises:
        ValueError: one of lora_targets names none of them, or peft refuses the model.
    """
    from peft import LoraConfig, inject_adapter_in_model

    adapter = LoraConfig(
        r=config.lora_rank,
        lora_alpha=config.lora_alpha or 2 * config.lora_rank,  # type: ignore[operator]
        target_modules=targets_of(model, config.lora_targets),
        base_model_name_or_path=base.model,
        task_type="CAUSAL_LM",
    )
    with torch.random.fork_rng(devices=[model.device] if model.device.type == "cuda" else []):
        torch.manual_seed(config.seed % 2**63)
        with Foreign(f"model {config.model} ({model.config.model_type}) takes no adapters", plain=ValueError):
            inject_adapter_in_model(adapter, model, NAME)
    for name, module in model.named_modules():
        if name.endswith((".lora_A", ".lora_B")):
            module.float()  # a step of 1e-5 is lost in bfloat16


def targets_of(model: PreTrainedModel, wanted: list[str] | None) -> list[str]:
    """The whole names of the linear layers of the decoder layers, all of them or those whose names end so."""
    lists = [part for part in model.get_decoder().modules() if isinstance(part, nn.ModuleList)]
    inside = {module for part in lists for module in part.modules() if isinstance(module, nn.Linear)}
    names = [name for name, module in model.named_modules() if module in inside]
    known = ", ".join(sorted({name.rpartition(".")[2] for name in names})) or "none"
    chosen = set()
    for target in wanted or [""]:
        found = [name for name in names if not target or f".{name}".endswith(f".{target}")]
        if not found:
            why = "adapters on the output head are not trained" if _is_head(model, target) else "no linear layer is so"
            raise ValueError(
                f"lora_targets: {target!r} fits nothing in model {model.name_or_path}: {why}; the linear layers of its "
                f"decoder layers are {known}"
            )
        chosen.update(found)
    if not chosen:
        raise ValueError(f"lora_rank: model {model.name_or_path} has no linear layers in its decoder layers")
    return sorted(chosen)


def _is_head(model: PreTrainedModel, target: str) -> bool:
    head = model.get_output_embeddings()
    return any(module is head and f".{name}".endswith(f".{target}") for name, module in model.named_modules())


@contextmanager
def switched_off(model: nn.Module) -> Iterator[None]:
    """Inside, a model is as it was without its adapters; one that has none stays as it is."""
    layers: list[Any] = []
    if hasattr(model, "peft_config"):
        from peft.tuners.tuners_utils import BaseTunerLayer

        layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)


def save(folder: Path, model: PreTrainedModel, weights: dict[str, Tensor] | None, base: Base) -> None:
    """Writes the adapters' files into a checkpoint.

    Args:
        weights: the adapters' under their names in the model, whole; None where the model has them itself.
    """
    own = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad} if weights is None else weights
    tensors = {_in_file(name): tensor.contiguous() for name, tensor in own.items()}
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    model.peft_config[NAME].save_pretrained(str(folder))
    (folder / BASE).write_text(json.dumps(base._asdict(), indent=1), "utf-8")


def _in_file(name: str) -> str:
    return WRAPPED + name.replace(f".{NAME}.", ".")


@torch.no_grad()
def load(folder: Path, model: PreTrainedModel, base: Base) -> None:
    """Puts a checkpoint's adapters into a model that has adapters, bit by bit.

    Raises:
        ValueError: the checkpoint has none, of this model or of these shapes.
    """
    check_base(folder, base)
    tensors = load_file(folder / WEIGHTS)
    own = {_in_file(name): p for name, p in model.named_parameters() if p.requires_grad}
    if tensors.keys() != own.keys() or any(tensors[name].shape != p.shape for name, p in own.items()):
        raise ValueError(f"{folder / WEIGHTS} does not fit the run's lora_rank and lora_targets")
    for name, p in own.items():
        shards.local(p).copy_(tensors[name])


def check_base(folder: Path, base: Base) -> None:
    """Raises a ValueError where a checkpoint's adapters are not those of `base`, by name and content."""
    found = read_base(folder)
    if found.model != base.model:
        raise ValueError(f"checkpoint {folder} holds adapters of model {found.model}, not of {base.model}")
    for file in sorted(found.content.keys() | base.content.keys()):
        if found.content.get(file) != base.content.get(file):
            raise ValueError(
                f"checkpoint {folder} holds adapters of model {base.model}, whose {file} has changed since: on other "
                "weights they are another model, put back what it was"
            )


def read_base(folder: Path) -> Base:
    if not (folder / WEIGHTS).is_file():
        raise ValueError(f"{folder} holds no adapters ({WEIGHTS}): there is nothing to merge")
    try:
        found = json.loads((folder / BASE).read_text("utf-8"))
        return Base(str(found["model"]), dict(found["content"]))
    except (OSError, ValueError, RecursionError, KeyError, TypeError):
        raise ValueError(f"{folder / BASE} is missing or malformed: needs the model of the adapters") from None
