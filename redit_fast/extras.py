"""What the extras of `pip install` bring: asked for before anything of it is imported."""

from __future__ import annotations

from importlib.util import find_spec

MODULES = {  # extra of pyproject.toml -> what the code under it imports
    "train": (
        "transformers", "huggingface_hub", "httpx2", "safetensors", "yaml", "pydantic", "jinja2", "rich", "matplotlib",
    ),
    "data": ("pyarrow", "datasets"),
    "lora": ("peft",),
    "math": ("math_verify",),
    "tensorboard": ("tensorboard",),
    "wandb": ("wandb",),
    "trackio": ("trackio",),
    "transformers": ("transformers",),
    "trl": ("trl", "transformers"),
    "verl": ("verl",),
    "bench": ("jinja2", "matplotlib"),  # what it measures may be missing
}  # fmt: skip


class MissingExtra(ModuleNotFoundError):
    """One sentence: what is not installed, and what to type."""


def need(extra: str, user: str) -> None:
    """`user` is what cannot go on without the packages of `extra`.

    Raises:
        MissingExtra: a package is not installed.
    """
    missing = [name for name in MODULES[extra] if find_spec(name) is None]
    if missing:
        raise MissingExtra(
            f'{user} needs {", ".join(missing)}, not installed here; run `pip install "redit-fast[{extra}]"`'
        )
