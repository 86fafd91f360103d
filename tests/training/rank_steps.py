"""A step of a batch on ranks, and what it sends and holds, counted."""

import json
from collections import Counter
from pathlib import Path

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import redit_fast as rf
from redit_fast.gr.shards import is_shard
from redit_fast.packing.plan import Budget
from redit_fast.training import lora, memory, policy
from redit_fast.training.config import TrainConfig
from redit_fast.training.distributed import Ranks, started
from tests.counting import Held, tensors_of
from tests.packing.models import batch_of, model_of
from tests.training import processes

LAYERS = 6  # the whole model is far more than a layer


class Sent(TorchDispatchMode):
    """Inside the block, of every collective of torch.distributed: how many, and the bytes of what they are given."""

    def __init__(self):
        super().__init__()
        self.collectives, self.bytes = Counter(), 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "c10d":
            self.collectives[func.overloadpacket.__name__] += 1
            self.bytes += sum({x.data_ptr(): x.nbytes for x in tensors_of((args, kwargs))}.values())
        return func(*args, **(kwargs or {}))


def counted(strategy, folder):
    """{"collectives": {name: how many}, "bytes sent": of a second step on the first of two ranks}"""
    return on_ranks(2, step, strategy, folder)


def on_ranks(size, work, *args):
    """What `work` leaves on the first rank; its last argument is a folder."""
    codes, printed = processes.finish(processes.start(size, work, *args, folder=args[-1]), args[-1])
    assert codes == [0] * size, printed
    return json.loads(Path(args[-1], "found.json").read_text())


def take(batch, model, optimizer):
    first = batch.backward(model)
    if optimizer.perturb():
        batch.backward(model, masks_of=first)
    optimizer.step()
    optimizer.zero_grad()


def optimizer_of(model):
    return rf.RegularizedAdamW(rf.parameter_groups(model), lr=1e-5, gamma=0.1, epsilon=0.1)


def step(strategy, out):
    """With GR, of two micro-batches a rank. Leaves what `counted` gives and the weights afterwards."""
    with started(strategy, "cpu") as ranks:
        model = model_of("qwen2", num_hidden_layers=LAYERS)
        ranks.prepare(model, "cpu")
        optimizer = optimizer_of(model)
        batch = batch_of(budget=Budget(tokens=60))
        batch.ranks = ranks
        assert len(batch.micro_batches) >= 2
        take(batch, model, optimizer)
        with Sent() as sent:
            take(batch, model, optimizer)
        state = ranks.state_of(model) or model.state_dict()
        if ranks.first:
            torch.save(state, f"{out}/{strategy}.pt")
            found = {"collectives": dict(sent.collectives), "bytes sent": sent.bytes}
            Path(out, "found.json").write_text(json.dumps(found))
    return 0


def held(out):
    """The bytes that the first rank holds at most in a pass under FSDP2, the first and the second of GR, beside its
    shards and their gradients: of a model whose weights are tied and one whose are not. And those of a "layer" and of
    the "head", far above what is kept of the few tokens; and how far the first pass's "gradients" are off those of one
    process."""
    with started("fsdp2", "cpu") as ranks:
        found = [_held(ranks, tied) for tied in (True, False)]
        if ranks.first:
            Path(out, "found.json").write_text(json.dumps(found))
    return 0


def _held(ranks, tied):
    size = ranks.size

    def made(ranks):
        sizes = {"hidden_size": 64, "intermediate_size": 256, "vocab_size": 2004}  # which 1, 2 and 3 ranks share
        model = model_of("llama", num_hidden_layers=2, tie_word_embeddings=tied, **sizes)
        policy.checkpoint_activations(model)
        ranks.prepare(model, "cpu")
        batch = batch_of(budget=Budget(samples=1), samples=(1, 4, 7)[:size])
        batch.ranks = ranks
        return model, batch, optimizer_of(model)

    alone, batch, _ = made(Ranks())
    batch.backward(alone)
    expected = torch.cat([p.grad.flatten() for p in alone.parameters()])
    model, batch, optimizer = made(ranks)
    params = list(model.parameters())
    modes = [Held(lambda: [params, [p.grad for p in params]]) for _ in range(2)]
    with modes[0]:
        first = batch.backward(model)
    gradients = torch.cat([p.grad.full_tensor().flatten() for p in params])
    assert optimizer.perturb()
    with modes[1]:
        batch.backward(model, masks_of=first)
    return {
        "held": max(mode.most for mode in modes),
        "layer": sum(map(memory.bytes_of, alone.model.layers[0].parameters())),
        "head": memory.bytes_of(alone.lm_head.weight),
        "gradients": ((gradients - expected).norm() / expected.norm()).item(),
    }


def adapters(out):
    """How far the gradients of float32 adapters in a bfloat16 model under FSDP2 are off those of one process."""

    def gradients(ranks):
        model = model_of("qwen2", num_hidden_layers=LAYERS).bfloat16()
        lora.attach(model, TrainConfig(model="tiny", data="none", rewards=["math"], lora_rank=4), lora.Base("tiny", {}))
        trained = [p for p in model.parameters() if p.requires_grad]
        for p in trained:
            nn.init.normal_(p, std=0.1)
        ranks.prepare(model, "cpu")
        batch = batch_of(budget=Budget(tokens=60))
        batch.ranks = ranks
        batch.backward(model)
        found = [p.grad for p in model.parameters() if p.requires_grad]
        assert all(grad.dtype == torch.float32 for grad in found)
        return torch.cat([(grad.full_tensor() if is_shard(grad) else grad).flatten() for grad in found])

    with started("fsdp2", "cpu") as ranks:
        expected, found = gradients(Ranks()), gradients(ranks)
        if ranks.first:
            Path(out, "found.json").write_text(json.dumps(((found - expected).norm() / expected.norm()).item()))
    return 0
