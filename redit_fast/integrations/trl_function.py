"""`linear_logp` in the place of the function that TRL's fused LM head calls (`trl.trainer.utils.add_fused_lm_head`)."""

# ruff: noqa: E402  what is not installed is said before it is imported

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from redit_fast.extras import need

need("trl", "redit_fast.integrations.trl_function")

import trl
import trl.trainer.utils as utils

from redit_fast.integrations.swapped_forward import SwappedForward, within
from redit_fast.ops.linear_loss import linear_logp
from redit_fast.ops.targets import IGNORE
from redit_fast.ops.token_loss import EntropyMode

NAME = "_ChunkedLogProbFunction"  # in trl.trainer.utils: what TRL's fused forward calls
CONTRACT = ["ctx", "hidden", "weight", "bias", "targets", "temperature", "chunk_size", "final_logit_softcapping",
            "logit_scale", "outputs"]  # fmt: skip
OURS = {"log_probs", "entropy", "is_top1"}


class LinearLogpFunction:
    """With the contract of TRL's ChunkedLogProbFunction. A call that asks for more than log-probs, entropy and is_top1
    goes to TRL's own. `scored`, of as many elements as there are targets, says which rows TRL reads; elsewhere it sets
    0. `head`: the module by whose call all of it is computed, see `sharded_head`."""

    def __init__(self, theirs: Any, entropy: EntropyMode, scored: Tensor | None = None, head: nn.Linear | None = None):
        self.theirs, self.entropy, self.scored, self.head = theirs, entropy, scored, head

    def apply(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        temperature: float,
        chunk_size: int,
        final_logit_softcapping: float | None,
        logit_scale: float,
        outputs: tuple[str, ...],
    ) -> tuple[Tensor | None, ...]:
        """hidden (N, D), weight (V, D), bias (V,), targets (N,) -> log-probs and entropy (N,) float32, two None, and
        whether the target is the likeliest token (N,) bool.
        chunk_size counts columns of the vocabulary, which `linear_logp` does not chunk by."""
        options = (targets, temperature, chunk_size, final_logit_softcapping, logit_scale, outputs)
        compute: Any = self._compute if OURS.issuperset(outputs) else self.theirs.apply
        return within(self.head, lambda *tensors: compute(*tensors, *options), hidden, weight, bias)

    def _compute(
        self, hidden, weight, bias, targets, temperature, chunk_size, final_logit_softcapping, logit_scale, outputs
    ) -> tuple[Tensor | None, ...]:
        scored = None if self.scored is None or self.scored.numel() != len(targets) else self.scored.flatten()
        found: Any = linear_logp(
            hidden,
            weight.to(hidden.dtype),
            targets,
            bias=None if bias is None else bias.to(hidden.dtype),
            temperature=temperature,
            logit_scale=logit_scale,
            softcap=final_logit_softcapping,
            mask=scored,
            entropy=self.entropy if "entropy" in outputs else "none",
        )
        logp, entropy = found if "entropy" in outputs else (found, None)
        if "is_top1" not in outputs:
            return logp, entropy, None, None, None
        with torch.no_grad():
            # A p above 1/2 is the largest, and the largest is at least exp(-entropy), or 1/V: only the rows between,
            # with room for rounding, take TRL's product over the vocabulary.
            lowest = -math.log(len(weight)) if entropy is None else -entropy
            top1 = logp > -0.68
            between = ~top1 & (logp > lowest - 0.01)
            if scored is not None:
                between &= scored
            top1[between] = self.theirs.apply(hidden[between], weight, bias, targets[between], temperature, chunk_size,
                                              final_logit_softcapping, logit_scale, ("is_top1",))[4]  # fmt: skip
        return logp, entropy, None, None, top1


@contextmanager
def sharded_head(model: Any) -> Iterator[nn.Linear | None]:
    """The LM head of `model` where FSDP2 has made it a unit of its own, or a part of one; else None.

    There a call of the module gathers its weight and reduces its gradient over the ranks. TRL's forward does not call
    it: where it finds a shard it gathers a second copy of the weight, whose gradient is that of one rank. So inside the
    block TRL's forward finds a head that holds nothing, and our function calls the module."""
    head = model.get_output_embeddings()
    if not hasattr(head, "unshard"):  # what the model itself holds is gathered within its forward
        yield None
        return
    nothing = torch.empty(0, dtype=torch.float32, device=head.weight.device)
    own = model.__dict__.get("get_output_embeddings")
    model.get_output_embeddings = lambda: SimpleNamespace(weight=nothing, bias=None)
    try:
        yield head
    finally:
        if own is None:
            del model.get_output_embeddings
        else:
            model.get_output_embeddings = own


@contextmanager
def swapped_head(function: object) -> Iterator[None]:
    """TRL's head function is `function`, with the contract of `LinearLogpFunction`, inside the block."""
    theirs = getattr(utils, NAME)
    setattr(utils, NAME, function)
    try:
        yield
    finally:
        setattr(utils, NAME, theirs)


def scored_rows(kwargs: dict) -> Tensor:
    """Of a call of TRL's fused forward: the rows that it reads, (B, T - 1), with shift_labels (B, T)."""
    shifted = kwargs.get("shift_labels")
    return (kwargs["labels"][:, 1:] if shifted is None else shifted) != IGNORE


def fused_call(model: nn.Module, before: Callable, args: tuple, kwargs: dict) -> object:
    """A call of TRL's fused forward of `model`, by our head."""
    _check_contract()
    with sharded_head(model) as head:
        with swapped_head(LinearLogpFunction(getattr(utils, NAME), "grad", scored_rows(kwargs), head)):
            return before(*args, **kwargs)


class FusedForward(SwappedForward):
    """TRL's fused forward of one model, by our head; its other calls are as they were."""

    def call(self, model: nn.Module, before: Callable, args: tuple, kwargs: dict) -> object:
        return fused_call(model, before, args, kwargs) if kwargs.get("fused_lm_head") else before(*args, **kwargs)


class OneCall(LinearLogpFunction):
    """For the next call alone, of the forward of `model`."""

    def __init__(self, theirs: Any, model: nn.Module):
        self._undo = ExitStack()
        super().__init__(theirs, "grad", head=self._undo.enter_context(sharded_head(model)))

    def apply(self, *args) -> tuple[Tensor | None, ...]:
        setattr(utils, NAME, self.theirs)
        self._undo.close()
        return super().apply(*args)


def swap_once(model: nn.Module) -> None:
    """The next call of TRL's head function, which is under way in the forward of `model`, is ours."""
    _check_contract()
    if not isinstance(getattr(utils, NAME), LinearLogpFunction):
        setattr(utils, NAME, OneCall(getattr(utils, NAME), model))


def _check_contract() -> None:
    function = getattr(utils, NAME, None)
    if isinstance(function, LinearLogpFunction):
        return
    forward = getattr(function, "forward", None)
    if forward is None or list(inspect.signature(forward).parameters) != CONTRACT:
        raise RuntimeError(
            f"apply_to got trl {trl.__version__}, whose trl.trainer.utils.{NAME} is not ({', '.join(CONTRACT)}): "
            "it knows the head of trl 1.15 and later"
        )
