"""How sharp the objective is along its gradient: the flatness that gradient regularisation is after, measured."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import torch
from torch import Tensor
from transformers import PreTrainedModel

import redit_fast as rf
from redit_fast.gr import gradients, shards
from redit_fast.gr.shards import local
from redit_fast.gr.two_pass import Copies, TwoPass
from redit_fast.training.batch import Batch, Pass

RADIUS = 0.01  # of the perturbed weights' norm: in bfloat16 two to three units in the last place, so not lost


def probe(
    model: PreTrainedModel, batch: Batch, first: Pass, optimizer: rf.RegularizedAdamW, group_size: int
) -> dict[str, float]:
    """Two passes more for a step whose gradient is in .grad, of its loss without the KL term, which has a gradient and
    a curvature of its own; where there is one, the gradient of the rest, g1, takes a pass of its own too.

    One is at theta + r g1 / |g1|, r = 0.01 |theta| over the perturbed set. sharpness/curvature: |g - g1| / r, with the
    Hessian H of the loss about |H g1| / |g1|, at most H's largest absolute eigenvalue. sharpness/loss_rise: the loss
    there less the first pass's. Both for the step's rollouts with the first pass's log-probs as the old ones.
    The other is `signal`. Parameters and gradients end as they were, bit by bit; a copy of the perturbed parameters and
    another gradient, or two, are held meanwhile.
    """
    groups = optimizer.param_groups
    params = [p for group in groups for p in group["params"] if p.grad is not None]
    moved = [p for group in groups if group.get("perturb", True) for p in group["params"] if p.grad is not None]
    kept = before = {p: p.grad for p in params}
    has_kl = batch.settings.beta > 0
    if has_kl:
        batch = dataclasses.replace(batch, settings=dataclasses.replace(batch.settings, beta=0.0), ref_logp=None)
    found = signal(model, batch, params, group_size)
    if has_kl:
        model.zero_grad()
        first = batch.backward(model)
        before = {p: p.grad for p in params}
    for p in params:
        p.grad = before[p]
    radius = RADIUS * _norm(moved, local)
    passes = TwoPass(groups, rf.GR(gamma=radius, epsilon=radius, normalized=True), Copies())
    try:
        passes.perturb()  # gamma == epsilon: the first gradient is set aside as it is, not folded
        second = batch.backward(model, first.logp, masks_of=first)
        gap = _norm(moved, lambda p: _piece(p, p.grad) - _piece(p, before[p]))
    finally:
        passes.restore()
    model.zero_grad()  # of what this pass alone has reached too
    for p in params:
        p.grad = kept[p]
    loss = batch.ranks.summed(torch.tensor(second.loss, dtype=torch.float64, device="cpu")).item()
    return {
        "sharpness/curvature": gap / radius,
        "sharpness/loss_rise": loss - first.loss,
        "sharpness/signal": found,
    }


def signal(model: PreTrainedModel, batch: Batch, params: list[Tensor], group_size: int) -> float:
    """The inner product of the gradients of both halves of a batch's groups, each half's loss by its own normalizer,
    over the mean square of the advantages. Noise of sampling is independent in the two, so this is what |gradient|^2 of
    all the data would be at advantages of size 1: without noise, which the square of one batch's gradient has added.
    Below 0 where noise outweighs it; NaN for one group, or where all advantages are 0. Leaves the second half's
    gradient."""
    size, middle = batch.advantages.double().square().mean().item(), len(batch.prompts) // group_size // 2 * group_size
    if not middle or not size:
        return math.nan
    halves = []
    for samples in (range(middle), range(middle, len(batch.prompts))):
        model.zero_grad()
        batch.part(samples).backward(model)
        halves.append({p: _piece(p, p.grad) for p in params})
    one, other = halves
    together = _norm(params, lambda p: one[p] + other[p])
    apart = _norm(params, lambda p: one[p] - other[p])
    return (together**2 - apart**2) / 4 / size


def _piece(p: Tensor, grad: Tensor | None) -> Tensor:
    """This rank's, in float32; 0 of a parameter that a pass has not reached, such as an expert's."""
    return local(torch.zeros_like(p) if grad is None else grad).float()


def _norm(params: list[Tensor], tensor_of: Callable[[Tensor], Tensor]) -> float:
    """Of what `tensor_of` gives of each parameter, one at a time, over the ranks that have its pieces."""
    total: shards.Sums = {}
    for p in params:
        for mesh, part in gradients.squares([p], tensor_of).items():
            total[mesh] = total[mesh] + part if mesh in total else part
    return shards.across_ranks(shards.meshes_of(params), params[0].device, [(1, total)])[0].sqrt().item()
