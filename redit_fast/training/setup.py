"""What a run is made of, from its settings: its folder, data, loss, optimizer, noise and reference."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from pydantic import TypeAdapter, ValidationError
from transformers import PreTrainedModel, get_scheduler
from transformers import PreTrainedTokenizerBase as Tokenizer

import redit_fast as rf
from redit_fast import extras
from redit_fast.known_names import RENAMED, under_new_names
from redit_fast.training import (
    builtin,
    checkpoint,
    config_checks,
    config_file,
    data,
    data_files,
    flops,
    lora,
    policy,
    rewards,
    runs,
    trial,
)
from redit_fast.training.config import TrainConfig, default_of
from redit_fast.training.config_values import LOCAL, PAGED, is_url, loaded_reward
from redit_fast.training.distributed import Ranks
from redit_fast.training.reward_model.config import RewardModelConfig
from redit_fast.training.rollout import Engine
from redit_fast.training.rollout.local import LocalEngine
from redit_fast.training.rollout.paged import PagedEngine
from redit_fast.training.rollout.server import Server
from redit_fast.training.settings import Settings
from redit_fast.training.task import Task

Kind = TypeVar("Kind", bound=Settings)
MAY_CHANGE = {
    "strategy",
    "rollout_timeout",
    "rollout_retries",
    "rollout_sleep",
    "judge_failures",
    "steps",
    "eval_every",
    "sharpness_every",
    "checkpoint_every",
    "keep_checkpoints",
    "name",
    "out_dir",
    "track",
}
TRAIN_PROBLEMS = 4000  # of the demo


def claim(config: Kind, held: ExitStack, ranks: Ranks) -> tuple[Kind, Callable[[], None]]:
    """The config with a name and, where the first rank then holds its folder, the check that it still does; where the
    config has no name, with the first that no other start takes."""
    checks = [_writes_nothing]

    def named() -> Kind:
        while True:
            new = config.with_name()
            try:
                checks.append(held.enter_context(runs.claimed(folder_of(new), new=True)))
                return new
            except runs.TakenError:
                if config.name is not None:
                    raise

    return ranks.by_first(named), checks[-1]


def resumed(config: TrainConfig, held: ExitStack, ranks: Ranks) -> tuple[TrainConfig, Path | None, Callable[[], None]]:
    """The config of a run that goes on, the checkpoint that it goes on from, and the check of `claim`."""
    checks, run = [_writes_nothing], folder_of(config)

    def found() -> tuple[TrainConfig, Path | None]:
        if not (run / "config.json").is_file():
            raise ValueError(f"{run} holds no run to resume")
        checks.append(held.enter_context(runs.claimed(run, new=False)))
        return checkpoint_to_resume(config, run)

    config, saved = ranks.by_first(found)
    return config, saved, checks[-1]


def folder_of(config: Settings) -> Path:
    return Path(config.out_dir) / str(config.with_name().name)


def _writes_nothing() -> None:
    """Of the ranks after the first."""


def check_given(given: Mapping[str, object], run: Path) -> None:
    """Raises a ValueError where a setting that is given with --resume is not the run's and may not change.

    It is for settings that the run's others contradict, which is not the reason to tell then. Each is read by itself;
    what is no value of its field is left to the caller.
    """
    before = config_file.load(run / "config.json")
    for given_name, word in given.items():
        name = RENAMED.get(given_name, given_name)
        kind: Any = TrainConfig.model_fields[name].annotation
        try:
            value = TypeAdapter(kind).validate_python(word)
        except ValidationError:
            continue
        # A URL may have a password that no sentence may show.
        if name == "rollout" and value not in (LOCAL, PAGED):
            config_checks.check_rollout_url(value)
        if name == "rewards":
            config_checks.check_places(value)
            value = [config_file.placed_reward(reward, run) for reward in value]
        check_same(name, getattr(before, name), value, run)


def check_same(name: str, before: object, value: object, run: Path) -> None:
    """Raises a ValueError where a setting is another than the run's and is none of those that may change."""
    # A server to another address.
    moved = name == "rollout" and not {value, before} & {LOCAL, PAGED}
    moved |= name == "rewards" and _without_hosts(value) == _without_hosts(before)
    if name not in MAY_CHANGE and not moved and value != before:
        raise ValueError(f"{name} was {before!r} in {run} and cannot become {value!r} on --resume")


def _without_hosts(names: Any) -> list[str]:
    """Rewards, where a judge at one URL is a judge at any."""
    return ["judge:URL" if (loaded := loaded_reward(name)) and is_url(loaded[1]) else name for name in names]


def checkpoint_to_resume(config: TrainConfig, run: Path) -> tuple[TrainConfig, Path | None]:
    """The newest checkpoint, None where the run stopped before its first; the settings must be the run's.

    A run of version 0.1 kept all checkpoints, and does so still unless it is told otherwise.
    """
    before: dict[str, Any] = {name: default_of(name, config.model is None) for name in TrainConfig.model_fields}
    # Older runs lack some.
    before |= (stored := under_new_names(config_file.read(run / "config.json")[0]))
    for name, value in config:
        check_same(name, before[name], value, run)
    if config.steps != before["steps"] and config.dither_schedule.endswith("_reverse"):
        raise ValueError(
            f"steps was {before['steps']} in {run} and cannot become {config.steps} on --resume: dither_schedule "
            f"{config.dither_schedule} counts back from the last step"
        )
    check_schedule(config, before["steps"], run)
    if not {"keep_checkpoints"} & (stored.keys() | config.model_fields_set):
        config = config.model_copy(update={"keep_checkpoints": None})
    folder = run / "checkpoints"
    return config, checkpoint.newest(folder) if checkpoint.in_order(folder) else None


def check_schedule(config: TrainConfig | RewardModelConfig, steps: int, run: Path) -> None:
    """Raises a ValueError where the run's last step, which was `steps`, has moved and the learning rate ends there."""
    if config.steps != steps and config.lr_scheduler_type in ("linear", "cosine"):
        raise ValueError(
            f"steps was {steps} in {run} and cannot become {config.steps} on --resume: lr_scheduler_type "
            f"{config.lr_scheduler_type} ends at the last step"
        )


def device_of(config: TrainConfig) -> str:
    return policy.device_of(config.wanted_device)


@dataclass
class Parts:
    """What a run is made of before it writes anything."""

    model: PreTrainedModel
    tokenizer: Tokenizer
    dataset: data.Dataset
    functions: list[rewards.RewardFunction]
    loss_config: rf.LossConfig
    ends: list[int]  # tokens that end a completion
    why_padded: str | None  # None: rows are packed
    base: lora.Base | None  # of adapters
    shape: flops.Shape | None
    peak: float | None  # FLOPs a second of the device


def parts(config: TrainConfig, saved: Path | None, task: Task | None = None) -> Parts:
    """Loaded, from the checkpoint `saved` where there is one, checked, and tried on a few tokens. Of `task`, which has
    been checked, where there is one.

    Raises:
        ValueError, NotImplementedError, FloatingPointError: one sentence that names what does not fit.
    """
    for tracker in config.track or ():
        extras.need(tracker, f"track {tracker}")
    for source in filter(None, (config.data, config.eval_data)):
        data_files.check(source)
    device: Any = device_of(config)
    base = None
    if config.model is not None and saved is None:
        checkpoint.check(Path(config.model).expanduser())
    if config.lora_rank is not None:
        extras.need("lora", "lora_rank")
        model, tokenizer = policy.load(str(config.model), device, config.dtype)
        base = lora.base_of(str(config.model))
        lora.attach(model, config, base)
        if saved is not None:
            lora.load(saved, model, base)
    elif saved is None and config.model is None:
        model, tokenizer = builtin.build(config.seed) if task is None else task.build()
        model.to(device=device, dtype=getattr(torch, config.dtype, None))  # type: ignore[call-overload]
    else:
        model, tokenizer = policy.load(saved or str(config.model), device, config.dtype)
    if task is None:
        records = dataset(config, model, tokenizer)
        functions = rewards.resolve(config.rewards, data.columns_of(records.train[:1]), config)
    else:
        records, functions = task.dataset, [replace(function) for function in task.functions]
    settings = loss_config(config, model)
    ends = policy.end_tokens(model, tokenizer)
    policy.check_head(model, tokenizer, settings)
    policy.freeze_unused(model)
    if config.checkpoint_activations:
        policy.checkpoint_activations(model)
    why_padded = trial.check(model, tokenizer, records, functions, settings, config)
    shape, peak = flops.of(model), flops.peak(model)
    return Parts(model, tokenizer, records, functions, settings, ends, why_padded, base, shape, peak)


def loss_config(config: TrainConfig, model: PreTrainedModel) -> rf.LossConfig:
    transforms: dict[str, Any] = rf.logit_transforms(model.config)
    return rf.LossConfig(
        config.loss_type,
        epsilon_low=config.clip_low,
        epsilon_high=config.clip_high,
        temperature=config.temperature,
        cispo_bound="relative" if config.loss_type == "cispo" else "absolute",  # TRL's would scale a ratio of 1 to 0.2
        dro_beta=config.dro_beta,
        beta=config.beta,
        correction=config.sampler_correction,
        correction_cap=config.correction_cap,
        correction_floor=config.correction_floor,
        max_completion_length=config.max_completion_length,
        **transforms,
    )


def engine(config: TrainConfig, parts: Parts, held: ExitStack, ranks: Ranks) -> Engine:
    """What samples this rank's share of the prompts, until `held` ends: with the model's weights, and tried on a few
    tokens.

    Raises:
        EngineError, ValueError, NotImplementedError: one sentence that names what does not fit.
    """
    made = ranks.alone(lambda: _opened(config, parts, ranks))
    held.callback(made.close)
    made.sync(parts.model)
    ranks.alone(
        lambda: trial.check_engine(made, parts.model, parts.tokenizer, parts.dataset, parts.loss_config, config),
        stoppable=True,
    )
    return made


def _opened(config: TrainConfig, parts: Parts, ranks: Ranks) -> Engine:
    if config.rollout == LOCAL:
        return LocalEngine(parts.model, parts.ends)
    if config.rollout == PAGED:
        return PagedEngine(parts.model, parts.ends)
    return Server(
        config.rollout,
        parts.ends,
        parts.model.get_input_embeddings().weight.shape[0],
        timeout=config.rollout_timeout,
        retries=config.rollout_retries,
        folder=Path(config.out_dir),
        ranks=ranks,
        base=parts.base,
        sleeps=config.rollout_sleep,
    )


def optimizer(config: TrainConfig | RewardModelConfig, model: PreTrainedModel) -> rf.RegularizedAdamW:
    """AdamW whose second pass perturbs the decoder layers. The trainer itself sees to gr_pass2_ratio."""
    gr = {name.removeprefix("gr_"): value for name, value in config if name.startswith("gr_")}
    gr.pop("pass2_ratio", None)
    return rf.RegularizedAdamW(
        rf.parameter_groups(model, perturb="decoder_layers"),
        lr=config.learning_rate,
        betas=(config.adam_beta1, config.adam_beta2),
        weight_decay=config.weight_decay,
        max_norm=config.max_grad_norm,
        seed=config.seed,
        **gr,
    )


def learning_rate(config: TrainConfig | RewardModelConfig) -> Callable[[int], float]:
    """That of each optimizer step, from 0 on, by transformers."""
    total = config.steps * (config.updates_per_rollout if isinstance(config, TrainConfig) else 1)
    unused = torch.optim.SGD([torch.zeros(1, dtype=torch.float32, device="cpu")], lr=config.learning_rate)
    schedule = get_scheduler(config.lr_scheduler_type, unused, config.warmup_steps, total)
    return lambda step: config.learning_rate * schedule.lr_lambdas[0](step)


def dither(config: TrainConfig, functions: list[rewards.RewardFunction]) -> rf.Dither:
    return rf.Dither(
        config.dither_distribution,
        config.dither_level,
        [function.scale for function in functions],
        config.dither_schedule,
        total_steps=config.steps,
        dead_groups=config.dither_dead_groups,
        seed=config.seed,
    )


def reference(config: TrainConfig, model: PreTrainedModel, saved: Path | None) -> PreTrainedModel | None:
    """The KL term's reference, a copy of the model before RL or of the policy at the last reset; None without one. With
    LoRA it is the model itself, which is the one before RL where `lora.switched_off`."""
    if not config.beta:
        return None
    if config.gr_gamma:
        warnings.warn(
            f"beta is {config.beta:g} and gr_gamma {config.gr_gamma:g}: a KL term and gradient regularisation are both "
            "on, where the GR paper's runs have one of them; gr_gamma 0 or beta 0 takes one away",
            stacklevel=3,
        )
    if config.lora_rank is not None:
        return model
    reference = copy.deepcopy(model).requires_grad_(False)
    if saved is not None and not checkpoint.load_reference(saved, reference):
        rf.reset_reference(reference, policy.load(checkpoint.start_of(saved), "cpu")[0])
    return reference


def dataset(config: TrainConfig, model: PreTrainedModel, tokenizer: Tokenizer) -> data.Dataset:
    if config.model is None:
        return data.Dataset(
            train=builtin.records(TRAIN_PROBLEMS, held_out=False, seed=config.seed),
            held_out=builtin.records(config.eval_problems, held_out=True, seed=config.seed),
        )
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return data.load(config, tokenizer, context, model.get_input_embeddings().weight.shape[0])
