"""Which parameters gradient regularisation perturbs."""

from __future__ import annotations

import re

from torch import nn

from redit_fast.checks import check_module, described


def parameter_groups(model: nn.Module, perturb: str | re.Pattern = "decoder_layers") -> list[dict]:
    """Two parameter groups for an optimizer, with and without `perturb: True`.

    "decoder_layers" perturbs what lies inside the model's module lists (attention, MLP and norms of the layers), not
    embedding, head or final norm, as the GR paper does; anything else is a regular expression searched in parameter
    names.

    Raises:
        ValueError, TypeError: no trainable parameter matches, or an argument that does not fit, naming it.
    """
    check_module("model", model)
    if not isinstance(perturb, str | re.Pattern):
        raise TypeError(f"perturb must be 'decoder_layers' or a regular expression, got {described(perturb)}")
    if perturb == "decoder_layers":
        lists = tuple(f"{name}." for name, module in model.named_modules() if isinstance(module, nn.ModuleList))

        def matches(name: str) -> bool:
            return name.startswith(lists)
    else:
        try:
            pattern = re.compile(perturb)
        except re.error as error:
            raise ValueError(f"perturb must be a regular expression, got {perturb!r}: {error}") from None

        def matches(name: str) -> bool:
            return pattern.search(name) is not None

    trainable = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    chosen = [p for name, p in trainable if matches(name)]
    if not chosen:
        raise ValueError(f"perturb={perturb!r} matches none of the {len(trainable)} trainable parameters")
    others = [p for name, p in trainable if not matches(name)]
    groups = [{"params": chosen, "perturb": True}, {"params": others, "perturb": False}]
    return [group for group in groups if group["params"]]
