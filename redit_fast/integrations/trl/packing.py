"""TRL's passes over packed rows: its fused head is handed padded hidden states as ever, of a decoder that has computed
each token once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast

from redit_fast.foreign import Foreign
from redit_fast.integrations.swapped_forward import SwappedForward
from redit_fast.ops.targets import IGNORE
from redit_fast.packing import plan
from redit_fast.packing.attention import UnpackableError, attending, refusal
from redit_fast.packing.plan import Budget
from redit_fast.packing.rows import difference, ranges, scored_hidden

ROWS = {"input_ids", "attention_mask", "use_cache"}  # what TRL hands to the decoder for text


class PackedForward(SwappedForward):
    """The calls of one model's fused head, with its decoder over packed rows; its other calls are as they were."""

    def call(self, model: Any, before: Callable, args: tuple, kwargs: dict) -> Any:
        if not kwargs.get("fused_lm_head"):
            return before(*args, **kwargs)
        with _PackedDecoder(model, kwargs["labels"] != IGNORE):
            return before(*args, **kwargs)


class _PackedDecoder(SwappedForward):
    """The decoder of one call: padded rows in; padded hidden states out, 0 where they predict nothing that is scored.
    A row without scored tokens is not computed, unless there is no other."""

    def __init__(self, model: PreTrainedModel, scored: Tensor):
        self._of, self._scored = model, scored
        super().__init__(model.base_model)

    def call(self, model: Any, before: Callable, args: tuple, kwargs: dict) -> Any:
        if others := kwargs.keys() - ROWS:
            raise UnpackableError(f"packing=True is for rows of text, these come with {', '.join(sorted(others))}")
        ids, mask = kwargs["input_ids"], kwargs["attention_mask"]
        sequences, prompts, lengths, starts = [], [], [], []
        for row, (tokens, seen, scored) in enumerate(torch.stack([ids, mask, self._scored], 1).cpu()):
            count, length = int(seen.sum()), int(scored.sum())
            end = int(seen.argmax()) + count
            if not length:
                continue
            if count == length or not (seen[end - count : end].all() and scored[end - length : end].all()):
                raise UnpackableError("packing=True is for prompts padded on the left, completions on the right")
            sequences.append(tokens[end - count : end])
            prompts.append(tokens[end - count : end - length].tolist())
            lengths.append(length)
            starts.append(row * ids.shape[1] + end - length - 1)
        if not lengths:  # a rank whose parameters take part in the others' reduction
            return before(*args, **kwargs)
        ((micro,),) = plan.packed(prompts, lengths, Budget())
        with attending(self._of):
            hidden = scored_hidden(before, sequences, lengths, micro, ids.device)
        padded = hidden.new_zeros(ids.numel(), hidden.shape[1])
        padded = padded.index_copy(0, ranges(starts, lengths).to(hidden.device), hidden)
        return BaseModelOutputWithPast(last_hidden_state=padded.view(*ids.shape, -1))


def check(trainer: Any, model: PreTrainedModel) -> None:
    """`model` is the trainer's policy, without PEFT's wrapper. Nothing is left changed.

    Raises:
        ValueError: one sentence that says why the policy's rows cannot be packed.
    """
    what = f"packing=True does not work with model {model.name_or_path} ({model.config.model_type})"
    why = _refusal(trainer, model)
    if why is None:
        with Foreign(what, plain=UnpackableError):
            why = _difference(trainer, model)
    if why is not None:
        raise ValueError(f"{what}: {why}")


def _refusal(trainer: Any, model: PreTrainedModel) -> str | None:
    """By what the trainer and the model are."""
    adapters = getattr(trainer.model, "peft_config", {})
    if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
        return f"{'FSDP' if trainer.is_fsdp_enabled else 'DeepSpeed'} shards it, use DDP or one device"
    if len(set(getattr(model, "hf_device_map", {}).values())) > 1:
        return "it is on several devices"
    if trainer.args.torch_compile:
        return "torch_compile=True compiles its padded rows"
    if model.config.get_text_config() is not model.config:
        return "it reads more than text"
    if any(getattr(adapter, "is_prompt_learning", False) for adapter in adapters.values()):
        return "its adapter puts tokens of its own before each row"
    if getattr(trainer, "aux_loss_enabled", False) or getattr(model.config, "output_router_logits", False):
        return "the loss of its router counts the tokens of every row: set router_aux_loss_coef to 0"
    return refusal(model)


def _difference(trainer: Any, model: PreTrainedModel) -> str | None:
    """By the log-probs of a few rows in training mode, of two prompts that begin alike."""
    generator, vocabulary = torch.Generator(device="cpu").manual_seed(0), len(model.get_input_embeddings().weight)

    def draw(count: int) -> Tensor:
        return torch.randint(vocabulary, (count,), generator=generator, device="cpu")

    long = draw(12)
    short = torch.cat([long[:5], draw(3)])
    ids, mask = torch.zeros(2, 4, 18, dtype=torch.int64, device="cpu")
    for row, prompt, count in ((0, long, 6), (1, long, 1), (2, short, 4), (3, short, 6)):
        there = slice(12 - len(prompt), 12 + count)
        ids[row, there], mask[row, there] = torch.cat([prompt, draw(count)]), 1
    labels = ids.masked_fill(mask == 0, IGNORE)
    labels[:, :12] = IGNORE
    rows = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    rows = {name: values.to(model.device) for name, values in rows.items()}

    training = model.training
    model.train()
    try:
        with (
            torch.random.fork_rng(devices=[model.device] if model.device.type == "cuda" else []),
            torch.no_grad(),
            trainer.accelerator.autocast(),
        ):
            padded = model(**rows, fused_lm_head=True).log_probs
            with PackedForward(model):
                packed = model(**rows, fused_lm_head=True).log_probs
    finally:
        model.train(training)
    return difference(packed, padded, trainer.args.bf16 or trainer.args.fp16 or model.dtype != torch.float32)
