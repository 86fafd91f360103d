"""An optimizer's state in a checkpoint: safetensors files and JSON, read back on any number of ranks.

One process, and under DDP the first rank, writes `optimizer.safetensors`. Under FSDP2 each rank writes its shards,
`optimizer-00001-of-00003.safetensors`, and `optimizer.index.json` says of each tensor which piece of the whole lies
where. A tensor is named "i.name" after the place of its parameter in the groups.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from redit_fast.gr import shards
from redit_fast.training.distributed import Ranks

WHOLE = "optimizer.safetensors"
INDEX = "optimizer.index.json"


class Piece(NamedTuple):
    """Of a tensor, the elements from `start` on, in a file."""

    file: str
    start: list[int]
    shape: list[int]


Pieces = dict[str, tuple[list[int], list[Piece]]]  # {tensor: (its shape, where it lies)}


def write(folder: Path, tensors: dict[str, Tensor], ranks: Ranks) -> Pieces:
    """Writes this rank's file; gives what it has, nothing where all tensors are in one file."""
    if not any(map(shards.is_shard, tensors.values())):
        if ranks.first:
            save_file(tensors, folder / WHOLE)
        return {}
    file = f"optimizer-{ranks.rank + 1:05d}-of-{ranks.size:05d}.safetensors"
    own = {name: tensor for name, tensor in tensors.items() if shards.is_shard(tensor) or ranks.first}
    save_file({name: shards.local(tensor).contiguous() for name, tensor in own.items()}, folder / file)
    return {
        name: (list(tensor.shape), [Piece(file, shards.starts(tensor), list(shards.local(tensor).shape))])
        for name, tensor in own.items()
    }


def write_index(folder: Path, of_ranks: list[Pieces]) -> None:
    joined: Pieces = {}
    for found in of_ranks:
        for name, (shape, pieces) in found.items():
            joined.setdefault(name, (shape, []))[1].extend(pieces)
    if joined:
        table = {name: {"shape": shape, "pieces": [piece._asdict() for piece in pieces]}
                 for name, (shape, pieces) in joined.items()}  # fmt: skip
        (folder / INDEX).write_text(json.dumps(table, indent=1), "utf-8")


def read(folder: Path, params: list[Tensor]) -> Iterator[tuple[int, str, Tensor]]:
    """(i, name, tensor) of everything that was written, each tensor placed as parameter i is.

    Raises:
        ValueError: the files do not fit the parameters.
    """
    for key, (shape, pieces) in _pieces(folder).items():
        place, _, name = key.partition(".")
        i = int(place)
        if i >= len(params):
            raise ValueError(f"{folder} has the state of parameter {i}, the optimizer has {len(params)} parameters")
        p: Any = params[i]
        if not shape or not shards.is_shard(p):
            yield i, name, _region(folder, key, pieces, [0] * len(shape), shape)
            continue
        piece = _region(folder, key, pieces, shards.starts(p), list(shards.local(p).shape)).to(p.device)
        yield i, name, _placed(piece, p)


def _pieces(folder: Path) -> Pieces:
    if (folder / INDEX).is_file():
        table = json.loads((folder / INDEX).read_text("utf-8"))
        return {name: (of["shape"], [Piece(**piece) for piece in of["pieces"]]) for name, of in table.items()}
    with safe_open(folder / WHOLE, "pt") as file:
        shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}
    return {name: (shape, [Piece(WHOLE, [0] * len(shape), shape)]) for name, shape in shapes.items()}


def _region(folder: Path, key: str, pieces: list[Piece], start: list[int], shape: list[int]) -> Tensor:
    """The elements from `start` on, put together from the pieces that have some of them."""
    found: Tensor | None = None
    for piece in pieces:
        low = [max(a, b) for a, b in zip(start, piece.start, strict=True)]
        high = [min(a + n, b + m) for a, n, b, m in zip(start, shape, piece.start, piece.shape, strict=True)]
        if any(a >= b for a, b in zip(low, high, strict=True)):
            continue
        with safe_open(folder / piece.file, "pt") as file:
            cut = tuple(slice(a - at, b - at) for a, b, at in zip(low, high, piece.start, strict=True))
            part = file.get_slice(key)[cut] if cut else file.get_tensor(key)
        if list(part.shape) == shape:
            return part
        found = torch.empty(shape, dtype=part.dtype, device="cpu") if found is None else found
        found[tuple(slice(a - at, b - at) for a, b, at in zip(low, high, start, strict=True))] = part
    return torch.empty(shape, dtype=torch.float32, device="cpu") if found is None else found  # a rank without rows


def _placed(piece: Tensor, p: Any) -> Tensor:
    from torch.distributed.tensor import DTensor

    return DTensor.from_local(piece, p.device_mesh, p.placements, run_check=False, shape=p.shape, stride=p.stride())
