"""GR in verl's FSDP engine: before its optimizer_step clips and steps, the mini-batch runs once more at theta +
epsilon g1, and the combined gradient is left in .grad for whatever optimizer verl has built.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from typing import Any, NamedTuple, cast

import torch
import verl
from tensordict import TensorDict
from torch import nn
from verl.workers.config import FSDPEngineConfig
from verl.workers.engine import EngineRegistry
from verl.workers.engine.fsdp.transformer_impl import FSDPEngineWithLMHead

from redit_fast.checks import did_you_mean
from redit_fast.gr import gradients
from redit_fast.gr.config import GR
from redit_fast.gr.grad_scaler import loss_scale
from redit_fast.gr.groups import COUNTERS, parameter_groups
from redit_fast.gr.replay import Replay
from redit_fast.gr.two_pass import Copies, TwoPass
from redit_fast.integrations.kept_batches import CUT_SHORT
from redit_fast.integrations.options import GROptions
from redit_fast.integrations.verl.loss import SUPPORTED, FirstPass
from redit_fast.integrations.versions import check_hooks

HOOKS = {
    "__init__": ["self", "model_config", "engine_config", "optimizer_config", "checkpoint_config"],
    "_build_optimizer": ["self", "module"],
    "train_batch": ["self", "data", "loss_function"],
    "forward_backward_batch": ["self", "data", "loss_function", "forward_only"],
    "optimizer_zero_grad": ["self"],
    "optimizer_step": ["self"],
}
SECTION = "override_optimizer_config"
OPTIONS = [option.name for option in fields(GROptions) if option.name != "gr_optimizer"]  # that is verl's own


def read_gr(options: Mapping[str, object] | None) -> tuple[GR | None, dict[str, object]]:
    """From optim.override_optimizer_config: what its gr_* options say, None where they switch GR off; and the others,
    which are the optimizer's.

    Raises:
        ValueError, TypeError: an unknown gr_ option, with the closest one, or a value out of range, naming it.
    """
    ours, others = {}, {}
    for name, value in (options or {}).items():
        if not name.startswith("gr_"):
            others[name] = value
            continue
        if name not in OPTIONS:
            raise ValueError(f"optim.{SECTION}.{name} is not an option; {did_you_mean(name, OPTIONS)}")
        ours[name] = value
    try:
        gr = GROptions(**cast(dict[str, Any], ours)).gr()
    except (ValueError, TypeError) as error:
        raise type(error)(f"optim.{SECTION}.{error}") from None
    return gr if gr.gamma > 0 else None, others


def _check_engine(gr: GR, config: FSDPEngineConfig) -> None:
    if config.strategy != "fsdp2":
        raise ValueError(
            f"gr_gamma={gr.gamma} needs FSDP2, got strategy={config.strategy}, whose flat parameters do not say "
            "which rank holds what: set actor_rollout_ref.actor.strategy=fsdp2"
        )
    if config.qat.enable:
        raise ValueError(
            f"gr_gamma={gr.gamma} does not work with qat.enable=True, whose scales of the weights are kept until "
            "the step: switch one of them off"
        )


class _Batch(NamedTuple):
    data: TensorDict
    loss_function: Callable
    replay: Replay
    first: FirstPass


@dataclass
class SecondPass:
    """What an engine with GR keeps: the batches of the step under way. Between steps nothing is held on the device,
    where verl puts the rollout engine."""

    gr: GR
    batches: list[_Batch] = field(default_factory=list)
    failed: bool = False  # a pass raised after its first loss
    metrics: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def recorded(self, module: nn.Module, data: TensorDict, loss_function: Callable) -> Iterator[None]:
        """Inside, the first pass over `data`, which is kept when its backward passes returned."""
        self.refuse_what_is_left()
        tensors = [*module.parameters(), *module.buffers()]  # whose devices are those that draw dropout
        batch = _Batch(data.copy(), loss_function, Replay(tensors, module), FirstPass())
        with batch.first.recorded():
            yield
        self.failed = False
        self.batches.append(batch)

    def watched(self, loss_function: Callable) -> Callable:
        """FSDP2 holds the gradients of all micro-batches but the last where zero_grad does not reach them: after an
        exception it adds them to the next step's first pass, and the second would not have them."""

        def watched(*args, **kwargs) -> object:
            output = loss_function(*args, **kwargs)
            self.failed = True  # until the pass has ended
            return output

        return watched

    def refuse_what_is_left(self) -> None:
        if self.failed:
            raise RuntimeError(CUT_SHORT.format("worker"))

    def run(self, engine: FSDPEngineWithLMHead) -> None:
        """From g1 in .grad to the combined gradient in .grad; theta as it was, also after an exception."""
        self.refuse_what_is_left()
        batches, self.batches, self.metrics = self.batches, [], {}
        if not batches:
            return
        begin, group = time.perf_counter(), engine.optimizer.param_groups[0]
        counters = group.get(COUNTERS, {"attempts": 0, "completed": 0, "skipped": 0})
        if self.gr.gamma_at(counters["attempts"]) == 0:
            group[COUNTERS] = counters | {name: counters[name] + 1 for name in ("attempts", "completed")}
            return
        gr = replace(self.gr, compute_dtype=engine._autocast_dtype)
        passes = TwoPass(parameter_groups(engine.module), gr, Copies(), engine.engine_config.seed)
        passes.load_state_dict(counters)
        # Both passes leave the gradient times the loss scale, and so does what is combined: verl unscales it.
        with passes.perturb(loss_scale(engine.scaler, passes.completed.device)):
            for data, loss_function, replay, first in batches:
                with replay.again(), first.again():  # verl's own, not ours, which would remember the batch
                    FSDPEngineWithLMHead.forward_backward_batch(engine, data, self.watched(loss_function))
        self.failed = False
        with passes.combine() as combined:
            # NaN where verl, or its GradScaler, looks before it steps.
            factor = combined.factor if combined.finite else torch.full_like(combined.factor, torch.nan)
            gradients.multiply(combined.params, factor)
        group[COUNTERS] = passes.state_dict()
        self.metrics = {name: value for name, value in passes.metrics().items() if math.isfinite(value)}
        self.metrics.pop("grad_norm", None)  # verl's own
        self.metrics["time/gr_pass2"] = time.perf_counter() - begin


class ReditFSDPEngine(FSDPEngineWithLMHead):
    """verl's engine of strategy fsdp2 with GR, whose settings stand in optim.override_optimizer_config: gr_gamma (0:
    off, the engine is then verl's own), gr_epsilon and the others of `redit_fast.integrations.options.GROptions` but
    gr_optimizer.

    The second pass takes the same mini-batch (its old log-probs too), the same micro-batches, dropout and buffers, and
    the tokens that redit_clip_cov and redit_kl_cov chose in the first.
    Losses and metrics are the first pass's, grad_norm is the combined gradient's before clipping; gr/* and
    time/gr_pass2 (seconds) come beside them. A step with a gradient that is not finite, in either pass, is skipped by
    verl.

    Raises:
        ValueError, TypeError: an option out of range, naming it; another strategy, quantization-aware training.
    """

    _gr: SecondPass | None = None

    def __init__(self, model_config, engine_config, optimizer_config, checkpoint_config):
        options = getattr(optimizer_config, SECTION, None)
        gr, others = read_gr(options)
        if others != (options or {}):
            optimizer_config = replace(optimizer_config, **{SECTION: others})
        if gr is not None and not engine_config.forward_only:
            _check_engine(gr, engine_config)
            self._gr = SecondPass(gr)
        super().__init__(model_config, engine_config, optimizer_config, checkpoint_config)

    def _build_optimizer(self, module):
        if self._gr is not None:
            parameter_groups(module)  # raises where the model has no decoder layers
        return super()._build_optimizer(module)

    def train_batch(self, data, loss_function):
        outputs = super().train_batch(data, loss_function)
        if self._gr is not None and self.is_mp_src_rank_with_outputs():
            # As lists of one, like a micro-batch's metrics: verl chains those of all ranks.
            outputs["metrics"].update({name: [value] for name, value in self._gr.metrics.items()})
        return outputs

    def forward_backward_batch(self, data, loss_function, forward_only=False):
        if self._gr is None or forward_only:
            return super().forward_backward_batch(data, loss_function, forward_only)
        with self._gr.recorded(self.module, data, loss_function):
            return super().forward_backward_batch(data, self._gr.watched(loss_function), forward_only)

    def optimizer_zero_grad(self):
        if self._gr is not None:
            self._gr.batches.clear()
        super().optimizer_zero_grad()

    def optimizer_step(self):
        if self._gr is not None:
            self._gr.run(self)
        return super().optimizer_step()


def register() -> None:
    """Every TrainingWorker that would have built verl's FSDP engine of a language model builds ours; twice is once.

    Raises:
        RuntimeError: a verl whose engine has other methods, naming the supported one.
    """
    check_hooks("verl", verl, HOOKS, FSDPEngineWithLMHead, SUPPORTED)
    _swap(FSDPEngineWithLMHead, ReditFSDPEngine)


def unregister() -> None:
    _swap(ReditFSDPEngine, FSDPEngineWithLMHead)


def _swap(old: type, new: type) -> None:
    for engines in EngineRegistry._engines["language_model"].values():
        engines.update({device: new for device, engine in engines.items() if engine is old})
