"""Forward and backward of every backend on this machine against the reference, on every device that it has."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

import redit_fast as rf
from redit_fast import backends

VOCABULARY, WIDTH, PROMPTS, GROUP, LENGTH = 1003, 64, 4, 4, 6  # an odd vocabulary: rows of every alignment
LIMITS = {"group_advantages": 0.0, "grpo_loss": 4e-3, "linear_grpo_loss": 8e-3, "RegularizedAdamW": 1e-4}


class Result(NamedTuple):
    op: str
    backend: str
    device: str
    dtype: str
    error: float  # the largest of its outputs' relative Frobenius errors against the reference
    limit: float
    seconds: float

    @property
    def passed(self) -> bool:
        return self.error <= self.limit  # not where it is NaN


def _group_advantages(inputs: dict[str, Tensor]) -> list[Tensor]:
    found = rf.group_advantages(inputs["rewards"], group_size=GROUP, dither=rf.Dither(seed=7), step=3)
    return [field.double() for field in found]


def _config(temperature: float = 0.8) -> rf.LossConfig:
    return rf.LossConfig("dapo", beta=0.05, temperature=temperature)


def _kwargs(inputs: dict[str, Tensor]) -> dict[str, object]:
    return {"old_logp": inputs["old_logp"], "ref_logp": inputs["ref_logp"], "mask": inputs["mask"], "config": _config()}


def _grpo_loss(inputs: dict[str, Tensor]) -> list[Tensor]:
    logits = inputs["logits"].clone().requires_grad_()
    logp, entropy = rf.token_logp(logits, inputs["targets"], entropy="grad")
    out = rf.grpo_loss(logits, inputs["targets"], inputs["advantages"], **_kwargs(inputs))
    (out.loss * 100 + logp.mean() + entropy.mean()).backward()
    return [out.loss.detach(), out.logp, out.entropy, logp.detach(), entropy.detach(), logits.grad]


def _linear_grpo_loss(inputs: dict[str, Tensor]) -> list[Tensor]:
    hidden, weight = (inputs[name].clone().requires_grad_() for name in ("hidden", "weight"))
    out = rf.linear_grpo_loss(hidden, weight, inputs["targets"], inputs["advantages"], **_kwargs(inputs))
    logp, entropy = rf.linear_logp(hidden, weight, inputs["targets"], entropy="grad")
    (out.loss * 100 + logp.mean() + entropy.mean()).backward()
    return [out.loss.detach(), out.logp, out.entropy, logp.detach(), hidden.grad, weight.grad]


def _regularized_adamw(inputs: dict[str, Tensor]) -> list[Tensor]:
    weight = inputs["weight"].clone().requires_grad_()
    optimizer = rf.RegularizedAdamW([weight], lr=1e-3, gamma=1e-2, epsilon=1e-2)
    for _ in range(2):
        (weight.float().square() * inputs["weight"].float()).sum().backward()
        if optimizer.perturb():
            (weight.float().square() * inputs["weight"].float()).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return [weight.detach()]


CHECKS: dict[str, tuple[Callable[[dict[str, Tensor]], list[Tensor]], tuple[str, ...]]] = {
    "group_advantages": (_group_advantages, ("group_advantages",)),
    "grpo_loss": (_grpo_loss, ("token_logp", "token_logp_grad", "token_loss", "scale_in_place")),
    "linear_grpo_loss": (_linear_grpo_loss, ("exp_product", "scale_in_place")),
    "RegularizedAdamW": (_regularized_adamw, ("squared_norm", "perturb", "combine", "adamw")),
}


def _inputs(device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    rows = PROMPTS * GROUP, LENGTH
    logits = 3 * normal(*rows, VOCABULARY)
    targets = torch.randint(VOCABULARY, rows, generator=generator)
    logp = torch.log_softmax(logits / 0.8, -1).gather(-1, targets[..., None]).squeeze(-1)
    wide = {
        "rewards": normal(PROMPTS * GROUP),
        "advantages": normal(PROMPTS * GROUP),
        "old_logp": logp + 0.1 * normal(*rows),
        "ref_logp": logp + 0.1 * normal(*rows),
        "targets": targets,
        "mask": torch.rand(rows, generator=generator) > 0.2,
    }
    narrow = {"logits": logits, "hidden": normal(*rows, WIDTH), "weight": 0.3 * normal(VOCABULARY, WIDTH)}
    return {name: x.to(device) for name, x in wide.items()} | {name: x.to(device, dtype) for name, x in narrow.items()}


def _error(found: list[Tensor], expected: list[Tensor]) -> float:
    errors = [
        ((x.double() - y.double()).norm() / y.double().norm().clamp(min=1e-12)).item()
        for x, y in zip(found, expected, strict=True)
    ]
    return max(errors, key=lambda error: (error != error, error))


def run() -> Iterator[Result]:
    """One result for each op, backend that does not refuse it, device and dtype."""
    devices = [torch.device("cpu")] + [torch.device("cuda")] * torch.cuda.is_available()
    for device in devices:
        for dtype in (torch.float32, torch.bfloat16):
            inputs = _inputs(device, dtype)
            for op, (check, primitives) in CHECKS.items():
                with rf.use_backend("reference"):
                    expected = check(inputs)
                for name in backends.NAMES[:-1]:
                    if any(backends.refusal(primitive, name, device) for primitive in primitives):
                        continue
                    start = time.perf_counter()
                    with rf.use_backend(name):
                        error = _error(check(inputs), expected)
                    seconds = time.perf_counter() - start
                    yield Result(op, name, str(device), str(dtype)[6:], error, LIMITS[op], seconds)
