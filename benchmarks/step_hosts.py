"""A whole step of this package's trainer, and what the steps of all providers have in common."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

import redit_fast as rf

from .clock import wait
from .measure import Wrong
from .step_cases import END, EPSILON, GROUP, MAX_NORM, Case, Pass2, batches, weights

LR = 1e-6


@dataclass(frozen=True)
class Settings:
    """What a step's process is sent."""

    case: Case
    device: str
    dtype: str
    gr: bool = False
    packing: bool = False  # of the swap-in; the trainer packs by itself
    rank: int = 0  # of `size` processes that share the step
    size: int = 1
    strategy: Literal["ddp", "fsdp2"] | None = None  # ddp or fsdp2; None: one process without ranks
    meeting: str = ""  # a file by which the ranks find each other


class Host(Protocol):
    """A provider's step. Its optimizer is some AdamW with learning rate LR, whose state is named as torch's."""

    model: nn.Module
    optimizer: Any
    pass2: Pass2  # what its second pass is, where GR is on

    @staticmethod
    def load() -> None:
        """Imports the provider's libraries, whose memory is none of the step's.

        Raises:
            Absent: the provider cannot run here, and why.
        """

    def step(self, turn: int, phases: Phases, rollout: bool) -> None:
        """One whole step on the batch of that turn; under `rollout` completions are sampled, before the frozen ones
        take their place."""

    def logp(self) -> dict[tuple[int, ...], Tensor]:
        """Of the last step's first pass: the log-probs (T,) of each completion."""


class Phases:
    """Seconds by phase, each without those of the phases inside it."""

    def __init__(self, timer: Callable[[], float]):
        self.timer = timer
        self.seconds: dict[str, float] = {}
        self._open: list[str] = []
        self._since = 0.0

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        self.enter(name)
        try:
            yield
        finally:
            self.leave()

    @property
    def current(self) -> str:
        return self._open[-1]

    def enter(self, name: str) -> None:
        self._account()
        self._open.append(name)

    def leave(self) -> None:
        self._account()
        self._open.pop()

    def _account(self) -> None:
        wait()
        now = self.timer()
        if self._open:
            self.seconds[self._open[-1]] = self.seconds.get(self._open[-1], 0.0) + now - self._since
        self._since = now


class Ends:
    """Inside, each sample's completion ends after as many tokens as it has to, and not before: a hook on the model
    puts the logit of END above or below all others. So a rollout has the frozen lengths, whatever is drawn.

    Args:
        drops: whether ended rows leave the batch at every CHECK_EVERY-th token, as in this package's rollouts.
    """

    def __init__(self, model: nn.Module, lengths: list[int], *, drops: bool):
        from redit_fast.training.rollout.local import CHECK_EVERY

        self.model, self.tokens = model, 0
        self.rows, self.ending = [], []
        for token in range(-(-max(lengths) // CHECK_EVERY) * CHECK_EVERY):  # a rank looks whether all have ended
            seen = token // CHECK_EVERY * CHECK_EVERY
            there = [n for n in lengths if not drops or n > seen]
            self.rows.append(len(lengths) // GROUP if drops and not token else len(there))
            ending = [row for row, n in enumerate(there) if n == token + 1]
            self.ending.append(torch.tensor(ending, dtype=torch.int64))

    def __enter__(self) -> None:
        self.tokens = 0
        self.handle = self.model.register_forward_hook(self._hook)

    def __exit__(self, *_: object) -> None:
        self.handle.remove()

    def _hook(self, model: nn.Module, args: object, output: Any) -> None:
        logits, rows = output.logits[:, -1], self.rows[self.tokens]
        if len(logits) != rows:
            raise Wrong(f"token {self.tokens} of the rollout is computed for {len(logits)} rows, expected {rows}")
        ending = self.ending[self.tokens].to(logits.device)
        logits[:, END] = float("-inf")
        if len(ending):
            logits[ending] = float("-inf")
            logits[ending, END] = 0.0
        self.tokens += 1


def check_rollout(case: Case, completions: list[list[int]]) -> None:
    """Lengths, and that samples of a prompt differ."""
    if [len(completion) for completion in completions] != case.lengths:
        raise Wrong("the rollout has other lengths than those asked for")
    longer = [tuple(completion) for completion in completions if len(completion) > 8]
    if len(set(longer)) < len(longer):
        raise Wrong("the rollout has sampled a completion twice")


def start_of(case: Case, name: str = "start") -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(str(Path(case.folder) / name), dtype="auto")


class Trainer:
    """What redit_fast.training.trainer does in a step, without what it writes and shows."""

    pass2: Pass2 = "fresh"

    @staticmethod
    def load() -> None:
        for name in ("transformers.models.qwen2.modeling_qwen2", "redit_fast.training.setup",
                     "redit_fast.training.batch"):  # fmt: skip
            import_module(name)

    def __init__(self, settings: Settings):
        from redit_fast.training import setup
        from redit_fast.training.config import TrainConfig
        from redit_fast.training.distributed import Ranks

        self.settings, self.case = settings, settings.case
        self.ranks = Ranks(settings.rank, settings.size, settings.strategy)
        config = {"model": "-", "data": "-", "rewards": ["exact_match"], "group_size": GROUP,
                  "prompts_per_step": len(self.case.prompts), "learning_rate": LR, "beta": self.case.beta,
                  "max_completion_length": max(self.case.lengths), "max_grad_norm": MAX_NORM,
                  "gr_gamma": EPSILON if settings.gr else 0.0, "gr_epsilon": EPSILON}  # fmt: skip
        self.config = TrainConfig.model_validate(config)
        self.model = start_of(self.case).to(settings.device, getattr(torch, settings.dtype))
        self.ranks.prepare(self.model, settings.device)
        self.reference = None
        if self.case.beta:
            self.reference = start_of(self.case, "reference").to(self.model.device, self.model.dtype)
            self.ranks.prepare(self.reference, settings.device)
        self.optimizer = setup.optimizer(self.config, self.model)
        self.loss = setup.loss_config(self.config, self.model)
        self.batches = batches(self.case)
        groups = self.ranks.share(len(self.case.prompts))
        self.own = slice(groups.start, groups.stop)  # prompts that this rank samples for
        self.samples = torch.arange(groups.start * GROUP, groups.stop * GROUP)
        self.ends = Ends(self.model, [self.case.lengths[i] for i in self.samples], drops=True)

    def step(self, turn: int, phases: Phases, rollout: bool) -> None:
        from redit_fast.training.batch import Batch
        from redit_fast.training.rollout import Rollout
        from redit_fast.training.rollout.local import generate

        prompts, completions, rewards = self.batches[turn % 2]

        def sampled() -> Rollout:
            with self.ends:
                return generate(self.model, [END], prompts[self.own], group_size=GROUP, step=turn,
                                max_new_tokens=self.config.max_completion_length,
                                sample_ids=self.samples)  # fmt: skip

        if rollout:
            with phases("rollout"), self.ranks.whole(self.model):
                shares = self.ranks.gathered(sampled)
            check_rollout(self.case, Rollout.joined(shares).completions)
        with phases("scoring"):
            values = rf.group_advantages(rewards[:, None], group_size=GROUP, step=turn).values
            given = Rollout(completions, [True] * len(completions))
            self.batch = Batch.of(prompts, given, values, self.loss, self.config, turn, packed=True, ranks=self.ranks)
            if self.reference is not None:
                self.batch.score_reference(self.reference)
        with phases("update"):
            self.first = self.batch.backward(self.model)
            with self.optimizer.perturb() as perturbed:
                if perturbed:
                    self.batch.backward(self.model, masks_of=self.first)
            self.optimizer.step()
            self.optimizer.zero_grad()

    def logp(self) -> dict[tuple[int, ...], Tensor]:
        parts = self.first.logp.split(self.batch.lengths)
        return dict(zip(map(tuple, self.batch.completions), parts, strict=True))


def local(tensor: Tensor) -> Tensor:
    """What this rank holds of an FSDP2 parameter; any other tensor as it is."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def whole(tensor: Tensor) -> Tensor:
    """An FSDP2 parameter's pieces of all ranks, which meet here; any other tensor as it is."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def _piece(whole: Tensor, p: Any) -> Tensor:
    """What of a whole tensor this rank holds, where `p` is an FSDP2 parameter."""
    if not hasattr(p, "device_mesh"):
        return whole
    from torch.distributed.tensor import distribute_tensor

    return local(distribute_tensor(whole, p.device_mesh, p.placements, src_data_rank=None))


def states(host: Host) -> Iterator[tuple[str, Tensor, Mapping[str, Tensor]]]:
    """Of each parameter: its name, itself and its state, of which there is none before the first step."""
    optimizer = host.optimizer
    while not isinstance(optimizer, torch.optim.Optimizer) or type(optimizer).__module__.startswith("accelerate"):
        optimizer = optimizer.optimizer
    for name, p in host.model.named_parameters():
        yield name, p, optimizer.state.get(p, {})


@torch.no_grad()
def restart(host: Host, case: Case) -> None:
    """The start's weights, and an optimizer that has seen no step."""
    start = weights(case)
    for name, p, state in states(host):
        local(p).copy_(_piece(start[name], p))
        for key in state.keys() & {"step", "exp_avg", "exp_avg_sq"}:
            if isinstance(state[key], Tensor):
                local(state[key]).zero_()
        if "master" in state:
            local(state["master"]).copy_(_piece(start[name], p))
