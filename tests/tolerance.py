"""The error rule: a kernel may err 1.25 times as much as PyTorch in the same dtype that upcasts to float32, no more."""

import torch
from torch import Tensor


def assert_no_worse(out: Tensor, low: Tensor, exact: Tensor, floor: float, factor: float = 1.25) -> None:
    """err(out) <= factor * err(low) + floor, largest absolute errors against `exact` (float64). `low` is the same
    computation in plain PyTorch and the input's dtype. Refuses a comparison that an all-zero output would pass."""
    exact = exact.double()
    allowed = factor * (low.double() - exact).abs().max().item() + floor
    signal = exact.abs().max().item()
    assert allowed < 0.1 * signal, f"tolerance {allowed:.1e} is near the signal {signal:.1e}: zeros would pass"
    error = (out.double() - exact).abs().max().item()
    assert error <= allowed, f"largest error {error:.3e} > {allowed:.3e}"


def relative(out: Tensor, exact: Tensor) -> float:
    """Relative Frobenius error."""
    exact = exact.double()
    assert exact.norm() > 0
    return ((out.double() - exact).norm() / exact.norm()).item()


def sliced(*shape: int, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> Tensor:
    """Random normal, a slice of a larger tensor: strides are never trivially contiguous."""
    wide = torch.randn(*shape[:-1], 2 * shape[-1] + 3) * scale
    return wide.to(dtype)[..., 3::2]
