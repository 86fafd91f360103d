"""The results as text of at most 100 columns."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from . import roofline

WIDTH = 100
NAME = 29  # columns
LEGEND = (
    "ms: median [10th, 90th percentile] from cold caches, which are emptied before each call; warm: once more on the "
    "same inputs, of calls below 0.1 s; floor: share of the least time that bytes and operations take here; MB: added "
    "by a call at its peak; errors: from float64; times: the time of a call over that of the first row. Whole "
    "steps: ro/sc/up: percent of rollout, scoring and update; tok/s: tokens of prompts and completions; MB: at the "
    "peak, above the process that has loaded its libraries; comp.: tokens that the policy computes outside the "
    "rollout, over those."
)
SMALL = (
    "At a tiny R eager code can be faster: besides the passes over the logits ours has a fixed cost of 200 to 400 "
    "small operators for its checks, the loss's options and the metrics, where the eager rows compute the bare loss."
)
DEALT = (
    "fullest: tokens that the rank with the most computes, over the ranks' mean; coll.: collectives that a rank takes "
    "part in; sent: MB that it sends in them at least; MB: at its peak, of the rank with the most; apart: the gradient "
    "from that of one process. Where the machine has fewer cores than ranks, ranks share cores: the times then say "
    "what dividing costs, not how it scales."
)
PHASES = ("rollout", "scoring", "update")
HEAD = (
    f"{'':{NAME}} {'ms':>7} {'[p10, p90]':<17}{'warm':>7} {'floor':>5} {'MB':>5} {{value:>8}} "
    f"{'gradient':>8} {'times':>6}"
)  # fmt: skip
STEP_HEAD = (
    f"{'':{NAME}} {'ms':>7} {'[p10, p90]':<17}{'ro/sc/up':>9} {'tok/s':>6} {'MB':>5} {'comp.':>5} {'gradient':>8} "
    f"{'times':>6}"
)


def of(table: Mapping[str, Any]) -> str:
    """One stored table: a line for each provider, sentences below the ones that have no number."""
    sizes = " ".join(f"{name}={value}" for name, value in table["sizes"].items())
    head = STEP_HEAD if table.get("tokens", 0) else HEAD.format(value=_short(table["value"]))
    lines = [f"{table['suite']}: {table['title']}, {table['dtype']}, {sizes}"[:WIDTH], head.rstrip()]
    for row in table["rows"]:
        lines += _line(row, table.get("tokens", 0))
    for sentence in warnings(table):
        lines += textwrap.wrap(f"! {sentence}", WIDTH)
    return "\n".join(lines)


def _line(row: Mapping[str, Any], tokens: int) -> Iterator[str]:
    errors = f"{_error(row['value_error']):>8} {_error(row['gradient_error']):>8}"
    if row["status"] != "measured":
        yield from textwrap.wrap(f"{row['name']:{NAME}} {row['note']}", WIDTH, subsequent_indent=" " * (NAME + 1))
        return
    spread = f"[{number(row['p10'])}, {number(row['p90'])}]"
    share = "" if row["share"] is None else f"{row['share']:.0%}"
    memory = "" if row["peak_mb"] is None else f"{max(row['peak_mb'], 0):.0f}"
    times = "" if row["times"] is None else f"{row['times']:.2f}"
    if tokens:
        yield (
            f"{row['name'][:NAME]:{NAME}} {number(row['ms']):>7} {spread:<17}{shares(row):>9} "
            f"{1e3 * tokens / row['ms']:>6.0f} {memory:>5} {row['computed'] / tokens:>5.2f} "
            f"{_error(row['gradient_error']):>8} {times:>6}"
        ).rstrip()
        return
    yield (
        f"{row['name'][:NAME]:{NAME}} {number(row['ms']):>7} {spread:<17}{number(row['warm_ms']):>7} {share:>5} "
        f"{memory:>5} {errors} {times:>6}"
    ).rstrip()


def shares(row: Mapping[str, Any]) -> str:
    """Of rollout, scoring and update in the time of a whole step, in percent."""
    total = sum(row["parts"].values())
    return "/".join(f"{100 * row['parts'].get(phase, 0) / total:.0f}" for phase in PHASES)


def warnings(table: Mapping[str, Any]) -> list[str]:
    """What is wrong with a table's model."""
    shares = [(row["name"], row["share"]) for row in table["rows"] if row["share"] is not None]
    return [f"{name}: {said}" for name, share in shares if (said := roofline.sentence(share))]


def dealt(tables: Sequence[Mapping[str, Any]]) -> str:
    """A line for each provider of a step that ranks share, at each number of ranks."""
    head = f"ranks: {tables[0]['title']}"
    lines = [f"{head:34} {'ms':>7} {'[p10, p90]':<17} {'fullest':>7} {'coll.':>5} {'sent':>5} {'MB':>5} "
             f"{'apart':>6} {'times':>6}"]  # fmt: skip
    for stored in tables:
        for row in stored["rows"]:
            name = f"{stored['sizes']['ranks']} {row['name']}"
            if row["status"] != "measured":
                lines += textwrap.wrap(f"{name:34} {row['note']}", WIDTH, subsequent_indent=" " * 35)
                continue
            of, spread = row["dealt"], f"[{number(row['p10'])}, {number(row['p90'])}]"
            times = "" if row["times"] is None else f"{row['times']:.2f}"
            memory = "" if row["peak_mb"] is None else f"{row['peak_mb']:.0f}"
            lines.append(
                f"{name[:34]:34} {number(row['ms']):>7} {spread:<17} {of['fullest']:>7.2f} {of['collectives']:>5} "
                f"{of['sent_mb']:>5.1f} {memory:>5} {_error(row['ranks_error']):>6} {times:>6}".rstrip()
            )
    return "\n".join([*lines, *textwrap.wrap(DEALT, WIDTH)])


def growth(entries: Sequence[Mapping[str, Any]]) -> str:
    """The slopes of each series: time and memory grow with that power of the size."""
    head = "growth: the power of the size, [95 % interval]"
    lines = [f"{head:58} {'time':20} memory"]
    for entry in entries:
        sizes = f"{entry['size'][0]}..{entry['size'][-1]}"
        what = f"{entry['suite']} {entry['axis']}={sizes}: {entry['name']}"
        lines.append(f"{what[:58]:58} {power(entry['time_slope']):20} {power(entry['memory_slope'])}".rstrip())
    small = any(entry["axis"] == "R" for entry in entries)
    return "\n".join([*lines, *(textwrap.wrap(SMALL, WIDTH) if small else [])])


def power(slope: Sequence[float] | None) -> str:
    return "-" if slope is None else f"{slope[0]:.2f} [{slope[1]:.2f}, {slope[2]:.2f}]"


def number(ms: float | None) -> str:
    """Three digits."""
    if ms is None:
        return ""
    return f"{ms:.0f}" if ms >= 100 else f"{ms:.1f}" if ms >= 10 else f"{ms:.2f}" if ms >= 0.1 else f"{ms:.4f}"


def _error(value: float | None) -> str:
    return "-" if value is None else f"{value:.0e}"


def _short(value: str) -> str:
    return value if len(value) <= 8 else value[:8]


def legend() -> str:
    return "\n".join(textwrap.wrap(LEGEND, WIDTH))


def machine(card: Mapping[str, Any], speeds: Mapping[str, float]) -> str:
    """The machine card."""
    gpu = [f"GPU: {', '.join(card['gpu'].values())}"] if card["gpu"] else []
    caches = ", ".join(f"{name} {size}" for name, size in card["caches"].items())
    peers = ", ".join(f"{name} {found}" for name, found in card["peers"].items())
    ways = ", ".join(f"{way} {speed:.0f}" for way, speed in speeds.items() if not way.endswith("products"))
    products = ", ".join(f"{way} {speed:.0f}" for way, speed in speeds.items() if way.endswith("products"))
    lines = [
        f"CPU: {card['cpu']}, {card['cores']} cores, {card['threads']} threads; {caches}",
        *gpu,
        f"redit-fast {card['redit-fast']}, commit {card['commit'] or 'unknown'}",
        f"Python {card['python']}, torch {card['torch']}, {peers}",
        f"clock: {card['clock']}",
        f"best GB/s: {ways}; best GFLOP/s: {products}",
    ]
    return "\n".join(line for text in lines for line in textwrap.wrap(text, WIDTH, subsequent_indent="  "))
