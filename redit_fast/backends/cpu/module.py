"""`redit_fast._cpu`, csrc/ compiled, which links nothing of PyTorch and gets raw pointers: whether it is there, which
of its instruction sets runs, and tensors as it takes them.

`_cpu` is compiled for OpenMP but linked to no OpenMP library. Its symbols resolve, when it is loaded, to the runtime
that `import torch` has put into the process (libtorch_global_deps, with RTLD_GLOBAL), so both share one thread pool.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import NamedTuple

import torch
from torch import Tensor

from redit_fast.backends.args import DTYPES

try:
    import redit_fast._cpu as compiled

    missing = None
except ModuleNotFoundError:
    compiled = None
    missing = (
        "redit_fast._cpu was not built; install a C++17 compiler (g++) and run "
        "`pip install --no-deps --force-reinstall .` in the source folder"
    )
except ImportError as error:
    compiled = None
    missing = f"redit_fast._cpu does not load beside torch {torch.__version__}: {error}"

_CODES = {dtype: code for code, dtype in enumerate(DTYPES)}

# x86-64's are all in the module and chosen at run time. "avx512_bf16" is "avx512" with bfloat16 products of its own;
# elsewhere "baseline" is all there is (on aarch64 with NEON).
_INSTRUCTION_SETS = ("baseline", "avx2", "avx512", "avx512_bf16")
_chosen: ContextVar[str | None] = ContextVar("redit_fast_instruction_set", default=None)


def instruction_sets() -> tuple[str, ...]:
    """Those that this processor has, the widest last, which runs by default."""
    if compiled is None:
        return ()
    return _INSTRUCTION_SETS[: compiled.best_level() + 1 + compiled.has_product()]


@contextmanager
def use_instruction_set(name: str) -> Iterator[None]:
    """Run the cpu backend with one instruction set inside the `with` block.

    Raises:
        ValueError: `name` is none of `instruction_sets()`.
    """
    known = instruction_sets()
    if name not in known:
        raise ValueError(f"name must be an instruction set of this processor, one of {', '.join(known)}; got {name!r}")
    token = _chosen.set(name)
    try:
        yield
    finally:
        _chosen.reset(token)


class Processor(NamedTuple):
    threads: int
    level: int  # as csrc/cpu/rows.h counts instruction sets; -1: the highest


def processor() -> Processor:
    """What the module runs on."""
    chosen = _chosen.get()
    return Processor(torch.get_num_threads(), -1 if chosen is None else min(_INSTRUCTION_SETS.index(chosen), 2))


def multiplies_bfloat16() -> bool:
    """Whether bfloat16 products with float32 results are the module's own: torch has none."""
    chosen = _chosen.get()
    return compiled.has_product() if chosen is None else chosen == "avx512_bf16"


def code(dtype: torch.dtype | None) -> int:
    """Its index among DTYPES; -1: none of them."""
    return -1 if dtype is None else _CODES.get(dtype, -1)


def views(*tensors: Tensor | None) -> list[tuple[int, int, int, int, int, int]]:
    return [view(tensor) for tensor in tensors]


def view(tensor: Tensor | None) -> tuple[int, int, int, int, int, int]:
    """Address, dtype, rows, columns and their strides, for csrc/cpu/bindings.h to check; 0s for None; one row for a
    vector or a number."""
    if tensor is None:
        return (0, 0, 0, 0, 0, 0)
    if tensor.device.type != "cpu" or tensor.ndim > 2:
        raise ValueError(
            f"the cpu backend needs tensors of at most two dimensions on the CPU, got {tuple(tensor.shape)} on "
            f"{tensor.device}"
        )
    shape, strides = (1, 1, *tensor.shape), (1, 1, *tensor.stride())
    return (tensor.data_ptr(), code(tensor.dtype), *shape[-2:], *strides[-2:])
