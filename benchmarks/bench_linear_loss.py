"""The head and its loss, from hidden states: redit-fast bench linear_loss

The loss -mean(A logp), on policy, of eight sequences, and its gradients for hidden states and weight; logits would have
a deviation of 3. The bare three products X W^T, E W and E^T X, of R V D multiplications each, are the floor that
every head with a trainable weight has.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

import redit_fast as rf

from . import oracle, peers
from .backends import forced, of_ours
from .clock import clock
from .measure import WORST_ROW, Errors, Provider, Run, Table, Wrong
from .oracle import Batch
from .place import Place
from .roofline import Work

SEQUENCES = 8
HEAD = "head: loss and gradients"
LIMITS = {torch.float32: (1e-3, 1e-3), torch.bfloat16: (0.5, 0.1)}  # log-prob; gradients in the Frobenius norm
SIZES = {  # (R, D, V) of the tables; R, D and V of the series, and the two others beside each
    "cpu": (((512, 896, 32_000),), (64, 128, 256, 512, 1024), (256, 8000), (64, 128, 256, 512, 1024), (128, 8000),
            (2000, 4000, 8000, 16_000, 32_000), (128, 256)),
    "quick": (((128, 256, 8000),), (16, 32, 64, 128, 256), (64, 2000), (32, 64, 128, 256, 512), (64, 2000),
              (500, 1000, 2000, 4000, 8000), (64, 64)),
    "cuda": (((16_384, 896, 151_936), (16_384, 3584, 151_936)), (1024, 2048, 4096, 8192, 16_384), (896, 32_000),
             (512, 1024, 2048, 4096, 8192), (4096, 32_000), (8000, 16_000, 32_000, 64_000, 128_000), (4096, 896)),
    "dry": (((32, 16, 90),), (), (8, 40), (8, 16, 32), (8, 40), (), (8, 8)),
}  # fmt: skip
AT_ONCE = "it makes all rows' logits at once, without a loop over chunks, and in bfloat16 its products round them"
CAUSES = {
    "three products": "they make no exponential, no loss and no sums of rows",
    "PyTorch, eager": AT_ONCE,
    "torch.compile": AT_ONCE,
}


def tables(place: Place, size: str) -> Iterator[Table]:
    shapes, rows, beside_rows, widths, beside_widths, vocabularies, beside_vocabularies = SIZES[size]
    dtypes = (torch.float32, torch.bfloat16) if place.kind == "cpu" else (torch.bfloat16,)
    for r, d, v in shapes:
        for dtype in dtypes:
            yield table(place, r, d, v, dtype, 5 if size == "cpu" else 7)
    for r in rows:
        yield table(place, r, *beside_rows, dtypes[0], 5, axis="R")
    for d in widths:
        yield table(place, beside_widths[0], d, beside_widths[1], dtypes[0], 5, axis="D")
    for v in vocabularies:
        yield table(place, *beside_vocabularies, v, dtypes[0], 5, axis="V")


class Inputs:
    """Hidden states (B, T, D), weight (V, D), two batches, and for each the gradients in float64."""

    def __init__(self, place: Place, rows: int, width: int, vocabulary: int, dtype: torch.dtype):
        length, generator = rows // SEQUENCES, place.generator(0)
        self.hidden = torch.randn(SEQUENCES, length, width, generator=generator, device=place.device).to(dtype)
        weight = torch.randn(vocabulary, width, generator=generator, device=place.device)
        self.weight = weight.mul_(3 / width**0.5).to(dtype)
        self.batches: list[Batch] = []
        self.exact: list[tuple[Tensor, Tensor]] = []
        wide, hidden = self.weight.double(), self.hidden.flatten(0, 1).double()
        for turn in range(2):
            targets, advantages = oracle.draw(place, SEQUENCES, length, vocabulary, turn)
            batch = Batch(targets, advantages, torch.empty(targets.shape, dtype=torch.float64, device=place.device))
            hidden_grad, weight_grad = torch.empty_like(hidden), torch.zeros_like(wide)
            wanted = oracle.coefficients(batch)
            for part in oracle.slices(rows, place.device):
                logits, chosen = hidden[part] @ wide.t(), targets.flatten()[part]
                batch.exact.view(-1)[part] = oracle.log_probs(logits, chosen)
                slopes = oracle.slopes(logits, chosen, wanted[part])
                hidden_grad[part] = slopes @ wide
                weight_grad.addmm_(slopes.t(), hidden[part])
            self.batches.append(batch)
            self.exact.append((hidden_grad.float(), weight_grad.float()))

    def compare(self, hidden_grad: Tensor, weight_grad: Tensor, turn: int) -> Errors:
        """All of the gradients; by row those of hidden, and of the weight those of the targets."""
        of_hidden, of_weight, of_targets = oracle.Sums(), oracle.Sums(), oracle.Sums()
        exact_hidden, exact_weight = self.exact[turn % 2]
        of_hidden.add(hidden_grad.flatten(0, 1), exact_hidden.double())
        for part in oracle.slices(len(exact_weight), hidden_grad.device):
            of_weight.add(weight_grad[part], exact_weight[part].double())
        targets = self.batches[turn % 2].targets.unique()
        for part in oracle.slices(len(targets), hidden_grad.device):
            of_targets.add(weight_grad[targets[part]], exact_weight[targets[part]].double())
        return oracle.worst(of_hidden.errors(None), of_weight.errors(None)._replace(row=of_targets.worst))


def table(
    place: Place, rows: int, width: int, vocabulary: int, dtype: torch.dtype, rounds: int, axis: str = ""
) -> Table:
    inputs = Inputs(place, rows, width, vocabulary, dtype)

    def provider(name: str, load: Callable[[], Callable], ours: bool = False) -> Provider:
        """`load()` gives f(hidden, weight, batch) -> (loss, log-probs or None)."""

        def build() -> Run:
            loss_of = load()

            def run(turn: int, thorough: bool) -> Errors:
                batch = inputs.batches[turn % 2]
                leaves = [x.detach().requires_grad_() for x in (inputs.hidden, inputs.weight)]
                with clock:
                    loss, logp = loss_of(*leaves, batch)
                    hidden_grad, weight_grad = torch.autograd.grad(loss, leaves)
                return inputs.compare(hidden_grad, weight_grad, turn)._replace(value=oracle.value_error(logp, batch))

            return run

        return Provider(name, build, ours, CAUSES.get(name, ""))

    def of(name: str, load: Callable[[], peers.Logp], ours: bool = False) -> Provider:
        def loaded() -> Callable:
            logp_of = load()

            def loss(hidden: Tensor, weight: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
                logp = logp_of(hidden, weight, batch.targets)
                return peers.on_policy(logp, batch.advantages[:, None]), logp

            return loss

        return provider(name, loaded, ours)

    backends = of_ours("exp_product", place)
    providers = [
        *(provider(name, partial(_ours, forced(backend, rf.linear_grpo_loss), None), True)
          for name, backend in backends),
        provider("redit-fast, R/4 rows a chunk", lambda: _ours(rf.linear_grpo_loss, max(1, rows // 4)), True),
        of("redit-fast, linear_logp", lambda: cast(peers.Logp, rf.linear_logp), True),
        Provider("three products", lambda: _products(inputs), cause=CAUSES["three products"]),
        of("PyTorch, eager", lambda: peers.eager_head),
        of("TRL, fused head", lambda: peers.trl_head(place)),
    ]  # fmt: skip
    if not axis:
        providers += [
            provider("torch.compile", lambda: _compiled),
            provider("Liger, chunked loss", lambda: _without_logp(peers.liger_chunked_loss(place))),
            of("verl, torch head", lambda: peers.verl_head(place)),
            of("verl, Triton head", lambda: peers.verl_triton_head(place)),
            of("NeMo RL's chunks", lambda: peers.nemo_head(place)),
            of("F.linear_cross_entropy", lambda: peers.torch_head(place)),
            of("Cut Cross-Entropy", lambda: peers.cut_cross_entropy(place)),
            of("Cut Cross-Entropy, unfiltered", lambda: peers.cut_cross_entropy(place, filter_eps=None)),
            of("quack", lambda: peers.quack_head(place)),
            of("Unsloth", lambda: peers.unsloth_head(place)),
        ]
    moved = inputs.hidden.nbytes + inputs.weight.nbytes
    work = Work(reads=moved, writes=moved, flops=6 * rows * vocabulary * width)
    limits = Errors(*LIMITS[dtype], WORST_ROW)
    sizes, name = {"R": rows, "D": width, "V": vocabulary}, str(dtype).removeprefix("torch.")
    return Table("linear_loss", HEAD, sizes, name, work, providers, "log-prob", limits, rounds, axis)


def _ours(linear_grpo_loss: Callable, chunk_rows: int | None) -> Callable:
    config = rf.LossConfig()

    def loss(hidden: Tensor, weight: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        out = linear_grpo_loss(hidden, weight, batch.targets, batch.advantages, config=config, chunk_rows=chunk_rows)
        return out.loss, out.logp

    return loss


def _products(inputs: Inputs) -> Run:
    hidden, weight = inputs.hidden.flatten(0, 1), inputs.weight
    logits = torch.randn(len(hidden), len(weight), device=hidden.device).to(hidden.dtype)

    def run(turn: int, thorough: bool) -> Errors:
        with clock:
            products = F.linear(hidden, weight), logits @ weight, logits.t() @ hidden
        if not all(torch.isfinite(product[-1]).all() for product in products):
            raise Wrong("a product is not finite")
        return Errors()

    return run


@torch.compile
def _compiled_loss(hidden: Tensor, weight: Tensor, targets: Tensor, advantages: Tensor) -> tuple[Tensor, Tensor]:
    logp = peers.eager_head(hidden, weight, targets)
    return peers.on_policy(logp, advantages[:, None]), logp


def _compiled(hidden: Tensor, weight: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
    return _compiled_loss(hidden, weight, batch.targets, batch.advantages)


def _without_logp(loss: Callable) -> Callable:
    return lambda hidden, weight, batch: (loss(hidden, weight, batch.targets, batch.advantages), None)


if __name__ == "__main__":
    from .command import main

    sys.exit(main("linear_loss", tables))
