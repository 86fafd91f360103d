"""Questions that every public function asks of its arguments, each with one sentence for an answer."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from numbers import Integral, Real
from typing import Literal, SupportsFloat, TypeVar

import torch
from torch import Tensor, nn

T = TypeVar("T")
LARGEST = sys.float_info.max
FLOAT32 = torch.finfo(torch.float32)
_A = {"real": "a real", "floating-point": "a floating-point", "integer": "an integer"}


def described(value: object) -> str:
    """A value that does not fit in a few words: what a message says that it got."""
    if isinstance(value, Tensor):
        if value.is_nested:  # without a shape
            return f"a nested tensor of {value.dtype} on {value.device}"
        layout = "" if value.layout == torch.strided else f"{value.layout} "
        return f"a {layout}tensor of {value.dtype} with shape {tuple(value.shape)} on {value.device}"
    if isinstance(value, int) and value.bit_length() > 256:  # Python prints no int of more than 4300 digits
        return f"an int of {value.bit_length()} bits"
    if value is None or isinstance(value, int | float | complex | str | torch.dtype):
        text = repr(value)
        return text if len(text) < 80 else f"{text[:80]}..."
    kind = type(value)
    return kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"


def whole_number(name: str, value: object, least: int = 0, bits: int = 63) -> int:
    """An int, Python's or numpy's, in [least, 2**bits), as Python's."""
    if isinstance(value, bool) or not isinstance(value, int):
        if isinstance(value, bool) or not isinstance(value, Integral):
            raise TypeError(f"{name} must be an int, got {described(value)}")
        value = int(value)
    if not least <= value < 1 << bits:
        wanted = f"at least {least}" if value < least and bits == 63 else f"in [{least}, 2**{bits})"
        raise ValueError(f"{name} must be {wanted}, got {described(value)}")
    return value


def as_float(value: SupportsFloat) -> float:
    """NaN where the number, an int or a fraction, is beyond the largest float: it is in no range."""
    try:
        return float(value)
    except OverflowError:
        return math.nan


def in_float32(value: float) -> float:
    """What kernels make of a number: infinity beyond the largest float32, 0 below the smallest that none flushes."""
    if abs(value) > FLOAT32.max:
        return math.copysign(math.inf, value)
    return 0.0 if abs(value) < FLOAT32.smallest_normal else value


def real_number(
    name: str,
    value: object,
    *,
    least: float | None = None,
    above: float | None = None,
    most: float | None = None,
    finite: bool = True,
    float32: bool = False,
) -> float:
    """A number, Python's or numpy's, in its range, as Python's float. NaN is in none. `float32`: in its range as a
    float32 too."""
    if isinstance(value, bool) or not (isinstance(value, float | int) or isinstance(value, Real)):
        raise TypeError(f"{name} must be a number, got {described(value)}")
    exact = as_float(value)
    number = in_float32(exact) if float32 else exact
    size = abs(number)
    if (
        not (size <= LARGEST or (size == math.inf and not finite))
        or (least is not None and number < least)
        or (above is not None and number <= above)
        or (most is not None and number > most)
    ):
        bounds = (("finite", finite or None), ("at least {}", least), ("above {}", above), ("at most {}", most))
        wanted = " and ".join(text.format(bound) for text, bound in bounds if bound is not None)
        where = " in float32, which the kernels compute in" if number != exact == exact else ""
        raise ValueError(f"{name} must be {wanted}{where}, got {described(value)}")
    return exact


def positive(name: str, value: object) -> float:
    """For kernels that divide or multiply by it."""
    return real_number(name, value, above=0, float32=True)


def check_flag(name: str, value: object) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be a bool, got {described(value)}")


def check_choice(name: str, value: object, choices: Sequence[str | None]) -> None:
    if value is not None and not isinstance(value, str):  # an array would be compared element by element
        raise TypeError(f"{name} must be one of {', '.join(map(repr, choices))}; got {described(value)}")
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}; got {value!r}")


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """The end of a sentence that says a name is unknown: the known one that is close, else all of them."""
    close = get_close_matches(name, known := list(known), 1)
    return f"did you mean {close[0]}?" if close else f"the options are {', '.join(known)}"


def check_tensor(name: str, value: object, kind: Literal["real", "floating-point", "integer"]) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be {_A[kind]} tensor, got {described(value)}")
    check_dense(name, value)
    dtype = value.dtype
    if kind == "floating-point":
        fits = dtype.is_floating_point
    else:
        fits = not dtype.is_complex and (kind == "real" or not (dtype.is_floating_point or dtype == torch.bool))
    if not fits:
        raise TypeError(f"{name} must be {_A[kind]} tensor, got {described(value)}")
    if value.device.type == "meta":
        raise TypeError(f"{name} must be on a device that holds its values, got {described(value)}")


def check_dense(name: str, value: Tensor) -> None:
    """Not sparse, nested, of MKL-DNN, or quantized: kernels read addresses and strides."""
    if value.layout != torch.strided or value.is_nested or value.is_quantized:
        raise TypeError(f"{name} must be a dense tensor, got {described(value)}")
    if not torch.compiler.is_compiling() and value.is_neg():  # torch changes the sign where it reads, a kernel does not
        raise TypeError(f"{name} must not be a negated view, as conj().imag is: resolve_neg() of {described(value)}")


def check_apart(name: str, written: Tensor) -> None:
    """No two elements of what is written share memory."""
    if torch.compiler.is_compiling() or written.numel() < 2:  # a graph has no addresses
        return
    dims = sorted((stride, size) for stride, size in zip(written.stride(), written.shape, strict=True) if size > 1)
    apart, extent = True, 1
    for stride, size in dims:
        apart &= stride >= extent
        extent += stride * (size - 1)
    if not apart and dims[0][0] > 0:  # strides may interleave without meeting: one mark for each address tells
        marks = torch.zeros(extent, dtype=torch.bool, device="cpu")
        marks.as_strided(written.shape, written.stride()).fill_(True)
        apart = int(marks.sum()) == written.numel()
    if not apart:
        raise ValueError(
            f"{name} is written, so its elements must not share memory, got {described(written)} and strides "
            f"{written.stride()}"
        )


def check_module(name: str, value: object) -> None:
    if not isinstance(value, nn.Module):
        raise TypeError(f"{name} must be a torch.nn.Module, got {described(value)}")


def check_seed(seed: object) -> int:
    return whole_number("seed", seed, bits=64)


def check_step(step: object) -> int:
    return whole_number("step", step, bits=32)


def given(value: T | None) -> T:
    """`value`, which the door has found to be there: for readers and type checkers."""
    assert value is not None  # noqa: S101
    return value
