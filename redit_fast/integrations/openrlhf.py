"""OpenRLHF's policy loss through `policy_loss`, the one definition (openrlhf/models/loss.py::PolicyLoss, 0.11.2).

Its name in openrlhf.trainer.ray.ppo_actor is replaced in every process of ray, as examples/openrlhf_loop.py says.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib import metadata
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from redit_fast.checks import check_choice, check_flag, described, given, real_number
from redit_fast.integrations.versions import check_version
from redit_fast.losses.config import LossConfig
from redit_fast.losses.policy import policy_loss

SUPPORTED = "0.11.2"  # of OpenRLHF, whose formulas the tests spell out
LossType = Literal["ppo", "gspo"]
Level = Literal["off", "token", "seq"]
Mode = Literal["mask", "clip"]
Gating = Literal["ratio", "binary_kl", "tv"]


class PolicyLoss(nn.Module):
    """OpenRLHF's PolicyLoss: the same constructor, call and result.

    What differs: masked positions are never read (a NaN there changes nothing), a batch without scored tokens has loss
    0 instead of NaN, and gspo's log-ratio is limited to [-20, 20].

    Args:
        clip_eps_low, clip_eps_high: the ratio is clipped to [1 - clip_eps_low, 1 + clip_eps_high].
        dual_clip: above 1; limits the loss of negative advantages.
        token_level_loss: a mean over tokens, or over the sequences' means (always with gspo).
        policy_loss_type: "ppo", or "gspo": one ratio a sequence.
        is_correction_level, is_correction_mode, is_correction_gating, is_correction_threshold: what happens to tokens,
            or sequences, whose log-probs differ from the sampler's. With gspo any level but "off" replaces the old
            log-probs by the sampler's.

    Raises:
        ValueError, TypeError: an argument that does not fit, naming it. RuntimeError: an OpenRLHF older than the
            supported one is installed.
    """

    def __init__(
        self,
        clip_eps_low: float = 0.2,
        clip_eps_high: float = 0.2,
        dual_clip: float | None = None,
        token_level_loss: bool = True,
        policy_loss_type: LossType = "ppo",
        is_correction_level: Level = "off",
        is_correction_mode: Mode = "mask",
        is_correction_gating: Gating = "ratio",
        is_correction_threshold: Sequence[float] = (0.5, 5.0),
    ):
        super().__init__()
        try:
            check_version("openrlhf", "openrlhf", metadata.version("openrlhf"), SUPPORTED)
        except metadata.PackageNotFoundError:  # the class needs nothing of it
            pass
        for name, value in (("clip_eps_low", clip_eps_low), ("clip_eps_high", clip_eps_high)):
            real_number(name, value, least=0)
        check_flag("token_level_loss", token_level_loss)
        check_choice("policy_loss_type", policy_loss_type, get_args(LossType))
        check_choice("is_correction_level", is_correction_level, get_args(Level))
        check_choice("is_correction_mode", is_correction_mode, get_args(Mode))
        check_choice("is_correction_gating", is_correction_gating, get_args(Gating))
        if is_correction_mode == "clip" and (is_correction_level == "seq" or is_correction_gating != "ratio"):
            raise ValueError(
                "is_correction_mode='clip' needs is_correction_level='token', is_correction_gating='ratio'"
            )
        if isinstance(is_correction_threshold, str) or not isinstance(is_correction_threshold, Sequence):
            raise TypeError(f"is_correction_threshold must be two numbers, got {described(is_correction_threshold)}")
        if len(is_correction_threshold) != 2:
            raise ValueError(f"is_correction_threshold must be two numbers, got {len(is_correction_threshold)} entries")
        low, high = (
            real_number(f"is_correction_threshold[{k}]", each, least=0, finite=k == 0)
            for k, each in enumerate(is_correction_threshold)
        )
        if is_correction_gating != "ratio" and is_correction_level != "off" and low > 0:
            raise ValueError(
                f"is_correction_threshold must be (0, high) with is_correction_gating={is_correction_gating!r}, "
                f"got {low, high}"
            )
        self.policy_loss_type, self.token_level_loss = policy_loss_type, token_level_loss and policy_loss_type == "ppo"
        self.level, self.mode, self.gating = is_correction_level, is_correction_mode, is_correction_gating
        self.low, self.high = low, high
        self.config = LossConfig(
            "gspo" if policy_loss_type == "gspo" else "dapo" if self.token_level_loss else "grpo",
            epsilon_low=clip_eps_low,
            epsilon_high=clip_eps_high,
            dual_clip=dual_clip,
        )

    def forward(
        self,
        log_probs: Tensor,
        old_log_probs: Tensor,
        advantages: Tensor,
        action_mask: Tensor | None = None,
        rollout_log_probs: Tensor | None = None,
        dp_size: int = 1,
        batch_num_tokens: float | None = None,
        global_batch_size: float | None = None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
        """All tensors (B, T), the log-probs of the policy, of the one that was sampled from, and of the sampler.
        batch_num_tokens, or global_batch_size where the loss is a mean over sequences: of all ranks; then the loss is
        multiplied by dp_size, which undoes the ranks' mean.

        Returns:
            (loss, clip_ratio, ppo_kl, vllm_kl, is_filter_ratio): 0-d; the last two None without correction.
        """
        mask = torch.ones_like(log_probs, dtype=torch.bool) if action_mask is None else action_mask != 0
        if self.level != "off" and rollout_log_probs is None:
            raise ValueError(f"rollout_log_probs is required by is_correction_level={self.level!r}")
        weighted = advantages
        vllm_kl: Tensor | None = None
        filtered: Tensor | None = None
        old_log_probs_of_ratio: Any = old_log_probs
        if rollout_log_probs is not None and self.level != "off":
            if self.policy_loss_type == "gspo":
                old_log_probs_of_ratio = rollout_log_probs
            else:
                # The coefficient is at least 0 and the loss is homogeneous in the advantage: the two may be multiplied.
                coefficient, filtered = self._correction(old_log_probs.detach(), rollout_log_probs.detach(), mask)
                weighted = advantages * coefficient
                vllm_kl = _mean(rollout_log_probs - old_log_probs, mask)
        normalizer: float | Tensor | None
        if self.token_level_loss:
            normalizer = None if batch_num_tokens is None else batch_num_tokens / dp_size
        elif global_batch_size is None:
            normalizer = mask.any(1).sum().clamp(min=1).float()  # sequences without scored tokens do not count
        else:
            normalizer = global_batch_size / dp_size
        out = policy_loss(
            log_probs,
            weighted.expand_as(log_probs),
            old_logp=old_log_probs_of_ratio,
            mask=mask,
            config=self.config,
            normalizer=normalizer,
        )
        with torch.no_grad():
            log_ratio = torch.where(mask, log_probs - old_log_probs_of_ratio, 0.0).float()
            if self.policy_loss_type == "gspo":
                log_ratio = (log_ratio.sum(1) / mask.sum(1).clamp(min=1))[:, None].expand_as(mask)
            ratio = log_ratio.clamp(-20, 20).exp()
            low, high = 1 - self.config.epsilon_low, 1 + given(self.config.epsilon_high)
            clip_ratio = _mean((ratio.clamp(low, high) * advantages < ratio * advantages).float(), mask)
            ppo_kl = _mean(old_log_probs - log_probs, mask)
        return out.loss, clip_ratio, ppo_kl, vllm_kl, filtered

    def _correction(self, old: Tensor, sampled: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """What a token's loss is multiplied by, and the share of tokens, or sequences, outside the threshold."""
        log_ratio = torch.where(mask, old - sampled, 0.0)
        if self.gating == "ratio":
            statistic = log_ratio
        else:
            p, q = (torch.where(mask, x, -1.0).exp().clamp(1e-6, 1 - 1e-6) for x in (sampled, old))
            statistic = (p - q).abs()
            if self.gating == "binary_kl":
                statistic = p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()
        if self.level == "seq":
            statistic = torch.where(mask, statistic, 0.0).sum(1, keepdim=True) / mask.sum(1, keepdim=True).clamp(min=1)
        if self.gating == "ratio":
            statistic = statistic.exp()
        outside = (statistic < self.low) | (statistic > self.high)
        if self.mode == "clip":
            coefficient = statistic.clamp(self.low, self.high)
        else:
            coefficient = torch.where(outside, 0.0, log_ratio.exp())
        return coefficient, outside.float().mean() if self.level == "seq" else _mean(outside.float(), mask)


def _mean(values: Tensor, mask: Tensor) -> Tensor:
    return torch.where(mask, values, 0.0).sum() / mask.sum().clamp(min=1)
