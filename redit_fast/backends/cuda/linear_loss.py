"""The head; csrc/cuda/linear_loss.cu around products by cuBLAS, through torch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from redit_fast.backends.cuda.module import compiled, run, view, views
from redit_fast.backends.rows import check_head, check_rows, require
from redit_fast.losses.transforms import LogitTransform, TransformConstants

PART = 256  # columns of a partial sum: csrc/cuda/linear_loss.h


def tile_columns(vocabulary: int, width: int) -> int:
    """A tile of about 16 MB of logits where the chunk of E, of `width` bytes an element, is 256 MB: it stays in the L2
    cache until its exponentials have read it."""
    return 1 << min(12, max(10, (vocabulary * width // 64).bit_length() - 1))


@torch.no_grad()
def addmm(out: Tensor, a: Tensor, b: Tensor) -> None:
    """As `reference.addmm`, by cuBLAS."""
    if out.device.type == "cpu":  # the interpreter
        out.addmm_(a.float(), b.float())
    elif a.dtype == torch.float32:
        out.addmm_(a, b)
    else:
        torch.addmm(out, a, b, out_dtype=torch.float32, out=out)
    increment_version(out)


def _product(out: Tensor, hidden: Tensor, weight: Tensor) -> None:
    """out = hidden weight^T, float32 from the product on."""
    if out.device.type == "cpu":  # the interpreter
        torch.mm(hidden.float(), weight.float().t(), out=out)
    elif hidden.dtype == torch.float32:
        torch.mm(hidden, weight.t(), out=out)
    else:
        torch.mm(hidden, weight.t(), out_dtype=torch.float32, out=out)


class _Scratch:
    """Of a chunk: what the kernels hand on of each row and of its parts, and a tile of its logits."""

    def __init__(self, hidden: Tensor, weight: Tensor, e_width: int, parts: bool):
        rows, vocabulary = len(hidden), len(weight)

        def floats(*shape: int) -> Tensor:
            return hidden.new_empty(shape, dtype=torch.float32)

        self.rows = floats(6 * rows)
        self.parts = floats(4 * rows * -(-vocabulary // PART)) if parts else None
        self.logits = floats(rows, tile_columns(vocabulary, e_width))

    def run(self, plan: Any, hidden: Tensor, weight: Tensor, *tensors: Tensor | None) -> None:
        before, tiles, after = plan
        tensors = (hidden, weight, self.rows, self.parts, self.logits, *tensors)
        run(before, *tensors)
        for launch, columns in zip(tiles, weight.split(self.logits.shape[1]), strict=True):
            _product(self.logits[:, : len(columns)], hidden, columns)
            run([launch], *tensors)
        run(after, *tensors)


def _e_width(dtype: torch.dtype) -> int:
    return 2 if dtype == torch.bfloat16 else 4


@torch.no_grad()
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
    if len(hidden) == 0:
        return
    targets = targets.contiguous()
    scratch = _Scratch(hidden, weight, _e_width(hidden.dtype), parts=True)
    plan = compiled.exp_product(
        view(e),
        views(logp, entropy, sums),
        views(hidden, weight, bias, targets),
        TransformConstants.of(transform),
        views(scratch.rows, scratch.parts, scratch.logits),
    )
    scratch.run(plan, hidden, weight, bias, targets, e, logp, entropy, sums)
    increment_version([x for x in (e, logp, entropy, sums) if x is not None])


@torch.no_grad()
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
    if len(hidden) == 0:
        return
    targets = targets.contiguous()
    scratch = _Scratch(hidden, weight, _e_width(hidden.dtype), parts=False)
    plan = compiled.exp_product_grad(
        view(e),
        views(hidden, weight, bias, targets),
        views(sums, grad_logp, grad_entropy, entropy),
        TransformConstants.of(transform),
        views(scratch.rows, scratch.parts, scratch.logits),
    )
    scratch.run(plan, hidden, weight, bias, targets, e, sums, grad_logp, grad_entropy, entropy)
    increment_version(e)
