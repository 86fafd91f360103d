"""An optimizer step of TRL's GRPOTrainer, its own and ours around the same model: python -m benchmarks.bench_trl

Forward pass, loss, backward pass, clipping and SGD on given rollouts, 8 completions of 96 tokens after prompts of 32
(quick: 24 after 8); generation and rewards are the same in both and left out. The model is bench_apply's. The learning
rate is 0: every round does the same, and its gradient is compared with that of float64, from logits.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Iterator
from typing import Any

import torch

from .bench_apply import SEQUENCES, WIDTH, a_model
from .clock import clock
from .measure import Errors, Provider, Run, Table
from .place import Place
from .roofline import Work

SIZES = {"cpu": (50_257, 32, 96), "quick": (2000, 8, 24)}  # vocabulary, tokens of prompts and completions


def rollouts(vocabulary: int, prompt: int, length: int, turn: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1 + turn)
    ones = torch.ones(SEQUENCES, prompt, dtype=torch.int64)
    mask = (torch.arange(length) < torch.randint(length // 2, length + 1, (SEQUENCES, 1), generator=generator)).long()
    return {
        "prompt_ids": torch.randint(vocabulary, (SEQUENCES, prompt), generator=generator),
        "prompt_mask": ones,
        "completion_ids": torch.randint(vocabulary, (SEQUENCES, length), generator=generator),
        "completion_mask": mask,
        "advantages": torch.randn(SEQUENCES, generator=generator),
        "num_items_in_batch": mask.sum(),
    }


def expected_norm(model: Any, inputs: dict[str, torch.Tensor]) -> float:
    """Of the gradient, from logits in float64."""
    ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
    attention = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1)
    logits = model(ids, attention_mask=attention, use_cache=False).logits[:, inputs["prompt_ids"].shape[1] - 1 : -1]
    logp = torch.log_softmax(logits, -1).gather(-1, inputs["completion_ids"][..., None])[..., 0]
    mask = inputs["completion_mask"]
    model.zero_grad()
    (-(logp * inputs["advantages"][:, None] * mask).sum() / mask.sum()).backward()
    return torch.nn.utils.get_total_norm([p.grad for p in model.parameters()]).item()


def tables(place: Place, size: str) -> Iterator[Table]:
    from datasets import Dataset
    from transformers import PrinterCallback
    from trl import GRPOConfig, GRPOTrainer

    from redit_fast.integrations.trl import ReditGRPOConfig, ReditGRPOTrainer
    from redit_fast.training import builtin

    vocabulary, prompt, length = SIZES[size]
    batches = [rollouts(vocabulary, prompt, length, turn) for turn in range(2)]
    wide = a_model(vocabulary).double()
    norms = [expected_norm(wide, inputs) for inputs in batches]
    del wide
    out, (_, tokenizer) = tempfile.mkdtemp(), builtin.build(0)
    os.environ["CI"] = "1"  # TRL sends telemetry otherwise

    def provider(name: str, cls: Any, config: Any, ours: bool = False) -> Provider:
        def build() -> Run:
            args = config(out, per_device_train_batch_size=SEQUENCES, num_generations=SEQUENCES, report_to="none",
                          optim="sgd", learning_rate=0.0, use_cpu=True, bf16=False, gradient_checkpointing=False,
                          disable_tqdm=True)  # fmt: skip
            trainer = cls(a_model(vocabulary), lambda completions, **_: [0.0] * len(completions), args=args,
                          train_dataset=Dataset.from_list([{"prompt": "x"}]), processing_class=tokenizer)  # fmt: skip
            trainer.remove_callback(PrinterCallback)
            trainer.current_gradient_accumulation_steps = 1
            trainer.create_optimizer()
            model = trainer.model.train()

            def run(turn: int, thorough: bool) -> Errors:
                with clock:
                    trainer._compute_loss(model, batches[turn % 2]).backward()
                    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                    trainer.optimizer.step()
                    trainer.optimizer.zero_grad()
                return Errors(abs(norm.item() / norms[turn % 2] - 1))

            return run

        return Provider(name, build, ours)

    head = vocabulary * WIDTH
    work = Work(reads=4 * head, writes=4 * head, flops=3 * 2 * SEQUENCES * length * head)
    providers = [provider("redit-fast", ReditGRPOTrainer, ReditGRPOConfig, True),
                 provider("TRL", GRPOTrainer, GRPOConfig)]  # fmt: skip
    sizes = {"V": vocabulary, "B": SEQUENCES, "T": length, "D": WIDTH}
    yield Table("trl", "GRPO step", sizes, "float32", work, providers, "gradient's norm", Errors(1e-4), 5)


if __name__ == "__main__":
    from .command import main

    sys.exit(main("trl", tables, devices=("cpu",)))
