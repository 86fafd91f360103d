"""A supervised step of a causal LM of transformers, with its own loss and under `apply_to`: redit-fast bench apply

Forward pass, loss and backward pass of eight sequences, every token a label. A Qwen2 of two layers of width 128 and a
real vocabulary, so that the head takes most of the time; in a large model its share is smaller.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

import redit_fast as rf

from . import oracle, peers
from .clock import clock
from .measure import WORST_ROW, Errors, Provider, Run, Table
from .place import Place
from .roofline import Work

SEQUENCES, WIDTH = 8, 128
SIZES = {  # vocabulary and tokens of a sequence; lengths of the series, and their vocabulary
    "cpu": ((50_257, 128), (16, 32, 64, 128, 256), 8000, WIDTH),
    "quick": ((8000, 32), (8, 16, 24, 32, 48), 2000, WIDTH),
    "cuda": ((151_936, 1024), (128, 256, 512, 1024, 2048), 32_000, 896),
    "dry": ((60, 8), (4, 8, 12), 40, 16),
}
LIMITS = {torch.float32: Errors(1e-4, 1e-3, WORST_ROW), torch.bfloat16: Errors(0.1, 0.2, WORST_ROW)}
CAUSES = {"transformers, its own loss": "with a small vocabulary its one large product is faster than ours in chunks"}


def a_model(vocabulary: int, width: int = WIDTH) -> Any:
    """The same weights each time."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=vocabulary, hidden_size=width, intermediate_size=2 * width, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, initializer_range=0.2 * min(1.0, (128 / width) ** 0.5),
        tie_word_embeddings=True,
    )  # fmt: skip
    return Qwen2ForCausalLM(config)


def tables(place: Place, size: str) -> Iterator[Table]:
    (vocabulary, length), lengths, of_lengths, width = SIZES[size]
    rounds = 5 if size != "dry" else 2
    yield table(place, vocabulary, length, width, rounds)
    for many in lengths:
        yield table(place, of_lengths, many, width, rounds, axis="R")


class Exact:
    """Two batches of tokens, their losses and gradients in float64."""

    def __init__(self, place: Place, vocabulary: int, length: int, width: int, dtype: torch.dtype):
        self.tokens, self.losses = [], []
        self.grads: list[list[Tensor]] = []
        model = a_model(vocabulary, width).to(place.device, dtype).double()
        for turn in range(2):
            shape, generator = (SEQUENCES, length), place.generator(1 + turn)
            tokens = torch.randint(vocabulary, shape, generator=generator, device=place.device)
            loss = model(tokens, labels=tokens).loss
            loss.backward()
            self.tokens.append(tokens)
            self.losses.append(loss.item())
            self.grads.append([p.grad.float() for p in model.parameters()])
            model.zero_grad()

    def errors(self, loss: Tensor, model: Any, turn: int) -> Errors:
        """Of the loss, of all gradients, and of the embedding's rows of these tokens: there a small one is a sum in
        which larger ones cancel, so a row's error is a share of their mean square."""
        sums = oracle.Sums()
        for p, exact in zip(model.parameters(), self.grads[turn % 2], strict=True):
            sums.add(p.grad.view(1, -1), exact.double().view(1, -1))
        used = self.tokens[turn % 2].unique()
        rows = self.grads[turn % 2][0][used].double()
        wrong = (model.get_input_embeddings().weight.grad[used].double() - rows).norm(dim=1)
        worst = (wrong / rows.norm(dim=1).clamp_min(rows.square().sum(1).mean().sqrt())).max().item()
        return Errors(abs(loss.item() - self.losses[turn % 2]), sums.errors(None).gradient, worst)


def table(place: Place, vocabulary: int, length: int, width: int, rounds: int, axis: str = "") -> Table:
    dtype = torch.float32 if place.kind == "cpu" else torch.bfloat16
    exact = Exact(place, vocabulary, length, width, dtype)

    def provider(name: str, change: Callable[[Any], object], ours: bool = False) -> Provider:
        def build() -> Run:
            model = a_model(vocabulary, width).to(place.device, dtype)
            change(model)

            def run(turn: int, thorough: bool) -> Errors:
                tokens = exact.tokens[turn % 2]
                with clock:
                    loss = model(tokens, labels=tokens).loss
                    loss.backward()
                found = exact.errors(loss, model, turn)
                model.zero_grad()
                return found

            return run

        return Provider(name, build, ours, CAUSES.get(name, ""))

    def liger(model: Any) -> None:
        patch = peers.load_for_gpus(place, "liger-kernel", "liger_kernel.transformers", "apply_liger_kernel_to_qwen2")
        patch(rope=False, rms_norm=False, swiglu=False, fused_linear_cross_entropy=True, model=model)

    providers = [
        provider("redit-fast, apply_to", lambda model: rf.apply_to(model), True),
        provider("transformers, its own loss", lambda model: None),
        provider("Liger, its head alone", liger),
    ]
    scored = SEQUENCES * (length - 1)
    counts = [p.numel() for p in a_model(vocabulary, width).parameters()]
    head, layers = counts[0], sum(counts[1:])
    work = Work(
        reads=sum(counts) * dtype.itemsize,
        writes=sum(counts) * dtype.itemsize,
        flops=6 * (scored * head + SEQUENCES * length * layers),
    )
    sizes = {"R": scored, "V": vocabulary, "D": width}
    name = str(dtype).removeprefix("torch.")
    return Table("apply", "supervised step", sizes, name, work, providers, "loss", LIMITS[dtype], rounds, axis)


if __name__ == "__main__":
    from .command import main

    sys.exit(main("apply", tables))
