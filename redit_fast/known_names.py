"""What is meant by the names of settings that are not, or no longer, names of ours: one table for flags and files."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Collection, Mapping

RENAMED = {"gamma": "gr_gamma", "pass2_ratio": "gr_pass2_ratio", "dead_groups": "dither_dead_groups"}  # still taken
IN_OLD_RUNS = {**RENAMED, "epsilon": "gr_epsilon"}  # in the config.json of a run of version 0.1

# By the names of TRL, transformers, verl and OpenRLHF; {a field of ours} is spelled as a flag or as a key.
_CLIP = "a clip range is {clip_low} and {clip_high}"
_STEP = "a step is {prompts_per_step} with {group_size} completions each, of which {micro_batch_size} are in a pass"
_ADAPTERS = "adapters are {lora_rank}, {lora_alpha} and {lora_targets}"
_SAMPLING = "completions are sampled at {temperature} and {top_p}"
_RANKS = "torchrun starts a process for each GPU, and how they share the model is {strategy}"
_SERVER = "completions come from {rollout}, a vLLM server by its URL"
_FILES = "the server of {rollout} gets weights as files, nccl and ipc are not used until a run on a GPU has tested them"
_CORRECTION = "what the sampler's log-probs do is {correction}, within {correction_floor} and {correction_cap}"
_PROJECT = "what a run logs goes to {track}, whose projects are the variables WANDB_PROJECT and TRACKIO_PROJECT"
_FOLDER = "a run's folder is {name} inside {out_dir}"
_MEANT = {
    "epsilon": f"GR's step is {{gr_epsilon}}, {_CLIP}",
    "lr actor_learning_rate": "{learning_rate}",
    "num_generations n_samples_per_prompt rollout_n num_return_sequences n_samples": "{group_size}",
    "kl_coef kl_loss_coef init_kl_coef kl_beta kl_weight": "{beta}",
    "epsilon_low clip_ratio_low eps_clip_low cliprange_low": "{clip_low}",
    "epsilon_high clip_ratio_high eps_clip_high cliprange_high": "{clip_high}",
    "clip_ratio cliprange clip_range eps_clip clip_eps": _CLIP,
    "lora use_lora use_peft peft": _ADAPTERS,
    "lora_r": "{lora_rank}",
    "lora_target_modules target_modules": "{lora_targets}",
    "lora_dropout": f"adapters have no dropout, {_ADAPTERS}",
    "qlora load_in_4bit load_in_8bit quantization": f"a quantised model cannot be trained, {_ADAPTERS}",
    "save_steps save_freq save_interval save_every save_strategy": "{checkpoint_every}",
    "save_total_limit max_ckpt_num max_ckpt_to_keep max_actor_ckpt_to_keep": "{keep_checkpoints}",
    "max_steps num_steps total_steps train_steps num_train_steps total_training_steps": "{steps}",
    "num_train_epochs num_epochs epochs total_epochs": f"a run has {{steps}}, and {_STEP}",
    "per_device_train_batch_size train_batch_size batch_size generation_batch_size rollout_batch_size": _STEP,
    "gradient_accumulation_steps micro_train_batch_size ppo_micro_batch_size ppo_mini_batch_size": _STEP,
    "per_device_eval_batch_size steps_per_generation": _STEP,
    "ppo_max_token_len_per_gpu max_tokens_per_gpu max_tokens_per_microbatch": "{tokens_per_micro_batch}",
    "use_remove_padding use_dynamic_bsz sample_packing padding_free packing_samples": "{packing}",
    "bf16 fp16 torch_dtype": "{dtype}",
    "max_length max_new_tokens max_tokens max_response_length generate_max_len": "{max_completion_length}",
    "prompt_max_len max_prompt_len": "{max_prompt_length}",
    "output_dir save_path ckpt_path run_name experiment_name logging_dir": _FOLDER,
    "overwrite_output_dir": f"a run is never overwritten, and {_FOLDER}",
    "resume_from_checkpoint": "--resume with {name} goes on with a run from its newest checkpoint",
    "logging_steps logging_strategy log_every log_freq": "every step is logged",
    "eval_steps eval_strategy test_freq": "{eval_every}",
    "eval_dataset val_files": "{eval_data}",
    "do_eval": "{eval_problems} problems of {data} are held out, or taken from {eval_data}",
    "num_generations_eval n_samples_per_eval_prompt": "{eval_samples}",
    "model_name_or_path model_name model_path pretrain": "{model}",
    "dataset dataset_name train_file train_files prompt_data data_path": "{data}",
    "dataset_config dataset_train_split": "{data} hub:OWNER/NAME/CONFIG@SPLIT is a data set of the hub",
    "prompt_key input_key label_key answer_key dataset_text_field column_mapping": "{columns}",
    "streaming dataset_streaming": "{data} is read whole, there is no streaming",
    "reward_funcs reward_functions reward_function reward_fn reward": "{rewards}",
    "reward_model reward_model_path reward_model_name": "{rewards} has model:PATH",
    "scale_rewards norm_adv_by_std_in_grpo": "{advantage_scale}",
    "loss algorithm adv_estimator": "{loss_type}",
    "importance_sampling_level": "{loss_type} gspo has the sequence's ratio",
    "num_iterations ppo_epochs max_epochs": "{updates_per_rollout}",
    "dynamic_filtering filter_groups filter_groups_enable max_num_gen_batches": "{dynamic_sampling}",
    "mask_truncated_completions overlong_filtering": "{overlong}",
    "lr_warmup_steps num_warmup_steps": "{warmup_steps}",
    "warmup_ratio lr_warmup_ratio lr_warmup_steps_ratio": "the warm-up has {warmup_steps}",
    "lr_scheduler lr_schedule warmup_style": "{lr_scheduler_type}",
    "clip_grad grad_clip gradient_clipping": "{max_grad_norm}",
    "optim optimizer adam_epsilon": "the optimizer is AdamW with gradient regularisation",
    "betas adam_betas": "AdamW's decays are {adam_beta1} and {adam_beta2}",
    "gradient_checkpointing activation_checkpointing enable_gradient_checkpointing": "{checkpoint_activations}",
    "use_liger_kernel use_liger_loss": "the loss never holds the logits, whatever is set",
    "sync_ref_model ref_model_sync_steps ref_model_mixup_alpha": "{reference_reset_every}",
    "dither noise reward_noise dither_std": "{dither_level}",
    "rho sam_rho": "SAM's radius is {gr_gamma} and {gr_epsilon} with {gr_normalized}",
    "top_k min_p repetition_penalty": _SAMPLING,
    "fsdp num_processes nproc_per_node n_gpus_per_node": _RANKS,
    "deepspeed tensor_parallel_size": f"neither DeepSpeed nor tensor parallelism is there, {_RANKS}",
    "use_vllm vllm_server_host vllm_server_base_url vllm_mode rollout_name inference_engine": _SERVER,
    "vllm_server_timeout": "{rollout_timeout}",
    "vllm_enable_sleep vllm_enable_sleep_mode enable_sleep_mode": "{rollout_sleep}",
    "vllm_sync_backend weight_transfer_config weight_transfer_backend weight_sync_backend weight_broadcast": _FILES,
    "use_transformers_paged use_transformers_continuous_batching": "paged is one of {rollout}",
    "vllm_importance_sampling_mode vllm_importance_sampling_correction rollout_is": "{correction}",
    "vllm_importance_sampling_cap vllm_importance_sampling_clip_max tis_imp_ratio_cap rollout_is_threshold":
        "{correction_cap}",
    "vllm_importance_sampling_clip_min": "{correction_floor}",
    "importance_sampling_correction use_tis tis icepop": _CORRECTION,
    "report_to log_with logger loggers tensorboard use_tensorboard wandb use_wandb trackio": "{track}",
    "wandb_project trackio_project project_name": _PROJECT,
    "push_to_hub hub_model_id": "checkpoints stay in the run's folder, where from_pretrained loads them",
    "trust_remote_code": "Python code that a model brings is not run",
    "no_cuda use_cpu": "{device}",
    "data_seed": "{seed}",
    "dry_run": "it is a flag of redit-fast train",
}  # fmt: skip
MEANT = {name: meant for names, meant in _MEANT.items() for name in names.split()}


def flag(field: str) -> str:
    return "--" + field.replace("_", "-")


def hint(name: str, valid: Collection[str], spell: Callable[[str], str]) -> str:
    """What an unknown name is likely to mean: the end of a sentence that says it is unknown.

    Args:
        name: of a flag, without its two dashes, or of a key.
        valid: the names that would do.
        spell: how such a name is written: `flag`, or what quotes a key.
    """
    name = name.replace("-", "_")
    meant = MEANT.get(name.lower(), _SERVER if name.startswith("vllm_") else None)
    if meant is None or not set(re.findall(r"\{(\w+)\}", meant)) <= set(valid):  # of another command
        return f", the closest valid one is {spell(difflib.get_close_matches(name, valid, n=1, cutoff=0)[0])}"
    said = re.sub(r"\{(\w+)\}", lambda field: spell(field[1]), meant)
    return f", it is {said} here" if re.fullmatch(r"\{\w+\}", meant) else f": {said}"


def under_new_names(settings: Mapping[str, object]) -> dict[str, object]:
    """The settings in a run's config.json, of version 0.1 too."""
    return {IN_OLD_RUNS.get(name, name): value for name, value in settings.items()}
