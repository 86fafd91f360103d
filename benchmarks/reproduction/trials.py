"""Which runs a claim has, and with which settings; what is done of them is in its results."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from .claims import OTHER, TUNING, Arm, Claim, Experiment

Runs = dict[str, dict[str, Any]]  # Trial.key -> what the run left, of a claim's results and of that it comes after

# Beside what an experiment sets: neither paper's method, and nothing written that is not read.
BASE = {
    "warm_start_steps": 0, "dither_level": 0.0, "gr_gamma": 0.0, "eval_samples": 2, "keep_checkpoints": 2,
    "checkpoint_every": 10**6, "eval_every": 10**6,
}  # fmt: skip


class Trial(NamedTuple):
    """One run."""

    task: str
    arm: str
    number: int | None  # of the arm's trials; None: a final run
    seed: int
    settings: dict[str, Any]  # of TrainConfig

    @property
    def key(self) -> str:
        kind = "final" if self.number is None else f"trial {self.number}"
        return f"{self.task}, {self.arm}, {kind}, seed {self.seed}"


def gates(claim: Claim) -> Iterator[Trial]:
    """The runs that say whether plain training does what a claim is about."""
    for experiment in claim.experiments:
        if gate := experiment.gate:
            arm = experiment.arm(gate.arm)
            yield from (_trial(experiment, arm, gate.trial, seed) for seed in gate.seeds)


def tuning(claim: Claim, runs: Runs) -> Iterator[Trial]:
    """The runs that choose settings, where the gate is not known to be closed, and those of the gates."""
    found = {trial.key: trial for trial in gates(claim)}
    for experiment in claim.experiments:
        if closed(experiment, runs):
            continue
        for arm in experiment.arms:
            each = [_trial(experiment, arm, number, seed) for number in range(len(arm.trials)) for seed in TUNING]
            found |= {trial.key: trial for trial in each}
    yield from sorted(found.values(), key=lambda trial: trial.seed)


def _trial(experiment: Experiment, arm: Arm, number: int, seed: int) -> Trial:
    settings = {**BASE, **experiment.settings, **experiment.tuning, **arm.trials[number], **arm.settings, "seed": seed}
    return Trial(experiment.task, arm.name, number, seed, settings)


def finals(claim: Claim, seeds: Iterable[int], runs: Runs) -> Iterator[Trial]:
    """The runs that the claim is decided by. An experiment has its own number of seeds, and none behind a closed gate.

    Raises:
        ValueError: a tuning run is missing, or was made with other settings than it has now.
    """
    missing = [trial.key for trial in undone(tuning(claim, runs), runs)]
    if missing:
        raise ValueError(
            f"{claim.name}: {len(missing)} tuning runs are missing, such as {missing[0]!r}: needs `tune {claim.name}` "
            "first"
        )
    for experiment in claim.experiments:
        if told := closed(experiment, runs):
            print(f"{claim.name}, {experiment.task}: {told}: its final runs are left out")
            continue
        for seed in seeds:
            if seed >= experiment.seeds:
                continue
            for arm in experiment.arms:
                best = chosen(experiment, arm, runs)
                settings = {**BASE, **experiment.settings, **best, **arm.settings}
                settings["seed"] = seed + OTHER * arm.other_seed
                yield Trial(experiment.task, arm.name, None, seed, settings)


def chosen(experiment: Experiment, arm: Arm, runs: Runs) -> dict[str, Any]:
    """The settings of the trial with the best mean of the objective, of equal ones the first; times the arm's
    factors."""
    home = experiment.tuned or experiment
    tuned = home.arm(arm.like) if arm.like else arm
    means = []
    for number in range(len(tuned.trials)):
        keys = [_trial(home, tuned, number, seed).key for seed in TUNING]
        means.append(sum(runs[key]["measures"][home.objective] or 0.0 for key in keys) / len(keys))
    best = dict(tuned.trials[means.index(max(means))]) if means else {}
    return best | {name: type(best[name])(best[name] * factor) for name, factor in arm.times.items()}


def closed(experiment: Experiment, runs: Runs) -> str | None:
    """Why there are no final runs; None: there are, or the gate's runs are not done."""
    home = experiment.tuned or experiment
    gate = home.gate
    if gate is None:
        return None
    keys = [_trial(home, home.arm(gate.arm), gate.trial, seed).key for seed in gate.seeds]
    count = sum(bool(runs[key]["measures"][gate.measure]) for key in keys if key in runs)
    if count >= gate.least or any(key not in runs for key in keys):
        return None
    return f"{gate.arm} is {gate.measure} in {count} of {len(keys)} tuning seeds, the protocol needs {gate.least}"


def undone(trials: Iterable[Trial], runs: Runs) -> list[Trial]:
    """Those that have no result.

    Raises:
        ValueError: one has been run with other settings than it has now.
    """
    left = []
    for trial in trials:
        if trial.key not in runs:
            left.append(trial)
        elif runs[trial.key]["settings"] != trial.settings:
            was, now = runs[trial.key]["settings"], trial.settings
            name = min(name for name in was.keys() | now.keys() if was.get(name) != now.get(name))
            raise ValueError(
                f"{trial.key}: {name} was {was.get(name)!r} in the results and is {now.get(name)!r} now: put back what "
                "it was, or remove the results"
            )
    return left


def seconds(claim: Claim, trials: Iterable[Trial], runs: Runs) -> float:
    """CPU time that runs will take: what others of their experiment took for a step, or the protocol's figure."""
    total = 0.0
    for trial in trials:
        experiment = claim.experiment(trial.task)
        done = [run for run in runs.values() if run["task"] == trial.task]
        steps = sum(run["settings"]["steps"] for run in done)
        took = sum(run["seconds"] for run in done) if done else experiment.seconds
        total += took / (steps or experiment.settings["steps"]) * trial.settings["steps"]
    return total
