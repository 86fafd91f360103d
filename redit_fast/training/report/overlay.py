"""`redit-fast plot`: several runs in one picture. Runs that differ in their seed and name alone are one curve, the
mean, in a band from the least to the greatest of them."""

from __future__ import annotations

import difflib
import io
import json
import math
import os
import textwrap
from bisect import bisect_left
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any, Literal, NamedTuple

from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from redit_fast.known_names import under_new_names
from redit_fast.pictures import COLOURS, GREY, STYLE
from redit_fast.training import config_file, report
from redit_fast.training.config import TrainConfig, default_of
from redit_fast.training.report import curves, svg
from redit_fast.training.report.panels import POINTS, Colour, Curve, Panel, as_number

Across = Literal["steps", "tokens", "time"]
Points = list[tuple[float, float]]  # (where, value), of a run
USUAL = ("reward", "accuracy/held_out")
ALIKE = {"seed", "name", "out_dir"}  # settings in which the runs of a group may differ
MOST_SETTINGS = 3  # that a label tells of; beyond it has the run's name
LOOKS: list[tuple[Colour, bool]] = [
    (colour, dashed) for dashed in (False, True) for colour in ("blue", "orange", "green", "purple", "grey")
]
FORMATS = {".png", ".svg", ".pdf"}
FEW = 30  # values, each of which has a dot
COLUMNS, WIDTH, HEIGHT = 3, 4.4, 2.9  # of panels, inches
LINE, CHARACTER = 0.21, 0.07  # of the legend, inches
UNITS = (("seconds", 1.0, 300.0), ("minutes", 60.0, 300.0), ("hours", 3600.0, math.inf))  # up to so many


class Run(NamedTuple):
    folder: Path
    settings: dict[str, Any]
    metrics: list[dict]

    @property
    def keys(self) -> set[str]:
        """Of the metrics that have a number in one line at least."""
        return {name for row in self.metrics for name, value in row.items() if math.isfinite(as_number(value))}


@dataclass(frozen=True)
class Group:
    """Runs with the same settings but `ALIKE`."""

    label: str
    colour: Colour
    dashed: bool
    runs: list[Run]


def write(folders: Sequence[str | Path], out: Path, metrics: Sequence[str] = (), across: Across = "steps") -> Path:
    """Draws a panel for each metric, and returns `out`, which is replaced where it is there.

    Args:
        folders: of runs, which may be going on.
        out: a .png, .svg or .pdf file.
        metrics: keys of metrics.jsonl; by default those of `USUAL` that all runs have.

    Raises:
        ValueError: one sentence that names the run or the metric; nothing is written.
    """
    if out.suffix.lower() not in FORMATS:
        raise ValueError(f"--out is {str(out)!r}, needs a name that ends in {', '.join(sorted(FORMATS))}")
    runs = [_read(Path(folder)) for folder in {os.path.realpath(folder): folder for folder in folders}.values()]
    names = _metrics(runs, metrics)
    groups, (unit, size) = _groups(runs), _unit(runs, across)
    panels = [
        Panel(
            name,
            "",
            [curve for group in groups for curve in _curves(group, name, across, size)],
            bottom=0 if name.startswith("accuracy/") else None,
        )
        for name in names
    ]
    picture = io.BytesIO()
    with rc_context(STYLE):
        _figure(panels, groups, unit).savefig(picture, format=out.suffix.lower()[1:], dpi=150)
    draft = out.with_name(f".{out.name}.{os.getpid()}")
    try:
        draft.write_bytes(picture.getvalue())
        os.replace(draft, out)
    except OSError as error:
        with suppress(OSError):
            draft.unlink()
        raise ValueError(f"--out {out}: {error.strerror}: needs a file in a folder that is there") from None
    return out


def _read(folder: Path) -> Run:
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder} holds no run: it has no config.json")
    stored = under_new_names(config_file.read(folder / "config.json")[0])
    demo = stored.get("model") is None
    settings = {name: default_of(name, demo) for name in TrainConfig.model_fields} | stored  # older runs lack some
    metrics = report.metrics_of(folder)
    if not metrics:
        raise ValueError(f"{folder} has no whole line in metrics.jsonl yet")
    return Run(folder, settings, metrics)


def _metrics(runs: list[Run], wanted: Sequence[str]) -> list[str]:
    """Those that are drawn, which all runs have."""
    keys = [run.keys for run in runs]
    for name in wanted:
        for run, own in zip(runs, keys, strict=True):
            if name not in own:
                near = difflib.get_close_matches(name, sorted(own), n=1, cutoff=0)
                raise ValueError(f"--metric {name}: {run.folder} has no number of it, the closest is {near[0]!r}")
    common = set.intersection(*keys)
    found = list(dict.fromkeys(wanted)) or [name for name in USUAL if name in common]
    if not found:
        others = ", ".join(sorted(common - {"schema", "step"})[:3]) or "none"
        raise ValueError(f"--metric: not all runs have {' or '.join(USUAL)}; in common they have {others}")
    return found


def _groups(runs: list[Run]) -> list[Group]:
    """In the order of the runs."""
    alike: dict[str, list[Run]] = {}
    for run in runs:
        settings = {name: value for name, value in run.settings.items() if name not in ALIKE}
        alike.setdefault(json.dumps(settings, sort_keys=True), []).append(run)
    if len(alike) > len(LOOKS):
        raise ValueError(f"the runs have {len(alike)} different settings, a picture shows {len(LOOKS)} at most")
    labels = _labels([same[0] for same in alike.values()])
    return [
        Group(label if len(same) == 1 else f"{label} ({len(same)} runs)", *look, same)
        for label, look, same in zip(labels, LOOKS, alike.values(), strict=False)
    ]


def _labels(firsts: list[Run]) -> list[str]:
    """Of each group what its settings have of its own, or its first run's name."""
    names = [name for name in dict.fromkeys(name for run in firsts for name in run.settings) if name not in ALIKE]
    differ = [name for name in names if len({json.dumps(run.settings.get(name)) for run in firsts}) > 1]
    if 1 <= len(differ) <= MOST_SETTINGS:
        labels = [", ".join(f"{name} {_word(run.settings.get(name))}" for name in differ) for run in firsts]
    else:
        labels = [run.folder.resolve().name for run in firsts]
    labels = labels if len(set(labels)) == len(labels) else [str(run.folder) for run in firsts]
    return [label.encode(errors="backslashreplace").decode() for label in labels]  # no font has half a surrogate pair


def _word(value: object) -> str:
    """A setting's value; of a long path its end."""
    text = " ".join(map(str, value)) if isinstance(value, list) else "none" if value is None else str(value)
    return text if len(text) <= 40 else f"...{text[-37:]}"


def _unit(runs: list[Run], across: Across) -> tuple[str, float]:
    """The axis's words, and what a position is divided by."""
    if across == "steps":
        return "step", 1.0
    key = {"tokens": "num_tokens", "time": "step_time"}[across]
    for run in runs:
        if key not in run.keys:
            raise ValueError(f"--x {across}: {run.folder} has no {key} in metrics.jsonl")
    if across == "tokens":
        return "tokens trained on", 1.0
    longest = max(_places(run, across)[-1] for run in runs)
    return next((name, size) for name, size, most in UNITS if longest <= most * size)


def _places(run: Run, across: Across) -> list[float]:
    """Where each line of a run is, on the axis."""
    if across == "steps":
        return [float(row["step"]) for row in run.metrics]
    found, place = [], 0.0
    for row in run.metrics:
        if across == "time":
            place += max(0.0, _or_zero(row.get("step_time")))
        else:
            place = max(place, _or_zero(row.get("num_tokens")))
        found.append(place)
    return found


def _or_zero(value: object) -> float:
    number = as_number(value)
    return number if math.isfinite(number) else 0.0


def _curves(group: Group, metric: str, across: Across, size: float) -> list[Curve]:
    """The mean in its band, over what all runs of the group have gone through, and each run by itself as a thin line; a
    run that is alone has neither band nor mean."""
    each = [_points(run, metric, across, size) for run in group.runs]

    def curve(points: Points, low: list[float], high: list[float], thin: bool) -> Curve:
        places, values = ([part[i] for part in points] for i in (0, 1))
        dots = across == "steps" and len(points) <= FEW and not thin
        return Curve("", group.colour, places, values, low, high, dots=dots, dashed=group.dashed, thin=thin)

    if len(each) == 1:
        return [curve(each[0], [], [], thin=False)]
    first, last = max(points[0][0] for points in each), min(points[-1][0] for points in each)
    places = sorted({place for points in each for place, _ in points if first <= place <= last})
    rows = [[_at(points, place) for points in each] for place in places]
    means = list(zip(places, map(fmean, rows), strict=True))
    banded = [curve(means, list(map(min, rows)), list(map(max, rows)), thin=False)] if means else []
    return [*(curve(points, [], [], thin=True) for points in each), *banded]


def _points(run: Run, metric: str, across: Across, size: float) -> Points:
    """Of a run; of more than `POINTS` the means of as many stretches."""
    pairs = zip(_places(run, across), (as_number(row.get(metric)) for row in run.metrics), strict=True)
    points = [(place / size, value) for place, value in pairs if math.isfinite(value)]
    width = math.ceil(len(points) / POINTS)
    parts = [points[start : start + width] for start in range(0, len(points), width)]
    return [(fmean(place for place, _ in part), fmean(value for _, value in part)) for part in parts]


def _at(points: Points, place: float) -> float:
    """The value there, in between two of them on the line that joins them."""
    after = bisect_left(points, place, key=lambda point: point[0])
    (x1, y1) = points[after]
    if x1 == place:
        return y1
    (x0, y0) = points[after - 1]
    return y0 + (y1 - y0) * (place - x0) / (x1 - x0)


def _figure(panels: list[Panel], groups: list[Group], unit: str) -> Figure:
    """The legend above, the panels below it."""
    columns = min(len(panels), COLUMNS)
    rows, width = math.ceil(len(panels) / columns), 0.3 + WIDTH * columns
    room = int((width - 1) / CHARACTER)
    labels = ["\n".join(textwrap.wrap(group.label, room)) for group in groups]
    labels = [f" {label}" if label.startswith("_") else label for label in labels]  # else it has no entry
    longest = max(len(line) for label in labels for line in label.split("\n"))
    beside = max(1, min(len(groups), int(width / (0.7 + CHARACTER * longest))))
    lines = math.ceil(len(groups) / beside) * max(label.count("\n") + 1 for label in labels)
    head = LINE * lines + 0.45
    banded = any(curve.low for panel in panels for curve in panel.curves)
    foot = 0.55 + (0.2 if banded else 0.0)
    height = head + HEIGHT * rows + foot
    figure = Figure(figsize=(width, height))
    figure.subplots_adjust(0.62 / width, foot / height, 1 - 0.2 / width, 1 - head / height, wspace=0.22, hspace=0.34)
    handles = [
        Line2D([], [], color=COLOURS[group.colour], linestyle=curves.DASHES if group.dashed else "-")
        for group in groups
    ]
    figure.legend(handles, labels, loc="upper left", bbox_to_anchor=(0.45 / width, 1), ncols=beside, columnspacing=1.6)
    if banded:
        words = "mean of the runs, in a band from the least to the greatest"
        figure.text(0.62 / width, 0.07 / height, words, color=GREY, fontsize=8)
    most = max(curve.steps[-1] for panel in panels for curve in panel.curves)
    for place, panel in enumerate(panels, 1):
        axes = figure.add_subplot(rows, columns, place)
        curves.draw_panel(axes, panel)
        axes.set_xlim(0, (most or 1) * 1.02)
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=unit == "step", steps=[1, 2, 5, 10]))
        axes.xaxis.set_major_formatter(lambda value, _: svg.number(value))
        axes.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))
        axes.set_xlabel(unit)
    return figure
