"""The options of gradient regularisation, checked: one object from the door to the step."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch

from redit_fast.backends.args import Rounding
from redit_fast.checks import check_choice, check_flag, check_step, described, positive, real_number, whole_number

Pass2Ratio = Literal["fresh", "pass1"]
PUBLISHED = 1e-3  # the GR paper's epsilon, everywhere; "auto" is never below it
FACTOR = 2.0**64  # of gamma and epsilon: with a warm-up of 2**32 steps a gradient is multiplied by 2**96 at most


def _option(default: object, text: str) -> Any:
    """A field with the help text that command lines show, of this package's trainer and of hosts."""
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True)
class GR:
    """What a step with gradient regularisation (GR, arXiv 2602.18037) does.

    Settings of the same step: SAM is normalized=True with gamma = epsilon = rho; Zhao et al.'s penalty lambda |grad L|
    is normalized=True with gamma = lambda, epsilon = r (their alpha is lambda / r).

    Args:
        gamma: weight of the penalty; 0 switches GR off.
        epsilon: the finite-difference step. gamma == epsilon gives g = g2. "auto": max(0.001, the smallest power of two
            whose step keeps cosine 0.95 after rounding), at most where the step is 0.02 |theta| long, with a warning;
            found anew every 100 steps, by trying them: nothing else before the step waits for the device.
        normalized: the step is epsilon g1 / |g1| and the objective L + gamma |grad L| (SAM, Zhao et al. 2022).
        perturb_max_norm: g1's norm over the perturbed set counts as at most this in the step (not in g).
        rounding: how bfloat16 and float16 parameters take the step. "stochastic" (counter-based) keeps it in
            expectation, "nearest" loses most of a small step.
        keep_first_grad: hold g1 in a copy instead of folding it into .grad; default: for bfloat16 and float16 gradients
            when gamma / epsilon is outside [0.5, 3], where folding rounds, and with epsilon="auto".
        gamma_warmup_steps: gamma rises linearly from 0 over so many steps.
        every_k_steps: regularise the steps whose number is a multiple of it only.
        pass2_ratio: where a batch carries no old log-probs, the second pass takes its own ("fresh": ratio 1, as in the
            paper) or the first pass's ("pass1"). For those who run the second pass: trainers and integrations.
        compute_dtype: in what dtype the forward pass sees the parameters (for the step metrics), default their own;
            pass torch.bfloat16 under autocast.

    Raises:
        ValueError, TypeError: a field of another type or outside its range, naming it.
    """

    gamma: float = _option(1e-3, "Weight of gradient regularisation, L + gamma / 2 |grad L|^2. 0 is off.")
    epsilon: float | Literal["auto"] = _option(
        PUBLISHED, "Length of the second pass's step, epsilon times the first gradient."
    )
    normalized: bool = _option(
        False, "Whether the step is epsilon long and the objective L + gamma |grad L| (SAM, Zhao et al. 2022)."
    )
    perturb_max_norm: float = _option(10.0, "The first gradient's norm counts as at most this in the step.")
    rounding: Rounding = _option(
        "stochastic",
        "How bfloat16 and float16 weights take the step: 'stochastic' keeps it in expectation, 'nearest' loses most of "
        "a small one.",
    )
    keep_first_grad: bool | None = _option(
        None,
        "Whether the first gradient is held in a copy, not folded into the second's; none: where folding would round "
        "it.",
    )
    gamma_warmup_steps: int = _option(0, "Steps over which gamma rises linearly from 0.")
    every_k_steps: int = _option(1, "Regularise the optimizer steps whose number is a multiple of it.")
    pass2_ratio: Pass2Ratio = _option(
        "fresh",
        "Where a batch carries no old log-probs: the second pass takes its own ('fresh', ratio 1 as in the paper) or "
        "the first pass's ('pass1').",
    )
    compute_dtype: torch.dtype | None = None

    def __post_init__(self) -> None:
        if isinstance(self.epsilon, str):
            if self.epsilon != "auto":
                raise ValueError(f"epsilon must be a number above 0 or 'auto', got {self.epsilon!r}")
        else:
            object.__setattr__(self, "epsilon", positive("epsilon", self.epsilon))
        object.__setattr__(self, "gamma", real_number("gamma", self.gamma, least=0, float32=True))
        least = PUBLISHED if isinstance(self.epsilon, str) else self.epsilon
        if self.gamma and not 1 / FACTOR <= self.gamma / least <= FACTOR:
            raise ValueError(
                f"gamma must be 0 or within a factor of 2**64 of epsilon ({self.epsilon}), since gradients are "
                f"multiplied by their quotient, got {self.gamma}"
            )
        object.__setattr__(self, "perturb_max_norm", positive("perturb_max_norm", self.perturb_max_norm))
        check_flag("normalized", self.normalized)
        check_choice("rounding", self.rounding, get_args(Rounding))
        if self.keep_first_grad is not None:
            check_flag("keep_first_grad", self.keep_first_grad)
        warmup = whole_number("gamma_warmup_steps", self.gamma_warmup_steps, bits=32)
        object.__setattr__(self, "gamma_warmup_steps", warmup)
        object.__setattr__(self, "every_k_steps", whole_number("every_k_steps", self.every_k_steps, 1))
        check_choice("pass2_ratio", self.pass2_ratio, get_args(Pass2Ratio))
        dtype = self.compute_dtype
        if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
            raise TypeError(f"compute_dtype must be a floating-point torch.dtype, got {described(dtype)}")

    def gamma_at(self, step: int) -> float:
        """gamma at an optimizer step in [0, 2**32); 0 where that has no second pass."""
        step = check_step(step)
        if step % self.every_k_steps:
            return 0.0
        return self.gamma * (min(1.0, step / self.gamma_warmup_steps) if self.gamma_warmup_steps else 1.0)
