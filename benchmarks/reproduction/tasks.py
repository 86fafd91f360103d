"""The tasks by their names."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from redit_fast.training.rewards import RewardFunction
from redit_fast.training.task import Task

from . import five, preferences, sorting

ONE = [RewardFunction("right", sorting.right)]
THREE = [*ONE, RewardFunction("placed", sorting.placed, 0.5), RewardFunction("whole", sorting.whole, 0.25)]
PHRASE, COPY = sorting.judge_of(sorting.has_phrase), sorting.judge_of(sorting.is_copy)
JUDGED = {
    "PHRASE": partial(sorting.judged, "PHRASE", sorting.sorted_or_phrase, PHRASE, sorting.has_phrase),
    "COPY": partial(sorting.judged, "COPY", sorting.sorted_or_copy, COPY, sorting.is_copy),
}
TASKS: dict[str, Callable[[int], Task]] = {  # by the seed of model, warm start and prompts
    "RARE": partial(sorting.rare, "RARE", 0.01, ONE),
    "NEEDLE": partial(sorting.rare, "NEEDLE", 0.0, ONE),
    "THREE": partial(sorting.rare, "THREE", 0.01, THREE),
    "UNDER": sorting.under,
    "FIVE": partial(five.five, 48),
    "FIVE WIDE": partial(five.five, 96),
    **{f"PHRASE{kind}": partial(JUDGED["PHRASE"], 65) for kind in ("", " FASTER", " LONGER")},
    **{f"COPY{kind}": partial(JUDGED["COPY"], 120) for kind in ("", " FASTER", " LONGER")},
    "PHRASE WIDE": partial(JUDGED["PHRASE"], 20, width=256),
    "FORMAT": partial(
        sorting.judged, "FORMAT", sorting.sorted_and_marked, sorting.right_and_formatted, sorting.formatted, 65
    ),
    "PREFERENCES": preferences.preferred,
}
