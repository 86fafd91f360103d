"""From the head's raw logits to the z of a softmax: scale, then softcap, then temperature."""

from __future__ import annotations

import math
import re
from typing import NamedTuple


class LogitTransform(NamedTuple):
    """z = softcap(logit_scale * logit) / temperature, softcap(x) = c tanh(x / c)."""

    temperature: float = 1.0
    logit_scale: float = 1.0
    softcap: float | None = None

    def check(self) -> LogitTransform:
        for name, value in self._asdict().items():
            if value is not None and not (math.isfinite(value) and value > 0):
                raise ValueError(f"{name} must be finite and above 0, got {value}")
        return self


_SCALE_KEYS = ("logit_scale", "output_multiplier", "lm_head_multiplier")
_KNOWN = re.compile(
    r"^(attn|router|num|output)_|^(final_logit_softcapping|logits_scaling|logits_to_keep|{})$".format(
        "|".join(_SCALE_KEYS)
    )
)


def logit_transforms(model_config: object) -> dict[str, float | None]:
    """{"logit_scale", "softcap"} of a Hugging Face model config (its text config where nested), as the ops take them.

    Reads final_logit_softcapping (Gemma), logit_scale (Cohere), output_multiplier, lm_head_multiplier (Falcon-H1) and
    logits_scaling (a divisor in Granite and MiniCPM3, a factor in HyperCLOVA X).

    Raises:
        ValueError: the config sets another field that looks like a transform of the logits, naming it.
    """
    config = getattr(model_config, "text_config", None) or model_config
    values = config if isinstance(config, dict) else vars(config)
    for key, value in values.items():
        looks_like_one = re.search(r"logit|softcap|lm_head_mult", key) and re.search(r"scal|cap|mult|temper|bias", key)
        if looks_like_one and value not in (None, False) and not _KNOWN.search(key):
            raise ValueError(f"the model config sets {key}={value}, a logit transform that redit-fast does not know")
    scale = 1.0
    for key in _SCALE_KEYS:
        if values.get(key) is not None:
            scale *= float(values[key])
    if values.get("logits_scaling") is not None:
        factor = float(values["logits_scaling"])
        scale = scale * factor if values.get("model_type") == "hyperclovax" else scale / factor
    return {"logit_scale": scale, "softcap": values.get("final_logit_softcapping")}
