"""A mini-batch through verl's TrainingWorker (FSDP2, one rank), with logits, verl's torch head and ours: python -m
benchmarks.bench_verl

Forward pass, policy loss with entropy bonus, backward pass, clipping and SGD on 4 packed samples of 128 + 384 tokens
(small: 8 + 24). A Qwen2 of two layers of width 128 with a vocabulary of 50000 (small: 2000). The learning rate is 0:
every round does the same, and its gradient's norm is compared with that of verl's code from logits.
"""

import os
import tempfile
from types import MethodType

import pytest
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from benchmarks.common import Candidate, clock, main, measure, show
from redit_fast.integrations.verl import head as verl_head
from tests.integrations import verl_rank

SAMPLES, WIDTH = 4, 128


def a_worker(folder, backend):
    own = Qwen2ForCausalLM.forward
    worker = verl_rank.new_worker(folder, fused=backend, optim={"lr": 0.0}, model={"use_remove_padding": True},
                                  micro_batch_size_per_gpu=SAMPLES)  # fmt: skip
    if backend == "torch":  # which verl puts on the class, so under the others too
        worker.engine.module.forward = MethodType(Qwen2ForCausalLM.forward, worker.engine.module)
        Qwen2ForCausalLM.forward = own
    return worker


def candidates(vocabulary, prompt, length):
    folder, draw = tempfile.mkdtemp(), torch.Generator().manual_seed(1)
    torch.manual_seed(0)
    Qwen2ForCausalLM(
        Qwen2Config(vocab_size=vocabulary, hidden_size=WIDTH, intermediate_size=256, num_hidden_layers=2,
                    num_attention_heads=2, num_key_value_heads=1, initializer_range=0.2, tie_word_embeddings=True)
    ).save_pretrained(folder)  # fmt: skip
    samples = [
        (torch.randint(vocabulary, (prompt,), generator=draw), torch.randint(vocabulary, (length,), generator=draw),
         -10 + torch.randn(length, generator=draw), torch.randn(1, generator=draw).expand(length).clone())
        for _ in range(SAMPLES)
    ]  # fmt: skip

    def step(worker):
        return verl_rank.train(worker, verl_rank.batch_of(samples))["grad_norm"][0]

    norm = step(a_worker(folder, None))
    assert norm > 1e-3

    def candidate(name, backend, baseline=True):
        def make():
            worker = a_worker(folder, backend)

            def run():
                with clock:
                    found = step(worker)
                assert abs(found / norm - 1) < 1e-4, (found, norm)

            return run

        head = vocabulary * WIDTH
        return Candidate(name, 4 * 2 * head, make, baseline, 3 * 2 * SAMPLES * (prompt + length) * head)

    return [
        candidate("redit-fast", verl_head.BACKEND, baseline=False),
        candidate("verl, torch head", "torch"),
        candidate("verl, logits", None),
    ]


def tables(small):
    sizes = (2000, 8, 24) if small else (50000, 128, 384)
    title = f"verl step, vocabulary {sizes[0]}, {SAMPLES} samples of {sizes[1]} + {sizes[2]} tokens, float32"
    with pytest.MonkeyPatch.context() as patch:
        verl_rank.on_the_cpu(patch)
        ranks = {"WORLD_SIZE": "1", "RANK": "0", "LOCAL_WORLD_SIZE": "1", "LOCAL_RANK": "0"}
        for name, value in {**ranks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}.items():
            patch.setitem(os.environ, name, value)
        torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
        verl_head.register()
        results = {title: measure(candidates(*sizes), rounds=5)}
        torch.distributed.destroy_process_group()
    show(title, results[title])
    return results


if __name__ == "__main__":
    main(tables)
