"""verl's policy losses by `loss_terms`, the one definition; what sums the tokens up (agg_loss) and the metrics are
verl's (verl/trainer/ppo/core_algos.py, 0.9.1).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from typing import Any, cast

import torch
import verl
from torch import Tensor
from verl.trainer.ppo import core_algos
from verl.trainer.ppo.core_algos import agg_loss, register_policy_loss
from verl.trainer.ppo.rollout_corr_helper import compute_rollout_correction_and_rejection_mask
from verl.workers.config import ActorConfig

from redit_fast.checks import given
from redit_fast.integrations.versions import check_hooks
from redit_fast.losses.config import LossConfig
from redit_fast.losses.peers import PRESETS
from redit_fast.losses.rows import LossOutput, Rows
from redit_fast.losses.terms import DPPO_MAX_RATIO, Terms, clamp_exponent, clip_cov_tokens, dppo_trusts, loss_terms

SUPPORTED = "0.9.1"  # of verl, by running the tests
DPPO = ("dppo_tv", "dppo_kl")
NAMES = ("vanilla", *DPPO, "gspo", "sapo", "gpg", "clip_cov", "kl_cov", "geo_mean", "dro", "cispo")
CONTRACT = ["old_log_prob", "log_prob", "advantages", "response_mask", "loss_agg_mode", "config", "rollout_is_weights"]
AGGREGATION = ["loss_mat", "loss_mask", "loss_agg_mode", "dp_size", "batch_num_tokens", "global_batch_size",
               "loss_scale_factor"]  # fmt: skip
OPTIONS = {  # field of LossConfig -> the actor's option
    "epsilon_low": "clip_ratio_low",
    "epsilon_high": "clip_ratio_high",
    "dual_clip": "clip_ratio_c",
    "sapo_temperature_pos": "tau_pos",
    "sapo_temperature_neg": "tau_neg",
    "clip_cov_ratio": "policy_loss.clip_cov_ratio",
    "clip_cov_lb": "policy_loss.clip_cov_lb",
    "clip_cov_ub": "policy_loss.clip_cov_ub",
    "kl_cov_ratio": "policy_loss.kl_cov_ratio",
    "kl_cov_coef": "policy_loss.ppo_kl_coef",
    "dro_beta": "policy_loss.dro_beta",
}


def register() -> None:
    """`redit_<name>` for each of verl's losses. Raises RuntimeError for a verl whose losses take other arguments."""
    expected = {"compute_policy_loss_vanilla": CONTRACT, "agg_loss": AGGREGATION}
    check_hooks("verl", verl, expected, core_algos, SUPPORTED)
    for name in NAMES:
        register_policy_loss(f"redit_{name}")(partial(compute_policy_loss, name))
    register_policy_loss("redit_bypass_mode")(compute_policy_loss_bypass_mode)


def unregister() -> None:
    for name in (*NAMES, "bypass_mode"):
        core_algos.POLICY_LOSS_REGISTRY.pop(f"redit_{name}", None)


def loss_config(name: str, actor: ActorConfig) -> LossConfig:
    """The loss that verl calls `name`, with the options of `actor`.

    Raises:
        ValueError, TypeError: an option out of range, by verl's name. NotImplementedError: dppo_* with another
            clip_ratio_c than 20 (arXiv 2602.04879), at which ours limits its ratio.
    """
    preset = PRESETS["verl"]
    loss_type = preset.names.get(name, name)
    if loss_type in DPPO:
        if actor.clip_ratio_c != DPPO_MAX_RATIO:
            raise NotImplementedError(
                f"loss_mode='redit_{name}' needs actor.clip_ratio_c={DPPO_MAX_RATIO:g}, got {actor.clip_ratio_c}"
            )
        fields = {"epsilon_low", "epsilon_high"}
    else:
        fields = OPTIONS.keys() & preset.losses[loss_type].options.keys()
    options: dict[str, Any] = {field: _option(field, actor) for field in fields}
    try:
        if loss_type in DPPO:
            return LossConfig(cast(Any, loss_type), **options)
        return LossConfig.like("verl", loss_type=loss_type, **options)
    except (ValueError, TypeError) as error:
        field, _, what = str(error).partition(" ")
        raise type(error)(f"actor.{OPTIONS.get(field, field)} {what}") from None


def _option(field: str, actor: ActorConfig) -> object:
    value = actor
    for part in OPTIONS[field].split("."):
        value = getattr(value, part)
    if value is None:  # what verl then takes
        value = actor.clip_ratio if field.startswith("epsilon") else getattr(LossConfig, field)
    return value


class FirstPass:
    """The log-probs of a pass, micro-batch by micro-batch, by which a pass over the same ones chooses its tokens."""

    def __init__(self):
        self._log_probs: list[Tensor] = []
        self._read: Iterator[Tensor] | None = None

    @contextmanager
    def recorded(self) -> Iterator[None]:
        token = _first_pass.set(self)
        try:
            yield
        finally:
            _first_pass.reset(token)

    @contextmanager
    def again(self) -> Iterator[None]:
        self._read = iter(self._log_probs)
        with self.recorded():
            yield

    def of(self, log_prob: Tensor) -> Tensor:
        if self._read is None:
            self._log_probs.append(log_prob.detach())
            return self._log_probs[-1]
        return next(self._read)


_first_pass: ContextVar[FirstPass | None] = ContextVar("first_pass", default=None)  # of gradient regularisation


def _of_first_pass(name: str, log_prob: Tensor) -> LossOutput | None:
    """What the loss `name` chooses its tokens by in a pass of gradient regularisation."""
    first = _first_pass.get()
    if first is None or name not in ("clip_cov", "kl_cov"):
        return None
    return LossOutput(log_prob.new_zeros(()), first.of(log_prob), None, {}, "logp")


def compute_policy_loss(
    name: str,
    old_log_prob: Tensor,
    log_prob: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    loss_agg_mode: str | None = None,
    config: ActorConfig | None = None,
    rollout_is_weights: Tensor | None = None,
) -> tuple[Tensor, dict[str, float]]:
    """verl's policy loss `name`: the same call, value, gradient and metrics.

    What differs: masked positions are never read (a NaN there changes nothing), gspo's log-ratio is limited to
    [-20, 20] instead of to at most 10, and what clip_cov, kl_cov and geo_mean exponentiate too, which verl leaves as it
    is. clip_cov draws its tokens by a counter whose seed comes from torch's generator, where verl takes a permutation.
    In the second pass of gradient regularisation clip_cov and kl_cov keep the first one's tokens, where verl's would
    choose them anew.

    Args:
        old_log_prob, log_prob, advantages, response_mask, rollout_is_weights: (B, T).
        loss_agg_mode: verl's; None: its default for this loss. sapo and geo_mean have their own and ignore it.
        config: its options and its global_batch_info are read, as by verl.
    """
    if config is None:
        raise ValueError(f"config is required by loss_mode='redit_{name}': the actor's")
    settings = loss_config(name, config)
    seed = int(torch.randint(2**62, (), device="cpu")) if name == "clip_cov" else 0
    first = _of_first_pass(name, log_prob)
    rows = Rows.check(
        log_prob, advantages, old_log_prob, None, None, response_mask, None, settings, None, 0, seed, first
    )
    logp = torch.where(rows.mask, log_prob.reshape(-1).float(), 0.0)
    terms = loss_terms(rows, logp, rows.mask)
    losses = terms.policy
    if rollout_is_weights is not None:
        weights = torch.where(rows.mask, rollout_is_weights.reshape(-1), 0.0)
        losses = losses * (rows.sequence_mean((weights + 1e-10).log()).exp() if name == "geo_mean" else weights)
    if name == "geo_mean":  # over all sequences of the call, whatever global_batch_info says
        loss = (losses * rows.weights(None)).sum()
    else:
        mode = loss_agg_mode or "token-mean"
        if name == "sapo" or (name == "gspo" and loss_agg_mode is None):
            mode = "seq-mean-token-mean"
        loss = agg_loss(losses.view(log_prob.shape), response_mask, mode, **config.global_batch_info)
    return loss, _metrics(name, rows, terms, logp.detach())


@torch.no_grad()
def _metrics(name: str, rows: Rows, terms: Terms, logp: Tensor) -> dict[str, float]:
    """verl's own, by one copy from the device."""
    if name == "gpg":
        return {}
    A, old_logp = rows.advantages, cast(Tensor, rows.old_logp)  # which verl always has
    log_ratio = logp - old_logp
    limited = name in ("vanilla", "sapo", "cispo", *DPPO)
    kl = log_ratio.abs() if name == "kl_cov" else -clamp_exponent(log_ratio) if limited else -log_ratio
    clipped: Any = None  # or a tensor, as lower
    lower: Any = torch.zeros_like(A)
    if name in ("vanilla", "gspo"):
        clipped = given(terms.below) | given(terms.above)
        if name == "vanilla":
            lower = (A < 0) & (clamp_exponent(log_ratio).exp() > cast(float, rows.config.dual_clip))
    elif name in DPPO:
        trusted = dppo_trusts(rows.config, logp, old_logp, A)
        clipped, lower = ~trusted, trusted & (clamp_exponent(log_ratio).exp() > DPPO_MAX_RATIO)
    elif name == "sapo":
        clipped = lower
    elif name == "clip_cov":
        clipped, lower = clip_cov_tokens(rows, logp), None
    elif name in ("cispo", "geo_mean"):
        low, high = rows.config.clip_range
        value = log_ratio if name == "geo_mean" else clamp_exponent(log_ratio).exp()
        clipped = (value < low) | (value > high)
        if name == "geo_mean":
            clipped, lower = clipped & (A > 0), clipped & (A < 0)
    else:
        lower = None
    named = {"actor/pg_clipfrac": clipped, "actor/ppo_kl": kl, "actor/pg_clipfrac_lower": lower}
    named = {key: value for key, value in named.items() if value is not None}
    means = torch.stack([rows.mean(value.float()) for value in named.values()])
    return dict(zip(named, means.tolist(), strict=True))


def compute_policy_loss_bypass_mode(
    old_log_prob: Tensor,
    log_prob: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    loss_agg_mode: str = "token-mean",
    config: ActorConfig | None = None,
    rollout_is_weights: Tensor | None = None,
) -> tuple[Tensor, dict[str, float]]:
    """verl's bypass_mode: `old_log_prob` are the sampler's, policy_loss.rollout_correction names the loss (ppo_clip or
    reinforce) and what becomes of tokens on which sampler and policy disagree; verl's own code computes the latter.
    `rollout_is_weights` is not read."""
    correction = None if config is None else config.policy_loss.get("rollout_correction", None)
    if correction is None:
        raise ValueError("actor.policy_loss.rollout_correction is required by loss_mode='redit_bypass_mode'")
    loss_type = correction.get("loss_type", "ppo_clip")
    if loss_type not in ("ppo_clip", "reinforce"):
        raise ValueError(f"rollout_correction.loss_type must be 'ppo_clip' or 'reinforce', got {loss_type!r}")
    with torch.no_grad():
        found, mask, metrics = compute_rollout_correction_and_rejection_mask(
            old_log_prob=log_prob,
            rollout_log_prob=old_log_prob,
            response_mask=response_mask,
            rollout_is=correction.get("rollout_is", None),
            rollout_is_threshold=correction.get("rollout_is_threshold", 2.0),
            rollout_is_batch_normalize=correction.get("rollout_is_batch_normalize", False),
            rollout_rs=correction.get("rollout_rs", None),
            rollout_rs_threshold=correction.get("rollout_rs_threshold", None),
        )
    name, weights = "vanilla", None  # its ratio is the correction already
    if loss_type == "reinforce":
        name, weights = "reinforce", None if found is None else found.batch["rollout_is_weights"]
    loss, own = compute_policy_loss(name, old_log_prob, log_prob, advantages, mask, loss_agg_mode, config, weights)
    return loss, {**own, **metrics}
