"""The two passes of gradient regularisation, without an optimizer:

    loss().backward()
    with passes.perturb() as wanted:     # theta -> theta + delta on the perturbed set
        if wanted:
            loss().backward()
    with passes.combine() as combined:   # back at theta; combined.factor times .grad is g, whose norm is combined.norm
        ...                              # the step

Whatever raises on the way, in the caller's code too: theta is put back, bit by bit.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from redit_fast.gr import epsilon as auto_epsilon
from redit_fast.gr import gradients, perturbation, shards
from redit_fast.gr.config import GR, PUBLISHED
from redit_fast.gr.grad_scaler import leave_a_mark
from redit_fast.gr.perturbation import LOW_PRECISION, Perturbation
from redit_fast.gr.shards import local

TINY = torch.finfo(torch.float64).tiny


class Store(Protocol):
    """Where theta is kept while the parameters are at theta + delta."""

    def keep(self, params: list[Tensor]) -> None:
        """Saves them."""

    def restore(self, params: list[Tensor], step_writes: Collection[Tensor] = ()) -> None:
        """Puts them back. `step_writes`: what the step that follows is given; a store whose owner takes it from theta
        may leave that."""

    def written(self, params: list[Tensor]) -> None:
        """They were just written, by the perturbation or by `restore`."""


class Copies:
    """One copy of the perturbed parameters, in their own dtype, which stays between steps."""

    def __init__(self):
        self.copies: dict[Tensor, Tensor] = {}

    def keep(self, params: list[Tensor]) -> None:
        for p in params:
            if p not in self.copies:
                self.copies[p] = torch.empty_like(local(p))
        torch._foreach_copy_([self.copies[p] for p in params], [local(p) for p in params])

    def restore(self, params: list[Tensor], step_writes: Collection[Tensor] = ()) -> None:
        torch._foreach_copy_([local(p) for p in params], [self.copies[p] for p in params])

    def written(self, params: list[Tensor]) -> None:
        pass


class Combined(NamedTuple):
    """The regularised gradient, as the step finds it."""

    params: list[Tensor]  # those with a gradient
    moved: list[Tensor]  # those that were perturbed; none where there was no second pass
    factor: Tensor  # () float64: factor times .grad is g, times the loss scale where there is one
    norm: Tensor  # () float64, of g, without the loss scale
    finite: Tensor  # () bool: both passes' gradients


class _FirstPass(NamedTuple):
    """What perturb() leaves for combine()."""

    first: dict[Tensor, Tensor] | None  # g1 where it is kept aside
    ratio: float  # gamma / epsilon
    norm: Tensor  # |g1|
    finite: Tensor
    sums: shards.Sums  # of `perturbation.step_metrics`
    written: dict[Tensor, tuple]  # .grad as the second pass finds it


class TwoPass:
    """From g1 in .grad to g = (1 - gamma/epsilon) g1 + (gamma/epsilon) g2 in .grad, by way of theta + delta.

    Args:
        groups: as `parameter_groups` makes them: dicts of "params" and "perturb", True where it is missing. At least
            one parameter requires a gradient.
        gr: the options.
        store: `Copies`, or the masters of `RegularizedAdamW`.
        seed: of the stochastic rounding, in [0, 2**64).

    Attributes:
        groups, gr: may be set between steps.
        attempts: steps begun, for gamma's warm-up and every_k_steps; a host with a counter of its own sets it.
        asked: perturb() has answered for the step under way.
        scale: what multiplies the loss in it, None for 1.
    """

    def __init__(self, groups: list[dict], gr: GR, store: Store, seed: int = 0):
        self.groups, self.gr, self.store, self.seed = groups, gr, store, seed
        device = self.params[0].device
        self.attempts = 0
        self.completed = torch.zeros((), dtype=torch.int64, device=device)  # steps not skipped: the rounding's counter
        self.skipped = torch.zeros((), dtype=torch.int64, device=device)
        self.asked = False
        self.scale: Tensor | None = None
        self._found_epsilon = PUBLISHED  # of "auto"
        self._searched_at: int | None = None  # the step whose parameters chose it
        self._moved: list[Tensor] = []  # the perturbed set, while it is perturbed
        self._first_pass: _FirstPass | None = None
        self._metrics: dict[str, Tensor] = {}

    @property
    def params(self) -> list[Tensor]:
        """All that require a gradient."""
        return [p for group in self.groups for p in group["params"] if p.requires_grad]

    @property
    def epsilon(self) -> float:
        return self._found_epsilon if self.gr.epsilon == "auto" else self.gr.epsilon

    @property
    def perturbed(self) -> bool:
        return bool(self._moved)

    @property
    def due(self) -> bool:
        """The step under way has a second pass, and perturb() was not called for it."""
        return not self.asked and self.gr.gamma_at(self.attempts) != 0

    @torch.no_grad()
    def perturb(self, scale: Tensor | None = None) -> Perturbation:
        """Moves the perturbed set to theta + delta and clears or folds the gradients, ready for the second backward
        pass. `scale`: () float64, by which a GradScaler multiplies the loss, in both passes.

        Returns:
            False when no second pass is wanted: gamma is 0 now, or this step is not one of every_k_steps.
        """
        if self.perturbed:
            raise RuntimeError("the parameters are perturbed already: call step() or restore() first")
        params, gamma = gradients.with_grad(self.params), self.gr.gamma_at(self.attempts)
        if gamma == 0:
            self.asked, self.scale = True, scale
            return Perturbation(self.restore, False)
        chosen = self._perturbed_set()
        if not chosen:
            raise RuntimeError("no parameter with a gradient is in a group that is perturbed: see parameter_groups()")
        perturbed = set(chosen)
        others = [p for p in params if p not in perturbed]
        with ExitStack() as on_failure:
            self.store.keep(chosen)
            self._moved, self.scale = chosen, scale
            on_failure.callback(self.restore)
            direction, g1_norm, finite = self._direction(others)
            ratio = gamma / self.epsilon
            first = gradients.keep(params) if self._keeps_first(params, ratio) else None
            # .grad is multiplied so that the second pass accumulates to g epsilon / gamma, unless g1 is kept or unused.
            fold = 1.0 if first is not None or ratio == 1 else 1 / ratio - 1
            sums = self._move(direction * self.epsilon, fold)
            if others and fold != 1:
                torch._foreach_mul_([gradients.of(p) for p in others], fold)
            if first is not None or ratio == 1:
                gradients.clear(params)
                if scale is not None:
                    leave_a_mark(params, finite)
            self._first_pass = _FirstPass(first, ratio, g1_norm, finite, sums, gradients.written(params))
            self._metrics = {"gr/g1_norm": g1_norm}
            if not self._meshes():
                self._metrics |= perturbation.step_metrics(sums[None], sum(p.numel() for p in chosen))
            self.asked = True
            on_failure.pop_all()
        return Perturbation(self.restore, True)

    def _perturbed_set(self) -> list[Tensor]:
        return [
            p
            for group in self.groups
            for p in group["params"]
            if group.get("perturb", True) and p.requires_grad and p.grad is not None
        ]

    def _meshes(self) -> list:
        return shards.meshes_of(self.params)

    def _across_ranks(self, *rows: tuple[int, shards.Sums]) -> list[Tensor]:
        return shards.across_ranks(self._meshes(), self.completed.device, list(rows))

    def _direction(self, others: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """What .grad times gives delta / epsilon, 0 where g1 is not finite; |g1| over all parameters; whether it is
        finite."""
        search = self.gr.epsilon == "auto" and (
            self._searched_at is None or self.attempts - self._searched_at >= auto_epsilon.EVERY
        )
        grads = gradients.squares(self._moved)
        weights = gradients.squares(self._moved, local) if search else {}
        inside, outside, theta = self._across_ranks((1, grads), (1, gradients.squares(others)), (1, weights))
        scale = 1.0 if self.scale is None else self.scale
        set_norm, g1_norm = inside.sqrt() / scale, (inside + outside).sqrt() / scale
        finite = torch.isfinite(g1_norm)
        step = 1 / set_norm if self.gr.normalized else (self.gr.perturb_max_norm / set_norm).clamp(max=1)
        step = torch.where(torch.isfinite(step) & finite, step, 0.0)
        if search:
            longest = auto_epsilon.LENGTH * theta.sqrt() / (step * set_norm)
            self._search_epsilon(step / scale, torch.where(finite, longest, torch.inf).item())
        return step / scale, g1_norm, finite

    def _search_epsilon(self, direction: Tensor, cap: float) -> None:
        def attempt(epsilon: float) -> shards.Sums:
            sums = self._move(epsilon * direction, fold=1.0)
            self._put_back()
            return sums

        found = auto_epsilon.search(cap, attempt, self._across_ranks)
        if found is not None:
            self._found_epsilon, self._searched_at = found, self.attempts

    def _keeps_first(self, params: list[Tensor], ratio: float) -> bool:
        if self.gr.keep_first_grad is not None:
            return self.gr.keep_first_grad
        low = any(gradients.of(p).dtype in LOW_PRECISION for p in params)
        return self.gr.epsilon == "auto" or (low and not 0.5 <= ratio <= 3)

    def _move(self, step: Tensor, fold: float) -> shards.Sums:
        """theta += step g1 on the perturbed set, .grad *= fold there; the sums of `perturbation.step_metrics`."""
        sums = perturbation.move(self._moved, self.params, step, fold, self.gr, self.seed, self.completed)
        self._written()
        return sums

    def _put_back(self, step_writes: Collection[Tensor] = ()) -> None:
        self.store.restore(self._moved, step_writes)
        self._written()

    def _written(self) -> None:
        perturbation.drop_stale(self._moved)
        self.store.written(self._moved)

    @torch.no_grad()
    def restore(self) -> None:
        """Ends the step under way: puts the parameters back bit by bit and drops the gradients, where they are
        perturbed."""
        if self.perturbed:
            self._put_back()
            gradients.clear(self.params)
        self._end()

    def _end(self) -> None:
        self._moved, self._first_pass = [], None
        self.asked, self.scale = False, None

    @contextmanager
    def combine(self) -> Iterator[Combined]:
        """Restores the parameters and combines the gradients; the block takes the step. Its end counts it, as skipped
        where a gradient is not finite, in either pass. A store of masters leaves it to the block to restore the
        parameters with a gradient."""
        if self.due:
            raise RuntimeError("step() without perturb(): call perturb() and, where it is true, backward() again")
        if self._first_pass is not None and gradients.written(self.params) == self._first_pass.written:
            raise RuntimeError(
                "step() while perturbed, without a second pass: call loss.backward() once more, or restore()"
            )
        params = gradients.with_grad(self.params)
        with ExitStack() as on_failure:
            on_failure.callback(self.restore)
            with torch.no_grad():
                combined = self._combined(params)
            yield combined
            with torch.no_grad():
                self._end()
                self.attempts += 1
                self.completed += combined.finite
                self.skipped += ~combined.finite
                perturbation.drop_stale(combined.params)
            on_failure.pop_all()

    def _combined(self, params: list[Tensor]) -> Combined:
        unscale = 1.0 if self.scale is None else 1 / self.scale
        before = self._first_pass
        if before is None:
            norm = self._across_ranks((1, gradients.squares(params)))[0].sqrt() * unscale
            self._metrics = {"grad_norm": norm}
            return Combined(params, [], torch.ones_like(norm), norm, torch.isfinite(norm))
        self._put_back(step_writes=set(params))
        if before.first is None:
            width, sums = 1, gradients.squares(params)
        else:
            width, (params, sums) = 3, gradients.combine(params, before.first, before.ratio)
        moved, squares = self._across_ranks((4, before.sums), (width, sums))
        self._metrics |= perturbation.step_metrics(moved, sum(p.numel() for p in self._moved))
        norms, nan = squares.sqrt() * unscale, torch.full_like(moved[0], torch.nan)
        if before.first is None:
            norm = norms * before.ratio
            g2_norm, penalty = norm if before.ratio == 1 else nan, nan
        else:
            g2_norm, gap, norm = norms
            penalty = before.ratio * gap / before.norm.clamp(min=TINY)  # 0 where g1 is: all groups are dead
        self._metrics |= {"gr/g2_norm": g2_norm, "gr/penalty_ratio": penalty, "grad_norm": norm}
        factor = torch.ones_like(norm) * (before.ratio if before.first is None else 1.0)
        return Combined(params, self._moved, factor, norm, torch.isfinite(norm) & before.finite)

    def metrics(self) -> dict[str, float]:
        """The last step's numbers, as `GradientRegularizer.metrics`; the only call that waits for the device."""
        values = {name: float(value) for name, value in self._metrics.items()}
        values |= {"gr/epsilon": self.epsilon, "gr/skipped_steps": float(self.skipped)}
        perturbation.warn_if_swallowed(values, self.epsilon, self.gr.rounding)
        return values

    def state_dict(self) -> dict[str, Any]:
        """The counters, and what "auto" has found."""
        counters: dict[str, Any] = {
            "attempts": self.attempts,
            "completed": int(self.completed),
            "skipped": int(self.skipped),
        }
        if self.gr.epsilon == "auto":
            counters |= {"epsilon": self._found_epsilon, "searched_at": self._searched_at}
        return counters

    def load_state_dict(self, counters: dict[str, Any]) -> None:
        """What `state_dict` gave; what it lacks begins anew."""
        self.attempts = counters.get("attempts", 0)
        self.completed.fill_(counters.get("completed", 0))
        self.skipped.fill_(counters.get("skipped", 0))
        self._found_epsilon = counters.get("epsilon", PUBLISHED)
        self._searched_at = counters.get("searched_at")
