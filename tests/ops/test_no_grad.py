"""Where gradients are off nothing is computed or held for them, though a leaf asks for one, on every backend."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import redit_fast as rf
from tests.counting import flops
from tests.ops.test_linear_loss import head, leaves

OPS = ("token_logp", "token_loss", "scale_in_place")
ROWS, VOCABULARY, WIDTH = 40, 300, 24  # chunks of 32 and 16 rows: no buffer of theirs has 40
ROWS_MADE_UP = {"cpu": 48, "cuda": 64}  # to a multiple of 16, to whole chunks
MODES = [torch.no_grad, torch.inference_mode]


class NewTensors(TorchDispatchMode):
    """The shapes of what is allocated."""

    FACTORIES = ("zeros", "empty", "new_zeros", "new_empty", "zeros_like", "empty_like")

    def __init__(self):
        super().__init__()
        self.shapes = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func.overloadpacket.__name__ in self.FACTORIES:
            self.shapes.add(tuple(out.shape))
        return out


def allocated(run):
    with NewTensors() as new:
        run()
    return new.shapes


@pytest.fixture
def inputs():
    hidden, weight, bias, targets = head(ROWS, VOCABULARY, WIDTH, torch.float32, 0.3)
    return leaves(hidden, weight, bias), targets


GRADIENTS = {(ROWS, WIDTH), (VOCABULARY, WIDTH), (32, VOCABULARY)}  # of hidden and weight, and a chunk of E


def head_ops(inputs):
    (x, w, b), targets = inputs
    config, entropic = rf.LossConfig(), rf.LossConfig(entropy_coef=0.1)
    for weight, bias in ((w, b), (w.detach(), b.detach())):
        rows = {"bias": bias, "chunk_rows": 32}
        for entropy in ("none", "metric", "grad"):
            yield lambda e=entropy, w=weight, rows=rows: rf.linear_logp(x, w, targets, entropy=e, **rows)
        for c in (config, entropic):
            yield lambda c=c, w=weight, rows=rows: rf.linear_grpo_loss(
                x, w, targets, torch.ones(ROWS), config=c, **rows
            )


@pytest.mark.ops("exp_product")
@pytest.mark.parametrize("off", MODES)
def test_the_head_makes_one_product_and_no_gradient(backend, device, countable, inputs, off):
    for run in head_ops(inputs):
        needed = allocated(run) & GRADIENTS
        with off():
            assert flops(run) == 2 * ROWS_MADE_UP[device] * VOCABULARY * WIDTH
            assert not allocated(run) & GRADIENTS
            again = run()
        out = run()
        for name in ("loss", "logp", "entropy"):
            value = getattr(again, name, None)
            assert value is None or (torch.equal(value, getattr(out, name)) and not value.requires_grad)
        if hasattr(out, "loss") and out.route == "fused":
            assert needed  # what the other half of the test looks for


@pytest.mark.parametrize("off", MODES)
def test_the_loss_of_logits_allocates_and_writes_no_gradient(backend, off):
    logits, targets = torch.randn(ROWS, VOCABULARY, requires_grad=True), torch.randint(VOCABULARY, (ROWS,))
    before = logits.detach().clone()

    def run(inplace=False, loss_type="dapo"):
        config = rf.LossConfig(loss_type)
        return rf.grpo_loss(logits, targets, torch.ones(ROWS), config=config, inplace=inplace)

    assert (ROWS, VOCABULARY) in allocated(run)
    with off():
        assert (ROWS, VOCABULARY) not in allocated(run)
        out = run(inplace=True)
        run(loss_type="gspo")
    assert torch.equal(logits, before) and torch.equal(out.loss, run().loss) and not out.loss.requires_grad


def test_a_compiled_graph_without_gradients_has_none_either(inputs):
    (x, w, _), targets = inputs
    graphs = []

    def look(graph, example_inputs):
        graphs.append(graph)
        return graph

    def fused(x, w):
        loss = rf.linear_grpo_loss(x, w, targets, torch.ones(ROWS), config=rf.LossConfig()).loss
        return loss + rf.grpo_loss(x @ w.t(), targets, torch.ones(ROWS), config=rf.LossConfig()).loss

    def logp(x, w):
        return rf.linear_logp(x, w.detach(), targets).sum()

    for function in (fused, logp):
        with torch.no_grad():
            torch._dynamo.reset()
            assert torch.equal(torch.compile(function, fullgraph=True, backend=look)(x, w), function(x, w))
    found = {}
    for graph in graphs:
        for node in graph.graph.nodes:
            if "redit_fast" in str(node.target):
                schema = node.target._schema.arguments
                for argument, value in zip(schema, node.args, strict=True):
                    found[node.target._schema.name.split("::")[1], argument.name] = value
    absent = [("linear_loss", f"{name}_grad") for name in ("hidden", "weight", "bias")]
    absent += [("token_loss", "grad_logits"), ("linear_logp", "slopes"), ("linear_logp", "sums")]
    assert {name: found[name] for name in absent} == dict.fromkeys(absent)


@pytest.mark.parametrize("config", [rf.LossConfig(), rf.LossConfig("gspo"), rf.LossConfig(entropy_coef=0.1)])
def test_a_rollout_under_inference_mode_is_trained_on_as_any_other(config):
    torch.manual_seed(0)
    logits, hidden, weight = torch.randn(4, 8, 12), torch.randn(4, 8, 5), torch.randn(12, 5)
    tensors = torch.randint(12, (4, 8)), torch.randn(4), torch.randn(4, 8) - 2, torch.tensor([8, 8, 8, 8, 8])

    def gradients(targets, advantages, old_logp, lengths):
        x, h, w = (each.clone().requires_grad_() for each in (logits, hidden, weight))
        rows = {"old_logp": old_logp, "config": config}
        packed = rows | {"old_logp": old_logp.flatten(), "cu_seqlens": lengths.cumsum(0) - 8, "mask": None}
        rf.token_logp(x, targets).sum().backward()
        rf.grpo_loss(x, targets, advantages, **rows).loss.backward()
        rf.grpo_loss(x.flatten(0, 1), targets.flatten(), advantages, **packed).loss.backward()
        rf.linear_logp(h, w, targets).sum().backward()
        rf.linear_grpo_loss(h, w, targets, advantages, **rows).loss.backward()
        return x.grad, h.grad, w.grad

    with torch.inference_mode():
        rollout = [tensor.clone() for tensor in tensors]
    assert all(tensor.is_inference() for tensor in rollout)
    for found, expected in zip(gradients(*rollout), gradients(*tensors)):
        assert expected.any() and torch.equal(found, expected)
