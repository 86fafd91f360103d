"""The CUDA backend, csrc/cuda/: built where nvcc is, for tensors on a GPU."""

import torch

from redit_fast.backends.cuda import module
from redit_fast.backends.cuda.advantages import group_advantages
from redit_fast.backends.cuda.linear_loss import addmm, exp_product, exp_product_grad
from redit_fast.backends.cuda.params import adamw, combine, perturb, squared_norm
from redit_fast.backends.cuda.token_loss import scale_in_place, token_logp, token_logp_grad, token_loss

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
    if module.missing:
        return module.missing
    if module.interpreted():
        if device.type != "cpu":
            sentence = "computes on CPU tensors only while REDIT_FAST_CUDA_INTERPRET is set"
            return f"{sentence}, got {device}; run `unset REDIT_FAST_CUDA_INTERPRET`"
        if module.run_launches is None:
            return (
                "REDIT_FAST_CUDA_INTERPRET is set and no interpreter is; tests/ptx has one, which the tests set; run "
                "`unset REDIT_FAST_CUDA_INTERPRET`"
            )
        return None
    if device.type != "cuda":
        return f"computes on CUDA tensors only, got {device}"
    index = device.index
    if index is None:  # torch's current one; its build without CUDA has none
        index = torch.cuda.current_device() if torch.cuda.is_available() else 0
    return module.why_no_kernels(index)
