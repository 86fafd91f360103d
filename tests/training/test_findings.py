"""What a report warns of, from lines of metrics."""

import math
import re
from pathlib import Path

import pytest

from redit_fast.training.config import TrainConfig
from redit_fast.training.report import findings

CHOOSING = Path(__file__).parents[2] / "docs" / "choosing.md"
GOOD = {
    "reward": 1.0,
    "accuracy/train": 0.5,
    "frac_reward_zero_std": 0.25,
    "entropy": 0.2,
    "gr/step_cos": 0.999,
    "completions/clipped_ratio": 0.05,
    "accuracy/held_out": 0.5,
}


def lines(changed, steps=12):
    """A run that goes well but in its last fifth."""
    rows = [{"step": step, **GOOD, "reward": 1 + step / steps} for step in range(steps + 1)]
    for row in rows[-(steps // 5) :]:
        row |= changed
    return rows


def found(changed, steps=12, problems=500, **settings):
    return findings.of_run(TrainConfig(**settings), lines(changed, steps), problems)


CASES = [
    ({"completions/clipped_ratio": 0.3}, "completions-that-are-cut-off", "30% of the completions in the last 2 steps"),
    ({"frac_reward_zero_std": 0.75}, "dead-groups", "75% of the groups in the last 2 steps had equal rewards"),
    ({"gr/step_cos": 0.4}, "gamma-and-epsilon", "its cosine was 0.40 in the last 2 steps"),
    ({"entropy": 0.01}, "entropy", "fell from 0.2 to 0.01 nats, with 50% of the answers right"),
    ({"accuracy/held_out": 0.2}, "the-reward-rises-the-held-out-accuracy-falls", "fell from 50.0% to 20.0%"),
]


@pytest.mark.parametrize("changed, section, told", CASES)
def test_each_finding_is_told_with_the_section_that_helps(changed, section, told):
    assert found({}) == []
    (one,) = found(changed)
    assert told in one.sentence and one.section == f"docs/choosing.md#{section}"
    titles = re.findall("^## (.*)$", CHOOSING.read_text("utf-8"), re.MULTILINE)
    assert section in [re.sub("[^a-z -]", "", title.lower()).replace(" ", "-") for title in titles]
    assert found(changed, steps=9) == []  # too few for a trend


def test_low_entropy_is_as_it_should_be_where_the_task_is_learned():
    assert found({"entropy": 0.01, "accuracy/train": 0.95}) == []


def test_a_fall_of_the_accuracy_is_told_beyond_what_chance_makes_and_while_the_reward_rises():
    assert found({"accuracy/held_out": 0.48}) == []  # two standard errors of 500 problems are 0.063
    assert len(found({"accuracy/held_out": 0.48}, problems=100_000)) == 1
    assert found({"accuracy/held_out": 0.2, "reward": 0.5}) == []
    assert found({"accuracy/held_out": 0.2}, problems=0) == []


@pytest.mark.parametrize(
    "settings, what",
    [({"dither_dead_groups": "apply"}, "whose advantages are noise"),
     ({"dither_dead_groups": "only"}, "whose advantages are noise"),
     ({"dither_dead_groups": "skip"}, "which teach nothing"), ({}, "which teach nothing"),
     ({"dither_level": 0}, "which teach nothing")],
)  # fmt: skip
def test_a_dead_group_is_noise_only_where_it_is_dithered(settings, what):
    (one,) = found({"frac_reward_zero_std": 0.9}, **settings)
    assert one.sentence.endswith(what)


@pytest.mark.parametrize("value", [None, math.nan, math.inf, "x", True, 10**400, 1e308, -5.0, {}])
def test_no_value_stops_the_findings(value):
    """The lines of a run may be a stranger's."""
    assert isinstance(found(dict.fromkeys(GOOD, value)), list)
