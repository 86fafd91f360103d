"""Log-probs and losses from logits: redit-fast bench token_loss

Forward: the log-probs alone. Gradient: the loss -mean(A logp), on policy, and its gradient for the logits. Logits have
the three dimensions that trainers pass, eight sequences, and a deviation of 3. `x.sum()` reads the logits and does
nothing else.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

import redit_fast as rf

from . import oracle, peers
from .backends import forced, of_ours
from .clock import clock
from .measure import WORST_ROW, Errors, Provider, Run, Table
from .oracle import Batch
from .place import Place
from .roofline import Work

SEQUENCES = 8
FORWARD = "log-probs"
GRADIENT = "loss and gradient"
LIMITS = {  # log-prob; gradient in the Frobenius norm. Others round log-probs of up to 25 to the logits' 8 bits
    torch.float32: (1e-3, 1e-3),
    torch.bfloat16: (0.3, 0.1),
}
SIZES = {  # rows and vocabulary; rows of the series, and their vocabulary; vocabularies of theirs, and their rows
    "cpu": ((1024, 32_000), (64, 128, 256, 512, 1024), 8000, (2000, 8000, 32_000, 64_000, 128_000), 128),
    "quick": ((256, 16_000), (16, 32, 64, 128, 256), 4000, (1000, 2000, 4000, 8000, 16_000), 64),
    "cuda": ((16_384, 151_936), (1024, 2048, 4096, 8192, 16_384), 32_000,
             (8000, 16_000, 32_000, 64_000, 128_000), 4096),
    "dry": ((32, 300), (8, 16, 32), 50, (), 8),
}  # fmt: skip
CAUSES = {
    "x.sum()": "it computes no exponential: a sum of the same bytes",
}


def tables(place: Place, size: str) -> Iterator[Table]:
    (rows, vocabulary), many_rows, of_rows, vocabularies, of_vocabularies = SIZES[size]
    rounds = 15 if size == "cpu" else 7
    for dtype in (torch.float32, torch.bfloat16) if place.kind == "cpu" else (torch.bfloat16,):
        yield forward(place, rows, vocabulary, dtype, rounds)
        yield gradient(place, rows, vocabulary, dtype, rounds)
    dtype = torch.float32 if place.kind == "cpu" else torch.bfloat16
    for count in many_rows:
        yield gradient(place, count, of_rows, dtype, 5, axis="R")
    for count in vocabularies:
        yield gradient(place, of_vocabularies, count, dtype, 5, axis="V")


def logits_and_batches(place: Place, rows: int, vocabulary: int, dtype: torch.dtype) -> tuple[Tensor, list[Batch]]:
    length = rows // SEQUENCES
    logits = torch.empty(SEQUENCES, length, vocabulary, dtype=dtype, device=place.device)
    logits.normal_(std=3, generator=place.generator(0))
    batches = []
    for turn in range(2):
        targets, advantages = oracle.draw(place, SEQUENCES, length, vocabulary, turn)
        flat, wanted = logits.view(rows, vocabulary), targets.flatten()
        exact = torch.cat(
            [oracle.log_probs(flat[part].double(), wanted[part]) for part in oracle.slices(rows, place.device)]
        )
        batches.append(Batch(targets, advantages, exact.view(targets.shape)))
    return logits, batches


def forward(place: Place, rows: int, vocabulary: int, dtype: torch.dtype, rounds: int) -> Table:
    logits, batches = logits_and_batches(place, rows, vocabulary, dtype)

    def provider(name: str, load: Callable[[], peers.Logp], ours: bool = False, one_more: bool = False) -> Provider:
        def build() -> Run:
            logp, given = load(), _one_more(logits) if one_more else logits

            def run(turn: int, thorough: bool) -> Errors:
                batch = batches[turn % 2]
                with torch.no_grad(), clock:
                    out = logp(given, batch.targets)
                return Errors(oracle.value_error(out, batch))

            return run

        return Provider(name, build, ours, CAUSES.get(name, ""))

    def add() -> Run:
        def run(turn: int, thorough: bool) -> Errors:
            with clock:
                logits.sum()
            return Errors()

        return run

    providers = [
        *(provider(name, partial(forced, backend, rf.token_logp), True)
          for name, backend in of_ours("token_logp", place)),
        Provider("x.sum()", add, cause=CAUSES["x.sum()"]),
        provider("PyTorch, eager", lambda: peers.eager),
        provider("torch.compile", lambda: torch.compile(peers.eager)),
        provider("F.cross_entropy", lambda: peers.cross_entropy),
        provider("TRL, selective_log_softmax", lambda: peers.trl_logp(place)),
        provider("verl, logprobs_from_logits", lambda: peers.verl_logp(place)),
        provider("Liger, Triton", lambda: peers.liger_logp(place), one_more=True),
        provider("quack", lambda: peers.quack_logp(place)),
    ]  # fmt: skip
    return _table(FORWARD, logits, dtype, Work(reads=logits.nbytes), providers, rounds)


def gradient(place: Place, rows: int, vocabulary: int, dtype: torch.dtype, rounds: int, axis: str = "") -> Table:
    logits, batches = logits_and_batches(place, rows, vocabulary, dtype)

    def compare(grad: Tensor, batch: Batch, turn: int, thorough: bool) -> Errors:
        sums, targets, wanted = oracle.Sums(), batch.targets.flatten(), oracle.coefficients(batch)
        found, flat = grad.reshape(rows, vocabulary), logits.view(rows, vocabulary)
        for part in oracle.chosen(rows, turn, thorough, place.device).split(oracle.rows_at_once(place.device)):
            sums.add(found[part], oracle.slopes(flat[part].double(), targets[part], wanted[part]))
        return sums.errors(None)

    def provider(
        name: str, load: Callable[[], Callable], ours: bool = False, inplace: bool = False, one_more: bool = False
    ) -> Provider:
        """`load()` gives f(leaf, batch) -> (loss, log-probs or None); `one_more`: of one position more a sequence."""

        def build() -> Run:
            loss_of = load()
            given = _one_more(logits) if one_more else logits
            buffer = torch.empty_like(given) if inplace else given

            def run(turn: int, thorough: bool) -> Errors:
                batch = batches[turn % 2]
                if inplace:
                    buffer.copy_(given)
                leaf = buffer.detach().requires_grad_()
                with clock:
                    loss, logp = loss_of(leaf, batch)
                    (grad,) = torch.autograd.grad(loss, leaf)
                found = compare(grad[:, : logits.shape[1]], batch, turn, thorough)
                return found._replace(value=oracle.value_error(logp, batch))

            return run

        return Provider(name, build, ours)

    def ours(inplace: bool) -> list[Provider]:
        way = "in place" if inplace else "fresh"
        return [
            provider(f"{name}, {way}", partial(_ours, forced(backend, rf.grpo_loss), inplace), True, inplace)
            for name, backend in of_ours("token_loss", place)
        ]

    def of(load: Callable[[], peers.Logp]) -> Callable[[], Callable]:
        def loaded() -> Callable:
            logp_of = load()

            def loss(leaf: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
                logp = logp_of(leaf, batch.targets)
                return peers.on_policy(logp, batch.advantages[:, None]), logp

            return loss

        return loaded

    providers = [
        *ours(inplace=True),
        *ours(inplace=False),
        provider("PyTorch, eager", of(lambda: peers.eager)),
        *([] if axis else [provider("torch.compile", lambda: _compiled)]),
        provider("TRL, selective_log_softmax", of(lambda: peers.trl_logp(place))),
        *([] if axis else [
            provider("verl, logprobs_from_logits", of(lambda: peers.verl_logp(place))),
            provider("Liger, Triton", lambda: _without_logp(peers.liger_triton_loss(place)), inplace=True,
                     one_more=True),
            provider("quack", of(lambda: peers.quack_logp(place))),
        ]),
    ]  # fmt: skip
    return _table(GRADIENT, logits, dtype, Work(updates=logits.nbytes), providers, rounds, axis)


def _ours(grpo_loss: Callable, inplace: bool) -> Callable:
    config = rf.LossConfig()

    def loss(leaf: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        out = grpo_loss(leaf, batch.targets, batch.advantages, config=config, inplace=inplace)
        return out.loss, out.logp

    return loss


def _one_more(logits: Tensor) -> Tensor:
    """(B, T + 1, V), as a model gives them."""
    return F.pad(logits, (0, 0, 0, 1))


def _compiled(leaf: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
    return _eager_loss(leaf, batch.targets, batch.advantages)


@torch.compile
def _eager_loss(logits: Tensor, targets: Tensor, advantages: Tensor) -> tuple[Tensor, Tensor]:
    logp = peers.eager(logits, targets)
    return peers.on_policy(logp, advantages[:, None]), logp


def _without_logp(loss: Callable) -> Callable:
    return lambda leaf, batch: (loss(leaf, batch.targets, batch.advantages), None)


def _table(
    title: str, logits: Tensor, dtype: torch.dtype, work: Work, providers: list[Provider], rounds: int, axis: str = ""
) -> Table:
    sizes = {"R": logits.shape[0] * logits.shape[1], "V": logits.shape[2]}
    limits = Errors(*LIMITS[dtype], WORST_ROW)
    name = str(dtype).removeprefix("torch.")
    return Table("token_loss", title, sizes, name, work, providers, "log-prob", limits, rounds, axis)


if __name__ == "__main__":
    from .command import main

    sys.exit(main("token_loss", tables))
