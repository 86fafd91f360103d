"""Reference Resets, a baseline of the GR paper (arXiv 2602.18037): every R steps the KL term's reference becomes the
policy."""

from __future__ import annotations

import torch
from torch import nn


@torch.no_grad()
def reset_reference(reference: nn.Module, policy: nn.Module) -> None:
    """Copies the parameters and buffers of `policy` into `reference`, in place: bit by bit where the dtypes are equal,
    else rounded. Neither's requires_grad, mode or tensors change place.

    Call it after the optimizer's step, not between `perturb()` and `step()`, where the policy is not itself.

    Raises:
        ValueError: their names or shapes differ, naming the first that does; nothing is copied then.
    """
    ours, theirs = _tensors(reference), _tensors(policy)
    for name in sorted(ours.keys() ^ theirs.keys()):
        raise ValueError(f"reference and policy must have the same tensors, {name} is only in one of them")
    for name, tensor in ours.items():
        if tensor.shape != theirs[name].shape:
            raise ValueError(
                f"{name} has shape {tuple(tensor.shape)} in reference, {tuple(theirs[name].shape)} in policy"
            )
    for name, tensor in ours.items():
        tensor.copy_(theirs[name])


def _tensors(module: nn.Module) -> dict[str, torch.Tensor]:
    return dict([*module.named_parameters(), *module.named_buffers()])
