"""A step of a batch on two ranks, and what it sends and holds, counted."""

import json
from collections import Counter
from pathlib import Path

import torch
from torch.utils._python_dispatch import TorchDispatchMode

import redit_fast as rf
from redit_fast.gr import shards
from redit_fast.packing.plan import Budget
from redit_fast.training.distributed import started
from tests.counting import tensors_of
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
    """{"collectives": {name: how many}, "bytes sent": of a second step on the first of two ranks; "gathered": the most
    weights that it had whole at once, beside those of a "layer", the "others" and the "model"}."""
    ranks = processes.start(2, step, strategy, folder, folder=folder)
    codes, printed = processes.finish(ranks, folder)
    assert codes == [0, 0], printed
    return json.loads(Path(folder, f"{strategy}.json").read_text())


def step(strategy, out):
    """With GR, of two micro-batches a rank. Leaves what `counted` gives and the weights afterwards."""
    with started(strategy, "cpu") as ranks:
        model = model_of("qwen2", num_hidden_layers=LAYERS)
        ranks.prepare(model)
        optimizer = rf.RegularizedAdamW(rf.parameter_groups(model), lr=1e-5, gamma=0.1, epsilon=0.1)
        gathered = []

        def look(*_):
            gathered.append(sum(p.numel() for p in model.parameters() if not shards.is_shard(p)))

        for layer in model.model.layers:  # inside of which its weights are there
            layer.mlp.register_forward_hook(look)
            layer.mlp.register_full_backward_hook(look)

        def run():
            batch = batch_of(budget=Budget(tokens=60))
            batch.ranks = ranks
            assert len(batch.micro_batches) >= 2
            first = batch.backward(model)
            if optimizer.perturb():
                batch.backward(model, masks_of=first)
            optimizer.step()
            optimizer.zero_grad()

        run()
        with Sent() as sent:
            run()
        state = ranks.state_of(model) or model.state_dict()
        if ranks.first:
            torch.save(state, f"{out}/{strategy}.pt")
            found = {
                "collectives": dict(sent.collectives),
                "bytes sent": sent.bytes,
                "gathered": max(gathered, default=0),
                "layer": sum(p.numel() for p in model.model.layers[0].parameters()),
                "others": sum(p.numel() for name, p in model.named_parameters() if "layers." not in name),
                "model": sum(p.numel() for p in model.parameters()),
            }
            Path(out, f"{strategy}.json").write_text(json.dumps(found))
    return 0
