"""Where a host calls the model under `apply_to`: evaluation with and without logits, and a step of TRL's SFTTrainer,
whose own fused head ours replaces: python -m benchmarks.bench_apply_hosts

The model and the batch of `bench_apply`: 8 sequences of 128 tokens (small: 32), vocabulary 50257 (small: 2000). Every
loss is compared with that of float64. The step of SFTTrainer is its `compute_loss`, with its metrics, and the backward
pass; in the order apply_to, trainer, the head is the same from the first call on.
"""

import os
import tempfile

import torch
from datasets import Dataset
from trl import SFTConfig, SFTTrainer

import redit_fast as rf
from benchmarks.bench_trl import SEQUENCES, WIDTH, a_model
from benchmarks.common import Candidate, clock, main, measure, show
from redit_fast.training import builtin


def a_batch(vocabulary, length):
    return torch.randint(vocabulary, (SEQUENCES, length), generator=torch.Generator().manual_seed(1))


def evaluations(vocabulary, length):
    tokens = a_batch(vocabulary, length)
    with torch.no_grad():
        expected = a_model(vocabulary).double().eval()(tokens, labels=tokens).loss.item()

    def candidate(name, **options):
        def make():
            model = a_model(vocabulary).eval()
            if options:
                rf.apply_to(model, **options)

            def run():
                with torch.no_grad(), clock:
                    output = model(tokens, labels=tokens)
                assert (output.logits is None) == (options == {"eval_logits": False})
                assert abs(output.loss.item() / expected - 1) < 1e-5

            return run

        head = vocabulary * WIDTH
        return Candidate(name, 4 * head, make, not options, 2 * SEQUENCES * length * head)

    return [
        candidate("apply_to, eval_logits=False", eval_logits=False),
        candidate("apply_to", eval_logits=True),
        candidate("transformers"),
    ]


def sft_steps(vocabulary, length):
    tokens = a_batch(vocabulary, length)
    inputs = {"input_ids": tokens, "labels": tokens, "attention_mask": torch.ones_like(tokens)}
    expected = a_model(vocabulary).double()(tokens, labels=tokens).loss.item()
    _, tokenizer = builtin.build(0)
    os.environ["CI"] = "1"  # TRL sends telemetry otherwise

    def candidate(name, applied):
        def make():
            args = SFTConfig(tempfile.mkdtemp(), per_device_train_batch_size=SEQUENCES, report_to="none", use_cpu=True,
                             bf16=False, gradient_checkpointing=False, disable_tqdm=True)  # fmt: skip
            rows = Dataset.from_list([{"input_ids": [3, 4, 5]}])
            trainer = SFTTrainer(a_model(vocabulary), args, train_dataset=rows, processing_class=tokenizer)
            model = trainer.model.train()
            if applied:
                rf.apply_to(model)

            def run():
                with clock:
                    loss = trainer.compute_loss(model, dict(inputs))
                    loss.backward()
                model.zero_grad()
                assert abs(loss.item() / expected - 1) < 1e-5, (loss.item(), expected)

            return run

        head = vocabulary * WIDTH
        return Candidate(name, 4 * 2 * head, make, not applied, 3 * 2 * SEQUENCES * length * head)

    return [candidate("SFTTrainer under apply_to", True), candidate("SFTTrainer, TRL's head", False)]


def tables(small):
    vocabulary, length = (2000, 32) if small else (50257, 128)
    sizes = f"vocabulary {vocabulary}, {SEQUENCES} sequences of {length} tokens, float32"
    results = {}
    for title, candidates in (("evaluation", evaluations), ("SFT step of TRL", sft_steps)):
        results[title] = measure(candidates(vocabulary, length), rounds=5)
        show(f"{title}, {sizes}", results[title])
    return results


if __name__ == "__main__":
    main(tables)
