"""Whole steps of training, from prompts to updated weights: redit-fast bench step

Prompts, lengths, completions and rewards are frozen. Each provider runs in a process of its own. A table has the whole
step: completions are sampled with the frozen lengths, which cost what they cost, and then the frozen ones take their
place; so every provider's gradient is known. The other table has the step on given completions.

The rollout is `generate` of this package, or TRL's `model.generate`, at temperature 1. Where a completion has to end,
the logit of the end token is put above all others, before that below them. verl rolls
out by engines that are not here: it has a row in the other table, and none under a KL term.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import torch

from .measure import Errors, Provider, Run, Table
from .place import Place
from .roofline import Work
from .step_cases import Case, few, of_table, prepare
from .step_hosts import Settings
from .step_worker import Process

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
    "verl, its torch head": ("step_verl", "TorchHead"),
    "verl, logits": ("step_verl", "Logits"),
}
SIZES = {  # cases, rounds and providers
    "cpu": (("equal", "gsm8k", "math", "reasoning", "few_shot"), 3, tuple(HOSTS)),
    "quick": (("gsm8k",), 2, ("redit-fast", "redit-fast, GR", "TRL, redit-fast, packing", "TRL")),
    "cuda": (("gsm8k", "math", "reasoning", "few_shot"), 5, tuple(HOSTS)),
    "dry": (("gsm8k",), 2, ("redit-fast",)),
}


def tables(place: Place, size: str) -> Iterator[Table]:
    cases, rounds, hosts = SIZES[size]
    for name in cases:
        yield from of_case(place, case_of(name, place, size), rounds, hosts)


def case_of(name: str, place: Place, size: str) -> Case:
    case = few(size) if name == "equal" else of_table(name, place.kind, size)
    return replace(case, beta=KL.get(name, 0.0))


def of_case(place: Place, case: Case, rounds: int, hosts: Sequence[str]) -> Iterator[Table]:
    """With the rollout, where there is one and without: the same processes."""
    dtype = torch.float32 if place.kind == "cpu" else torch.bfloat16
    name = str(dtype).removeprefix("torch.")
    sizes = {"R": case.scored, "useful": case.useful, "least": case.least, "V": case.vocabulary}
    with tempfile.TemporaryDirectory() as folder:
        case = replace(case, folder=folder)
        prepare(case, place.device, dtype)
        processes = Processes(Settings(case, place.device.type, name))
        try:
            for rollout in (True, False):
                title = f"step, lengths {case.name}" if rollout else f"step without rollout, lengths {case.name}"
                providers = [
                    Provider(host, processes.builder(host, rollout), "redit" in host)
                    for host in hosts if not host.startswith("verl") or not (rollout or case.beta)
                ]  # fmt: skip
                yield Table("step", title, sizes, name, work(case, rollout), providers, "log-prob", LIMITS[dtype],
                            rounds, tokens=case.useful)  # fmt: skip
        finally:
            processes.close()


class Processes:
    """Of the providers of a case, each started when it is first needed."""

    def __init__(self, settings: Settings):
        self.settings = settings
        self.started: dict[str, Process] = {}

    def builder(self, name: str, rollout: bool) -> Callable[[], Run]:
        module, host = HOSTS[name]

        def build() -> Run:
            if name not in self.started or not self.started[name].alive:
                self.started[name] = Process(
                    module, host, replace(self.settings, gr="GR" in name, packing="packing" in name)
                )
            step = self.started[name]
            return lambda turn, thorough: step(turn, rollout)

        return build

    def close(self) -> None:
        for process in self.started.values():
            process.close()


def work(case: Case, rollout: bool) -> Work:
    """The products of one pass forward and backward in which each prompt is computed once; in the rollout forward."""
    width, layers = case.model["hidden_size"], case.model["num_hidden_layers"]
    heads, groups = case.model["num_attention_heads"], case.model["num_key_value_heads"]
    attention = width * width * (2 + 2 * groups / heads)
    weights = int(layers * (attention + 3 * width * case.model["intermediate_size"]))
    forward = 2 * (case.least * weights + case.scored * case.vocabulary * width)
    return Work(flops=(4 if rollout else 3) * forward)


if __name__ == "__main__":
    from .command import main

    sys.exit(main("step", tables))
