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

import warnings
from collections.abc import Callable
from contextlib import ExitStack
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from redit_fast.checks import (
    check_choice,
    check_flag,
    check_module,
    check_seed,
    described,
    positive,
    real_number,
    whole_number,
)
from redit_fast.gr import epsilon as auto_epsilon
from redit_fast.gr import gradients, perturbation, shards
from redit_fast.gr.grad_scaler import forget, leave_a_mark, loss_scale, scale_in_step
from redit_fast.gr.groups import check_group, check_state
from redit_fast.gr.perturbation import LOW_PRECISION, Perturbation
from redit_fast.gr.replay import Replay
from redit_fast.gr.shards import local

Rounding = Literal["stochastic", "nearest"]


class GradientRegularizer(torch.optim.Optimizer):
    """GR around `optimizer`, whose parameter groups, state and learning-rate schedulers keep working through this
    object.

    Parameters of groups with `perturb: False` are not perturbed (`parameter_groups` makes such groups). One copy of the
    perturbed parameters is held, in their own dtype; adding and subtracting would not be exact. Parameters may be
    shards (DTensor: FSDP2, tensor parallelism): norms are global, by one all-reduce in perturb() and one in step() for
    each dimension of the mesh.

    Settings of the same step: SAM is normalized=True with gamma = epsilon = rho; Zhao et al.'s penalty lambda |grad L|
    is normalized=True with gamma = lambda, epsilon = r (their alpha is lambda / r); gamma = 0 with max_norm = None is
    the optimizer alone.

    Args:
        optimizer: any torch.optim.Optimizer.
        gamma: weight of the penalty; 0 switches GR off.
        epsilon: the finite-difference step. gamma == epsilon gives g = g2. "auto": max(0.001, the smallest power of two
            whose step keeps cosine 0.95 after rounding), at most where the step is 0.02 |theta| long, with a warning;
            found anew every 100 steps, by trying them: nothing else in perturb() and step() waits for the device.
        max_norm: the combined gradient's norm over all parameters is clipped to it, with gamma 0 the gradient's; None:
            not clipped.
        perturb_max_norm: g1's norm over the perturbed set counts as at most this in the step (not in g).
        normalized: the step is epsilon g1 / |g1| and the objective L + gamma |grad L| (SAM, Zhao et al. 2022).
        rounding: how bfloat16 and float16 parameters take the step. "stochastic" (counter-based) keeps it in
            expectation, "nearest" loses most of a small step.
        keep_first_grad: hold g1 in a copy instead of folding it into .grad; default: for bfloat16 and float16 gradients
            when gamma / epsilon is outside [0.5, 3], where folding rounds, and with epsilon="auto".
        gamma_warmup_steps: gamma rises linearly from 0 over so many steps.
        every_k_steps: regularise every k-th step only.
        compute_dtype: in what dtype the forward pass sees the parameters (for the step metrics), default their own;
            pass torch.bfloat16 under autocast.
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
        if isinstance(epsilon, str) and epsilon != "auto":
            raise ValueError(f"epsilon must be a number above 0 or 'auto', got {epsilon!r}")
        self._epsilon_is_searched = isinstance(epsilon, str)
        epsilon = auto_epsilon.PUBLISHED if self._epsilon_is_searched else positive("epsilon", epsilon)
        gamma = real_number("gamma", gamma, least=0, float32=True)
        max_norm = None if max_norm is None else positive("max_norm", max_norm)
        perturb_max_norm = positive("perturb_max_norm", perturb_max_norm)
        check_flag("normalized", normalized)
        check_choice("rounding", rounding, get_args(Rounding))
        if keep_first_grad is not None:
            check_flag("keep_first_grad", keep_first_grad)
        gamma_warmup_steps = whole_number("gamma_warmup_steps", gamma_warmup_steps)
        every_k_steps = whole_number("every_k_steps", every_k_steps, 1)
        if compute_dtype is not None and not (
            isinstance(compute_dtype, torch.dtype) and compute_dtype.is_floating_point
        ):
            raise TypeError(f"compute_dtype must be a floating-point torch.dtype, got {described(compute_dtype)}")
        seed = check_seed(seed)
        for group in optimizer.param_groups:
            check_flag("perturb of a parameter group of optimizer", group.get("perturb", True))
        self.optimizer = optimizer
        self.gamma, self.epsilon, self.normalized = gamma, epsilon, normalized
        self.max_norm, self.perturb_max_norm = max_norm, perturb_max_norm
        self.rounding, self.compute_dtype, self.seed = rounding, compute_dtype, seed
        self.keep_first_grad = keep_first_grad
        self.gamma_warmup_steps, self.every_k_steps = gamma_warmup_steps, every_k_steps
        if not self._parameters():
            raise ValueError("optimizer holds no parameter that requires a gradient")
        device = self._parameters()[0].device
        self._attempts = 0  # steps begun, on the host: gamma's warm-up and every_k_steps
        self._completed = torch.zeros((), dtype=torch.int64, device=device)  # steps not skipped: the rounding's counter
        self._skipped = torch.zeros((), dtype=torch.int64, device=device)
        self._searched_at: int | None = None  # the step whose parameters chose epsilon
        self._asked = self._perturbed = False
        self._loss_scale: Tensor | None = None
        self._copies: dict[Tensor, Tensor] = {}
        self._metrics: dict[str, Tensor] = {}
        self.__setstate__({})  # the hooks of torch.optim.Optimizer, without its second copy of the groups

    def _refuse_groups(self, groups: list[dict]) -> None:
        raise NotImplementedError(f"param_groups cannot be replaced. {shards.DEEPSPEED}")  # ZeRO 1 and 2 try to

    # The wrapped optimizer's own attributes, so that schedulers and trainers see one optimizer.
    param_groups = property(lambda self: self.optimizer.param_groups, _refuse_groups)
    state = property(lambda self: self.optimizer.state)
    defaults = property(lambda self: self.optimizer.defaults)

    def __repr__(self) -> str:
        return f"{type(self).__name__}(gamma={self.gamma}, epsilon={self.epsilon}, {self.optimizer!r})"

    def _parameters(self) -> list[Tensor]:
        return [p for group in self.param_groups for p in group["params"] if p.requires_grad]

    def _gamma_now(self) -> float:
        if self._attempts % self.every_k_steps:
            return 0.0
        warmed = min(1.0, self._attempts / self.gamma_warmup_steps) if self.gamma_warmup_steps else 1.0
        return self.gamma * warmed

    @torch.no_grad()
    def perturb(self, grad_scaler: torch.amp.GradScaler | None = None) -> Perturbation:
        """Moves the perturbed set to theta + delta and clears or folds the gradients, ready for the second backward
        pass. `grad_scaler`: the one that scales the loss, in both passes.

        Returns:
            False when no second pass is wanted: gamma is 0 now, or this step is not one of every_k_steps.
        """
        if grad_scaler is not None and not isinstance(grad_scaler, torch.amp.GradScaler):
            raise TypeError(f"grad_scaler must be a torch.amp.GradScaler, got {described(grad_scaler)}")
        if self._perturbed:
            raise RuntimeError("the parameters are perturbed already: call step() or restore() first")
        params, gamma = gradients.with_grad(self._parameters()), self._gamma_now()
        self._loss_scale = loss_scale(grad_scaler, params[0].device)
        if gamma == 0:
            self._asked = True
            return Perturbation(self.restore, False)
        chosen = self._perturbed_set()
        if not chosen:
            raise RuntimeError("no parameter with a gradient is in a group that is perturbed: see parameter_groups()")
        perturbed = set(chosen)
        others = [p for p in params if p not in perturbed]
        with ExitStack() as on_failure:
            self._keep(chosen)
            self._perturbed, self._moved, self._first = True, chosen, None
            on_failure.callback(self.restore)
            step, g1_norm = self._step_of_epsilon_one(chosen, others)
            fold = self._fold_factor(params, gamma)
            sums = self._move(step * self.epsilon, fold)
            if others and fold != 1:
                torch._foreach_mul_([gradients.of(p) for p in others], fold)
            if self._first is not None or self._ratio == 1:
                gradients.clear(params)
                if self._loss_scale is not None:
                    leave_a_mark(params, self._finite)
            self._grads_before = gradients.written(params)
            self._metrics, self._step_sums = {"gr/g1_norm": g1_norm}, sums
            if not self._meshes():
                self._metrics |= perturbation.step_metrics(sums[None], sum(p.numel() for p in chosen))
            self._asked = True
            on_failure.pop_all()
        return Perturbation(self.restore, True)

    def _perturbed_set(self) -> list[Tensor]:
        return [
            p
            for group in self.param_groups
            for p in group["params"]
            if group.get("perturb", True) and p.requires_grad and p.grad is not None
        ]

    def _meshes(self) -> list:
        return shards.meshes_of(self._parameters())

    def _across_ranks(self, *rows: tuple[int, shards.Sums]) -> list[Tensor]:
        return shards.across_ranks(self._meshes(), self._completed.device, list(rows))

    def _step_of_epsilon_one(self, chosen: list[Tensor], others: list[Tensor]) -> tuple[Tensor, Tensor]:
        """What .grad times gives delta / epsilon, 0 where g1 is not finite; and |g1| over all parameters."""
        search = self._epsilon_is_searched and (
            self._searched_at is None or self._attempts - self._searched_at >= auto_epsilon.EVERY
        )
        grads, weights = gradients.squares(chosen), gradients.squares(chosen, local) if search else {}
        inside, outside, theta = self._across_ranks((1, grads), (1, gradients.squares(others)), (1, weights))
        scale = 1.0 if self._loss_scale is None else self._loss_scale
        set_norm, g1_norm = inside.sqrt() / scale, (inside + outside).sqrt() / scale
        self._finite = torch.isfinite(g1_norm)
        step = 1 / set_norm if self.normalized else (self.perturb_max_norm / set_norm).clamp(max=1)
        step = torch.where(torch.isfinite(step) & self._finite, step, 0.0)
        if search:
            longest = auto_epsilon.LENGTH * theta.sqrt() / (step * set_norm)
            self._search_epsilon(step / scale, torch.where(self._finite, longest, torch.inf).item())
        return step / scale, g1_norm

    def _search_epsilon(self, step: Tensor, cap: float) -> None:
        def attempt(epsilon: float) -> shards.Sums:
            sums = self._move(epsilon * step, fold=1.0)
            self._restore_parameters()
            return sums

        found = auto_epsilon.search(cap, attempt, self._across_ranks)
        if found is not None:
            self.epsilon, self._searched_at = found, self._attempts

    def _fold_factor(self, params: list[Tensor], gamma: float) -> float:
        """What g1 in .grad is multiplied by, so that the second backward pass accumulates to the combined gradient
        over gamma / epsilon; 1 where g1 is kept aside, or not needed."""
        ratio = gamma / self.epsilon
        keep = self.keep_first_grad
        if keep is None:
            low = any(p.grad.dtype in LOW_PRECISION for p in params)
            keep = self._epsilon_is_searched or (low and not 0.5 <= ratio <= 3)
        self._ratio = ratio
        self._first = gradients.keep(params) if keep else None
        return 1.0 if keep or ratio == 1 else 1 / ratio - 1

    def _move(self, step: Tensor, fold: float) -> shards.Sums:
        """theta += step g1 on the perturbed set, .grad *= fold there; the sums of `perturbation.step_metrics`."""
        how = self.rounding, self.seed, self._completed, self.compute_dtype
        sums = perturbation.move(self._moved, self._parameters(), step, fold, *how)
        self._changed(self._moved)
        return sums

    # What RegularizedAdamW does differently: where theta is kept, and how the step is taken.

    def _keep(self, params: list[Tensor]) -> None:
        """Saves theta, in copies that stay between steps."""
        for p in params:
            if p not in self._copies:
                self._copies[p] = torch.empty_like(local(p))
        torch._foreach_copy_([self._copies[p] for p in params], [local(p) for p in params])

    def _restore_parameters(self, before_step: bool = False) -> None:
        torch._foreach_copy_([local(p) for p in self._moved], [self._copies[p] for p in self._moved])
        self._changed(self._moved)

    def _changed(self, params: list[Tensor]) -> None:
        perturbation.drop_stale(params)

    def _take_step(self, params: list[Tensor], factor: Tensor, finite: Tensor) -> None:
        if finite:  # waits for the device: an arbitrary optimizer can only be skipped from the host
            gradients.multiply(params, factor)
            self.optimizer.step()

    @torch.no_grad()
    def restore(self) -> None:
        """Puts the parameters back bit by bit and drops the gradients of this step; does nothing when not perturbed."""
        if not self._perturbed:
            return
        self._restore_parameters()
        self._perturbed = self._asked = False
        self._first = self._loss_scale = None
        gradients.clear(self._parameters())

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Restores the parameters, combines and clips the gradients and takes the optimizer's step; a step with a
        gradient that is not finite, in either pass, is skipped and counted. Under a GradScaler it is reached by
        scaler.step(optimizer), without scaler.unscale_: it unscales and clips by itself.

        An exception on the way restores the parameters; one from inside the optimizer's own step may find others than
        the perturbed set already stepped.
        """
        if closure is not None:
            raise TypeError("step() takes no closure: use two_pass(closure)")
        with ExitStack() as on_failure:
            on_failure.callback(forget, self)
            if not self._asked and self._gamma_now() != 0:
                if self._attempts == 0 and not self.state and all(group.get("lr") == 0 for group in self.param_groups):
                    return self.optimizer.step()  # torch.distributed.checkpoint makes the state that it will load so
                raise RuntimeError("step() without perturb(): call perturb() and, where it is true, backward() again")
            if self._perturbed and gradients.written(self._parameters()) == self._grads_before:
                raise RuntimeError(
                    "step() while perturbed, without a second pass: call loss.backward() once more, or restore()"
                )
            scale = scale_in_step(self, self._loss_scale, self._perturbed)
            params = gradients.with_grad(self._parameters())
            on_failure.callback(self.restore)
            self._step(params, scale)
            on_failure.pop_all()

    def _step(self, params: list[Tensor], scale: Tensor | None) -> None:
        factor = 1.0 if scale is None else 1 / scale
        if self._perturbed:
            self._restore_parameters(before_step=True)
            params, norm = self._combine(params, factor)
            finite = torch.isfinite(norm) & self._finite
            factor = factor * self._ratio if self._first is None else factor
        else:
            norm = self._across_ranks((1, gradients.squares(params)))[0].sqrt() * factor
            finite, self._metrics = torch.isfinite(norm), {}
        self._metrics["grad_norm"] = norm
        factor = torch.ones_like(norm) * factor
        if self.max_norm is not None:
            factor = factor * (self.max_norm / (norm + 1e-6)).clamp(max=1)
        self._take_step(params, factor, finite)
        self._perturbed = self._asked = False
        self._first = self._loss_scale = None
        self._attempts += 1
        self._completed += finite
        self._skipped += ~finite
        perturbation.drop_stale(params)

    def _combine(self, params: list[Tensor], factor: Tensor | float) -> tuple[list[Tensor], Tensor]:
        """The parameters with the combined gradient in .grad, up to 1 / factor and, where g1 is folded, epsilon /
        gamma; and that gradient's norm."""
        first = self._first
        if first is None:
            width, sums = 1, gradients.squares(params)
        else:
            width, (params, sums) = 3, gradients.combine(params, first, self._ratio)
        moved, squares = self._across_ranks((4, self._step_sums), (width, sums))
        self._metrics |= perturbation.step_metrics(moved, sum(p.numel() for p in self._moved))
        norms, nan = squares.sqrt() * factor, torch.full_like(moved[0], torch.nan)
        if first is None:
            norm = norms * self._ratio
            self._metrics |= {"gr/g2_norm": norm if self._ratio == 1 else nan, "gr/penalty_ratio": nan}
            return params, norm
        g2_norm, gap, norm = norms
        self._metrics |= {"gr/g2_norm": g2_norm, "gr/penalty_ratio": self._ratio * gap / self._metrics["gr/g1_norm"]}
        return params, norm

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
        replay = Replay(self._parameters(), model)
        with ExitStack() as on_failure:
            on_failure.callback(gradients.clear, self._parameters())
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
        if self._perturbed:
            warnings.warn(
                "zero_grad() between perturb() and step() drops the gradient regularisation: call it after step()",
                stacklevel=2,
            )
            self.restore()
        self._asked = False
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
        counters = {name: int(getattr(self, f"_{name}")) for name in ("attempts", "completed", "skipped")}
        if self._epsilon_is_searched:
            counters |= {"epsilon": self.epsilon, "searched_at": self._searched_at}
        state = self.optimizer.state_dict()
        first, *others = state["param_groups"]
        return {**state, "param_groups": [{**first, "gradient_regularizer": counters}, *others]}

    def load_state_dict(self, state_dict: dict) -> None:
        """Takes what `state_dict` gave, or a state of the wrapped optimizer alone.

        Raises:
            ValueError, TypeError: what is neither, naming what does not fit.
        """
        self._refuse_while_perturbed("load_state_dict")
        check_state(state_dict)
        self.optimizer.load_state_dict(state_dict)
        counters = self.param_groups[0].pop("gradient_regularizer", {})
        self._attempts = counters.get("attempts", 0)
        self._completed.fill_(counters.get("completed", 0))
        self._skipped.fill_(counters.get("skipped", 0))
        if self._epsilon_is_searched:
            self._searched_at = counters.get("searched_at")
            self.epsilon = counters.get("epsilon", auto_epsilon.PUBLISHED)

    def _refuse_while_perturbed(self, verb: str) -> None:
        if self._perturbed:
            raise RuntimeError(f"{verb}() while the parameters are perturbed: call step() or restore() first")

    def metrics(self) -> dict[str, float]:
        """The last step's numbers; the only call that waits for the device.

        grad_norm: of the combined gradient, before clipping. gr/g1_norm, gr/g2_norm: of each pass, over all parameters
        (g2 NaN where it is folded). gr/step_gain = <applied, intended> / |intended|^2, gr/step_cos, gr/step_norm_ratio,
        gr/frac_moved: the perturbation as the forward pass saw it against epsilon g1. gr/penalty_ratio =
        gamma |g2 - g1| / (epsilon |g1|), NaN unless g1 was kept. gr/epsilon, gr/skipped_steps.
        """
        values = {name: float(value) for name, value in self._metrics.items()}
        values |= {"gr/epsilon": self.epsilon, "gr/skipped_steps": float(self._skipped)}
        perturbation.warn_if_swallowed(values.get("gr/step_cos", 1.0), self.epsilon)
        return values
