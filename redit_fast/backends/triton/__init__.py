"""The Triton backend: kernels/, compiled at first use. TRITON_INTERPRET=1, set before the first import, runs them on
CPU tensors, one program after the other."""

import torch

try:
    from redit_fast.backends.triton.advantages import group_advantages
    from redit_fast.backends.triton.linear_loss import addmm, exp_product, exp_product_grad
    from redit_fast.backends.triton.params import adamw, combine, perturb, squared_norm
    from redit_fast.backends.triton.token_loss import scale_in_place, token_logp, token_logp_grad, token_loss
    from redit_fast.kernels.launch import INTERPRETED

    missing = None
except ImportError as error:
    missing = f"Triton does not load ({error}); run `pip install triton`"

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
    if missing:
        return missing
    if INTERPRETED and device.type != "cpu":
        return f"computes on CPU tensors only while TRITON_INTERPRET is set, got {device}; run `unset TRITON_INTERPRET`"
    if not INTERPRETED and device.type != "cuda":
        return f"computes on CUDA tensors, and on CPU tensors under TRITON_INTERPRET=1 only, got {device}"
    return None
