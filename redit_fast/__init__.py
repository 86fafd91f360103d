"""redit-fast: fused GRPO losses, dithered group advantages (ReDit) and gradient regularisation (GR) for PyTorch."""

from redit_fast.advantages import Advantages, group_advantages
from redit_fast.backends import use_backend
from redit_fast.dither import Dither
from redit_fast.linear import linear_grpo_loss, linear_grpo_loss_and_grad_, linear_logp, logit_transforms
from redit_fast.logprob import LogpEntropy, grpo_loss, token_logp
from redit_fast.losses import LossConfig, LossOutput, policy_loss
from redit_fast.optim import RegularizedAdamW
from redit_fast.regularize import GradientRegularizer, parameter_groups

__version__ = "0.1.0"

__all__ = [
    "Advantages",
    "Dither",
    "GradientRegularizer",
    "LogpEntropy",
    "LossConfig",
    "LossOutput",
    "RegularizedAdamW",
    "group_advantages",
    "grpo_loss",
    "linear_grpo_loss",
    "linear_grpo_loss_and_grad_",
    "linear_logp",
    "logit_transforms",
    "parameter_groups",
    "policy_loss",
    "token_logp",
    "use_backend",
]
