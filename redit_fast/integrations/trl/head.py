"""`linear_logp` behind TRL's fused LM head (`trl.trainer.utils.add_fused_lm_head`, TRL's default since 1.15)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import torch
import trl.trainer.utils as utils
from torch import Tensor, nn

from redit_fast.integrations.swapped_forward import SwappedForward, within
from redit_fast.integrations.trl_function import (
    CONTRACT,
    NAME,
    LinearLogpFunction,
    scored_rows,
    sharded_head,
    swapped_head,
)
from redit_fast.losses.config import LossConfig
from redit_fast.ops.linear_loss import linear_grpo_loss
from redit_fast.ops.token_loss import EntropyMode

__all__ = ["CONTRACT", "NAME", "FusedHead", "LinearLogpFunction", "PolicyRows", "swapped_head"]


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

    def __init__(self, rows: PolicyRows, scored: Tensor, head: nn.Linear | None):
        self.rows, self.scored, self.head = rows, scored, head
        self.output: Any = None

    def apply(
        self, hidden, weight, bias, targets, temperature, chunk_size, final_logit_softcapping, logit_scale, outputs
    ) -> tuple[Tensor | None, ...]:
        sequences, length = self.scored.shape
        compact = len(targets) != self.scored.numel()  # TRL passes the scored rows alone, or every one

        def packed(x: Any) -> Any:
            """(B, T), the last T of `length` places -> (N,)"""
            if x is None:
                return None
            x = nn.functional.pad(x, (length - x.shape[1], 0))
            return x[self.scored] if compact else x.flatten()

        lengths = self.scored.sum(1) if compact else self.scored.new_full((sequences,), length, dtype=torch.int64)
        rows = self.rows

        def loss(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
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
            return self.output.loss

        within_head = within(self.head, loss, hidden, weight, bias)
        self.output = self.output._replace(loss=within_head)
        return self.output.logp, self.output.entropy, None, None, None


class FusedHead(SwappedForward):
    """Our head in one model that has TRL's: the swap lasts for the calls of this model's forward."""

    def __init__(self, model: nn.Module, entropy: EntropyMode):
        self._entropy: EntropyMode = entropy
        self.rows: PolicyRows | None = None  # while set, the forward pass computes the policy's loss
        self.output: Any = None
        super().__init__(model)

    def call(self, model: Any, before: Callable, args: tuple, kwargs: dict) -> Any:
        if not kwargs.get("fused_lm_head"):
            return before(*args, **kwargs)
        scored = scored_rows(kwargs)
        with sharded_head(model) as head:
            if self.rows is None:
                with swapped_head(LinearLogpFunction(getattr(utils, NAME), self._entropy, scored, head)):
                    return before(*args, **kwargs)
            function = LinearLossFunction(self.rows, scored, head)
            with swapped_head(function):
                output = before(*args, **kwargs)
        self.output = function.output
        output.loss = function.output.loss  # DistributedDataParallel looks there for the graph
        return output
