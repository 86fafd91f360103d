"""The head as a GPU takes it, on the CPU: whole chunks, and inside a CUDA graph no question to the device."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import redit_fast as rf
from redit_fast import backends
from redit_fast.ops import chunks
from tests.counting import flops
from tests.ops.test_linear_loss import assert_right, head, head_oracle, leaves, oracle_gradients
from tests.tolerance import relative

CONFIG = rf.LossConfig(epsilon_high=0.3)


@pytest.fixture
def whole(monkeypatch):
    monkeypatch.setattr(chunks, "whole_chunks", lambda device: True)


def results(hidden, weight, targets, advantages, mask=None, chunk_rows=32, config=CONFIG):
    """Of every op: loss, log-probs, entropies and gradients."""
    rows, found = {"mask": mask, "chunk_rows": chunk_rows}, []
    x, w = leaves(hidden, weight)
    out = rf.linear_grpo_loss(x, w, targets, advantages, config=config, **rows)
    out.loss.backward()
    found += [out.loss.detach(), out.logp, out.entropy, out.metrics["head/frac_rows_skipped"], x.grad, w.grad]
    for frozen in (False, True):
        x, w = leaves(hidden, weight)
        logp, entropy = rf.linear_logp(x, w.detach() if frozen else w, targets, entropy="grad", **rows)
        (logp * advantages).sum().backward() if frozen else (logp * advantages + entropy).sum().backward()
        found += [logp.detach(), entropy.detach(), x.grad] + ([] if frozen else [w.grad])
    return found


def batch(dtype=torch.float32):
    hidden, weight, _, targets = head(75, 300, 24, dtype)
    advantages = torch.randn(75)
    advantages[20:] = 0
    return hidden, weight, targets, advantages[torch.randperm(75)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_whole_chunks_give_what_others_give(backend, dtype, whole, monkeypatch):
    inputs = batch(dtype)
    found = results(*inputs)
    monkeypatch.setattr(chunks, "whole_chunks", lambda device: False)
    for ours, theirs in zip(found, results(*inputs), strict=True):
        assert (theirs != 0).any() and relative(ours, theirs) < (1e-5 if dtype == torch.float32 else 4e-3)


def test_products_have_the_shape_of_a_chunk_and_silent_rows_share_their_own(whole, countable):
    """75 rows are 3 chunks of 32; the 20 with an advantage are in the first, whose gradients alone take products."""
    hidden, weight, targets, advantages = batch()
    inputs, product = leaves(hidden, weight), 2 * 32 * 300 * 24

    def fused(config=CONFIG, advantages=advantages):
        rf.linear_grpo_loss(*inputs, targets, advantages, config=config, chunk_rows=32).loss.backward()

    assert flops(fused) == (3 + 2) * product
    assert flops(lambda: fused(advantages=advantages + 1)) == 3 * 3 * product
    x, w = leaves(hidden, weight)
    rf.linear_grpo_loss(x, w, targets, advantages, config=CONFIG, chunk_rows=32).loss.backward()

    def oracle_loss(x, w):
        return rf.policy_loss(head_oracle(x, w, None, targets)[0], advantages, config=CONFIG).loss

    for kind, (leaf, right) in enumerate(zip((x, w), oracle_gradients(oracle_loss, hidden, weight))):
        assert_right(leaf.grad, right, kind)
    assert ((x.grad != 0).any(1) == (advantages != 0)).all()


class NoWaiting(TorchDispatchMode):
    """The CPU's own backends read numbers of their tensors, the head itself none."""

    def __init__(self, backend):
        super().__init__()
        self.refused = {"nonzero", "masked_select"} | ({"_local_scalar_dense"} if backend == "triton" else set())

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func.overloadpacket.__name__ not in self.refused, func
        return func(*args, **(kwargs or {}))


def test_inside_a_cuda_graph_the_host_asks_nothing_and_masked_rows_are_not_read(backend, whole, monkeypatch):
    hidden, weight, targets, advantages = batch()
    mask, stray = torch.rand(75) > 0.3, hidden.clone()
    stray[~mask], targets[~mask] = torch.nan, -7
    expected = results(hidden, weight, targets, advantages, mask)
    monkeypatch.setattr(chunks, "may_wait", lambda device: False)
    with NoWaiting(backend):
        found = results(stray, weight, targets, advantages, mask)
    for ours, theirs in zip(found, expected, strict=True):
        assert relative(ours, theirs) < 1e-5
    assert (found[4][~mask] == 0).all() and (found[4][mask & (advantages != 0)] != 0).any(1).all()


@pytest.mark.parametrize("name", ["reference", "triton"])
def test_a_row_of_nan_without_a_coefficient_leaves_the_gradient_of_the_weight_alone(name, whole):
    """It shares the chunk of rows with one."""
    if refusal := backends.refusal("exp_product", name, torch.device("cpu")):
        pytest.skip(f"{name}: {refusal}")
    hidden, weight, targets, advantages = batch()
    hidden[(advantages == 0).nonzero()[0]] = torch.nan
    x, w = leaves(hidden, weight)
    with rf.use_backend(name):
        out = rf.linear_grpo_loss(x, w, targets, advantages, config=rf.LossConfig("reinforce"), chunk_rows=32)
        out.loss.backward()
    assert out.logp.isnan().sum() == 1 and w.grad.isfinite().all() and (w.grad != 0).any()
