"""redit-fast: fused GRPO losses, dithered group advantages (ReDit) and gradient regularisation (GR) for PyTorch.

The names below are imported at first use: `import redit_fast` alone does not load torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from redit_fast.advantages import Advantages, group_advantages
    from redit_fast.apply import apply_to
    from redit_fast.backends import use_backend
    from redit_fast.dither import Dither
    from redit_fast.linear import estimate_memory, linear_grpo_loss, linear_grpo_loss_and_grad_, linear_logp
    from redit_fast.logprob import LogpEntropy, grpo_loss, token_logp
    from redit_fast.loss_config import LossConfig
    from redit_fast.losses import LossOutput, policy_loss
    from redit_fast.optim import RegularizedAdamW, parameter_groups, reset_reference, unwrap
    from redit_fast.presets import advantage_options
    from redit_fast.regularize import GradientRegularizer
    from redit_fast.transforms import logit_transforms

__version__ = "0.1.0"

_HOME = {
    "Advantages": "advantages",
    "Dither": "dither",
    "GradientRegularizer": "regularize",
    "LogpEntropy": "logprob",
    "LossConfig": "loss_config",
    "LossOutput": "losses",
    "RegularizedAdamW": "optim",
    "advantage_options": "presets",
    "apply_to": "apply",
    "estimate_memory": "linear",
    "group_advantages": "advantages",
    "grpo_loss": "logprob",
    "linear_grpo_loss": "linear",
    "linear_grpo_loss_and_grad_": "linear",
    "linear_logp": "linear",
    "logit_transforms": "transforms",
    "parameter_groups": "optim",
    "policy_loss": "losses",
    "reset_reference": "optim",
    "token_logp": "logprob",
    "unwrap": "optim",
    "use_backend": "backends",
}
__all__ = list(_HOME)


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module 'redit_fast' has no attribute {name!r}")
    return getattr(import_module(f"redit_fast.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]
