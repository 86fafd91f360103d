"""Whether two runs of `redit-fast bench` on one machine agree: python -m tools.overlap FIRST.json .. -- SECOND.json ..

Prints the share of ratios whose intervals, 10th to 90th percentile, have a point in common, and the others.
Stores the second run's ratios, of which docs/benchmarks.md tells beside those of the run that it shows.
"""

import json
import sys
from pathlib import Path

STORED = Path(__file__).parent.parent / "benchmarks" / "results" / "cpu" / "again.json"
Ratios = dict[str, tuple[float, float]]


def ratios(results: dict) -> Ratios:
    """Suite, title, dtype, sizes and provider -> the interval of its time over ours."""
    found = {}
    for table in results["tables"]:
        of = (table["suite"], table["title"], table["dtype"], str(table["sizes"]))
        for row in table["rows"]:
            if row["times"] is not None:
                found[" | ".join((*of, row["name"]))] = (row["times_p10"], row["times_p90"])
    return found


def apart(first: Ratios, second: Ratios) -> list[str]:
    """The ratios of both runs whose intervals do not meet."""
    return [key for key in first.keys() & second.keys()
            if first[key][1] < second[key][0] or second[key][1] < first[key][0]]  # fmt: skip


def told(first: Ratios, second: Ratios) -> str:
    """The share that meets, of all and of each suite."""
    both, missed = first.keys() & second.keys(), apart(first, second)
    suites = sorted({key.split(" | ")[0] for key in both})
    each = []
    for suite in suites:
        count, off = (sum(key.startswith(f"{suite} | ") for key in keys) for keys in (both, missed))
        each.append(f"{suite} {count - off} of {count}")
    return f"{1 - len(missed) / len(both):.1%} of {len(both)} ratios ({', '.join(each)})"


def read(names: list[str]) -> tuple[Ratios, set[str]]:
    """The ratios of several files, and the commits that they were made at."""
    runs = [json.loads(Path(name).read_text()) for name in names]
    found = {key: value for run in runs for key, value in ratios(run).items()}
    return found, {run["machine"]["commit"] for run in runs}


def main() -> None:
    split = sys.argv.index("--")
    (first, _), (second, commits) = read(sys.argv[1:split]), read(sys.argv[split + 1 :])
    for key in sorted(apart(first, second)):
        print(key, first[key], second[key])
    print(told(first, second))
    (commit,) = commits
    STORED.write_text(json.dumps({"commit": commit, "ratios": second}, indent=1) + "\n")


if __name__ == "__main__":
    main()
