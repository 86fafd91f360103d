"""A step with PrefixGrouper's attention, in which a prompt is computed once for its completions: its tutorial's loop.

The attention that its package registers in transformers is for flash-attn: SDPA takes masks of another shape. Its
tutorial has the user write the adapter; here that is to SDPA, with the causal mask that flash-attn makes by itself. It
samples nothing, so that it has no rollout, and has no GR.
"""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .measure import Absent
from .step_cases import END, GROUP, MAX_NORM, Batch, Pass2, advantages, batches
from .step_hosts import LR, Phases, Settings, start_of

ATTENTION = "prefix_grouper_sdpa"


def sdpa(q: Tensor, k: Tensor, v: Tensor, real: Tensor, *, scaling: float) -> Tensor:
    """The adapter: heads (B, H, T, D), `real` keys (B, S), of which the last T are the queries' own."""
    causal = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril(k.shape[2] - q.shape[2])
    allowed = real[:, None, None] & causal
    return F.scaled_dot_product_attention(q, k, v, allowed, scale=scaling, enable_gqa=True).transpose(1, 2)


def attention(module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any, *, prefix_grouper: Any, scaling: float,
              **_: Any) -> tuple[Tensor, None]:  # fmt: skip
    return prefix_grouper.forward(sdpa, q, k, v, scaling=scaling), None


def padded(rows: list[list[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """(N, longest) on the right, and where they are."""
    lengths = torch.tensor([len(row) for row in rows])
    ids = torch.full((len(rows), int(lengths.max())), END)
    real = torch.arange(ids.shape[1]) < lengths[:, None]
    ids[real] = torch.tensor([token for row in rows for token in row])
    return ids.to(device), real.to(device)


class PrefixGrouper:
    """A micro-batch is whole groups: as many samples as in TRL and verl."""

    pass2: Pass2 = "fresh"

    @staticmethod
    def load() -> None:
        if not find_spec("prefix_grouper"):
            raise Absent("prefix_grouper is not installed: pip install 'redit-fast[bench]'")
        for name in ("transformers.models.qwen2.modeling_qwen2", "prefix_grouper"):
            import_module(name)

    def __init__(self, settings: Settings):
        from transformers import AttentionInterface

        AttentionInterface.register(ATTENTION, attention)
        self.case, device = settings.case, torch.device(settings.device)
        self.model = start_of(self.case).to(device, getattr(torch, settings.dtype))
        self.reference = start_of(self.case, "reference").to(device, self.model.dtype) if self.case.beta else None
        for model in (self.model, self.reference):
            if model is not None:
                model.set_attn_implementation(ATTENTION)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=LR, weight_decay=0.0)
        self.batches = batches(self.case)
        self.found: dict[tuple[int, ...], Tensor] = {}

    def step(self, turn: int, phases: Phases, rollout: bool) -> None:
        batch, groups = self.batches[turn % 2], self.case.micro_batch // GROUP
        self.found.clear()
        with phases("scoring"):
            values = advantages(batch.rewards).float().to(self.model.device)
            parts = []
            for start in range(0, len(batch.prompts), groups):
                samples = slice(start * GROUP, (start + groups) * GROUP)
                part = Batch(batch.prompts[start : start + groups], batch.completions[samples], values[samples])
                with torch.no_grad():
                    ref_logp = self._logp(self.reference, part)[0] if self.reference is not None else None
                parts.append((part, ref_logp))
        with phases("update"):
            for part, ref_logp in parts:
                logp, real = self._logp(self.model, part)
                loss = -part.rewards[:, None] * (logp - logp.detach()).exp()
                if ref_logp is not None:
                    loss = loss + self.case.beta * ((ref_logp - logp).exp() - (ref_logp - logp) - 1)
                (loss[real].sum() / self.case.scored).backward()
                for tokens, own in zip(part.completions, logp.detach(), strict=True):
                    self.found[tuple(tokens)] = own[: len(tokens)]
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), MAX_NORM)
            self.optimizer.step()
            self.optimizer.zero_grad()

    def _logp(self, model: Any, batch: Batch) -> tuple[Tensor, Tensor]:
        """(N, longest completion) and where they are: rows of a prompt and all of its completions."""
        from prefix_grouper import PrefixGrouper

        prompts, prompt_mask = padded(batch.prompts, model.device)
        completions, mask = padded(batch.completions, model.device)
        grouper = PrefixGrouper.from_ungrouped_masks(prompt_mask, mask, GROUP, device=model.device)
        ids = grouper.concat_input(prompts, prompt_mask, completions, mask)
        positions = torch.zeros_like(ids)
        for row, info in zip(positions, grouper.group_info, strict=True):
            starts = [torch.arange(info.prefix_len), *(info.prefix_len + torch.arange(n) for n in info.suffix_lens)]
            row[: info.total_len] = torch.cat(starts)
        logits = model(ids, position_ids=positions, prefix_grouper=grouper, use_cache=False).logits
        own, real = grouper.split_output(logits, include_prefix_last=1)[2:]
        logits, real = own[:, :-1], real[:, 1:]
        return logits.gather(2, completions[..., None])[..., 0] - logits.logsumexp(-1), real

    def logp(self) -> dict[tuple[int, ...], Tensor]:
        return self.found
