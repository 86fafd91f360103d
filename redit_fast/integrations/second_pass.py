"""GR inside a transformers.Trainer: between its last backward pass of a step and its clipping, the step's micro-batches
run once more at theta + epsilon g1, and the combined gradient is left in .grad for the trainer's own optimizer.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
import transformers
from torch import Tensor, nn

from redit_fast.checks import check_choice, whole_number
from redit_fast.gr.adamw import RegularizedAdamW
from redit_fast.gr.groups import parameter_groups
from redit_fast.gr.regularizer import GradientRegularizer
from redit_fast.integrations.kept_batches import KeptBatches, Versions, same_tensors

SUPPORTED = "5.6..5.24"  # of transformers, by running the tests
HOOKS = {
    "training_step": ["self", "model", "inputs", "num_items_in_batch"],
    "_prepare_inputs": ["self", "inputs"],
    "_clip_grad_norm": ["self", "model"],
    "_get_grad_norm": ["self", "model", "grad_norm"],
}
STEP_STATE = (
    "entropy_coef",
    "_last_world_entropy",
    "_entropy_window_stats",
)  # TRL's adaptive entropy: begins as pass 1
LOG_STATE = ("_metrics", "_total_train_tokens")  # TRL's logs: pass 2 writes into a copy


@dataclass(frozen=True)
class GRSettings:
    """The `gr_*` arguments of every integration; ValueError or TypeError naming the one out of range."""

    gamma: float = 0.0
    epsilon: float = 1e-3
    perturb_max_norm: float = 10.0
    normalized: bool = False
    every_k_steps: int = 1
    optimizer: str | None = None

    def __post_init__(self) -> None:
        whole_number("gr_every_k_steps", self.every_k_steps, 1)
        check_choice("gr_optimizer", self.optimizer, (None, "regularized_adamw"))
        if isinstance(self.epsilon, str):
            raise ValueError(f"gr_epsilon must be a number, got {self.epsilon!r}")
        try:
            self.regularizer([torch.zeros(1, requires_grad=True)])
        except (ValueError, TypeError) as error:
            raise type(error)(f"gr_{error}") from None

    def regularizer(self, groups: list, **options) -> GradientRegularizer:
        return GradientRegularizer(
            _LeftToTheTrainer(groups),
            gamma=self.gamma,
            epsilon=self.epsilon,
            perturb_max_norm=self.perturb_max_norm,
            normalized=self.normalized,
            max_norm=None,
            **options,
        )


class _LeftToTheTrainer(torch.optim.Optimizer):
    """Takes no step: the combined gradient stays in .grad."""

    def __init__(self, groups: list):
        super().__init__(groups, {})
        self.reached = False

    def step(self, closure: None = None) -> None:
        self.reached = True  # not where a gradient is not finite: GradientRegularizer then skips the step


class _MicroBatch(NamedTuple):
    inputs: object  # as _prepare_inputs returned them
    versions: Versions
    items: Tensor | int | None
    rng: list[Tensor]


@dataclass
class SecondPass:
    """What a trainer with `SecondPassHooks` keeps."""

    settings: GRSettings
    regularizer: GradientRegularizer | None = None
    kept: KeptBatches = field(default_factory=KeptBatches)
    batch: _MicroBatch | None = None  # the first pass's, until its backward returns
    replayed: object | None = None  # the inputs of the micro-batch that runs again
    items: Tensor | int | None = None
    recording: bool = False
    begun: dict[str, object] = field(default_factory=dict)  # STEP_STATE before the step's first micro-batch
    skipped: Tensor | None = None  # the norm that was not finite
    done: bool = False  # within the step, as clipping and norm are two calls
    loss_scale: float = 1.0
    seconds: list[float] = field(default_factory=list)
    training: object | None = None  # trainer.state, which every run begins anew, also one of auto_find_batch_size

    @contextmanager
    def recorded(self, trainer: transformers.Trainer, model: nn.Module, items: Tensor | int | None) -> Iterator[None]:
        """Inside, a micro-batch is kept when its backward pass returns."""
        if self.training is not trainer.state:
            self.training, self.regularizer = trainer.state, None
            self.seconds.clear()
        accelerator, params = trainer.accelerator, list(model.parameters())
        self.kept.match(params)
        own, backward = vars(accelerator).get("backward"), accelerator.backward

        def kept_backward(loss: Tensor, **kwargs) -> None:
            if self.batch is None:
                raise RuntimeError("gr_gamma above 0 needs one _prepare_inputs before each backward pass of a step")
            backward(loss, **kwargs)
            self.kept.keep(self.batch, params)
            self.batch = None

        accelerator.backward = kept_backward
        self.recording, self.items, self.done = True, items, False
        try:
            yield
        finally:
            self.recording, self.batch = False, None
            if own is None:
                del accelerator.backward
            else:
                accelerator.backward = own

    def prepared(self, trainer: transformers.Trainer, inputs: object) -> None:
        if not self.kept:
            self.begun = {name: getattr(trainer, name) for name in STEP_STATE if hasattr(trainer, name)}
        self.batch = _MicroBatch(same_tensors(inputs), Versions(inputs), self.items, _rng_states(trainer.args.device))

    def run(self, trainer: transformers.Trainer, model: nn.Module) -> None:
        """From g1 in .grad to the combined gradient in .grad, once a step; theta as it was."""
        if self.done:
            return
        self.done, self.skipped, begin = True, None, time.perf_counter()
        batches = self.kept.take(list(model.parameters()))
        if not batches or trainer.state.global_step % self.settings.every_k_steps:
            return
        for batch in batches:
            batch.versions.check()
        if self.regularizer is None:
            self.regularizer = self._new_regularizer(trainer)
        regularizer = self.regularizer
        with self._scaled(trainer):
            with regularizer.perturb() as wanted:
                if wanted:
                    self._replay(trainer, model, batches)
            regularizer.optimizer.reached = False
            regularizer.step()
        if not regularizer.optimizer.reached:
            self.skipped = torch.tensor(regularizer.metrics()["grad_norm"])
            self._skip(trainer)
        self.seconds.append(time.perf_counter() - begin)

    def _new_regularizer(self, trainer: transformers.Trainer) -> GradientRegularizer:
        dtype = torch.bfloat16 if trainer.args.bf16 else torch.float16 if trainer.args.fp16 else None
        groups = parameter_groups(trainer.accelerator.unwrap_model(trainer.model))
        regularizer = self.settings.regularizer(groups, compute_dtype=dtype, seed=trainer.args.seed)
        # A resumed run draws the stochastic rounding of its step, not of step 0.
        counters = {"attempts": 0, "completed": trainer.state.global_step, "skipped": 0}
        state = regularizer.state_dict()
        state["param_groups"][0]["gradient_regularizer"] = counters
        regularizer.load_state_dict(state)
        return regularizer

    @contextmanager
    def _scaled(self, trainer: transformers.Trainer):
        """Under a GradScaler of scale S both passes leave S times the gradient, and so does what is combined, which the
        trainer unscales as ever: only the perturbation epsilon g1 needs the scale."""
        regularizer, scaler = self.regularizer, getattr(trainer.accelerator, "scaler", None)
        before = regularizer.gamma, regularizer.epsilon, regularizer.perturb_max_norm
        self.loss_scale = 1.0 if scaler is None else scaler.get_scale()
        if not regularizer.normalized:
            regularizer.gamma, regularizer.epsilon = before[0] / self.loss_scale, before[1] / self.loss_scale
            regularizer.perturb_max_norm = before[2] * self.loss_scale
        try:
            yield
        finally:
            regularizer.gamma, regularizer.epsilon, regularizer.perturb_max_norm = before

    def _replay(self, trainer: transformers.Trainer, model: nn.Module, batches: list[_MicroBatch]) -> None:
        """The backward passes of the step again: same inputs, same dropout, same scaling; what they log is dropped."""
        accelerator, device = trainer.accelerator, trainer.args.device
        after = {name: getattr(trainer, name) for name in (*STEP_STATE, *LOG_STATE) if hasattr(trainer, name)}
        buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
        rng = _rng_states(device)
        for name, value in {**copy.deepcopy(after), **self.begun}.items():
            setattr(trainer, name, value)
        try:
            for i, batch in enumerate(batches):
                last = i == len(batches) - 1
                accelerator.gradient_state._set_sync_gradients(last)  # as Trainer does around pass 1
                _set_rng_states(batch.rng, device)
                self.replayed = batch.inputs
                with nullcontext() if last else accelerator.no_sync(model=model):
                    # transformers' own, not a subclass's, which may count steps: compute_loss, its scaling, backward
                    transformers.Trainer.training_step(trainer, model, batch.inputs, batch.items)
        finally:
            self.replayed = None
            accelerator.gradient_state._set_sync_gradients(True)
            _set_rng_states(rng, device)
            for name, value in after.items():
                setattr(trainer, name, value)
            with torch.no_grad():
                for buffer, value in buffers:
                    buffer.copy_(value)

    def _skip(self, trainer: transformers.Trainer) -> None:
        """Leaves the trainer's optimizer nothing to do, or NaN where it, or its GradScaler, looks for that itself."""
        optimizer = trainer.optimizer
        while hasattr(optimizer, "optimizer") and not isinstance(optimizer, GradientRegularizer):
            optimizer = optimizer.optimizer
        params = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        if getattr(trainer.accelerator, "scaler", None) is not None or isinstance(optimizer, GradientRegularizer):
            params[0].grad.fill_(math.nan)
            return
        for p in params:
            p.grad = None

    def metrics(self) -> dict[str, float]:
        """The last step's, and `time/gr_pass2`, the mean seconds of a second pass since the last call."""
        if self.regularizer is None or not self.seconds:
            return {}
        values = self.regularizer.metrics()
        del values["grad_norm"]  # the trainer's own
        for name in ("gr/g1_norm", "gr/g2_norm"):
            if name in values:
                values[name] /= self.loss_scale
        values["time/gr_pass2"] = sum(self.seconds) / len(self.seconds)
        self.seconds.clear()
        return {name: value for name, value in values.items() if math.isfinite(value)}


def _rng_states(device: torch.device) -> list[Tensor]:
    return [torch.get_rng_state(), *([torch.cuda.get_rng_state(device)] if device.type == "cuda" else [])]


def _set_rng_states(states: list[Tensor], device: torch.device) -> None:
    torch.set_rng_state(states[0])
    if device.type == "cuda":
        torch.cuda.set_rng_state(states[1], device)


class SecondPassHooks:
    """The methods of transformers.Trainer around which GR is built; the trainer's class comes behind it. Off while
    `_gr` is None."""

    _gr: SecondPass | None = None

    def _start_gr(self, settings: GRSettings) -> None:
        """Called with the trainer built; raises where GR, or its optimizer, cannot work."""
        if settings.optimizer is not None:
            if self.optimizer is not None or self.optimizer_cls_and_kwargs is not None:
                raise ValueError(f"gr_optimizer={settings.optimizer!r} and an optimizer of your own: give one of them")
            args = self.args
            self.optimizer_cls_and_kwargs = (
                RegularizedAdamW,
                {
                    "lr": args.learning_rate,
                    "betas": (args.adam_beta1, args.adam_beta2),
                    "eps": args.adam_epsilon,
                    "gamma": 0.0,  # the passes are the trainer's, the step alone is this optimizer's
                    "max_norm": None,
                },
            )
        if settings.gamma == 0:
            return
        if self.is_deepspeed_enabled or self.is_fsdp_enabled:
            host = "DeepSpeed, which steps in backward()" if self.is_deepspeed_enabled else "FSDP"
            raise ValueError(f"gr_gamma={settings.gamma} does not work under {host}: use DDP or one device")
        parameter_groups(self.model)  # raises where the model has no decoder layers
        self._gr = SecondPass(settings)

    def training_step(self, model, inputs, num_items_in_batch=None):
        if self._gr is None:
            return super().training_step(model, inputs, num_items_in_batch)
        with self._gr.recorded(self, model, num_items_in_batch):
            return super().training_step(model, inputs, num_items_in_batch)

    def _prepare_inputs(self, inputs):
        if self._gr is not None and self._gr.replayed is not None:
            return same_tensors(self._gr.replayed)
        prepared = super()._prepare_inputs(inputs)
        if self._gr is not None and self._gr.recording:
            self._gr.prepared(self, prepared)
        return prepared

    def _clip_grad_norm(self, model):
        if self._gr is None:
            return super()._clip_grad_norm(model)
        self._gr.run(self, model)
        norm = super()._clip_grad_norm(model)
        return norm if self._gr.skipped is None else self._gr.skipped

    def _get_grad_norm(self, model, grad_norm=None):
        if self._gr is None:
            return super()._get_grad_norm(model, grad_norm=grad_norm)
        self._gr.run(self, model)
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        return norm if self._gr.skipped is None else self._gr.skipped

    def log(self, logs, *args, **kwargs):
        if self._gr is not None and "loss" in logs:
            logs = {**logs, **self._gr.metrics()}
        return super().log(logs, *args, **kwargs)
