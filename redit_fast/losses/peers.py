"""What each peer's own loss is, as plain data: `LossConfig.like` and `advantage_options` read these tables.

A row says: their name of the loss, where it is defined, its options at the peer's own defaults, and what else of ours
it takes to be that loss. An override must be one of the row's options; everything else is refused by name.
`docs/peers.md` shows these tables and what no preset can carry: normalizers, which belong to the call, and limits on
outliers.
"""

from __future__ import annotations

from numbers import Real
from typing import Any, Literal, NamedTuple, get_args

from redit_fast.checks import check_choice, described, did_you_mean

Peer = Literal["trl", "verl", "openrlhf", "liger"]
Options = dict[str, Any]


class Loss(NamedTuple):
    name: str  # what the peer calls it
    source: str  # file::function
    options: Options  # of the peer, at its default; the caller may override these
    fixed: Options = {}  # what the peer does not let one choose
    choices: dict[str, tuple] = {}  # of an option, where the peer has fewer than LossConfig


class Preset(NamedTuple):
    version: str
    defaults: str  # where the peer's defaults are
    loss_type: str  # the peer's default
    losses: dict[str, Loss]  # by LossConfig.loss_type
    advantages: Options  # for rf.group_advantages
    advantages_source: str
    notes: dict[str, str]  # what no LossConfig carries, by NOTES
    names: dict[str, str] = {}  # the peer's own loss names -> LossConfig.loss_type
    refused: dict[str, str] = {}  # LossConfig.loss_type -> why there is no preset for it


NOTES = {  # what it is -> what it is here
    "denominator": "`normalizer`, else the call's sequences, scored tokens, or sequences x max_completion_length",
    "sequence without tokens": "adds 0, counts as a sequence",
    "log-ratio limited to": "[-20, 20], also its mean (gspo) and sum (rloo, vespo)",
    "KL": "added to the token's loss after the correction; the exponent of k3 limited to [-20, 20]",
    "entropy bonus": "mean over the call's scored tokens",
    "group of one": "advantage 0",
}

# Properties of a model or a run, not of a peer.
ANYWHERE = ("max_completion_length", "temperature", "logit_scale", "softcap")

_SAPO = {"sapo_temperature_pos": 1.0, "sapo_temperature_neg": 1.05}
_VESPO = {"vespo_k_pos": 2.0, "vespo_lambda_pos": 3.0, "vespo_k_neg": 3.0, "vespo_lambda_neg": 2.0}

# TRL: beta, epsilon, delta, ... of GRPOConfig; use_bias_correction_kl=True; vllm_importance_sampling_mode, _clip_max
# and _clip_min, which act when vLLM generated: when there is a sampling_logp.
_GRPO_PY = "trl/trainer/grpo_trainer.py::GRPOTrainer._compute_loss"
_TRL = {
    "beta": 0.0,
    "kl_ratio_correction": True,
    "entropy_coef": 0.0,
    "correction": "sequence_mask",
    "correction_cap": 3.0,
    "correction_floor": None,
    "off_policy_mask_threshold": None,
    "top_entropy_quantile": 1.0,
}
_TRL_CLIP = {"epsilon_low": 0.2, "epsilon_high": None}
_TRL_PPO = {**_TRL, **_TRL_CLIP, "importance": "token", "delta": None}
_K3 = {"kl": "k3"}

_TRL_LOSSES = {
    "grpo": Loss("grpo", _GRPO_PY, _TRL_PPO, _K3),
    "bnpo": Loss("bnpo", _GRPO_PY, _TRL_PPO, _K3),
    "dr_grpo": Loss("dr_grpo", _GRPO_PY, _TRL_PPO, _K3),
    "dapo": Loss("dapo", _GRPO_PY, _TRL_PPO, _K3),
    "luspo": Loss("luspo", _GRPO_PY, _TRL_PPO, _K3),
    "gspo": Loss('grpo, importance_sampling_level="sequence"', _GRPO_PY, {**_TRL, **_TRL_CLIP, "delta": None}, _K3),
    "cispo": Loss("cispo", _GRPO_PY, {**_TRL, **_TRL_CLIP, "importance": "token"}, {**_K3, "cispo_bound": "absolute"}),
    "sapo": Loss("sapo", _GRPO_PY, {**_TRL, **_SAPO, "importance": "token"}, _K3),
    "vespo": Loss(  # GRPOTrainer.__init__ refuses its own default, sequence_mask, together with vespo
        "vespo",
        "trl/trainer/grpo_trainer.py::GRPOTrainer.get_gamma_weights",
        {**_TRL, **_VESPO, "correction": "none"},
        _K3,
        {"correction": ("none", "token_truncate", "token_mask")},
    ),
    "gmpo": Loss(
        "GMPOTrainer",
        "trl/experimental/gmpo/gmpo_trainer.py::GMPOTrainer._compute_loss",
        {"epsilon_low": 0.4, "epsilon_high": None, "beta": 0.0, "top_entropy_quantile": 1.0},
        {"kl": "k3", "kl_ratio_correction": False, "correction": "none", "entropy_coef": 0.0},
    ),
    "rloo": Loss(  # its beta (0.05) is a KL penalty inside the reward
        "RLOOTrainer",
        "trl/trainer/rloo_trainer.py::RLOOTrainer._compute_loss",
        _TRL_CLIP,
        {"beta": 0.0, "correction": "none", "entropy_coef": 0.0},
    ),
}

# verl: actor.clip_ratio_low, clip_ratio_high, clip_ratio_c, tau_pos, policy_loss.*; use_kl_loss=False (kl_loss_coef
# 0.001 and low_var_kl once it is on); algorithm.rollout_correction: rollout_is null, rollout_is_threshold 2.0.
_CORE_ALGOS = "verl/trainer/ppo/core_algos.py::compute_policy_loss_"
_VERL = {"beta": 0.0, "kl": "k3", "correction": "none", "correction_cap": 2.0, "correction_floor": None}
_VERL_TOKEN = {**_VERL, "entropy_coef": 0.0}  # verl averages the entropy as it does the loss: per token, as ours
_VERL_CLIP = {"epsilon_low": 0.2, "epsilon_high": 0.2}
_VERL_PPO = {**_VERL_CLIP, "dual_clip": 3.0}
_VERL_FIXED = {"kl_ratio_correction": False}
_SEQUENCES = 'loss_agg_mode="seq-mean-token-mean"'

_VERL_LOSSES = {
    "dapo": Loss("vanilla", _CORE_ALGOS + "vanilla", {**_VERL_TOKEN, **_VERL_PPO}, _VERL_FIXED),
    "grpo": Loss(f"vanilla, {_SEQUENCES}", _CORE_ALGOS + "vanilla", {**_VERL, **_VERL_PPO}, _VERL_FIXED),
    "dr_grpo": Loss(
        'vanilla, loss_agg_mode="seq-mean-token-sum-norm"',
        _CORE_ALGOS + "vanilla",
        {**_VERL, **_VERL_PPO},
        _VERL_FIXED,
    ),
    "gspo_token": Loss(f"gspo, {_SEQUENCES}", _CORE_ALGOS + "gspo", {**_VERL, **_VERL_CLIP}, _VERL_FIXED),
    "gmpo": Loss(
        f"geo_mean, {_SEQUENCES}",
        _CORE_ALGOS + "geo_mean",
        {**_VERL, **_VERL_CLIP},
        _VERL_FIXED,
        {"correction": ("none", "sequence_truncate", "sequence_mask")},  # a token's weights enter as a geometric mean
    ),
    "sapo": Loss(f"sapo, {_SEQUENCES}", _CORE_ALGOS + "sapo", {**_VERL, **_SAPO}, _VERL_FIXED),
    "cispo": Loss(
        "cispo", _CORE_ALGOS + "cispo", {**_VERL_TOKEN, **_VERL_CLIP}, {**_VERL_FIXED, "cispo_bound": "relative"}
    ),
    "gpg": Loss("gpg", _CORE_ALGOS + "gpg", _VERL_TOKEN, _VERL_FIXED),
    "reinforce": Loss("bypass_mode, reinforce", _CORE_ALGOS + "reinforce", _VERL_TOKEN, _VERL_FIXED),
    "clip_cov": Loss(
        "clip_cov",
        _CORE_ALGOS + "clip_cov",
        {**_VERL_TOKEN, **_VERL_CLIP, "clip_cov_ratio": 2e-4, "clip_cov_lb": 1.0, "clip_cov_ub": 5.0},
        _VERL_FIXED,
    ),
    "kl_cov": Loss(
        "kl_cov", _CORE_ALGOS + "kl_cov", {**_VERL_TOKEN, "kl_cov_ratio": 2e-4, "kl_cov_coef": 0.1}, _VERL_FIXED
    ),
    "dro": Loss("dro", _CORE_ALGOS + "dro", {**_VERL_TOKEN, "dro_beta": None}, _VERL_FIXED),
}
_CLIP_RATIO_C = (
    "verl truncates its ratio at actor.clip_ratio_c, 3.0 by default, and ours at 20 (arXiv 2602.04879); where you "
    "set clip_ratio_c=20 in verl, LossConfig({}) is the same loss"
)

# OpenRLHF: actor.eps_clip, dual_clip, entropy_coef; kl.use_loss=False (estimator k1 once it is on);
# is_correction_level off (thresholds 0.5 and 5.0). KL and entropy are averaged over tokens, also where the loss is
# averaged over sequences.
_LOSS_PY = "openrlhf/models/loss.py::PolicyLoss.forward"
_OPENRLHF = {"epsilon_low": 0.2, "epsilon_high": 0.2, "dual_clip": None, "entropy_coef": 0.0}
_OPENRLHF_CORRECTION = {"correction": "none", "correction_cap": 5.0, "correction_floor": 0.5}
_TOKEN_CORRECTIONS = ("none", "token_truncate", "token_mask")  # "clip" and "mask" with is_correction_level="token"
_NO_KL = {"beta": 0.0, "kl_ratio_correction": False}

_OPENRLHF_LOSSES = {
    "dapo": Loss(
        "ppo",
        _LOSS_PY,
        {**_OPENRLHF, **_OPENRLHF_CORRECTION, "beta": 0.0, "kl": "k1"},
        {"kl_ratio_correction": False},
        {"correction": _TOKEN_CORRECTIONS, "kl": ("k1", "k2", "k3")},
    ),
    "grpo": Loss(
        f"ppo, {_SEQUENCES}",
        _LOSS_PY,
        {**_OPENRLHF, **_OPENRLHF_CORRECTION},
        _NO_KL,
        {"correction": _TOKEN_CORRECTIONS},
    ),
    "gspo": Loss("gspo", _LOSS_PY, _OPENRLHF, {**_NO_KL, "correction": "none"}),
}

# Liger: the arguments of LigerFusedLinearGRPOLoss. The sampler's correction is a ready ratio there (vllm_is_ratio), so
# that its mode and bounds are the caller's.
_GRPO_LOSS_PY = "liger_kernel/chunked_loss/grpo_loss.py::LigerFusedLinearGRPOFunction.ppo_loss_fn"
_LIGER = {
    "beta": 0.04,
    "kl_ratio_correction": False,
    "correction": "none",
    "correction_cap": 3.0,
    "correction_floor": None,
}
_LIGER_CLIP = {"epsilon_low": 0.2, "epsilon_high": 0.2}
_LIGER_PPO = {**_LIGER, **_LIGER_CLIP, "delta": None}
_LIGER_FIXED = {"kl": "k3", "entropy_coef": 0.0}

_LIGER_LOSSES = {
    "grpo": Loss("grpo", _GRPO_LOSS_PY, {**_LIGER_PPO, "importance": "token"}, _LIGER_FIXED),
    "bnpo": Loss("bnpo", _GRPO_LOSS_PY, {**_LIGER_PPO, "importance": "token"}, _LIGER_FIXED),
    "dr_grpo": Loss("dr_grpo", _GRPO_LOSS_PY, {**_LIGER_PPO, "importance": "token"}, _LIGER_FIXED),
    "dapo": Loss("dapo", _GRPO_LOSS_PY, {**_LIGER_PPO, "importance": "token"}, _LIGER_FIXED),
    "gspo": Loss('grpo, importance_sampling_level="sequence"', _GRPO_LOSS_PY, _LIGER_PPO, _LIGER_FIXED),
    "cispo": Loss("cispo", _GRPO_LOSS_PY, {**_LIGER, **_LIGER_CLIP}, {**_LIGER_FIXED, "cispo_bound": "absolute"}),
    "sapo": Loss("sapo", _GRPO_LOSS_PY, {**_LIGER, **_SAPO}, _LIGER_FIXED),
    "vespo": Loss("vespo", _GRPO_LOSS_PY, {**_LIGER, **_VESPO}, _LIGER_FIXED),
}

_BY_GROUP = {"baseline": "mean", "scale": "group", "combine": "sum_then_normalize", "ddof": 1}

PRESETS: dict[str, Preset] = {
    "trl": Preset(
        "1.16.0",
        "trl/trainer/grpo_config.py::GRPOConfig",
        "dapo",
        _TRL_LOSSES,
        {**_BY_GROUP, "eps": 1e-4},
        "trl/trainer/grpo_trainer.py::GRPOTrainer._generate_and_score_completions",
        {
            "denominator": "as here, x gradient_accumulation_steps; dapo, cispo, vespo: num_items_in_batch x "
            "gradient_accumulation_steps / (steps_per_generation x processes)",
            "sequence without tokens": "as here; gmpo and rloo add -A, without gradient; the metric cispo_clip_ratio "
            "with importance 'sequence' counts it with a ratio of 1",
            "log-ratio limited to": "nothing; vespo: token [-20, 20], sum [log 1e-8, 20]",
            "KL": "as here, no limit; rloo: k1 in the reward, beta 0.05",
            "entropy bonus": "as here, / gradient_accumulation_steps",
            "group of one": "0",
        },
        refused={"gspo_token": "TRL removed it in 1.16; gspo has the same value and gradient"},
    ),
    "verl": Preset(
        "0.9.1",
        "verl/workers/config/actor.py::ActorConfig",
        "dapo",
        _VERL_LOSSES,
        {**_BY_GROUP, "eps": 1e-6},
        "verl/trainer/ppo/core_algos.py::compute_grpo_outcome_advantage",
        {
            "denominator": "the mini-batch's scored tokens, or its sequences that have one (seq-mean-*)",
            "sequence without tokens": "does not count; geo_mean: as here",
            "log-ratio limited to": "[-20, 20]; gspo: at most 10; clip_cov, kl_cov, geo_mean, dro: nothing",
            "KL": "aggregated on its own, as the loss is; k3: exponent as here, value at most 10",
            "entropy bonus": "aggregated as the loss is",
            "group of one": "its reward",
        },
        names={"vanilla": "dapo", "gspo": "gspo_token", "geo_mean": "gmpo"},
        refused={
            "bnpo": "its token-mean is that of the whole mini-batch: dapo",
            "rloo": "it is an advantage estimator there, not a loss",
            "dppo_tv": _CLIP_RATIO_C.format("loss_type='dppo_tv'"),
            "dppo_kl": _CLIP_RATIO_C.format("loss_type='dppo_kl'"),
        },
    ),
    "openrlhf": Preset(
        "0.11.2",
        "openrlhf/cli/train_ppo_ray.py",
        "dapo",
        _OPENRLHF_LOSSES,
        {**_BY_GROUP, "eps": 1e-9},
        "openrlhf/trainer/ppo_utils/experience_maker.py::compute_advantages_and_returns",
        {
            "denominator": "the optimizer step's scored tokens, or its sequences that have one (seq-mean-token-mean)",
            "sequence without tokens": "does not count",
            "log-ratio limited to": "[-20, 20]; gspo: nothing",
            "KL": "mean over tokens; every estimator limited to [-10, 10]",
            "entropy bonus": "mean over the scored tokens of the optimizer step",
            "group of one": "refused",
        },
        names={"ppo": "dapo"},
        refused={
            "dr_grpo": "it is an advantage estimator there, not a loss",
            "rloo": "it is an advantage estimator there, not a loss",
            "reinforce": "it is an advantage estimator there, not a loss",
        },
    ),
    "liger": Preset(
        "0.8.5",
        "liger_kernel/chunked_loss/grpo_loss.py::LigerFusedLinearGRPOLoss",
        "dapo",
        _LIGER_LOSSES,
        {**_BY_GROUP, "eps": 1e-4},  # Liger takes advantages; TRL, which called it until 1.14, made them
        "trl/trainer/grpo_trainer.py::GRPOTrainer._generate_and_score_completions",
        {
            "denominator": "as here; dapo, cispo, vespo: num_items_in_batch / processes, or the ranks' mean of tokens",
            "sequence without tokens": "as here",
            "log-ratio limited to": "nothing; vespo: as TRL",
            "KL": "as here, no limit",
            "entropy bonus": "none",
            "group of one": "takes advantages",
        },
        refused={"luspo": "Liger's sums over padding positions too, so that the padded width changes it"},
    ),
}


def _preset(peer: str, version: str | None) -> Preset:
    check_choice("peer", peer, get_args(Peer))
    preset = PRESETS[peer]
    if version is not None and not isinstance(version, str):
        raise TypeError(f"version must be a string, got {described(version)}")
    if version not in (None, preset.version, preset.version.rpartition(".")[0]):
        raise ValueError(f"version of {peer} must be {preset.version!r}, the one this preset was checked against, "
                         f"got {version!r}")  # fmt: skip
    return preset


def loss_options(peer: str, version: str | None, loss_type: str | None, overrides: Options) -> Options:
    """The arguments of the `LossConfig` that is the peer's loss.

    `loss_type` is a `LossConfig.loss_type` or the peer's own name; where the two mean different losses, the peer's.
    """
    preset = _preset(peer, version)
    if loss_type is not None and not isinstance(loss_type, str):
        raise TypeError(f"loss_type must be a string, got {described(loss_type)}")
    loss_type = preset.loss_type if loss_type is None else preset.names.get(loss_type, loss_type)
    who = f"{peer} {preset.version}"
    if loss_type not in preset.losses:
        known = {name for each in PRESETS.values() for name in (*each.losses, *each.refused)}
        if loss_type not in known:
            raise ValueError(f"loss_type must be one of {', '.join(sorted(known))}, got {loss_type!r}")
        why = preset.refused.get(loss_type, f"its losses are {', '.join(preset.losses)}")
        raise NotImplementedError(f"loss_type={loss_type!r} is not a preset of {who}: {why}")
    row = preset.losses[loss_type]
    known = _fields()
    for name, value in overrides.items():
        if name not in known:
            raise TypeError(f"{name} is not a field of LossConfig; {did_you_mean(name, known)}")
        if value is not None and not isinstance(value, str | Real):
            raise TypeError(f"{name} must be a number, a string or a bool, got {described(value)}")
        if name in row.fixed and value == row.fixed[name]:
            continue
        if name not in row.options and name not in ANYWHERE:
            raise NotImplementedError(f"{name} is not an option of {who}'s {row.name}: it has {', '.join(row.options)}")
        if name in row.choices and value not in row.choices[name]:
            raise NotImplementedError(
                f"{name}={value!r} is not among what {who}'s {row.name} has: {', '.join(row.choices[name])}"
            )
    options = {"loss_type": loss_type, **row.options, **row.fixed, **overrides}
    if "correction" not in overrides and options["correction"] != "none":
        options["_correction_optional"] = True
    return options


def _fields() -> set[str]:
    rows = [row for preset in PRESETS.values() for row in preset.losses.values()]
    return {name for row in rows for name in (*row.options, *row.fixed)} | set(ANYWHERE)


def advantage_options(peer: Peer, version: str | None = None) -> Options:
    """The arguments of `group_advantages` that give the peer's group-normalised advantages.

    Raises:
        ValueError: an unknown peer, or a version that the preset was not checked against.
    """
    return dict(_preset(peer, version).advantages)
