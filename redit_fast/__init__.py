"""redit-fast: fused GRPO losses, dithered group advantages (ReDit) and gradient regularisation (GR) for PyTorch.

The names below are imported at first use: `import redit_fast` alone does not load torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from redit_fast.backends import use_backend
    from redit_fast.dither import Dither
    from redit_fast.gr.adamw import RegularizedAdamW, unwrap
    from redit_fast.gr.config import GR
    from redit_fast.gr.groups import parameter_groups
    from redit_fast.gr.regularizer import GradientRegularizer
    from redit_fast.gr.reset import reset_reference
    from redit_fast.integrations.apply import apply_to
    from redit_fast.losses.config import LossConfig
    from redit_fast.losses.peers import advantage_options
    from redit_fast.losses.policy import LossOutput, policy_loss
    from redit_fast.losses.transforms import logit_transforms
    from redit_fast.ops.advantages import Advantages, group_advantages
    from redit_fast.ops.linear_loss import estimate_memory, linear_grpo_loss, linear_grpo_loss_and_grad_, linear_logp
    from redit_fast.ops.token_loss import LogpEntropy, grpo_loss, token_logp

__version__ = "0.2.0"

_HOME = {
    "Advantages": "ops.advantages",
    "Dither": "dither",
    "GR": "gr.config",
    "GradientRegularizer": "gr.regularizer",
    "LogpEntropy": "ops.token_loss",
    "LossConfig": "losses.config",
    "LossOutput": "losses.policy",
    "RegularizedAdamW": "gr.adamw",
    "advantage_options": "losses.peers",
    "apply_to": "integrations.apply",
    "estimate_memory": "ops.linear_loss",
    "group_advantages": "ops.advantages",
    "grpo_loss": "ops.token_loss",
    "linear_grpo_loss": "ops.linear_loss",
    "linear_grpo_loss_and_grad_": "ops.linear_loss",
    "linear_logp": "ops.linear_loss",
    "logit_transforms": "losses.transforms",
    "parameter_groups": "gr.groups",
    "policy_loss": "losses.policy",
    "reset_reference": "gr.reset",
    "token_logp": "ops.token_loss",
    "unwrap": "gr.adamw",
    "use_backend": "backends",
}
__all__ = list(_HOME)


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module 'redit_fast' has no attribute {name!r}")
    return getattr(import_module(f"redit_fast.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]
