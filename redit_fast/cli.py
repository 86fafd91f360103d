"""The command `redit-fast`: train, generate, example, report, to-verl, merge, info (also named doctor), selftest,
bench. Bad input gets one line on stderr and exit code 2, Ctrl-C 130, SIGTERM 143.

Heavy imports are inside the functions, so that --help and --version answer at once.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import shutil
import signal
import sys
import threading
import warnings
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn, get_args, get_origin

from redit_fast.extras import MissingExtra
from redit_fast.signals import in_this_process


class _Parser(argparse.ArgumentParser):
    """argparse with its errors on one line."""

    def error(self, message: str) -> NoReturn:
        _complain(message)
        sys.exit(2)


class _Once(argparse.Action):
    """A flag of several values: whether a second one would add to them or replace them nobody can tell."""

    def __call__(self, parser, namespace, values, option_string=None):
        if hasattr(namespace, self.dest):
            parser.error(f"{option_string} is there twice: write all of its values after one")
        setattr(namespace, self.dest, values)


def _path(word: str) -> str:
    """What is read. An empty one, such as of a variable that is not set, would be the current folder."""
    if not word:
        raise argparse.ArgumentTypeError("is empty, needs a path")
    return word


class _Terminated(KeyboardInterrupt):
    """SIGTERM or SIGHUP: a run stops as after a Ctrl-C."""

    def __init__(self, number: int):
        super().__init__()
        self.code = 128 + number


@contextmanager
def _terminable() -> Iterator[None]:
    """SIGTERM, and SIGHUP of a terminal that was closed, become _Terminated where nothing else is to happen then."""

    def terminate(number: int, _: object) -> None:
        raise _Terminated(number)

    stop = in_this_process(terminate)
    main_thread = threading.current_thread() is threading.main_thread()  # no other may set a handler
    numbers = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if main_thread and hasattr(signal, name)]
    ours = [number for number in numbers if signal.getsignal(number) is signal.SIG_DFL]  # nohup ignores SIGHUP
    for number in ours:
        signal.signal(number, stop)
    try:
        yield
    finally:
        for number in ours:
            signal.signal(number, signal.SIG_DFL)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code: 0, 1 where the self-test fails, 2 for bad input, 130 after Ctrl-C, 143
    after SIGTERM. argparse exits by itself."""
    _limit_spinning()
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = _Parser(prog="redit-fast", description="GRPO with dithered rewards and gradient regularisation.")
    parser.add_argument("--version", action="store_true", help="print the version")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", parser_class=_Parser)
    train = commands.add_parser(
        "train",
        help="train the embedded demo, or a model of your own",
        usage="redit-fast train [--config FILE] [--resume [--accept-changed-inputs]] [--print-config] [SETTINGS]",
        allow_abbrev=False,
    )
    generate = commands.add_parser(
        "generate",
        help="completions of a file of prompts by a checkpoint, with rewards",
        usage="redit-fast generate CHECKPOINT --data FILE [--samples K | --greedy] [--out FILE] [SETTINGS]",
        allow_abbrev=False,
    )
    example = commands.add_parser("example", help="write a configuration and its data here", allow_abbrev=False)
    example.add_argument("name", metavar="NAME", help="word_problems")
    report = commands.add_parser("report", help="redraw curves.png and report.html of a run", allow_abbrev=False)
    report.add_argument("run", type=_path, metavar="RUN", help="a run's folder, such as runs/demo")
    to_verl = commands.add_parser(
        "to-verl",
        help="a configuration as data, rewards and a command for verl",
        usage="redit-fast to-verl CONFIG [--out DIR] [SETTINGS]",
        allow_abbrev=False,
    )
    merge = commands.add_parser("merge", help="a plain model of a checkpoint with LoRA", allow_abbrev=False)
    merge.add_argument("checkpoint", type=_path, metavar="CHECKPOINT", help="such as runs/NAME/checkpoints/step-000500")
    merge.add_argument("out", metavar="OUT", nargs="?", help="a new folder; CHECKPOINT-merged by default")
    info = commands.add_parser(
        "info",
        aliases=["doctor"],
        help="versions, what each backend runs here or why not, what to type then",
        allow_abbrev=False,
    )
    info.add_argument("--json", action="store_true", help="the same as JSON")
    commands.add_parser("selftest", help="check every backend against float64", allow_abbrev=False)
    bench = commands.add_parser("bench", help="measure every op beside what it replaces", allow_abbrev=False)
    format_of_a_library, warnings.formatwarning = warnings.formatwarning, _warning
    try:
        if argv[:1] == ["train"]:
            _add_train_flags(train)
        if argv[:1] == ["to-verl"]:
            text = "YAML or JSON file with settings; flags override it"
            to_verl.add_argument("config", type=_path, metavar="CONFIG", help=text)
            to_verl.add_argument("--out", metavar="DIR", help="a new folder; CONFIG-verl here by default")
            _add_settings(to_verl)
        if argv[:1] == ["generate"]:
            _add_generate_flags(generate)
        if argv[:1] == ["bench"]:
            from redit_fast.benchmarks import command

            command.add_flags(bench)
        args, unknown = parser.parse_known_args(argv)
        if unknown:
            raise ValueError(_unknown(unknown[0], commands.choices.get(args.command, parser)))
        if args.version:
            from redit_fast import __version__

            print(f"redit-fast {__version__}")
        elif args.command == "train":
            with _terminable():
                _train(args)
        elif args.command == "generate":
            with _terminable():
                _generate(args)
        elif args.command == "example":
            _example(args.name)
        elif args.command == "report":
            from redit_fast.training import report as run_report

            run_report.write(args.run)
            print(Path(args.run, "report.html"))
        elif args.command == "to-verl":
            from redit_fast.training import config_file
            from redit_fast.training import to_verl as verl

            _without_bars()
            stem = Path(args.config).stem
            folder = verl.to_verl(config_file.load(args.config, settings(args)), _out(args.out) or f"{stem}-verl", stem)
            print(f"bash {shlex.quote(str(folder / 'run.sh'))}")
        elif args.command == "merge":
            from redit_fast.training.merge import merge as merged

            _without_bars()
            print(merged(Path(args.checkpoint), _out(args.out, "OUT")))
        elif args.command in ("info", "doctor"):
            _info(args.json)
        elif args.command == "selftest":
            return _selftest()
        elif args.command == "bench":
            from redit_fast.benchmarks import command

            return command.bench(args)
        else:
            parser.print_help()
    except (ValueError, OSError, NotImplementedError, FloatingPointError, MissingExtra) as error:
        _complain(
            ": ".join([*getattr(error, "__notes__", ()), str(error)]), of_all_ranks=not hasattr(error, "__notes__")
        )
        return 2
    except KeyboardInterrupt as stop:
        if _says_it():
            print(str(stop) or "stopped", file=sys.stderr)  # the trainer has saved, and says how to go on
        return stop.code if isinstance(stop, _Terminated) else 130
    finally:
        warnings.formatwarning = format_of_a_library
    return 0


def _limit_spinning() -> None:
    """Before torch loads OpenMP, unless the user's environment says how its threads wait.

    A thread of GNU OpenMP that waits spins 300,000 times before it sleeps, and takes the core from the thread that it
    waits for where other programs run. Seconds of a short demo on two cores, alone and beside a busy process on each:
    7 and 29 (once more than 240) by default, 15 and 15 without spinning, 7 to 8 and 18 to 38 with 10,000, 8.5 and 18.5
    with 3000.
    """
    if not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & os.environ.keys():
        os.environ["GOMP_SPINCOUNT"] = "3000"


def _complain(message: str, *, of_all_ranks: bool = True) -> None:
    if _says_it() or not of_all_ranks:
        print(f"redit-fast: {' '.join(message.split())}", file=sys.stderr)


def _says_it() -> bool:
    """Of torchrun's processes the first says what all come to."""
    return "WORLD_SIZE" not in os.environ or os.environ.get("RANK", "0") == "0"


def _warning(message: Warning | str, *_: Any, **__: Any) -> str:
    """One line, without the file and the source line where the warning was given."""
    return f"warning: {' '.join(str(message).split())}\n"


def _unknown(word: str, parser: argparse.ArgumentParser) -> str:
    if not word.startswith("-"):
        return f"unexpected argument {word!r}"
    from redit_fast.known_names import flag, hint

    word = word.partition("=")[0]
    shown = [option for option, action in parser._option_string_actions.items() if action.help != argparse.SUPPRESS]
    names = [option.removeprefix("--").replace("-", "_") for option in shown if option.startswith("--")]
    return f"unknown flag {word}{hint(word.lstrip('-'), names, flag)}"


def _add_train_flags(parser: argparse.ArgumentParser) -> None:
    text = "YAML or JSON file with settings; flags override it"
    parser.add_argument("--config", type=_path, metavar="FILE", help=text)
    parser.add_argument("--resume", action="store_true", help="go on with the run --name from its newest checkpoint")
    parser.add_argument(
        "--accept-changed-inputs",
        action="store_true",
        help="with --resume: go on although the data, a reward module or the start model is another than before",
    )
    parser.add_argument("--print-config", action="store_true", help="print the settings as commented YAML and stop")
    _add_settings(parser)


def _add_settings(parser: argparse.ArgumentParser) -> None:
    """Every field of TrainConfig as a flag. Values stay text here: config_file.load reads them and words complaints."""
    from redit_fast.known_names import RENAMED, flag
    from redit_fast.training.config import TrainConfig

    _add_fields(parser, TrainConfig.model_fields)
    for old in RENAMED:
        parser.add_argument(flag(old), default=argparse.SUPPRESS, help=argparse.SUPPRESS)


def _add_fields(parser: argparse.ArgumentParser, names: Collection[str]) -> None:
    from redit_fast.known_names import flag
    from redit_fast.training.config import TrainConfig, describe

    group = parser.add_argument_group("settings, of which the word none clears one")
    for name, field in TrainConfig.model_fields.items():
        if name not in names:
            continue
        text = describe(name).replace("%", "%%")
        if bool in (field.annotation, *get_args(field.annotation)):
            group.add_argument(flag(name), action=argparse.BooleanOptionalAction, default=argparse.SUPPRESS, help=text)
        else:
            listed = any(get_origin(kind) is list for kind in (field.annotation, *get_args(field.annotation)))
            many: dict = {"nargs": "+", "action": _Once} if listed else {}
            kinds = get_args(field.annotation) or (field.annotation,)  # of int | None, list[str] and the like
            word = "N" if int in kinds else "X" if float in kinds or "weights" in name else "TEXT"
            group.add_argument(flag(name), metavar=word, default=argparse.SUPPRESS, help=text, **many)


def _add_generate_flags(parser: argparse.ArgumentParser) -> None:
    from redit_fast.training.generation import SETTINGS

    parser.add_argument(
        "checkpoint", type=_path, metavar="CHECKPOINT", help="such as runs/NAME/checkpoints/step-000500, or a model"
    )
    parser.add_argument("--samples", metavar="K", default="1", help="completions of each prompt; 1 by default")
    parser.add_argument("--greedy", action="store_true", help="the most likely tokens instead of sampled ones")
    parser.add_argument("--out", metavar="FILE", help="a new file; CHECKPOINT-completions.jsonl by default")
    _add_fields(parser, SETTINGS)


def _generate(args: argparse.Namespace) -> None:
    from redit_fast.training.generation import MOST, generate

    if not re.fullmatch("[0-9]{1,20}", args.samples):
        raise ValueError(f"--samples is {args.samples!r}, needs a whole number from 1 to {MOST}")
    _without_bars()
    out, told = generate(
        args.checkpoint,
        settings(args),
        samples=int(args.samples),
        greedy=args.greedy,
        out=_out(args.out),
    )
    print(told)
    print(out)


def _out(given: str | None, name: str = "--out") -> Path | None:
    """None where it is not given: an empty one, such as of a variable that is not set, is no name."""
    if given == "":
        raise ValueError(f"{name} is empty, needs a name")
    return None if given is None else Path(given)


def _without_bars() -> None:
    """Of transformers: the trainer has its own."""
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()


def _train(args: argparse.Namespace) -> None:
    from redit_fast.training import config_file

    _without_bars()
    given = settings(args)
    own = None
    if args.resume and args.config is None and given.get("name"):  # a run goes on with its own settings
        own = Path(str(given.get("out_dir", "runs")), str(given["name"]), "config.json")
        own = own if own.is_file() else None
    file = args.config or own
    if args.print_config:
        print(config_file.printed(file, given), end="")
        return
    try:
        loaded = config_file.load(file, given)
    except ValueError:
        if own is not None:
            from redit_fast.training import setup

            setup.check_given(given, own.parent)  # that a setting may not change is said first
        raise
    if args.resume and loaded.name is None:
        raise ValueError("--resume needs --name, the run to go on with")
    if args.accept_changed_inputs and not args.resume:
        raise ValueError("--accept-changed-inputs needs --resume, a new run has no inputs to change from")
    from redit_fast.training.trainer import train

    train(loaded, resume=args.resume, accept_changed_inputs=args.accept_changed_inputs)


def settings(args: argparse.Namespace) -> dict[str, object]:
    """The fields of TrainConfig that the command line gives; the word none clears one that does not take that word."""
    from redit_fast.known_names import RENAMED
    from redit_fast.training.config import TrainConfig, choices

    given = {name: value for name, value in vars(args).items() if name in {*TrainConfig.model_fields, *RENAMED}}
    return {
        name: None if value in ("none", ["none"]) and "none" not in choices(RENAMED.get(name, name)) else value
        for name, value in given.items()
    }


def _example(name: str) -> None:
    """The configuration `name` and what it needs, from the package into the current folder."""
    shipped = Path(__file__).parent / "examples"
    names = sorted(path.stem for path in shipped.glob("*.yaml"))
    if name not in names:
        raise ValueError(f"no example is named {name!r}; there is {', '.join(names)}")
    sources = sorted(shipped.glob(f"{name}.*"))
    for source in sources:
        if Path(source.name).exists():
            raise ValueError(f"{source.name} is there already and stays as it is")
    for source in sources:
        shutil.copyfile(source, source.name)
        print(source.name)


def _info(as_json: bool) -> None:
    from redit_fast import info

    print(json.dumps(info.found(), indent=1) if as_json else info.text(info.found()))


def _selftest() -> int:
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
