"""Whether two runs of `redit-fast bench` on one machine agree: python -m tools.overlap A/results.json B/results.json

The share of ratios whose intervals, from the 10th to the 90th percentile, have a point in common, and the others.
"""

import json
import sys
from pathlib import Path


def ratios(results: dict) -> dict[tuple[str, ...], tuple[float, float]]:
    """Suite, title, dtype, sizes and provider -> the interval of its time over ours."""
    found = {}
    for table in results["tables"]:
        of = (table["suite"], table["title"], table["dtype"], str(table["sizes"]))
        for row in table["rows"]:
            if row["times"] is not None:
                found[*of, row["name"]] = (row["times_p10"], row["times_p90"])
    return found


def apart(a: dict, b: dict) -> list[tuple[str, ...]]:
    """The ratios of both runs whose intervals do not meet."""
    first, second = ratios(a), ratios(b)
    return [key for key in first.keys() & second.keys()
            if first[key][1] < second[key][0] or second[key][1] < first[key][0]]  # fmt: skip


def main() -> None:
    a, b = (json.loads(Path(name).read_text()) for name in sys.argv[1:])
    found, both = apart(a, b), len(ratios(a).keys() & ratios(b).keys())
    for key in sorted(found):
        print(*key, ratios(a)[key], ratios(b)[key])
    print(f"{1 - len(found) / both:.1%} of {both} ratios overlap")


if __name__ == "__main__":
    main()
