"""Gradient regularisation (GR, arXiv 2602.18037; Karakida et al. 2210.02720) around any optimizer: a second backward
pass at slightly perturbed parameters, whose gradient g2 and the first one's g1 are combined to g = (1 - gamma/epsilon)
g1 + (gamma/epsilon) g2, the finite-difference gradient of L + (gamma/2) |grad L|^2.

    loss_fn(batch).backward()
    if opt.perturb():                 # theta -> theta + epsilon g1 on the perturbed set
        loss_fn(batch).backward()
    opt.step()                        # theta restored bit by bit, gradients combined and clipped, the optimizer's step
    opt.zero_grad()

Under a GradScaler: scaler.scale(loss).backward(), perturb(grad_scaler=scaler), scaler.step(opt), scaler.update().
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from redit_fast.checks import check_flag, check_module, check_seed, described, positive
from redit_fast.gr import gradients, shards
from redit_fast.gr.config import GR, Rounding
from redit_fast.gr.grad_scaler import forget, loss_scale, scale_in_step
from redit_fast.gr.groups import COUNTERS, check_group, check_state, counters_in
from redit_fast.gr.perturbation import Perturbation
from redit_fast.gr.replay import Replay
from redit_fast.gr.two_pass import Combined, Copies, Store, TwoPass


def _option(name: str) -> property:
    """A field of `gr` as an attribute of its own, which may be set between steps."""

    def set_it(self: GradientRegularizer, value: object) -> None:
        change: dict[str, Any] = {name: value}
        self._passes.gr = replace(self.gr, **change)

    return property(lambda self: getattr(self.gr, name), set_it)


def _checked_norm(max_norm: float | None) -> float | None:
    return None if max_norm is None else positive("max_norm", max_norm)


class GradientRegularizer(torch.optim.Optimizer):
    """GR around `optimizer`, whose parameter groups, state and learning-rate schedulers keep working through this
    object.

    Parameters of groups with `perturb: False` are not perturbed (`parameter_groups` makes such groups). One copy of the
    perturbed parameters is held, in their own dtype; adding and subtracting would not be exact. Parameters may be
    shards (DTensor: FSDP2, tensor parallelism): norms are global, by one all-reduce in perturb() and one in step() for
    each dimension of the mesh.

    gamma = 0 with max_norm = None is the optimizer alone.

    Args:
        optimizer: any torch.optim.Optimizer.
        max_norm: the combined gradient's norm over all parameters is clipped to it, with gamma 0 the gradient's; None:
            not clipped.
        gamma, epsilon, perturb_max_norm, normalized, rounding, keep_first_grad: fields of `GR`.
        gamma_warmup_steps, every_k_steps, compute_dtype: fields of `GR`.
        seed: of the stochastic rounding, in [0, 2**64).

    Raises:
        ValueError, TypeError: an argument out of range, naming it. RuntimeError: a verb called out of turn, naming the
            one to call. NotImplementedError: the parameters are DeepSpeed's or FSDP1's.

    LoRA: the adapters alone have gradients and move. In float32 (peft's default) they cost little and keep the step.

    An optimizer other than RegularizedAdamW can be told to skip a step that is not finite only from the host: step()
    waits for the device once, as torch.amp.GradScaler does.
    """

    _step_supports_amp_scaling = True  # GradScaler.step then always calls step(), which restores, and skips by itself

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        *,
        gamma: float = 1e-3,
        epsilon: float | Literal["auto"] = 1e-3,
        max_norm: float | None = 1.0,
        perturb_max_norm: float = 10.0,
        normalized: bool = False,
        rounding: Rounding = "stochastic",
        keep_first_grad: bool | None = None,
        gamma_warmup_steps: int = 0,
        every_k_steps: int = 1,
        compute_dtype: torch.dtype | None = None,
        seed: int = 0,
    ):
        shards.refuse_other_engines(optimizer)
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise TypeError(f"optimizer must be a torch.optim.Optimizer, got {described(optimizer)}")
        gr = GR(
            gamma=gamma,
            epsilon=epsilon,
            normalized=normalized,
            perturb_max_norm=perturb_max_norm,
            rounding=rounding,
            keep_first_grad=keep_first_grad,
            gamma_warmup_steps=gamma_warmup_steps,
            every_k_steps=every_k_steps,
            compute_dtype=compute_dtype,
        )
        if isinstance(optimizer, GradientRegularizer):
            name = type(optimizer).__name__
            raise TypeError(f"optimizer is a {name}, which makes the two passes itself: use it alone")
        closure = inspect.signature(optimizer.step).parameters.get("closure")
        if closure is not None and closure.default is closure.empty:
            raise TypeError(
                f"optimizer must take its step from the gradients, {type(optimizer).__name__}.step needs a closure"
            )
        seed = check_seed(seed)
        for group in optimizer.param_groups:
            check_flag("perturb of a parameter group of optimizer", group.get("perturb", True))
        if not any(p.requires_grad for group in optimizer.param_groups for p in group["params"]):
            raise ValueError("optimizer holds no parameter that requires a gradient")
        self.optimizer = optimizer
        self._max_norm = _checked_norm(max_norm)
        self._passes = TwoPass(optimizer.param_groups, gr, self._store(), seed)
        self.__setstate__({})  # the hooks of torch.optim.Optimizer, without its second copy of the groups

    def _refuse_groups(self, groups: list[dict]) -> None:
        raise NotImplementedError(f"param_groups cannot be replaced. {shards.DEEPSPEED}")  # ZeRO 1 and 2 try to

    # The wrapped optimizer's own attributes, so that schedulers and trainers see one optimizer.
    param_groups = property(lambda self: self.optimizer.param_groups, _refuse_groups)
    state = property(lambda self: self.optimizer.state)
    defaults = property(lambda self: self.optimizer.defaults)

    @property
    def gr(self) -> GR:
        """The options, of which each is an attribute too."""
        return self._passes.gr

    gamma, normalized, perturb_max_norm = _option("gamma"), _option("normalized"), _option("perturb_max_norm")
    rounding, keep_first_grad, compute_dtype = _option("rounding"), _option("keep_first_grad"), _option("compute_dtype")
    gamma_warmup_steps, every_k_steps = _option("gamma_warmup_steps"), _option("every_k_steps")

    @property
    def max_norm(self) -> float | None:
        return self._max_norm

    @max_norm.setter
    def max_norm(self, max_norm: float | None) -> None:
        self._max_norm = _checked_norm(max_norm)

    @property
    def epsilon(self) -> float:
        """The one in use: of "auto" what was found last."""
        return self._passes.epsilon

    @epsilon.setter
    def epsilon(self, epsilon: float | Literal["auto"]) -> None:
        self._passes.gr = replace(self.gr, epsilon=epsilon)

    @property
    def seed(self) -> int:
        return self._passes.seed

    def __getstate__(self) -> dict[str, Any]:
        """For copy and pickle: torch.optim.Optimizer's has the groups and the state, which are `optimizer`'s here."""
        return {name: vars(self)[name] for name in ("optimizer", "_max_norm", "_passes")}

    def __repr__(self) -> str:
        return f"{type(self).__name__}(gamma={self.gamma}, epsilon={self.epsilon}, {self.optimizer!r})"

    def perturb(self, grad_scaler: torch.amp.GradScaler | None = None) -> Perturbation:
        """Moves the perturbed set to theta + delta and clears or folds the gradients, ready for the second backward
        pass. `grad_scaler`: the one that scales the loss, in both passes.

        Returns:
            False when no second pass is wanted: gamma is 0 now, or this step is not one of every_k_steps.
        """
        if grad_scaler is not None and not isinstance(grad_scaler, torch.amp.GradScaler):
            raise TypeError(f"grad_scaler must be a torch.amp.GradScaler, got {described(grad_scaler)}")
        passes = self._current()
        return passes.perturb(loss_scale(grad_scaler, passes.completed.device))

    def _current(self) -> TwoPass:
        """The passes over the optimizer's groups, of which its load_state_dict makes new ones."""
        self._passes.groups = self.param_groups
        return self._passes

    # What RegularizedAdamW does differently: where theta is kept, and how the step is taken.

    def _store(self) -> Store:
        return Copies()

    def _take_step(self, combined: Combined, factor: Tensor) -> None:
        if combined.finite:  # waits for the device: an arbitrary optimizer can only be skipped from the host
            gradients.multiply(combined.params, factor)
            self.optimizer.step()

    def restore(self) -> None:
        """Ends the step under way: puts the parameters back bit by bit and drops the gradients, where perturb() moved
        the parameters."""
        self._current().restore()

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]  # no closure
        """Restores the parameters, combines and clips the gradients and takes the optimizer's step; a step with a
        gradient that is not finite, in either pass, is skipped and counted. Under a GradScaler it is reached by
        scaler.step(optimizer), without scaler.unscale_: it unscales and clips by itself.

        An exception on the way restores the parameters; one from inside the optimizer's own step may find others than
        the perturbed set already stepped.
        """
        if closure is not None:
            raise TypeError("step() takes no closure: use two_pass(closure)")
        passes = self._current()
        with ExitStack() as on_failure:
            on_failure.callback(forget, self)
            if passes.due and passes.attempts == 0 and not self.state:
                if all(group.get("lr") == 0 for group in self.param_groups):
                    return self.optimizer.step()  # torch.distributed.checkpoint makes the state that it will load so
            passes.scale = scale_in_step(self, passes.scale, passes.perturbed)
            with passes.combine() as combined:
                factor = combined.factor if passes.scale is None else combined.factor * (1 / passes.scale)
                if self.max_norm is not None:
                    factor = factor * (self.max_norm / (combined.norm + 1e-6)).clamp(max=1)
                self._take_step(combined, factor)
            on_failure.pop_all()

    def two_pass(self, closure: Callable[[], Tensor], model: nn.Module | None = None) -> Tensor:
        """The whole step: closure, perturb, closure, step.

        `closure` runs forward and backward over all micro-batches and returns the loss; it must not call zero_grad.
        Dropout draws the same random numbers in both passes, and the buffers of `model` end as the first pass left
        them.

        An exception drops the gradients of the step, which may then be tried again with another batch.

        Returns:
            The first pass's loss.
        """
        if not callable(closure):
            raise TypeError(f"closure must be callable, got {described(closure)}")
        if model is not None:
            check_module("model", model)
        params = self._current().params
        replay = Replay(params, model)
        with ExitStack() as on_failure:
            on_failure.callback(gradients.clear, params)
            loss = closure()
            on_failure.pop_all()
        with self.perturb() as wanted:
            if wanted:
                with replay.again():
                    closure()
        self.step()
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clears the gradients; between the two passes it also restores the parameters, and warns once."""
        if self._passes.perturbed:
            warnings.warn(
                "zero_grad() between perturb() and step() drops the gradient regularisation: call it after step()",
                stacklevel=2,
            )
        self.restore()
        self.optimizer.zero_grad(set_to_none)

    def add_param_group(self, param_group: dict) -> None:
        self._refuse_while_perturbed("add_param_group")
        if not isinstance(param_group, dict):
            raise TypeError(f"param_group must be a dict, got {described(param_group)}")
        check_group("param_group", param_group)
        check_flag("perturb of param_group", param_group.get("perturb", True))
        self.optimizer.add_param_group(param_group)

    def state_dict(self) -> dict:
        """The wrapped optimizer's state, with this object's counters as "gradient_regularizer" in the first parameter
        group: torch.distributed.checkpoint keeps nothing beside states and groups."""
        self._refuse_while_perturbed("state_dict")
        state = self.optimizer.state_dict()
        first, *others = state["param_groups"]
        return {**state, "param_groups": [{**first, COUNTERS: self._passes.state_dict()}, *others]}

    def load_state_dict(self, state_dict: dict) -> None:
        """Takes what `state_dict` gave, or a state of the wrapped optimizer alone: groups in which `perturb` is not
        named keep theirs.

        Raises:
            ValueError, TypeError: what is neither, naming what does not fit.
        """
        self._refuse_while_perturbed("load_state_dict")
        check_state(state_dict)
        counters = counters_in(state_dict)
        flags = [{"perturb": group["perturb"]} if "perturb" in group else {} for group in self.param_groups]
        self.optimizer.load_state_dict({name: state_dict[name] for name in ("state", "param_groups")})
        for group, flag in zip(self.param_groups, flags, strict=True):  # torch replaces whole groups
            group |= flag | group
        self.param_groups[0].pop(COUNTERS, None)
        self._passes.load_state_dict(counters)

    def _refuse_while_perturbed(self, verb: str) -> None:
        if self._passes.perturbed:
            raise RuntimeError(f"{verb}() while the parameters are perturbed: call step() or restore() first")

    def metrics(self) -> dict[str, float]:
        """The last step's numbers; the only call that waits for the device.

        grad_norm: of the combined gradient, before clipping. gr/g1_norm, gr/g2_norm: of each pass, over all parameters
        (g2 NaN where it is folded). gr/step_gain = <applied, intended> / |intended|^2, gr/step_cos, gr/step_norm_ratio,
        gr/frac_moved: the perturbation as the forward pass saw it against epsilon g1. gr/penalty_ratio =
        gamma |g2 - g1| / (epsilon |g1|), 0 where g1 is, NaN unless it was kept. gr/epsilon, gr/skipped_steps.
        """
        return self._passes.metrics()
