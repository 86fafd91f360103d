"""Where a host calls the model under `apply_to`: evaluation with and without logits, and a step of TRL's SFTTrainer,
whose own fused head ours replaces: python -m benchmarks.bench_apply_hosts

The model of bench_apply, 8 sequences of 128 tokens (quick: 32) and a vocabulary of 50257 (quick: 2000). Every loss,
and every gradient of a step, is compared with that of float64. The step of SFTTrainer is its `compute_loss`, with its
metrics, and the backward pass.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Iterator
from typing import Any

import torch

import redit_fast as rf

from .bench_apply import LIMITS, SEQUENCES, WIDTH, Exact, a_model
from .clock import clock
from .measure import Errors, Provider, Run, Table, Wrong
from .place import Place
from .roofline import Work

SIZES = {"cpu": (50_257, 128), "quick": (2000, 32), "dry": (60, 8)}


def tables(place: Place, size: str) -> Iterator[Table]:
    vocabulary, length = SIZES[size]
    exact = Exact(place, vocabulary, length, WIDTH, torch.float32)
    head, sizes = vocabulary * WIDTH, {"V": vocabulary, "B": SEQUENCES, "T": length, "D": WIDTH}
    once = Work(reads=4 * head, flops=2 * SEQUENCES * length * head)
    thrice = Work(reads=4 * head, writes=4 * head, flops=3 * once.flops)
    limits = LIMITS[torch.float32]
    yield Table("apply_hosts", "evaluation", sizes, "float32", once, evaluations(vocabulary, exact), "loss", limits, 5)
    yield Table("apply_hosts", "SFT step of TRL", sizes, "float32", thrice, sft_steps(vocabulary, exact), "loss",
                limits, 5)  # fmt: skip


def evaluations(vocabulary: int, exact: Exact) -> list[Provider]:
    def provider(name: str, **options: bool) -> Provider:
        def build() -> Run:
            model = a_model(vocabulary).eval()
            if options:
                rf.apply_to(model, **options)

            def run(turn: int, thorough: bool) -> Errors:
                ids = exact.tokens[turn % 2]
                with torch.no_grad(), clock:
                    output = model(ids, labels=ids)
                if (output.logits is None) != (options == {"eval_logits": False}):
                    raise Wrong("logits are there where none were asked for, or the reverse")
                return Errors(abs(output.loss.item() - exact.losses[turn % 2]))

            return run

        return Provider(name, build, bool(options))

    return [
        provider("apply_to, eval_logits=False", eval_logits=False),
        provider("apply_to", eval_logits=True),
        provider("transformers"),
    ]


def sft_steps(vocabulary: int, exact: Exact) -> list[Provider]:
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    from redit_fast.training import builtin

    _, tokenizer = builtin.build(0)
    os.environ["CI"] = "1"  # TRL sends telemetry otherwise

    def provider(name: str, applied: bool) -> Provider:
        def build() -> Run:
            args = SFTConfig(tempfile.mkdtemp(), per_device_train_batch_size=SEQUENCES, report_to="none", use_cpu=True,
                             bf16=False, gradient_checkpointing=False, disable_tqdm=True)  # fmt: skip
            rows = Dataset.from_list([{"input_ids": [3, 4, 5]}])
            trainer: Any = SFTTrainer(a_model(vocabulary), args, train_dataset=rows, processing_class=tokenizer)
            model = trainer.model.train()
            if applied:
                rf.apply_to(model)

            def run(turn: int, thorough: bool) -> Errors:
                ids = exact.tokens[turn % 2]
                inputs = {"input_ids": ids, "labels": ids, "attention_mask": torch.ones_like(ids)}
                with clock:
                    loss = trainer.compute_loss(model, inputs)
                    loss.backward()
                found = exact.errors(loss, model, turn)
                model.zero_grad()
                return found

            return run

        return Provider(name, build, applied)

    return [provider("SFTTrainer under apply_to", True), provider("SFTTrainer, TRL's head", False)]


if __name__ == "__main__":
    from .command import main

    sys.exit(main("apply_hosts", tables, devices=("cpu",)))
