"""The processes of a run: torchrun's, one for each GPU of a machine, or one alone, for which nothing here is sent.

Every rank rolls out its share of the prompts and then has all samples: integers, texts and rewards. The plan
(`packing.plan`) is made of these alone, so that every rank makes the same one and takes its own part of it. DDP and
FSDP2 give the mean of the ranks' gradients: a loss, divided by the whole step's denominator, is multiplied by their
number.

What a rank does by itself may fail there or be stopped there. It is done inside `gathered`, after which all ranks go on
or all raise. Elsewhere ranks meet in every pass, and a stop waits.
"""

from __future__ import annotations

import inspect
import os
import signal
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from datetime import timedelta
from types import FrameType
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from redit_fast.extras import MissingExtra
from redit_fast.gr.shards import is_shard
from redit_fast.signals import Handler, handled
from redit_fast.training import fsdp
from redit_fast.training.config_values import Strategy
from redit_fast.training.rewards.user_code import RewardError
from redit_fast.training.rollout import EngineError

T = TypeVar("T")
WAIT = timedelta(hours=2)  # of a rank for the slowest one's rewards
# What ends a run in one sentence. Anything else that a rank raises has its traceback there and ends the others, whose
# connections to it break.
SAID = (
    RewardError,
    EngineError,
    MissingExtra,
    NotImplementedError,
    FloatingPointError,
    OSError,
    ValueError,
    KeyboardInterrupt,
)


class _Forward(nn.Module):
    """A model whose passes are a module's forward: what DDP and FSDP2 get weights and gradients ready around."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, compute: Callable[[Any], T]) -> T:
        return compute(self.model)


@dataclass
class Ranks:
    """This process among those of a run."""

    rank: int = 0
    size: int = 1
    strategy: Strategy | None = None  # None: one process without torchrun
    stops: list[int] = field(default_factory=list)  # signals that came and wait
    stoppable: bool = False  # what this rank is at
    agreed: BaseException | None = None  # what all ranks raise
    forwards: dict[nn.Module, nn.Module] = field(default_factory=dict)  # of the models that are prepared

    @property
    def first(self) -> bool:
        return self.rank == 0

    def share(self, count: int) -> range:
        """Which of `count` things are this rank's; the ranks' shares follow one another."""
        return range(count * self.rank // self.size, count * (self.rank + 1) // self.size)

    def gathered(self, work: Callable[[], T], *, stoppable: bool = False) -> list[T]:
        """What `work` returns on each rank, where it runs by itself.

        Args:
            stoppable: a stop, one that has come since the last time too, ends it.

        Raises:
            What `work` raises; on the ranks where it does not, what it raises on another.
        """
        if self.strategy is None:
            return [work()]
        value, error = None, None
        self.stoppable = stoppable and self.agreed is None
        try:
            if self.stoppable and self.stops:
                signal.raise_signal(self.stops.pop())
            value = work()
        except SAID as raised:
            error = raised
        finally:
            self.stoppable = False
        failure = None if error is None else (next(kind for kind in SAID if isinstance(error, kind)), str(error))
        told: list[Any] = [None] * self.size
        torch.distributed.all_gather_object(told, (value, failure))
        for _, failure in told:
            if failure is not None:
                kind, message = failure
                self.agreed = kind(message) if error is None else error
                raise self.agreed
        return [value for value, _ in told]

    def alone(self, work: Callable[[], T], *, stoppable: bool = False) -> T:
        """What `work` returns on this rank, if it raises on none."""
        found: list[T] = []
        self.gathered(lambda: found.append(work()), stoppable=stoppable)
        return found[0]

    def by_first(self, work: Callable[[], T], *, stoppable: bool = False) -> T:
        """What `work` returns on the first rank, the only one where it runs."""
        return self.gathered(lambda: work() if self.first else None, stoppable=stoppable)[0]  # type: ignore[return-value]

    def summed(self, values: Tensor) -> Tensor:
        """The sum over the ranks, in place."""
        if self.size > 1:
            torch.distributed.all_reduce(values)
        return values

    def prepare(self, model: PreTrainedModel, device: str) -> None:
        """Readies a model, which is the same on all ranks, for `forward`. FSDP2 puts shards on `device` in the place of
        its parameters, so that its optimizer comes afterwards; the model may be on the CPU before."""
        if self.strategy is None:
            return
        forward = _Forward(model)
        if self.strategy == "fsdp2":
            fsdp.shard(forward, model, device, self.size)
            self.forwards[model] = forward
        elif any(p.requires_grad for p in model.parameters()):  # a reference is not
            ddp_of: Any = nn.parallel.DistributedDataParallel
            renamed_in_2_13 = "forward_sync_buffers" in inspect.signature(ddp_of).parameters
            buffers = "forward_sync_buffers" if renamed_in_2_13 else "broadcast_buffers"
            self.forwards[model] = ddp_of(forward, **{buffers: False})

    def forward(self, model: nn.Module, compute: Callable[[Any], T], *, reduces: bool = True) -> T:
        """`compute(model)`, all that touches the model's weights in a forward pass.

        Args:
            reduces: the backward pass sums the gradients over the ranks under DDP, which otherwise adds them up on each
                for the next that does. Under FSDP2 each does, so that no rank ever holds a whole gradient.
        """
        forward = self.forwards.get(model)
        if forward is None:
            return compute(model)
        if isinstance(forward, nn.parallel.DistributedDataParallel) and not reduces:
            with forward.no_sync():
                return forward(compute)
        return forward(compute)

    @contextmanager
    def whole(self, model: PreTrainedModel) -> Iterator[None]:
        """Inside, each rank has all weights of a model and may call it by itself: for rollouts."""
        forward = self.forwards.get(model)
        if forward is None or self.strategy != "fsdp2":
            yield
            return
        with fsdp.gathered(forward, model):
            yield

    def state_of(self, model: PreTrainedModel, *, trained: bool = False) -> dict[str, Tensor] | None:
        """The whole weights under their names, on the CPU of the first rank and empty on others; None where the model
        has them itself. Tied weights share memory. With `trained` those alone that have gradients."""
        if self.strategy != "fsdp2":
            return None
        found: dict[Tensor, Tensor] = {}
        state = {}
        for name, tensor in model.state_dict(keep_vars=True).items():
            if trained and not tensor.requires_grad:
                continue
            if tensor not in found:
                piece = tensor.detach()
                whole = piece.full_tensor() if is_shard(piece) else piece
                found[tensor] = whole.cpu() if self.first else whole.new_empty(0)
            state[name] = found[tensor]
        return state if self.first else {}


def launched() -> bool:
    """By torchrun, or by what sets its variables."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def _number(name: str, default: int | None = None) -> int:
    """Of a variable of torchrun."""
    text = os.environ.get(name) or str(default)
    if not text.isdecimal():
        raise ValueError(f"{name} is {text!r}, needs a whole number, as torchrun sets it")
    return int(text)


@contextmanager
def started(strategy: Strategy, device: str) -> Iterator[Ranks]:
    """This process among those that torchrun has started.

    Args:
        device: "cpu" or "cuda".

    Raises:
        ValueError: several processes without torchrun's other variables, several machines, more processes than GPUs,
            fsdp2 without torchrun.
    """
    if not launched():
        if (processes := os.environ.get("WORLD_SIZE") or "1") != "1":
            raise ValueError(f"WORLD_SIZE is {processes} and RANK is not set: start the run with torchrun")
        if strategy == "fsdp2":
            raise ValueError(
                "strategy is fsdp2, which shards the model over processes: start the run with torchrun, or take "
                "strategy ddp"
            )
        yield Ranks()
        return
    rank, size = _number("RANK"), _number("WORLD_SIZE")
    here = _number("LOCAL_RANK", rank)
    if (local := _number("LOCAL_WORLD_SIZE", size)) != size:
        raise ValueError(
            f"WORLD_SIZE is {size} and LOCAL_WORLD_SIZE {local}: a run is on one machine; verl with redit-fast's "
            "plugin trains on several"
        )
    if device == "cuda":
        if here >= torch.cuda.device_count():
            raise ValueError(f"torchrun starts {size} processes and the machine has {torch.cuda.device_count()} GPUs")
        torch.cuda.set_device(here)
    ranks = Ranks(rank, size, strategy)

    def handler_of(before: Any) -> Handler | None:
        """A stop does where this rank can be stopped what it does in a run of one process."""

        def handle(number: int, frame: FrameType | None) -> None:
            if ranks.stoppable:
                before(number, frame)
            else:
                ranks.stops.append(number)

        return handle if callable(before) else None

    try:
        with handled(handler_of), _quiet(rank), _group("cpu:gloo,cuda:nccl" if device == "cuda" else "gloo"):
            yield ranks
    except SAID as error:
        if rank and error is ranks.agreed:
            stop = isinstance(error, KeyboardInterrupt)
            raise SystemExit(getattr(error, "code", 130) if stop else 2) from None  # the first rank says it
        if rank:
            error.add_note(f"on rank {rank}")  # so that the command line prints it there too
        raise


@contextmanager
def _group(backends: str) -> Iterator[None]:
    """The caller's, where it has one: torch makes no second one at the same address."""
    if torch.distributed.is_initialized():
        yield
        return
    torch.distributed.init_process_group(backends, timeout=WAIT)
    try:
        yield
    finally:
        torch.distributed.destroy_process_group()


@contextmanager
def _quiet(rank: int) -> Iterator[None]:
    """The first rank warns for all."""
    with warnings.catch_warnings() if rank else nullcontext():
        if rank:
            warnings.simplefilter("ignore")
        yield
