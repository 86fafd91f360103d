"""report.html: one file that needs no other, by the template page.html.j2."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from redit_fast.training.config import TrainConfig
from redit_fast.training.report import reward_model, svg
from redit_fast.training.report.findings import Finding
from redit_fast.training.report.panels import POINTS, Section
from redit_fast.training.report.samples import Step
from redit_fast.training.report.summary import closing_rows, duration, environment
from redit_fast.training.reward_model.config import RewardModelConfig

# Characters that show nothing, end the text or turn its direction around, as Python spells them.
UNSEEN = {*range(0x20), *range(0x7F, 0xA0), *range(0x202A, 0x202F), *range(0x2066, 0x206A), *range(0xD800, 0xE000)}
SPELLED = {code: ascii(chr(code))[1:-1] for code in UNSEEN - set(b"\t\n")}


@dataclass(frozen=True)
class Run:
    """What a page is of."""

    name: str
    config: TrainConfig | RewardModelConfig
    metrics: list[dict]
    sections: list[Section]  # of its curves
    findings: list[Finding]
    samples: list[Step]
    summary: dict  # `summary.totals`, and once the run has ended all of its summary.json
    ended: bool

    @property
    def done(self) -> int:
        return self.metrics[-1]["step"] if self.metrics else 0


def render(run: Run) -> str:
    """The page of a run."""
    templates = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        finalize=_visible,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    seconds = sum(run.summary["time"].values())
    return templates.get_template("page.html.j2").render(
        run=run,
        config=run.config,
        closing=_closing(run),
        of_a_step=_of_a_step(run.config),
        sections=[
            (section.title, [svg.drawing(panel, run.done) for panel in section.panels]) for section in run.sections
        ],
        most_steps=math.ceil(len(run.metrics) / POINTS),
        width=svg.WIDTH,
        height=svg.HEIGHT,
        edges=(svg.LEFT, svg.WIDTH - svg.RIGHT, svg.TOP, svg.HEIGHT - svg.BOTTOM),
        seconds=seconds,
        phases=[(phase.replace("_", " "), time, time / seconds) for phase, time in run.summary["time"].items() if time],
        of_step={row["step"]: row for row in run.metrics},
        settings=_settings(run.config),
        command=run.config.command(name=f"{run.name}-again"),
        origin=run.summary if "versions" in run.summary else environment(),
        duration=duration,
        number=svg.number,
    )


def _closing(run: Run) -> list[tuple[str, str]]:
    if isinstance(run.config, TrainConfig):
        return closing_rows(run.summary, "after RL" if run.ended else "so far")
    return reward_model.closing_rows(run.summary, "after training" if run.ended else "so far")


def _of_a_step(config: TrainConfig | RewardModelConfig) -> str:
    if isinstance(config, TrainConfig):
        samples = f"{config.prompts_per_step} prompts with {config.group_size} completions each"
        return f"{samples}, dither level {config.dither_level:g}"
    return f"{config.pairs_per_step} pairs, center_coefficient {config.center_coefficient:g}"


def _visible(value: object) -> object:
    """What every `{{ ... }}` writes: a value's text, without a character that a reader would not see."""
    if hasattr(value, "__html__"):  # a macro's text, which has been here
        return value
    return str(value).translate(SPELLED)


def _settings(config: TrainConfig | RewardModelConfig) -> list[tuple[str, list, bool]]:
    """Name, value or values, and whether that is not the default; such first."""
    defaults = config.defaults
    listed = [
        (name, value if isinstance(value, list) else ["none" if value is None else value], value != defaults[name])
        for name, value in config
    ]
    return sorted(listed, key=lambda setting: not setting[2])
