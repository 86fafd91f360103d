"""How settings name data: a data set of the hub, the columns that are read, the conventions of known sets."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

RESERVED = ("prompts", "completions")  # what reward functions call their other two arguments
HUB = re.compile(r"hub:([\w.-]+/[\w.-]+)(?:/([^/@\s]+))?(?:@([\w.]+))?")
BOX = re.compile(r"\\(?:boxed|fbox)(?![a-zA-Z])")
LATEX = re.compile(r"\\.|[{}]", re.DOTALL)  # a brace behind a backslash opens and closes nothing


class Hub(NamedTuple):
    """A data set of the Hugging Face hub."""

    name: str  # OWNER/NAME
    config: str | None
    split: str


def hub_of(source: str) -> Hub | None:
    """What `hub:OWNER/NAME`, also with /CONFIG and @SPLIT behind it, names; None: `source` is the path of a file.

    Raises:
        ValueError: it begins with hub: and is no such name.
    """
    if not source.startswith("hub:"):
        return None
    match = HUB.fullmatch(source)
    if match is None:
        raise ValueError(f"got {source!r}, needs hub:OWNER/NAME, hub:OWNER/NAME/CONFIG or one of them with @SPLIT")
    return Hub(match[1], match[2], match[3] or "train")


def names_of(columns: Sequence[str] | None, data_format: str | None) -> Mapping[str, str] | None:
    """{our name: the data's} of the columns that are read; None: all, by their own names.

    Args:
        columns: each NAME or NAME=COLUMN.
        data_format: a key of `FORMATS`.

    Raises:
        ValueError: one sentence, for columns that are no such pairs, that are there twice or lack the prompt.
    """
    if data_format is not None:
        return FORMATS[data_format].columns
    if columns is None:
        return None
    names: dict[str, str] = {}
    for item in columns:
        name, equals, column = item.partition("=")
        if not name or (equals and not column):
            raise ValueError(f"got {item!r}, needs NAME or NAME=COLUMN, such as prompt=question")
        if name in RESERVED:
            raise ValueError(f"got {item!r}, {name!r} is a reserved name, reward functions have an argument of it")
        if name in names:
            raise ValueError(f"got {name!r} twice, needs each name once")
        names[name] = column or name
    if "prompt" not in names:
        raise ValueError(f"got {' '.join(columns)}, needs the prompt too, such as prompt=question")
    return names


class Format(NamedTuple):
    """What a known set has in place of `prompt` and `answer`."""

    columns: Mapping[str, str]  # our name -> the set's
    answer: Callable[[str], str | None]  # of the column's text; None: it has none
    needs: str  # what that text lacks then


def _behind_hashes(text: str) -> str | None:
    """Without thousands separators and dollar signs, as the ReDit scripts compare it."""
    found = text.rpartition("####")
    return found[2].replace(",", "").replace("$", "").strip() or None if found[1] else None


def _boxed(text: str) -> str | None:
    r"""What the last \boxed or \fbox holds: between its braces, or without braces up to the next $."""
    start = max((match.end() for match in BOX.finditer(text)), default=None)
    if start is None:
        return None
    rest = text[start:].lstrip()
    if not rest.startswith("{"):
        return rest.partition("$")[0].strip() or None
    depth = 0
    for token in LATEX.finditer(rest):
        depth += {"{": 1, "}": -1}.get(token[0], 0)
        if depth == 0 and token[0] == "}":
            return rest[1 : token.start()].strip() or None
    return None


FORMATS = {
    "gsm8k": Format({"prompt": "question", "answer": "answer"}, _behind_hashes, "'####' with the answer behind it"),
    "math": Format({"prompt": "problem", "answer": "solution"}, _boxed, r"'\boxed{...}' with the answer in it"),
}
