"""Whether two runs of `redit-fast bench` on one machine agree: python -m tools.overlap FIRST.json .. -- SECOND.json ..

Prints the share of ratios whose intervals, 10th to 90th percentile, have a point in common, and the others. With
--store, keeps the second run's ratios in the place of its suites', of which docs/benchmarks.md tells beside those of
the run that it shows.
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
    suites = sorted(set(map(suite_of, both)))
    each = []
    for suite in suites:
        count, off = (sum(suite_of(key) == suite for key in keys) for keys in (both, missed))
        each.append(f"{suite} {count - off} of {count}")
    return f"{1 - len(missed) / len(both):.1%} of {len(both)} ratios ({', '.join(each)})"


def suite_of(key: str) -> str:
    return key.split(" | ")[0]


def read(names: list[str]) -> tuple[Ratios, dict[str, str]]:
    """The ratios of several files, and the commit that each suite was measured at."""
    found: Ratios = {}
    commits: dict[str, str] = {}
    for name in names:
        run = json.loads(Path(name).read_text())
        found |= ratios(run)
        commits |= dict.fromkeys(map(suite_of, ratios(run)), run["machine"]["commit"])
    return found, commits


def main(words: list[str]) -> None:
    files = [word for word in words if word != "--store"]
    if files.count("--") != 1 or files[0] == "--" or files[-1] == "--":
        raise SystemExit("needs the files of two runs: python -m tools.overlap FIRST.json .. -- SECOND.json ..")
    split = files.index("--")
    (first, _), (second, commits) = read(files[:split]), read(files[split + 1 :])
    for key in sorted(apart(first, second)):
        print(key, first[key], second[key])
    print(told(first, second))
    if "--store" in words:
        stored = json.loads(STORED.read_text())
        kept = {key: interval for key, interval in stored["ratios"].items() if suite_of(key) not in commits}
        again = {"commits": stored["commits"] | commits, "ratios": kept | second}
        STORED.write_text(json.dumps(again, indent=1) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
