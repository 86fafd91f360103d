"""From the head's raw logits to the z of a softmax: scale, then softcap, then temperature."""

from __future__ import annotations

import math
import re
from typing import Any, NamedTuple

from torch import Tensor

from redit_fast.checks import described, positive, real_number


class LogitTransform(NamedTuple):
    """z = softcap(logit_scale * logit) / temperature, softcap(x) = c tanh(x / c)."""

    temperature: float = 1.0
    logit_scale: float = 1.0
    softcap: float | None = None

    def check(self) -> LogitTransform:
        temperature, scale = positive("temperature", self.temperature), positive("logit_scale", self.logit_scale)
        softcap = None if self.softcap is None else positive("softcap", self.softcap)
        positive("logit_scale / temperature", scale / temperature)
        if softcap is not None:
            positive("logit_scale / softcap", scale / softcap)
            positive("softcap / temperature", softcap / temperature)
        return LogitTransform(temperature, scale, softcap)


class TransformConstants(NamedTuple):
    """A `LogitTransform` as kernels take it, which exponentiate to base 2: with x the raw logits,
    y = (u(x) - u(anchor)) outer, u(x) = tanh(x inner) where capped, else x."""

    slope: float  # dz/dx where not capped
    inner: float
    outer: float
    capped: bool

    @classmethod
    def of(cls, transform: LogitTransform) -> TransformConstants:
        temperature, scale, softcap = transform
        inner, outer = (1.0, scale) if softcap is None else (scale / softcap, softcap)
        return cls(scale / temperature, inner, outer / temperature / math.log(2), softcap is not None)


_SCALE_KEYS = ("logit_scale", "output_multiplier", "lm_head_multiplier")
_KNOWN = re.compile(
    r"^(attn|router|num|output)_|^(final_logit_softcapping|logits_scaling|logits_to_keep|{})$".format(
        "|".join(_SCALE_KEYS)
    )
)


def logit_transforms(model_config: Any) -> dict[str, float | None]:
    """{"logit_scale", "softcap"} of a Hugging Face model config (its text config where nested), as the ops take them.

    Reads final_logit_softcapping (Gemma), logit_scale (Cohere), output_multiplier, lm_head_multiplier (Falcon-H1) and
    logits_scaling (a divisor in Granite and MiniCPM3, a factor in HyperCLOVA X).

    Raises:
        ValueError, TypeError: what is no config, or a config that sets one of these out of range, or another field that
            looks like a transform of the logits, naming it.
    """
    is_dict = isinstance(model_config, dict)
    nested = model_config.get("text_config") if is_dict else getattr(model_config, "text_config", None)
    config = nested or model_config
    if not isinstance(config, dict) and (
        isinstance(config, Tensor) or callable(config) or not hasattr(config, "__dict__")
    ):
        raise TypeError(f"model_config must be a model's config, not the model, or a dict, got {described(config)}")
    values = config if isinstance(config, dict) else vars(config)
    for key, value in values.items():
        looks_like_one = re.search(r"logit|softcap|lm_head_mult", key) and re.search(r"scal|cap|mult|temper|bias", key)
        if looks_like_one and value not in (None, False) and not _KNOWN.search(key):
            raise ValueError(f"the model config sets {key}={value}, a logit transform that redit-fast does not know")

    def factor(key: str) -> float | None:
        return None if values.get(key) is None else real_number(f"{key} of the model config", values[key], above=0)

    scale = 1.0
    for key in _SCALE_KEYS:
        scale *= factor(key) or 1.0
    scaling = factor("logits_scaling")
    if scaling is not None:
        scale = scale * scaling if values.get("model_type") == "hyperclovax" else scale / scaling
    return {"logit_scale": scale, "softcap": factor("final_logit_softcapping")}
