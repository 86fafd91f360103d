"""curves.png: the panels of a run in one picture."""

from __future__ import annotations

import math
from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from redit_fast.pictures import COLOURS, GREY
from redit_fast.training.report.panels import Panel, Section

COLUMNS, ROW = 3, 2.75  # inches
DASHES = (0, (2, 1.5))  # of a dashed line


def draw(sections: Sequence[Section], steps: int) -> Figure:
    """All panels, three in a row, over the steps up to `steps`."""
    panels = [panel for section in sections for panel in section.panels]
    rows = max(1, math.ceil(len(panels) / COLUMNS))
    figure = Figure(figsize=(11, ROW * rows))
    # By hand: a layout engine draws everything twice, 0.4 s.
    margin = 1 / (ROW * rows)
    figure.subplots_adjust(0.07, 0.45 * margin, 0.985, 1 - 0.3 * margin, wspace=0.28, hspace=0.28)
    for place, panel in enumerate(panels, 1):
        axes = figure.add_subplot(rows, COLUMNS, place)
        draw_panel(axes, panel)
        axes.set_xlim(0, max(1, steps) * 1.02)
        axes.xaxis.set_major_locator(MaxNLocator(4, integer=True, steps=[1, 2, 5, 10]))
        axes.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))
        if place + COLUMNS > len(panels):
            axes.set_xlabel("step")
        else:
            axes.tick_params(labelbottom=False)
    return figure


def draw_panel(axes: Axes, panel: Panel) -> None:
    """A panel's title, curves, mark, legend and limits, but for those across."""
    axes.set_title(panel.title)
    axes.set_ylabel(panel.unit)
    for curve in panel.curves:
        colour = COLOURS[curve.colour]
        if curve.low:
            axes.fill_between(curve.steps, curve.low, curve.high, color=colour, alpha=0.13, linewidth=0)
        axes.plot(
            curve.steps,
            curve.values,
            color=colour,
            label=curve.label.replace("_", " _", 1) if curve.label.startswith("_") else curve.label,  # else no legend
            linestyle=DASHES if curve.dashed else "-",
            linewidth=0.6 if curve.thin else None,
            alpha=0.5 if curve.thin else None,
            marker="o" if curve.dots or len(curve.values) == 1 else None,
            markersize=4,
            clip_on=False,
        )
    low, high = panel.limits()
    if panel.mark:
        level, words = panel.mark
        axes.axhline(level, color=GREY, linewidth=0.9, linestyle="--")
        axes.text(0.98, level, words, transform=axes.get_yaxis_transform(), ha="right", va="bottom", color=GREY)
    if labels := sum(bool(curve.label) for curve in panel.curves):
        room = 0.1 * math.ceil(labels / 2)
        high += room * (high - low) / (1 - room)
        axes.legend(loc="upper left", ncols=2, columnspacing=1, borderaxespad=0.1, handlelength=1.6)
    axes.set_ylim(low, high)
