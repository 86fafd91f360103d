"""Forward and backward of every backend on this machine, on every device that it has, against float64 on the same
inputs: an error may be 1.25 times that of plain PyTorch in float32, rounded once where the result is stored."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

import redit_fast as rf
from redit_fast import backends
from redit_fast.checks import given

VOCABULARY, WIDTH, PROMPTS, GROUP, LENGTH = 1003, 64, 4, 4, 6  # an odd vocabulary: rows of every alignment
FLOOR = 1e-6  # of a result's norm: a few roundings of float32
# bfloat16's head keeps E in bfloat16: its gradients err up to 2.2 times as much as float32's rounded once.
HEAD_IN_BFLOAT16 = 4e-3


class Result(NamedTuple):
    op: str
    backend: str
    device: str
    dtype: str
    error: float  # of the output nearest to its limit, or beyond: its relative Frobenius error
    limit: float
    seconds: float

    @property
    def passed(self) -> bool:
        return self.error <= self.limit  # not where it is NaN


class Check(NamedTuple):
    run: Callable[[dict[str, Tensor]], list[Tensor]]  # with the backend in force
    oracle: Callable[[dict[str, Tensor]], tuple[list[Tensor], list[Tensor]]]  # the same in float64, and in float32
    primitives: tuple[str, ...]
    floor: float = FLOOR
    bfloat16_gradients: float = 0.0  # their limit where it is above the rule's


def _group_advantages(inputs: dict[str, Tensor]) -> list[Tensor]:
    found = rf.group_advantages(inputs["rewards"], group_size=GROUP, dither=rf.Dither(seed=7), step=3)
    return [field.double() for field in found]


def _config(temperature: float = 0.8) -> rf.LossConfig:
    return rf.LossConfig("dapo", beta=0.05, temperature=temperature)


def _kwargs(inputs: dict[str, Tensor]) -> dict[str, Any]:
    return {"old_logp": inputs["old_logp"], "ref_logp": inputs["ref_logp"], "mask": inputs["mask"], "config": _config()}


def _of_the_reference(inputs: dict[str, Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    with rf.use_backend("reference"):
        found = _group_advantages(inputs)
    return found, found


def _results(out: rf.LossOutput, logp: Tensor, entropy: Tensor, mask: Tensor, leaves: list[Tensor]) -> list[Tensor]:
    # By a power of 2 and apart: as they are, bfloat16 would round them twice.
    grads = torch.autograd.grad(128 * out.loss, leaves, retain_graph=True)
    grads += torch.autograd.grad(logp.mean() + entropy.mean(), leaves)
    rows = [torch.where(mask, value, 0) for value in (out.logp, given(out.entropy))]
    return [value.detach() for value in (out.loss, *rows, logp, entropy)] + list(grads)


def _grpo_loss(inputs: dict[str, Tensor]) -> list[Tensor]:
    logits = inputs["logits"].clone().requires_grad_()
    logp, entropy = rf.token_logp(logits, inputs["targets"], entropy="grad")
    out = rf.grpo_loss(logits, inputs["targets"], inputs["advantages"], **_kwargs(inputs))
    return _results(out, logp, entropy, inputs["mask"], [logits])


def _linear_grpo_loss(inputs: dict[str, Tensor]) -> list[Tensor]:
    hidden, weight = (inputs[name].clone().requires_grad_() for name in ("hidden", "weight"))
    out = rf.linear_grpo_loss(hidden, weight, inputs["targets"], inputs["advantages"], **_kwargs(inputs))
    logp, entropy = rf.linear_logp(hidden, weight, inputs["targets"], entropy="grad")
    return _results(out, logp, entropy, inputs["mask"], [hidden, weight])


def _plain(inputs: dict[str, Tensor], names: tuple[str, ...]) -> tuple[list[Tensor], list[Tensor]]:
    """`names`: logits, or hidden and weight."""

    def logp_and_entropy(logits: Tensor) -> tuple[Tensor, Tensor]:
        every = torch.log_softmax(logits, -1)
        logp = every.gather(-1, inputs["targets"][..., None]).squeeze(-1)
        return logp, -(every.exp() * every).sum(-1)

    def results(dtype: torch.dtype) -> list[Tensor]:
        leaves = [inputs[name].to(dtype, copy=True).requires_grad_() for name in names]
        logits = leaves[0] if len(leaves) == 1 else leaves[0] @ leaves[1].t()
        logp, entropy = logp_and_entropy(logits / _config().temperature)
        out = rf.policy_loss(logp, inputs["advantages"], entropy=entropy, **_kwargs(inputs))
        return _results(out, *logp_and_entropy(logits), inputs["mask"], leaves)

    return results(torch.float64), results(torch.float32)


def _regularized_adamw(inputs: dict[str, Tensor]) -> list[Tensor]:
    """What two steps move the weight by, of its master where it has one."""
    start = inputs["weight"]
    wide = torch.promote_types(start.dtype, torch.float32)
    weight = start.clone().requires_grad_()
    optimizer = rf.RegularizedAdamW([weight], lr=1e-3, gamma=1e-2, epsilon=1e-2)
    for _ in range(2):
        (weight.to(wide).square() * start.to(wide)).sum().backward()
        if optimizer.perturb():
            (weight.to(wide).square() * start.to(wide)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return [optimizer.state[weight].get("master", weight.detach()) - start.to(wide)]


def _steps_of_the_reference(inputs: dict[str, Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """In float64, and in the weight's own dtype, in which the perturbation is rounded."""
    with rf.use_backend("reference"):
        return _regularized_adamw({"weight": inputs["weight"].double()}), _regularized_adamw(inputs)


CHECKS: dict[str, Check] = {
    "group_advantages": Check(_group_advantages, _of_the_reference, ("group_advantages",), floor=0.0),
    "grpo_loss": Check(
        _grpo_loss,
        lambda inputs: _plain(inputs, ("logits",)),
        ("token_logp", "token_logp_grad", "token_loss", "scale_in_place"),
    ),
    "linear_grpo_loss": Check(
        _linear_grpo_loss,
        lambda inputs: _plain(inputs, ("hidden", "weight")),
        ("exp_product", "exp_product_grad", "addmm", "scale_in_place"),
        bfloat16_gradients=HEAD_IN_BFLOAT16,
    ),
    "RegularizedAdamW": Check(
        _regularized_adamw, _steps_of_the_reference, ("squared_norm", "perturb", "combine", "adamw")
    ),
}


def _inputs(device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float32, device="cpu")

    rows = PROMPTS * GROUP, LENGTH
    logits = 3 * normal(*rows, VOCABULARY)
    targets = torch.randint(VOCABULARY, rows, generator=generator, device="cpu")
    logp = torch.log_softmax(logits / 0.8, -1).gather(-1, targets[..., None]).squeeze(-1)
    wide = {
        "rewards": normal(PROMPTS * GROUP),
        "advantages": normal(PROMPTS * GROUP),
        "old_logp": logp + 0.1 * normal(*rows),
        "ref_logp": logp + 0.1 * normal(*rows),
        "targets": targets,
        "mask": torch.rand(rows, generator=generator, dtype=torch.float32, device="cpu") > 0.2,
    }
    narrow = {"logits": logits, "hidden": normal(*rows, WIDTH), "weight": 0.3 * normal(VOCABULARY, WIDTH)}
    return {name: x.to(device) for name, x in wide.items()} | {name: x.to(device, dtype) for name, x in narrow.items()}


def _relative(x: Tensor, exact: Tensor) -> float:
    return ((x.double() - exact.double()).norm() / exact.double().norm().clamp(min=1e-12)).item()


def _error_and_limit(
    found: list[Tensor], exact: list[Tensor], low: list[Tensor], floor: float, gradients: float
) -> tuple[float, float]:
    """Of the output whose error is the largest part of its limit."""
    pairs = []
    for x, y, z in zip(found, exact, low, strict=True):
        limit = 1.25 * _relative(z.to(x.dtype), y) + floor
        pairs.append((_relative(x, y), max(limit, gradients) if x.dtype == torch.bfloat16 else limit))
    return max(pairs, key=lambda pair: (pair[0] != pair[0], pair[0] - pair[1] if pair[1] == 0 else pair[0] / pair[1]))


def run() -> Iterator[Result]:
    """One result for each op, backend that does not refuse it, device and dtype."""
    devices = [torch.device("cpu")] + [torch.device("cuda")] * torch.cuda.is_available()
    for device in devices:
        for dtype in (torch.float32, torch.bfloat16):
            inputs = _inputs(device, dtype)
            for op, check in CHECKS.items():
                exact, low = check.oracle(inputs)
                for name in backends.NAMES[:-1]:
                    if any(backends.refusal(primitive, name, device) for primitive in check.primitives):
                        continue
                    start = time.perf_counter()
                    with rf.use_backend(name):
                        found = check.run(inputs)
                    seconds = time.perf_counter() - start
                    error, limit = _error_and_limit(found, exact, low, check.floor, check.bfloat16_gradients)
                    yield Result(op, name, str(device), str(dtype)[6:], error, limit, seconds)
