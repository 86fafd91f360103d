"""Our options in verl's configuration, checked where verl checks its own: before a process of the run is started."""

from __future__ import annotations

from typing import Any

import verl.utils
from verl.trainer.ppo.core_algos import ADV_ESTIMATOR_REGISTRY, get_policy_loss_fn
from verl.utils import config as verl_config

from redit_fast.integrations.verl import engine as verl_engine
from redit_fast.integrations.verl import hooks
from redit_fast.integrations.verl import loss as verl_loss
from redit_fast.integrations.verl.advantages import ESTIMATOR, read_dither
from redit_fast.integrations.versions import check_hooks


def check_config(config: Any) -> None:
    """`config` is verl's whole configuration, an OmegaConf DictConfig.

    Raises:
        ValueError, TypeError: an option of ours out of range, or that nothing would read, naming it.
        NotImplementedError: a loss that ours are not, see `verl_loss.loss_config`.
    """
    algorithm, actor = config.algorithm, config.actor_rollout_ref.actor
    dither = read_dither(algorithm.get("redit"))
    if dither is not None and algorithm.adv_estimator != ESTIMATOR:
        raise ValueError(
            f"algorithm.redit.dither_level={dither.level} needs algorithm.adv_estimator={ESTIMATOR}, "
            f"got {algorithm.adv_estimator}"
        )
    verl_engine.read_gr(actor.optim.get(verl_engine.SECTION))
    name = actor.policy_loss.loss_mode
    if name.startswith("redit_"):
        get_policy_loss_fn(name)  # raises where there is none
        verl_loss.loss_config(name.removeprefix("redit_").replace("bypass_mode", "vanilla"), actor)


def _checking(theirs: Any) -> Any:
    def validate_config(config, use_reference_policy, use_critic):
        if ESTIMATOR in ADV_ESTIMATOR_REGISTRY:  # main_ppo may hold this function after unregister()
            check_config(config)
        return theirs(config, use_reference_policy, use_critic)

    return validate_config


def register() -> None:
    """`check_config` in verl's validate_config. Raises RuntimeError for a verl whose function takes other arguments."""
    arguments = ["config", "use_reference_policy", "use_critic"]
    check_hooks("verl", verl, {"validate_config": arguments}, verl_config, verl_loss.SUPPORTED)
    for owner in (verl_config, verl.utils):
        if not hooks.is_replaced(owner, "validate_config"):
            hooks.replace(owner, "validate_config", _checking(owner.validate_config))


def unregister() -> None:
    for owner in (verl_config, verl.utils):
        hooks.take_back(owner, "validate_config")
