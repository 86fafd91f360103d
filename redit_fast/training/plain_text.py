"""Plain text for a terminal."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Sequence

from redit_fast.training.report.page import SPELLED
from redit_fast.training.rewards import RewardFunction


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Columns, two spaces apart; a row may have fewer of them."""
    widths = [max(len(row[i]) for row in rows if i < len(row)) for i in range(max(map(len, rows)))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=False)).rstrip()
                     for row in rows)  # fmt: skip


def scored(functions: Sequence[RewardFunction], values: Iterable[float]) -> str:
    """The rewards of a completion."""
    each = zip(functions, values, strict=True)
    return ", ".join(f"{f.name} {'unscored' if math.isnan(value) else f'{value:g}'}" for f, value in each)


def visible(text: str) -> str:
    """Without characters that would move the cursor or that nobody sees: what a model wrote may have any."""
    return text.translate(SPELLED)


def say(text: str) -> None:
    """On stdout, also where its encoding lacks some of the characters.

    Raises:
        BrokenPipeError: whoever read it has gone.
    """
    encoding = sys.stdout.encoding or "utf-8"
    print(text.encode(encoding, "backslashreplace").decode(encoding), flush=True)
