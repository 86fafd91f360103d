"""A mini-batch through verl's TrainingWorker (FSDP2, one rank), with logits, verl's torch head and ours: python -m
tests.integrations.bench_verl

Forward pass, policy loss with entropy bonus, backward pass, clipping and SGD on 4 packed samples of 128 + 384 tokens
(quick: 8 + 24). A Qwen2 of two layers of width 128 with a vocabulary of 50000 (quick: 2000). The learning rate is 0:
every round does the same, and its gradient's norm is compared with that of verl's code from logits. It stands here
because verl has no CPU: the platform is that of these tests.
"""

import os
import sys
import tempfile
from types import MethodType

import pytest
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from redit_fast.benchmarks.clock import clock
from redit_fast.benchmarks.measure import Errors, Provider, Table
from redit_fast.benchmarks.roofline import Work
from redit_fast.integrations.verl import head as verl_head
from tests.integrations import verl_rank

SAMPLES, WIDTH = 4, 128
SIZES = {"cpu": (50_000, 128, 384), "quick": (2000, 8, 24)}


def a_worker(folder, backend):
    own = Qwen2ForCausalLM.forward
    worker = verl_rank.new_worker(folder, fused=backend, optim={"lr": 0.0}, model={"use_remove_padding": True},
                                  micro_batch_size_per_gpu=SAMPLES)  # fmt: skip
    if backend == "torch":  # which verl puts on the class, so under the others too
        worker.engine.module.forward = MethodType(Qwen2ForCausalLM.forward, worker.engine.module)
        Qwen2ForCausalLM.forward = own
    return worker


def samples(vocabulary, prompt, length, turn):
    draw = torch.Generator().manual_seed(1 + turn)
    return [
        (torch.randint(vocabulary, (prompt,), generator=draw), torch.randint(vocabulary, (length,), generator=draw),
         -10 + torch.randn(length, generator=draw), torch.randn(1, generator=draw).expand(length).clone())
        for _ in range(SAMPLES)
    ]  # fmt: skip


def step(worker, batch):
    return verl_rank.train(worker, verl_rank.batch_of(batch))["grad_norm"][0]


def providers(vocabulary, prompt, length):
    folder = tempfile.mkdtemp()
    torch.manual_seed(0)
    Qwen2ForCausalLM(
        Qwen2Config(vocab_size=vocabulary, hidden_size=WIDTH, intermediate_size=256, num_hidden_layers=2,
                    num_attention_heads=2, num_key_value_heads=1, initializer_range=0.2, tie_word_embeddings=True)
    ).save_pretrained(folder)  # fmt: skip
    batches = [samples(vocabulary, prompt, length, turn) for turn in range(2)]
    worker = a_worker(folder, None)
    norms = [step(worker, batch) for batch in batches]
    del worker

    def provider(name, backend, ours=False):
        def build():
            worker = a_worker(folder, backend)

            def run(turn, thorough):
                with clock:
                    found = step(worker, batches[turn % 2])
                return Errors(abs(found / norms[turn % 2] - 1))

            return run

        return Provider(name, build, ours)

    return [
        provider("redit-fast", verl_head.BACKEND, True),
        provider("verl, torch head", "torch"),
        provider("verl, logits", None),
    ]


def tables(place, size):
    vocabulary, prompt, length = SIZES[size]
    with pytest.MonkeyPatch.context() as patch:
        verl_rank.on_the_cpu(patch)
        ranks = {"WORLD_SIZE": "1", "RANK": "0", "LOCAL_WORLD_SIZE": "1", "LOCAL_RANK": "0"}
        for name, value in {**ranks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}.items():
            patch.setitem(os.environ, name, value)
        torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
        verl_head.register()
        head = vocabulary * WIDTH
        work = Work(reads=4 * head, writes=4 * head, flops=3 * 2 * SAMPLES * (prompt + length) * head)
        sizes = {"V": vocabulary, "B": SAMPLES, "T": prompt + length, "D": WIDTH}
        yield Table("verl", "verl step", sizes, "float32", work, providers(vocabulary, prompt, length),
                    "gradient's norm", Errors(1e-4), 5)  # fmt: skip
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    from redit_fast.benchmarks.command import main

    sys.exit(main("verl", tables, devices=("cpu",)))
