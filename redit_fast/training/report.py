"""The pictures of a run: curves.png and a self-contained report.html.

Everything comes from the run's folder: config.json, metrics.jsonl and completions.jsonl, and summary.json once the run
has ended. A run that was killed or is still going has a report too.
"""

from __future__ import annotations

import base64
import html
import io
import json
import math
import os
import platform
import subprocess
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from itertools import cycle
from pathlib import Path

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from redit_fast import __version__
from redit_fast.training import config as train_config
from redit_fast.training.config import TrainConfig

BLUE, ORANGE, GREEN, GREY = "#33658a", "#c8743c", "#4f8a68", "#8b929a"
PHASE_COLOURS = ("#33658a", "#86a9c4", "#c8743c", "#e3b591", "#4f8a68", "#a9cbb5", "#7d6b91", "#bdb2c9", "#c9ced3")
STYLE = {
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
REWARD_COLOURS = (GREEN, BLUE, ORANGE, "#7d6b91", GREY)
DOTS = (0, (2, 1.5))
MARK = {"color": GREY, "linewidth": 0.9, "linestyle": "--"}
LONG_RUN = 100  # steps from which on curves are smoothed


def write(run_dir: str | Path) -> None:
    """Write curves.png and report.html into a run's folder, replacing older ones.

    Raises:
        ValueError: the folder holds no run, or a file of it is damaged (but for a last line that was cut off).
    """
    run = Path(run_dir)
    if not (run / "config.json").is_file():
        raise ValueError(f"{run} holds no run: it has no config.json")
    config = train_config.load(run / "config.json")
    metrics, completions = rows(run / "metrics.jsonl"), rows(run / "completions.jsonl")
    try:
        summary = json.loads((run / "summary.json").read_text("utf-8"))
    except FileNotFoundError:
        summary = {}
    except ValueError as error:
        raise ValueError(f"{run / 'summary.json'}: malformed: {error}") from None
    if not isinstance(summary, dict):
        raise ValueError(f"{run / 'summary.json'}: malformed: needs an object")
    picture = io.BytesIO()
    with rc_context(STYLE):
        curves(config, metrics).savefig(picture, format="png", dpi=150)
    page = _page(run, config, metrics, completions, summary, picture.getvalue())
    for name, content in (("curves.png", picture.getvalue()), ("report.html", page.encode("utf-8", "replace"))):
        draft = run / f".{name}.{os.getpid()}"  # a run that ends may draw its own meanwhile
        draft.write_bytes(content)
        os.replace(draft, run / name)


def rows(path: Path) -> list[dict]:
    """The objects of a JSONL file, none if there is no file. A last line without a line end was cut off: left out."""
    try:
        lines = path.read_bytes().split(b"\n")[:-1]
    except FileNotFoundError:
        lines = []
    found = []
    for number, line in enumerate(lines, 1):
        try:
            found.append(json.loads(line))
        except ValueError as error:
            raise ValueError(f"{path}:{number}: malformed line: {error}") from None
        if not isinstance(found[-1], dict) or type(found[-1].get("step")) is not int:
            raise ValueError(f"{path}:{number}: malformed line: needs an object with the number of its step")
    return found


def closing_rows(summary: dict) -> list[tuple[str, str]]:
    """The closing table of a run, (what, value), from its summary; what the summary lacks is left out."""

    def known(*names: str) -> bool:
        return all(summary.get(name) is not None for name in names)

    table = []
    if known("accuracy_before"):
        table.append(("Held-out accuracy before RL", f"{summary['accuracy_before']:.1%}"))
    if known("accuracy_after"):
        table.append(("Held-out accuracy after RL", f"{summary['accuracy_after']:.1%}"))
    if known("accuracy_before", "accuracy_after"):
        table.append(("Gain", f"{100 * (summary['accuracy_after'] - summary['accuracy_before']):+.1f} points"))
    if known("eval_problems"):
        table.append(("Held-out problems, answered greedily", f"{summary['eval_problems']:,}"))
    if known("steps"):
        table.append(("RL steps", f"{summary['steps']:,}"))
    if known("tokens_generated", "tokens_per_second"):
        tokens, rate = summary["tokens_generated"], summary["tokens_per_second"]
        table.append(("Tokens generated", f"{tokens:,.0f} ({rate:,.0f}/s of rollout)"))
    if known("seconds"):
        table.append(("Time", _duration(summary["seconds"])))
    return table


def phases(metrics: Sequence[dict], summary: dict) -> list[tuple[str, float]]:
    """(phase, seconds) of the whole run, the longest first: of its summary, else summed over its metrics."""
    if summary.get("time"):
        return list(summary["time"].items())
    names = dict.fromkeys(key for row in metrics for key in row if key.startswith("time/") and key != "time/step")
    total = [(name.removeprefix("time/"), sum(row.get(name) or 0.0 for row in metrics)) for name in names]
    return sorted(total, key=lambda phase: -phase[1])


def environment() -> dict:
    """{"commit": of the checkout that this package runs from or None, "versions": {package: version}}."""
    here, commit = Path(__file__).resolve().parents[2], None
    if (here / ".git").exists():
        git = ["git", "-C", here, "describe", "--always", "--dirty", "--abbrev=40"]
        try:
            commit = subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
        except (OSError, subprocess.CalledProcessError):  # no git, or a repository without a commit
            pass
    versions = {"redit-fast": __version__, "python": platform.python_version()}
    for package in ("torch", "transformers", "triton"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            pass
    return {"commit": commit, "versions": versions}


def curves(config: TrainConfig, metrics: Sequence[dict]) -> Figure:
    """Nine panels over the steps: reward, accuracy, length, gradient norm, perturbation cosine, dead groups, and what
    tells whether the reward is gamed: training reward with true accuracy below the gradient norm, each reward,
    sharpness."""
    figure = Figure(figsize=(11, 8.6))
    # By hand: a layout engine draws everything twice, 0.4 s.
    figure.subplots_adjust(0.075, 0.06, 0.985, 0.965, wspace=0.3, hspace=0.27)
    reward, accuracy, length, norm, cosine, dead, gamed, each, sharp = figure.subplots(3, 3, sharex=True).flat

    _panel(reward, "Reward", "reward, mean \u00b1 std")
    steps, low, high = _band(metrics, "reward/raw")
    reward.fill_between(steps, low, high, color=BLUE, alpha=0.13, linewidth=0)
    _line(reward, metrics, "reward/raw_mean", BLUE, "clean")
    if config.dither_level:
        steps, low, high = _band(metrics, "reward/dithered")
        for edge in (low, high):
            reward.plot(steps, edge, color=ORANGE, linewidth=0.8, linestyle=DOTS)
        steps, mean = _series(metrics, "reward/dithered_mean")
        reward.plot(steps, _smooth(mean), color=ORANGE, label="dithered", linestyle=DOTS)

    _panel(accuracy, "Accuracy", "share correct")
    _line(accuracy, metrics, "accuracy/train", BLUE, "training, sampled")
    _line(accuracy, metrics, "accuracy/held_out", GREEN, "held out, greedy", marker="o", markersize=4)
    accuracy.set_ylim(0, 1.02)

    _panel(length, "Completion length", "tokens, mean")
    _line(length, metrics, "completions/mean_length", BLUE)
    length.set_ylim(bottom=0)

    _panel(norm, "Gradient norm", "norm before clipping")
    _line(norm, metrics, "grad_norm", BLUE, "all parameters")
    norm.set_ylim(bottom=0)
    if config.max_grad_norm is not None and any(
        (row.get("grad_norm") or 0.0) > config.max_grad_norm for row in metrics
    ):
        norm.axhline(config.max_grad_norm, label=f"clipped to {config.max_grad_norm:g}", **MARK)

    _panel(cosine, "Applied vs intended perturbation", "cosine")
    if config.gr_gamma:
        _line(cosine, metrics, "gr/step_cos", BLUE)
        cosine.axhline(0.9, **MARK)
        cosine.text(0.98, 0.9015, "warning below 0.9", transform=cosine.get_yaxis_transform(), ha="right", color=GREY)
        cosine.set_ylim(top=1.005)
    else:
        cosine.text(0.5, 0.5, "no perturbation: gr_gamma is 0", transform=cosine.transAxes, ha="center", color=GREY)

    _panel(dead, "Dead groups (equal clean rewards)", "share of groups")
    _line(dead, metrics, "frac_reward_zero_std", BLUE)
    dead.set_ylim(0, 1.02)

    _panel(gamed, "Training reward against the truth", "reward; share correct")
    _line(gamed, metrics, "reward/raw_mean", BLUE, "training reward")
    _line(gamed, metrics, "accuracy/held_out", GREEN, "held-out acc.", marker="o", markersize=4)
    gamed.set_ylim(bottom=min(0.0, gamed.get_ylim()[0]))

    _panel(each, "Each reward (dots: held out)", "mean reward")
    rewards = [key for row in metrics[-1:] for key in row if key.startswith("rewards/") and key.endswith("/mean")]
    for key, colour in zip(rewards, cycle(REWARD_COLOURS), strict=False):
        _line(each, metrics, key, colour, key.split("/", 1)[1].removesuffix("/mean"))
        steps, held_out = _series(metrics, key.removesuffix("mean") + "held_out")
        each.plot(steps, held_out, "o", color=colour, markersize=4)

    _panel(sharp, "Sharpness along the gradient", "|H g| / |g|")
    if config.sharpness_every:
        _line(sharp, metrics, "sharpness/curvature", BLUE, marker="o", markersize=4)
        sharp.set_ylim(bottom=0)
    else:
        sharp.text(0.5, 0.5, "not probed: sharpness_every is 0", transform=sharp.transAxes, ha="center", color=GREY)

    for axes in (gamed, each, sharp):
        axes.set_xlabel("step")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    for axes in (reward, norm, gamed, each, sharp):  # room for the legend
        low, high = axes.get_ylim()
        labels = axes.get_legend_handles_labels()[1]
        columns = 1 if axes is each else 2
        axes.set_ylim(top=high + (high - low) * (1 + math.ceil(len(labels) / columns)) / 12)
        if labels:
            axes.legend(loc="upper left", ncols=columns, columnspacing=1)
    accuracy.legend(loc="best")
    return figure


def _panel(axes: Axes, title: str, label: str) -> None:
    axes.set_title(title)
    axes.set_ylabel(label)


def _series(metrics: Sequence[dict], *keys: str) -> tuple[list[float], ...]:
    """Steps and values of the rows that have all `keys`; null is NaN, a gap in the curve."""
    found = [row for row in metrics if all(key in row for key in keys)]
    values = ([math.nan if row[key] is None else row[key] for row in found] for key in keys)
    return [row["step"] for row in found], *values


def _band(metrics: Sequence[dict], key: str) -> tuple[list[float], ...]:
    """Steps, mean - std and mean + std, smoothed in a long run."""
    steps, mean, std = _series(metrics, f"{key}_mean", f"{key}_std")
    low, high = ([m + side * s for m, s in zip(mean, std, strict=True)] for side in (-1, 1))
    return steps, _smooth(low), _smooth(high)


def _line(axes: Axes, metrics: Sequence[dict], key: str, colour: str, label: str | None = None, **style) -> None:
    """A curve; in a long run smoothed, with the steps themselves faint behind it."""
    steps, values = _series(metrics, key)
    if len(steps) > LONG_RUN:
        axes.plot(steps, values, color=colour, alpha=0.25, linewidth=0.8)
    axes.plot(steps, _smooth(values), color=colour, label=label, **style)


def _smooth(values: list[float]) -> list[float]:
    """The mean of the finite values within an eightieth of a long run; a short one as it is."""
    if len(values) <= LONG_RUN:
        return values
    reach = len(values) // 80
    windows = ([v for v in values[max(0, i - reach) : i + reach + 1] if math.isfinite(v)] for i in range(len(values)))
    return [sum(window) / len(window) if window else math.nan for window in windows]


CSS = """
:root { color: #22292f; background: #fff; font: 15px/1.5 system-ui, -apple-system, "Segoe UI", sans-serif; }
body { max-width: 62rem; margin: 2.5rem auto; padding: 0 1.5rem; }
h1 { font-size: 1.7rem; margin: 0; } h2 { font-size: 1.05rem; margin: 2.2rem 0 .6rem; }
p.sub { color: #5c656d; margin: .2rem 0 1.5rem; } img { width: 100%; height: auto; }
table { border-collapse: collapse; } td, th { padding: .22rem 1.6rem .22rem 0; text-align: left; vertical-align: top;
border-bottom: 1px solid #e4e7ea; font-weight: normal; } td.n { text-align: right; font-variant-numeric: tabular-nums; }
tr.changed td { font-weight: 600; } .settings { columns: 2; column-gap: 3rem; font-size: .87em; }
.settings table { width: 100%; }
.settings tr { break-inside: avoid; } .settings td + td { overflow-wrap: anywhere; }
.bar { display: flex; height: 1.4rem; border-radius: 3px; overflow: hidden; margin-bottom: .6rem; }
.key { display: flex; flex-wrap: wrap; gap: .2rem 1.4rem; } .key i { display: inline-block; width: .75rem;
height: .75rem; border-radius: 2px; margin-right: .4rem; }
pre { background: #f5f6f7; border-radius: 4px; padding: .7rem .9rem; white-space: pre-wrap; overflow-wrap: anywhere;
font: 13px/1.45 ui-monospace, "DejaVu Sans Mono", monospace; margin: .4rem 0; }
.sample { break-inside: avoid; } .sample p { margin: 1.1rem 0 .4rem; } .note { color: #5c656d; }
pre.prompt { background: none; border-left: 3px solid #dfe3e6; border-radius: 0; color: #5c656d; padding: 0 .9rem; }
* { print-color-adjust: exact; -webkit-print-color-adjust: exact; }
@media print { @page { size: A4; margin: 16mm; } :root { font-size: 11px; } pre { font-size: 10px; }
body { margin: 0; padding: 0; max-width: none; } h2 { break-after: avoid; margin-top: 1.4rem; }
img, .bar, .key, .settings { break-inside: avoid; } h2 + .note { break-after: avoid; } }
"""


def _page(
    run: Path, config: TrainConfig, metrics: list[dict], completions: list[dict], summary: dict, picture: bytes
) -> str:
    done = metrics[-1]["step"] if metrics else 0
    what = "the embedded demo" if config.model is None else f"{config.model} on {config.data}"
    body = [
        f"<h1>{_text(run.resolve().name)}</h1>",
        f'<p class="sub">{_text(what)}: {done} of {config.steps} steps of {config.prompts_per_step} prompts with '
        f"{config.group_size} completions each, dither level {config.dither_level:g}, gr_gamma {config.gr_gamma:g}, "
        f"seed {config.seed}</p>",
        _table(closing_rows(summary)) if summary else '<p class="note">The run has no summary: it has not ended.</p>',
        f'<h2>Curves</h2><img alt="curves" src="data:image/png;base64,{base64.b64encode(picture).decode()}">',
        _time(phases(metrics, summary)),
        _samples(config, completions),
        _settings(config),
        f"<h2>Run it again</h2><pre>{_text(config.command(name=f'{run.resolve().name}-again'))}</pre>",
        _origin(summary),
    ]
    title = f"{_text(run.resolve().name)} · redit-fast"
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        f'<meta name="viewport" content="width=device-width"><style>{CSS}</style></head>\n<body>\n'
        + "\n".join(body)
        + "\n</body></html>\n"
    )


def _text(value: object) -> str:
    return html.escape(str(value))


def _table(pairs: Sequence[tuple[str, str]]) -> str:
    cells = "".join(f'<tr><td>{_text(what)}</td><td class="n">{_text(value)}</td></tr>' for what, value in pairs)
    return f"<table>{cells}</table>"


def _time(phases: list[tuple[str, float]]) -> str:
    total = sum(seconds for _, seconds in phases)
    if not total:
        return ""
    bar, key = "", ""
    for i, (phase, seconds) in enumerate(phases):
        colour, share = PHASE_COLOURS[i % len(PHASE_COLOURS)], seconds / total
        bar += f'<div style="width:{100 * share:.3f}%;background:{colour}"></div>'
        words = f"{phase.replace('_', ' ')} {_duration(seconds)} ({share:.0%})"
        key += f'<span><i style="background:{colour}"></i>{_text(words)}</span>'
    return f'<h2>Where the time went: {_duration(total)}</h2><div class="bar">{bar}</div><div class="key">{key}</div>'


def _samples(config: TrainConfig, completions: list[dict]) -> str:
    if not completions:
        return ""
    step = completions[-1]["step"]
    last = [row for row in completions if row["step"] == step]
    weights = config.reward_weights or [1.0] * len(config.rewards)

    def total(row: dict) -> float:
        return sum(w * r for w, r in zip(weights, row["rewards"].values(), strict=True) if r is not None)

    parts = [f"<h2>Completions of step {step}</h2>"]
    for label, row in (("Best", max(last, key=total)), ("Worst", min(last, key=total))):
        rewards = ", ".join(f"{name} {_number(value)}" for name, value in row["rewards"].items())
        parts.append(
            f'<div class="sample"><p><b>{label} of {len(last)}</b> · {_text(rewards)}'
            f" · advantage {_number(row['advantage'])}</p>"
            f'<pre class="prompt">{_text(row["prompt"].strip())}</pre><pre>{_text(row["completion"])}</pre></div>'
        )
    return "".join(parts)


def _settings(config: TrainConfig) -> str:
    cells = ""
    for name, value in config:
        default = train_config.default_of(name, config.model is None, config.preset)
        changed = ' class="changed"' if value != default else ""
        items = value if isinstance(value, list) else ["none" if value is None else value]
        shown = "<br>".join(_text(item).replace(":", ":<wbr>") for item in items)  # may break there
        cells += f"<tr{changed}><td>{name}</td><td>{shown}</td></tr>"
    return (
        f'<h2>Settings</h2><p class="note">Bold where they are not the default.</p>'
        f'<div class="settings"><table>{cells}</table></div>'
    )


def _origin(summary: dict) -> str:
    known = summary if "versions" in summary else environment()
    versions = ", ".join(f"{name} {number}" for name, number in known["versions"].items())
    when = "" if known is summary else " (where this report was made)"
    commit = known.get("commit") or "not a git checkout"
    return f"<h2>Made with{when}</h2><p>{_text(versions)}<br>commit {_text(commit)}</p>"


def _number(value: float | None) -> str:
    return "unscored" if value is None else f"{value:.3g}"


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(seconds, 60)
    hours, minutes = divmod(int(minutes), 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {seconds:.0f} s" if minutes else f"{seconds:.1f} s"
