"""`redit_fast._cuda`, csrc/cuda/ compiled, which links nothing of PyTorch: a call of it turns addresses, sizes and
strides into a list of launches, and `run` sends that list to the device.

REDIT_FAST_CUDA_INTERPRET=1 makes lists of CPU tensors, for an interpreter of the kernels' PTX that a test puts into
`run_launches`.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from redit_fast.backends import addresses

try:
    import redit_fast._cuda as compiled

    missing = None
except ModuleNotFoundError:
    compiled = None
    missing = (
        "redit_fast._cuda was not built; where nvcc is, run `REDIT_FAST_CUDA=1 pip install --no-deps "
        "--force-reinstall .` in the source folder"
    )
except ImportError as error:
    compiled = None
    missing = f"redit_fast._cuda does not load: {error}"

# The interpreter gets a list of launches, and the tensors that they may touch. None: they go to the device.
run_launches: Callable[[list[Any], list[Tensor]], None] | None = None


def interpreted() -> bool:
    return os.environ.get("REDIT_FAST_CUDA_INTERPRET") == "1"


class Device(NamedTuple):
    ordinal: int  # -1: no device of this machine, but one that is described for the interpreter
    architecture: int  # 90: compute capability 9.0
    multiprocessors: int
    shared_bytes: int  # that a block may ask for
    clusters: int  # of ordinal -1: how many clusters of any kernel it holds at once


described = Device(-1, 90, 8, 232448, 8)  # for the interpreter: an H200 of eight multiprocessors


@functools.cache
def _device(index: int) -> Device:
    return Device(*compiled.device(index))


def device_of(tensor: Tensor) -> Device:
    return described if interpreted() else _device(tensor.device.index)


def _runs(target: str, architecture: int) -> bool:
    """Whether code for `target`, such as sm_90a or compute_100, runs on a device of that compute capability."""
    kind, _, number = target.partition("_")
    built = int(number.rstrip("af"))
    if number.endswith("a"):
        return architecture == built
    in_family = kind == "sm" or number.endswith("f")
    return architecture >= built and (architecture // 10 == built // 10 or not in_family)


@functools.cache
def why_no_kernels(index: int) -> str | None:
    """Why none of the module's code runs on this device, or None."""
    try:
        architecture = _device(index).architecture
    except RuntimeError as error:
        toolkit = f"{compiled.toolkit // 1000}.{compiled.toolkit % 1000 // 10}"
        if "cudaErrorInsufficientDriver" not in str(error):
            return f"redit_fast._cuda, of CUDA {toolkit}: {error}"
        return (
            f"redit_fast._cuda, of CUDA {toolkit}, finds no driver or an older one ({error}); install a newer driver, "
            "or build with a toolkit that is not newer than the CUDA version which `nvidia-smi` prints"
        )
    if any(_runs(target, architecture) for target in compiled.architectures.split()):
        return None
    name = f"{architecture // 10}.{architecture % 10}"
    asked = {"9.0": "9.0a"}.get(name, name)  # plain 9.0 has no wgmma
    return (
        f"redit_fast._cuda has code for {compiled.architectures} and none for this device's {name}; in the source "
        f"folder run `TORCH_CUDA_ARCH_LIST={asked} REDIT_FAST_CUDA=1 pip install --no-deps --force-reinstall .`"
    )


def run(launches: list[Any], *tensors: Tensor | None) -> None:
    """Send the launches, which may touch `tensors` and nothing else, to the tensors' device."""
    touched = [tensor for tensor in tensors if tensor is not None]
    if run_launches is not None:
        run_launches(launches, touched)
    else:
        device = touched[0].device
        compiled.launch(launches, device.index, torch.cuda.current_stream(device).cuda_stream)


def view(tensor: Tensor | None) -> addresses.View:
    return addresses.view(tensor, "cpu" if interpreted() else "cuda")


def views(*tensors: Tensor | None) -> list[addresses.View]:
    return [view(tensor) for tensor in tensors]
