"""How the pictures of runs, benchmarks and pages look; for matplotlib's `rc_context`."""

from __future__ import annotations

from typing import Any

BLUE, ORANGE, GREEN, GREY = "#33658a", "#c8743c", "#4f8a68", "#8b929a"
COLOURS = {"blue": BLUE, "orange": ORANGE, "green": GREEN, "grey": GREY, "purple": "#7d6b91"}
STYLE: dict[Any, Any] = {
    "font.size": 9,
    "axes.titlesize": 9.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 8,
    "axes.labelcolor": "#4a525a",
    "axes.edgecolor": "#9aa1a8",
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "grid.color": "#e4e7ea",
    "grid.linewidth": 0.8,
    "axes.axisbelow": True,
    "xtick.color": "#4a525a",
    "ytick.color": "#4a525a",
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "lines.linewidth": 1.6,
    "text.parse_math": False,  # a run may be called $x$
}
