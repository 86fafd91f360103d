"""What a claim is made of. Every number here stands in docs/reproduction.md, which was committed before the runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Literal

from redit_fast.training.config import TrainConfig
from redit_fast.training.task import AdvantagesHook

TUNING = range(1000, 1003)  # seeds of the tuning runs; final runs have those from 0 on
OTHER = 500_000  # what the seed of RL is moved by in an arm that repeats another one

Settings = dict[str, Any]  # of TrainConfig
Lines = Sequence[Mapping[str, Any]]  # of a run's metrics
Measures = dict[str, float | None]  # None: never reached
Curve = dict[str, list[float]]  # the second one is drawn over the first


@dataclass(frozen=True)
class Arm:
    """A way to train.

    Args:
        settings: beside those of the experiment; they win over a trial's.
        trials: settings that tuning tries. The best one's are those of the final runs.
        like: the arm whose best trial this one takes, where it has no trials of its own.
        times: factors on settings of the trial that it takes.
        hook: what makes the hook of a run.
        around: what a run is inside of.
        other_seed: of RL, not of the warm start: a repetition, for the check that finds nothing where nothing is.
    """

    name: str
    settings: Settings = field(default_factory=dict)
    trials: tuple[Settings, ...] = ()
    like: str | None = None
    times: Mapping[str, float] = field(default_factory=dict)
    hook: Callable[[TrainConfig], AdvantagesHook] | None = None
    around: Callable[[], AbstractContextManager[object]] = nullcontext
    other_seed: bool = False


@dataclass(frozen=True)
class Comparison:
    """`arm` less `against` in a measure, over the seeds that have both.

    Args:
        statistic: "t", the mean of the paired differences; "sign", how often it is above, for times, of which one that
            was never reached is above all, and for yes and no.
        role: "claim" decides the verdict; "other" counts in Holm's correction too; "null" must find nothing and
            "effect" something, or the claim has no verdict.
        expected: the sign that the paper predicts, or the planted effect has; 0 where there is no prediction.
    """

    arm: str
    against: str
    measure: str
    statistic: Literal["t", "sign"] = "t"
    role: Literal["claim", "other", "null", "effect"] = "other"
    expected: int = 0


@dataclass(frozen=True)
class Gate:
    """What plain training must do before the final runs, by a measure of yes and no over tuning seeds."""

    arm: str
    trial: int
    measure: str
    seeds: range
    least: int


@dataclass(frozen=True)
class Experiment:
    """A task, the arms that train on it, and what is compared.

    Args:
        tuning: settings of tuning runs alone.
        objective: the measure that tuning makes as high as it can; never reached counts as 0.
        seeds: of the final runs, from 0 on.
        seconds: of CPU time, of a run of `settings`, as measured on tuning seeds.
        tuned: the experiment, of the claim that this one comes after, whose gate and best trials are this one's too.
    """

    task: str
    settings: Settings
    arms: tuple[Arm, ...]
    comparisons: tuple[Comparison, ...]
    measures: Callable[[Lines, TrainConfig], Measures]
    curve: Callable[[Lines, TrainConfig], Curve]
    objective: str
    seeds: int
    seconds: float
    tuning: Settings = field(default_factory=dict)
    gate: Gate | None = None
    tuned: Experiment | None = None

    def arm(self, name: str) -> Arm:
        return next(arm for arm in self.arms if arm.name == name)


@dataclass(frozen=True)
class Claim:
    """What a paper says, and the experiments that it is asked by.

    Args:
        statement: what the paper says, in a few words: the README has 1000.
        advice: what it means for a user's settings if it holds, and if it does not.
        after: the claim without which, or where it holds, this one is not run.
    """

    name: str
    question: str
    statement: str
    paper: str
    advice: tuple[str, str]
    experiments: tuple[Experiment, ...]
    after: str | None = None

    def experiment(self, task: str) -> Experiment:
        return next(experiment for experiment in self.experiments if experiment.task == task)


def check(claim: Claim) -> None:
    """Raises a ValueError where methods are not tuned alike, or a comparison names what is not there."""
    for experiment in claim.experiments:
        place, names = f"{claim.name}, {experiment.task}", [arm.name for arm in experiment.arms]
        budgets = {arm.name: len(arm.trials) for arm in (experiment.tuned or experiment).arms if arm.trials}
        if len(set(budgets.values())) > 1:
            told = ", ".join(f"{name} {count}" for name, count in budgets.items())
            raise ValueError(f"{place}: tuning budgets are uneven, needs as many trials for every method: {told}")
        for arm in experiment.arms:
            if arm.like is not None and (arm.trials or arm.like not in budgets):
                raise ValueError(f"{place}: arm {arm.name} is tuned like {arm.like!r}, needs an arm with trials")
        for comparison in experiment.comparisons:
            for name in (comparison.arm, comparison.against):
                if name not in names:
                    raise ValueError(f"{place}: a comparison has the arm {name!r}, needs one of {', '.join(names)}")
