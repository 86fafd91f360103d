"""AdamW with gradient regularisation built in: float32 masters for low-precision parameters, and no other copy of
them."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any, Literal, cast

import torch
from torch import Tensor

from redit_fast.backends import primitive, reference
from redit_fast.checks import described, real_number
from redit_fast.gr import shards
from redit_fast.gr.config import Rounding
from redit_fast.gr.groups import check_group
from redit_fast.gr.perturbation import LOW_PRECISION
from redit_fast.gr.regularizer import GradientRegularizer
from redit_fast.gr.shards import local
from redit_fast.gr.two_pass import Combined, Copies

_NUMBERS = ("lr", "eps", "weight_decay")


class _MasterAdamW(torch.optim.Optimizer):
    """State of torch.optim.AdamW, in float32, and a float32 `master` for each bfloat16 or float16 parameter.

    The masters, with copies of the other parameters, are the store of the two passes; the step writes them too."""

    def __init__(self, params, lr: float, betas: tuple[float, float], eps: float, weight_decay: float):
        defaults = _checked({"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        super().__init__(_checked_params(params), defaults)
        self.versions: dict[Tensor, tuple] = {}  # shards.version(p) when its master, or copy, was last equal to it
        self.without_master = Copies()

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "versions": self.versions, "without_master": self.without_master}

    def add_param_group(self, param_group: dict) -> None:
        param_group |= _checked(param_group)
        super().add_param_group(param_group)

    def state_of(self, p: Tensor) -> dict[str, Tensor]:
        """The state of `p`, made at first use; its master refreshed if `p` was changed by others since the last
        step."""
        state = self.state[p]
        if "step" not in state:
            wide = torch.promote_types(p.dtype, torch.float32)
            state["step"] = torch.zeros((), dtype=torch.float32, device=p.device)
            state["exp_avg"] = torch.zeros_like(p, dtype=wide, memory_format=torch.preserve_format)
            state["exp_avg_sq"] = torch.zeros_like(state["exp_avg"])
        if p.dtype in LOW_PRECISION:
            if "master" not in state:
                state["master"] = p.detach().float()
            elif self.versions.get(p) != shards.version(p):
                master, weights = local(state["master"]), local(p)
                master.copy_(torch.where(master.to(p.dtype) == weights, master, weights))
            self.versions[p] = shards.version(p)
        return state

    def step(self, closure: None = None) -> None:  # type: ignore[override]  # no closure
        """Makes the state of every parameter with a gradient, and nothing else."""
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self.state_of(p)

    def keep(self, params: list[Tensor]) -> None:
        """Copies what has no master, unless AdamW wrote the copy with the parameter and nobody changed it since."""
        for p in params:
            self.state_of(p)
        copies = self.without_master.copies
        stale = [
            p
            for p in params
            if p.dtype not in LOW_PRECISION and (p not in copies or self.versions.get(p) != shards.version(p))
        ]
        if stale:
            self.without_master.keep(stale)

    def restore(self, params: list[Tensor], step_writes: Collection[Tensor] = ()) -> None:
        """`step_writes`: `update` will write those, from their masters and copies."""
        copies = self.without_master.copies
        for p in params:
            if p not in step_writes:
                local(p).copy_(copies[p] if p in copies else local(self.state[p]["master"]))

    def written(self, params: list[Tensor]) -> None:
        self.versions |= {p: shards.version(p) for p in params}

    def update(self, combined: Combined, factor: Tensor) -> None:
        """One step from the masters, or from the copies of perturbed parameters without one, which take the step too;
        where the gradient is not finite, back to them."""
        wanted, copies = set(combined.params), self.without_master.copies
        copies = {p: copies[p] for p in combined.moved if p in copies}
        for group in self.param_groups:
            chosen = [p for p in group["params"] if p in wanted]
            if not chosen:
                continue
            states = [self.state_of(p) for p in chosen]
            pairs = list(zip(chosen, states, strict=True))
            beta1, beta2 = group["betas"]
            primitive(reference.adamw, factor.device)(
                [local(p) for p in chosen],
                [local(state["master"]) if "master" in state else copies.get(p) for p, state in pairs],
                [local(p.grad) for p in chosen],
                [local(state["exp_avg"]) for state in states],
                [local(state["exp_avg_sq"]) for state in states],
                [state["step"] for state in states],
                factor,
                combined.finite,
                group["lr"],
                beta1,
                beta2,
                group["eps"],
                group["weight_decay"],
            )
            self.versions |= {p: shards.version(p) for p in chosen if p.dtype in LOW_PRECISION or p in copies}

    def load_state_dict(self, state_dict: dict) -> None:
        """As torch.optim.Optimizer, but shapes are checked and float32 state stays float32 beside low-precision
        parameters."""
        params = [p for group in self.param_groups for p in group["params"]]
        ids = [i for group in state_dict["param_groups"] for i in group["params"]]
        state = dict(zip(ids, params, strict=False))  # unequal numbers are refused below
        for group in state_dict["param_groups"]:
            _check_saved_group(group)
        for i, values in state_dict["state"].items():
            if i not in ids:
                raise ValueError(f"state_dict has a state of parameter {i!r}, which is in none of its groups")
            if i in state:
                _check_saved_state(i, values, state[i])
        super().load_state_dict({**state_dict, "state": {}})
        for i, values in state_dict["state"].items():
            p = state[i]
            wide = torch.promote_types(p.dtype, torch.float32)
            self.state[p] = {
                name: (
                    value.to(p.device, torch.float32 if name == "step" else wide, copy=True)
                    if isinstance(value, Tensor)
                    else torch.tensor(value, dtype=torch.float32, device=p.device)
                )
                for name, value in values.items()
                if name in ("step", "exp_avg", "exp_avg_sq", "master")
            }
            if p.dtype not in LOW_PRECISION:
                self.state[p].pop("master", None)
        self.versions = {}


def _checked(options: dict) -> dict:
    """The numbers among the options of the optimizer, or of a parameter group."""
    numbers = {name: real_number(name, options[name], least=0) for name in _NUMBERS if name in options}
    if "betas" in options:
        betas = options["betas"]
        if not isinstance(betas, tuple | list) or len(betas) != 2:
            raise TypeError(f"betas must be two numbers, got {described(betas)}")
        decays = tuple(real_number(f"betas[{k}]", beta, least=0) for k, beta in enumerate(betas))
        if max(decays) >= 1:
            raise ValueError(f"betas must be in [0, 1), got {betas}")
        return {**numbers, "betas": decays}
    return numbers


def _check_saved_group(group: dict) -> None:
    """One group of a state that is to be loaded: AdamW's numbers, and nothing that would make it another optimizer."""
    missing = [name for name in (*_NUMBERS, "betas") if name not in group]
    if missing:
        raise ValueError(f"state_dict must be of an AdamW, a parameter group of it lacks {', '.join(missing)}")
    _checked(group)
    for name in ("amsgrad", "maximize"):
        if group.get(name):
            raise ValueError(f"state_dict must be of an AdamW without {name}, got {name}={described(group[name])}")
    if group["weight_decay"] and not group.get("decoupled_weight_decay", True):
        raise ValueError("state_dict must be of an AdamW, got one of Adam, whose weight_decay is part of the gradient")


def _check_saved_state(i: int, values: dict, p: Tensor) -> None:
    """The state of one parameter, in a state that is to be loaded."""
    for name, value in values.items():
        if name == "step":
            continue
        what = f"{name} of parameter {i} in state_dict"
        if not isinstance(value, Tensor) or not value.is_floating_point():
            raise TypeError(f"{what} must be a floating-point tensor, got {described(value)}")
        if value.shape != p.shape:
            raise ValueError(f"{what} has shape {tuple(value.shape)}, the parameter {tuple(p.shape)}")
        if shards.is_shard(value) != shards.is_shard(p):
            raise ValueError(
                f"{what} is {'a shard' if shards.is_shard(value) else 'whole'}, the parameter is not: load it by "
                "torch.distributed.checkpoint.state_dict.set_optimizer_state_dict"
            )
    missing = [name for name in ("step", "exp_avg", "exp_avg_sq") if name not in values]
    if values and missing:
        raise ValueError(f"state_dict must be of an AdamW, its state of parameter {i} lacks {', '.join(missing)}")
    if values:
        step = values["step"]
        is_number = isinstance(step, Tensor) and step.numel() == 1 and not step.is_complex()
        real_number(f"step of parameter {i} in state_dict", step.item() if is_number else step, least=0)


def _checked_params(params: object) -> list:
    if isinstance(params, Tensor | str | dict) or not isinstance(params, Iterable):
        raise TypeError(f"params must be parameters or parameter groups, got {described(params)}")
    params = list(params)
    for each in params:
        if not isinstance(each, Tensor | dict | tuple):  # tuple: named parameters
            raise TypeError(f"params must hold tensors or dicts, got {described(each)} among them")
        if isinstance(each, dict):
            check_group("each group of params", each)
    if not params:
        raise ValueError("params must hold at least one parameter, got none")
    return params


class RegularizedAdamW(GradientRegularizer):
    """AdamW with gradient regularisation; the verbs and the GR arguments are `GradientRegularizer`'s.

    bfloat16 and float16 parameters have a float32 master, from which the step restores them, so that GR holds nothing
    beside AdamW's own state. float32 and float64 parameters have a copy, which the step writes with them, so that it is
    neither made nor put back in passes of its own. Masters and copies follow a parameter that others change in place
    (`load_state_dict`, `p.copy_` under no_grad), but not what is written through `p.data`, which torch does not count.
    With gamma 0 and max_norm None the step is AdamW's; max_norm 1, the default, clips whatever gamma is.

    Args:
        params: parameters or parameter groups (`parameter_groups`).
        lr, betas, eps, weight_decay: as in torch.optim.AdamW, but weight_decay 0 by default and lr a number, not a
            tensor.

    `state_dict` is in torch.optim.AdamW's layout with `master` and the counters beside it; `load_state_dict` takes a
    plain torch.optim.AdamW state too.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
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
        super().__init__(
            _MasterAdamW(params, lr, betas, eps, weight_decay),
            gamma=gamma,
            epsilon=epsilon,
            max_norm=max_norm,
            perturb_max_norm=perturb_max_norm,
            normalized=normalized,
            rounding=rounding,
            keep_first_grad=keep_first_grad,
            gamma_warmup_steps=gamma_warmup_steps,
            every_k_steps=every_k_steps,
            compute_dtype=compute_dtype,
            seed=seed,
        )

    def _store(self) -> _MasterAdamW:
        return cast(_MasterAdamW, self.optimizer)

    def _take_step(self, combined: Combined, factor: Tensor) -> None:
        self._store().update(combined, factor)


def unwrap(optimizer: object) -> GradientRegularizer:
    """The `RegularizedAdamW` or `GradientRegularizer` in what accelerate's `prepare`, or another host, made of it, and
    keeps in an attribute `optimizer`; itself when it is one.

    Raises:
        TypeError: there is none.
    """
    chain = [optimizer]
    while not isinstance(chain[-1], GradientRegularizer):
        inner = getattr(chain[-1], "optimizer", None)
        if inner is None or any(inner is outer for outer in chain):
            found = ", which holds ".join(type(outer).__name__ for outer in chain)
            raise TypeError(
                f"optimizer must be a RegularizedAdamW or GradientRegularizer, or hold one as .optimizer, got {found}"
            )
        chain.append(inner)
    return chain[-1]
