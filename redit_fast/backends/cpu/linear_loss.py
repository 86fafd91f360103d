"""The head: its product tiles, by torch or by csrc/cpu/product.cpp, and csrc/cpu/linear_loss.cpp around them."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from redit_fast.backends.addresses import view, views
from redit_fast.backends.cpu.module import compiled, multiplies_bfloat16, multiplies_by_tiles, processor
from redit_fast.losses.transforms import LogitTransform, TransformConstants

# Of a product tile, rows per thread: 1 MB of float32 a thread. At 512 rows, 32000 x 896 and two threads the products
# take 153 ms; 128 x 2048 a thread 177, all columns at once 270.
TILE_ROWS, TILE_COLUMNS = 256, 1024


def _multiply(out: Tensor, a: Tensor, b: Tensor, add: bool) -> None:
    if a.dtype == torch.bfloat16:
        compiled.product(view(out), add, view(a), view(b), multiplies_by_tiles(), processor())
    elif add:
        out.addmm_(a, b)
    else:
        torch.mm(a, b, out=out)


@torch.no_grad()
def addmm(out: Tensor, a: Tensor, b: Tensor) -> None:
    """As `reference.addmm`; the rows of out contiguous."""
    if not (a.dtype == torch.bfloat16 and multiplies_bfloat16()):
        a, b = a.float(), b.float()
    _multiply(out, a, b, add=True)
    increment_version(out)


class _Head:
    """A chunk of rows, its product tiles, and `HeadRows` of csrc/cpu/linear_loss.h around them."""

    def __init__(self, hidden, weight, bias, targets, transform: LogitTransform):
        self.weight, self.bias = weight, None if bias is None else bias.contiguous()
        self.transform, self.processor = TransformConstants.of(transform), processor()
        pairs = hidden.dtype == torch.bfloat16 and multiplies_bfloat16()
        self.x = x = hidden if pairs else hidden.float()  # torch's 16-bit products round their result
        columns, self.tile_rows = min(TILE_COLUMNS, len(weight)), TILE_ROWS * self.processor.threads
        self.blocks = range(0, len(x), self.tile_rows)
        self.tile = x.new_empty(min(self.tile_rows, len(x)) * columns, dtype=torch.float32)
        self.widened = None if weight.dtype == x.dtype else x.new_empty(columns, weight.shape[1])
        targets = targets.contiguous()  # held until HeadRows has copied them
        self.rows = compiled.HeadRows(view(targets), len(weight))
        self.rows.anchor_at_targets(views(hidden, weight, self.bias), self.transform, self.processor)

    def add_tiles(self, e: Tensor | None, blocks: Iterable[int]) -> None:
        for column in range(0, len(self.weight), TILE_COLUMNS):
            columns = self.weight[column : column + TILE_COLUMNS]
            columns = (columns if self.widened is None else self.widened[: len(columns)].copy_(columns)).t()
            for row in blocks:
                part = self.x[row : row + self.tile_rows]
                z = self.tile[: len(part) * columns.shape[1]].view(len(part), -1)
                _multiply(z, part, columns, add=False)
                if self.bias is not None:  # after the product: sums that start at a large bias lose their bits
                    z += self.bias[column : column + TILE_COLUMNS]
                self.rows.add(view(e), view(z), (row, column), self.transform, self.processor)


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
    """As `reference.exp_product`; logp and entropy contiguous, so are the rows of sums and of e."""
    head = _Head(hidden, weight, bias, targets, transform)
    head.add_tiles(e, head.blocks)
    broken = head.rows.repair(head.tile_rows)
    if broken:
        head.add_tiles(e, broken)
    head.rows.finish(views(logp, entropy, sums), head.transform)
    if e is not None:
        head.rows.store_targets(view(e), head.transform, head.processor)
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
    """As `reference.exp_product_grad`, but for rows without a number above 0 as their sum; entropy and the gradients
    contiguous, so are the rows of sums and of e."""
    head = _Head(hidden, weight, bias, targets, transform)
    head.rows.resume(views(sums, grad_logp, grad_entropy, entropy), head.transform)
    head.add_tiles(e, head.blocks)
    head.rows.store_targets(view(e), head.transform, head.processor)
    increment_version(e)
