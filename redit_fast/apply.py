"""`linear_logp` behind a Hugging Face causal LM's own loss: one instance, reversible, the logits never held."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import fields
from types import MethodType, TracebackType
from typing import TYPE_CHECKING, Self

from torch import Tensor, nn

from redit_fast.linear import linear_logp
from redit_fast.transforms import logit_transforms

if TYPE_CHECKING:
    from transformers import PreTrainedModel

IGNORE = -100


def apply_to(model: PreTrainedModel) -> AppliedHead:
    """Makes `model(..., labels=labels)` compute its loss by `linear_logp`: loss and gradients are those of the model's
    own next-token cross-entropy to float32 rounding, `logits` of the output are None and the head module is not called.
    Without labels the call is the original one.

    Honoured: num_items_in_batch (the loss is then a sum over the scored tokens, divided by it), shift_labels,
    return_dict, autocast, and the logit transforms that `logit_transforms` reads from the model's config. The loss of
    labels that are all -100 is exactly 0. The key-value cache is off unless use_cache asks for it.

    Args:
        model: a causal LM of transformers, or a PEFT model around one. Only this instance changes.

    Returns:
        A handle: `handle.remove()` puts the model's own forward back, and so does leaving `with apply_to(model):`.

    Raises:
        TypeError: no model with a plain linear LM head on its backbone, naming the class.
        ValueError: the config sets a logit transform or a loss that redit-fast does not know, naming it.
    """
    return AppliedHead(model.get_base_model() if hasattr(model, "get_base_model") else model)


class SwappedForward:
    """A model's `forward` replaced on the instance; `call` gets the forward that was there."""

    def __init__(self, model: nn.Module):
        self._model, self._own, self._before = model, model.__dict__.get("forward"), model.forward
        self._active = True
        handle = self

        @functools.wraps(type(model).forward)  # generate() and Trainer read the signature
        def forward(self, *args, **kwargs):
            before = handle._before
            if isinstance(before, MethodType):  # bound to the model; this may be a copy of it
                before = functools.partial(before.__func__, self)
            return handle.call(self, before, args, kwargs) if handle._active else before(*args, **kwargs)

        self._forward = model.forward = MethodType(forward, model)

    def call(self, model: nn.Module, before: Callable, args: tuple, kwargs: dict) -> object:
        raise NotImplementedError

    def remove(self) -> None:
        """Puts the model's own forward back. Where something else has wrapped `forward` since, that stays, around the
        model's own."""
        self._active = False
        if self._model.__dict__.get("forward") is not self._forward:
            return
        if self._own is None:
            del self._model.forward
        else:
            self._model.forward = self._own

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()


class AppliedHead(SwappedForward):
    """What `apply_to` returns."""

    def __init__(self, model: PreTrainedModel):
        from transformers.loss.loss_utils import ForCausalLMLoss

        _check_head(model)
        if model.loss_function is not ForCausalLMLoss:
            raise ValueError(
                f"the loss of {type(model).__name__} must be transformers' ForCausalLMLoss, "
                f"got {getattr(model.loss_function, '__name__', model.loss_function)}"
            )
        self._transforms = logit_transforms(model.config)
        self._signature = inspect.signature(type(model).forward)
        super().__init__(model)

    def call(self, model: PreTrainedModel, before: Callable, args: tuple, kwargs: dict) -> object:
        arguments = self._signature.bind(model, *args, **kwargs).arguments
        arguments |= arguments.pop("kwargs", {})
        if arguments.get("labels") is None and arguments.get("shift_labels") is None:
            return before(*args, **kwargs)
        arguments.pop("self")
        return self._loss(model, arguments)

    def _loss(self, model: PreTrainedModel, arguments: dict) -> object:
        from transformers.modeling_outputs import CausalLMOutputWithPast

        labels, shifted = arguments.pop("labels", None), arguments.pop("shift_labels", None)
        items, ignore = arguments.pop("num_items_in_batch", None), arguments.pop("ignore_index", IGNORE)
        keep = arguments.pop("logits_to_keep", 0)
        if not isinstance(keep, int) or keep != 0:
            raise ValueError(f"logits_to_keep must be 0 with labels, got {keep}")
        config = model.config.get_text_config()
        if arguments.get("output_router_logits", getattr(config, "output_router_logits", False)):
            raise NotImplementedError("output_router_logits: the router's auxiliary loss is not part of apply_to")
        as_tuple = not arguments.pop("return_dict", model.config.return_dict)
        arguments.setdefault("use_cache", False)
        outputs = model.base_model(**arguments, return_dict=True)
        hidden = outputs.last_hidden_state
        if shifted is None:
            hidden, shifted = hidden[:, :-1], labels[:, 1:]
        head = model.get_output_embeddings()
        targets = shifted.to(hidden.device)
        targets = targets.masked_fill(targets == ignore, IGNORE)
        if hasattr(head.weight, "full_tensor"):  # a unit of FSDP2 of its own
            with ScoringHead(head, targets, self._transforms):
                logp = head(hidden)
        else:
            logp = linear_logp(hidden, head.weight, targets, bias=head.bias, **self._transforms)
        loss = -logp.sum() / ((targets != IGNORE).sum().clamp(min=1) if items is None else items)
        # hidden_states, attentions, and cache, which was past_key_values before transformers 5.24
        shared = {field.name for field in fields(CausalLMOutputWithPast)} & set(outputs.keys())
        result = CausalLMOutputWithPast(loss=loss, **{name: outputs[name] for name in shared})
        return result.to_tuple() if as_tuple else result


class ScoringHead(SwappedForward):
    """A linear head that returns `linear_logp` of its targets, not logits, for FSDP2: within a call of the module the
    weight is gathered, and what it gets as a gradient is reduced."""

    def __init__(self, head: nn.Linear, targets: Tensor, options: dict):
        self._targets, self._options = targets, options
        super().__init__(head)

    def call(self, head: nn.Linear, before: Callable, args: tuple, kwargs: dict) -> Tensor | tuple[Tensor, Tensor]:
        (hidden,) = args
        weight, bias = (None if p is None else p.to(hidden.dtype) for p in (head.weight, head.bias))
        found = linear_logp(hidden, weight, self._targets, bias=bias, **self._options)
        return found.clone() if isinstance(found, Tensor) else tuple(x.clone() for x in found)  # it warns of views


def _check_head(model: PreTrainedModel) -> None:
    """Refuses what is not backbone, then one linear head: anything between or after them would be left out."""
    name = type(model).__name__
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    backbone = getattr(model, "base_model", model)
    if head is None or backbone is model or getattr(model.config, "is_encoder_decoder", False):
        raise TypeError(f"apply_to needs a causal language model with an LM head, got {name}")
    if type(head) is not nn.Linear:
        raise TypeError(f"apply_to needs a plain nn.Linear as the LM head of {name}, got {type(head).__name__}")
    others = [
        child
        for child, module in model.named_children()
        if module is not head and module is not backbone and any(True for _ in module.parameters())
    ]
    if others or head not in list(model.children()):
        between = ", ".join(others) or "a head inside another module"
        raise TypeError(f"apply_to needs a backbone and then the LM head in {name}, which also has {between}")
