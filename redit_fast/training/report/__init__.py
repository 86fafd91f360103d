"""The pictures of a run: curves.png and a self-contained report.html.

Everything comes from the run's folder: config.json, metrics.jsonl and completions.jsonl, and summary.json once the run
has ended. A run that was killed or is still going has a report too.
"""

from __future__ import annotations

import io
import json
import os
from pathlib import Path

from matplotlib import rc_context

from redit_fast.training import config as train_config
from redit_fast.training.report import curves, page

OF_SCHEMA_1 = {
    "reward/raw_mean": "reward",
    "reward/raw_std": "reward_std",
    "completions/clipped_frac": "completions/clipped_ratio",
    "tokens/per_second": "tokens/per_second_rollout",
    "time/step": "step_time",
}


def write(run_dir: str | Path) -> None:
    """Write curves.png and report.html into a run's folder, replacing older ones.

    Raises:
        ValueError: the folder holds no run, or a file of it is damaged (but for a last line that was cut off).
    """
    run = Path(run_dir)
    if not (run / "config.json").is_file():
        raise ValueError(f"{run} holds no run: it has no config.json")
    config = train_config.load(run / "config.json")
    metrics, completions = metrics_of(run), rows(run / "completions.jsonl")
    try:
        summary = json.loads((run / "summary.json").read_text("utf-8"))
    except FileNotFoundError:
        summary = {}
    except ValueError as error:
        raise ValueError(f"{run / 'summary.json'}: malformed: {error}") from None
    if not isinstance(summary, dict):
        raise ValueError(f"{run / 'summary.json'}: malformed: needs an object")
    picture = io.BytesIO()
    with rc_context(curves.STYLE):
        curves.draw(config, metrics).savefig(picture, format="png", dpi=150)
    html = page.render(run, config, metrics, completions, summary, picture.getvalue())
    for name, content in (("curves.png", picture.getvalue()), ("report.html", html.encode("utf-8", "replace"))):
        draft = run / f".{name}.{os.getpid()}"  # a run that ends may draw its own meanwhile
        draft.write_bytes(content)
        os.replace(draft, run / name)


def metrics_of(run: Path) -> list[dict]:
    """The lines of a run's metrics, those of schema 1 too, in today's names."""
    return [in_todays_names(line) for line in rows(run / "metrics.jsonl")]


def in_todays_names(line: dict) -> dict:
    if line.get("schema") != 1:
        return line
    return {OF_SCHEMA_1.get(name, name): value for name, value in line.items()} | {"schema": 2}


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
