"""The C++ backend: csrc/ compiled as `redit_fast._cpu`, which links nothing of PyTorch and gets raw pointers.

`_cpu` is compiled for OpenMP but linked to no OpenMP library. Its symbols resolve, when it is loaded, to the runtime
that `import torch` has put into the process (libtorch_global_deps, with RTLD_GLOBAL), so both share one thread pool.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

try:
    import redit_fast._cpu as _cpu

    _missing = None
except ModuleNotFoundError:
    _missing = (
        "redit_fast._cpu was not built; install a C++17 compiler (g++) and run "
        "`pip install --no-deps --force-reinstall .` in the source folder"
    )
except ImportError as error:
    _missing = f"redit_fast._cpu does not load beside torch {torch.__version__}: {error}"

_OPS = ("group_advantages",)


def why_not(op: str, device: torch.device) -> str | None:
    if op not in _OPS:
        return f"{op} has no C++ version yet"
    if device.type != "cpu":
        return f"computes on CPU tensors only, got {device}"
    return _missing


def group_advantages(
    values: Tensor,
    group_mean: Tensor,
    group_std: Tensor,
    dead: Tensor,
    dithered_mean: Tensor,
    dithered_std: Tensor,
    rewards: Tensor,
    groups: Tensor,
    sample_ids: Tensor,
    weights: Tensor,
    half_range: Tensor | None,
    distribution: str,
    seed: int,
    step: int,
    dead_groups: str,
    baseline: str,
    scale: str,
    combine: str,
    eps: float,
    ddof: int,
) -> None:
    """As `reference.group_advantages`, bit for bit; every tensor contiguous."""
    outputs = (values, group_mean, group_std, dead, dithered_mean, dithered_std)
    _cpu.group_advantages(
        *(tensor.data_ptr() for tensor in (*outputs, rewards, groups, sample_ids, weights)),
        0 if half_range is None else half_range.data_ptr(),
        *rewards.shape,
        distribution,
        seed,
        step,
        dead_groups,
        baseline,
        scale,
        combine,
        eps,
        ddof,
        torch.get_num_threads(),
    )
    increment_version(outputs)
