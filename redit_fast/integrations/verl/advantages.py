"""verl's advantage estimator `redit_grpo`: its grpo on dithered rewards. It runs on the driver, in one process."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, NamedTuple, cast, get_type_hints

import torch
import verl
from torch import Tensor
from verl.trainer.ppo import core_algos, ray_trainer
from verl.utils.skip import SkipManager

from redit_fast.checks import did_you_mean
from redit_fast.dither import Dither
from redit_fast.integrations.options import DitherOptions
from redit_fast.integrations.verl import hooks
from redit_fast.integrations.verl.loss import SUPPORTED
from redit_fast.integrations.versions import check_hooks
from redit_fast.losses.peers import advantage_options
from redit_fast.ops.advantages import group_advantages

ESTIMATOR = "redit_grpo"
ESTIMATED = ["adv_estimator", "gamma", "lam", "num_repeat", "norm_adv_by_std_in_grpo", "config"]
GRPO = ["token_level_rewards", "response_mask", "index", "epsilon", "norm_adv_by_std_in_grpo", "config"]


class _V1Batch(NamedTuple):
    keys: Sequence[str]  # {uid}_{session}_{output} of every row
    metrics: dict[str, object]


_v1_batch: ContextVar[_V1Batch | None] = ContextVar("v1_batch", default=None)  # of the V1 trainer's call under way


def read_dither(section: Mapping[str, object] | None) -> Dither | None:
    """From `algorithm.redit` of verl's configuration, whose options are those of `DitherOptions`; seed None is 0, verl
    having none of the run. None where dither_level is 0.

    Raises:
        ValueError, TypeError: an unknown option, with the closest one, or a value out of range, naming it.
    """
    section = {} if section is None else section
    if not isinstance(section, Mapping):
        raise TypeError(f"algorithm.redit must be a section of options, got {section!r}")
    known = get_type_hints(DitherOptions)
    for name, value in section.items():
        if name not in known:
            raise ValueError(f"algorithm.redit.{name} is not an option; {did_you_mean(name, known)}")
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if known[name] is float and not number:
            raise TypeError(f"algorithm.redit.{name} must be a number, got {value!r}")
        if known[name] == int | None and not (value is None or (number and isinstance(value, int))):
            raise TypeError(f"algorithm.redit.{name} must be an int, got {value!r}")
    try:
        return DitherOptions(**cast(dict[str, Any], section)).dither(seed=0)
    except (ValueError, TypeError) as error:
        raise type(error)(f"algorithm.redit.{error}") from None


@dataclass
class _NoiseCounter:
    """Which noise comes next: a pure function of the trainer's step, and of the samples that had noise in that step
    before. verl saves after a step, so that a run resumed in a new process goes on with the same noise."""

    step: int = -1
    samples: int = 0

    def take(self, count: int) -> tuple[int, int]:
        """(step, id of the first sample) for `count` samples."""
        step = SkipManager.step  # verl's trainers write their global_steps there; validation does not move it
        if step < 0:
            raise RuntimeError(
                "redit_grpo with dither_level above 0 needs the training step, which verl's V1 trainers and "
                "RayPPOTrainer give SkipManager.set_step; this trainer does not: set dither_level=0 or take one of them"
            )
        if step != self.step:
            self.step, self.samples = step, 0
        first, self.samples = self.samples, self.samples + count
        return step, first


_noise_counter = _NoiseCounter()


def compute_redit_grpo_advantage(
    token_level_rewards: Tensor,
    response_mask: Tensor,
    index: Sequence[object],
    config: Mapping[str, Any] | None = None,
    **other: object,
) -> tuple[Tensor, Tensor]:
    """verl's advantage estimator "redit_grpo": its grpo on dithered rewards (`group_advantages`, eps 1e-6).

    With dither_level 0 the numbers are those of verl's own function, bit for bit. With dithering they are float64,
    rounded once, and a group of one has advantage 0, where verl leaves its reward. The noise of a row depends on
    dither_seed, the trainer's step and the row's place in the step's batch.

    Under a V1 trainer the outputs of one session count once, by the last one's reward, as in verl's grpo, and dithering
    logs dither/advantage_std and adv/rms_dead_groups; elsewhere every row counts.

    Args:
        token_level_rewards, response_mask: (B, T); a row's reward is the sum of its rewards.
        index: (B,) the prompt's uid: rows of one uid are a group.
        config: `algorithm`: its norm_adv_by_std_in_grpo and its section `redit` (`read_dither`) are read.
        other: what verl passes to some estimators; not read.

    Returns:
        (advantages, returns), both the same (B, T) float32, 0 where masked.

    Raises:
        ValueError, TypeError: see `read_dither`. RuntimeError: with dithering, a trainer that publishes no step.
    """
    config = {} if config is None else config
    dither = read_dither(config.get("redit"))
    by_deviation = config.get("norm_adv_by_std_in_grpo", True)
    v1 = _v1_batch.get()
    rewards = token_level_rewards.sum(-1)
    last, session_of_row = _sessions(len(rewards), None if v1 is None else v1.keys)
    rewards, index = rewards[last], [index[row] for row in last]
    if dither is None:
        ones = torch.ones(len(last), 1, dtype=torch.float32, device=rewards.device)
        values = core_algos.compute_grpo_outcome_advantage(
            rewards[:, None], ones, index, norm_adv_by_std_in_grpo=by_deviation
        )[0][:, 0]
    else:
        group_of_uid: dict[object, int] = {}
        groups = [group_of_uid.setdefault(uid, len(group_of_uid)) for uid in index]
        step, first = _noise_counter.take(len(last))
        found = group_advantages(
            rewards,
            group_ids=torch.tensor(groups, device=rewards.device),
            dither=dither,
            step=step,
            sample_ids=torch.arange(first, first + len(last), device=rewards.device),
            **{**advantage_options("verl"), "scale": "group" if by_deviation else "none"},
        )
        values = found.values
        if v1 is not None:
            real = response_mask[last].any(1)  # V1 fills its batch up with rows that score no token
            dead = values[found.dead & real]
            v1.metrics["dither/advantage_std"] = values[real].std().item()
            v1.metrics["adv/rms_dead_groups"] = dead.square().mean().sqrt().item() if len(dead) else 0.0
    advantages = values[session_of_row][:, None] * response_mask
    return advantages, advantages


def _sessions(rows: int, keys: Sequence[str] | None) -> tuple[list[int], list[int]]:
    """The row of each session's last output, sessions in order of appearance; and each row's session."""
    if keys is None:
        return list(range(rows)), list(range(rows))
    last: dict[str, tuple[int, int]] = {}  # (output, row)
    names = []
    for row, key in enumerate(keys):
        session, _, output = key.rpartition("_")
        names.append(session)
        last[session] = max(last.get(session, (-1, row)), (int(output), row))
    order = {session: i for i, session in enumerate(last)}
    return [row for _, row in last.values()], [order[session] for session in names]


def _v1_trainer() -> Any:
    try:
        from verl.trainer.ppo.v1.trainer_base import PPOTrainer
    except ModuleNotFoundError as error:
        if error.name != "transfer_queue":  # without which V1 does not run
            raise
        return None
    return PPOTrainer


def _hook_v1() -> None:
    """V1 keeps the keys of its rows, and its metrics, from every estimator."""
    trainer = _v1_trainer()
    if trainer is None:
        return
    check_hooks("verl", verl, {"_compute_advantage": ["self", "batch", "metrics"]}, trainer, SUPPORTED)
    if hooks.is_replaced(trainer, "_compute_advantage"):
        return
    theirs = trainer._compute_advantage

    def _compute_advantage(self, batch, metrics):
        token = _v1_batch.set(_V1Batch(batch.keys, metrics))
        try:
            return theirs(self, batch, metrics)
        finally:
            _v1_batch.reset(token)

    hooks.replace(trainer, "_compute_advantage", _compute_advantage)


def register() -> None:
    """Raises RuntimeError for a verl whose hooks are others."""
    check_hooks("verl", verl, {"compute_grpo_outcome_advantage": GRPO}, core_algos, SUPPORTED)
    check_hooks("verl", verl, {"compute_advantage": ["data", *ESTIMATED]}, ray_trainer, SUPPORTED)
    check_hooks("verl", verl, {"set_step": ["step"]}, SkipManager, SUPPORTED)
    core_algos.register_adv_est(ESTIMATOR)(compute_redit_grpo_advantage)
    _hook_v1()


def unregister() -> None:
    core_algos.ADV_ESTIMATOR_REGISTRY.pop(ESTIMATOR, None)
    hooks.take_back(_v1_trainer(), "_compute_advantage")
