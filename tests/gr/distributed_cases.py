"""What two ranks of gloo compute for tests/gr/test_distributed.py: every case, in one pair of processes.

python -m tests.gr.distributed_cases FOLDER      # writes FOLDER/0.pt and FOLDER/1.pt
"""

import copy
import os
import sys
import warnings
from contextlib import nullcontext
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

import redit_fast as rf
from tests.ranks import meet_and_end

STEPS, BATCH = 3, 8
GR = {"gamma": 0.3, "epsilon": 0.1, "max_norm": 1.0}
LINEARS = {"fc1": (7, 16), "fc2": (5, 7)}  # 7 and 5 rows: shards of two ranks are not equal


class Network(nn.Module):
    """A tied, a frozen and an unused layer beside two ordinary ones."""

    def __init__(self):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(16, 7), nn.Linear(7, 5)
        self.square, self.tied = nn.Linear(7, 7, bias=False), nn.Linear(7, 7, bias=False)
        self.tied.weight = self.square.weight
        self.frozen, self.unused = nn.Linear(7, 7), nn.Linear(3, 3)
        self.frozen.requires_grad_(False)

    def forward(self, x):
        x = torch.tanh(self.fc1(x))
        return self.fc2(torch.tanh(self.tied(self.frozen(self.square(x)))))


def network():
    torch.manual_seed(1)
    return Network()


def batches():
    torch.manual_seed(2)
    return list(torch.randn(STEPS, BATCH, 16))


def optimizer(model, kind="adamw", **gr):
    if kind == "adamw":
        return rf.RegularizedAdamW(model.parameters(), lr=1e-2, **{**GR, **gr})
    return rf.GradientRegularizer(torch.optim.SGD(model.parameters(), lr=1e-1, momentum=0.9), **{**GR, **gr})


def train(model, opt, parts, sync=lambda last: nullcontext(), start=0, stop=STEPS, rank=0, ranks=1):
    """Steps whose gradient is that of the mean loss over BATCH samples, in `parts` micro-batches on each rank."""
    for batch in batches()[start:stop]:

        def backward(batch=batch):
            mine = batch.chunk(ranks)[rank].chunk(parts)
            for i, x in enumerate(mine):
                with sync(i == len(mine) - 1):
                    (10 * model(x.to(next(model.parameters()).dtype)).square().mean() / parts).backward()

        backward()
        if opt.perturb():
            backward()
        opt.step()
        opt.zero_grad()


def whole(model):
    """Every parameter, gathered: name -> tensor."""
    return {name: getattr(p, "full_tensor", lambda p=p: p)().detach().clone() for name, p in model.named_parameters()}


def counted(verb):
    """How many collectives `verb` ran, and what it returned."""
    from torch.distributed.tensor.debug import CommDebugMode

    with CommDebugMode() as mode:
        result = verb()
    return mode.get_total_counts(), result


def ddp(model, **options):
    return nn.parallel.DistributedDataParallel(model, find_unused_parameters=True, **options)


def fsdp(model, **options):
    from torch.distributed.fsdp import fully_shard

    fully_shard(model.fc1, **options)
    return fully_shard(model, **options)


def fsdp_sync(model):
    def sync(last):
        model.set_requires_gradient_sync(last)
        return nullcontext()

    return sync


def ddp_steps(rank):
    results = {}
    for kind in ("adamw", "sgd"):
        for keep in (False, True):
            model = ddp(network(), gradient_as_bucket_view=True)
            opt = optimizer(model, kind, keep_first_grad=keep)
            train(model, opt, 2, lambda last: nullcontext() if last else model.no_sync(), rank=rank, ranks=2)  # noqa: B023
            results[kind, keep] = whole(model.module), opt.metrics()
    return results


def fsdp_steps(rank):
    """Gathered weights are kept from one pass to the next: they are stale after perturb(), and after step()."""
    results = {}
    for kind in ("adamw", "sgd"):
        for keep in (False, True):
            model = fsdp(network())
            model.set_reshard_after_backward(False)
            opt = optimizer(model, kind, keep_first_grad=keep)
            train(model, opt, 2, fsdp_sync(model), rank=rank, ranks=2)
            for module in (model, model.fc1):
                module.reshard()
            results[kind, keep] = whole(model), opt.metrics()
    return results


def collectives(rank):
    results = {}
    for name, wrap in (("ddp", ddp), ("fsdp", fsdp)):
        for options in ({}, {"keep_first_grad": True}, {"epsilon": "auto"}, {"gamma": 0.0}):
            model = wrap(network())
            opt = optimizer(model, **options)
            model(batches()[0]).square().mean().backward()
            perturb, wanted = counted(opt.perturb)
            if wanted:
                model(batches()[0]).square().mean().backward()
            results[name, *options] = perturb, counted(opt.step)[0], opt.epsilon
    return results


def one_rank_is_not_finite(rank):
    """Only rank 1 sees an infinite sample, in pass 1 or in pass 2."""
    results = {}
    for wrap in (ddp, fsdp):
        for bad in (1, 2):
            model = wrap(network())
            opt = optimizer(model)
            before = whole(model)
            for i in (1, 2):
                x = batches()[0].clone()
                x[0, 0] = torch.inf if rank == 1 and i == bad else 0
                model(x).square().mean().backward()
                if i == 1:
                    opt.perturb()
            opt.step()
            after = whole(model)
            results[wrap.__name__, bad] = (
                all(torch.equal(before[name], after[name]) for name in before),
                opt.metrics()["gr/skipped_steps"],
            )
    return results


def grad_scaler(rank):
    """An overflow in rank 1's shard of a gradient, in no pass, in pass 1 or in pass 2."""
    results = []
    for bad in (0, 1, 2):
        model = fsdp(network())
        opt, scaler = optimizer(model), torch.amp.GradScaler("cpu", init_scale=4.0)
        before = whole(model)
        for i in (1, 2):
            scaler.scale(model(batches()[0]).square().mean()).backward()
            if i == bad and rank == 1:
                next(model.parameters()).grad.to_local()[0, 0] = torch.inf
            if i == 1:
                opt.perturb(grad_scaler=scaler)
        scaler.step(opt)
        scaler.update()
        after = whole(model)
        untouched = all(torch.equal(before[name], after[name]) for name in before)
        results.append((untouched, scaler.get_scale(), opt.metrics()["gr/skipped_steps"]))
    return results


def given_gradients():
    """bfloat16 weights whose elements every layout of shards must round alike, and their gradients."""
    torch.manual_seed(4)
    shapes = [(7, 16), (5,), (6, 4, 3), (1, 8)]
    return [(torch.randn(s).bfloat16() * 0.02, torch.randn(s).bfloat16() * 1e-4) for s in shapes]


def rounding_by_element(rank):
    """Weights as perturbed on shards of each layout, gathered."""
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor, init_device_mesh

    line, grid, column = (init_device_mesh("cpu", shape) for shape in ((2,), (2, 1), (1, 2)))
    layouts = {
        "rows": (line, [Shard(0)]),
        "columns": (line, [Shard(1)]),
        "copies": (line, [Replicate()]),
        "copies of rows": (grid, [Replicate(), Shard(0)]),  # HSDP
        "rows of columns": (column, [Shard(0), Shard(1)]),
    }
    results = {}
    for name, (mesh, where) in layouts.items():
        params = []
        for weight, grad in given_gradients():
            places = [Replicate() if place.is_shard(1) and weight.ndim == 1 else place for place in where]
            p = nn.Parameter(distribute_tensor(weight, mesh, places))
            p.grad = distribute_tensor(grad, mesh, places)
            params.append(p)
        opt = rf.RegularizedAdamW(params, gamma=0.3, epsilon=0.3, seed=7)
        opt.perturb()
        moved = [p.full_tensor().detach().clone() for p in params]
        for p in params:
            p.grad = torch.zeros_like(p)
        opt.step()
        results[name] = moved, opt.metrics(), [p.full_tensor().detach().clone() for p in params]
    return results


def sequential():
    torch.manual_seed(5)
    return nn.Sequential(nn.Linear(16, 8), nn.Tanh(), nn.Linear(8, 16), nn.LayerNorm(16))


def tensor_parallel(rank):
    """Columns, rows, a bias on every rank, and a norm that is no DTensor: three kinds of parameters in one sum."""
    from torch.distributed.tensor import init_device_mesh
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    model = parallelize_module(
        sequential(), init_device_mesh("cpu", (2,)), {"0": ColwiseParallel(), "2": RowwiseParallel()}
    )
    opt = optimizer(model)
    train(model, opt, 1)
    return whole(model), opt.metrics()


def mixed_precision(rank):
    from torch.distributed.fsdp import MixedPrecisionPolicy

    model = fsdp(network(), mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32))
    opt = optimizer(model, compute_dtype=torch.bfloat16, epsilon=1e-3, gamma=1e-3)
    train(model, opt, 1, rank=rank, ranks=2)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        metrics = opt.metrics()
    return whole(model), metrics, [str(warning.message) for warning in caught]


def checkpoint(rank):
    """torch.distributed.checkpoint's way: after one step into a new model and optimizer, which take the others."""
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

    def new():
        model = network().bfloat16()
        model.unused.requires_grad_(False)  # torch wants a state for everything that is trained
        return fsdp(model)

    def run(reload):
        model = new()
        opt = optimizer(model)
        train(model, opt, 1, stop=1, rank=rank, ranks=2)
        if reload:
            weights, state = copy.deepcopy(get_state_dict(model, opt))
            model = new()
            opt = optimizer(model)
            set_state_dict(model, opt, model_state_dict=weights, optim_state_dict=state)
        train(model, opt, 1, start=1, rank=rank, ranks=2)
        return whole(model)

    return run(False), run(True)


def reference_reset(rank):
    policy, reference = fsdp(network()), fsdp(network())
    reference.requires_grad_(False)
    train(policy, optimizer(policy), 1, rank=rank, ranks=2)
    x = batches()[0]
    before = reference(x)  # gathers the root's weights and keeps them
    rf.reset_reference(reference, policy)
    return before, reference(x), policy(x).detach()


def refusals(rank):
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor, init_device_mesh

    mesh = init_device_mesh("cpu", (2,))
    p = nn.Parameter(distribute_tensor(torch.ones(4), mesh, [Shard(0)]))
    p.grad = distribute_tensor(torch.ones(4), mesh, [Replicate()])
    try:
        optimizer(nn.ParameterList([p])).perturb()
    except ValueError as error:
        placed = str(error)
    from torch.distributed.fsdp import FullyShardedDataParallel

    flat = FullyShardedDataParallel(nn.Linear(2, 2), device_id=torch.device("cpu"))
    try:
        optimizer(flat)
    except NotImplementedError as error:
        return placed, str(error)


def swapped_heads(rank):
    """The gradients of a language model whose head is FSDP2's root's, or a unit of its own, `apply_to` before the
    sharding or after it; and without ranks."""
    from torch.distributed.fsdp import fully_shard
    from transformers import Qwen2Config, Qwen2ForCausalLM

    def loss(model, rows):
        return model(rows, labels=rows).loss

    sizes = {"vocab_size": 33, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1,
             "tie_word_embeddings": False}  # fmt: skip
    config = Qwen2Config(**sizes, num_attention_heads=2, num_key_value_heads=1, initializer_range=0.3)
    torch.manual_seed(4)
    rows, results = torch.randint(33, (2, 9)), {}
    start = Qwen2ForCausalLM(config).state_dict()
    for kind in ("alone", "root", "unit", "root, sharded first", "unit, sharded first"):
        model = Qwen2ForCausalLM(config)
        model.load_state_dict(start)
        if kind != "alone":
            if not kind.endswith("first"):
                rf.apply_to(model)
            if kind.startswith("unit"):
                fully_shard(model.lm_head)
            fully_shard(model)
            if kind.endswith("first"):
                rf.apply_to(model)  # compares the losses in the first call
        (loss(model, rows[rank : rank + 1]) if kind != "alone" else loss(model, rows)).backward()
        grads = {name: p.grad for name, p in model.named_parameters()}
        results[kind] = {name: grad if kind == "alone" else grad.full_tensor() for name, grad in grads.items()}
    return results


CASES = [ddp_steps, fsdp_steps, collectives, one_rank_is_not_finite, grad_scaler, rounding_by_element, tensor_parallel,
         mixed_precision, checkpoint, reference_reset, swapped_heads, refusals]  # fmt: skip

if __name__ == "__main__":
    folder = Path(sys.argv[1])
    other = os.fork()  # after the imports, which take seconds, and before any thread
    rank = 0 if other else 1
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    torch.save({case.__name__: case(rank) for case in CASES}, folder / f"{rank}.pt")
    meet_and_end(other)
