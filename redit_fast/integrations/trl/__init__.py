"""Dithered rewards, GR and our LM head in TRL's GRPOTrainer and RLOOTrainer.

    from redit_fast.integrations.trl import ReditGRPOConfig, ReditGRPOTrainer

    args = ReditGRPOConfig(output_dir="run", dither_level=0.05, gr_gamma=1e-3)
    ReditGRPOTrainer(model, reward_funcs=reward, args=args, train_dataset=data).train()

or, around a trainer that is there: `with patch(trainer, dither_level=0.05): trainer.train()`.
"""

# ruff: noqa: E402  no TRL, or an older one, is refused before what it has not, or cannot import, is asked for

from __future__ import annotations

import inspect
import sys
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from types import ModuleType
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
from torch import Tensor

from redit_fast.extras import need

need("trl", "redit_fast.integrations.trl")

import transformers
import trl

from redit_fast.integrations.versions import check_hooks, check_version

SUPPORTED = "TRL 1.15..1.16"  # by running the tests
check_version("trl", "trl", trl.__version__, SUPPORTED)

import trl.trainer.utils as utils
from trl import GRPOConfig, GRPOTrainer, RLOOTrainer

from redit_fast.checks import check_flag
from redit_fast.dither import Dither, per_reward
from redit_fast.gr.config import Pass2Ratio
from redit_fast.integrations import second_pass
from redit_fast.integrations.options import DitherOptions, GROptions, described, of_gr
from redit_fast.integrations.second_pass import SecondPassHooks
from redit_fast.integrations.trl import head as trl_head
from redit_fast.integrations.trl import loss as trl_loss
from redit_fast.integrations.trl import packing as trl_packing
from redit_fast.losses.config import LossConfig
from redit_fast.noise import noise
from redit_fast.ops.advantages import Advantages, group_advantages

TRAINERS = (GRPOTrainer, RLOOTrainer)
HOOKS = {
    "_calculate_rewards": ["self", "inputs", "prompts", "completions", "completion_ids_list"],
    "_generate_and_score_completions": ["self", "inputs"],
    "_prepare_inputs": ["self", "generation_batch"],
    "_compute_loss": ["self", "model", "inputs"],
}
ENTROPY_MASK = "redit_entropy_mask"  # beside a micro-batch's inputs: the first pass's


@dataclass
class ReditOptions(DitherOptions, GROptions):
    """What `ReditGRPOConfig` adds to TRL's GRPOConfig, and what `patch` takes. Dithering and GR are off by default.

    Args:
        dither_*: the fields of `Dither` (seed None: the trainer's; reward_scale: one number, or one per reward
            function).
        gr_*: see `redit_fast.integrations.transformers.GRTrainerMixin`.
        gr_pass2_ratio: where a batch carries no old log-probs, the second pass takes its own ("fresh": ratio 1, as in
            the paper) or the first pass's ("pass1").
        fused_head: TRL's fused LM head computes by `linear_logp`, for the policy and its reference model; and
            GRPOTrainer's loss by `linear_grpo_loss` where it is token-level, without entropy bonus, entropy or
            off-policy mask, and vLLM's correction. Log-ratios are then limited to [-20, 20], which TRL does not.
        packing: the log-probs of policy and reference model, and their gradients, come from rows without padding, in
            which the tokens that prompts of a micro-batch share are computed once.

    Raises:
        ValueError, TypeError: a field out of range, naming it.
    """

    # A list, as transformers' parser takes no number or list; one entry is a number for every reward function.
    dither_reward_scale: list[float] = field(  # type: ignore[assignment]  # of DitherOptions: a number
        default_factory=lambda: [1.0],
        metadata={"help": "The full scale of the rewards: one number, or one for each reward function."},
    )
    gr_pass2_ratio: Pass2Ratio = of_gr("pass2_ratio")
    fused_head: bool = described(True, "Whether TRL's fused LM head, and its token-level loss, are computed by ours.")
    packing: bool = described(
        False, "Whether policy and reference model compute rows without padding, and what prompts share once."
    )

    def __post_init__(self) -> None:
        if isinstance(self, GRPOConfig):
            super().__post_init__()  # type: ignore[misc]  # GRPOConfig's
        if isinstance(self.dither_reward_scale, list | tuple) and len(self.dither_reward_scale) == 1:
            (self.dither_reward_scale,) = self.dither_reward_scale  # type: ignore[assignment]
        check_flag("fused_head", self.fused_head)
        check_flag("packing", self.packing)
        self.dither(seed=0)
        self.gr()


@dataclass
class ReditGRPOConfig(ReditOptions, GRPOConfig):
    __doc__ = f"TRL's GRPOConfig with the fields of `ReditOptions`.\n\n{ReditOptions.__doc__}"


def _check_trl(trainer_class: type) -> None:
    check_hooks("trl", trl, HOOKS, trainer_class, SUPPORTED)
    check_hooks("trl", transformers, second_pass.HOOKS, transformers.Trainer, f"transformers {second_pass.SUPPORTED}")
    if not _unsloth():
        _check_head()


def _unsloth() -> bool:
    """Whether Unsloth, which replaces TRL's head and loss by its own, is in this process."""
    return "unsloth" in sys.modules


def _check_head() -> None:
    if _unsloth():
        raise RuntimeError("unsloth has put its own head in the place of TRL's: ours has none to replace")
    forward = getattr(getattr(utils, trl_head.NAME, None), "forward", None)
    if forward is None or list(inspect.signature(forward).parameters) != trl_head.CONTRACT:
        raise RuntimeError(
            f"redit_fast.integrations.trl got trl {trl.__version__}, whose trl.trainer.utils.{trl_head.NAME} is not "
            f"({', '.join(trl_head.CONTRACT)}); supported: {SUPPORTED}"
        )


class _Generation(NamedTuple):
    state: object  # of the trainer, another one in every run
    step: int  # of the optimizer
    earlier: int  # generations in that step


class ReditHooks(SecondPassHooks):
    """The methods of GRPOTrainer and RLOOTrainer around which dithering and GR are built; one of those comes behind."""

    if TYPE_CHECKING:  # of the trainer: what is read here, beside SecondPassHooks
        state: Any
        accelerator: Any
        ref_model: Any
        reward_funcs: list
        reward_func_names: list[str]
        reward_weights: Tensor
        num_generations: int
        _metrics: Any
        _logs: Any

    _dither: Dither | None = None
    _policy_head: trl_head.FusedHead | None = None
    _loss_config: LossConfig | None = None  # where the loss is `linear_grpo_loss`
    _clean_rewards: Any = None  # a tensor, (global batch, K), of the generation under way
    _generation: Any = None  # `_Generation`: the last one whose rewards are there
    _generated: _Generation | None = None  # the last one that came to its end

    def _start_redit(self, options: ReditOptions) -> ExitStack:
        """Called with the trainer built; the stack undoes what is swapped in its models."""
        self._dither = options.dither(self.args.seed)
        if self._dither is not None:
            per_reward("dither_reward_scale", self._dither.reward_scale, len(self.reward_funcs))
        policy = self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model
        if options.packing:
            if _unsloth():
                raise ValueError("packing=True does not work beside unsloth, which has put its own head in TRL's place")
            trl_packing.check(self, policy)
        self._start_gr(options)
        reference = None if self.ref_model is None else self.accelerator.unwrap_model(self.ref_model)
        undo = ExitStack()
        if options.fused_head and _unsloth():
            warnings.warn(
                "unsloth has put its own head and loss in the place of TRL's: dithering and GR work with them, "
                "fused_head stays off",
                stacklevel=3,
            )
        elif options.fused_head:
            if self.is_deepspeed_enabled and self.accelerator.state.deepspeed_plugin.zero_stage == 3:
                raise ValueError("fused_head=True does not work under DeepSpeed ZeRO-3: pass fused_head=False")
            entropy: Any = "grad" if getattr(self, "_entropy_bonus_enabled", False) else "metric"
            self._policy_head = undo.enter_context(trl_head.FusedHead(policy, entropy))
            theirs = super()._compute_loss  # type: ignore[misc]  # of the trainer's class
            if getattr(theirs, "__func__", None) is GRPOTrainer._compute_loss:
                self._loss_config = trl_loss.fused_config(self)
            if reference is not None:
                undo.enter_context(trl_head.FusedHead(reference, "none"))
        if options.packing:
            for model in (policy, *([] if reference is None else [reference])):
                undo.enter_context(trl_packing.PackedForward(model))
        return undo

    def _compute_loss(self, model, inputs):
        if self._loss_config is None or not torch.is_grad_enabled():
            return super()._compute_loss(model, inputs)
        return trl_loss.compute_loss(self, self._policy_head, self._loss_config, model, inputs)

    def _calculate_rewards(self, inputs, prompts, completions, completion_ids_list):
        rewards = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        if self._dither is None or not self.model.training:
            return rewards
        last, step = self._generated, self.state.global_step
        again = last is not None and last.state is self.state and last.step == step
        self._generation = _Generation(self.state, step, last.earlier + 1 if again else 0)
        self._clean_rewards = rewards
        if isinstance(self, RLOOTrainer):  # clips rewards and adds KL to them after this method
            return self._noisy_rewards(rewards)
        return rewards

    def _advantages(self, dither: Dither | None) -> Advantages:
        rewards = self._clean_rewards
        return group_advantages(
            rewards,
            group_size=self.num_generations,
            reward_weights=self.reward_weights,
            dither=dither,
            step=self._generation.step,
            sample_ids=self._sample_ids(),
            scale=getattr(self, "scale_rewards", "none"),
            combine=getattr(self, "multi_objective_aggregation", "sum_then_normalize"),
        )

    def _sample_ids(self) -> Tensor:
        count, device = len(self._clean_rewards), self._clean_rewards.device
        return torch.arange(count, device=device) + count * self._generation.earlier

    def _noisy_rewards(self, rewards: Tensor) -> Tensor:
        """r + xi of `group_advantages`, rounded to float32."""
        dither, step = cast(Dither, self._dither), self._generation.step
        half_range = dither.level_at(step) * per_reward("dither_reward_scale", dither.reward_scale, rewards.shape[1])
        columns = [noise(dither.distribution, float(a), dither.seed, self._sample_ids(), k, step)
                   for k, a in enumerate(half_range)]  # fmt: skip
        added = torch.stack(columns, 1)
        if dither.dead_groups in ("skip", "only"):
            dead = self._advantages(None).dead
            added = torch.where((dead if dither.dead_groups == "skip" else ~dead)[:, None], 0.0, added)
        return (rewards.double() + added).float()

    def _generate_and_score_completions(self, inputs):
        output = super()._generate_and_score_completions(inputs)
        if self._dither is None or not self.model.training:
            return output
        self._generated = self._generation
        dithered, metrics = self._advantages(self._dither), self._metrics["train"]
        if isinstance(self, RLOOTrainer):
            self._log_clean_rewards()
            logged = list(self._logs["advantages"])[-len(dithered.values) :]
            advantages = torch.tensor(logged, dtype=torch.float32, device="cpu")
        else:
            advantages, local = dithered.values, len(output["advantages"])
            start = self.accelerator.process_index * local
            output["advantages"] = advantages[start : start + local].to(output["advantages"])
            _replace_last(self._logs["advantages"], advantages.tolist())
        scored = self._clean_rewards.isfinite().any(1)
        metrics["dither/reward_std"].append(_spread(dithered, self.num_generations, scored).item())
        metrics["dither/advantage_std"].append(advantages.std().item())
        dead = advantages[dithered.dead.to(advantages.device)]
        metrics["adv/rms_dead_groups"].append(dead.square().mean().sqrt().item() if len(dead) else 0.0)
        return output

    def _log_clean_rewards(self) -> None:
        """In the place of the noisy ones, which RLOOTrainer has just logged."""
        metrics, rewards = self._metrics["train"], self._clean_rewards
        weighted = (rewards * self.reward_weights.to(rewards.device)).nansum(1)
        weighted[rewards.isnan().all(1)] = torch.nan
        clean = {"reward": weighted.nanmean(), "reward_std": utils.nanstd(weighted)}
        clean["frac_reward_zero_std"] = self._advantages(None).dead.float().mean()
        for i, name in enumerate(self.reward_func_names):
            clean[f"rewards/{name}/mean"] = rewards[:, i].nanmean()
            clean[f"rewards/{name}/std"] = utils.nanstd(rewards[:, i])
            _replace_last(self._logs["rewards"][name], rewards[:, i].tolist())
        for name, value in clean.items():
            metrics[name][-1] = value.item()

    # The second pass of GR computes with the first one's entropy mask and, where asked to, its log-probs.

    def _get_per_token_logps_and_entropies(self, *args, **kwargs):
        found = super()._get_per_token_logps_and_entropies(*args, **kwargs)
        first_pass = self._gr is not None and self._gr.batch is not None and torch.is_grad_enabled()
        if first_pass and self._gr.gr.pass2_ratio == "pass1":
            self._gr.batch.inputs.setdefault("old_per_token_logps", found[0].detach())
        return found

    def get_high_entropy_mask(self, entropies, mask, threshold):
        if self._gr is None or not torch.is_grad_enabled():
            return super().get_high_entropy_mask(entropies, mask, threshold)
        if self._gr.replayed is not None:
            return self._gr.replayed[ENTROPY_MASK]
        found = super().get_high_entropy_mask(entropies, mask, threshold)
        if self._gr.batch is not None:
            self._gr.batch.inputs[ENTROPY_MASK] = found
        return found


def _replace_last(log, values: list) -> None:
    for _ in range(min(len(log), len(values))):
        log.pop()
    log.extend(values)


def _spread(dithered: Advantages, group_size: int, scored: Tensor) -> Tensor:
    """The standard deviation of the dithered weighted rewards over the batch, as TRL's reward_std is of the clean ones,
    from mean and deviation of every group."""
    count = scored.view(-1, group_size).sum(1).repeat_interleave(group_size).clamp(min=1)
    mean = dithered.dithered_mean[scored].double().mean()
    within = dithered.dithered_std.double().square() * (count - 1) / count
    squares = within + (dithered.dithered_mean.double() - mean).square()
    return (squares[scored].sum() / (scored.sum() - 1).clamp(min=1)).sqrt()


class ReditGRPOTrainer(ReditHooks, GRPOTrainer):
    """TRL's GRPOTrainer with a `ReditGRPOConfig` as `args`. With dithering and GR off its logs have TRL's keys, its
    numbers are TRL's to float32 rounding (fused_head=False: TRL's own bits).

    The rewards that are logged are the clean ones; dither/reward_std and dither/advantage_std describe the dithered
    ones, adv/rms_dead_groups the advantages in groups of equal clean rewards. The noise is the same on every rank and
    depends on the seed, the optimizer step, the sample and the reward function.

    Raises:
        TypeError: args is not a ReditGRPOConfig. ValueError: a field out of range, or that cannot work here, naming it.
        RuntimeError: a version of TRL or transformers with other methods, naming the supported ones.
    """

    def __init__(self, model, reward_funcs=None, args=None, **kwargs):
        _check_trl(GRPOTrainer)
        if not isinstance(args, ReditGRPOConfig):
            raise TypeError(f"args must be a ReditGRPOConfig, got {type(args).__name__}")
        super().__init__(model, reward_funcs, args, **kwargs)
        self._start_redit(args)


@contextmanager
def patch(target: GRPOTrainer | RLOOTrainer | ModuleType, **options) -> Iterator[None]:
    """The options of `ReditOptions` for a GRPOTrainer or RLOOTrainer, inside the block; or, for the module
    `trl.trainer.utils`, our head in every model that has TRL's. Leaving the block puts back what was there.

    Raises:
        TypeError: another target, or an option that is not a field of `ReditOptions`. ValueError, RuntimeError: as
            `ReditGRPOTrainer`.
    """
    if target is utils:
        if options:
            raise TypeError(f"patch(trl.trainer.utils) takes no options, got {', '.join(options)}")
        _check_head()
        with trl_head.swapped_head(trl_head.LinearLogpFunction(getattr(utils, trl_head.NAME), "grad")):
            yield
        return
    if not isinstance(target, TRAINERS):
        raise TypeError(f"patch needs a GRPOTrainer, an RLOOTrainer or trl.trainer.utils, got {type(target).__name__}")
    if isinstance(target, ReditHooks):
        raise RuntimeError(f"this {type(target).__name__} has redit-fast already")
    own, settings = type(target), ReditOptions(**options)
    _check_trl(next(base for base in TRAINERS if isinstance(target, base)))
    optimizer = target.optimizer_cls_and_kwargs
    # The methods above come before the trainer's own, for this instance: a class of the same name, put back at the end.
    target.__class__ = type(own.__name__, (ReditHooks, own), {"__module__": own.__module__, "__doc__": own.__doc__})
    try:
        with target._start_redit(settings):
            yield
    finally:
        target.__class__, target.optimizer_cls_and_kwargs = own, optimizer
        for name in set(ReditHooks.__annotations__) | {"_gr"}:
            vars(target).pop(name, None)
