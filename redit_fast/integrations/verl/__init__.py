"""verl: `import verl` loads this module by its entry point (group verl.plugins), in every process of a run.

algorithm.adv_estimator=redit_grpo +algorithm.redit.dither_level=0.05
actor_rollout_ref.actor.policy_loss.loss_mode=redit_vanilla

It adds the estimator redit_grpo and the losses redit_* to verl's registries and changes four things that verl has:
which class its FSDP engine is, what chooses a fused kernel's backend, its check of the configuration, and what the V1
trainer does around its advantages. `unregister()` takes all of it back.
"""

# ruff: noqa: E402  what is not installed is said before it is imported

from __future__ import annotations

import logging
from contextlib import ExitStack
from types import ModuleType

from redit_fast.extras import need

need("verl", "redit_fast.integrations.verl")

import verl


def _modules() -> tuple[ModuleType, ...]:
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
    return verl_loss, verl_advantages, verl_engine, verl_head, verl_config


def register() -> None:
    """All of it, in this process; twice is once.

    Raises:
        RuntimeError: a verl that has other hooks, naming the supported one. Nothing of ours is in it then.
    """
    modules = _modules()
    with ExitStack() as on_failure:
        for module in modules:
            on_failure.callback(module.unregister)
            module.register()
        on_failure.pop_all()


def unregister() -> None:
    """verl as it was, in this process; `register()` works again afterwards. What was built meanwhile, an engine or a
    model with our head, stays as it was built, and so does what another plugin has put around a function of ours."""
    for module in _modules():
        module.unregister()


try:
    register()
except RuntimeError as error:  # what a plugin raises verl logs at level DEBUG
    logging.getLogger(__name__).warning("%s", error)
    raise
