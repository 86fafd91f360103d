"""The pictures of a run, drawn without pyplot: time and memory over the size, shares of the roofline."""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullFormatter, NullLocator

from redit_fast.pictures import BLUE, GREEN, GREY, ORANGE, STYLE

from .table import PHASES

COLUMNS = 3
AXES = {"R": "scored tokens", "V": "vocabulary", "D": "width", "W": "parameters", "P": "prompts", "ranks": "processes"}
COLOURS = (ORANGE, GREEN, "#7d6b91", "#b5915a", "#5aa0b5", "#a15c6b")


def draw(results: Mapping[str, Any]) -> dict[str, bytes]:
    """File name -> PNG, of what the results have."""
    pictures = {}
    over_rows = [entries for entries in _by_series(results["growth"]) if entries[0]["axis"] == "R"]
    others = [entries for entries in _by_series(results["growth"]) if entries[0]["axis"] != "R"]
    with rc_context(STYLE):
        if over_rows:
            pictures["time.png"] = _png(_panels(over_rows, "ms"))
            pictures["memory.png"] = _png(_panels(over_rows, "peak_mb"))
        if others:
            pictures["growth.png"] = _png(_panels(others, "ms"))
        whole = [table for table in results["tables"] if not table["axis"] and _measured(table)]
        steps = [table for table in whole if table.get("tokens", 0)]
        if steps:
            pictures["steps.png"] = _png(_steps(steps))
        tables = [table for table in whole if not table.get("tokens", 0)]
        if tables:
            pictures["roofline.png"] = _png(_shares(tables))
    return pictures


def _png(figure: Figure) -> bytes:
    drawn = io.BytesIO()
    figure.savefig(drawn, format="png", dpi=130)
    return drawn.getvalue()


def _by_series(growth: Sequence[Mapping[str, Any]]) -> list[list[Mapping[str, Any]]]:
    found: dict[tuple[str, str, str], list[Mapping[str, Any]]] = {}
    for entry in growth:
        found.setdefault((entry["suite"], entry["title"], entry["axis"]), []).append(entry)
    return list(found.values())


def _grid(count: int, height: float) -> tuple[Figure, Iterator[Axes]]:
    """A figure with that many panels, three in a row."""
    columns = min(count, COLUMNS)
    rows = -(-count // columns)
    figure = Figure(figsize=(4.2 * columns, height * rows), layout="constrained")
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for unused in axes[count:]:
        unused.remove()
    return figure, iter(axes)


def _panels(all_series: list[list[Mapping[str, Any]]], what: str) -> Figure:
    """Both axes logarithmic: time with the floor as a line, or memory."""
    figure, panels = _grid(len(all_series), 3.9)
    for entries, axes in zip(all_series, panels, strict=False):
        colours = iter(COLOURS * 3)
        for entry in entries:
            colour = BLUE if entry is entries[0] else next(colours)
            slope = entry["time_slope" if what == "ms" else "memory_slope"]
            power = "" if slope is None else f", power {slope[0]:.2f}"
            points = [(x, y) for x, y in zip(entry["size"], entry[what], strict=True) if y]
            if len(points) >= 2:
                axes.plot(*zip(*points, strict=True), "o-", color=colour, markersize=3, label=entry["name"] + power)
        if what == "ms":
            axes.plot(entries[0]["size"], entries[0]["floor_ms"], color=GREY, linestyle="--", label="floor")
        axis = entries[0]["axis"]
        axes.set_title(f"{entries[0]['suite']}: {entries[0]['title']}, {axis} grows", fontsize=8)
        axes.set_xlabel(f"{axis}: {AXES.get(axis, axis)}")
        axes.set_ylabel("ms" if what == "ms" else "MB added by a call")
        axes.set_xscale("log")
        axes.set_yscale("log")
        sizes = entries[0]["size"]
        axes.xaxis.set_major_locator(FixedLocator(sizes))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_xticklabels([_short(size) for size in sizes])
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 3)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
        if axes.lines:
            axes.legend(fontsize=6.5, loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=2, columnspacing=1)
    return figure


def _short(size: int) -> str:
    return f"{size / 1e6:.2g}M" if size >= 1e6 else f"{size / 1e3:g}k" if size >= 10_000 else str(size)


def _measured(table: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return [row for row in table["rows"] if row["share"] is not None]


def _shares(tables: Sequence[Mapping[str, Any]]) -> Figure:
    """Bars: how much of the roofline each provider reaches."""
    most = max(len(_measured(table)) for table in tables)
    figure, panels = _grid(len(tables), 0.9 + 0.24 * most)
    for table, axes in zip(tables, panels, strict=False):
        rows = _measured(table)
        colours = [BLUE if row["ours"] else GREY for row in rows]
        axes.barh(range(len(rows)), [100 * row["share"] for row in rows], color=colours, height=0.7)
        axes.set_yticks(range(len(rows)), [row["name"] for row in rows], fontsize=7)
        axes.set_ylim(most - 0.4, -0.6)
        axes.grid(axis="y", visible=False)
        axes.grid(axis="x")
        axes.axvline(100, color=ORANGE, linewidth=0.9, linestyle="--")
        axes.set_xlim(0, max(105, *(105 * row["share"] for row in rows)))
        axes.set_xlabel("% of the roofline")
        axes.set_title(f"{table['title']}, {table['dtype']}", fontsize=8)
    return figure


def _steps(tables: Sequence[Mapping[str, Any]]) -> Figure:
    """Bars: the phases of a whole step, one behind the other."""
    most = max(len(_measured(table)) for table in tables)
    figure, panels = _grid(len(tables), 0.9 + 0.24 * most)
    for table, axes in zip(tables, panels, strict=False):
        rows = _measured(table)
        ends = [0.0] * len(rows)
        for phase, colour in zip(PHASES, (GREEN, ORANGE, BLUE), strict=True):
            lengths = [row["parts"].get(phase, 0.0) / 1e3 for row in rows]
            axes.barh(range(len(rows)), lengths, left=ends, color=colour, height=0.7, label=phase)
            ends = [end + length for end, length in zip(ends, lengths, strict=True)]
        axes.set_yticks(range(len(rows)), [row["name"] for row in rows], fontsize=7)
        axes.set_ylim(most - 0.4, -0.6)
        axes.grid(axis="y", visible=False)
        axes.grid(axis="x")
        axes.set_xlabel("seconds")
        axes.set_title(table["title"], fontsize=8)
    next(iter(figure.axes)).legend(fontsize=6.5)
    return figure
