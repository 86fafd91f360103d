"""The head; csrc/cuda/linear_loss.cu around products by cuBLAS, through torch."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from redit_fast.backends.cuda.module import compiled, device_of, run, view, views
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


def _has_map(x: Tensor) -> bool:
    """Whether tensor copies can read a matrix of bfloat16 as it lies."""
    return x.stride(1) == 1 and x.stride(0) >= x.shape[1] and x.stride(0) % 8 == 0 and x.data_ptr() % 16 == 0


class _Chunk:
    """Its inputs, and scratch: what the kernels hand on of each row and of its parts, and a tile of the logits. Where
    the product is our own there are no logits, but a tile of a weight that the product cannot read as it lies."""

    def __init__(self, e, hidden, weight, bias, targets, transform: LogitTransform, parts: bool):
        rows, vocabulary, self.device = len(hidden), len(weight), device_of(hidden)
        bias = None if bias is None else bias.contiguous()
        self.e, self.inputs = e, (hidden, weight, bias, targets.contiguous())
        self.transform = TransformConstants.of(transform)
        self.own = compiled.has_product(view(e), views(*self.inputs), self.transform, self.device)
        columns = tile_columns(vocabulary, 2 if hidden.dtype == torch.bfloat16 else 4)

        def floats(*shape: int) -> Tensor:
            return hidden.new_empty(shape, dtype=torch.float32)

        self.tile: Tensor | None = None
        if not self.own:
            self.tile = floats(rows, columns)
        elif not _has_map(weight):
            self.tile = weight.new_empty(columns, weight.shape[1])
        if self.own and not _has_map(hidden):
            self.inputs = (hidden.clone(memory_format=torch.contiguous_format), *self.inputs[1:])
        self.scratch = (floats(6 * rows), floats(4 * rows * -(-vocabulary // PART)) if parts else None, self.tile)

    def run(self, plan: tuple[list, list, list], *tensors: Tensor | None) -> None:
        before, tiles, after = plan
        touched = (self.e, *self.inputs, *self.scratch, *tensors)
        run(before, *touched)
        if self.tile is not None:
            hidden, weight, *_ = self.inputs
            size = self.tile.shape[0 if self.own else 1]
            for launch, columns in zip(tiles, weight.split(size), strict=True):
                if self.own:
                    self.tile[: len(columns)] = columns
                else:
                    _product(self.tile[:, : len(columns)], hidden, columns)
                run([launch], *touched)
        run(after, *touched)


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
    chunk, outputs = _Chunk(e, hidden, weight, bias, targets, transform, parts=True), (logp, entropy, sums)
    inputs, scratch = views(*chunk.inputs), views(*chunk.scratch)
    chunk.run(compiled.exp_product(view(e), views(*outputs), inputs, chunk.transform, scratch, chunk.device), *outputs)
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
    chunk, upstream = (
        _Chunk(e, hidden, weight, bias, targets, transform, parts=False),
        (sums, grad_logp, grad_entropy, entropy),
    )
    inputs, scratch = views(*chunk.inputs), views(*chunk.scratch)
    plan = compiled.exp_product_grad(view(e), inputs, views(*upstream), chunk.transform, scratch, chunk.device)
    chunk.run(plan, *upstream)
    increment_version(e)
