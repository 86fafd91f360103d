"""`linear_logp` behind verl's fused kernels: model.use_fused_kernels=True, fused_kernel_options.impl_backend=redit."""

from __future__ import annotations

import inspect
import io
from collections.abc import Callable
from contextlib import redirect_stdout
from typing import Any

import torch
import verl
import verl.models.transformers.monkey_patch as monkey_patch
import verl.utils.experimental.torch_functional as torch_functional
from torch import Tensor, nn
from transformers import PreTrainedModel

from redit_fast.integrations.swapped_forward import ScoringHead, SwappedForward
from redit_fast.integrations.verl import hooks
from redit_fast.integrations.verl.loss import SUPPORTED
from redit_fast.losses.transforms import logit_transforms

BACKEND = "redit"
CHOOSE = "patch_forward_with_backends"  # in monkey_patch: gives a model the forward of a backend
HEAD = "FusedLinearForPPO"  # in torch_functional: what verl's fused forwards call
ARGUMENTS = ["model", "use_fused_kernels", "fused_kernels_backend"]
CONTRACT = ["self", "hidden_states", "vocab_weights", "input_ids", "temperature"]


class FusedHead(SwappedForward):
    """verl's fused forward of one model, in which our head stands for verl's; the model's class keeps its forward."""

    def __init__(self, model: PreTrainedModel):
        self._transforms = logit_transforms(model.config)
        super().__init__(model)

    def call(self, model: Any, before: Callable, args: tuple, kwargs: dict) -> Any:
        theirs = getattr(torch_functional, HEAD)
        setattr(torch_functional, HEAD, lambda impl_backend: self)  # looked up in every call of `before`
        try:
            return before(*args, **kwargs)
        finally:
            setattr(torch_functional, HEAD, theirs)

    def forward(
        self, hidden_states: Tensor, vocab_weights: Tensor, input_ids: Tensor, temperature: float = 1.0
    ) -> tuple[Tensor, Tensor]:
        """hidden_states (B, T, D), input_ids (B, T), the targets -> log-probs and entropy (B, T) float32, with graph.

        By a call of the head module, in place of its product: so FSDP2, of which verl makes an untied head a unit of
        its own, gathers the weight and reduces its gradient; vocab_weights would be this rank's shard.
        """
        if isinstance(temperature, Tensor):
            raise ValueError(
                f"impl_backend={BACKEND} needs one temperature for all tokens, got a tensor of shape "
                f"{tuple(temperature.shape)}: set use_fused_kernels=False for a temperature per sample"
            )
        model: Any = self._model
        head = model.get_output_embeddings()
        if type(head).forward is not nn.Linear.forward:  # FSDP2 makes a subclass; an adapter's forward does more
            raise TypeError(f"impl_backend={BACKEND} needs an nn.Linear as the LM head, got {type(head).__name__}")
        entropy = "grad" if torch.is_grad_enabled() else "metric"
        with ScoringHead(head, input_ids, {"temperature": temperature, "entropy": entropy, **self._transforms}) as ours:
            head(hidden_states)
        return ours.found


def _choosing(theirs: Any) -> Any:
    def patch_forward_with_backends(
        model: PreTrainedModel, use_fused_kernels: bool = False, fused_kernels_backend: str | None = None
    ) -> None:
        if not use_fused_kernels or fused_kernels_backend != BACKEND:
            return theirs(model, use_fused_kernels, fused_kernels_backend)
        own = type(model).forward
        try:
            with redirect_stdout(io.StringIO()):  # "Using Torch backend"
                theirs(model, True, "torch")  # puts the fused forward of the model's family on its class
            FusedHead(model)  # which takes it from there
        finally:
            type(model).forward = own
        model._verl_fused_kernels_backend = BACKEND
        print(f"Using redit_fast.linear_logp for fused kernels in {type(model).__name__}")

    return patch_forward_with_backends


def register() -> None:
    """verl takes impl_backend=redit; its own backends stay as they are. Twice is once.

    Raises:
        RuntimeError: a verl whose fused kernels have another contract, naming the supported one.
    """
    choose, head = getattr(monkey_patch, CHOOSE, None), getattr(torch_functional, HEAD, None)
    if hooks.is_replaced(monkey_patch, CHOOSE):
        return
    for name, function, arguments in ((CHOOSE, choose, ARGUMENTS), (HEAD, getattr(head, "forward", None), CONTRACT)):
        if function is None or list(inspect.signature(function).parameters) != arguments:
            raise RuntimeError(
                f"redit_fast.integrations.verl got verl {verl.__version__}, whose {name} is not "
                f"({', '.join(arguments)}); supported: {SUPPORTED}"
            )
    hooks.replace(monkey_patch, CHOOSE, _choosing(choose))


def unregister() -> None:
    hooks.take_back(monkey_patch, CHOOSE)
