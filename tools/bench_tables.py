"""The tables of docs/benchmarks.md and of the README, from benchmarks/results/cpu/bench.json, which
`python -m tools.measure` writes. `python -m tools.tables` writes the pages, and a test compares them."""

import json
from pathlib import Path

from redit_fast.benchmarks import table

RESULTS = Path(__file__).parent.parent / "benchmarks" / "results" / "cpu"
CLOCKS = {
    "perf_counter": "seconds, on a machine that did nothing else",
    "process_time": "CPU seconds of all threads, since other work ran beside them",
}
README = {  # row of the README's table -> suite, title, dtype, our provider, the others
    "log-probs from logits": ("token_loss", "log-probs", "bfloat16", "TRL, selective_log_softmax"),
    "loss and its gradient from logits": ("token_loss", "loss and gradient", "bfloat16", "TRL, selective_log_softmax"),
    "head: loss and gradients from hidden states": (
        "linear_loss", "head: loss and gradients", "bfloat16", "TRL, fused head", "Liger, chunked loss", "verl, torch head",
        "PyTorch, eager",
    ),
    "AdamW step with GR": ("params", "step, gamma = 1 epsilon", "float32", "torch foreach, fused AdamW"),
    "supervised step of a model": ("apply", "supervised step", "float32", "transformers, its own loss"),
    "group advantages": ("advantages", "advantages", "float64", "TRL, eager lines"),
}  # fmt: skip


def results() -> dict:
    return json.loads((RESULTS / "bench.json").read_text())


def tables(suite: str) -> list[dict]:
    return [stored for stored in results()["tables"] if stored["suite"] == suite and not stored["axis"]]


def machine() -> str:
    """What it was measured on."""
    found = results()
    card, speeds = found["machine"], found["speeds"]
    caches = ", ".join(f"{name} {size}" for name, size in card["caches"].items())
    versions = {"Python": card["python"], "torch": card["torch"], **card["peers"]}
    ways = ("read", "update", "copy", "copy_")
    lines = [
        ("processor", f"{card['cpu']}, {card['cores']} cores, {card['threads']} threads; {caches}"),
        ("versions", ", ".join(f"{name} {version}" for name, version in versions.items())),
        ("commit", f"`{card['commit']}`"),
        ("clock", CLOCKS[card["clock"]]),
        ("best GB/s", ", ".join(f"{way} {speeds[way]:.0f}" for way in ways)),
        ("best GFLOP/s", ", ".join(f"{way.removesuffix(' products')} {speed:.0f}" for way, speed in speeds.items()
                                   if way not in ways)),
    ]  # fmt: skip
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in lines)])


def suite(name: str) -> str:
    """A table for each of its ops, with what is said of faster and of absent ones below."""
    parts = []
    for stored in tables(name):
        sizes = ", ".join(f"{letter} = {size:,}" for letter, size in stored["sizes"].items())
        lines = [
            f"**{stored['title']}, {stored['dtype']}**, {sizes}",
            "",
            f"| | times ours | ms | of the floor | MB | {stored['value']} error | gradient error |",
            "|---|---|---|---|---|---|---|",
            *(_row(row) for row in stored["rows"] if row["status"] == "measured"),
        ]
        wrong = [f"- {row['name']}: {row['note']}" for row in stored["rows"] if row["status"] in ("wrong", "failed")]
        faster = [f"- {row['name']} is faster: {row['cause']}." for row in stored["rows"] if row["cause"]]
        parts.append("\n".join([*lines, *([""] if wrong or faster else []), *wrong, *faster]))
    return "\n\n".join(parts)


def _row(row: dict) -> str:
    times = "1" if row["times"] is None else f"{row['times']:.2f} [{row['times_p10']:.2f}, {row['times_p90']:.2f}]"
    memory = "" if row["peak_mb"] is None else f"{max(row['peak_mb'], 0):.0f}"
    errors = ["-" if row[name] is None else f"{row[name]:.0e}" for name in ("value_error", "gradient_error")]
    cells = [row["name"], times, table.number(row["ms"]), f"{row['share']:.0%}", memory, *errors]
    return f"| {' | '.join(cells)} |"


def absent() -> str:
    """Who is not in the tables, and why."""
    found: dict[str, dict[str, None]] = {}
    for stored in results()["tables"]:
        for row in stored["rows"]:
            if row["status"] == "absent":
                found.setdefault(row["note"], {})[f"{row['name']} ({stored['suite']})"] = None
    return "\n".join(f"- {', '.join(names)}: {reason}." for reason, names in found.items())


def growth() -> str:
    """Slopes of ours and of the others."""
    lines = ["| | size | from | to | time | memory |", "|---|---|---|---|---|---|"]
    for entry in results()["growth"]:
        cells = [f"{entry['suite']}: {entry['name']}", entry["axis"], f"{entry['size'][0]:,}", f"{entry['size'][-1]:,}",
                 table.power(entry["time_slope"]), table.power(entry["memory_slope"])]  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def readme() -> str:
    """How many times as long as ours each takes; a group's largest size."""
    lines = ["| op, on two CPU threads | time over redit-fast's | log-prob error, ours |", "|---|---|---|"]
    for what, (name, title, dtype, *others) in README.items():
        stored = [found for found in tables(name) if (found["title"], found["dtype"]) == (title, dtype)][-1]
        rows = {row["name"]: row for row in stored["rows"]}
        main = next(row for row in stored["rows"] if row["ours"])
        errors = stored["value"] == "log-prob"
        shown = []
        for other in others:
            error = f" (error {rows[other]['value_error']:.0e})" if errors and rows[other]["value_error"] else ""
            shown.append(f"{other} {rows[other]['times']:.1f}{error}")
        lines.append(f"| {what}, {dtype} | {', '.join(shown)} | {main['value_error']:.0e} |" if errors
                     else f"| {what}, {dtype} | {', '.join(shown)} | |")  # fmt: skip
    return "\n".join(lines)
