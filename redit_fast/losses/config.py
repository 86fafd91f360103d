"""LossConfig: which loss, with which options. The formulas themselves are in `losses` and `loss_terms`."""

from __future__ import annotations

import math
from ast import literal_eval
from dataclasses import asdict, dataclass, field, fields
from functools import cache
from typing import ClassVar, Literal, TypeVar, get_args

from torch import Tensor

from redit_fast.checks import check_choice, check_flag, real_number, whole_number
from redit_fast.losses.peers import Peer, loss_options
from redit_fast.losses.transforms import LogitTransform

LossType = Literal[
    "grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "luspo", "vespo", "gspo", "gspo_token", "gmpo", "gpg",
    "reinforce", "rloo", "dppo_tv", "dppo_kl", "clip_cov", "kl_cov", "dro",
]  # fmt: skip
Importance = Literal["token", "sequence"]
CispoBound = Literal["absolute", "relative"]
KL = Literal["k1", "k2", "k3", "abs"]
Correction = Literal["none", "token_truncate", "token_mask", "sequence_truncate", "sequence_mask"]
Route = Literal["fused", "logp"]
Denominator = Literal["sequences", "tokens", "length"]
Number = TypeVar("Number", float, Tensor)

_CLIP = {"epsilon_low", "epsilon_high"}
_PPO = _CLIP | {"importance", "delta", "dual_clip"}
_USED = {  # of the fields that only some loss types use
    "grpo": _PPO,
    "bnpo": _PPO,
    "dr_grpo": _PPO,
    "dapo": _PPO,
    "luspo": _PPO,
    "gspo": _PPO - {"importance"},
    "gspo_token": _CLIP,
    "gmpo": _CLIP,
    "rloo": _CLIP,
    "cispo": _CLIP | {"importance", "cispo_bound"},
    "sapo": {"importance", "sapo_temperature_pos", "sapo_temperature_neg"},
    "vespo": {"vespo_k_pos", "vespo_lambda_pos", "vespo_k_neg", "vespo_lambda_neg"},
    "gpg": set(),
    "reinforce": set(),
    "dppo_tv": _CLIP,
    "dppo_kl": _CLIP,
    "clip_cov": _CLIP | {"clip_cov_ratio", "clip_cov_lb", "clip_cov_ub"},
    "kl_cov": {"kl_cov_ratio", "kl_cov_coef"},
    "dro": {"dro_beta"},
}
CLIPPED = tuple(name for name, used in _USED.items() if _CLIP <= used)  # loss types with a clip range
_SPECIAL = set().union(*_USED.values())
_TOKEN_LEVEL = ("grpo", "bnpo", "dr_grpo", "dapo", "luspo", "cispo", "sapo", "gpg", "reinforce", "dppo_tv", "dppo_kl",
                "dro")  # fmt: skip
_PER_SEQUENCE = ("grpo", "sapo", "luspo", "gspo", "gspo_token", "gmpo", "rloo")

_POSITIVE = ("delta", "correction_cap", "sapo_temperature_pos", "sapo_temperature_neg", "vespo_lambda_pos",
             "vespo_lambda_neg", "clip_cov_ratio", "kl_cov_ratio", "dro_beta", "temperature", "logit_scale",
             "softcap")  # fmt: skip
_NOT_NEGATIVE = ("epsilon_low", "epsilon_high", "beta", "correction_floor", "off_policy_mask_threshold",
                 "top_entropy_quantile", "vespo_k_pos", "vespo_k_neg", "kl_cov_coef")  # fmt: skip
_ANY = ("dual_clip", "entropy_coef", "clip_cov_lb", "clip_cov_ub")
_AT_MOST_1 = ("top_entropy_quantile", "clip_cov_ratio", "kl_cov_ratio")


@dataclass(frozen=True)
class LossConfig:
    """What the loss is. The defaults are TRL 1.16's formulas with the KL and sampler corrections off.

    Notation: logp the current log-probs, old, ref and sampling those of the old, the reference and the sampling policy;
    A the advantage; r = exp(logp - old), or with importance "sequence" exp(mean of logp - old over the sequence's
    scored tokens); sg stops the gradient; clip(r) = r limited to [1 - epsilon_low, 1 + epsilon_high]. A token's loss is
    q l + beta KL, with l by loss type and q by `correction`. It is averaged

    - per sequence, then over the sequences, empty ones included: grpo, gspo, gspo_token, gmpo, rloo, sapo;
    - summed per sequence, averaged over the sequences: luspo;
    - over the scored tokens: bnpo, dapo, cispo, vespo, gpg, reinforce, dppo_tv, dppo_kl, clip_cov, kl_cov, dro;
    - summed, over sequences x max_completion_length: dr_grpo.

    Loss types:
        grpo (arXiv 2402.03300), bnpo (TRL), dr_grpo (2503.20783), dapo (2503.14476), luspo (2602.05261):
            l = -min(r A, clip(r) A).
        gspo (2507.18071): the same, with importance "sequence" implied.
        gspo_token (2507.18071, verl's "gspo"): the same with r = exp(logp - sg(logp) + sg(the sequence's mean
            log-ratio)): the sequence's ratio, the token's gradient.
        rloo (2402.14740, TRL): the same with r = exp(sum of the sequence's log-ratios).
        gmpo (2507.20673): l = -A exp(mean over the sequence of u), u = min(d, clip(d)) for A > 0, max(d, clip(d))
            otherwise, d = logp - old, clip(d) = d limited to [-epsilon_low, epsilon_high].
        cispo (2506.13585): l = -sg(r limited by cispo_bound) A logp.
        sapo (2511.20347): l = -(4 / tau) sigmoid(tau (r - 1)) A, tau = sapo_temperature_pos for A > 0, else
            sapo_temperature_neg.
        vespo (2602.10693): l = -sg(phi) A logp, phi = exp(lambda + k log w - lambda w), log w the sum of the sequence's
            log-ratios, those of `correction` included; k = vespo_k_pos and lambda = vespo_lambda_pos for A >= 0, else
            vespo_k_neg and vespo_lambda_neg.
        gpg (2504.02546), reinforce (Williams 1992): l = -A logp.
        dppo_tv (2602.04879): l = -A sg(min(r, 20)) logp where p - p_old <= epsilon_high (A > 0) or >= -epsilon_low
            (otherwise), else 0; p = exp(logp).
        dppo_kl (2602.04879): the same where the binary KL from p_old to p is at most epsilon_high (A > 0) or
            epsilon_low (otherwise), or p moved against the advantage.
        clip_cov (2505.22617): grpo's l, but 0 on a random clip_cov_ratio of the tokens (at least one) among those with
            clip_cov_lb < (A - mean A)(logp - mean logp) < clip_cov_ub that are not clipped.
        kl_cov (2505.22617): l = -r A, + kl_cov_coef |logp - old| on the kl_cov_ratio of the tokens (at least one) with
            the largest (A - mean A)(logp - mean logp).
        dro (2405.19107): l = -A logp + dro_beta (logp - old)^2 / 2.

    At a tie torch.min takes half of either gradient and a limit passes the gradient at its bounds: at r = 1 +
    epsilon_high and A > 0 all of the gradient passes, half through either side of the minimum. Whatever is
    exponentiated (a log-ratio, its mean or sum, the log-ratio of KL) is limited to [-20, 20] first.

    Args:
        loss_type: above.
        importance: r per token or per sequence, where the loss type leaves the choice.
        epsilon_low, epsilon_high: the clip range; epsilon_high None means epsilon_low.
        delta: upper bound of r in the unclipped branch (two-sided clipping, 2505.07291); None for none.
        dual_clip: for A < 0, l is at most -dual_clip A (1912.09729); above 1, None for none. Not together with delta,
            which bounds the same branch.
        cispo_bound: "absolute" limits r from above at epsilon_high itself (TRL), "relative" to
            [1 - epsilon_low, 1 + epsilon_high] (verl, slime, NeMo).
        beta: weight of the KL term.
        kl: with d = logp - ref: "k1" d, "k2" d^2 / 2, "k3" exp(-d) + d - 1 (Schulman 2020), "abs" |d|.
        kl_ratio_correction: multiply the KL term by r, with its gradient (2512.02556); r is the token's, or with
            importance "sequence" and in gspo the sequence's.
        entropy_coef: weight of the entropy bonus, a mean over the scored tokens (that top_entropy_quantile keeps).
        correction: q against the gap between the sampling and the old policy: with w = exp(old - sampling), of the
            token or, in sequence_truncate and sequence_mask, of the sequence's sum: truncate limits w to
            [correction_floor, correction_cap] (TIS), mask sets w to 0 outside (IcePop, MIS). An unknown (NaN) sampling
            log-prob counts as old.
        correction_cap, correction_floor: those bounds; floor None means 0.
        off_policy_mask_threshold: l is 0 in sequences whose mean of sampling (else old) - logp is above it and whose
            A < 0 (2512.02556); None for none.
        top_entropy_quantile: l is 0 but in this share of the scored tokens, those of highest entropy (2506.01939): kept
            is H >= the linear quantile 1 - q of this call's tokens. gmpo leaves the others out of its mean instead.
        sapo_*, vespo_*, clip_cov_*, kl_cov_*, dro_beta: above; dro needs its dro_beta.
        max_completion_length: the length in dr_grpo's denominator.
        temperature, logit_scale, softcap: logits -> log-probs, in the fused losses only.

    Raises:
        ValueError, TypeError: a value out of range, or a non-default value of a field that the loss type does not use,
            naming it. max_completion_length is accepted everywhere, and so are kl, kl_ratio_correction, correction_cap
            and correction_floor, which mean nothing while their parents beta and correction are off.
        NotImplementedError: a combination that no route has, naming the field.
    """

    text: ClassVar[str]  # of each config: every field, for torch's operators, which take no objects

    loss_type: LossType = "dapo"
    importance: Importance = "token"
    epsilon_low: float = 0.2
    epsilon_high: float | None = None
    delta: float | None = None
    dual_clip: float | None = None
    cispo_bound: CispoBound = "absolute"
    beta: float = 0.0
    kl: KL = "k3"
    kl_ratio_correction: bool = False
    entropy_coef: float = 0.0
    correction: Correction = "none"
    correction_cap: float = 3.0
    correction_floor: float | None = None
    off_policy_mask_threshold: float | None = None
    top_entropy_quantile: float = 1.0
    sapo_temperature_pos: float = 1.0
    sapo_temperature_neg: float = 1.05
    vespo_k_pos: float = 2.0
    vespo_lambda_pos: float = 3.0
    vespo_k_neg: float = 3.0
    vespo_lambda_neg: float = 2.0
    clip_cov_ratio: float = 2e-4
    clip_cov_lb: float = 1.0
    clip_cov_ub: float = 5.0
    kl_cov_ratio: float = 2e-4
    kl_cov_coef: float = 1.0
    dro_beta: float | None = None
    max_completion_length: int | None = None
    temperature: float = 1.0
    logit_scale: float = 1.0
    softcap: float | None = None
    # True: without sampling_logp the correction is off instead of an error. For presets, whose peers behave so.
    _correction_optional: bool = field(default=False, kw_only=True, repr=False)

    @classmethod
    def like(
        cls, peer: Peer, version: str | None = None, loss_type: str | None = None, **overrides: object
    ) -> LossConfig:
        """The loss that another library computes, at that library's own defaults (tables and sources: docs/peers.md).

        A correction that comes from the preset acts where the call has a sampling_logp, as in the peer; one among the
        overrides requires it. The denominator belongs to the call: see `normalizer` in `policy_loss`.

        Args:
            peer: "trl", "verl", "openrlhf" or "liger".
            version: the peer's; None or the one that the preset was checked against.
            loss_type: one of ours or the peer's own name for its loss, which wins; None is the peer's default.
            overrides: fields that the peer's loss has as options, and max_completion_length, temperature, logit_scale
                and softcap, which belong to the run.

        Raises:
            ValueError, TypeError: an unknown peer, version, loss_type or field, or a value that `LossConfig` refuses.
            NotImplementedError: a loss, field or value that the peer does not have, naming it.
        """
        return cls(**loss_options(peer, version, loss_type, overrides))

    @staticmethod
    @cache
    def of(text: str) -> LossConfig:
        """The config that has this `text`."""
        return LossConfig(**literal_eval(text))

    def __post_init__(self) -> None:
        check_choice("loss_type", self.loss_type, get_args(LossType))
        check_choice("importance", self.importance, get_args(Importance))
        check_choice("cispo_bound", self.cispo_bound, get_args(CispoBound))
        check_choice("kl", self.kl, get_args(KL))
        check_choice("correction", self.correction, get_args(Correction))
        check_flag("kl_ratio_correction", self.kl_ratio_correction)
        self._check_numbers()
        self.transform.check()
        for name in sorted(_SPECIAL - _USED[self.loss_type]):
            if getattr(self, name) != _DEFAULTS[name]:
                raise ValueError(f"{name} is not used by loss_type={self.loss_type!r}; leave it at its default")
        self._check_bounds()
        if self.loss_type == "cispo" and self.cispo_bound == "absolute" and self.epsilon_high is not None:
            if self.epsilon_low != _DEFAULTS["epsilon_low"]:
                raise ValueError("epsilon_low is not used by cispo with cispo_bound='absolute' and an epsilon_high")
        if self.delta is not None and self.dual_clip is not None:
            raise ValueError("dual_clip and delta bound the same branch; set one of them")
        if self.loss_type == "dro" and self.dro_beta is None:
            raise ValueError("dro_beta is required by loss_type='dro'")
        if self.loss_type == "vespo" and self.correction.startswith("sequence"):
            raise NotImplementedError(
                f"correction={self.correction!r} is not supported by loss_type='vespo', whose weight is the sequence's "
                "own; use 'token_truncate' or 'token_mask'"
            )
        object.__setattr__(self, "text", repr(asdict(self)).replace(": inf", ": 1e999"))  # its literal

    def _check_numbers(self) -> None:
        for name in (*_POSITIVE, *_NOT_NEGATIVE, *_ANY):
            value = getattr(self, name)
            if value is None and _DEFAULTS[name] is None:
                continue
            value = real_number(
                name,
                value,
                above=0 if name in _POSITIVE else None,
                least=0 if name in _NOT_NEGATIVE else None,
                most=1 if name in _AT_MOST_1 else None,
                finite=name != "correction_cap",
                float32=True,
            )
            object.__setattr__(self, name, value)  # numpy's own would not be read back from `text`
        if self.max_completion_length is not None:
            length = whole_number("max_completion_length", self.max_completion_length, 1)
            object.__setattr__(self, "max_completion_length", length)

    def _check_bounds(self) -> None:
        if self.dual_clip is not None and not self.dual_clip > 1:
            raise ValueError(f"dual_clip must be above 1, got {self.dual_clip}")
        if self.correction_floor is not None and not self.correction_floor <= self.correction_cap:
            raise ValueError(f"correction_floor must be at most correction_cap, got {self.correction_floor}")
        if not self.clip_cov_lb < self.clip_cov_ub:
            raise ValueError(f"clip_cov_lb must be below clip_cov_ub, got {self.clip_cov_lb} and {self.clip_cov_ub}")

    @property
    def sequence_ratio(self) -> bool:
        """Whether r is the sequence's."""
        return self.importance == "sequence" or self.loss_type == "gspo"

    @property
    def route(self) -> Route:
        """ "fused" where a row's coefficient depends on that row alone."""
        alone = (
            self.loss_type in _TOKEN_LEVEL
            and self.importance == "token"
            and self.entropy_coef == 0
            and self.top_entropy_quantile == 1
            and self.off_policy_mask_threshold is None
            and not self.correction.startswith("sequence")
        )
        return "fused" if alone else "logp"

    @property
    def silent_at_zero(self) -> bool:
        """Whether a sequence with an advantage of exactly 0 has no gradient, and none of the others' depends on it."""
        return (
            self.loss_type not in ("dro", "clip_cov", "kl_cov")  # a penalty at any advantage; covariances over the call
            and self.beta == 0
            and self.entropy_coef == 0
            and self.top_entropy_quantile == 1
        )

    @property
    def denominator(self) -> Denominator:
        """What the loss is divided by: the sequences, the scored tokens, or sequences x max_completion_length."""
        if self.loss_type == "dr_grpo":
            return "length"
        return "sequences" if self.loss_type in _PER_SEQUENCE else "tokens"

    @property
    def clip_range(self) -> tuple[float, float]:
        """The bounds of r; in gmpo of the log-ratio, in dppo_tv and dppo_kl of the divergence."""
        high = self.epsilon_low if self.epsilon_high is None else self.epsilon_high
        if self.loss_type == "cispo" and self.cispo_bound == "absolute":
            return -math.inf, high
        if self.loss_type in ("gmpo", "dppo_tv", "dppo_kl"):
            return -self.epsilon_low, high
        return 1 - self.epsilon_low, 1 + high

    @property
    def correction_range(self) -> tuple[float, float]:
        return self.correction_floor or 0.0, self.correction_cap

    @property
    def transform(self) -> LogitTransform:
        return LogitTransform(self.temperature, self.logit_scale, self.softcap)


_DEFAULTS = {each.name: each.default for each in fields(LossConfig)}


def denominator_of(config: LossConfig, sequences: int, tokens: Number) -> Number | float:
    """The denominator of that many sequences and scored tokens; without max_completion_length dr_grpo's is 0."""
    if config.denominator == "tokens":
        return tokens
    return float(sequences * (1 if config.denominator == "sequences" else config.max_completion_length or 0))
