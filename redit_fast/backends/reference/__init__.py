"""The reference backend: every primitive in plain PyTorch, the oracle of the others and the fallback on any device."""

import torch

from redit_fast.backends.reference.advantages import group_advantages
from redit_fast.backends.reference.linear_loss import addmm, exp_product, exp_product_grad
from redit_fast.backends.reference.params import adamw, combine, perturb, squared_norm
from redit_fast.backends.reference.token_loss import scale_in_place, token_logp, token_logp_grad, token_loss

__all__ = [
    "adamw",
    "addmm",
    "combine",
    "exp_product",
    "exp_product_grad",
    "group_advantages",
    "perturb",
    "scale_in_place",
    "squared_norm",
    "token_logp",
    "token_logp_grad",
    "token_loss",
    "why_not",
]


def why_not(op: str, device: torch.device) -> str | None:
    return None
