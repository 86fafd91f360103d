"""What every launch needs: numbers and addresses in an int64 tensor on the device."""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime.errors import OutOfResources

INTERPRETED = triton.knobs.runtime.interpret  # TRITON_INTERPRET=1 when Triton was imported: kernels run on CPU tensors

TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}

_tables: dict[tuple, Tensor] = {}
_in_graphs: list[Tensor] = []  # CUDA graphs read them at every replay


def bits(*numbers: float) -> tuple[int, ...]:
    """The 64 bits of each float64, for a table; a float argument would become float32."""
    return tuple(torch.tensor(numbers, dtype=torch.float64, device="cpu").view(torch.int64).tolist())


def word(x: int) -> int:
    """x in [0, 2**64) as the int64 of the same bits."""
    return x - 2**64 if x >= 2**63 else x


def table(numbers: tuple[int, ...], device: torch.device) -> Tensor:
    """`numbers` as int64 on the device. Steps repeat their tables, so the last 256 are kept: an upload costs 20 us.

    Kept per stream, as another one would not wait for the copy; pinned, so that the host does not wait for it either.
    """
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        return _captured_table(numbers, device)
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    key = (numbers, device, stream)
    if key not in _tables:
        if len(_tables) >= 256:
            _tables.clear()
        if device.type == "cuda":
            host = torch.tensor(numbers, dtype=torch.int64, device="cpu", pin_memory=True)
            _tables[key] = host.to(device, non_blocking=True)
        else:
            _tables[key] = torch.tensor(numbers, dtype=torch.int64, device=device)
    return _tables[key]


def _captured_table(numbers: tuple[int, ...], device: torch.device) -> Tensor:
    """For a CUDA graph: a table from before it, else one that its own launches write at every replay. A copy from the
    host would be repeated from memory that is long somebody else's."""
    for (earlier, place, _), found in _tables.items():
        if earlier == numbers and place == device:
            _in_graphs.append(found)
            return found
    return torch.stack([torch.full((), number, dtype=torch.int64, device=device) for number in numbers])


def processors(device: torch.device) -> int:
    """Streaming multiprocessors; the interpreter has 3, so that a program takes several rows."""
    return 3 if device.type == "cpu" else torch.cuda.get_device_properties(device).multi_processor_count


def first_that_fits(launch, shapes: list[tuple[int, ...]]) -> None:
    """launch(*shape) with the first shape that the device has the registers and shared memory for."""
    for shape in shapes:
        try:
            return launch(*shape)
        except OutOfResources as error:
            refusal = error
    raise NotImplementedError(f"the device has no room for the smallest tile: {refusal}")
