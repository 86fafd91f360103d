"""verl: `import verl` loads this module by its entry point (group verl.plugins), in every process of a run.

algorithm.adv_estimator=redit_grpo +algorithm.redit.dither_level=0.05
actor_rollout_ref.actor.policy_loss.loss_mode=redit_vanilla
"""

from __future__ import annotations

import logging

import verl


def register() -> None:
    """Everything into verl's registries. RuntimeError: a verl that has other hooks, naming the supported one."""
    try:
        from redit_fast.integrations.verl import advantages as verl_advantages
        from redit_fast.integrations.verl import config as verl_config
        from redit_fast.integrations.verl import engine as verl_engine
        from redit_fast.integrations.verl import head as verl_head
        from redit_fast.integrations.verl import loss as verl_loss
    except ImportError as error:
        raise RuntimeError(
            f"redit_fast.integrations.verl got verl {verl.__version__}, in which it does not find its hooks "
            f"({error}); supported: 0.9.1"
        ) from error
    for module in (verl_loss, verl_advantages, verl_engine, verl_head, verl_config):
        module.register()


try:
    register()
except RuntimeError as error:  # what a plugin raises verl logs at level DEBUG
    logging.getLogger(__name__).warning("%s", error)
    raise
