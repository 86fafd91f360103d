"""Passes over parameters and the optimizer's step with GR: redit-fast bench params

Passes: the norm, the perturbation and AdamW of one tensor. A step is both passes' work around given gradients: norm
and perturbation, then restoring, combining, clipping and AdamW (params_steps.py).
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from functools import partial
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from redit_fast import backends

from .backends import of_ours
from .clock import clock
from .measure import Errors, Provider, Run, Table
from .params_oracle import ADAMW, BETAS, DECAY, EPS, LR, Descent, largest, pieces, sign, spacing
from .params_steps import F32, STEPS, name_of, step_table
from .place import Place
from .roofline import Work

BF16 = torch.bfloat16
SIZES = {  # weights of a pass; tensors of 1024 x 1024 in a step; the same of the series
    "cpu": (25_000_000, 24, (1, 2, 4, 8, 16)),
    "quick": (4_000_000, 8, (1, 2, 3, 4, 6)),
    "cuda": (200_000_000, 480, (16, 32, 64, 128, 256)),
    "dry": (10_000, 0, ()),
}
PERTURBATION = 0.05  # times gradients as large as the weights: some units in bfloat16's last place
CAUSES = {
    "torch fused AdamW": "both read and write the same bytes, and in bfloat16 it has no master weights to round",
    "torch foreach_add_": "it counts nothing: ours also sums what was applied and what was intended",
    "torch foreach_norm": "it adds in float32, with the error shown",
}


def tables(place: Place, size: str) -> Iterator[Table]:
    count, tensors, series = SIZES[size]
    rounds = 9 if size == "cpu" else 5
    dtypes = (F32, BF16) if place.kind == "cpu" else (BF16,)
    for dtype in dtypes:
        for make in (norm, perturb, adamw):
            yield make(place, dtype, count, rounds)
    for dtype, ratio in STEPS:
        if dtype in dtypes:
            yield step_table(place, dtype, ratio, tensors or 1, rounds, small=not tensors)
    for many in series:
        yield step_table(place, dtypes[0], 1.0, many, 5, axis="W")


def _primitive(backend: str, name: str) -> Callable[..., None]:
    return getattr(import_module(f"{backends.__name__}.{backend}"), name)


def _normal(place: Place, count: int, dtype: torch.dtype, seed: int) -> Tensor:
    return torch.randn(count, generator=place.generator(seed), device=place.device).to(dtype)


def _table(
    title: str,
    dtype: torch.dtype,
    count: int,
    work: Work,
    providers: list[Provider],
    value: str,
    limit: float,
    rounds: int,
) -> Table:
    return Table("params", title, {"W": count}, name_of(dtype), work, providers, value, Errors(limit), rounds)


def norm(place: Place, dtype: torch.dtype, count: int, rounds: int) -> Table:
    grads = [_normal(place, count, dtype, seed) for seed in range(2)]
    exact = [sum(g[part].double().square().sum().item() for part in pieces(count, 0, True)) for g in grads]

    def provider(name: str, load: Callable[[], Callable[[Tensor], Tensor]], ours: bool = False) -> Provider:
        def build() -> Run:
            square = load()

            def run(turn: int, thorough: bool) -> Errors:
                with clock:
                    out = square(grads[turn % 2])
                return Errors(abs(out.item() / exact[turn % 2] - 1))

            return run

        return Provider(name, build, ours, CAUSES.get(name, ""))

    def of_backend(backend: str) -> Callable[[Tensor], Tensor]:
        squared_norm = _primitive(backend, "squared_norm")
        out = torch.zeros((), dtype=torch.float64, device=place.device)

        def square(grad: Tensor) -> Tensor:
            squared_norm(out, [grad])
            return out

        return square

    providers = [
        *(provider(name, partial(of_backend, backend), True)
          for name, backend in of_ours("squared_norm", place)),
        provider("torch foreach_norm", lambda: lambda g: torch._foreach_norm([g], dtype=F32)[0].double().square()),
    ]  # fmt: skip
    work = Work(reads=grads[0].nbytes)
    return _table("norm", dtype, count, work, providers, "norm", 0.05, rounds)


def perturb(place: Place, dtype: torch.dtype, count: int, rounds: int) -> Table:
    start, grad = _normal(place, count, dtype, 0), _normal(place, count, dtype, 1)

    def provider(name: str, load: Callable[[], Callable[[Tensor, float], Any]], ours: bool = False) -> Provider:
        """`load()` gives f(p, scale), which adds scale * grad to p."""

        def build() -> Run:
            add, p = load(), start.clone()

            def run(turn: int, thorough: bool) -> Errors:
                p.copy_(start)
                scale = PERTURBATION * sign(turn)
                with clock:
                    add(p, scale)
                errors = []
                for part in pieces(count, turn, thorough):
                    exact = start[part].double() + scale * grad[part].double()
                    unit = spacing(torch.maximum(p[part].abs(), start[part].abs()))
                    errors.append(((p[part].double() - exact).abs() / unit).max().item())
                return Errors(largest(errors))

            return run

        return Provider(name, build, ours, CAUSES.get(name, ""))

    def of_backend(backend: str, rounding: str) -> Callable[[Tensor, float], Any]:
        call = _primitive(backend, "perturb")
        sums = torch.zeros(4, dtype=torch.float64, device=place.device)
        step = torch.zeros((), dtype=torch.int64, device=place.device)

        def add(p: Tensor, scale: float) -> None:
            factor = torch.tensor(scale, dtype=torch.float64, device=place.device)
            call(sums, [p], [grad], [0], factor, 1.0, rounding, 0, step, None)

        return add

    roundings = ["nearest"] if dtype == F32 else ["stochastic", "nearest"]
    providers = [
        *(provider(name if rounding == roundings[0] else f"{name}, {rounding}",
                   partial(of_backend, backend, rounding), True)
          for name, backend in of_ours("perturb", place) for rounding in roundings),
        provider("torch foreach_add_", lambda: lambda p, scale: torch._foreach_add_([p], [grad], alpha=scale)),
    ]  # fmt: skip
    work = Work(reads=grad.nbytes, updates=start.nbytes)
    return _table(
        "perturbation", dtype, count, work, providers, "units in the last place", 3 if dtype == F32 else 1.05, rounds
    )


def adamw(place: Place, dtype: torch.dtype, count: int, rounds: int) -> Table:
    start, grad = _normal(place, count, dtype, 0), _normal(place, count, dtype, 1) * 1e-4
    grads = {1.0: grad, -1.0: -grad}

    def provider(name: str, load: Callable[[], tuple[Tensor, Callable[[Tensor], Any]]], ours: bool = False) -> Provider:
        """`load()` gives the float32 weights and f(gradient), which updates them and their copy in `dtype`."""

        def build() -> Run:
            weights, update = load()
            descent = Descent()

            def run(turn: int, thorough: bool) -> Errors:
                parts = pieces(count, turn, thorough)
                before = [weights.detach()[part].clone() for part in parts]
                descent.advance(sign(turn))
                with clock:
                    update(grads[sign(turn)])
                found = zip(before, parts, strict=True)
                return Errors(
                    largest(descent.error(b, weights.detach()[part], grad[part].double()) for b, part in found)
                )

            return run

        return Provider(name, build, ours, CAUSES.get(name, ""))

    def of_backend(backend: str) -> tuple[Tensor, Callable[[Tensor], Any]]:
        call, p = _primitive(backend, "adamw"), start.clone()
        m, v = (torch.zeros(count, device=place.device) for _ in range(2))
        step = torch.zeros((), device=place.device)
        one = torch.ones((), dtype=torch.float64, device=place.device)
        finite = torch.tensor(True, device=place.device)
        master = None if dtype == F32 else p.float()

        def update(gradient: Tensor) -> None:
            call([p], [master], [gradient], [m], [v], [step], one, finite, LR, *BETAS, EPS, DECAY)

        return p if master is None else master, update

    def of_torch(**how: bool) -> tuple[Tensor, Callable[[Tensor], Any]]:
        p = start.clone()
        weight = p if dtype == F32 else p.float()
        optimizer = torch.optim.AdamW([weight], **ADAMW, **how)  # type: ignore[arg-type]
        wide = torch.empty_like(weight)

        def update(gradient: Tensor) -> None:
            weight.grad = gradient if dtype == F32 else wide.copy_(gradient)
            optimizer.step()
            if dtype != F32:
                p.copy_(weight)

        return weight, update

    providers = [
        *(provider(name, partial(of_backend, backend), True)
          for name, backend in of_ours("adamw", place)),
        provider("torch fused AdamW", lambda: of_torch(fused=True)),
        provider("torch foreach AdamW", lambda: of_torch(foreach=True)),
    ]  # fmt: skip
    copies = 0 if dtype == F32 else start.nbytes
    work = Work(reads=grad.nbytes, updates=3 * 4 * count, writes=copies)
    return _table("AdamW", dtype, count, work, providers, "weights by learning rate", 0.02, rounds)


if __name__ == "__main__":
    from .command import main

    sys.exit(main("params", tables))
