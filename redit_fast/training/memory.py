"""What a run takes of memory beside its loaded model, from shapes, before any step is taken.

The optimizer's state, GR's copies and the reference stay; gradients, activations and the head's chunk meet in a
training pass, the cache and the logits in a rollout, and of these two the larger counts. What a layer keeps for its
backward pass no shape of a config tells for all families: the tensors that autograd keeps of a few samples are counted.

Not counted: what torch and its libraries hold, a GPU's allocator, reward functions, a server, the blocks of `paged`, a
sharpness probe, states of recurrent layers, and what FSDP2 shares out.
"""

from __future__ import annotations

import dataclasses
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from transformers import PreTrainedModel

import redit_fast as rf
from redit_fast.gr.config import PUBLISHED
from redit_fast.gr.perturbation import LOW_PRECISION
from redit_fast.packing.attention import attending
from redit_fast.packing.plan import Budget
from redit_fast.training.batch import Batch
from redit_fast.training.config import TrainConfig
from redit_fast.training.config_values import LOCAL
from redit_fast.training.metrics import EVAL_BATCH
from redit_fast.training.policy import head_of
from redit_fast.training.rollout.head import LEAST_WEIGHTS

# Of freed blocks under 32 MiB glibc's malloc keeps some on the CPU, in holes between others: 43 to 55 MB beside 164 MB
# of the demo's tensors, 12 to 68 MB beside 261 MB of a model with 50257 tokens, most of them in one large block. The
# tensors of both were within 3 % of what is predicted.
HOLES, MOST_HOLES = 0.25, 40_000_000  # a share of the tensors, bytes
OF_A_LAYER = 3  # gradients as wide as its widest product, and as its input, that a layer's backward pass has at once


@dataclass(frozen=True)
class Memory:
    """Bytes of each part, and at most."""

    weights: int
    optimizer: int
    copies: int  # of the weights that GR perturbs
    reference: int
    gradients: int
    activations: int
    head: int
    rollout: int
    passes: int  # gradients, activations and the head's at once
    on_cpu: bool

    @property
    def tensors(self) -> int:
        """At most at once, above what is there once the run is loaded."""
        return self.optimizer + self.copies + self.reference + max(self.passes, self.rollout)

    @property
    def peak(self) -> int:
        """The same, with what the allocator keeps beside them."""
        return self.tensors + (min(int(HOLES * self.tensors), MOST_HOLES) if self.on_cpu else 0)


def predicted(
    model: PreTrainedModel, optimizer: rf.RegularizedAdamW, batch: Batch, config: TrainConfig, held_out: int = 0
) -> Memory:
    """Of steps like `batch`, and evaluations of so many held-out problems; from the second step on, when all of the
    optimizer's state is there."""
    groups = optimizer.param_groups
    trained = [p for group in groups for p in group["params"] if p.requires_grad]
    moved = [p for group in groups if group.get("perturb", True) for p in group["params"] if p.requires_grad]
    weights, gradients = sum(map(bytes_of, {*model.parameters(), *model.buffers()})), sum(map(bytes_of, trained))
    copies = sum(bytes_of(p) for p in moved if p.dtype not in LOW_PRECISION) if config.gr_gamma else 0
    a_token = kept_of_a_token(model, batch, config)
    busiest = [_of_pass(model, batch, micro.tokens, micro.samples, a_token) for micro, on in batch.micro_batches if on]
    activations, head, together = (max(part) for part in zip(*busiest or [(0, 0, 0)], strict=True))  # none: all masked
    kept, aside = _held_gradients(trained, config, len(busiest))
    embedding = model.get_input_embeddings().weight
    added = (2 if kept else 1) * bytes_of(embedding) if embedding.requires_grad else 0  # its own to the head's
    return Memory(
        weights=weights,
        optimizer=sum(map(state_of, trained)),
        copies=copies,
        reference=weights if config.beta and config.lora_rank is None else 0,
        gradients=gradients,
        activations=activations,
        head=head,
        rollout=_of_rollout(model, batch, config, held_out),
        passes=gradients * aside + max(gradients * kept + together, gradients + added),
        on_cpu=model.device.type == "cpu",
    )


def bytes_of(tensor: Tensor) -> int:
    return tensor.numel() * tensor.itemsize


def state_of(p: Tensor) -> int:
    """Of AdamW: two means, and a float32 master of what has fewer bits."""
    return p.numel() * (2 * max(4, p.itemsize) + (4 if p.dtype in LOW_PRECISION else 0))


def _held_gradients(trained: list[Tensor], config: TrainConfig, micro_batches: int) -> tuple[bool, bool]:
    """Whether .grad is there while a pass is computed, from a micro-batch before or folded from the first pass; and
    whether the first pass's gradient is beside it."""
    if not config.gr_gamma:
        return micro_batches > 1, False
    ratio = config.gr_gamma / (PUBLISHED if config.gr_epsilon == "auto" else config.gr_epsilon)
    aside = config.gr_keep_first_grad
    if aside is None:
        low = any(p.dtype in LOW_PRECISION for p in trained)
        aside = config.gr_epsilon == "auto" or (low and not 0.5 <= ratio <= 3)
    return micro_batches > 1 or not (aside or ratio == 1), aside


def _of_pass(
    model: PreTrainedModel, batch: Batch, tokens: int, samples: tuple[int, ...], a_token: float
) -> tuple[int, int, int]:
    """Of a micro-batch: activations, the head's, and both at once with the gradients of one layer."""
    weight = head_of(model).weight
    (vocabulary, size), width = weight.shape, weight.itemsize
    rows = sum(batch.lengths[i] for i in samples)
    activations = int(a_token * tokens) + width * rows * size
    head = rf.estimate_memory(rows, size, vocabulary, weight.dtype, weight.requires_grad)
    left = width * rows * size + (bytes_of(weight) if weight.requires_grad else 0)  # of the head, in the backward pass
    widest = max(max(p.shape) for module in _products(model) for p in module.parameters(recurse=False) if p.ndim == 2)
    return activations, head, activations + max(head, left + OF_A_LAYER * width * tokens * (widest + size))


def _products(model: PreTrainedModel) -> list[nn.Module]:
    return [module for module in model.get_decoder().modules() if not isinstance(module, nn.Embedding)]


def kept_of_a_token(model: PreTrainedModel, batch: Batch, config: TrainConfig) -> float:
    """Bytes that the decoder keeps of a token for its backward pass, counted on the samples of the first prompt."""
    count = config.group_size
    few = dataclasses.replace(
        batch,
        prompts=batch.prompts[:count],
        completions=batch.completions[:count],
        advantages=torch.ones(count, dtype=torch.float32, device="cpu"),
        budget=Budget(samples=count),
        masked=frozenset(),
        sampling_logp=None,
        ref_logp=None,
    )
    ((micro, _),) = few.micro_batches
    weights = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    kept: dict[int, int] = {}

    def count_it(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()  # which is kept, so that no other gets its address
        return tensor

    again = [module for module in model.modules() if getattr(module, "gradient_checkpointing", False)]
    training = model.training
    model.train()
    for module in again:
        module.gradient_checkpointing = False  # type: ignore[assignment]
    try:
        with (
            torch.enable_grad(),
            saved_tensors_hooks(count_it, lambda tensor: tensor),
            attending(model) if few.packed else nullcontext(),
        ):
            graph = few.hidden(model, micro)
    finally:
        for module in again:
            module.gradient_checkpointing = True  # type: ignore[assignment]
        model.train(training)
    del graph
    whole = sum(kept.values()) / micro.tokens
    if not again:
        return whole
    text = model.config.get_text_config()  # of all layers the input, and all of the one that is computed again
    return text.num_hidden_layers * text.hidden_size * model.dtype.itemsize + whole / text.num_hidden_layers


def _of_rollout(model: PreTrainedModel, batch: Batch, config: TrainConfig, held_out: int) -> int:
    """Of the local engine: the cache of the longest rows, logits and what is made of them, the head in blocks."""
    if config.rollout != LOCAL:
        return 0
    weight, text = head_of(model).weight, model.config.get_text_config()
    heads = getattr(text, "num_attention_heads", 0)
    size = getattr(text, "head_dim", None) or (text.hidden_size // heads if heads else 0)
    keys = 2 * (getattr(text, "num_key_value_heads", None) or heads) * size
    length = max(map(len, batch.prompts)) + config.max_completion_length
    cache = (text.num_hidden_layers * keys + keys) * length * weight.itemsize  # a layer's is copied when it grows
    logits, chosen = weight.itemsize, 12  # bytes: a logit; its probability in float32, and in float64 to add up
    chosen += 4 if weight.itemsize < 4 or config.temperature != 1 else 0  # the logit in float32
    chosen += 28 if config.top_p < 1 else 0  # sorted, their places, sums, and those that are left
    answers = held_out * config.eval_samples
    of_answers = chosen if config.eval_samples > 1 else logits  # greedy: the logits before them
    rows = max(
        len(batch.prompts) * (cache + len(weight) * (logits + chosen)),
        min(answers, max(EVAL_BATCH, config.eval_samples)) * (cache + len(weight) * (logits + of_answers)),
    )
    blocks = bytes_of(weight) if weight.dtype == torch.float32 and weight.device.type == "cpu" else 0
    return rows + (blocks if weight.numel() >= LEAST_WEIGHTS else 0)
