"""TRL's GRPO loss (GRPOTrainer._compute_loss) by `linear_grpo_loss`, where it is token-level: three products of the
head instead of four, the gradient computed in the forward pass.
"""

from __future__ import annotations

import inspect

import torch
from torch import Tensor
from trl import GRPOTrainer
from trl.trainer.utils import nanmax, nanmin

from redit_fast.integrations.trl.head import FusedHead, PolicyRows
from redit_fast.losses.config import LossConfig

CLIPPED = ("grpo", "bnpo", "dr_grpo", "dapo", "luspo")
MEANS = {
    **dict.fromkeys(CLIPPED, ["clip_ratio/low_mean", "clip_ratio/high_mean", "clip_ratio/region_mean"]),
    "cispo": ["cispo_clip_ratio"],
}  # beside kl and entropy


def fused_config(trainer: GRPOTrainer) -> LossConfig | None:
    """The trainer's loss, or None where `linear_grpo_loss` takes no fewer products, or has no such loss."""
    args, loss_type = trainer.args, trainer.loss_type
    if (
        loss_type not in (*CLIPPED, "cispo", "sapo")
        or trainer.importance_sampling_level != "token"
        or trainer._entropy_bonus_enabled
        or trainer.top_entropy_quantile < 1
        or trainer.off_policy_mask_threshold is not None
        or (trainer.use_vllm and trainer.vllm_importance_sampling_correction)
        or trainer.aux_loss_enabled
    ):
        return None
    if loss_type in CLIPPED:
        own = {"epsilon_low": trainer.epsilon_low, "epsilon_high": trainer.epsilon_high, "delta": args.delta}
    elif loss_type == "cispo":
        own = {"epsilon_high": trainer.epsilon_high}
    else:
        own = {"sapo_temperature_pos": args.sapo_temperature_pos, "sapo_temperature_neg": args.sapo_temperature_neg}
    return LossConfig(loss_type, beta=trainer.beta, kl_ratio_correction=args.use_bias_correction_kl, **own)


def _normalizer(trainer: GRPOTrainer, inputs: dict, mask: Tensor) -> Tensor:
    """The whole denominator, gradient accumulation included, as in GRPOTrainer._compute_loss in training."""
    accumulation = trainer.current_gradient_accumulation_steps
    if trainer.loss_type in ("grpo", "sapo", "luspo"):
        return mask.new_full((), len(mask) * accumulation, dtype=torch.float32)
    if trainer.loss_type == "bnpo":
        return mask.sum().clamp(min=1).float() * accumulation
    if trainer.loss_type == "dr_grpo":
        return mask.new_full((), len(mask) * trainer.max_completion_length * accumulation, dtype=torch.float32)
    tokens = inputs["num_items_in_batch"].clamp(min=1).float() / trainer.accelerator.num_processes
    return tokens * accumulation / trainer.args.steps_per_generation  # the generation batch -> one optimizer step


def compute_loss(trainer: GRPOTrainer, head: FusedHead, config: LossConfig, model, inputs: dict) -> Tensor:
    """GRPOTrainer._compute_loss in training: the loss, TRL's metrics in the trainer's logs."""
    completion_ids, mask = inputs["completion_ids"], inputs["completion_mask"]
    ids = torch.cat([inputs["prompt_ids"], completion_ids], 1)
    attention_mask = torch.cat([inputs["prompt_mask"], mask], 1)
    if "tool_mask" in inputs:
        mask = mask * inputs["tool_mask"]
    advantages = inputs["advantages"]
    head.rows = PolicyRows(
        config,
        (advantages[:, None] if advantages.ndim == 1 else advantages).expand_as(mask),
        inputs.get("old_per_token_logps"),
        inputs["ref_per_token_logps"] if config.beta else None,
        mask,
        _normalizer(trainer, inputs, mask),
    )
    method = GRPOTrainer._get_per_token_logps_and_entropies
    images = {name: inputs[name] for name in inspect.signature(method).parameters if name in inputs}
    try:
        trainer._get_per_token_logps_and_entropies(
            model, ids, attention_mask, completion_ids.shape[1], compute_entropy=True, **images
        )
        output = head.output
    finally:
        head.rows = head.output = None
    _log(trainer, output.metrics, mask)
    return output.loss


def _log(trainer: GRPOTrainer, metrics: dict[str, Tensor], mask: Tensor) -> None:
    """TRL's keys, over the ranks: means by the number of scored tokens; extremes over the sequences that have any, NaN,
    which TRL leaves out of its logs, where none has. A rank without rows has no metrics and takes part all the same."""
    log, accelerator, loss_type = trainer._metrics["train"], trainer.accelerator, trainer.loss_type
    nothing, count = mask.new_zeros((), dtype=torch.float32), mask.sum().float()
    names = (["kl"] if trainer.beta else []) + ["entropy"] + MEANS.get(loss_type, [])
    sums = [metrics.get(name, nothing) * count for name in names]
    totals = accelerator.reduce(torch.stack([count, *sums]), reduction="sum")
    for name, value in zip(names, (totals[1:] / totals[0].clamp(min=1)).tolist(), strict=True):
        log[name].append(value)
    if loss_type in CLIPPED:
        for name, extreme in (("clip_ratio/low_min", nanmin), ("clip_ratio/high_max", nanmax)):
            found = torch.where(count > 0, metrics.get(name, nothing), torch.nan)
            log[name].append(extreme(accelerator.gather(found[None])).item())
