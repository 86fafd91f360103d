"""What an op has to move and to compute, and what this machine does at best: together the least time it can take.

Bytes are those that cross to memory. A plain store to a line that is not in the cache reads it first, so `copy_` moves
three bytes for each that it copies; an update in place moves two, as does a copy whose stores go past the caches.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

import torch

from .clock import CUDA_FLUSH, clock, last_level_cache
from .place import Place

WRONG = 1.1  # of the roofline: more than this nothing can do, so the op's bytes or operations are counted wrongly
COPIED = 128 * 2**20  # bytes: four times the last cache of the machine that this was written on
MULTIPLIED = {"cpu": 1024, "cuda": 8192}  # rows of the square products
ROUNDS = 7
WAYS = ("read", "update", "copy", "AdamW")  # of which the fastest is the limit


@dataclass(frozen=True)
class Work:
    """Bytes that an op reads, updates in place and writes anew, at least; and the operations of its matrix products."""

    reads: int = 0
    updates: int = 0
    writes: int = 0
    flops: int = 0

    def bytes(self, cache: int) -> int:
        """That cross to memory from a cold cache. What is written may stay in a cache of that many bytes."""
        moved = self.reads + 2 * self.updates + self.writes
        return moved if moved > 2 * cache else self.reads + self.updates

    def floor_ms(self, speeds: dict[str, float], dtype: str, cache: int) -> float:
        """The least time, at the best GB/s of any way to move bytes and the best GFLOP/s of that dtype's products."""
        moved = self.bytes(cache) / 1e6 / max(speeds[way] for way in WAYS)
        return max(moved, self.flops / 1e6 / speeds[products(dtype)] if self.flops else 0.0)


def products(dtype: str) -> str:
    return f"{dtype} products"


def sentence(share: float) -> str | None:
    """What is said of a provider that reaches `share` of the roofline, or None."""
    if share <= WRONG:
        return None
    return f"{share:.0%} of the roofline: the bytes or operations of this op are counted wrongly"


def cache_of(place: Place) -> int:
    return last_level_cache() if place.device.type == "cpu" else CUDA_FLUSH // 2


def speeds(place: Place) -> dict[str, float]:
    """GB/s of the ways to move bytes and GFLOP/s of products, each the best of ROUNDS."""
    count = (COPIED if place.device.type == "cpu" else 16 * COPIED) // 4
    source, target = torch.ones(count, device=place.device), torch.empty(count, device=place.device)
    target.fill_(0)
    size = 4 * count
    weights = torch.nn.Parameter(torch.zeros_like(source))
    weights.grad = source
    adamw = torch.optim.AdamW([weights], fused=True)
    ways: dict[str, tuple[int, Callable[[], object]]] = {
        "read": (size, source.sum),
        "update": (2 * size, lambda: target.add_(1)),
        "copy": (2 * size, lambda: _copy_past_caches(target, source)),
        # Seven streams where an update has two: 38 GB/s against 34 on two cores of a Xeon.
        "AdamW": (7 * size, adamw.step),
        "copy_": ((3 if place.device.type == "cpu" else 2) * size, lambda: target.copy_(source)),
    }
    found = {name: moved / _best(run) / 1e9 for name, (moved, run) in ways.items()}
    rows = MULTIPLIED[place.device.type]
    for dtype in (torch.float32, torch.bfloat16):
        a, b = (torch.ones(rows, rows, dtype=dtype, device=place.device) for _ in range(2))
        found[products(str(dtype).removeprefix("torch."))] = 2 * rows**3 / _best(partial(torch.mm, a, b)) / 1e9
    return found


def _best(run: Callable[[], object]) -> float:
    taken = []
    for _ in range(ROUNDS):
        clock.restart()
        with clock:
            run()
        taken.append(clock.seconds)
    return min(taken)


def _copy_past_caches(target: torch.Tensor, source: torch.Tensor) -> None:
    """On a CPU the C library's copy, a piece for each thread: of this size it stores past the caches."""
    if target.device.type != "cpu":
        target.copy_(source)
        return
    threads = torch.get_num_threads()
    step = -(-source.nbytes // threads)

    def copy(start: int) -> None:
        length = min(step, source.nbytes - start)
        ctypes.memmove(target.data_ptr() + start, source.data_ptr() + start, length)  # without the interpreter's lock

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(copy, range(0, source.nbytes, step)))
