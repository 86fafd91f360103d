"""Two passes that see the same model: dropout draws the same numbers, module buffers count one pass."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class Replay:
    """Remembers the random states, and the buffers of `model`, as they are before the first pass."""

    def __init__(self, params: list[Tensor], model: nn.Module | None):
        self._devices = sorted({p.device.index for p in params if p.device.type == "cuda"})
        self._cpu_rng = torch.get_rng_state()
        self._cuda_rng = [torch.cuda.get_rng_state(device) for device in self._devices]
        self._buffers = [] if model is None else list(model.buffers())
        self._before = [buffer.clone() for buffer in self._buffers]

    @contextmanager
    def again(self) -> Iterator[None]:
        """Inside, everything is as it was before the first pass; the buffers end as that pass left them."""
        after = [buffer.clone() for buffer in self._buffers]
        self._assign(self._before)
        torch.set_rng_state(self._cpu_rng)
        for device, state in zip(self._devices, self._cuda_rng, strict=True):
            torch.cuda.set_rng_state(state, device)
        try:
            yield
        finally:
            self._assign(after)

    @torch.no_grad()
    def _assign(self, values: list[Tensor]) -> None:
        for buffer, value in zip(self._buffers, values, strict=True):
            buffer.copy_(value)
