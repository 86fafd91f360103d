"""`linear_logp` behind a Hugging Face causal LM's own loss: one instance, reversible, the logits never held."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from redit_fast.extras import need
from redit_fast.integrations.objective import can_run, check_objective
from redit_fast.integrations.swapped_forward import ScoringHead, SwappedForward
from redit_fast.losses.transforms import logit_transforms
from redit_fast.ops.targets import IGNORE

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def apply_to(model: PreTrainedModel, *, eval_logits: bool = True) -> AppliedHead:
    """Makes `model(..., labels=labels)` compute its loss by `linear_logp`: loss and gradients are those of the model's
    own next-token cross-entropy to float32 rounding, `logits` of the output are None. The model's own forward still
    runs, with all its arguments, in which the LM head gives the labels' log-probs and `model.loss_function` their mean;
    what it adds to the loss (a router's) and what else it returns stay. Without labels the call is the original one.

    Honoured: num_items_in_batch (the loss is then a sum over the scored tokens, divided by it), shift_labels,
    return_dict, autocast, and the logit transforms that `logit_transforms` reads from the model's config. The loss of
    labels that are all -100 is exactly 0. The key-value cache is off unless use_cache asks for it. TRL's trainers call
    a forward of their own (fused_lm_head=True): there our head stands in the place of theirs, whichever came first.

    The loss is compared once with the model's own, on 2 sequences of 8 tokens, in both modes and without gradients;
    nothing of the model and no random generator changes. A forward that reads the logits later gets NaN: the first call
    in each mode refuses then. Parameters that are not whole here (meta, FSDP2, ZeRO-3) are
    waited for: the comparison is then part of the first call of the model, on every rank.

    Args:
        model: a causal LM of transformers, or a PEFT model around one. Only this instance changes.
        eval_logits: in eval mode, and where output_hidden_states are asked for, the original forward runs, so that
            logits are there (`compute_metrics`, `preprocess_logits_for_metrics`); False: logits are None there too, and
            evaluation takes no more memory than training.

    Returns:
        A handle: `handle.remove()` puts the model's own forward back, and so does leaving `with apply_to(model):`.

    Raises:
        TypeError: no model with a plain linear LM head on its backbone, naming the class; eval_logits is no bool.
        ValueError: the config sets a logit transform or a loss that redit-fast does not know, naming it; the losses
            differ beyond rounding, giving both; the model does not run on token ids and labels alone.
    """
    if not isinstance(eval_logits, bool):
        raise TypeError(f"eval_logits must be True or False, got {eval_logits!r}")
    need("transformers", "apply_to")
    return AppliedHead(model.get_base_model() if hasattr(model, "get_base_model") else model, eval_logits)


class AppliedHead(SwappedForward):
    """What `apply_to` returns."""

    def __init__(self, model: PreTrainedModel, eval_logits: bool = True):
        _check_head(model)
        _check_loss(model)
        hooks = model.base_model._forward_hooks.values()
        if any(isinstance(getattr(hook, "__self__", None), AppliedHead) for hook in hooks):
            raise ValueError(f"apply_to was called on this {type(model).__name__} before: remove() that handle first")
        self._transforms = logit_transforms(model.config)
        self._eval_logits = eval_logits
        self._signature = inspect.signature(type(model).forward)
        # Not in a graph. Here, as the decorator would make `import redit_fast` load torch._dynamo, and that Triton.
        for name in ("_compare", "_look_at_loss"):
            setattr(self, name, torch.compiler.disable(getattr(self, name)))
        self._compared = False
        self._modes: set[bool] = set()  # model.training of the calls whose loss has been looked at
        if can_run(model):
            self._compare(model, model.forward)
        super().__init__(model)
        self._trl: SwappedForward | None = None  # our forward over TRL's, where TRL's came over this one
        self._hook = model.base_model.register_forward_hook(self._meet_trl)

    def remove(self) -> None:
        self._hook.remove()
        if self._trl is not None:
            self._trl.remove()
        super().remove()

    def call(self, model: Any, before: Callable, args: tuple, kwargs: dict) -> Any:
        if not self._compared:
            self._compare(model, before)
        if kwargs.get("fused_lm_head"):  # TRL's forward, which was there first
            from redit_fast.integrations.trl_function import fused_call

            return fused_call(model, before, args, kwargs)
        arguments = self._named(model, args, kwargs)
        shifted = arguments.get("shift_labels")
        if arguments.get("labels") is None:
            if shifted is None:
                return before(*args, **kwargs)
            arguments["labels"] = shifted  # a model computes its loss where it is given labels
        wants_states = arguments.get("output_hidden_states", getattr(model.config, "output_hidden_states", False))
        if self._eval_logits and (wants_states or not model.training):
            return before(**arguments)
        output = self._loss(model, before, arguments)
        if model.training not in self._modes:
            self._look_at_loss(model, output[0])
        return output

    def _named(self, model: PreTrainedModel, args: tuple, kwargs: dict) -> dict:
        """The arguments of a call by their names; keywords that the model does not name are there too."""
        arguments = self._signature.bind(model, *args, **kwargs).arguments
        named = list(self._signature.parameters.values())
        del arguments[named[0].name]
        if named[-1].kind is inspect.Parameter.VAR_KEYWORD:
            arguments |= arguments.pop(named[-1].name, {})
        return arguments

    def _loss(self, model: PreTrainedModel, before: Callable, arguments: dict) -> Any:
        """The model's own forward, its head and its loss being ours."""
        as_tuple = arguments.get("return_dict", model.config.return_dict) is False
        if as_tuple:
            arguments["return_dict"] = True
        if self._takes("use_cache"):
            arguments.setdefault("use_cache", False)
        _check_loss(model)
        own = model.__dict__.get("_loss_function")
        with LabelHead(model.get_output_embeddings(), arguments, self._transforms) as head:
            model.loss_function = head.loss
            try:
                output = before(**arguments)
            finally:
                if own is None:
                    del model._loss_function
                else:
                    model.loss_function = own
        if not head.asked:
            raise ValueError(f"{type(model).__name__} does not compute its loss by model.loss_function")
        output = type(output)(**{name: value for name, value in output.items() if name != "logits"})
        return output.to_tuple() if as_tuple else output

    def _takes(self, name: str) -> bool:
        *_, last = self._signature.parameters.values()
        return name in self._signature.parameters or last.kind is inspect.Parameter.VAR_KEYWORD

    def _compare(self, model: PreTrainedModel, before: Callable) -> None:
        taken = [name for name in ("use_cache", "shift_labels", "num_items_in_batch") if self._takes(name)]
        check_objective(model, before, lambda arguments: self._loss(model, before, arguments), taken)
        self._compared = True

    def _look_at_loss(self, model: PreTrainedModel, loss: Tensor) -> None:
        """Of the first call in a mode: arguments or lengths that the comparison had not may lead to the logits."""
        if loss.isnan():
            raise ValueError(
                f"the loss of {type(model).__name__} is NaN under apply_to: its forward reads the logits, which are "
                f"not computed there, or a label lies outside [0, {len(model.get_output_embeddings().weight)}), or its "
                "hidden states are NaN"
            )
        self._modes.add(model.training)

    def _meet_trl(self, backbone: nn.Module, args: tuple, output: object) -> None:
        """After the backbone: TRL's trainers put a forward of their own over this one, which does not call it."""
        forward = self._model.__dict__.get("forward")
        if self._trl is None and "fused_lm_head" in (getattr(forward, "__kwdefaults__", None) or {}):
            from redit_fast.integrations.trl_function import FusedForward, swap_once

            self._trl = FusedForward(self._model)  # from the next call on
            swap_once(self._model)


class LabelHead(ScoringHead):
    """An LM head that computes the log-probs of a call's labels, and the loss function that makes a loss of them. In
    the place of the logits stand (B, T, 1) NaN: a forward that makes more of them gets NaN, and no other loss."""

    def __init__(self, head: nn.Linear, arguments: dict, transforms: dict):
        self._labels, self._shifted = arguments["labels"], arguments.get("shift_labels")
        self._ignore, self._keep = arguments.get("ignore_index", IGNORE), arguments.get("logits_to_keep", 0)
        if not isinstance(self._keep, int) or self._keep != 0:
            raise ValueError(f"logits_to_keep must be 0 with labels, got {self._keep}")
        targets = self._shifted
        if targets is None:
            targets = nn.functional.pad(self._labels[..., 1:], (0, 1), value=IGNORE)
        self._logp: Any = None
        self._in_place_of_logits: Any = None
        self.asked = False
        super().__init__(head, targets.masked_fill(targets == self._ignore, IGNORE), transforms)

    def call(self, model: Any, before: Callable, args: tuple, kwargs: dict) -> Any:
        (hidden,) = args
        if self._logp is not None or hidden.shape[:-1] != self._targets.shape:
            raise ValueError(
                f"the LM head must be called once, with hidden states for labels {tuple(self._targets.shape)}, got "
                f"{tuple(hidden.shape)}{'' if self._logp is None else ' in a second call'}"
            )
        self._targets = self._targets.to(hidden.device)
        logp = super().call(model, before, args, kwargs)[..., None]
        self._logp, self._in_place_of_logits = logp.detach(), _Hidden.apply(logp)
        return self._in_place_of_logits

    def loss(
        self,
        logits: Tensor,
        labels: Tensor,
        vocab_size: int | None = None,
        num_items_in_batch: int | Tensor | None = None,
        ignore_index: int = IGNORE,
        shift_labels: Tensor | None = None,
        **_,
    ) -> Tensor:
        """In the place of transformers' ForCausalLMLoss."""
        for name, found, given in (("labels", labels, self._labels), ("shift_labels", shift_labels, self._shifted)):
            if found is not given and not (found is not None and given is not None and _equal(found, given)):
                raise ValueError(f"the model's forward gives its loss function other {name} than it was called with")
        self.asked = True
        items = (self._targets != IGNORE).sum().clamp(min=1) if num_items_in_batch is None else num_items_in_batch
        if isinstance(items, Tensor):
            items = items.to(self._logp.device)
        # FSDP2 hangs its hook on the tensor that the head returns, so the loss must come from that one.
        return -_Revealed.apply(self._in_place_of_logits, self._logp).sum() / items


class _Hidden(torch.autograd.Function):
    """NaN in the place of the values, whose gradient it has."""

    @staticmethod
    def forward(ctx, values):
        return torch.full_like(values, torch.nan)

    @staticmethod
    def backward(ctx, grad):
        return grad


class _Revealed(torch.autograd.Function):
    """The values in the place of `hidden`, which gets their gradient."""

    @staticmethod
    def forward(ctx, hidden, values):
        return values.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad, None


def _equal(found: Tensor, given: Tensor) -> bool:
    return found.shape == given.shape and torch.equal(found, given.to(found.device))


def _check_loss(model: PreTrainedModel) -> None:
    from transformers.loss.loss_utils import ForCausalLMLoss

    if model.loss_function is not ForCausalLMLoss:
        raise ValueError(
            f"the loss of {type(model).__name__} must be transformers' ForCausalLMLoss, "
            f"got {getattr(model.loss_function, '__name__', model.loss_function)}"
        )


def _check_head(model: PreTrainedModel) -> None:
    """Refuses what is not backbone, then one linear head: anything between or after them would be left out."""
    name = type(model).__name__
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    backbone = getattr(model, "base_model", model)
    if head is None or backbone is model or getattr(model.config, "is_encoder_decoder", False):
        raise TypeError(f"apply_to needs a causal language model with an LM head, got {name}")
    if getattr(type(head), "forward", None) is not nn.Linear.forward:  # FSDP2 makes a subclass of it
        raise TypeError(f"apply_to needs a plain nn.Linear as the LM head of {name}, got {type(head).__name__}")
    others = [
        child
        for child, module in model.named_children()
        if module is not head and module is not backbone and any(True for _ in module.parameters())
    ]
    if others or head not in list(model.children()):
        between = ", ".join(others) or "a head inside another module"
        raise TypeError(f"apply_to needs a backbone and then the LM head in {name}, which also has {between}")
