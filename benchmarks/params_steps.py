"""A whole step with GR beside the same in torch: g1 and g2 are given, everything else that the step needs is timed.

Bytes a weight, float32 / bfloat16: norm 4 / 2, perturbation 12 / 6, norm of g2 4 / 2, AdamW 28 / 28: with the copy of
float32 weights that is restored from, 52 / 38. With gamma other than epsilon g1 is kept and combined: 60 / 42.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

import redit_fast as rf

from .backends import forced, of_ours
from .clock import clock
from .measure import Errors, Provider, Run, Table
from .params_oracle import ADAMW, Descent, check_perturbation, largest, sign
from .place import Place
from .roofline import Work

F32, BF16 = torch.float32, torch.bfloat16
EPSILON, MAX_NORM, PERTURB_MAX_NORM, SAM_RHO = 0.1, 1.0, 10.0, 0.05
STEPS = ((F32, 1.0), (F32, 0.75), (BF16, 1.0), (BF16, 0.75))  # dtype, gamma / epsilon
BYTES = {(F32, 1.0): 52, (F32, 0.75): 60, (BF16, 1.0): 38, (BF16, 0.75): 42}
SHAPE = (1024, 1024)


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _grads(params: Sequence[Tensor]) -> list[Tensor]:
    return [p.grad for p in params if p.grad is not None]


class Gradients:
    """Weights and the gradients of both passes, whose sign changes with the turn; the step's own in float64."""

    def __init__(self, place: Place, dtype: torch.dtype, ratio: float, shapes: Sequence[tuple[int, ...]]):
        generator = place.generator(0)

        def normal(scale: float) -> list[Tensor]:
            return [(torch.randn(shape, generator=generator, device=place.device) * scale).to(dtype)
                    for shape in shapes]  # fmt: skip

        self.start, self.g1, self.g2 = normal(0.02), normal(1e-4), normal(1e-4)
        self.ratio, self.dtype, self.first_scale = ratio, dtype, 0.0
        square = sum(self._combined(i).square().sum().item() for i in range(len(shapes)))
        self.clip = min(1.0, MAX_NORM / (square**0.5 + 1e-6))
        first = sum(g.double().square().sum().item() for g in self.g1) ** 0.5
        self.perturbation = EPSILON * min(1.0, PERTURB_MAX_NORM / (first + 1e-6))
        self.sam = SAM_RHO / first

    def _combined(self, i: int) -> Tensor:
        return (1 - self.ratio) * self.g1[i].double() + self.ratio * self.g2[i].double()

    def exact(self, i: int) -> Tensor:
        """What AdamW gets for tensor i, but for its sign."""
        return self.clip * self._combined(i)

    def give(self, params: Sequence[Tensor], grads: Sequence[Tensor], turn: int) -> None:
        for p, g in zip(params, grads, strict=True):
            p.grad = g * sign(turn)


class Watch:
    """Compares one step: keeps weights before it, judges the perturbation in between and the weights after it."""

    def __init__(self, gradients: Gradients, exact: bool, scale: float):
        self.gradients, self.exact, self.scale, self.descent = gradients, exact, scale, Descent()

    def before(self, weights: Sequence[Tensor], turn: int, thorough: bool) -> None:
        count = len(weights)
        self.chosen = list(range(count)) if thorough else [turn % count]
        self.kept = [weights[i].detach().clone() for i in self.chosen]
        self.turn = turn
        self.descent.advance(sign(turn))

    def perturbed(self, params: Sequence[Tensor]) -> None:
        moved = [params[i].detach() for i in self.chosen]
        grads = [self.gradients.g1[i] for i in self.chosen]
        kept = [p.to(moved[0].dtype) for p in self.kept]
        check_perturbation(kept, moved, grads, self.scale * sign(self.turn), self.exact)

    def after(self, weights: Sequence[Tensor]) -> Errors:
        pairs = zip(self.chosen, self.kept, strict=True)
        return Errors(largest(self.descent.error(p, weights[i].detach(), self.gradients.exact(i)) for i, p in pairs))


def step_table(
    place: Place, dtype: torch.dtype, ratio: float, tensors: int, rounds: int, axis: str = "", small: bool = False
) -> Table:
    shapes = [(256, 256)] if small else [SHAPE] * tensors
    gradients = Gradients(place, dtype, ratio, shapes)
    providers = [
        Provider(name, partial(_ours, gradients, backend, keep=ratio != 1), True)
        for name, backend in of_ours("adamw", place)
    ]
    if ratio != 1:
        providers.append(Provider("redit-fast, g1 folded in", lambda: _ours(gradients, None, keep=False), True))
    providers.append(Provider("torch foreach, fused AdamW", lambda: _foreach(gradients, keep=True)))
    if dtype != F32 and not axis:
        providers.append(Provider("torch foreach, no copy kept", lambda: _foreach(gradients, keep=False)))
    if dtype == F32 and ratio == 1:
        providers.append(Provider("SAM's formula, AdamW", lambda: _sam(gradients)))
    weights = sum(p.numel() for p in gradients.start)
    work = Work(reads=BYTES[dtype, ratio] * weights)
    title = f"step, gamma = {ratio:g} epsilon"
    limit = 0.02 if dtype == F32 or ratio == 1 else 0.1  # combining in bfloat16 rounds the gradient
    return Table("params", title, {"W": weights}, name_of(dtype), work, providers, "weights by learning rate",
                 Errors(limit), rounds, axis)  # fmt: skip


def _ours(gradients: Gradients, backend: str | None, keep: bool) -> Run:
    params = [torch.nn.Parameter(p.clone()) for p in gradients.start]
    watch = Watch(gradients, True, gradients.perturbation)
    optimizer = rf.RegularizedAdamW(
        params, **ADAMW, gamma=gradients.ratio * EPSILON, epsilon=EPSILON, max_norm=MAX_NORM,  # type: ignore[arg-type]
        perturb_max_norm=PERTURB_MAX_NORM, keep_first_grad=keep,
    )  # fmt: skip
    perturb, step = optimizer.perturb, optimizer.step
    if backend is not None:
        perturb, step = forced(backend, perturb), forced(backend, step)

    def weights() -> list[Tensor]:
        return [optimizer.state[p].get("master", p) for p in params]

    def run(turn: int, thorough: bool) -> Errors:
        gradients.give(params, gradients.g1, turn)
        watch.before(weights(), turn, thorough)
        with clock:
            perturb()
        watch.perturbed(params)
        if params[0].grad is None:
            gradients.give(params, gradients.g2, turn)
        else:
            second = [g * sign(turn) for g in gradients.g2]
            with clock, torch.no_grad():  # what autograd does in the second backward pass
                torch._foreach_add_(_grads(params), second)
        with clock:
            step()
        optimizer.zero_grad()
        return watch.after(weights())

    return run


def _foreach(gradients: Gradients, keep: bool) -> Run:
    """Keeps its buffers from step to step; one lerp in place combines. keep=False: weights come back from masters."""
    params = [p.clone().requires_grad_() for p in gradients.start]
    copies = [torch.empty_like(p) for p in params] if keep else []
    low = gradients.dtype != F32
    masters = [p.detach().float().requires_grad_() for p in params] if low else params
    wide_grads = [torch.empty_like(master) for master in masters] if low else []
    optimizer = torch.optim.AdamW(masters, **ADAMW, fused=True)  # type: ignore[arg-type]
    watch = Watch(gradients, not low, gradients.perturbation)

    @torch.no_grad()
    def run(turn: int, thorough: bool) -> Errors:
        gradients.give(params, gradients.g1, turn)
        watch.before(masters, turn, thorough)
        with clock:
            if keep:
                torch._foreach_copy_(copies, params)
            first = _grads(params)
            norm = torch.nn.utils.get_total_norm(first, foreach=True).item()
            torch._foreach_add_(params, first, alpha=EPSILON * min(1.0, PERTURB_MAX_NORM / (norm + 1e-6)))
        watch.perturbed(params)
        if gradients.ratio == 1:
            del first
        gradients.give(params, gradients.g2, turn)
        with clock:
            if keep:
                torch._foreach_copy_(params, copies)
            grads = _grads(params)
            if gradients.ratio != 1:
                torch._foreach_lerp_(first, grads, gradients.ratio)
                grads = first
            if low:
                torch._foreach_copy_(wide_grads, grads)
                grads = wide_grads
            for master, grad in zip(masters, grads, strict=True):
                master.grad = grad
            torch.nn.utils.clip_grad_norm_(masters, MAX_NORM, foreach=True)
            optimizer.step()
            if low:
                torch._foreach_copy_(params, masters)
        for p in params:
            p.grad = None
        return watch.after(masters)

    return run


def _sam(gradients: Gradients) -> Run:
    """Foret et al. 2021, equation 2, tensor by tensor as its public implementations have it: e = rho g1 / |g1|, then
    the base optimizer from the old weights with the gradient at p + e."""
    params = [p.clone().requires_grad_() for p in gradients.start]
    optimizer = torch.optim.AdamW(params, **ADAMW)  # type: ignore[arg-type]
    watch = Watch(gradients, True, gradients.sam)

    @torch.no_grad()
    def run(turn: int, thorough: bool) -> Errors:
        gradients.give(params, gradients.g1, turn)
        watch.before(params, turn, thorough)
        with clock:
            norm = torch.stack([grad.norm() for grad in _grads(params)]).norm()
            old = [p.clone() for p in params]
            for p, grad in zip(params, _grads(params), strict=True):
                p.add_(grad * (SAM_RHO / (norm + 1e-12)))
        watch.perturbed(params)
        gradients.give(params, gradients.g2, turn)
        with clock:
            for p, kept in zip(params, old, strict=True):
                p.copy_(kept)
            torch.nn.utils.clip_grad_norm_(params, MAX_NORM)
            optimizer.step()
        for p in params:
            p.grad = None
        return watch.after(params)

    return run
