"""What a loss reads, checked and flattened: rows of tokens, padded or packed, and the sequences they form."""

from __future__ import annotations

import math
from dataclasses import replace
from numbers import Real
from typing import Any, NamedTuple

import torch
from torch import Tensor

from redit_fast.checks import as_float, check_seed, check_step, check_tensor, described, in_float32
from redit_fast.losses.config import LossConfig, Route, denominator_of


class Layout:
    """Rows as sequences: padded (..., T), packed with cu_seqlens (S + 1,), or one 1-D sequence."""

    def __init__(self, shape: torch.Size, device: torch.device, cu_seqlens: Tensor | None):
        if cu_seqlens is None:
            if not shape:
                raise ValueError("targets must have at least one dimension, the tokens of a sequence, got shape ()")
            self.lengths, self.length = None, shape[-1]
            self.count = math.prod(shape[:-1])
        else:
            check_tensor("cu_seqlens", cu_seqlens, "integer")
            if len(shape) != 1:
                raise ValueError(f"cu_seqlens goes with packed rows of shape (R,), got {tuple(shape)}")
            if cu_seqlens.ndim != 1 or len(cu_seqlens) < 1 or cu_seqlens.device != device:
                raise ValueError(f"cu_seqlens must have shape (S + 1,) on {device}, got {described(cu_seqlens)}")
            self.lengths, self.count = cu_seqlens.long().diff(), len(cu_seqlens) - 1
            if _readable(cu_seqlens):
                wrong = (cu_seqlens[0] != 0) | (cu_seqlens[-1] != shape[0]) | (self.lengths < 0).any()
                if wrong:  # a GPU is waited for once
                    raise ValueError(
                        f"cu_seqlens must rise from 0 to the {shape[0]} rows, got {cu_seqlens.tolist()[:8]}..."
                    )
        self.rows = math.prod(shape)

    def sum(self, rows: Tensor) -> Tensor:
        """(R,) -> (S,) float32, in a fixed order."""
        if self.lengths is None:
            return rows.view(self.count, self.length).sum(-1)
        return torch.segment_reduce(rows, "sum", lengths=self.lengths, unsafe=True, initial=0.0)

    def spread(self, sequences: Tensor) -> Tensor:
        """(S,) -> (R,)"""
        if self.lengths is None:
            return sequences[:, None].expand(self.count, self.length).reshape(-1)
        return sequences.repeat_interleave(self.lengths, output_size=self.rows)


class LossOutput(NamedTuple):
    loss: Tensor  # 0-d float32
    logp: Tensor  # (...) float32; detached in the fused losses
    entropy: Tensor | None  # (...) float32, detached in the fused losses
    metrics: dict[str, Tensor]  # 0-d, on the device, without graph
    route: Route


class Rows(NamedTuple):
    """Everything a loss reads beside the log-probs, flat: (R,) float32 without graph; masked rows hold zeros."""

    config: LossConfig  # of this call: without an optional correction that lacks its sampling_logp
    layout: Layout
    mask: Tensor  # bool
    advantages: Tensor
    old_logp: Tensor | None
    ref_logp: Tensor | None
    sampling_logp: Tensor | None
    step: int
    seed: int
    masks_of: tuple[Tensor, Tensor | None] | None  # logp and entropy that masks are chosen by; None: the call's own

    @classmethod
    def check(
        cls,
        logp: Tensor,
        advantages: Tensor,
        old_logp: Tensor | None,
        ref_logp: Tensor | None,
        sampling_logp: Tensor | None,
        mask: Tensor | None,
        cu_seqlens: Tensor | None,
        config: LossConfig,
        normalizer: float | Tensor | None,
        step: int,
        seed: int,
        masks_of: LossOutput | None = None,
    ) -> Rows:
        """Checks the arguments of a loss against the shape and device of `logp` (or of the targets) and flattens
        them."""
        if not isinstance(config, LossConfig):
            raise TypeError(f"config must be a LossConfig, got {described(config)}")
        if masks_of is not None and not isinstance(masks_of, LossOutput):
            raise TypeError(f"masks_of must be the LossOutput of the first pass, got {described(masks_of)}")
        choosing: tuple[Any, Any] = (None, None) if masks_of is None else (masks_of.logp, masks_of.entropy)
        layout = Layout(logp.shape, logp.device, cu_seqlens)
        tensors: tuple[tuple[str, Any, Any, bool], ...] = (
            ("advantages", advantages, "real", True),
            ("old_logp", old_logp, "floating-point", False),
            ("ref_logp", ref_logp, "floating-point", False),
            ("sampling_logp", sampling_logp, "floating-point", False),
            ("masks_of.logp", choosing[0], "floating-point", masks_of is not None),
            ("masks_of.entropy", choosing[1], "floating-point", False),
            ("mask", mask, "real", False),
        )
        for name, tensor, kind, required in tensors:
            if tensor is None and not required:
                continue
            check_tensor(name, tensor, kind)
            if tensor.device != logp.device:
                raise TypeError(f"{name} must be on {logp.device}, got {described(tensor)}")
            per_sequence = name == "advantages" and tensor.shape == (layout.count,)
            if tensor.shape != logp.shape and not per_sequence:
                also = f" or ({layout.count},)" if name == "advantages" else ""
                raise ValueError(f"{name} must have shape {tuple(logp.shape)}{also}, got {tuple(tensor.shape)}")
        if config.beta != 0 and ref_logp is None:
            raise ValueError(f"ref_logp is required by beta={config.beta}")
        if config.correction != "none" and sampling_logp is None:
            if not config._correction_optional:
                raise ValueError(f"sampling_logp is required by correction={config.correction!r}")
            config = replace(config, correction="none")
        if config.denominator == "length" and config.max_completion_length is None and normalizer is None:
            raise ValueError(
                f"loss_type={config.loss_type!r} needs max_completion_length in its config or a normalizer"
            )
        if masks_of is not None and masks_of.entropy is None and config.top_entropy_quantile != 1:
            raise ValueError(f"masks_of needs its entropy with top_entropy_quantile={config.top_entropy_quantile}")
        step, seed = check_step(step), check_seed(seed)
        scored = (
            (mask != 0).reshape(-1)
            if mask is not None
            else torch.ones(layout.rows, dtype=torch.bool, device=logp.device)
        )
        _check_normalizer(normalizer, scored)

        def flat(tensor: Tensor | None, wanted: bool = True) -> Any:
            if tensor is None or not wanted:
                return None
            return torch.where(scored, tensor.detach().reshape(-1).float(), 0.0)

        if advantages.shape != logp.shape:
            advantages = layout.spread(advantages).view(logp.shape)
        return cls(
            config,
            layout,
            scored,
            flat(advantages),
            flat(old_logp),
            flat(ref_logp, config.beta != 0),
            flat(sampling_logp, config.correction != "none" or config.off_policy_mask_threshold is not None),
            step,
            seed,
            None if masks_of is None else (flat(choosing[0]), flat(choosing[1])),
        )

    def weights(self, normalizer: float | Tensor | None) -> Tensor:
        """(R,) float32: the factor of each row's loss in the whole loss; 0 where masked."""
        config, weights = self.config, self.mask.float()
        tokens: Any = weights.sum().clamp(min=1) if config.denominator == "tokens" else 0.0
        default = denominator_of(config, self.layout.count, tokens)
        if config.denominator == "sequences" and config.loss_type != "luspo":
            weights = weights / self.layout.spread(self.layout.sum(weights).clamp(min=1))
        if normalizer is None:
            return weights / default
        normalizer = normalizer if isinstance(normalizer, Tensor) else as_float(normalizer)
        return torch.where(self.mask, weights / normalizer, 0.0)  # without scored tokens a normalizer may be 0

    def mean(self, values: Tensor) -> Tensor:
        """() over the scored tokens; 0 without any."""
        return torch.where(self.mask, values, 0.0).sum() / self.mask.sum().clamp(min=1)

    def sequence_sum(self, values: Tensor) -> Tensor:
        """(R,): at each row the sum over the scored tokens of its sequence."""
        return self.layout.spread(self.layout.sum(torch.where(self.mask, values, 0.0)))

    def sequence_means(self, values: Tensor, kept: Tensor) -> Tensor:
        """(S,) over the tokens of `kept`; 0 without any."""
        return self.layout.sum(torch.where(kept, values, 0.0)) / self.layout.sum(kept.float()).clamp(min=1)

    def sequence_mean(self, values: Tensor, kept: Tensor | None = None) -> Tensor:
        """(R,): at each row the mean over the tokens of `kept` (the scored ones) of its sequence."""
        return self.layout.spread(self.sequence_means(values, self.mask if kept is None else kept))


def _readable(tensor: Tensor) -> bool:
    """Whether to ask for values: the host would wait for a GPU, and a graph cannot ask."""
    return tensor.device.type == "cpu" and not torch.compiler.is_compiling()


def _check_normalizer(normalizer: float | Tensor | None, scored: Tensor) -> None:
    """A number or 0-d tensor, above 0 where any token is scored."""
    if normalizer is None:
        return
    if isinstance(normalizer, Tensor):
        check_tensor("normalizer", normalizer, "real")
        if normalizer.ndim != 0 or normalizer.dtype == torch.bool:
            raise ValueError(f"normalizer must be a number or a 0-d tensor of one, got {described(normalizer)}")
        if normalizer.device.type != "cpu" and normalizer.device != scored.device:
            raise ValueError(f"normalizer must be on {scored.device} or the CPU, got {described(normalizer)}")
    elif isinstance(normalizer, bool) or not isinstance(normalizer, Real):
        raise TypeError(f"normalizer must be a number or a 0-d tensor, got {described(normalizer)}")
    if _readable(scored):
        value = normalizer.item() if isinstance(normalizer, Tensor) else normalizer
        number = in_float32(as_float(value))
        if not 0 < number < math.inf and scored.any():
            raise ValueError(
                f"normalizer must be finite and above 0 where tokens are scored, got {described(value)}, "
                f"in float32 {number}"
            )
