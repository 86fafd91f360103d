"""What is timed: `with clock:` around the work alone. Its inputs are ready before, its result is checked after."""

from __future__ import annotations

import ctypes
import gc
import re
import time
from collections.abc import Callable
from pathlib import Path

import torch

from .collectives import Dealt

LIBC = ctypes.CDLL(None)
CACHES = Path("/sys/devices/system/cpu/cpu0/cache")
UNKNOWN_CACHE = 32 * 2**20
CUDA_FLUSH = 256 * 2**20  # twice the L2 cache of the largest GPU today


def last_level_cache() -> int:
    """Bytes of the CPU's last cache, as Linux says; 32 MiB where it does not."""
    sizes = [re.match(r"(\d+)([KM])", path.read_text()) for path in CACHES.glob("index*/size")]
    units = {"K": 2**10, "M": 2**20}
    return max((int(size[1]) * units[size[2]] for size in sizes if size), default=UNKNOWN_CACHE)


class Clock:
    """Seconds spent inside `with clock:` since `restart`. Under `cold` the caches are emptied before each entry; under
    `watch` each entry also finds how much memory it adds at its peak."""

    def __init__(self) -> None:
        self.timer: Callable[[], float] = time.perf_counter
        self.seconds, self.cold, self.watch = 0.0, False, False
        self.peak, self.held = 0.0, 0
        self.parts: dict[str, float] = {}
        self.tokens = 0
        self.dealt: Dealt | None = None
        self._flushed: torch.Tensor | None = None

    def restart(self, *, cold: bool = False, watch: bool = False) -> None:
        self.seconds, self.cold, self.watch, self.peak = 0.0, cold, watch, 0.0
        self.parts, self.tokens, self.dealt = {}, 0, None

    def took(self, parts: dict[str, float], tokens: int, peak: float, dealt: Dealt | None = None) -> None:
        """Of work in processes of its own: seconds by part, tokens computed, bytes at its peak, how it was dealt."""
        self.parts, self.tokens, self.peak, self.dealt, self.held = parts, tokens, peak, dealt, held()
        self.seconds += sum(parts.values())

    def __enter__(self) -> None:
        if self.cold:
            self._flush()
        self._memory = Peak() if self.watch else None
        if self._memory is not None:
            self._memory.__enter__()
            self.held = self._memory.before
        wait()
        self.started = self.timer()

    def __exit__(self, *_: object) -> None:
        wait()
        self.seconds += self.timer() - self.started
        if self._memory is not None:
            self._memory.__exit__()
            self.peak = max(self.peak, self._memory.bytes)

    def _flush(self) -> None:
        """Reads, on a GPU writes, more than the last cache holds. On a CPU nothing is left in it to be written back."""
        on_gpu = torch.cuda.is_initialized()
        if self._flushed is None:
            size = CUDA_FLUSH if on_gpu else 4 * last_level_cache()
            self._flushed = torch.ones(size // 4, device="cuda" if on_gpu else "cpu")
        if on_gpu:
            self._flushed.zero_()
        else:
            self._flushed.sum()


class Peak:
    """`with Peak() as peak:`; then `peak.bytes` is what the block added at its peak: on a GPU of torch's allocator,
    else of this process's resident memory, NaN where Linux does not count it. `peak.before` is what was there."""

    bytes = 0.0

    def __enter__(self) -> Peak:
        if torch.cuda.is_initialized():
            torch.cuda.reset_peak_memory_stats()
            self.before = torch.cuda.memory_allocated()
            return self
        trim()  # else what was freed earlier is used again unseen
        try:
            Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from what is resident now
        except OSError:
            self.bytes = float("nan")
        self.before = resident("VmRSS")
        return self

    def __exit__(self, *_: object) -> None:
        if torch.cuda.is_initialized():
            self.bytes = torch.cuda.max_memory_allocated() - self.before
        else:
            self.bytes += resident("VmHWM") - self.before


def trim() -> None:
    """Gives memory that was freed back to the system."""
    gc.collect(1)  # a full one takes half a second beside transformers and verl
    if hasattr(LIBC, "malloc_trim"):
        LIBC.malloc_trim(0)


def held() -> int:
    """Bytes that this process holds now: torch's on a GPU, else resident, without what was freed."""
    if torch.cuda.is_initialized():
        return torch.cuda.memory_allocated()
    trim()
    return resident("VmRSS")


def resident(name: str) -> int:
    """VmRSS or VmHWM of this process in bytes; 0 where there is no /proc."""
    try:
        found = re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    except OSError:
        return 0
    return 1024 * int(found[1]) if found else 0


def wait() -> None:
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


clock = Clock()
