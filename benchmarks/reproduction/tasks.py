"""The tasks by their names."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from redit_fast.training.rewards import RewardFunction
from redit_fast.training.task import Task

from . import preferences, sorting

ONE = [RewardFunction("right", sorting.right)]
THREE = [*ONE, RewardFunction("placed", sorting.placed, 0.5), RewardFunction("whole", sorting.whole, 0.25)]
PHRASE, COPY = sorting.judge_of(sorting.has_phrase), sorting.judge_of(sorting.is_copy)
TASKS: dict[str, Callable[[int], Task]] = {  # by the seed of model, warm start and prompts
    "RARE": partial(sorting.rare, "RARE", 0.01, ONE),
    "NEEDLE": partial(sorting.rare, "NEEDLE", 0.0, ONE),
    "THREE": partial(sorting.rare, "THREE", 0.01, THREE),
    "UNDER": sorting.under,
    "PHRASE": partial(sorting.judged, "PHRASE", sorting.sorted_or_phrase, PHRASE, sorting.has_phrase, 65),
    "COPY": partial(sorting.judged, "COPY", sorting.sorted_or_copy, COPY, sorting.is_copy, 120),
    "FORMAT": partial(
        sorting.judged, "FORMAT", sorting.sorted_and_marked, sorting.right_and_formatted, sorting.formatted, 65
    ),
    "PREFERENCES": preferences.preferred,
}
