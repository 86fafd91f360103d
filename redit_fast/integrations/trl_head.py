"""`linear_logp` behind TRL's fused LM head (`trl.trainer.utils.add_fused_lm_head`, TRL's default since 1.15)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import NamedTuple

import torch
import trl.trainer.utils as utils
from torch import Tensor, nn

from redit_fast.apply import SwappedForward
from redit_fast.linear import linear_grpo_loss, linear_logp
from redit_fast.logprob import IGNORE, EntropyMode
from redit_fast.loss_config import LossConfig
from redit_fast.losses import LossOutput

NAME = "_ChunkedLogProbFunction"  # in trl.trainer.utils: what TRL's fused forward calls
CONTRACT = ["ctx", "hidden", "weight", "bias", "targets", "temperature", "chunk_size", "final_logit_softcapping",
            "logit_scale", "outputs"]  # fmt: skip
OURS = {"log_probs", "entropy"}


class LinearLogpFunction:
    """With the contract of TRL's ChunkedLogProbFunction. A call that asks for more than log-probs and entropy goes to
    TRL's own. `scored`, of as many elements as there are targets, says which rows TRL reads; elsewhere it sets 0."""

    def __init__(self, theirs: type, entropy: EntropyMode, scored: Tensor | None = None):
        self.theirs, self.entropy, self.scored = theirs, entropy, scored

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
        """hidden (N, D), weight (V, D), bias (V,), targets (N,) -> log-probs and entropy (N,) float32, and three None.
        chunk_size counts columns of the vocabulary, which `linear_logp` does not chunk by."""
        if not OURS.issuperset(outputs):
            return self.theirs.apply(hidden, weight, bias, targets, temperature, chunk_size, final_logit_softcapping,
                                     logit_scale, outputs)  # fmt: skip
        found = linear_logp(
            hidden,
            weight.to(hidden.dtype),
            targets,
            bias=None if bias is None else bias.to(hidden.dtype),
            temperature=temperature,
            logit_scale=logit_scale,
            softcap=final_logit_softcapping,
            mask=None if self.scored is None or self.scored.numel() != len(targets) else self.scored.flatten(),
            entropy=self.entropy if "entropy" in outputs else "none",
        )
        logp, entropy = found if "entropy" in outputs else (found, None)
        return logp, entropy, None, None, None


class PolicyRows(NamedTuple):
    """What a token-level loss needs beside the model: (B, T), of the completions."""

    config: LossConfig
    advantages: Tensor
    old_logp: Tensor | None
    ref_logp: Tensor | None
    mask: Tensor
    normalizer: Tensor


class LinearLossFunction:
    """The same contract for the policy's loss: `linear_grpo_loss`, of which `output` is left behind."""

    def __init__(self, rows: PolicyRows, scored: Tensor):
        self.rows, self.scored, self.output = rows, scored, None

    def apply(
        self, hidden, weight, bias, targets, temperature, chunk_size, final_logit_softcapping, logit_scale, outputs
    ) -> tuple[Tensor | None, ...]:
        sequences, length = self.scored.shape
        compact = len(targets) != self.scored.numel()  # TRL passes the scored rows alone, or every one

        def packed(x: Tensor | None) -> Tensor | None:
            """(B, T), the last T of `length` places -> (N,)"""
            if x is None:
                return None
            x = nn.functional.pad(x, (length - x.shape[1], 0))
            return x[self.scored] if compact else x.flatten()

        lengths = self.scored.sum(1) if compact else self.scored.new_full((sequences,), length, dtype=torch.int64)
        rows = self.rows
        self.output = linear_grpo_loss(
            hidden,
            weight.to(hidden.dtype),
            targets,
            packed(rows.advantages),
            bias=None if bias is None else bias.to(hidden.dtype),
            old_logp=packed(rows.old_logp),
            ref_logp=packed(rows.ref_logp),
            mask=packed(rows.mask),
            cu_seqlens=nn.functional.pad(lengths.cumsum(0), (1, 0)),
            normalizer=rows.normalizer,
            config=replace(
                rows.config, temperature=temperature, logit_scale=logit_scale, softcap=final_logit_softcapping
            ),
        )
        return self.output.logp, self.output.entropy, None, None, None


@contextmanager
def swapped_head(function: LinearLogpFunction | LinearLossFunction) -> Iterator[None]:
    """TRL's head function is ours inside the block."""
    theirs = getattr(utils, NAME)
    setattr(utils, NAME, function)
    try:
        yield
    finally:
        setattr(utils, NAME, theirs)


class FusedHead(SwappedForward):
    """Our head in one model that has TRL's: the swap lasts for the calls of this model's forward."""

    def __init__(self, model: nn.Module, entropy: EntropyMode):
        self._entropy: EntropyMode = entropy
        self.rows: PolicyRows | None = None  # while set, the forward pass computes the policy's loss
        self.output: LossOutput | None = None
        super().__init__(model)

    def call(self, model: nn.Module, before: Callable, args: tuple, kwargs: dict) -> object:
        if not kwargs.get("fused_lm_head"):
            return before(*args, **kwargs)
        shifted = kwargs.get("shift_labels")
        scored = (kwargs["labels"][:, 1:] if shifted is None else shifted) != IGNORE
        if self.rows is None:
            with swapped_head(LinearLogpFunction(getattr(utils, NAME), self._entropy, scored)):
                return before(*args, **kwargs)
        function = LinearLossFunction(self.rows, scored)
        with swapped_head(function):
            output = before(*args, **kwargs)
        self.output = function.output
        output.loss = function.output.loss  # DistributedDataParallel looks there for the graph
        return output
