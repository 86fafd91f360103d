"""What the commands of `redit-fast` do with their arguments, which `cli` has parsed; `cli` answers what they raise.

Heavy imports are inside the functions, so that --help and --version answer at once.
"""

from __future__ import annotations

import argparse
import json
import re
import shlex
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def train(args: argparse.Namespace) -> None:
    from redit_fast.training import config_file

    _without_bars()
    given = settings(args)
    own = _own_settings(args, given)
    file = args.config or own
    if args.print_config:
        print(config_file.printed(file, given), end="")
        return
    if args.dry_run and args.resume:
        raise ValueError("--dry-run is of a run that begins, --resume goes on with one: give one of them")
    try:
        loaded = config_file.load(file, given)
    except ValueError:
        if own is not None:
            from redit_fast.training import setup

            setup.check_given(given, own.parent)  # that a setting may not change is said first
        raise
    _check_run_flags(args, loaded.name)
    if args.dry_run:
        from redit_fast.training.dry_run import dry_run

        dry_run(loaded)
        return
    from redit_fast.training.trainer import train

    train(loaded, resume=args.resume, accept_changed_inputs=args.accept_changed_inputs)


def reward_model(args: argparse.Namespace) -> None:
    from redit_fast.training import config_file
    from redit_fast.training.reward_model.config import RewardModelConfig

    _without_bars()
    given = settings(args, RewardModelConfig.model_fields)
    file = args.config or _own_settings(args, given)
    if args.resume and file is None:
        _check_run_flags(args, given.get("name"))
        raise ValueError(f"{Path(str(given.get('out_dir', 'runs')), str(given['name']))} holds no run to resume")
    loaded = config_file.load_as(RewardModelConfig, file, given)
    _check_run_flags(args, loaded.name)
    from redit_fast.training.reward_model.trainer import train

    train(loaded, resume=args.resume, accept_changed_inputs=args.accept_changed_inputs)


def _own_settings(args: argparse.Namespace, given: Mapping[str, object]) -> Path | None:
    """config.json of the run that goes on, which does so with its own settings."""
    if not args.resume or args.config is not None or not given.get("name"):
        return None
    own = Path(str(given.get("out_dir", "runs")), str(given["name"]), "config.json")
    return own if own.is_file() else None


def _check_run_flags(args: argparse.Namespace, name: object) -> None:
    if args.resume and name is None:
        raise ValueError("--resume needs --name, the run to go on with")
    if args.accept_changed_inputs and not args.resume:
        raise ValueError("--accept-changed-inputs needs --resume, a new run has no inputs to change from")


def generate(args: argparse.Namespace) -> None:
    from redit_fast.training.generation import generate

    samples = _samples(args.samples, 1)
    _without_bars()
    out, told = generate(args.checkpoint, settings(args), samples=samples, greedy=args.greedy, out=_out(args.out))
    print(told)
    print(out)


def evaluate(args: argparse.Namespace) -> None:
    from redit_fast.training.evaluation import evaluate

    samples = _samples(args.samples, 1)
    _without_bars()
    evaluate(args.checkpoint, settings(args), samples=samples, out=_out(args.out))


def sample(args: argparse.Namespace) -> None:
    from redit_fast.training.sample import sample

    given, samples, row = settings(args), _samples(args.samples, 1 if args.greedy else 4), None
    if args.row is not None:
        row = _whole("--row", args.row, "a whole number, the place of a prompt in the file, counted from 1")
    if ("data" in given) != (row is not None):
        raise ValueError("--data and --row are the file and the place of a prompt in it: give both or neither")
    if row is not None and (args.prompt is not None or args.chat):
        raise ValueError("--row is a prompt, and has its own form: give it without another prompt and --chat")
    prompt = _from_stdin() if args.prompt is None and row is None else args.prompt
    _without_bars()
    sample(args.checkpoint, given, prompt=prompt, row=row, chat=args.chat, samples=samples, greedy=args.greedy)


def plot(args: argparse.Namespace) -> None:
    from redit_fast.training.report import overlay

    print(overlay.write(args.runs, _out(args.out) or Path("plot.png"), getattr(args, "metric", ()), args.x))


def report(args: argparse.Namespace) -> None:
    from redit_fast.training import report as run_report

    run_report.write(args.run)
    print(Path(args.run, "report.html"))


def to_verl(args: argparse.Namespace) -> None:
    from redit_fast.training import config_file
    from redit_fast.training import to_verl as verl

    _without_bars()
    stem = Path(args.config).stem
    folder = verl.to_verl(config_file.load(args.config, settings(args)), _out(args.out) or f"{stem}-verl", stem)
    print(f"bash {shlex.quote(str(folder / 'run.sh'))}")


def merge(args: argparse.Namespace) -> None:
    from redit_fast.training.merge import merge

    _without_bars()
    print(merge(Path(args.checkpoint), _out(args.out, "OUT")))


def example(args: argparse.Namespace) -> None:
    """The configuration `name` and what it needs, from the package into the current folder."""
    shipped = Path(__file__).parent / "examples"
    names = sorted(path.stem for path in shipped.glob("*.yaml"))
    if args.name not in names:
        raise ValueError(f"no example is named {args.name!r}; there is {', '.join(names)}")
    sources = sorted(shipped.glob(f"{args.name}.*"))
    for source in sources:
        if Path(source.name).exists():
            raise ValueError(f"{source.name} is there already and stays as it is")
    for source in sources:
        shutil.copyfile(source, source.name)
        print(source.name)


def info(args: argparse.Namespace) -> None:
    from redit_fast import info

    print(json.dumps(info.found(), indent=1) if args.json else info.text(info.found()))


def selftest(_: argparse.Namespace) -> int:
    """The largest error of each op, backend, device and dtype; 1 where one exceeds its limit."""
    from redit_fast import selftest

    results = list(selftest.run())
    rows: list[tuple[str, ...]] = [("op", "backend", "device", "dtype", "error", "limit", "s", "")]
    for result in results:
        *words, error, limit, seconds = result
        verdict = "ok" if result.passed else "WRONG"
        rows.append((*words, f"{error:.1e}", f"{limit:.1e}", f"{seconds:.1f}", verdict))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print(" ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    return 0 if all(result.passed for result in results) else 1


def bench(args: argparse.Namespace) -> int:
    from redit_fast.benchmarks import command

    return command.bench(args)


def settings(args: argparse.Namespace, fields: Mapping[str, Any] | None = None) -> dict[str, object]:
    """The fields, of TrainConfig unless told, that the command line gives; the word none clears one that does not take
    that word."""
    from redit_fast.known_names import RENAMED
    from redit_fast.training.config import TrainConfig
    from redit_fast.training.settings import choices_of

    fields = TrainConfig.model_fields if fields is None else fields
    given = {name: value for name, value in vars(args).items() if name in {*fields, *RENAMED}}
    words = {name: choices_of(fields[RENAMED.get(name, name)].annotation) for name in given}
    return {
        name: None if value in ("none", ["none"]) and "none" not in words[name] else value
        for name, value in given.items()
    }


def _samples(word: str | None, default: int) -> int:
    from redit_fast.training.generation import MOST

    return default if word is None else _whole("--samples", word, f"a whole number from 1 to {MOST}")


def _whole(name: str, word: str, needs: str) -> int:
    """Of ASCII digits: int() takes others, and stops at 4300 of them."""
    if not re.fullmatch("[0-9]{1,20}", word):
        raise ValueError(f"{name} is {word!r}, needs {needs}")
    return int(word)


def _from_stdin() -> str:
    if sys.stdin is None or sys.stdin.isatty():
        raise ValueError("a prompt is missing: needs one behind CHECKPOINT, on stdin, or --data FILE --row N")
    try:
        return sys.stdin.read()
    except UnicodeDecodeError:
        raise ValueError("the prompt on stdin is not text in UTF-8") from None


def _out(given: str | None, name: str = "--out") -> Path | None:
    """None where it is not given: an empty one, such as of a variable that is not set, is no name."""
    if given == "":
        raise ValueError(f"{name} is empty, needs a name")
    return None if given is None else Path(given)


def _without_bars() -> None:
    """Of transformers: the trainer has its own."""
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
