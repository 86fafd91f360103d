"""A forced backend runs the backward pass too, in whatever thread autograd calls it: on a GPU one of its own."""

from threading import Thread

import pytest
import torch

import redit_fast as rf
from redit_fast import backends
from redit_fast.backends import cpu

TARGETS, ADVANTAGES = torch.arange(6), torch.arange(6.0) - 2
OPS = {
    "token_logp": lambda x, w: rf.token_logp(x @ w.t(), TARGETS).sum(),
    "grpo_loss": lambda x, w: rf.grpo_loss(x @ w.t(), TARGETS, ADVANTAGES, config=rf.LossConfig()).loss,
    "linear_logp": lambda x, w: rf.linear_logp(x, w, TARGETS).sum(),
    "linear_grpo_loss": lambda x, w: rf.linear_grpo_loss(x, w, TARGETS, ADVANTAGES, config=rf.LossConfig()).loss,
}


class Called(Exception):
    pass


def refuse(*_):
    raise Called


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("block", [False, True], ids=["after the block", "inside the block"])
def test_backward_in_another_thread_stays_on_the_backend_that_was_forced(op, block, monkeypatch):
    for name in backends.PRIMITIVES:
        monkeypatch.setattr(cpu, name, refuse)
    torch.manual_seed(0)
    x, w = torch.randn(6, 4, requires_grad=True), torch.randn(9, 4, requires_grad=True)
    raised = []

    def backward():
        try:
            loss.backward()
        except Called as error:
            raised.append(error)

    thread = Thread(target=backward)
    with rf.use_backend("reference"):
        loss = 3 * OPS[op](x, w)
        if block:
            thread.start()
            thread.join()
    if not block:
        thread.start()
        thread.join()
    assert not raised and x.grad.any() and w.grad.any()


def test_a_name_in_the_environment_that_is_no_backend_is_told_with_the_variable(monkeypatch):
    monkeypatch.setenv("REDIT_FAST_BACKEND", "CPU")
    with pytest.raises(ValueError, match="REDIT_FAST_BACKEND must be one of cpu, .*, got 'CPU'"):
        rf.token_logp(torch.zeros(2, 3), torch.tensor([0, 1]))
