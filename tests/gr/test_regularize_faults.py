"""Whatever fails, wherever: the parameters are those before the step or those after it, bit for bit. And nothing in the
step waits for the device.
"""

import copy
import itertools
import random

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import redit_fast as rf
from tests.counting import Recorder
from tests.gr.test_regularize import adamw, sgd

DTYPES = [torch.float32, torch.bfloat16]


class FailAt(TorchDispatchMode):
    """Raises once, at the n-th operation of any kind but the profiler's, which run around step(); counts them."""

    def __init__(self, n=-1):
        super().__init__()
        self.n, self.seen = n, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen += func.namespace != "profiler"
        if self.seen == self.n:
            self.n = -1
            raise MemoryError
        return func(*args, **(kwargs or {}))


def setup(make, dtype, keep, rounding):
    """Parameters, their optimizer in its second step, and a loss whose perturbation is as large as they are."""
    torch.manual_seed(3)
    params = [nn.Parameter(torch.randn(3, 2).to(dtype)), nn.Parameter(torch.randn(5).to(dtype))]
    options = {"gamma": 0.75, "epsilon": 0.5, "perturb_max_norm": 1e9, "keep_first_grad": keep, "rounding": rounding}
    opt = make([{"params": params[:1]}, {"params": params[1:]}], lr=0.1, **options)

    def loss():
        return sum(p.float().square().sum() for p in params)

    step(opt, loss)
    return params, opt, loss


def step(opt, loss):
    loss().backward()
    with opt.perturb() as wanted:
        if wanted:
            loss().backward()
    opt.step()
    opt.zero_grad()


def bits(params):
    return [p.detach().clone() for p in params]


def a_whole_step(*setting):
    """Parameters before and after a step that nothing disturbs, and the number of its operations."""
    params, opt, loss = setup(*setting)
    before = bits(params)
    with FailAt() as mode:
        step(opt, loss)
    after = bits(params)
    loss().backward()
    opt.perturb()
    assert all((p - old).norm() > old.norm() / 2 for p, old in zip(params, after))  # not a small delta
    return before, after, mode.seen


def fail_at(setting, before, after, n):
    """A step that fails at its n-th operation, judged; true if nothing has changed."""
    params, opt, loss = setup(*setting)
    with pytest.raises(MemoryError), FailAt(n):
        step(opt, loss)
    for p, old, new in zip(params, before, after):
        assert torch.equal(p, old) or torch.equal(p, new), (setting, n)
        if "master" in opt.state[p]:
            assert torch.equal(p, opt.state[p]["master"].to(p.dtype)), (setting, n)
    opt.zero_grad()
    assert opt.state_dict()  # it is not perturbed
    return all(map(torch.equal, params, before))


def test_an_exception_at_any_operation_of_the_step_leaves_the_parameters_before_or_after_it():
    setting = adamw, torch.bfloat16, True, "nearest"
    with rf.use_backend("reference"):
        before, after, count = a_whole_step(*setting)
        outcomes = [fail_at(setting, before, after, n) for n in range(1, count + 1)]
    assert count > 100 and outcomes.count(True) > count / 2 and not outcomes[-1]


def test_200_random_failures_leave_the_parameters_before_or_after_the_step():
    draw = random.Random(0)
    settings = list(itertools.product((sgd, adamw), DTYPES, (False, True), ("nearest", "stochastic")))
    with rf.use_backend("reference"):
        whole = {setting: a_whole_step(*setting) for setting in settings}
        for _ in range(200):
            setting = draw.choice(settings)
            before, after, count = whole[setting]
            fail_at(setting, before, after, draw.randint(1, count))


@pytest.mark.parametrize(
    "options", [{}, {"keep_first_grad": True}, {"gamma": 0.5}, {"normalized": True}, {"gamma": 0.0}]
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_nothing_in_the_step_waits_for_the_device(dtype, options):
    """The reference's primitives are tensor operations too; those in C++ read scalars, which lie on the CPU."""
    params = [nn.Parameter(torch.randn(3, 2).to(dtype)) for _ in range(2)]
    opt = adamw(params, **{"gamma": 0.75, "epsilon": 0.5, "max_norm": 1.0, **options})
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)

    def loss():
        return sum(p.float().square().sum() for p in params)

    with rf.use_backend("reference"), Recorder() as recorder:
        for given in (None, None, scaler):
            (loss() if given is None else given.scale(loss())).backward()
            if opt.perturb(grad_scaler=given):
                (loss() if given is None else given.scale(loss())).backward()
            if given is not None:
                opt.grad_scale = scaler.scale(torch.ones(()))  # what scaler.step() sets before it calls step()
            opt.step()
            opt.zero_grad()
        assert not recorder.waits
        opt.metrics()
    assert recorder.waits


def test_a_fault_leaves_a_state_from_which_training_goes_on_as_if_the_step_had_not_begun():
    with rf.use_backend("reference"):
        runs = []
        for faulty in (False, True):
            params, opt, loss = setup(adamw, torch.bfloat16, False, "stochastic")
            if faulty:
                state = copy.deepcopy(opt.state_dict())
                loss().backward()
                with pytest.raises(KeyboardInterrupt):
                    with opt.perturb():
                        raise KeyboardInterrupt
                assert repr(opt.state_dict()) == repr(state)
            step(opt, loss)
            runs.append(bits(params))
    assert all(map(torch.equal, *runs))


@pytest.mark.parametrize("make", [adamw, sgd])
def test_a_perturb_that_raised_does_not_count_as_asked(make):
    """step() after it would take the step without GR, silently."""
    p, q = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    opt = make([{"params": [p], "perturb": True}, {"params": [q], "perturb": False}], lr=0.1, gamma=0.5, epsilon=0.5)
    q.square().sum().backward()
    with pytest.raises(RuntimeError, match="no parameter with a gradient is in a group that is perturbed"):
        opt.perturb()
    with pytest.raises(RuntimeError, match="step.. without perturb"):
        opt.step()
    assert torch.equal(q, torch.ones(3))


@pytest.mark.parametrize("make", [adamw, sgd])
@pytest.mark.parametrize("fails", [1, 2, 4])  # late in the first pass, and in the second
def test_two_pass_is_tried_again_after_an_exception_as_if_it_had_not_been(make, fails):
    def run(fails):
        torch.manual_seed(3)
        p = nn.Parameter(torch.randn(5))
        opt, calls = make([p], lr=0.1, gamma=0.75, epsilon=0.5), []

        def closure():
            for _ in range(2):
                calls.append(1)
                if len(calls) == fails:
                    raise MemoryError
                loss = p.square().square().sum()
                loss.backward()
            return loss

        if fails:
            with pytest.raises(MemoryError):
                opt.two_pass(closure)
            assert p.grad is None
        opt.two_pass(closure)
        return p

    assert torch.equal(run(fails), run(0))
