"""The tables of docs/benchmarks.md and of the README, from bench.json, step.json and ranks.json in
benchmarks/results/cpu/, which `python -m tools.measure` writes. `python -m tools.tables` writes the pages, and a test
compares them."""

import json
from pathlib import Path
from typing import NamedTuple

from redit_fast.benchmarks import table
from tools import overlap

RESULTS = Path(__file__).parent.parent / "benchmarks" / "results" / "cpu"
BUDGETS = Path(__file__).parent.parent / "tests" / "budgets.json"
CLOCKS = {
    "perf_counter": "seconds, on a machine that did nothing else",
    "process_time": "CPU seconds of all threads, since other work ran beside them",
}
README = {"TRL, fused head": "TRL", "Liger, chunked loss": "Liger", "verl, torch head": "verl"}  # heads shown there


COLUMNS = ["times ours", "ms", "of the floor", "MB"]
STEP_COLUMNS = ["times ours", "ms", "% rollout / scoring / update", "tokens/s", "computed", "MB"]


class Goal(NamedTuple):
    """The time of `other` over ours is to be `least` or more."""

    suite: str
    title: str
    dtype: str
    other: str
    least: float


GOALS = (
    Goal("token_loss", "log-probs", "float32", "x.sum()", 1 / 1.4),
    Goal("token_loss", "log-probs", "bfloat16", "x.sum()", 1 / 1.7),
    Goal("token_loss", "loss and gradient", "float32", "TRL, selective_log_softmax", 15),
    Goal("linear_loss", "head: loss and gradients", "float32", "three products", 1 / 1.05),
    Goal("linear_loss", "head: loss and gradients", "bfloat16", "three products", 1 / 1.25),
    Goal("params", "step, gamma = 1 epsilon", "float32", "torch foreach, fused AdamW", 1.4),
    Goal("params", "step, gamma = 1 epsilon", "bfloat16", "torch foreach, fused AdamW", 1.7),
    Goal("advantages", "advantages", "float64", "TRL, GRPOTrainer's lines", 1),
    Goal("step", "step, lengths equal", "float32", "TRL", 4.8),
)


def results(name: str = "bench") -> dict:
    return json.loads((RESULTS / f"{name}.json").read_text())


def tables(suite: str) -> list[dict]:
    measured = results("step" if suite == "step" else "bench")["tables"]
    return [stored for stored in measured if stored["suite"] == suite and not stored["axis"]]


def machine(name: str = "bench") -> str:
    """What a run was measured on."""
    found = results(name)
    card, speeds = found["machine"], found["speeds"]
    caches = ", ".join(f"{name} {size}" for name, size in card["caches"].items())
    versions = {"redit-fast": card["redit-fast"], "Python": card["python"], "torch": card["torch"], **card["peers"]}
    products = {way.removesuffix(" products"): speed for way, speed in speeds.items() if way.endswith(" products")}
    moves = {way: speed for way, speed in speeds.items() if not way.endswith(" products")}
    lines = [
        ("processor", f"{card['cpu']}, {card['cores']} cores, {card['threads']} threads; {caches}"),
        ("versions", ", ".join(f"{name} {version}" for name, version in versions.items())),
        ("commit", f"`{card['commit']}`"),
        ("clock", CLOCKS[card["clock"]]),
        ("rounds", _rounds(found)),
        ("best GB/s", ", ".join(f"{way} {speed:.0f}" for way, speed in moves.items())),
        ("best GFLOP/s", ", ".join(f"{dtype} {speed:.0f}" for dtype, speed in products.items())),
    ]
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in lines)])


def _rounds(found: dict) -> str:
    """Of the rows that the page shows, and in how many blocks they were made."""
    counts: dict[str, int] = {}
    for stored in found["tables"]:
        if not stored["axis"] or stored["suite"] == "ranks":
            counts[stored["suite"]] = max(counts.get(stored["suite"], 0), *(row["n"] for row in stored["rows"]))
    blocks = "1 block" if set(counts) == {"ranks"} else f"{found['blocks']} blocks"
    return f"{', '.join(f'{suite} {count}' for suite, count in counts.items())}, in {blocks}"


def retest() -> str:
    """How far a second run of the same commands on the same machine agrees."""
    again = json.loads(overlap.STORED.read_text())
    first, commits = overlap.read([str(RESULTS / f"{name}.json") for name in ("bench", "step", "ranks")])
    where = "the same commits" if again["commits"] == commits else "other commits, which again.json names"
    return (
        f"Measured a second time on the same machines, at {where}: the intervals, 10th to 90th percentile, of "
        f"{overlap.told(first, again['ratios'])} have a point in common."
    )


def suite(name: str) -> str:
    """A table for each of its ops, with what is said of faster and of absent ones below."""
    parts = []
    for stored in tables(name):
        sizes = ", ".join(f"{letter} = {size:,}" for letter, size in stored["sizes"].items())
        row_of, columns = (_step, STEP_COLUMNS) if name == "step" else (_row, COLUMNS)
        lines = [
            f"**{stored['title']}, {stored['dtype']}**, {sizes}",
            "",
            f"| | {' | '.join(columns)} | error: {stored['value']} | error: gradient |",
            "|---" * (3 + len(columns)) + "|",
            *(row_of(row, stored) for row in stored["rows"] if row["status"] == "measured"),
        ]
        wrong = [f"- {row['name']}: {row['note']}" for row in stored["rows"] if row["status"] in ("wrong", "failed")]
        faster = [f"- {row['name']} is faster: {row['cause']}." for row in stored["rows"] if row["cause"]]
        parts.append("\n".join([*lines, *([""] if wrong or faster else []), *wrong, *faster]))
    return "\n\n".join(parts)


def _row(row: dict, stored: dict) -> str:
    return _cells(row, f"{row['share']:.0%}", _memory(row))


def _step(row: dict, stored: dict) -> str:
    speed, computed = 1e3 * stored["tokens"] / row["ms"], row["computed"] / stored["tokens"]
    return _cells(row, table.shares(row).replace("/", " / "), f"{speed:.0f}", f"{computed:.2f}", _memory(row))


def _memory(row: dict) -> str:
    return "" if row["peak_mb"] is None else f"{max(row['peak_mb'], 0):.0f}"


def _cells(row: dict, *own: str) -> str:
    times = "1" if row["times"] is None else f"{row['times']:.2f} [{row['times_p10']:.2f}, {row['times_p90']:.2f}]"
    errors = ["-" if row[name] is None else f"{row[name]:.0e}" for name in ("value_error", "gradient_error")]
    return f"| {' | '.join([row['name'], times, table.number(row['ms']), *own, *errors])} |"


def goals() -> str:
    """What the time of others over ours is to be, at each size, and what it is; ours as a share of the floor."""
    lines = ["| | goal | found | ours, of the floor | |", "|---|---|---|---|---|"]
    for goal in GOALS:
        for stored in tables(goal.suite):
            if (stored["title"], stored["dtype"]) == (goal.title, goal.dtype):
                times = next(row["times"] for row in stored["rows"] if row["name"] == goal.other)
                share = next(row["share"] for row in stored["rows"] if row["ours"])
                sizes = ", ".join(f"{letter} = {size:,}" for letter, size in stored["sizes"].items())
                cells = [f"{goal.title}, {goal.dtype}, {sizes}: {goal.other}", f"{goal.least:.3g}", f"{times:.3g}",
                         f"{share:.0%}", "met" if times >= goal.least else "missed"]  # fmt: skip
                lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def absent() -> str:
    """Who is not in the tables, and why."""
    found: dict[str, dict[str, None]] = {}
    for stored in [*results()["tables"], *results("step")["tables"]]:
        of = stored["title"].partition(", ")[0] if stored["suite"] == "step" else stored["suite"]
        for row in stored["rows"]:
            if row["status"] == "absent":
                found.setdefault(row["note"], {})[f"{row['name']} ({of})"] = None
    return "\n".join(f"- {', '.join(names)}: {reason}." for reason, names in found.items())


def step_clock() -> str:
    """How whole steps were timed, and where."""
    found = results("step")
    card, rows = found["machine"], [row for stored in found["tables"] for row in stored["rows"] if row["n"]]
    counts = sorted({row["n"] for row in rows})
    return (
        f"Measured on {card['cpu']}, {card['threads']} of {card['cores']} cores, in {CLOCKS[card['clock']]}; "
        f"{' to '.join(map(str, counts))} rounds, commit `{card['commit']}`."
    )


RANKS_COLUMNS = (
    "ranks", "", "times one process", "ms", "% rollout / scoring / update", "fullest", "collectives", "MB sent", "MB",
    "off one process", "error: log-prob", "error: gradient",
)  # fmt: skip


def ranks() -> str:
    """A step that 1, 2, ... processes share, and one process by itself beside them."""
    measured = results("ranks")["tables"]
    shown, refused = [], []
    for stored in measured:
        count = stored["sizes"]["ranks"]
        for row in stored["rows"]:
            if row["status"] != "measured":
                refused.append(f"- {count}: {row['name']}: {row['note']}")
                continue
            dealt, times = row["dealt"], "1"
            if row["times"] is not None:
                times = f"{row['times']:.2f} [{row['times_p10']:.2f}, {row['times_p90']:.2f}]"
            spread = f"{table.number(row['ms'])} [{table.number(row['p10'])}, {table.number(row['p90'])}]"
            off = "-" if row["ranks_error"] is None else f"{row['ranks_error']:.1e}"
            cells = [str(count), row["name"], times, spread, table.shares(row).replace("/", " / "),
                     f"{dealt['fullest']:.2f}", str(dealt["collectives"]), f"{dealt['sent_mb']:.1f}", _memory(row), off,
                     *(f"{row[f'{name}_error']:.0e}" for name in ("value", "gradient"))]  # fmt: skip
            shown.append(f"| {' | '.join(cells)} |")
    sizes = ", ".join(f"{letter} = {size:,}" for letter, size in measured[0]["sizes"].items() if letter != "ranks")
    head = [f"**{measured[0]['title']}, {measured[0]['dtype']}**, {sizes}", "", f"| {' | '.join(RANKS_COLUMNS)} |"]
    return "\n".join([*head, "|---" * len(RANKS_COLUMNS) + "|", *shown, *([""] if refused else []), *refused])


def ranks_run() -> str:
    """The card of a run of its own, and which of its rows share cores."""
    found = results("ranks")
    cores, most = found["machine"]["cores"], max(stored["sizes"]["ranks"] for stored in found["tables"])
    sharing = (
        f"**More than {cores} ranks share the {cores} cores: these rows show what dividing costs, not how it scales.**"
    )
    return "\n\n".join([machine("ranks"), *([sharing] if most > cores else [])])


COUNTED = {  # op in tests/budgets.json -> what it does here, elements that tests/budgets/instructions.cpp gives it
    "token_logp": ("log-probs and entropies from logits", 4 * 4099),
    "squared_norm": ("norm: reading, squaring, adding", 40_000),
}


def instructions() -> str:
    """By eight elements, which are one register of AVX2: callgrind's counts, which the tests compare."""
    counted = json.loads(BUDGETS.read_text())["instructions"]
    lines = ["| instructions for 8 elements, AVX2 | float32 | bfloat16 |", "|---|---|---|"]
    for op, (name, elements) in COUNTED.items():
        found = [counted[f"{op}, {dtype}, avx2"]["instructions"] for dtype in ("float32", "bfloat16")]
        lines.append(f"| {name} | {' | '.join(f'{8 * each / elements:.1f}' for each in found)} |")
    return "\n".join(lines)


def growth() -> str:
    """Slopes of ours and of the others."""
    lines = ["| | size | from | to | time | memory |", "|---|---|---|---|---|---|"]
    for entry in [*results()["growth"], *results("ranks")["growth"]]:
        cells = [f"{entry['suite']}: {entry['name']}", entry["axis"], f"{entry['size'][0]:,}", f"{entry['size'][-1]:,}",
                 table.power(entry["time_slope"]), table.power(entry["memory_slope"])]  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def readme() -> str:
    """The head in bfloat16: how many times as long as ours the others take, and every one's log-prob error."""
    (head,) = [stored for stored in tables("linear_loss") if stored["dtype"] == "bfloat16"]
    rows = {row["name"]: row for row in head["rows"]}
    main = head["rows"][0]
    lines = ["| head, bfloat16, CPU | times ours | log-prob error |", "|---|---|---|"]
    lines.append(f"| redit-fast | 1 | {main['value_error']:.0e} |")
    for name, short in README.items():
        error = rows[name]["value_error"]
        shown = "none given" if error is None else f"{error:.0e}"
        lines.append(f"| {short} | {rows[name]['times']:.1f} | {shown} |")
    return "\n".join(lines)
