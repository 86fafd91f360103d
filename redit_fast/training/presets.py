"""The defaults of a run that depend on what is trained, and the GR paper's."""

from __future__ import annotations

from typing import Literal

# The embedded demo (model: null), or a model of the user's.
DEMO = {
    "rewards": [f"redit_fast.training.builtin:{name}" for name in ("correct_answer", "right_steps", "answer_format")],
    "steps": 40,
    "warm_start_steps": 600,
    "eval_every": 8,
    "max_completion_length": 48,
    "learning_rate": 1e-4,
    "checkpoint_every": 8,
}
OWN_MODEL = {
    "steps": 500,
    "warm_start_steps": 0,
    "eval_every": 50,
    "max_completion_length": 256,
    "learning_rate": 5e-6,
    "checkpoint_every": 50,
}
# What the GR paper (arXiv 2602.18037) compares, with its learning rates; beta is that of its reasoning runs (kl) or the
# middle of the range that it tried on TL;DR, 0.2 to 0.4 (resets). Settings given beside a preset win.
PRESETS = {
    "grpo": {"learning_rate": 3e-6, "gr_gamma": 0.0},
    "kl": {"learning_rate": 3e-6, "gr_gamma": 0.0, "beta": 0.05},
    "resets": {"learning_rate": 3e-6, "gr_gamma": 0.0, "beta": 0.3, "reference_reset_every": 200},
    "gr": {"learning_rate": 5e-6, "gr_gamma": 1e-3, "gr_epsilon": 1e-3, "beta": 0.0},
}
Preset = Literal["grpo", "kl", "resets", "gr"]


def defaults_of(demo: bool, preset: object) -> dict:
    """What takes the place of a field's own default; a preset of a wrong type is refused with its field."""
    return {**(DEMO if demo else OWN_MODEL), **(PRESETS.get(preset, {}) if isinstance(preset, str) else {})}
