"""What pydantic refuses, in one sentence, by the type and the context of its errors."""

from __future__ import annotations

import re
from typing import Any

from pydantic import ValidationError

from redit_fast.checks import described

NEEDS = {  # those that a setting can have once `config_values.check_as_meant` has seen it
    "int_type": "an integer",
    "int_parsing_size": "an integer",
    "float_type": "a number",
    "float_parsing": "a number",
    "finite_number": "a finite number",
    "greater_than": "a number greater than {gt}",
    "greater_than_equal": "a number greater than or equal to {ge}",
    "less_than": "a number less than {lt}",
    "less_than_equal": "a number less than or equal to {le}",
    "bool_type": "true or false",
    "string_type": "text",
    "string_unicode": "text without lone surrogates",
    "string_too_short": "text of at least {min_length} character",
    "list_type": "a list",
    "too_short": "at least {min_length} item",
    "literal_error": "{expected}",
}
MISSING = {  # of a field without a default
    "rewards": "training a model of your own needs at least one reward function",
    "model": "a reward model is made of a model, a causal LM or an older reward model: give one",
    "data": "a reward model is trained on pairs: give a file with prompt, chosen and rejected",
}


def first(error: ValidationError) -> tuple[str, str]:
    """The field that the first of the errors is about, and a sentence that begins with its name."""
    problem, *others = error.errors()
    if not problem["loc"]:  # a check across fields, whose sentence names them
        sentence = str(problem["ctx"]["error"])
        return sentence.partition(":")[0], sentence
    field, *items = place = _place(problem)
    if problem["type"] == "missing":
        return field, f"{field}: {MISSING[field]}"
    if problem["type"] == "value_error":  # of the config's own validators
        words = str(problem["ctx"]["error"])
    else:
        same = [problem, *(other for other in others if _place(other) == place)]  # a union has an error for each kind
        words = "needs " + " or ".join(dict.fromkeys(map(_needs, same)))
    return field, f"{field}{''.join(f'[{item}]' for item in items)}: got {_shown(problem['input'])}, {words}"


def _place(problem: Any) -> list:
    """The field and the item of a list; what else pydantic has there is a kind of a union."""
    field, *rest = problem["loc"]
    return [field, *(part for part in rest if isinstance(part, int))]


def _needs(problem: Any) -> str:
    if problem["type"] in NEEDS:
        return NEEDS[problem["type"]].format(**problem.get("ctx", {}))
    return f"another value ({problem['msg']})"  # of a pydantic that is newer than this table


def _shown(value: object) -> str:
    text = described(value) if isinstance(value, int | str) else repr(value)
    text = re.sub("(?<=://).*@", "***@", text)  # a password
    return text if len(text) <= 200 else f"{text[:200]}..."
