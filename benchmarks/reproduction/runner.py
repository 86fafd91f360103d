"""Runs of a claim in processes of one thread, each forked from one that has the imports behind it, and their results.

A process takes all runs of a task and a seed, which share a warm start. What is done is in the claim's file after every
run. One that was killed is lost, and the next call does it again.
"""

from __future__ import annotations

import fcntl
import io
import json
import multiprocessing
import os
import signal
import subprocess
import tempfile
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from itertools import groupby
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
from transformers.utils.logging import disable_progress_bar

from redit_fast.benchmarks import machine
from redit_fast.benchmarks.place import here
from redit_fast.training import lora, report
from redit_fast.training import runs as files
from redit_fast.training.config import TrainConfig
from redit_fast.training.report.summary import environment
from redit_fast.training.task import Task
from redit_fast.training.trainer import train

from . import NAMES
from . import claim as claim_of
from .claims import Arm, Claim, Experiment, check
from .curves import thinned
from .saved import saved
from .tasks import TASKS
from .trials import Runs, Trial, seconds, undone

SCHEMA = 1
KINDS: dict[str, Any] = {  # of what a run leaves
    "task": str, "arm": str, "trial": int | None, "seed": int, "settings": dict, "seconds": int | float,
    "measures": dict, "curve": dict,
}  # fmt: skip
HOURS = 12  # of CPU time, that the protocol gives all claims together
THEN = {"dither_dead_groups": "apply"}  # defaults of the trainer at the protocol, which have followed its results


class Store:
    """The results of a claim: {"schema", "claim", "runs": {key of a trial: what it left}}, a run a line."""

    def __init__(self, folder: Path, claim: str):
        self.path, self.claim = folder / f"{claim}.json", claim
        self.runs: Runs = {}
        if self.path.exists():
            try:
                stored = json.loads(self.path.read_text("utf-8"))
                schema, of, runs = stored["schema"], stored["claim"], dict(stored["runs"])
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(f"{self.path}: malformed: {error}") from None
            if schema != SCHEMA or of != claim:
                raise ValueError(f"{self.path}: needs the claim {claim} in schema {SCHEMA}")
            for key, run in runs.items():
                if wrong := _wrong(run):
                    raise ValueError(f"{self.path}: malformed: the run {key!r} {wrong}")
            self.runs = runs

    def add(self, key: str, run: dict[str, Any]) -> None:
        added = {**self.runs, key: run}
        lines = ",\n".join(f"{json.dumps(name)}: {json.dumps(each)}" for name, each in sorted(added.items()))
        text = f'{{"schema": {SCHEMA}, "claim": "{self.claim}", "runs": {{\n{lines}\n}}}}\n'
        files.replace(self.path, text)
        self.runs = added


def _wrong(run: Any) -> str | None:
    """What is wrong with a stored run."""
    if not isinstance(run, dict):
        return f"is {run!r}, needs an object"
    for name, kind in KINDS.items():
        if name not in run:
            return f"has no {name}"
        if not isinstance(run[name], kind):
            return f"has the {name} {run[name]!r}"
    return None


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Makes the folder of results and holds it: one runner at a time.

    Raises:
        ValueError: another one is at work there; OSError: it cannot be made.
    """
    folder.mkdir(parents=True, exist_ok=True)
    held = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(held)
        raise ValueError(f"--out {folder}: another runner is at work there") from None
    try:
        yield
    finally:
        os.close(held)


def run(claim: Claim, trials: Sequence[Trial], store: Store, jobs: int) -> None:
    """Does what is not done; says first what that will take.

    Raises:
        ValueError: uneven tuning budgets, settings that have changed. RuntimeError: a process ended without results.
    """
    check(claim)
    left = undone(trials, store.runs)
    if not trials:
        return
    print(f"{claim.name}: {len(trials)} runs, {len(trials) - len(left)} of them done", flush=True)
    if not left:
        return
    print(f"about {seconds(claim, left, store.runs) / 60:.1f} minutes of CPU time, {jobs} processes", flush=True)
    began, made_with = time.monotonic(), _made_with()
    for number, (key, found) in enumerate(results(claim.name, left, jobs), 1):
        store.add(key, found | made_with)
        passed = time.monotonic() - began
        print(f"[{passed:6.0f} s] {number} of {len(left)}: {key}, {found['seconds']:.1f} s", flush=True)


def check_time(folder: Path) -> None:
    """Says what is used of the protocol's time; raises a ValueError where all of it is."""
    used = sum(run["seconds"] for name in NAMES for run in Store(folder, name).runs.values()) / 3600
    if used >= HOURS:
        raise ValueError(
            f"--out {folder}: {used:.1f} of the protocol's {HOURS} hours of CPU time are used: no run is left"
        )
    print(f"{used:.2f} of {HOURS} hours of CPU time are used", flush=True)


def repeat(claim: Claim, keys: Sequence[str], store: Store, jobs: int) -> list[str]:
    """The keys of those runs whose repetition has other weights, measures or another curve, to the bit."""
    kept = {key: store.runs[key] for key in keys}
    trials = [Trial(run["task"], run["arm"], run["trial"], run["seed"], run["settings"]) for run in kept.values()]
    found = dict(results(claim.name, trials, jobs))
    same = ("weights", "measures", "curve")
    return [key for key in keys if any(found[key][name] != kept[key][name] for name in same)]


def _made_with() -> dict[str, Any]:
    """The checkout, the processor and the versions. What the runner and the page write is no change of the checkout."""
    card = machine.card(here("cpu"))
    own = ["git", "diff", "--quiet", "HEAD", "--", ":/", ":(exclude,top)benchmarks/results", ":(exclude,top)docs"]
    commit = (card["commit"] or "unknown").removesuffix("-dirty")
    if card["commit"] and subprocess.run(own, cwd=Path(__file__).resolve().parent).returncode:
        commit += "-dirty"
    return {"commit": commit, "cpu": card["cpu"], "versions": environment()["versions"]}


def results(claim: str, trials: Sequence[Trial], jobs: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """(key, what it left) of each run, as they end."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    by_start = sorted(trials, key=lambda trial: trial.seed)  # stable: the tasks of a seed stay in order
    waiting = [list(group) for _, group in groupby(by_start, key=lambda trial: (trial.seed, trial.task))]
    at_work: dict[Connection, tuple[Any, list[Trial]]] = {}
    folder = tempfile.TemporaryDirectory()  # here, since a process that is killed would leave its own
    try:
        while waiting or at_work:
            while waiting and len(at_work) < jobs:
                receiving, sending = context.Pipe(duplex=False)
                process = context.Process(target=_work, args=(claim, waiting[0], folder.name, sending))
                process.start()
                sending.close()
                at_work[receiving] = process, waiting.pop(0)
            for ready in wait(list(at_work)):
                receiving = ready  # type: ignore[assignment]
                process, left = at_work[receiving]
                try:
                    key, found = receiving.recv()
                except (EOFError, OSError):  # it has ended, or was killed as it wrote
                    del at_work[receiving]
                    receiving.close()
                    process.join()
                    if left:
                        raise RuntimeError(f"{left[0].key}: its process ended with code {process.exitcode}") from None
                    continue
                left.remove(next(trial for trial in left if trial.key == key))
                yield key, found
    finally:
        for process, _ in at_work.values():
            process.kill()
            process.join()
        folder.cleanup()


def _work(claim: str, trials: list[Trial], folder: str, sending: Connection) -> None:
    """In a process of its own."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # of a terminal: the runner ends this process
    experiment = claim_of(claim).experiment(trials[0].task)
    for key, found in done(experiment, trials, folder):
        sending.send((key, found))


def done(
    experiment: Experiment, trials: Sequence[Trial], folder: str | None = None
) -> Iterator[tuple[str, dict[str, Any]]]:
    """The runs of a task and a seed, one after the other, on one thread. Each is in a temporary folder, in `folder`."""
    torch.set_num_threads(1)
    disable_progress_bar()
    began = time.process_time()
    task = TASKS[experiment.task](trials[0].seed)
    warm = time.process_time() - began
    for trial in trials:
        with tempfile.TemporaryDirectory(dir=folder) as place:
            found = _trained(task, experiment, experiment.arm(trial.arm), trial.settings, Path(place))
        stored = {"task": trial.task, "arm": trial.arm, "trial": trial.number, "seed": trial.seed}
        yield trial.key, {**stored, "settings": trial.settings, "warm_start_seconds": round(warm, 2), **found}


def _trained(task: Task, experiment: Experiment, arm: Arm, settings: dict[str, Any], place: Path) -> dict[str, Any]:
    rewards = [function.name for function in task.functions]
    own = saved(task, place) if settings.get("lora_rank") else {"rewards": rewards}
    config = TrainConfig(**THEN | settings, **own, out_dir=str(place), name="run")
    began = time.process_time()
    with redirect_stdout(io.StringIO()), warnings.catch_warnings(), arm.around():
        warnings.filterwarnings("ignore", message="the applied perturbation has cosine")  # what G4 asks about
        hook = None if arm.hook is None else arm.hook(config)
        train(config, task=None if "model" in own else task, advantages_hook=hook)
    took = time.process_time() - began
    lines = report.metrics_of(place / "run")
    last = place / "run" / "checkpoints" / f"step-{config.steps:06d}" / "manifest.json"
    digests = json.loads(last.read_text("utf-8"))
    return {
        "seconds": round(took, 2),
        "weights": digests[lora.WEIGHTS if "model" in own else "model.safetensors"],  # a repetition has the same
        "measures": experiment.measures(lines, config),
        "curve": thinned(experiment.curve(lines, config)),
    }
