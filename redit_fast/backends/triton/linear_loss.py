"""The head; kernels/linear_loss.py."""

from __future__ import annotations

from torch import Tensor
from torch.autograd.graph import increment_version

from redit_fast.backends.rows import check_head, check_rows, require
from redit_fast.kernels import linear_loss as kernels
from redit_fast.losses.transforms import LogitTransform, TransformConstants


def exp_product(
    e: Tensor | None,
    logp: Tensor,
    entropy: Tensor | None,
    sums: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    transform: LogitTransform,
) -> None:
    """As `reference.exp_product`; logp and entropy contiguous, so are the rows of sums."""
    check_head(e, sums, hidden, weight, bias, targets)
    check_rows(len(hidden), hidden, logp=logp, entropy=entropy)
    outputs, inputs = (e, logp, entropy, sums), (hidden, weight, bias, targets.contiguous())
    kernels.exp_product(*outputs, *inputs, TransformConstants.of(transform))
    increment_version([x for x in outputs if x is not None])


def exp_product_grad(
    e: Tensor,
    sums: Tensor,
    entropy: Tensor | None,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    transform: LogitTransform,
    grad_logp: Tensor,
    grad_entropy: Tensor | None,
) -> None:
    """As `reference.exp_product_grad`; entropy and the gradients contiguous, so are the rows of sums."""
    require("grad_entropy", grad_entropy is not None, entropy=entropy)
    check_head(e, sums, hidden, weight, bias, targets)
    check_rows(len(hidden), hidden, entropy=entropy, grad_logp=grad_logp, grad_entropy=grad_entropy)
    inputs = hidden, weight, bias, targets.contiguous(), grad_logp, grad_entropy
    kernels.exp_product_grad(e, sums, entropy, *inputs, TransformConstants.of(transform))
    increment_version(e)


def addmm(out: Tensor, a: Tensor, b: Tensor) -> None:
    """As `reference.addmm`, by cuBLAS."""
    kernels.addmm(out, a, b)
    increment_version(out)
