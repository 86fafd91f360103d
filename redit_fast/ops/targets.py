"""Targets and what they select from: checked once, for logits and for hidden states."""

from __future__ import annotations

import torch
from torch import Tensor

from redit_fast.backends.rows import IGNORE
from redit_fast.checks import check_flag, check_tensor, described


def check_targets(
    name: str, source: Tensor, targets: Tensor, mask: Tensor | None, vocabulary: int | None, validate: bool
) -> Tensor:
    """Checks `source` (..., V), or (..., D) of a head with a `vocabulary`, against targets and mask (...); the targets
    flat, int64, -100 where masked."""
    check_tensor(name, source, "floating-point")
    if source.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise TypeError(f"{name} must be float32, bfloat16 or float16, got {described(source)}")
    check_tensor("targets", targets, "integer")
    if mask is not None:
        check_tensor("mask", mask, "real")
    check_flag("validate", validate)
    if vocabulary is None:
        vocabulary = source.shape[-1] if source.ndim else 0
        if vocabulary == 0:
            raise ValueError(f"{name} must have shape (..., V) with V at least 1, got {tuple(source.shape)}")
    if source.ndim < 1 or source.shape[:-1] != targets.shape:
        raise ValueError(
            f"targets must have the shape of {name} without its last dimension, {tuple(source.shape[:-1])}, "
            f"got {tuple(targets.shape)}"
        )
    for other, tensor in (("targets", targets), ("mask", mask)):
        if tensor is not None and tensor.device != source.device:
            raise TypeError(f"{other} must be on {source.device} like {name}, got {described(tensor)}")
    flat = targets.reshape(-1).long()
    if not torch.compiler.is_compiling() and flat.is_inference() and torch.is_grad_enabled():
        flat = flat.clone()  # autograd saves no tensor of a rollout under torch.inference_mode
    if mask is not None:
        if mask.shape != targets.shape:
            raise ValueError(f"mask must have shape {tuple(targets.shape)}, got {tuple(mask.shape)}")
        flat = torch.where((mask != 0).reshape(-1), flat, IGNORE)
    if validate:
        stray = torch.nonzero((flat != IGNORE) & ((flat < 0) | (flat >= vocabulary)))
        if len(stray):
            where = tuple(int(i) for i in torch.unravel_index(stray[0, 0], targets.shape))
            raise ValueError(
                f"targets must be in [0, {vocabulary}) or -100, got {flat[stray[0, 0]]} at position {where}"
            )
    return flat
