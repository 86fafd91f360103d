"""Reference Resets, which the GR paper compares with."""

from __future__ import annotations

import torch
from torch import nn

from redit_fast.checks import check_module
from redit_fast.gr import shards


@torch.no_grad()
def reset_reference(reference: nn.Module, policy: nn.Module) -> None:
    """reference <- policy, parameters and buffers, in place and each in its own dtype: call it every R optimizer steps
    (Reference Resets, arXiv 2602.18037: R = 200, with a larger KL coefficient than without), between steps.

    Raises:
        ValueError, TypeError: no module, or the two differ in names, shapes or placements (FSDP2: shard both alike);
            nothing is written.
    """
    for name, model in (("reference", reference), ("policy", policy)):
        check_module(name, model)
        shards.drop_gathered_of(model)
    theirs, ours = ({**dict(m.named_parameters()), **dict(m.named_buffers())} for m in (reference, policy))
    if theirs.keys() != ours.keys():
        odd = sorted(theirs.keys() ^ ours.keys())
        raise ValueError(
            f"reference and policy must have the same parameter names, got {len(odd)} in one of them only, "
            f"{odd[0]!r} first: pass the bare models, without wrappers or adapters"
        )
    for name, target in theirs.items():
        places = [getattr(tensor, "placements", None) for tensor in (target, ours[name])]
        if target.shape != ours[name].shape or places[0] != places[1]:
            raise ValueError(
                f"{name} is {tuple(target.shape)} {places[0] or ''} in the reference and {tuple(ours[name].shape)} "
                f"{places[1] or ''} in the policy: they must be alike"
            )
    for name, target in theirs.items():
        shards.local(target).copy_(shards.local(ours[name]))
    torch.clear_autocast_cache()
