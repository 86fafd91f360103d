"""The pictures of a run: curves.png and a self-contained report.html.

Everything comes from the run's folder: config.json, metrics.jsonl and completions.jsonl, and summary.json once the run
has ended. A run that was killed or is still going has a report too.
"""

from __future__ import annotations

import io
import json
import math
import os
from collections.abc import Iterator
from pathlib import Path

from matplotlib import rc_context

from redit_fast.checks import as_float
from redit_fast.pictures import STYLE
from redit_fast.training import config_file
from redit_fast.training.config import TrainConfig
from redit_fast.training.report import curves, findings, page, panels, reward_model, samples
from redit_fast.training.report.summary import totals

MOST_STEPS = 2**53  # up to which a float has every step
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
        ValueError: as `read`.
    """
    run = read(run_dir)
    picture = io.BytesIO()
    with rc_context(STYLE):
        curves.draw(run.sections, run.done).savefig(picture, format="png", dpi=150)
    for name, content in (
        ("curves.png", picture.getvalue()),
        ("report.html", page.render(run).encode(errors="backslashreplace")),
    ):
        draft = Path(run_dir, f".{name}.{os.getpid()}")  # a run that ends may draw its own meanwhile
        draft.write_bytes(content)
        os.replace(draft, Path(run_dir, name))


def read(run_dir: str | Path) -> page.Run:
    """What a run's folder tells.

    Raises:
        ValueError: it holds no run, or a file of it is damaged (but for a last line that was cut off).
    """
    folder = Path(run_dir)
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder} holds no run: it has no config.json")
    config, metrics, summary = config_file.of_run(folder), metrics_of(folder), _summary(folder)
    if isinstance(config, TrainConfig):
        sections, shown = panels.of_run(config, metrics), _samples(folder, config)
        warned = findings.of_run(config, metrics, summary.get("eval_problems") or config.eval_problems)
    else:
        sections, shown, warned = reward_model.sections(config, metrics), [], []
    return page.Run(
        name=folder.resolve().name,
        config=config,
        metrics=metrics,
        sections=sections,
        findings=warned,
        samples=shown,
        summary=totals(metrics) | summary,
        ended=bool(summary),
    )


def _samples(run: Path, config: TrainConfig) -> list[samples.Step]:
    weights, completions = config.reward_weights or [1.0] * len(config.rewards), run / "completions.jsonl"
    try:
        return samples.chosen(each_row(completions), weights)
    except samples.SampleError as error:
        raise ValueError(f"{completions}: malformed: {error}") from None


def _summary(run: Path) -> dict:
    """Empty while the run has not ended."""
    try:
        summary = json.loads((run / "summary.json").read_text("utf-8"), parse_int=_whole)
    except FileNotFoundError:
        return {}
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{run / 'summary.json'}: malformed: {error}") from None
    if not isinstance(summary, dict):
        raise ValueError(f"{run / 'summary.json'}: malformed: needs an object")
    return summary


def _whole(digits: str) -> int:
    number = int(digits)
    if math.isnan(as_float(number)):
        raise ValueError(f"a whole number of {len(digits)} characters is beyond the largest float")
    return number


def metrics_of(run: Path) -> list[dict]:
    """The lines of a run's metrics, those of schema 1 too, in today's names."""
    return [in_todays_names(line) for line in rows(run / "metrics.jsonl")]


def in_todays_names(line: dict) -> dict:
    if line.get("schema") != 1:
        return line
    return {OF_SCHEMA_1.get(name, name): value for name, value in line.items()} | {"schema": 2}


def rows(path: Path) -> list[dict]:
    """All of `each_row`."""
    return list(each_row(path))


def each_row(path: Path) -> Iterator[dict]:
    """The objects of a JSONL file, none if there is no file. A last line without a line end was cut off: left out."""
    try:
        file = path.open("rb")
    except FileNotFoundError:
        return
    with file:
        for number, line in enumerate(file, 1):
            if not line.endswith(b"\n"):
                break
            try:
                row = json.loads(line, parse_int=_whole)
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{path}:{number}: malformed line: {error}") from None
            if not isinstance(row, dict) or type(row.get("step")) is not int or abs(row["step"]) > MOST_STEPS:
                raise ValueError(f"{path}:{number}: malformed line: needs an object with the number of its step")
            yield row
