"""The C++ backend, csrc/: every primitive on CPU tensors."""

import torch

from redit_fast.backends.cpu.advantages import group_advantages
from redit_fast.backends.cpu.linear_loss import addmm, exp_product, exp_product_grad
from redit_fast.backends.cpu.module import instruction_sets, missing, use_instruction_set
from redit_fast.backends.cpu.params import adamw, combine, perturb, squared_norm
from redit_fast.backends.cpu.token_loss import scale_in_place, token_logp, token_logp_grad, token_loss

__all__ = [
    "adamw",
    "addmm",
    "combine",
    "exp_product",
    "exp_product_grad",
    "group_advantages",
    "instruction_sets",
    "perturb",
    "scale_in_place",
    "squared_norm",
    "token_logp",
    "token_logp_grad",
    "token_loss",
    "use_instruction_set",
    "why_not",
]


def why_not(op: str, device: torch.device) -> str | None:
    if device.type != "cpu":
        return f"computes on CPU tensors only, got {device}"
    return missing
