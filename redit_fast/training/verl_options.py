"""What each setting of `redit-fast train` is in verl 0.9.1 with our plugin: its options, or why verl cannot do it.

Every field of `TrainConfig` is in one of three places: `options` writes it, `REFUSED` says at which values verl has
nothing that means the same, or `UNUSED` says why it has no meaning there. A test changes every field.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from redit_fast.training.config import TrainConfig
from redit_fast.training.config_values import loaded_reward

VERSION = "0.9.1"  # of verl, whose options these are
Options = dict[str, Any]  # of verl's command line, in its order

# loss_type -> the plugin's loss_mode without redit_, and verl's loss_agg_mode. Over a whole step bnpo is dapo, and
# reinforce is gpg; gspo has the value and gradient of gspo_token, which is verl's.
LOSSES = {
    "dapo": ("vanilla", "token-mean"),
    "bnpo": ("vanilla", "token-mean"),
    "grpo": ("vanilla", "seq-mean-token-mean"),
    "dr_grpo": ("vanilla", "seq-mean-token-sum-norm"),
    "gspo": ("gspo", "seq-mean-token-mean"),
    "gspo_token": ("gspo", "seq-mean-token-mean"),
    "gmpo": ("geo_mean", "seq-mean-token-mean"),
    "sapo": ("sapo", "seq-mean-token-mean"),
    "cispo": ("cispo", "token-mean"),
    "gpg": ("gpg", "token-mean"),
    "reinforce": ("gpg", "token-mean"),
    "dppo_tv": ("dppo_tv", "token-mean"),
    "dppo_kl": ("dppo_kl", "token-mean"),
    "clip_cov": ("clip_cov", "token-mean"),
    "kl_cov": ("kl_cov", "token-mean"),
    "dro": ("dro", "token-mean"),
}
WITHOUT_RATIO = ("gpg", "reinforce")
NO_DUAL_CLIP = 1e9  # above every ratio, whose logarithm is limited to 20
DTYPES = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}
SCHEDULES = {"constant": "constant", "constant_with_warmup": "constant", "cosine": "cosine"}

UNUSED = {
    "device": "verl trains on the GPUs of its command, trainer.n_gpus_per_node of them; only cpu is refused",
    "strategy": "verl's FSDP2 in any case: the gradient is that of ddp",
    "warm_start_steps": "of the demo, which is refused",
    "preset": "what it sets is written",
    "judge_template": "of a judge, which is refused",
    "judge_model": "of a judge, which is refused",
    "judge_temperature": "of a judge, which is refused",
    "judge_top_p": "of a judge, which is refused",
    "judge_max_tokens": "of a judge, which is refused",
    "judge_failures": "of a judge, which is refused",
    "rollout_ahead": "of a server, which is refused",
    "rollout_timeout": "of a server, which is refused",
    "rollout_retries": "of a server, which is refused",
    "rollout_sleep": "of a server, which is refused",
    "out_dir": "verl's checkpoints are in the folder that is written",
}


class Facts(NamedTuple):
    """What the options need to know beside the settings."""

    folder: Path  # that is written, absolute
    name: str
    model: str  # a folder, absolute, or a name on the hub
    dtype: str
    prompts: int  # to train on
    held_out: int
    longest: int  # prompt, in tokens
    template: str | None  # chat template of all prompts; None: the tokenizer's own
    scales: list[float]  # of the reward functions


def _fresh_ratio(c: TrainConfig) -> bool:
    has_ratio = c.loss_type not in WITHOUT_RATIO or c.sampler_correction != "none"
    return c.gr_gamma > 0 and c.gr_pass2_ratio == "fresh" and c.updates_per_rollout == 1 and has_ratio


def _uneven(c: TrainConfig) -> bool:
    return c.micro_batch_size is not None and c.prompts_per_step * c.group_size % c.micro_batch_size != 0


def _by_token(c: TrainConfig) -> bool:
    return c.loss_type in ("gspo", "gmpo") and c.sampler_correction.startswith("token")


# field -> (when verl cannot do it, why and what to set instead)
REFUSED: dict[str, tuple[Callable[[TrainConfig], bool], str]] = {
    "model": (lambda c: c.model is None, "the embedded demo is no model that verl loads; set model and data"),
    "rewards": (
        lambda c: any(map(loaded_reward, c.rewards)),
        "each of verl's eight reward workers would load the model, or ask the judge by itself; set functions, and take "
        "verl's own reward model",
    ),
    "device": (lambda c: c.device == "cpu", "verl's rollouts by vLLM are on GPUs here; set auto or cuda"),
    "seed": (lambda c: c.seed >= 2**32, "numpy's seed, which verl sets, is below 2**32; set a smaller one"),
    "dynamic_sampling": (
        lambda c: c.dynamic_sampling > 0,
        "verl's algorithm.filter_groups draws until the step is full, without a limit of rounds; set 0",
    ),
    "overlong": (lambda c: c.overlong == "mask", "verl has no mask of completions that are cut off; set keep"),
    "micro_batch_size": (
        _uneven,
        "verl's must divide prompts_per_step x group_size; set a divisor, or none and tokens_per_micro_batch",
    ),
    "lr_scheduler_type": (
        lambda c: c.lr_scheduler_type not in SCHEDULES,
        "verl has no such schedule; set constant, constant_with_warmup or cosine",
    ),
    "updates_per_rollout": (
        lambda c: c.updates_per_rollout > 1 and c.lr_scheduler_type != "constant",
        "verl's learning rate stays the same over the updates of a step; set lr_scheduler_type constant",
    ),
    "rollout": (
        lambda c: c.server is not None,
        "verl starts vLLM itself, on the GPUs that train; set paged, which has the same correction, or local",
    ),
    "correction": (
        _by_token,
        "verl's gspo is gspo_token, another loss under weights of tokens, and its geo_mean takes their geometric mean; "
        "set none or one of a sequence, or loss_type gspo_token",
    ),
    "correction_floor": (
        lambda c: bool(c.correction_floor) and c.sampler_correction.endswith("truncate"),
        "verl limits a weight from above alone; set none, or a correction by mask",
    ),
    "loss_type": (lambda c: c.loss_type not in LOSSES, f"verl has no such loss; set one of {', '.join(LOSSES)}"),
    "advantage_scale": (
        lambda c: c.advantage_scale == "batch",
        "verl's grpo divides by the deviation of the group or by nothing; set group or none",
    ),
    "dither_distribution": (
        lambda c: c.dither_distribution == "uniform" and c.dither_level > 0 and len(c.rewards) > 1,
        "verl dithers the sum of several rewards, and a sum of uniform noise is not uniform; set gaussian",
    ),
    "gr_pass2_ratio": (
        _fresh_ratio,
        "verl's second pass has its ratios to the policy that sampled; set pass1, or gr_gamma 0",
    ),
    "reference_reset_every": (lambda c: c.reference_reset_every > 0, "verl resets no reference; set 0"),
    "sharpness_every": (lambda c: c.sharpness_every > 0, "verl has no such probe; set 0"),
}


def refusals(config: TrainConfig) -> list[str]:
    """A sentence for each setting that verl cannot do, which begins with its name and says what to set instead."""
    return [
        f"{name}: got {getattr(config, name)}, {words}" for name, (refuses, words) in REFUSED.items() if refuses(config)
    ]


def refusals_of(config: TrainConfig, facts: Facts) -> list[str]:
    """The same of what the model and the data decide."""
    found = []
    if facts.dtype != "float32" and config.gr_gamma > 0 and config.gr_rounding == "stochastic":
        found.append(
            f"gr_rounding: got stochastic in {facts.dtype}, verl's weights are float32 and what it computes with is "
            "rounded to nearest; set nearest and watch actor/gr/step_cos, or dtype float32"
        )
    if facts.prompts < config.prompts_per_step:
        found.append(
            f"prompts_per_step: got {config.prompts_per_step}, verl fills no step from two turns through the data, "
            f"which has {facts.prompts} prompts to train on; set at most so many"
        )
    return found


def options(config: TrainConfig, facts: Facts) -> Options:
    """verl's options, the same as `config` where `refusals` and `refusals_of` find nothing. With `+` in front those
    that verl's configuration has no line for."""
    return {
        **_data(config, facts),
        **_model(config, facts),
        **_rollout(config, facts),
        **_loss(config),
        **_correction(config),
        **_advantages(config, facts),
        **_optimizer(config),
        **_trainer(config, facts),
    }


def _data(config: TrainConfig, facts: Facts) -> Options:
    train, test = facts.folder / "train.parquet", facts.folder / "test.parquet"
    return {
        "data.train_files": str(train),
        "data.val_files": str(test if facts.held_out else train),  # verl wants one, which it then does not read
        "data.train_batch_size": config.prompts_per_step,
        "data.max_prompt_length": config.max_prompt_length or facts.longest,
        "data.max_response_length": config.max_completion_length,
        "data.seed": config.seed,
        "reward.custom_reward_function.path": str(facts.folder / "rewards.py"),
        "reward.custom_reward_function.name": "compute_score",
    }


def _model(config: TrainConfig, facts: Facts) -> Options:
    model, actor, ref = (f"actor_rollout_ref.{part}" for part in ("model", "actor", "ref"))
    found = {
        f"{model}.path": facts.model,
        f"{model}.use_fused_kernels": True,
        f"{model}.fused_kernel_options.impl_backend": "redit",
        f"{model}.use_remove_padding": config.packing != "off",
        f"{model}.enable_gradient_checkpointing": config.checkpoint_activations,
        f"{actor}.strategy": "fsdp2",
        f"+{actor}.fsdp_config.mixed_precision.param_dtype": DTYPES[facts.dtype],
        f"{actor}.fsdp_config.seed": config.seed,
        f"{actor}.ppo_mini_batch_size": config.prompts_per_step,
        f"{actor}.ppo_epochs": config.updates_per_rollout,
    }
    if facts.template is not None:
        found[f"{model}.custom_chat_template"] = facts.template
    if facts.dtype == "float32":  # flash attention, verl's own choice, has none
        found[f"+{model}.override_config.attn_implementation"] = "sdpa"
    if config.beta:
        found[f"+{ref}.fsdp_config.mixed_precision.param_dtype"] = DTYPES[facts.dtype]
    if config.lora_rank is not None:
        found |= {
            f"{model}.lora_rank": config.lora_rank,
            f"{model}.lora_alpha": config.lora_alpha or 2 * config.lora_rank,
            f"{model}.target_modules": config.lora_targets or "all-linear",
        }
    if config.micro_batch_size is None:
        longest = facts.longest + config.max_completion_length
        found[f"{actor}.use_dynamic_bsz"] = True
        found[f"{actor}.ppo_max_token_len_per_gpu"] = max(config.tokens_per_micro_batch, longest)
    else:
        size = "log_prob_micro_batch_size_per_gpu"
        found[f"{actor}.use_dynamic_bsz"] = False
        found[f"{actor}.ppo_micro_batch_size_per_gpu"] = config.micro_batch_size
        found[f"actor_rollout_ref.rollout.{size}"] = found[f"{ref}.{size}"] = config.micro_batch_size
    return found


def _rollout(config: TrainConfig, facts: Facts) -> Options:
    rollout = "actor_rollout_ref.rollout"
    found: Options = {
        f"{rollout}.name": "vllm",
        f"{rollout}.dtype": facts.dtype,
        f"{rollout}.tensor_model_parallel_size": 1,
        f"{rollout}.n": config.group_size,
        f"{rollout}.temperature": config.temperature,
        f"{rollout}.top_p": config.top_p,
        f"{rollout}.seed": config.seed,
        f"{rollout}.val_kwargs.n": config.eval_samples,
    }
    if config.lora_rank is not None:
        found[f"{rollout}.load_format"] = "safetensors"  # the base's weights, of which verl sends the adapters alone
    if config.eval_samples > 1:
        found |= {
            f"{rollout}.val_kwargs.do_sample": True,
            f"{rollout}.val_kwargs.temperature": config.temperature,
            f"{rollout}.val_kwargs.top_p": config.top_p,
        }
    return found


def _loss(config: TrainConfig) -> Options:
    actor, policy_loss = "actor_rollout_ref.actor", "actor_rollout_ref.actor.policy_loss"
    mode, aggregation = LOSSES[config.loss_type]
    found: Options = {
        f"{policy_loss}.loss_mode": f"redit_{mode}",
        f"{actor}.loss_agg_mode": aggregation,
        f"{actor}.clip_ratio_low": config.clip_low,
        f"{actor}.clip_ratio_high": config.clip_low if config.clip_high is None else config.clip_high,
        # At 20 the losses dppo_* limit their ratio, here and there.
        f"{actor}.clip_ratio_c": 20.0 if mode.startswith("dppo") else NO_DUAL_CLIP,
    }
    if aggregation == "seq-mean-token-sum-norm":
        found[f"{actor}.loss_scale_factor"] = config.max_completion_length
    if mode == "kl_cov":
        found[f"{policy_loss}.ppo_kl_coef"] = 1.0
    if mode == "dro":
        found[f"{policy_loss}.dro_beta"] = config.dro_beta
    if config.beta:
        found |= {
            f"{actor}.use_kl_loss": True,
            f"{actor}.kl_loss_coef": config.beta,
            f"{actor}.kl_loss_type": "low_var_kl",
        }
    return found


def _correction(config: TrainConfig) -> Options:
    """Of verl's rollout_correction, one threshold truncates and two mask."""
    correction, kind = "algorithm.rollout_correction", config.sampler_correction
    if kind == "none":
        return {f"{correction}.rollout_is": None}
    found: Options = {
        f"{correction}.rollout_is": kind.partition("_")[0],
        f"{correction}.rollout_is_threshold": config.correction_cap,
    }
    if kind.endswith("mask"):  # a floor above 0, where every weight is above e^-20
        found[f"{correction}.rollout_is_threshold"] = f"{config.correction_floor or 1e-9!r}_{config.correction_cap!r}"
    return found


def _advantages(config: TrainConfig, facts: Facts) -> Options:
    found: Options = {
        "algorithm.adv_estimator": "redit_grpo",
        "algorithm.norm_adv_by_std_in_grpo": config.advantage_scale == "group",
        "critic.enable": False,
    }
    weights = config.reward_weights or [1.0] * len(facts.scales)
    # Of the weighted rewards' noise; independent Gaussian noise adds up to Gaussian noise.
    scale = math.hypot(*(weight * scale for weight, scale in zip(weights, facts.scales, strict=True)))
    if config.dither_level > 0 and scale > 0:
        found |= {
            "+algorithm.redit.dither_level": config.dither_level,
            "+algorithm.redit.dither_distribution": config.dither_distribution,
            "+algorithm.redit.dither_reward_scale": scale,
            "+algorithm.redit.dither_schedule": config.dither_schedule,
            "+algorithm.redit.dither_total_steps": config.steps,
            "+algorithm.redit.dither_dead_groups": config.dither_dead_groups,
            "+algorithm.redit.dither_seed": config.seed,
        }
    return found


def _optimizer(config: TrainConfig) -> Options:
    optim = "actor_rollout_ref.actor.optim"
    found: Options = {
        f"{optim}.lr": config.learning_rate,
        f"{optim}.lr_scheduler_type": SCHEDULES[config.lr_scheduler_type],
        f"{optim}.lr_warmup_steps": config.warmup_steps,
        f"{optim}.betas": [config.adam_beta1, config.adam_beta2],
        f"{optim}.weight_decay": config.weight_decay,
        f"{optim}.clip_grad": math.inf if config.max_grad_norm is None else config.max_grad_norm,
    }
    if config.gr_gamma > 0:
        names = [name for name in TrainConfig.model_fields if name.startswith("gr_") and name != "gr_pass2_ratio"]
        found |= {f"+{optim}.override_optimizer_config.{name}": getattr(config, name) for name in names}
    return found


def _trainer(config: TrainConfig, facts: Facts) -> Options:
    return {
        "trainer.project_name": "redit-fast",
        "trainer.experiment_name": facts.name,
        "trainer.logger": ["console", *(config.track or ())],
        "trainer.total_training_steps": config.steps,
        "trainer.total_epochs": -(-config.steps // (facts.prompts // config.prompts_per_step)),
        "trainer.val_before_train": facts.held_out > 0,
        "trainer.test_freq": config.eval_every if facts.held_out else -1,
        "trainer.save_freq": config.checkpoint_every,
        "trainer.max_actor_ckpt_to_keep": config.keep_checkpoints,
        "trainer.default_local_dir": str(facts.folder / "checkpoints"),
        "trainer.nnodes": 1,
        "trainer.n_gpus_per_node": 1,
    }
