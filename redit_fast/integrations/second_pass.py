"""GR inside a transformers.Trainer: between its last backward pass of a step and its clipping, the step's micro-batches
run once more at theta + epsilon g1, and the combined gradient is left in .grad for the trainer's own optimizer.
"""

# ruff: noqa: E402  what is not installed is said before it is imported

from __future__ import annotations

import copy
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from redit_fast.extras import need

need("transformers", "redit_fast.integrations.second_pass")

import transformers

from redit_fast.gr import gradients
from redit_fast.gr.adamw import RegularizedAdamW
from redit_fast.gr.config import GR
from redit_fast.gr.grad_scaler import loss_scale
from redit_fast.gr.groups import parameter_groups
from redit_fast.gr.regularizer import GradientRegularizer
from redit_fast.gr.shards import is_shard
from redit_fast.gr.two_pass import Copies, TwoPass
from redit_fast.integrations.kept_batches import CUT_SHORT, KeptBatches, Versions, same_tensors
from redit_fast.integrations.options import GROptions

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
SAVED = "redit_fast_gr"  # in trainer_state.json, which a resumed run reads: `TwoPass.state_dict`


class _MicroBatch(NamedTuple):
    inputs: object  # as _prepare_inputs returned them
    versions: Versions
    items: Tensor | int | None
    rng: list[Tensor]


@dataclass
class SecondPass:
    """What a trainer with `SecondPassHooks` keeps."""

    gr: GR
    passes: TwoPass | None = None
    kept: KeptBatches = field(default_factory=KeptBatches)
    batch: _MicroBatch | None = None  # the first pass's, until its backward returns
    replayed: object | None = None  # the inputs of the micro-batch that runs again
    items: Tensor | int | None = None
    recording: bool = False
    cut_short: bool = False  # FSDP2 holds what a backward pass that raised has left
    begun: dict[str, object] = field(default_factory=dict)  # STEP_STATE before the step's first micro-batch
    skipped: Tensor | None = None  # the norm that was not finite
    done: bool = False  # within the step, as clipping and norm are two calls
    seconds: list[float] = field(default_factory=list)
    training: object | None = None  # trainer.state, which every run begins anew, also one of auto_find_batch_size

    @contextmanager
    def recorded(self, trainer: transformers.Trainer, model: nn.Module, items: Tensor | int | None) -> Iterator[None]:
        """Inside, a micro-batch is kept when its backward pass returns."""
        if self.training is not trainer.state:
            self.training, self.passes = trainer.state, None
            self.seconds.clear()
        self._refuse_what_is_left()
        accelerator, params = trainer.accelerator, list(model.parameters())
        self.kept.match(params)
        own, backward = vars(accelerator).get("backward"), accelerator.backward

        def kept_backward(loss: Tensor, **kwargs) -> None:
            if self.batch is None:
                raise RuntimeError("gr_gamma above 0 needs one _prepare_inputs before each backward pass of a step")
            self.cut_short = any(map(is_shard, params))
            backward(loss, **kwargs)
            self.cut_short = False
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

    def _refuse_what_is_left(self) -> None:
        if self.cut_short:
            raise RuntimeError(CUT_SHORT.format("trainer"))

    def prepared(self, trainer: transformers.Trainer, inputs: object) -> None:
        if not self.kept:
            self.begun = {name: getattr(trainer, name) for name in STEP_STATE if hasattr(trainer, name)}
        self.batch = _MicroBatch(same_tensors(inputs), Versions(inputs), self.items, _rng_states(trainer.args.device))

    def run(self, trainer: transformers.Trainer, model: nn.Module) -> None:
        """From g1 in .grad to the combined gradient in .grad, once a step; theta as it was."""
        if self.done:
            return
        self.done, self.skipped, begin = True, None, time.perf_counter()
        self._refuse_what_is_left()
        params = list(model.parameters())
        batches = self.kept.take(params)
        step = trainer.state.global_step
        if not batches or self.gr.gamma_at(step) == 0:
            return
        for batch in batches:
            batch.versions.check()
        if self.passes is None:
            self.passes = self._new_passes(trainer)
        self.passes.attempts = step
        with self.passes.perturb(_scale(trainer)):
            self.cut_short = any(map(is_shard, params))
            self._replay(trainer, model, batches)
            self.cut_short = False
        with self.passes.combine() as combined:
            finite = bool(combined.finite)
            if finite:
                gradients.multiply(combined.params, combined.factor)
        if self.gr.epsilon == "auto":
            trainer.state.stateful_callbacks[SAVED] = self.passes.state_dict()
        if not finite:
            self.skipped = combined.norm
            self._skip(trainer)
        self.seconds.append(time.perf_counter() - begin)

    def _new_passes(self, trainer: transformers.Trainer) -> TwoPass:
        dtype = torch.bfloat16 if trainer.args.bf16 else torch.float16 if trainer.args.fp16 else None
        groups = parameter_groups(trainer.accelerator.unwrap_model(trainer.model))
        passes = TwoPass(groups, replace(self.gr, compute_dtype=dtype), Copies(), trainer.args.seed)
        # A resumed run has what epsilon="auto" has found, and draws the stochastic rounding of its step, not of step 0.
        saved = trainer.state.stateful_callbacks.get(SAVED, {})
        passes.load_state_dict({**saved, "completed": trainer.state.global_step})
        return passes

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
        if self.passes is None or not self.seconds:
            return {}
        values = self.passes.metrics()
        del values["grad_norm"]  # the trainer's own
        values["time/gr_pass2"] = sum(self.seconds) / len(self.seconds)
        self.seconds.clear()
        return {name: value for name, value in values.items() if math.isfinite(value)}


def _scale(trainer: transformers.Trainer) -> Tensor | None:
    """What .grad is multiplied by when a step's last backward pass has returned, in both passes: by a GradScaler's
    factor, which epsilon must not see. The weights of the micro-batches (`training_step`, TRL's normalizer) and the
    mean over the ranks (DDP, FSDP2) are applied by then and are the step's own, as in this package's trainer."""
    return loss_scale(getattr(trainer.accelerator, "scaler", None), trainer.args.device)


def _rng_states(device: torch.device) -> list[Tensor]:
    return [torch.get_rng_state(), *([torch.cuda.get_rng_state(device)] if device.type == "cuda" else [])]


def _set_rng_states(states: list[Tensor], device: torch.device) -> None:
    torch.set_rng_state(states[0])
    if device.type == "cuda":
        torch.cuda.set_rng_state(states[1], device)


class SecondPassHooks:
    """The methods of transformers.Trainer around which GR is built; the trainer's class comes behind it. Off while
    `_gr` is None."""

    if TYPE_CHECKING:  # of the trainer: what is read here
        args: Any
        accelerator: Any
        model: Any
        optimizer: Any
        optimizer_cls_and_kwargs: Any
        is_deepspeed_enabled: bool
        is_fsdp_enabled: bool

    _gr: SecondPass | None = None

    def _start_gr(self, options: GROptions) -> None:
        """Called with the trainer built; raises where GR, or its optimizer, cannot work."""
        if options.gr_optimizer is not None:
            if self.optimizer is not None or self.optimizer_cls_and_kwargs is not None:
                raise ValueError(f"gr_optimizer={options.gr_optimizer!r} and your own optimizer: give one of them")
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
        if options.gr_gamma == 0:
            return
        host = None
        if self.is_deepspeed_enabled:
            host = "DeepSpeed, which steps in backward()"
        elif self.is_fsdp_enabled and self.accelerator.state.fsdp_plugin.fsdp_version == 1:
            host = "FSDP1, whose flat parameters do not say which rank holds what"
        if host is not None:
            raise ValueError(
                f"gr_gamma={options.gr_gamma} does not work under {host}: "
                "use FSDP2 (fsdp_config={'version': 2}) or DDP"
            )
        parameter_groups(self.model)  # raises where the model has no decoder layers
        self._gr = SecondPass(options.gr())

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
