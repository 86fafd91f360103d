"""Whole steps of training, from prompts to updated weights: redit-fast bench step

Prompts, lengths, completions and rewards are frozen. Each provider runs in a process of its own. Completions are
sampled with the frozen lengths, which cost what they cost, and then the frozen ones take their place; so every
provider's gradient is known. One table has the whole step, the other the same steps without their rollout.

The rollout is `generate` of this package, or TRL's `model.generate`, at temperature 1. Where a completion has to end,
the logit of the end token is put above all others, before that below them. Who samples by an engine that is not here,
or takes no KL term by itself, has a row that says so.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import torch

from .measure import FAILURES, Absent, Errors, Provider, Run, Table
from .place import Place
from .roofline import Work
from .step_cases import Case, few, of_table, prepare
from .step_hosts import Settings
from .step_worker import Libraries, Process, Step, taken
from .table import PHASES

KL = {"math": 0.04}  # weight of a KL term, which needs the reference's log-probs: a phase of its own
LIMITS = {torch.float32: Errors(1e-4, 1e-3, 0.5), torch.bfloat16: Errors(0.3, 0.2, 0.9)}
HOSTS = {
    "redit-fast": ("step_hosts", "Trainer"),
    "redit-fast, GR": ("step_hosts", "Trainer"),
    "TRL, redit-fast": ("step_trl", "SwapIn"),
    "TRL, redit-fast, packing": ("step_trl", "SwapIn"),
    "TRL, redit-fast, packing, GR": ("step_trl", "SwapIn"),
    "TRL": ("step_trl", "TRL"),
    "verl, redit-fast's head": ("step_verl", "OurHead"),
    "verl, redit-fast's head, GR": ("step_verl", "OurHead"),
    "verl, its torch head": ("step_verl", "TorchHead"),
    "verl, logits": ("step_verl", "Logits"),
    "PrefixGrouper": ("step_prefix", "PrefixGrouper"),
}
NO_ROLLOUT = {
    "step_verl": "it samples by vLLM or SGLang, which do not run here",
    "step_prefix": "it computes passes over given completions and samples none",
}
NO_KL = {"step_verl": "it takes the reference's log-probs from a worker of their own, which is not measured"}
SIZES = {  # cases, rounds and providers
    "cpu": (("equal", "gsm8k", "math", "reasoning", "few_shot"), 3, tuple(HOSTS)),
    "quick": (("gsm8k",), 2, tuple(HOSTS)),
    "cuda": (("gsm8k", "math", "reasoning", "few_shot"), 5, tuple(HOSTS)),
    "dry": (("gsm8k",), 2, ("redit-fast",)),
}


def tables(place: Place, size: str) -> Iterator[Table]:
    cases, rounds, hosts = SIZES[size]
    libraries = Libraries(place.device.type)
    try:
        for name in cases:
            yield from of_case(place, case_of(name, place, size), rounds, hosts, libraries)
    finally:
        libraries.close()


def case_of(name: str, place: Place, size: str) -> Case:
    case = few(size) if name == "equal" else of_table(name, place.kind, size)
    return replace(case, beta=KL.get(name, 0.0))


def of_case(place: Place, case: Case, rounds: int, hosts: Sequence[str], libraries: Libraries) -> Iterator[Table]:
    dtype = torch.float32 if place.kind == "cpu" else torch.bfloat16
    name = str(dtype).removeprefix("torch.")
    sizes = {"R": case.scored, "useful": case.useful, "least": case.least, "V": case.vocabulary}
    with tempfile.TemporaryDirectory() as folder:
        case = replace(case, folder=folder)
        prepare(case, place.device, dtype)
        steps = Steps(Settings(case, place.device.type, name), libraries)
        try:
            for rollout in (False, True):
                title = f"step, lengths {case.name}" if rollout else f"step without rollout, lengths {case.name}"
                builder = steps.again if rollout else steps.builder
                providers = [Provider(host, builder(host), "redit" in host) for host in hosts]
                yield Table("step", title, sizes, name, work(case, rollout), providers, "log-prob", LIMITS[dtype],
                            rounds, tokens=case.useful)  # fmt: skip
        finally:
            steps.close()


class Steps:
    """Of the providers of a case, in processes that start when they are first needed. The table without rollouts makes
    the steps; the other one has the same again, with their rollouts."""

    def __init__(self, settings: Settings, libraries: Libraries):
        self.settings, self.libraries = settings, libraries
        self.processes: dict[str, Process] = {}
        self.made: dict[str, dict[int, Step | Exception]] = {}  # provider -> turn -> a step, or what came instead

    def builder(self, name: str) -> Callable[[], Run]:
        module = HOSTS[name][0]

        def build() -> Run:
            made = self.made[name] = {}
            try:
                process = self._process(name)
            except (*FAILURES, Absent) as error:
                made[0] = error
                raise

            def run(turn: int, thorough: bool) -> Errors:
                try:
                    step = process(turn, module not in NO_ROLLOUT)
                except FAILURES as error:
                    made[turn] = error
                    raise
                made.setdefault(turn, step)
                return taken(step, "scoring", "update")

            return run

        return build

    def _process(self, name: str) -> Process:
        module, host = HOSTS[name]
        if self.settings.case.beta and module in NO_KL:
            raise Absent(NO_KL[module])
        settings = replace(self.settings, gr="GR" in name, packing="packing" in name)
        self.processes[name] = self.libraries.start(module, host, settings)
        return self.processes[name]

    def again(self, name: str) -> Callable[[], Run]:
        def build() -> Run:
            if HOSTS[name][0] in NO_ROLLOUT:
                raise Absent(NO_ROLLOUT[HOSTS[name][0]])
            return run

        def run(turn: int, thorough: bool) -> Errors:
            step = self.made[name][turn]
            if isinstance(step, Exception):
                raise step
            return taken(step, *PHASES)

        return build

    def close(self) -> None:
        for process in self.processes.values():
            process.close()


def work(case: Case, rollout: bool, passes: int = 1) -> Work:
    """The products of passes forward and backward in which each prompt is computed once; in the rollout forward."""
    width, layers = case.model["hidden_size"], case.model["num_hidden_layers"]
    heads, groups = case.model["num_attention_heads"], case.model["num_key_value_heads"]
    attention = width * width * (2 + 2 * groups / heads)
    weights = int(layers * (attention + 3 * width * case.model["intermediate_size"]))
    forward = 2 * (case.least * weights + case.scored * case.vocabulary * width)
    return Work(flops=(3 * passes + rollout) * forward)


if __name__ == "__main__":
    from .command import main

    sys.exit(main("step", tables))
