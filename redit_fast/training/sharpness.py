"""How sharp the objective is along its gradient: the flatness that gradient regularisation is after, measured."""

from __future__ import annotations

import dataclasses
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


def probe(model: PreTrainedModel, batch: Batch, first: Pass, optimizer: rf.RegularizedAdamW) -> dict[str, float]:
    """One more pass at theta + r g1 / |g1|, r = 0.01 |theta| over the perturbed set, whose gradient is in .grad.

    sharpness/curvature: |g - g1| / r, with the Hessian H of the loss about |H g1| / |g1|, at most H's largest absolute
    eigenvalue. sharpness/loss_rise: the loss there less the first pass's. Both for the step's rollouts with the first
    pass's log-probs as the old ones, and of the loss without its KL term, which has a curvature of its own; where there
    is one, g1 takes a pass of its own too. Parameters and gradients end as they were, bit by bit; a copy of the
    perturbed parameters and another gradient, or two, are held meanwhile.
    """
    groups = optimizer.param_groups
    params = [p for group in groups for p in group["params"] if p.grad is not None]
    moved = [p for group in groups if group.get("perturb", True) for p in group["params"] if p.grad is not None]
    kept = before = {p: p.grad for p in params}
    if batch.settings.beta:
        batch = dataclasses.replace(batch, settings=dataclasses.replace(batch.settings, beta=0.0), ref_logp=None)
        model.zero_grad()
        first = batch.backward(model)
        before = {p: p.grad for p in params}
    radius = RADIUS * _norm(moved, local)
    passes = TwoPass(groups, rf.GR(gamma=radius, epsilon=radius, normalized=True), Copies())
    try:
        passes.perturb()  # gamma == epsilon: the first gradient is set aside as it is, not folded
        second = batch.backward(model, first.logp, masks_of=first)
        gap = _norm(moved, lambda p: gradients.of(p).float() - local(before[p]))
    finally:
        passes.restore()
    for p in params:
        p.grad = kept[p]
    loss = batch.ranks.summed(torch.tensor(second.loss, dtype=torch.float64, device="cpu")).item()
    return {"sharpness/curvature": gap / radius, "sharpness/loss_rise": loss - first.loss}


def _norm(params: list[Tensor], tensor_of: Callable[[Tensor], Tensor]) -> float:
    """Of what `tensor_of` gives of each parameter, one at a time, over the ranks that have its pieces."""
    total: shards.Sums = {}
    for p in params:
        for mesh, part in gradients.squares([p], tensor_of).items():
            total[mesh] = total[mesh] + part if mesh in total else part
    return shards.across_ranks(shards.meshes_of(params), params[0].device, [(1, total)])[0].sqrt().item()
