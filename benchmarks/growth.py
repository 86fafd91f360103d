"""How time and memory grow: slopes over the logarithms of a size."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

# Student's t at 97.5 %, by degrees of freedom: points less two
T = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306}


class Slope(NamedTuple):
    """Of log y over log x by least squares, and its 95 % interval: 1 is linear growth, 0 none."""

    value: float
    low: float
    high: float


def slope(sizes: Sequence[float], values: Sequence[float]) -> Slope:
    """Of at least three points, all above 0."""
    if len(sizes) != len(values) or not 3 <= len(sizes) <= len(T) + 2 or min(*sizes, *values) <= 0:
        raise ValueError(f"a slope needs 3 to {len(T) + 2} points above 0, got {sizes} and {values}")
    x, y = [math.log(size) for size in sizes], [math.log(value) for value in values]
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    spread = sum((a - mean_x) ** 2 for a in x)
    value = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True)) / spread
    rest = sum((b - mean_y - value * (a - mean_x)) ** 2 for a, b in zip(x, y, strict=True))
    reach = T[len(x) - 2] * math.sqrt(rest / (len(x) - 2) / spread)
    return Slope(value, value - reach, value + reach)


def series(tables: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """One entry for each provider of each series of stored tables: its sizes, times and memory, and the slopes."""
    found: dict[tuple[str, str, str, str], dict[str, Any]] = {}
    for table in tables:
        for row in table["rows"]:
            if table["axis"] and row["status"] == "measured":
                key = (table["suite"], table["title"], table["axis"], row["name"])
                names = dict(zip(("suite", "title", "axis", "name"), key, strict=True))
                entry = found.setdefault(
                    key, names | {"ours": row["ours"], "size": [], "ms": [], "peak_mb": [], "floor_ms": []}
                )
                for name, value in (("size", table["sizes"][table["axis"]]), ("ms", row["ms"]),
                                    ("peak_mb", row["peak_mb"]), ("floor_ms", table["floor_ms"])):  # fmt: skip
                    entry[name].append(value)
    for entry in found.values():
        entry["time_slope"] = _slope(entry["size"], entry["ms"])
        entry["memory_slope"] = _slope(entry["size"], entry["peak_mb"])
    return list(found.values())


def _slope(sizes: list[float], values: list[float | None]) -> Slope | None:
    """None where memory is too little to be seen, or not counted."""
    known = [value for value in values if value is not None and value > 0]
    return slope(sizes, known) if len(known) == len(sizes) >= 3 else None
