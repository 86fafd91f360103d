"""report.html: one file, without anything from elsewhere."""

from __future__ import annotations

import base64
import html
from collections.abc import Sequence
from pathlib import Path

from redit_fast.training import config as train_config
from redit_fast.training.config import TrainConfig
from redit_fast.training.report.summary import closing_rows, duration, environment, phases

PHASE_COLOURS = ("#33658a", "#86a9c4", "#c8743c", "#e3b591", "#4f8a68", "#a9cbb5", "#7d6b91", "#bdb2c9", "#c9ced3")
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


def render(
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
        words = f"{phase.replace('_', ' ')} {duration(seconds)} ({share:.0%})"
        key += f'<span><i style="background:{colour}"></i>{_text(words)}</span>'
    return f'<h2>Where the time went: {duration(total)}</h2><div class="bar">{bar}</div><div class="key">{key}</div>'


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
