"""Rows as the token losses and the head take them: what a backend in Python asks of its arguments before anything is
launched or written. The C++ backend asks the same in csrc/cpu/bindings.h."""

from __future__ import annotations

import torch
from torch import Tensor

from redit_fast.backends.args import AdvantageInputs, Advantages
from redit_fast.losses.config import LossConfig

IGNORE = -100  # a target that is not scored


def require(of: str, needed: bool, **tensors: Tensor | None) -> None:
    for name, tensor in tensors.items():
        if needed and tensor is None:
            raise ValueError(f"{name} must be given with {of}, got None")


def require_loss_rows(config: LossConfig, ref_logp: Tensor | None, sampling_logp: Tensor | None) -> None:
    require(f"beta={config.beta}", config.beta != 0, ref_logp=ref_logp)
    require(f"correction={config.correction!r}", config.correction != "none", sampling_logp=sampling_logp)


def check_matrix(
    name: str,
    tensor: Tensor | None,
    shape: tuple[int, ...],
    like: Tensor,
    dtype: torch.dtype = torch.float32,
    dense: bool = True,
) -> None:
    """A tensor that is not None: on the device of `like`; dense: each row's elements neighbours, as a kernel reads
    them."""
    if tensor is None:
        return
    strided = dense and tensor.ndim > 0 and tensor.shape[-1] > 1 and tensor.stride(-1) != 1
    if tensor.shape != shape or tensor.dtype != dtype or tensor.device != like.device or strided:
        raise ValueError(
            f"{name} must be {dtype} of shape {shape} on {like.device}{', its rows dense' if dense else ''}, got "
            f"{tensor.dtype} {tuple(tensor.shape)} on {tensor.device} with strides {tensor.stride()}"
        )


def check_rows(count: int, like: Tensor, **rows: Tensor | None) -> None:
    """(count,) float32."""
    for name, tensor in rows.items():
        check_matrix(name, tensor, (count,), like)


def check_advantages(outputs: Advantages, inputs: AdvantageInputs) -> None:
    rewards, groups, _, sample_ids, weights, half_range = inputs
    count, columns = rewards.shape
    for name, output in outputs._asdict().items():
        check_matrix(name, output, (count,), rewards, torch.bool if name == "dead" else torch.float32)
    check_matrix("rewards", rewards, (count, columns), rewards, torch.float64)
    if not rewards.is_contiguous():
        raise ValueError(f"rewards must be contiguous, got strides {rewards.stride()}")
    check_matrix("groups", groups, (count,), rewards, torch.int64)
    check_matrix("sample_ids", sample_ids, (count,), rewards, torch.int64)
    check_matrix("weights", weights, (columns,), weights, torch.float64)
    check_matrix("half_range", half_range, (columns,), weights, torch.float64)


def check_head(
    e: Tensor | None, sums: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor
) -> None:
    """What `exp_product` and `exp_product_grad` have in common; e of any dtype, e, hidden, weight and bias of any
    strides."""
    count, vocabulary = len(hidden), len(weight)
    check_matrix("sums", sums, (3, count), hidden)
    check_matrix("weight", weight, (vocabulary, hidden.shape[1]), hidden, hidden.dtype, dense=False)
    check_matrix("bias", bias, (vocabulary,), hidden, hidden.dtype, dense=False)
    check_matrix("targets", targets, (count,), hidden, torch.int64, dense=False)
    if e is not None:
        check_matrix("e", e, (count, vocabulary), hidden, e.dtype, dense=False)


def check_logits(sums: Tensor | None, grad_logits: Tensor | None, logits: Tensor, targets: Tensor) -> None:
    """What the token losses have in common; logits and their gradient of any strides."""
    check_matrix("sums", sums, (3, len(logits)), logits)
    check_matrix("grad_logits", grad_logits, logits.shape, logits, logits.dtype, dense=False)
    check_matrix("targets", targets, (len(logits),), logits, torch.int64, dense=False)
