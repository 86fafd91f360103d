"""`redit_fast._cpu`, csrc/ compiled, which links nothing of PyTorch and gets raw pointers: whether it is there,
which of its instruction sets runs.

`_cpu` is compiled for OpenMP but linked to no OpenMP library. Its symbols resolve, when it is loaded, to the runtime
that `import torch` has put into the process (libtorch_global_deps, with RTLD_GLOBAL), so both share one thread pool.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import NamedTuple

import torch

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

# x86-64's are all in the module and chosen at run time. "avx512_bf16" is "avx512" with bfloat16 products of its own,
# "amx_bf16" the same with faster ones; elsewhere "baseline" is all there is (on aarch64 with NEON).
_INSTRUCTION_SETS = ("baseline", "avx2", "avx512", "avx512_bf16", "amx_bf16")
_chosen: ContextVar[str | None] = ContextVar("redit_fast_instruction_set", default=None)


def instruction_sets() -> tuple[str, ...]:
    """Those that this processor has, the widest last, which runs by default."""
    if compiled is None:
        return ()
    return _INSTRUCTION_SETS[: compiled.best_level() + 1 + compiled.own_products()]


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
    return _own_products() > 0


def multiplies_by_tiles() -> bool:
    """Whether they are by AMX_BF16."""
    return _own_products() > 1


def _own_products() -> int:
    chosen = _chosen.get()
    return compiled.own_products() if chosen is None else max(0, _INSTRUCTION_SETS.index(chosen) - 2)
