"""What each KL estimator of `LossConfig` estimates: the table of docs/losses.md, which test_kl_estimators.py proves."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Estimator(NamedTuple):
    kl: str
    ratio: bool  # kl_ratio_correction
    value: str  # the key in EXPECTATIONS of the value's mean, on policy
    at_least_0: bool
    gradient: str  # the key in EXPECTATIONS whose gradient autograd's has as its mean, on policy
    off_policy: bool  # both also hold where an older policy took the samples

    @property
    def unbiased_value(self) -> bool:
        return self.value == REVERSE

    @property
    def unbiased_gradient(self) -> bool:
        return self.gradient == REVERSE


REVERSE, FORWARD, DISTANCE, K2, ABS, NOTHING = "KL(pi‖ref)", "KL(ref‖pi)", "Σ\\|pi - ref\\|", "E d²/2", "E\\|d\\|", "0"

# Functions of (pi, log pi, log ref), (V,) each.
EXPECTATIONS = {
    REVERSE: lambda p, x, ref: (p * (x - ref)).sum(),
    FORWARD: lambda p, x, ref: (ref.exp() * (ref - x)).sum(),
    DISTANCE: lambda p, x, ref: (p - ref.exp()).abs().sum(),
    K2: lambda p, x, ref: (p * (x - ref).square() / 2).sum(),
    ABS: lambda p, x, ref: (p * (x - ref).abs()).sum(),
    NOTHING: lambda p, x, ref: 0 * x.sum(),
}

ESTIMATORS = [
    Estimator("k1", False, REVERSE, False, NOTHING, False),
    Estimator("k1", True, REVERSE, False, REVERSE, True),
    Estimator("k2", False, K2, True, REVERSE, False),
    Estimator("k2", True, K2, True, K2, True),
    Estimator("k3", False, REVERSE, True, FORWARD, False),
    Estimator("k3", True, REVERSE, True, REVERSE, True),
    Estimator("abs", False, ABS, True, DISTANCE, False),
    Estimator("abs", True, ABS, True, ABS, True),
]

# Five tokens. `old` is the older policy of the off-policy samples.
LOGITS = torch.tensor([1.0, 0.4, 0.0, -0.8, -1.5], dtype=torch.float64)
OLD = torch.tensor([0.6, 0.7, 0.3, -1.2, -0.9], dtype=torch.float64)
REFERENCES = {
    "near": torch.tensor([0.9, 0.55, -0.1, -0.7, -1.3], dtype=torch.float64),
    "far": torch.tensor([-0.3, 1.1, 0.5, -1.0, 1.2], dtype=torch.float64),
}


def exact(expectation: str, reference: str) -> tuple[Tensor, Tensor]:
    """() and (V,): its value and its gradient by the logits, float64, by enumeration."""
    logits = LOGITS.clone().requires_grad_()
    x = logits.log_softmax(0)
    value = EXPECTATIONS[expectation](x.exp(), x, REFERENCES[reference].log_softmax(0))
    return value.detach(), torch.autograd.grad(value, logits)[0]


def spread(estimator: Estimator, reference: str) -> tuple[float, float]:
    """The standard deviation of one sample's value, and of one sample's gradient (root of the summed variances of its
    components), on policy, by enumeration: the estimator's own formula and derivative, written out."""
    x = LOGITS.log_softmax(0)
    p, d = x.exp(), x - REFERENCES[reference].log_softmax(0)
    value, slope = {
        "k1": (d, torch.ones_like(d)),
        "k2": (d.square() / 2, d),
        "k3": (torch.exp(-d) + d - 1, 1 - torch.exp(-d)),
        "abs": (d.abs(), d.sign()),
    }[estimator.kl]
    slope = slope + value if estimator.ratio else slope  # r = 1, dr/dlogp = 1
    gradients = slope[:, None] * (torch.eye(len(p), dtype=p.dtype) - p)  # (sample, logit)

    def deviation(samples: Tensor) -> float:
        mean = (p[:, None] * samples).sum(0)
        return (p[:, None] * (samples - mean).square()).sum().sqrt().item()

    return deviation(value[:, None]), deviation(gradients)
