"""An optimizer step of TRL's GRPOTrainer, its own and ours around the same model: python -m benchmarks.bench_trl

Forward pass, loss, backward pass, clipping and SGD on given rollouts, 8 completions of 96 tokens after prompts of 32
(small: 24 after 8); generation and rewards are the same in both and left out. A Qwen2 of two layers of width 128
with a vocabulary of 50257 (small: 2000), as wide in the head as GPT-2's, so that the head is what takes the time. The
learning rate is 0: every round does the same, and its gradient is compared with that of materialised logits.
"""

import os
import tempfile

import torch
from datasets import Dataset
from transformers import PrinterCallback, Qwen2Config, Qwen2ForCausalLM
from trl import GRPOConfig, GRPOTrainer

from benchmarks.common import Candidate, clock, main, measure, show
from redit_fast.integrations.trl import ReditGRPOConfig, ReditGRPOTrainer
from redit_fast.training import builtin

SEQUENCES, WIDTH = 8, 128


def a_model(vocabulary):
    torch.manual_seed(0)
    return Qwen2ForCausalLM(
        Qwen2Config(vocab_size=vocabulary, hidden_size=WIDTH, intermediate_size=256, num_hidden_layers=2,
                    num_attention_heads=4, num_key_value_heads=2, initializer_range=0.2, tie_word_embeddings=True)
    )  # fmt: skip


def rollouts(vocabulary, prompt, length):
    generator = torch.Generator().manual_seed(1)
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


def expected_norm(vocabulary, inputs):
    """Of the gradient, from logits."""
    model = a_model(vocabulary)
    ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
    attention = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1)
    logits = model(ids, attention_mask=attention, use_cache=False).logits[:, inputs["prompt_ids"].shape[1] - 1 : -1]
    logp = torch.log_softmax(logits, -1).gather(-1, inputs["completion_ids"][..., None])[..., 0]
    mask = inputs["completion_mask"]
    (-(logp * inputs["advantages"][:, None] * mask).sum() / mask.sum()).backward()
    return torch.nn.utils.get_total_norm([p.grad for p in model.parameters()]).item()


def candidates(vocabulary, prompt, length):
    inputs = rollouts(vocabulary, prompt, length)
    norm, out = expected_norm(vocabulary, inputs), tempfile.mkdtemp()
    _, tokenizer = builtin.build(0)
    os.environ["CI"] = "1"  # TRL sends telemetry otherwise

    def candidate(name, cls, config, baseline=False, **options):
        def make():
            args = config(out, per_device_train_batch_size=SEQUENCES, num_generations=SEQUENCES, report_to="none",
                          optim="sgd", learning_rate=0.0, use_cpu=True, bf16=False, gradient_checkpointing=False,
                          disable_tqdm=True, **options)  # fmt: skip
            trainer = cls(a_model(vocabulary), lambda completions, **_: [0.0] * len(completions), args=args,
                          train_dataset=Dataset.from_list([{"prompt": "x"}]), processing_class=tokenizer)  # fmt: skip
            trainer.remove_callback(PrinterCallback)
            trainer.current_gradient_accumulation_steps = 1
            trainer.create_optimizer()
            model = trainer.model.train()

            def run():
                with clock:
                    trainer._compute_loss(model, inputs).backward()
                    found = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                    trainer.optimizer.step()
                    trainer.optimizer.zero_grad()
                assert abs(found.item() / norm - 1) < 1e-4, (found.item(), norm)

            return run

        rows, head = SEQUENCES * length, vocabulary * WIDTH
        return Candidate(name, 4 * 2 * head, make, baseline, 3 * 2 * rows * head)

    return [
        candidate("redit-fast", ReditGRPOTrainer, ReditGRPOConfig),
        candidate("TRL", GRPOTrainer, GRPOConfig, baseline=True),
    ]


def tables(small):
    sizes = (2000, 8, 24) if small else (50257, 32, 96)
    title = f"GRPO step, vocabulary {sizes[0]}, {SEQUENCES} completions of {sizes[2]} tokens at most, float32"
    results = {title: measure(candidates(*sizes), rounds=5)}
    show(title, results[title])
    return results


if __name__ == "__main__":
    main(tables)
