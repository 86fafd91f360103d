"""The loop of plain_loop.py on several ranks, by DDP or FSDP2: the same weights as on one, to float32 rounding.

torchrun --nproc-per-node 2 examples/distributed_loop.py fsdp2
"""

import argparse
import os
import sys

import plain_loop
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import redit_fast as rf


class Loss(nn.Module):
    """The loss inside a forward call, where DDP and FSDP2 have their hooks and FSDP2 the head's weight gathered."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, tokens, mask, advantages, normalizer):
        hidden = self.model.model(tokens).last_hidden_state[:, :-1]
        rows = {"mask": mask[:, 1:], "normalizer": normalizer, "config": rf.LossConfig("dapo")}
        return rf.linear_grpo_loss(hidden, self.model.lm_head.weight, tokens[:, 1:], advantages, **rows).loss


def train(kind, steps):
    rank, ranks = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)
    model = plain_loop.a_model()
    loss_of = Loss(model)
    if kind == "fsdp2":
        for layer in model.model.layers:
            fully_shard(layer)
        fully_shard(loss_of)
    else:
        loss_of = DistributedDataParallel(loss_of)
    optimizer = rf.RegularizedAdamW(rf.parameter_groups(model), lr=1e-3)
    for step, batch in enumerate(plain_loop.batches(steps)):
        mine = torch.arange(len(batch[0])).chunk(ranks)[rank]  # whole groups; sample_ids keep the noise of each its own
        tokens, mask, rewards = (part[mine] for part in batch)
        dither = {"dither": rf.Dither(), "step": step, "sample_ids": mine}
        advantages = rf.group_advantages(rewards, group_size=8, **dither).values
        scored = mask[:, 1:].sum().float()
        dist.all_reduce(scored)  # the tokens of all ranks; over their number, as both engines average gradients
        loss_of(tokens, mask, advantages, scored / ranks).backward()
        if optimizer.perturb():
            loss_of(tokens, mask, advantages, scored / ranks).backward()
        optimizer.step()
        optimizer.zero_grad()
    return [p.full_tensor() if kind == "fsdp2" else p for p in model.parameters()]


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("kind", choices=("ddp", "fsdp2"))
    parser.add_argument("--steps", type=int, default=40)
    arguments = parser.parse_args()
    dist.init_process_group("gloo")
    weights = train(arguments.kind, arguments.steps)
    if dist.get_rank() == 0:
        print(f"|weights| {torch.nn.utils.get_total_norm([p.detach().double() for p in weights]).item():.9f}")
    dist.barrier()  # a rank that leaves first can abort the other
    sys.stdout.flush()
    # DDP and FSDP2 hold gloo's threads beyond destroy_process_group (torch 2.13). One that drops a tensor late asks an
    # ending Python for its lock, and C++ aborts; os._exit leaves Python no end.
    os._exit(0)
