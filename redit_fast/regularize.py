"""Gradient regularisation (GR, arXiv 2602.18037; Karakida et al. 2210.02720) around any optimizer: a second backward
pass at slightly perturbed parameters, whose gradient g2 and the first one's g1 are combined to g = (1 - gamma/epsilon)
g1 + (gamma/epsilon) g2, the finite-difference gradient of L + (gamma/2) |grad L|^2.

    loss_fn(batch).backward()
    if opt.perturb():                 # theta -> theta + epsilon g1 on the perturbed set
        loss_fn(batch).backward()
    opt.step()                        # theta restored bit by bit, gradients combined and clipped, the optimizer's step
    opt.zero_grad()
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from contextlib import ExitStack
from types import TracebackType
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from redit_fast.backends import primitive
from redit_fast.dither import check_choice, check_seed

Rounding = Literal["stochastic", "nearest"]
LOW_PRECISION = (torch.bfloat16, torch.float16)


class Perturbation:
    """What `perturb()` returns: true when a second pass is wanted; as a context manager it restores on any
    exception."""

    def __init__(self, regularizer: GradientRegularizer, wanted: bool):
        self._regularizer, self._wanted = regularizer, wanted

    def __bool__(self) -> bool:
        return self._wanted

    def __enter__(self) -> Perturbation:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            self._regularizer.restore()


class GradientRegularizer(torch.optim.Optimizer):
    """GR around `optimizer`, whose parameter groups, state and learning-rate schedulers keep working through this
    object.

    Parameters of groups with `perturb: False` are not perturbed (`parameter_groups` makes such groups). One copy of the
    perturbed parameters is held, in their own dtype; adding and subtracting would not be exact.

    Args:
        optimizer: any torch.optim.Optimizer.
        gamma: weight of the penalty; 0 switches GR off.
        epsilon: the finite-difference step. gamma == epsilon gives g = g2.
        max_norm: the combined gradient's norm over all parameters is clipped to it; None: not clipped.
        perturb_max_norm: g1's norm over the perturbed set counts as at most this in the step (not in g).
        normalized: the step is epsilon g1 / |g1| and the objective L + gamma |grad L| (SAM, Zhao et al. 2022).
        rounding: how bfloat16 and float16 parameters take the step. "stochastic" (counter-based) keeps it in
            expectation, "nearest" loses most of a small step.
        keep_first_grad: hold g1 in a copy instead of folding it into .grad; default: for bfloat16 and float16 gradients
            when gamma / epsilon is outside [0.5, 3], where folding rounds.
        gamma_warmup_steps: gamma rises linearly from 0 over so many steps.
        every_k_steps: regularise every k-th step only.
        compute_dtype: in what dtype the forward pass sees the parameters (for the step metrics), default their own;
            pass torch.bfloat16 under autocast.
        seed: of the stochastic rounding, in [0, 2**64).

    Raises:
        ValueError, TypeError: an argument out of range, naming it. RuntimeError: a verb called out of turn, naming the
            one to call. NotImplementedError: epsilon="auto".
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        *,
        gamma: float = 1e-3,
        epsilon: float = 1e-3,
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
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise TypeError(f"optimizer must be a torch.optim.Optimizer, got {type(optimizer).__name__}")
        if epsilon == "auto":
            raise NotImplementedError("epsilon='auto' is not part of this version")
        if not (math.isfinite(gamma) and gamma >= 0):
            raise ValueError(f"gamma must be finite and at least 0, got {gamma}")
        for name, value in (("epsilon", epsilon), ("max_norm", max_norm), ("perturb_max_norm", perturb_max_norm)):
            if value is not None and not (math.isfinite(value) and value > 0):
                raise ValueError(f"{name} must be finite and above 0, got {value}")
        check_choice("rounding", rounding, get_args(Rounding))
        check_seed(seed)
        if gamma_warmup_steps < 0 or every_k_steps < 1:
            raise ValueError(
                f"gamma_warmup_steps must be at least 0 and every_k_steps at least 1, "
                f"got {gamma_warmup_steps} and {every_k_steps}"
            )
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
        self._asked = self._perturbed = False
        self._copies: dict[Tensor, Tensor] = {}
        self._metrics: dict[str, Tensor] = {}
        self.__setstate__({})  # the hooks of torch.optim.Optimizer, without its second copy of the groups

    # The wrapped optimizer's own attributes, so that schedulers and trainers see one optimizer.
    param_groups = property(lambda self: self.optimizer.param_groups)
    state = property(lambda self: self.optimizer.state)
    defaults = property(lambda self: self.optimizer.defaults)

    def __repr__(self) -> str:
        return f"{type(self).__name__}(gamma={self.gamma}, epsilon={self.epsilon}, {self.optimizer!r})"

    def _parameters(self) -> list[Tensor]:
        return [p for group in self.param_groups for p in group["params"] if p.requires_grad]

    def _with_grad(self) -> list[Tensor]:
        params = [p for p in self._parameters() if p.grad is not None]
        if not params:
            raise RuntimeError("no parameter has a gradient: call loss.backward() first")
        if any(p.grad.is_sparse for p in params):
            raise ValueError("sparse gradients are not supported: use dense embeddings")
        return params

    def _gamma_now(self) -> float:
        if self._attempts % self.every_k_steps:
            return 0.0
        warmed = min(1.0, self._attempts / self.gamma_warmup_steps) if self.gamma_warmup_steps else 1.0
        return self.gamma * warmed

    @torch.no_grad()
    def perturb(self) -> Perturbation:
        """Moves the perturbed set to theta + delta and clears or folds the gradients, ready for the second backward
        pass.

        Returns:
            False when no second pass is wanted: gamma is 0 now, or this step is not one of every_k_steps.
        """
        if self._perturbed:
            raise RuntimeError("the parameters are perturbed already: call step() or restore() first")
        params = self._with_grad()
        self._asked, gamma = True, self._gamma_now()
        if gamma == 0:
            return Perturbation(self, False)
        offsets, chosen = self._perturbed_set()
        if not chosen:
            raise RuntimeError("no parameter with a gradient is in a group that is perturbed: see parameter_groups()")
        grads, perturbed = [p.grad for p in chosen], set(chosen)
        others = [p.grad for p in params if p not in perturbed]
        set_norm = self._norm(grads)
        g1_norm = torch.hypot(set_norm, self._norm(others)) if others else set_norm
        scale = self.epsilon / set_norm
        if not self.normalized:
            scale = self.epsilon * (self.perturb_max_norm / set_norm).clamp(max=1)
        self._finite = torch.isfinite(g1_norm)
        scale = torch.where(torch.isfinite(scale) & self._finite, scale, 0.0)
        sums = torch.zeros(4, dtype=torch.float64, device=set_norm.device)
        self._keep(chosen)
        fold = self._fold_factor(params, gamma)
        self._perturbed, self._moved = True, chosen
        with ExitStack() as on_failure:
            on_failure.callback(self.restore)
            primitive("perturb", set_norm.device)(
                sums,
                chosen,
                grads,
                [offsets[p] for p in chosen],
                scale,
                fold,
                self.rounding,
                self.seed,
                self._completed,
                self.compute_dtype,
            )
            self._changed(chosen)
            if others and fold != 1:
                torch._foreach_mul_(others, fold)
            if self._first is not None or self._ratio == 1:
                for p in params:
                    p.grad = None
            self._grads_before = {p: (id(p.grad), p.grad._version) for p in params if p.grad is not None}
            on_failure.pop_all()
        self._metrics = {"gr/g1_norm": g1_norm, **_step_metrics(sums, sum(p.numel() for p in chosen))}
        return Perturbation(self, True)

    def _perturbed_set(self) -> tuple[dict[Tensor, int], list[Tensor]]:
        """Every trainable parameter's first element in their concatenation, and the ones to perturb."""
        offsets, chosen, total = {}, [], 0
        for group in self.param_groups:
            for p in group["params"]:
                if not p.requires_grad:
                    continue
                offsets[p], total = total, total + p.numel()
                if group.get("perturb", True) and p.grad is not None:
                    chosen.append(p)
        return offsets, chosen

    def _fold_factor(self, params: list[Tensor], gamma: float) -> float:
        """What g1 in .grad is multiplied by, so that the second backward pass accumulates to the combined gradient
        over gamma / epsilon; 1 where g1 is kept aside, or not needed."""
        ratio = gamma / self.epsilon
        keep = self.keep_first_grad
        if keep is None:
            keep = not 0.5 <= ratio <= 3 and any(p.grad.dtype in LOW_PRECISION for p in params)
        self._ratio, self._first = ratio, {p: p.grad for p in params} if keep else None
        return 1.0 if keep or ratio == 1 else 1 / ratio - 1

    def _norm(self, grads: list[Tensor]) -> Tensor:
        square = torch.zeros((), dtype=torch.float64, device=grads[0].device)
        primitive("squared_norm", square.device)(square, grads)
        return square.sqrt()

    # What RegularizedAdamW does differently: where theta is kept, and how the step is taken.

    def _keep(self, params: list[Tensor]) -> None:
        """Saves theta, in copies that stay between steps."""
        for p in params:
            if p not in self._copies:
                self._copies[p] = torch.empty_like(p)
        torch._foreach_copy_([self._copies[p] for p in params], params)

    def _restore_parameters(self, before_step: bool = False) -> None:
        torch._foreach_copy_(self._moved, [self._copies[p] for p in self._moved])
        self._changed(self._moved)

    def _changed(self, params: list[Tensor]) -> None:
        torch.clear_autocast_cache()  # else the next forward pass under autocast runs on the cast of the old values

    def _take_step(self, params: list[Tensor], factor: Tensor, finite: Tensor) -> None:
        if finite:  # waits for the device: an arbitrary optimizer can only be skipped from the host
            for grads in _by_dtype([p.grad for p in params]):
                torch._foreach_mul_(grads, factor.to(grads[0].dtype))
            self.optimizer.step()

    @torch.no_grad()
    def restore(self) -> None:
        """Puts the parameters back bit by bit and drops the gradients of this step; does nothing when not perturbed."""
        if not self._perturbed:
            return
        self._restore_parameters()
        self._perturbed = self._asked = False
        self._first = None
        for p in self._parameters():
            p.grad = None

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Restores the parameters, combines and clips the gradients and takes the optimizer's step; a step with a
        gradient that is not finite, in either pass, is skipped and counted."""
        if closure is not None:
            raise TypeError("step() takes no closure: use two_pass(closure)")
        if not self._asked and self._gamma_now() != 0:
            raise RuntimeError("step() without perturb(): call perturb() and, where it is true, backward() again")
        if self._perturbed and not self._second_pass_ran():
            raise RuntimeError(
                "step() while perturbed, without a second pass: call loss.backward() once more, or restore()"
            )
        params = self._with_grad()
        factor, finite = torch.ones((), dtype=torch.float64, device=params[0].device), True
        if self._perturbed:
            self._restore_parameters(before_step=True)
            finite = self._finite
            params, norm, factor = self._combine(params, factor)
        else:
            norm = self._norm([p.grad for p in params])
        finite = torch.isfinite(norm) & finite
        if self.max_norm is not None:
            factor = factor * (self.max_norm / (norm + 1e-6)).clamp(max=1)
        self._take_step(params, factor, finite)
        self._completed += finite
        self._skipped += ~finite
        if not self._perturbed:
            self._metrics = {}
        self._metrics["grad_norm"] = norm
        self._attempts += 1
        self._perturbed = self._asked = False
        self._first = None

    def _second_pass_ran(self) -> bool:
        now = {p: (id(p.grad), p.grad._version) for p in self._parameters() if p.grad is not None}
        return now != self._grads_before

    def _combine(self, params: list[Tensor], one: Tensor) -> tuple[list[Tensor], Tensor, Tensor]:
        """The parameters with the combined gradient in .grad up to a factor, that gradient's norm, and the factor."""
        ratio, first = self._ratio, self._first
        nan = torch.full_like(one, torch.nan)
        if first is None:
            norm = self._norm([p.grad for p in params]) * ratio
            self._metrics |= {"gr/g2_norm": norm if ratio == 1 else nan, "gr/penalty_ratio": nan}
            return params, norm, one * ratio
        params = list(dict.fromkeys([*params, *first]))
        for p in params:
            if p.grad is None:
                p.grad = torch.zeros_like(first[p])
            if p not in first:
                first[p] = torch.zeros_like(p.grad)
        sums = torch.zeros(3, dtype=torch.float64, device=one.device)
        primitive("combine", one.device)(sums, [first[p] for p in params], [p.grad for p in params], ratio)
        g2_norm, gap, norm = sums.sqrt()
        self._metrics |= {"gr/g2_norm": g2_norm, "gr/penalty_ratio": ratio * gap / self._metrics["gr/g1_norm"]}
        return params, norm, one

    def two_pass(self, closure: Callable[[], Tensor], model: nn.Module | None = None) -> Tensor:
        """The whole step: closure, perturb, closure, step.

        `closure` runs forward and backward over all micro-batches and returns the loss; it must not call zero_grad.
        Dropout draws the same random numbers in both passes, and the buffers of `model` end as the first pass left
        them.

        Returns:
            The first pass's loss.
        """
        devices = sorted({p.device.index for p in self._parameters() if p.device.type == "cuda"})
        cpu_rng = torch.get_rng_state()
        cuda_rng = [torch.cuda.get_rng_state(device) for device in devices]
        buffers = [] if model is None else list(model.buffers())
        before = [buffer.clone() for buffer in buffers]
        loss = closure()
        with self.perturb() as wanted:
            if wanted:
                after = [buffer.clone() for buffer in buffers]
                _assign(buffers, before)
                torch.set_rng_state(cpu_rng)
                for device, state in zip(devices, cuda_rng, strict=True):
                    torch.cuda.set_rng_state(state, device)
                try:
                    closure()
                finally:
                    _assign(buffers, after)
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
        self.optimizer.add_param_group(param_group)

    def state_dict(self) -> dict:
        """The wrapped optimizer's state, and this object's counters under "gradient_regularizer"."""
        self._refuse_while_perturbed("state_dict")
        counters = {
            "attempts": self._attempts,
            "completed": int(self._completed),
            "skipped": int(self._skipped),
        }
        return {**self.optimizer.state_dict(), "gradient_regularizer": counters}

    def load_state_dict(self, state_dict: dict) -> None:
        """Takes what `state_dict` gave, or a state of the wrapped optimizer alone."""
        self._refuse_while_perturbed("load_state_dict")
        counters = state_dict.get("gradient_regularizer", {"attempts": 0, "completed": 0, "skipped": 0})
        self.optimizer.load_state_dict({k: v for k, v in state_dict.items() if k != "gradient_regularizer"})
        self._attempts = counters["attempts"]
        self._completed.fill_(counters["completed"])
        self._skipped.fill_(counters["skipped"])

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
        cosine = values.get("gr/step_cos", 1.0)
        if cosine < 0.9:
            warnings.warn(
                f"the applied perturbation has cosine {cosine:.2f} with the intended one: rounding swallows it. Use a "
                f"larger epsilon than {self.epsilon}, rounding='stochastic', or float32 parameters and compute",
                stacklevel=2,
            )
        return values


def _step_metrics(sums: Tensor, count: int) -> dict[str, Tensor]:
    dot, applied, intended, moved = sums
    return {
        "gr/step_gain": dot / intended,
        "gr/step_cos": dot / (applied * intended).sqrt(),
        "gr/step_norm_ratio": (applied / intended).sqrt(),
        "gr/frac_moved": moved / count,
    }


def _assign(buffers: list[Tensor], values: list[Tensor]) -> None:
    with torch.no_grad():
        for buffer, value in zip(buffers, values, strict=True):
            buffer.copy_(value)


def _by_dtype(tensors: list[Tensor]) -> list[list[Tensor]]:
    kinds: dict[torch.dtype, list[Tensor]] = {}
    for tensor in tensors:
        kinds.setdefault(tensor.dtype, []).append(tensor)
    return list(kinds.values())
