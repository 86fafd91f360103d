"""Passes over parameters: lists of tensors in, scalars stay on the device."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from redit_fast.backends.args import Rounding
from redit_fast.backends.lists import check_like, check_lists
from redit_fast.noise import rounding_halves


def squared_norm(out: Tensor, tensors: list[Tensor]) -> None:
    """out () float64 = sum of the squares of all elements, in the order of the tensors."""
    check_lists(tensors=tensors)
    out.zero_()
    for tensor in tensors:
        out += tensor.to(torch.promote_types(tensor.dtype, torch.float32)).square().sum(dtype=torch.float64)


def _round_stochastically(x: Tensor, dtype: torch.dtype, halves: Tensor) -> Tensor:
    """x float32 -> dtype, up with the probability of its dropped bits: 16 for bfloat16, 13 for float16."""
    dropped = 16 if dtype == torch.bfloat16 else 13
    keep = -(1 << dropped)
    bits = (x.view(torch.int32).long() + (halves & ~keep).view_as(x)) & keep
    rounded = bits.to(torch.int32).view(torch.float32)
    return torch.where(torch.isfinite(x), rounded, x).to(dtype)


def perturb(
    sums: Tensor,
    params: list[Tensor],
    grads: list[Tensor],
    offsets: list[int],
    scale: Tensor,
    grad_factor: float,
    rounding: Rounding,
    seed: int,
    step: Tensor,
    compute_dtype: torch.dtype | None,
) -> None:
    """params += scale * grads, rounded once, then grads *= grad_factor; a scale of 0 changes neither.

    sums (4,) float64 = <applied, intended>, |applied|^2, |intended|^2 and the number of weights moved, `applied` being
    the change that the forward pass sees in compute_dtype (None: the parameter's own). offsets are each tensor's first
    element in the concatenation of all trainable parameters, which places it in the counter of the stochastic rounding.
    """
    check_lists(params=params, grads=grads, offsets=offsets)
    check_like("grads", grads, params, wide=False)
    sums.zero_()
    factor = torch.where(scale == 0, torch.ones_like(scale), grad_factor)
    for param, grad, offset in zip(params, grads, offsets, strict=True):
        wide = torch.promote_types(param.dtype, torch.float32)
        intended = torch.where(scale == 0, 0.0, scale.to(wide) * grad.to(wide))  # 0 also where g1 holds NaN
        moved = param.to(wide) + intended
        if rounding == "stochastic" and param.dtype in (torch.bfloat16, torch.float16):
            halves = rounding_halves(seed, offset, param.numel(), step, param.device)
            moved = _round_stochastically(moved.contiguous(), param.dtype, halves)
        else:
            moved = moved.to(param.dtype)
        seen = compute_dtype or param.dtype
        applied = (moved.to(seen).to(wide) - param.to(seen).to(wide)).double()
        intended = intended.double()
        sums += torch.stack(
            [(applied * intended).sum(), applied.square().sum(), intended.square().sum(), (applied != 0).sum().double()]
        )
        param.copy_(moved)
        if grad_factor != 1:
            wide = torch.promote_types(grad.dtype, torch.float32)
            grad.copy_(grad.to(wide) * factor.to(wide))


def combine(sums: Tensor, firsts: list[Tensor], grads: list[Tensor], ratio: float) -> None:
    """grads = (1 - ratio) * firsts + ratio * grads, rounded once.

    sums (3,) float64 = |old grads|^2, |old grads - firsts|^2, |grads|^2.
    """
    check_lists(grads=grads, firsts=firsts)
    check_like("firsts", firsts, grads, wide=False)
    sums.zero_()
    for first, grad in zip(firsts, grads, strict=True):
        wide = torch.promote_types(grad.dtype, torch.float32)
        combined = ((1 - ratio) * first.to(wide) + ratio * grad.to(wide)).to(grad.dtype)
        gap = grad.to(wide) - first.to(wide)
        sums += torch.stack([x.double().square().sum() for x in (grad, gap, combined)])
        grad.copy_(combined)


def adamw(
    params: list[Tensor],
    masters: list[Tensor | None],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    steps: list[Tensor],
    factor: Tensor,
    finite: Tensor,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
) -> None:
    """One AdamW step (torch.optim.AdamW's order of operations) with gradients factor * grads, on the float32 master
    where there is one; params = nearest(master). Where `finite` () is false nothing changes but params, which become
    the master again."""
    lists: dict[str, Sequence[Tensor | None]] = {
        "grads": grads,
        "masters": masters,
        "exp_avgs": exp_avgs,
        "exp_avg_sqs": exp_avg_sqs,
    }
    check_lists(optional="masters", params=params, steps=steps, **lists)
    for name, tensors in lists.items():
        check_like(name, tensors, params, wide=False)
    for param, master, grad, m, v, step in zip(params, masters, grads, exp_avgs, exp_avg_sqs, steps, strict=True):
        weights = param if master is None else master
        g = grad.to(weights.dtype) * factor.to(weights.dtype)
        new_step = (step + 1).double()
        new_m = torch.lerp(m, g, 1 - beta1)
        new_v = (v * beta2).addcmul(g, g, value=1 - beta2)
        denominator = new_v.sqrt() / (1 - beta2**new_step).sqrt() + eps
        update = new_m * -(lr / (1 - beta1**new_step)) / denominator
        for old, new in (
            (m, new_m),
            (v, new_v),
            (weights, weights * (1 - lr * weight_decay) + update),
            (step, step + 1),
        ):
            old.copy_(torch.where(finite, new, old))
        if master is not None:
            param.copy_(master)
