"""Parameter groups: which of them gradient regularisation perturbs, what a group and a saved state must hold."""

from __future__ import annotations

import re

from torch import nn

from redit_fast.checks import check_flag, check_module, described, positive, whole_number

COUNTERS = "gradient_regularizer"  # in the first parameter group of a state: `TwoPass.state_dict`


def parameter_groups(model: nn.Module, perturb: str | re.Pattern = "decoder_layers") -> list[dict]:
    """Two parameter groups for an optimizer, with and without `perturb: True`.

    "decoder_layers" perturbs what lies inside the model's module lists (attention, MLP and norms of the layers), not
    embedding, head or final norm, as the GR paper does; anything else is a regular expression searched in parameter
    names.

    Raises:
        ValueError, TypeError: no trainable parameter matches, or an argument that does not fit, naming it.
    """
    check_module("model", model)
    of_str = isinstance(perturb, re.Pattern) and isinstance(perturb.pattern, str)
    if not (isinstance(perturb, str) or of_str):
        got = repr(perturb) if isinstance(perturb, re.Pattern) else described(perturb)
        raise TypeError(f"perturb must be 'decoder_layers' or a regular expression of str, got {got}")
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


def check_group(name: str, group: dict) -> None:
    if "params" not in group:
        raise ValueError(f"{name} must hold its parameters as 'params', got a dict of {_keys(group)}")


def check_state(state_dict: object) -> None:
    """An optimizer's state_dict: its groups and the state of each parameter."""
    wanted = "state_dict must be what an optimizer's state_dict() gave"
    if not isinstance(state_dict, dict):
        raise TypeError(f"{wanted}, got {described(state_dict)}")
    groups, state = state_dict.get("param_groups"), state_dict.get("state")
    if not isinstance(groups, list) or not isinstance(state, dict):
        raise ValueError(f"{wanted}, with a list 'param_groups' and a dict 'state', got a dict of {_keys(state_dict)}")
    if not groups or not all(isinstance(group, dict) and isinstance(group.get("params"), list) for group in groups):
        raise ValueError(f"{wanted}, but not each of its {len(groups)} 'param_groups' is a dict with a list 'params'")
    for group in groups:
        check_flag("perturb of a parameter group in state_dict", group.get("perturb", True))
    for i, values in state.items():
        if not isinstance(values, dict):
            raise TypeError(f"{wanted}, but its state of parameter {i} is no dict, got {described(values)}")


def counters_in(state_dict: dict) -> dict:
    """What `TwoPass.state_dict` gave, in a state that `check_state` has seen; the first states had it beside the
    groups. Empty in a state of the wrapped optimizer alone."""
    counters = state_dict["param_groups"][0].get(COUNTERS, state_dict.get(COUNTERS, {}))
    if not isinstance(counters, dict):
        raise TypeError(f"{COUNTERS} in state_dict must be a dict, got {described(counters)}")
    for name, value in counters.items():
        what = f"{name} of {COUNTERS} in state_dict"
        if name in ("attempts", "completed", "skipped") or (name == "searched_at" and value is not None):
            whole_number(what, value)
        elif name == "epsilon":
            positive(what, value)
    return counters


def _keys(found: dict) -> str:
    return ", ".join(map(repr, found)) or "nothing"
