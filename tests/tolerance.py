"""The error rule: a kernel may err 1.25 times as much as PyTorch in the same dtype that upcasts to float32, no more."""

from collections.abc import Callable

import torch
from torch import Tensor


def largest(x: Tensor) -> Tensor:
    return x.abs().max()


def assert_no_worse(
    out: Tensor,
    low: Tensor,
    exact: Tensor,
    floor: float,
    factor: float = 1.25,
    size: Callable[[Tensor], Tensor] = largest,
) -> None:
    """err(out) <= factor * err(low) + floor, errors against `exact` (float64) by their largest value, or `size`. `low`
    is the same computation in plain PyTorch and the input's dtype. Refuses a comparison that an all-zero output would
    pass."""
    exact = exact.double()
    allowed = factor * size(low.double() - exact).item() + floor
    signal = size(exact).item()
    assert allowed < 0.1 * signal, f"tolerance {allowed:.1e} is near the signal {signal:.1e}: zeros would pass"
    error = size(out.double() - exact).item()
    assert error <= allowed, f"{size.__name__} error {error:.3e} > {allowed:.3e}"


def assert_gradient_no_worse(out: Tensor, low: Tensor, exact: Tensor, floor: float = 1e-6) -> None:
    """The rule for a gradient that sums over rows or a vocabulary, by Frobenius norms: `low` is rounded as `out` is,
    and `floor` is a part of the norm."""
    norm = torch.linalg.vector_norm
    assert_no_worse(out, low.to(out.dtype), exact, floor * norm(exact.double()).item(), size=norm)


def relative(out: Tensor, exact: Tensor) -> float:
    """Relative Frobenius error."""
    exact = exact.double()
    assert exact.norm() > 0
    return ((out.double() - exact).norm() / exact.norm()).item()


def sliced(*shape: int, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> Tensor:
    """Random normal, a slice of a larger tensor: strides are never trivially contiguous."""
    wide = torch.randn(*shape[:-1], 2 * shape[-1] + 3) * scale
    return wide.to(dtype)[..., 3::2]
