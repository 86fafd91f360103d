"""The command `python -m redit_fast.benchmarks.reproduction`: docs/reproduction.md."""

from __future__ import annotations

import argparse
import os
import random
import re
import signal
import sys
import tempfile
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

from redit_fast.extras import MissingExtra, need

from . import NAMES, claim

if TYPE_CHECKING:  # --help imports no torch
    from .claims import Claim
    from .runner import Store
    from .trials import Runs

OUT = "benchmarks/results/reproduction"
THREADS = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive", "TOKENIZERS_PARALLELISM": "false"}


def main(argv: Sequence[str] | None = None) -> int:
    """0; 1 where a repetition differs or a process of it ends; 2 for bad input; 130 after Ctrl-C, 143 after SIGTERM."""
    parser = argparse.ArgumentParser(prog="python -m redit_fast.benchmarks.reproduction", allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    tune = commands.add_parser("tune", help="the runs on tuning seeds, which choose every method's settings")
    run = commands.add_parser("run", help="the final runs that are not done")
    repeat = commands.add_parser("repeat", help="runs at random once more, which must be the same to the bit")
    quick = commands.add_parser("quick", help="of every claim a few arms, one seed, few steps; nothing is kept")
    page = commands.add_parser(
        "page", help="what the results say, into docs/reproduction.md and README.md; nothing is run"
    )
    for each in (tune, run, repeat):
        each.add_argument("claim", metavar="CLAIM", help=", ".join(NAMES))
    for each in (tune, run, repeat, quick):
        each.add_argument("--jobs", default="2", metavar="N", help="processes of one thread each; 2 by default")
    for each in (tune, run, repeat, page):
        each.add_argument("--out", default=OUT, metavar="DIR", help=f"folder of the results, {OUT} by default")
    run.add_argument("--seeds", default="0-29", metavar="A-B", help="those of the protocol among them; all by default")
    repeat.add_argument("--runs", default="3", metavar="N", help="how many; 3 by default")
    repeat.add_argument("--draw", default="0", metavar="SEED", help="which; 0 by default")
    page.add_argument("--docs", default="docs", metavar="DIR", help="folder of the page, docs by default")
    args = parser.parse_args(argv)
    try:
        return _command(args)
    except (ValueError, OSError, MissingExtra) as error:
        print(f"redit-fast: {error}", file=sys.stderr)
        return 2
    except RuntimeError as error:
        print(f"redit-fast: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("redit-fast: stopped; the same call goes on", file=sys.stderr)
        return 130


def _command(args: argparse.Namespace) -> int:
    if not getattr(args, "out", OUT):
        raise ValueError("--out is empty, needs a name")
    need("train", "redit_fast.benchmarks.reproduction")
    if args.command == "page":
        from . import page as pages

        pages.write(Path(args.out), Path(args.docs))
        return 0
    jobs = _number("--jobs", args.jobs)
    os.environ |= THREADS  # before torch is loaded, here and in the processes
    from . import runner, trials

    for each in [args.claim] if hasattr(args, "claim") else NAMES:
        if any("lora_rank" in experiment.settings for experiment in claim(each).experiments):
            need("lora", f"the claim {each}")
    if args.command == "quick":
        return _quick(jobs)
    chosen = claim(args.claim)
    seeds = _seeds(args.seeds) if args.command == "run" else range(0)
    with runner.alone(Path(args.out)):
        store = runner.Store(Path(args.out), chosen.name)
        if args.command == "repeat":
            keys = sorted(store.runs)
            picked = random.Random(args.draw).sample(keys, min(_number("--runs", args.runs), len(keys)))
            other = runner.repeat(chosen, picked, store, jobs)
            for key in picked:
                print(f"{'DIFFERS' if key in other else 'the same'}: {key}")
            return 1 if other else 0
        runner.check_time(Path(args.out))
        if args.command == "tune":
            runner.run(chosen, list(trials.gates(chosen)), store, jobs)
            runner.run(chosen, list(trials.tuning(chosen, store.runs)), store, jobs)
        elif chosen.after is None:
            runner.run(chosen, list(trials.finals(chosen, seeds, store.runs)), store, jobs)
        else:
            _attempt(chosen, seeds, store, runner.Store(Path(args.out), chosen.after).runs, jobs)
    return 0


def _attempt(chosen: Claim, seeds: range, store: Store, before: Runs, jobs: int) -> None:
    """The final runs of a claim that comes after another one, whose runs are `before`."""
    from . import runner, trials, verdicts

    said = verdicts.verdict(claim(str(chosen.after)), before)
    if said == "not run":
        raise ValueError(f"{chosen.name}: comes after {chosen.after}, whose final runs are not done")
    if said == "holds":
        print(f"{chosen.name}: no need: {chosen.after} holds")
        return
    runner.run(chosen, list(trials.finals(chosen, seeds, {**before, **store.runs})), store, jobs)


def _quick(jobs: int) -> int:
    """Of each task the first two arms, with their first trials, and those that Python code changes; 20 steps long."""
    from . import runner, trials

    for name in NAMES:
        chosen, wanted = claim(name), []
        for experiment in chosen.experiments:
            changed = [arm for arm in experiment.arms[2:] if arm.hook or arm.around is not nullcontext]
            for arm in (*experiment.arms[:2], *changed):
                first = arm.trials[0] if arm.trials else {}
                settings = {**trials.BASE, **experiment.settings, **first, **arm.settings, "steps": 20, "seed": 1000}
                wanted.append(trials.Trial(experiment.task, arm.name, None, 1000, settings))
        with tempfile.TemporaryDirectory() as folder:
            runner.run(chosen, wanted, runner.Store(Path(folder), name), jobs)
    return 0


def _number(flag: str, word: str) -> int:
    if not re.fullmatch(r"[1-9]\d{0,3}", word):
        raise ValueError(f"{flag}: got {word!r}, needs a whole number from 1 on")
    return int(word)


def _seeds(word: str) -> range:
    match = re.fullmatch(r"(\d{1,3})(?:-(\d{1,3}))?", word)
    if match is None or int(match[2] or match[1]) < int(match[1]):
        raise ValueError(f"--seeds: got {word!r}, needs A or A-B, such as 0-9")
    return range(int(match[1]), int(match[2] or match[1]) + 1)


def _terminated(number: int, _: object) -> None:
    raise SystemExit(128 + number)


if __name__ == "__main__":
    os.nice(19)
    signal.signal(signal.SIGTERM, _terminated)
    sys.exit(main())
