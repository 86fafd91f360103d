"""What only a GPU can show: its memory, its graphs, its host that need not wait. Elsewhere every test skips; all other
tests of the ops run there too, see tests/grid.py."""

import pytest
import torch

import redit_fast as rf
from tests.grid import DEVICES, pairs

pytestmark = pytest.mark.skipif("cuda" not in DEVICES, reason="no CUDA device")
OPS = ("token_loss", "exp_product", "adamw")
CONFIG = rf.LossConfig()


@pytest.fixture(params=[pair for pair in pairs(["cuda"]) if pair.id != "reference-cuda"])
def place(request):
    """The kernels: the reference takes several float32 copies of the logits, and asks which rows need repair."""
    return request.param


def token_batch(rows, vocabulary, dtype=torch.bfloat16):
    torch.manual_seed(0)
    logits = torch.empty(rows, vocabulary, dtype=dtype, device="cuda").normal_(std=3)
    return logits, torch.randint(vocabulary, (rows,), device="cuda"), torch.randn(rows, device="cuda")


def loss_and_gradient(logits, targets, advantages):
    leaf = logits.detach().requires_grad_()
    out = rf.grpo_loss(leaf, targets, advantages, config=CONFIG, normalizer=1.0)
    out.loss.backward()
    return out.logp, out.entropy, leaf.grad


def test_more_than_2_to_the_31_logits(backend):
    """14,200 x 151,936; the last row has the bits that it has alone."""
    logits, targets, advantages = token_batch(14_200, 151_936)
    last = loss_and_gradient(logits[-1:].clone(), targets[-1:], advantages[-1:])
    leaf = logits.requires_grad_()
    out = rf.grpo_loss(leaf, targets, advantages, config=CONFIG, normalizer=1.0, inplace=True)
    out.loss.backward()
    assert torch.equal(out.logp[-1:], last[0]) and torch.equal(leaf.grad[-1:], last[2]) and (last[2] != 0).any()


def test_the_head_is_captured_in_a_cuda_graph(backend):
    """And replayed on other numbers, with rows masked then that were not before."""
    torch.manual_seed(0)
    hidden, weight = torch.randn(300, 256, device="cuda").bfloat16(), torch.randn(32_000, 256, device="cuda").bfloat16()
    targets, advantages = torch.randint(32_000, (300,), device="cuda"), torch.randn(300, device="cuda")
    x, w = hidden.clone().requires_grad_(), (0.1 * weight).requires_grad_()

    def loss():
        x.grad = w.grad = None
        out = rf.linear_grpo_loss(x, w, targets, advantages, config=CONFIG, chunk_rows=128)
        out.loss.backward()
        return out.loss.detach(), out.logp, x.grad, w.grad

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        loss()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = loss()
    with torch.no_grad():
        x.copy_(hidden.flip(0))
        targets[50:90] = -100
    graph.replay()
    found = [tensor.clone() for tensor in captured]
    for ours, theirs in zip(found, loss()):
        assert (ours.float() - theirs.float()).norm() < 1e-3 * theirs.float().norm()
    assert (found[1][50:90] == 0).all()


def test_a_step_waits_for_nothing(backend):
    """From the parameters' gradients to the new parameters without the host asking the device."""
    params = [torch.nn.Parameter(torch.randn(1 << 20, device="cuda").bfloat16()) for _ in range(4)]
    optimizer = rf.RegularizedAdamW(params, lr=1e-3, gamma=1e-3, epsilon=1e-3)

    def step():
        for p in params:
            p.grad = torch.ones_like(p)
        if optimizer.perturb():
            for p in params:
                p.grad = torch.ones_like(p)
        optimizer.step()

    step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
