"""Whether a loss through `linear_logp` is the model's own: both on a few tokens, before anything is trained by it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import product
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from redit_fast.foreign import Foreign
from redit_fast.ops.targets import IGNORE

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SEQUENCES, LENGTH = 2, 8


def can_run(model: nn.Module) -> bool:
    """Whether every parameter is here, and whole: neither on the meta device nor a shard of FSDP or ZeRO-3, which one
    rank cannot gather alone."""
    return not any(
        parameter.is_meta or hasattr(parameter, "full_tensor") or hasattr(parameter, "ds_id") or parameter.numel() == 0
        for parameter in model.parameters()
    )


def check_objective(model: PreTrainedModel, own: Callable, ours: Callable[[dict], Any], taken: list[str]) -> None:
    """Compares the losses of `own(**arguments)` and `ours(arguments)`, with labels alone and with shift_labels and
    num_items_in_batch; `taken` are the names that the model takes of these and use_cache. The tolerance is 1e-5 of the
    loss and what one rounding of the largest logit makes, in the dtype that the head computes in.

    Raises:
        ValueError: they differ, or one of them cannot be had.
    """
    from transformers.loss.loss_utils import ForCausalLMLoss

    name, arguments = type(model).__name__, _a_batch(model)
    if "use_cache" in taken:
        arguments["use_cache"] = False
    if not model.config.return_dict:
        arguments["return_dict"] = True
    further = {"shift_labels": arguments["labels"].flip(0), "num_items_in_batch": SEQUENCES * LENGTH}
    layout = [key for key in further if key in taken]
    epsilons = []  # of the dtypes that the head computes in: a wrapper's autocast does not show outside

    def see(_, args):
        epsilons.append(_epsilon(args[0]))

    for training, more in product((False, True), [[], layout] if layout else [[]]):
        batch = arguments | {key: further[key] for key in more}
        said = f"in {'training' if training else 'evaluation'} mode with {', '.join(['labels', *more])} of {SEQUENCES} "
        said += f"sequences of {batch['labels'].shape[1]} tokens"
        hook = model.get_output_embeddings().register_forward_pre_hook(see)
        fails = f"apply_to compares its loss with that of {name} {said}, and there its forward fails"
        with hook, untouched(model, training), Foreign(fails):
            output = own(**batch)
        if output.loss is None or output.logits is None:
            raise ValueError(f"{name} must give a loss and logits {said}, got {', '.join(output)}")
        cause, loss, logits = None, output.loss.item(), output.logits
        try:
            with untouched(model, training), Foreign("its forward fails"):
                found = ours(dict(batch)).loss.item()
            reads = found != found
            why = ": its forward makes the loss from more than model.loss_function" if reads else ""
        except ValueError as error:
            cause, reads, why = error, True, f": {error}"
        if reads:
            options = {key: batch[key] for key in more} | {"vocab_size": logits.shape[-1]}
            found = ForCausalLMLoss(logits, batch["labels"], **options).item()
        rounding = max([torch.finfo(logits.dtype).eps, *epsilons]) * max(1.0, logits.float().abs().max().item())
        if reads or not abs(found - loss) <= 1e-5 * max(1.0, abs(loss)) + rounding:
            raise ValueError(
                f"apply_to would not compute the loss of {name}, which {said} is {loss:.6g}, next-token cross-entropy "
                f"being {found:.6g}{why}"
            ) from cause


def _epsilon(hidden: Tensor) -> float:
    """Of the dtype in which a linear layer computes from `hidden`."""
    kind = hidden.device.type
    if torch.is_autocast_enabled(kind):
        return torch.finfo(torch.get_autocast_dtype(kind)).eps
    if kind == "cuda" and hidden.dtype == torch.float32 and torch.get_float32_matmul_precision() != "highest":
        return 2.0**-10  # TF32
    return torch.finfo(hidden.dtype).eps


def _a_batch(model: PreTrainedModel) -> dict:
    """input_ids and labels (2, 8), of which no token is a special one and no label the next token."""
    config = model.config.get_text_config()
    rows = min(model.get_input_embeddings().weight.shape[0], config.vocab_size)
    special = set(_special_tokens(model.config.to_dict()))
    plain = [token for token in range(rows) if token not in special] or list(range(rows))
    length = min(LENGTH, getattr(config, "max_position_embeddings", None) or LENGTH)
    places = torch.arange(2 * SEQUENCES * length, device=model.device)
    tokens = torch.tensor(plain, device=model.device)[(places * 7919 + 3) % len(plain)]
    ids, labels = tokens.view(2, SEQUENCES, length)
    labels = labels.clone()
    labels[0, : length // 2] = IGNORE  # so that a mean over sequences is another number than one over tokens
    return {"input_ids": ids, "labels": labels}


def _special_tokens(config: dict) -> Iterator[int]:
    """Of a config and those inside it: the numbers of every field that names tokens."""
    for key, value in config.items():
        if isinstance(value, dict):
            yield from _special_tokens(value)
        elif str(key).endswith(("token_id", "token_ids", "token_index")):
            yield from (token for token in (value if isinstance(value, list) else [value]) if isinstance(token, int))


@contextmanager
def untouched(model: nn.Module, training: bool) -> Iterator[None]:
    """Training or eval mode, without gradients, inside the block; dropout draws alike in every block. After it the
    attributes and buffers of every module and the random generators are as before; parameters are left to those who
    shard them."""
    modules = list(model.modules())
    attributes = [dict(vars(module)) for module in modules]
    tables = [
        {key: dict(value) for key, value in kept.items() if isinstance(value, dict) and key != "_parameters"}
        for kept in attributes
    ]
    buffers = [(buffer, buffer._version, buffer.clone()) for buffer in model.buffers()]
    devices = {parameter.device for parameter in model.parameters() if parameter.device.type not in ("cpu", "meta")}
    kind = next(iter(devices)).type if devices else "cuda"
    with torch.no_grad(), torch.random.fork_rng([device.index or 0 for device in devices], device_type=kind):
        for module in modules:
            module.training = training
        try:
            yield
        finally:
            for module, kept, contents in zip(modules, attributes, tables, strict=True):
                vars(module).clear()
                vars(module).update(kept)
                for key, content in contents.items():
                    kept[key].clear()
                    kept[key].update(content)
            for buffer, version, values in buffers:
                if buffer._version != version:
                    buffer.copy_(values)
