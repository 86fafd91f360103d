"""The command line of `redit-fast`: its parser, and what it answers. What a command does is in `commands`.

Bad input gets one line on stderr and exit code 2, Ctrl-C 130, SIGTERM 143. Heavy imports are inside the functions, so
that --help and --version answer at once.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn, get_args, get_origin

from redit_fast import commands
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
    """Run one command; returns its exit code: 0, 1 where the self-test fails, 2 for bad input, 130 after Ctrl-C, 141
    where whoever read the output has gone, 143 after SIGTERM. argparse exits by itself."""
    _limit_spinning()
    argv = list(sys.argv[1:] if argv is None else argv)
    parser, known = _parsers()
    format_of_a_library, warnings.formatwarning = warnings.formatwarning, _warning
    try:
        if argv and argv[0] in FLAGS:
            FLAGS[argv[0]](known[argv[0]])
        args, unknown = parser.parse_known_args(argv)
        if unknown:
            raise ValueError(_unknown(unknown[0], known.get(args.command, parser)))
        if args.version:
            from redit_fast import __version__

            print(f"redit-fast {__version__}")
        elif args.command is None:
            parser.print_help()
        else:
            with _terminable():
                return args.handler(args) or 0
    except BrokenPipeError:  # of stdout: `redit-fast sample ... | head -1`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python writes to it once more at its end
        return 141
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


def _parsers() -> tuple[_Parser, dict[str, _Parser]]:
    """That of the command line and those of the commands, some without what `FLAGS` adds to them."""
    parser = _Parser(prog="redit-fast", description="GRPO with dithered rewards and gradient regularisation.")
    parser.add_argument("--version", action="store_true", help="print the version")
    known = parser.add_subparsers(dest="command", metavar="COMMAND", parser_class=_Parser)

    def add(
        name: str, handler: Callable[[argparse.Namespace], int | None], text: str, usage: str = "", *aliases: str
    ) -> argparse.ArgumentParser:
        words = f"redit-fast {name} {usage}" if usage else None
        command = known.add_parser(name, help=text, usage=words, aliases=aliases, allow_abbrev=False)
        command.set_defaults(handler=handler)
        return command

    add(
        "train",
        commands.train,
        "train the embedded demo, or a model of your own",
        "[--config FILE] [--resume [--accept-changed-inputs] | --dry-run] [--print-config] [SETTINGS]",
    )
    add(
        "reward-model",
        commands.reward_model,
        "train a reward model on pairs of answers",
        "--model MODEL --data FILE [--config FILE] [--resume [--accept-changed-inputs]] [SETTINGS]",
    )
    add(
        "generate",
        commands.generate,
        "completions of a file of prompts by a checkpoint, with rewards",
        "CHECKPOINT --data FILE [--samples K | --greedy] [--out FILE] [SETTINGS]",
    )
    add(
        "eval",
        commands.evaluate,
        "pass@k and mean rewards of a checkpoint on a file of prompts",
        "CHECKPOINT --data FILE [--samples K] [--out FILE] [SETTINGS]",
    )
    add(
        "sample",
        commands.sample,
        "completions of one prompt by a checkpoint, with rewards",
        "CHECKPOINT [PROMPT | --data FILE --row N] [--chat] [--samples K | --greedy] [SETTINGS]",
    )
    example = add("example", commands.example, "write a configuration and its data here")
    example.add_argument("name", metavar="NAME", help="word_problems")
    report = add("report", commands.report, "redraw curves.png and report.html of a run")
    report.add_argument("run", type=_path, metavar="RUN", help="a run's folder, such as runs/demo")
    plot = add(
        "plot", commands.plot, "several runs in one picture", "RUN ... [--out FILE] [--metric NAME ...] [--x WHAT]"
    )
    _add_plot_flags(plot)
    add(
        "to-verl",
        commands.to_verl,
        "a configuration as data, rewards and a command for verl",
        "CONFIG [--out DIR] [SETTINGS]",
    )
    merge = add("merge", commands.merge, "a plain model of a checkpoint with LoRA")
    merge.add_argument("checkpoint", type=_path, metavar="CHECKPOINT", help="such as runs/NAME/checkpoints/step-000500")
    merge.add_argument("out", metavar="OUT", nargs="?", help="a new folder; CHECKPOINT-merged by default")
    info = add(
        "info", commands.info, "versions, what each backend runs here or why not, what to type then", "", "doctor"
    )
    info.add_argument("--json", action="store_true", help="the same as JSON")
    add("selftest", commands.selftest, "check every backend against float64")
    add("bench", commands.bench, "measure every op beside what it replaces")
    return parser, known.choices


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
    _add_run_flags(parser, "the data, a reward module or the start model")
    parser.add_argument("--dry-run", action="store_true", help="load all, try one step, print the plan, write nothing")
    parser.add_argument("--print-config", action="store_true", help="print the settings as commented YAML and stop")
    _add_settings(parser)


def _add_reward_model_flags(parser: argparse.ArgumentParser) -> None:
    from redit_fast.training.reward_model.config import RewardModelConfig, describe

    _add_run_flags(parser, "the data or the start model")
    _add_fields(parser, RewardModelConfig.model_fields, describe)


def _add_run_flags(parser: argparse.ArgumentParser, inputs: str) -> None:
    text = "YAML or JSON file with settings; flags override it"
    parser.add_argument("--config", type=_path, metavar="FILE", help=text)
    parser.add_argument("--resume", action="store_true", help="go on with the run --name from its newest checkpoint")
    text = f"with --resume: go on although {inputs} is another than before"
    parser.add_argument("--accept-changed-inputs", action="store_true", help=text)


def _add_settings(parser: argparse.ArgumentParser, names: Collection[str] | None = None) -> None:
    """Fields of TrainConfig, all of them unless there are `names`, as flags. Values stay text here: config_file.load
    reads them and words complaints."""
    from redit_fast.known_names import RENAMED, flag
    from redit_fast.training.config import TrainConfig, describe

    fields = TrainConfig.model_fields
    _add_fields(parser, fields if names is None else {n: f for n, f in fields.items() if n in names}, describe)
    for old in RENAMED if names is None else ():
        parser.add_argument(flag(old), default=argparse.SUPPRESS, help=argparse.SUPPRESS)


def _add_fields(parser: argparse.ArgumentParser, fields: Mapping[str, Any], describe: Callable[[str], str]) -> None:
    from redit_fast.known_names import flag

    group = parser.add_argument_group("settings, of which the word none clears one")
    for name, field in fields.items():
        text = describe(name).replace("%", "%%")
        if bool in (field.annotation, *get_args(field.annotation)):
            group.add_argument(flag(name), action=argparse.BooleanOptionalAction, default=argparse.SUPPRESS, help=text)
        else:
            listed = any(get_origin(kind) is list for kind in (field.annotation, *get_args(field.annotation)))
            many: dict = {"nargs": "+", "action": _Once} if listed else {}
            kinds = get_args(field.annotation) or (field.annotation,)  # of int | None, list[str] and the like
            many_numbers = name in ("reward_weights", "reward_scales")
            word = "N" if int in kinds else "X" if float in kinds or many_numbers else "TEXT"
            group.add_argument(flag(name), metavar=word, default=argparse.SUPPRESS, help=text, **many)


def _add_generate_flags(parser: argparse.ArgumentParser) -> None:
    _add_checkpoint(parser)
    _add_samples(parser, "1", greedy=True)
    parser.add_argument("--out", metavar="FILE", help="a new file; CHECKPOINT-completions.jsonl by default")
    _add_settings_of_generate(parser)


def _add_eval_flags(parser: argparse.ArgumentParser) -> None:
    _add_checkpoint(parser)
    _add_samples(parser, "1, the most likely tokens unless --temperature is given")
    parser.add_argument("--out", metavar="FILE", help="a new file for the results as JSON; none by default")
    _add_settings_of_generate(parser)


def _add_sample_flags(parser: argparse.ArgumentParser) -> None:
    _add_checkpoint(parser)
    parser.add_argument("prompt", metavar="PROMPT", nargs="?", help="taken as it is; stdin by default")
    parser.add_argument("--row", metavar="N", help="take the prompt number N of --data, counted from 1")
    parser.add_argument("--chat", action="store_true", help="the prompt is what a user says, in the chat template")
    _add_samples(parser, "4, or 1 with --greedy", greedy=True)
    _add_settings_of_generate(parser)


def _add_checkpoint(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "checkpoint", type=_path, metavar="CHECKPOINT", help="such as runs/NAME/checkpoints/step-000500, or a model"
    )


def _add_samples(parser: argparse.ArgumentParser, default: str, *, greedy: bool = False) -> None:
    text = f"completions of each prompt; {default} by default"
    parser.add_argument("--samples", metavar="K", help=text)
    if greedy:
        parser.add_argument("--greedy", action="store_true", help="the most likely tokens instead of sampled ones")


def _add_settings_of_generate(parser: argparse.ArgumentParser) -> None:
    from redit_fast.training.generation import SETTINGS

    _add_settings(parser, SETTINGS)


def _add_to_verl_flags(parser: argparse.ArgumentParser) -> None:
    text = "YAML or JSON file with settings; flags override it"
    parser.add_argument("config", type=_path, metavar="CONFIG", help=text)
    parser.add_argument("--out", metavar="DIR", help="a new folder; CONFIG-verl here by default")
    _add_settings(parser)


def _add_plot_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", type=_path, metavar="RUN", nargs="+", help="runs' folders, such as runs/demo")
    parser.add_argument("--out", metavar="FILE", help="a .png, .svg or .pdf file; plot.png by default")
    text = "keys of metrics.jsonl, a panel each; reward and accuracy/held_out by default, as far as all runs have them"
    parser.add_argument("--metric", nargs="+", action=_Once, default=argparse.SUPPRESS, metavar="NAME", help=text)
    text = "across: steps, the default, tokens trained on, or time"
    parser.add_argument("--x", choices=("steps", "tokens", "time"), default="steps", help=text)


def _add_bench_flags(parser: argparse.ArgumentParser) -> None:
    from redit_fast.benchmarks import command

    command.add_flags(parser)


# Of the commands whose flags take an import of a second.
FLAGS: dict[str, Callable[[argparse.ArgumentParser], None]] = {
    "train": _add_train_flags,
    "reward-model": _add_reward_model_flags,
    "generate": _add_generate_flags,
    "eval": _add_eval_flags,
    "sample": _add_sample_flags,
    "to-verl": _add_to_verl_flags,
    "bench": _add_bench_flags,
}
