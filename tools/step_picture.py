"""The README's picture, docs/steps.png, and the tables of a training step: python -m tools.step_picture

From the suites step and apply in benchmarks/results/cpu/{step,bench}.json, and from apply_hosts.json, which `python -m
tools.measure` writes. A test compares picture and pages with them.
"""

import io
import json
from pathlib import Path

from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.ticker import MultipleLocator

from redit_fast.pictures import BLUE, GREY, STYLE

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "cpu"
PICTURE = ROOT / "docs" / "steps.png"
TITLE = "step without rollout, lengths equal"
NAMES = {  # of a row in the results -> how the pages call it
    "TRL, redit-fast": "TRL, redit-fast's head",
    "TRL": "TRL, its own head",
    "verl, redit-fast's head": "verl, redit-fast's head",
    "verl, its torch head": "verl, its own fused head",
    "verl, logits": "verl, without a fused head",
    "redit-fast, apply_to": "supervised step, under apply_to",
    "transformers, its own loss": "supervised step, transformers' own loss",
}
GR_NAMES = {"TRL, redit-fast, packing": "TRL, redit-fast's head, packing",
            "TRL, redit-fast, packing, GR": "TRL, redit-fast's head, packing, GR",
            "verl, redit-fast's head, GR": "verl, redit-fast's head, GR"}  # fmt: skip
SETTING = "A model of four layers of width 128 with a vocabulary of 50 thousand, in float32"


def rows(host: str, names: dict[str, str] = NAMES) -> list[dict]:
    """The rows of one host that have a number: TRL, verl, or apply for the supervised step."""
    file, title = ("bench", "supervised step") if host == "apply" else ("step", TITLE)
    stored = json.loads((RESULTS / f"{file}.json").read_text())["tables"]
    (table,) = [found for found in stored if found["title"] == title and not found["axis"]]
    found = {row["name"]: row for row in table["rows"] if row["status"] == "measured"}
    return [
        {**found[name], "name": shown}
        for name, shown in names.items()
        if name in found and (host == "apply" or name.startswith(host))
    ]


def megabytes(row: dict) -> float:
    """What is held, and what a call adds to it at its peak; of whole steps the peak has both."""
    return max(row["held_mb"] or 0, 0) + row["peak_mb"]  # below 0: an earlier provider's memory was freed meanwhile


def unit(name: str) -> str:
    """Of the times in a file of results."""
    machine = json.loads((RESULTS / f"{name}.json").read_text())["machine"]
    threads = "one thread" if machine["threads"] == 1 else "all threads"
    return f"CPU seconds of {threads}" if machine["clock"] == "process_time" else "seconds"


def table(host: str, names: dict[str, str] = NAMES) -> str:
    """Milliseconds and megabytes of the steps of a host."""
    file = "bench" if host == "apply" else "step"
    return "\n".join(["| | ms | MB |", "|---|---|---|", *(_line(row["name"], row, file) for row in rows(host, names))])


def apply_table() -> str:
    """The modes of `apply_to`."""
    tables = json.loads((RESULTS / "apply_hosts.json").read_text())["tables"]
    lines = [_line(f"{found['title']}: {row['name']}", row, "apply_hosts") for found in tables for row in found["rows"]]
    return "\n".join(["| | ms | MB |", "|---|---|---|", *lines])


def _line(name: str, row: dict, file: str) -> str:
    cpu = " of CPU time" if unit(file) != "seconds" else ""
    return f"| {name} | {row['ms']:.0f}{cpu} | {megabytes(row):.0f} |"


def shown() -> list[dict]:
    """The bars of the picture from top to bottom: name, seconds with their tenth and ninetieth percentile, MB."""
    return [
        {"name": row["name"], "s": row["ms"] / 1e3, "p10": row["p10"] / 1e3, "p90": row["p90"] / 1e3,
         "mb": megabytes(row)}
        for host in ("TRL", "verl") for row in rows(host)
    ]  # fmt: skip


def figure() -> Figure:
    bars = shown()
    places = [i + 0.6 * bar["name"].startswith("verl") for i, bar in enumerate(bars)]  # a gap between the hosts
    colours = [BLUE if "redit-fast" in bar["name"] else GREY for bar in bars]
    drawn = Figure(figsize=(9, 2.9))
    drawn.subplots_adjust(0.205, 0.255, 0.985, 0.9, wspace=0.07)
    time, memory = drawn.subplots(1, 2, sharey=True)
    seconds = [bar["s"] for bar in bars]
    time.barh(places, seconds, color=colours, height=0.72)
    reach = [[bar["s"] - bar["p10"] for bar in bars], [bar["p90"] - bar["s"] for bar in bars]]
    time.errorbar(seconds, places, xerr=reach, fmt="none", ecolor="#1d2226", elinewidth=1, capsize=2)
    memory.barh(places, [bar["mb"] for bar in bars], color=colours, height=0.72)
    for place, bar in zip(places, bars, strict=True):
        time.annotate(f"{bar['s']:.2f}", (bar["p90"], place), (5, 0), textcoords="offset points", va="center")
        memory.annotate(f"{bar['mb']:.0f}", (bar["mb"], place), (5, 0), textcoords="offset points", va="center")
    time.set_title("Time of one training step")
    time.set_xlabel(f"{unit('step')}: median, 10th to 90th percentile")
    memory.set_title("Peak memory of one training step")
    memory.set_xlabel("MB, with the model")
    time.set_yticks(places, [bar["name"] for bar in bars])
    for axes in (time, memory):
        axes.grid(axis="y", visible=False)
        axes.grid(axis="x")
        axes.tick_params(axis="y", length=0)
        axes.set_xlim(0, axes.get_xlim()[1] * 1.1)  # room for the numbers
    memory.xaxis.set_major_locator(MultipleLocator(1000))
    time.invert_yaxis()
    drawn.text(0.985, 0.03, SETTING, ha="right", color=GREY, fontsize=8.5)
    return drawn


def draw() -> bytes:
    """The picture, with its numbers as its description: its bytes are matplotlib's and its fonts'."""
    picture = io.BytesIO()
    with rc_context(STYLE):
        figure().savefig(picture, format="png", dpi=150, metadata={"Description": json.dumps(shown())})
    return picture.getvalue()


if __name__ == "__main__":
    PICTURE.write_bytes(draw())
