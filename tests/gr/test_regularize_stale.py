"""The silent no-ops: where a second pass could run on weights that are not the perturbed ones, or a step on masters
that are not the weights', and nothing would say so. FSDP2's gathered weights are in tests/gr/test_distributed.py.
"""

import copy

import pytest
import torch
from torch import nn

import redit_fast as rf
from tests.gr.test_regularize import LOW, adamw, copies_of, loss_of, network, one_step, sgd

MAKERS = [sgd, adamw]


@pytest.mark.parametrize("make", MAKERS)
def test_one_autocast_context_around_everything_never_runs_on_a_cast_of_other_weights(backend, device, make):
    """Autocast keeps its bfloat16 casts of float32 weights until the outermost context ends."""
    model, x = network(), torch.randn(8, 16)

    def fresh():
        with torch.autocast(device, torch.bfloat16, cache_enabled=False):
            return model(x)

    opt = make(model.parameters(), lr=0.1, gamma=0.5, epsilon=0.5)
    with torch.autocast(device, torch.bfloat16):
        first = model(x)
        first.float().square().mean().backward()
        assert opt.perturb()
        assert torch.equal(model(x), fresh()) and not torch.equal(model(x), first)
        opt.restore()
        assert torch.equal(model(x), first)
        for gamma in (0.5, 0.0):
            opt.gamma = gamma
            one_step(opt, lambda: model(x).float().square().mean())
            assert torch.equal(model(x), fresh()) and not torch.equal(model(x), first)


@pytest.mark.parametrize("make", MAKERS)
def test_a_compiled_model_takes_the_same_steps(make):
    model, x = network(), torch.randn(8, 16)
    twin = copy.deepcopy(model)
    compiled = torch.compile(twin, backend="aot_eager", fullgraph=True)
    for module, called in ((model, model), (twin, compiled)):
        opt = make(module.parameters(), lr=0.1, gamma=0.4, epsilon=0.1)
        for _ in range(3):
            one_step(opt, lambda: called(x).square().mean())  # noqa: B023
    for p, q in zip(model.parameters(), twin.parameters()):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("make", MAKERS)
@pytest.mark.parametrize("dtype", [torch.float32, *LOW])
def test_no_storage_is_replaced_so_that_a_captured_graph_stays_right(backend, make, dtype):
    """A CUDA graph, and a pointer handed to a kernel, read where the weights were at capture."""
    model, x = network(dtype), torch.randn(8, 16)
    opt = make(model.parameters(), gamma=0.3, epsilon=0.1)

    def storages():
        states = [value for p in model.parameters() for value in opt.state[p].values() if torch.is_tensor(value)]
        return [tensor.data_ptr() for tensor in (*model.parameters(), *states, *copies_of(opt).values())]

    one_step(opt, lambda: loss_of(model, x))
    before = storages()
    for end in (opt.step, opt.restore, opt.zero_grad):
        loss_of(model, x).backward()
        opt.perturb()
        assert storages() == before
        loss_of(model, x).backward()
        if end == opt.zero_grad:
            with pytest.warns(UserWarning, match="after step"):
                end()
        else:
            end()
        assert storages() == before


@pytest.mark.parametrize("make", MAKERS)
@pytest.mark.parametrize("verb", ["perturb", "restore", "step"])
def test_a_graph_recorded_before_the_weights_were_written_raises_instead_of_using_them(backend, make, verb):
    """Kernels write through pointers: without a bump of the version counter autograd would not notice."""
    model, x = network(), torch.randn(8, 16)
    opt = make(model.parameters(), gamma=0.3, epsilon=0.3)
    loss = loss_of(model, x)
    loss.backward(retain_graph=True)
    opt.perturb()
    if verb != "perturb":
        loss = loss_of(model, x)
        loss.backward(retain_graph=True)
        getattr(opt, verb)()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("dtype", LOW)
def test_weights_loaded_in_part_move_their_masters_and_no_others(backend, dtype):
    """What was not loaded keeps the float32 master that training gave it."""
    p = nn.Parameter(torch.randn(4, 8).to(dtype))
    opt = adamw([p], lr=1e-5, gamma=0.0)
    one_step(opt, lambda: p.float().square().sum())
    trained = opt.state[p]["master"].clone()
    assert not torch.equal(trained, p.float())
    with torch.no_grad():
        p[1] = 3.0
    p.grad = torch.zeros_like(p)
    opt.step()
    master = opt.state[p]["master"]
    assert (master - trained)[[0, 2, 3]].abs().max() < 2e-5  # Adam's momentum goes on
    assert (master[1] - 3).abs().max() < 2e-5 and not torch.equal(master[0], p.float()[0])


@pytest.mark.parametrize("make", MAKERS)
@pytest.mark.parametrize("dtype", [torch.float32, *LOW])
@pytest.mark.parametrize("way", ["in place", "data"])
def test_weights_loaded_between_steps_are_what_restore_gives_back(backend, make, dtype, way):
    """`p.data = other` counts no version; load_state_dict does."""
    model, x = network(dtype), torch.randn(8, 16)
    opt = make(model.parameters(), lr=0.0, gamma=0.5, epsilon=0.5)
    one_step(opt, lambda: loss_of(model, x))
    loaded = [torch.randn_like(p) for p in model.parameters()]
    for p, value in zip(model.parameters(), loaded):
        if way == "data":
            p.data = value.clone()
        else:
            with torch.no_grad():
                p.copy_(value)
    loss_of(model, x).backward()
    opt.perturb()
    loss_of(model, x).backward()
    opt.step()
    assert all(map(torch.equal, model.parameters(), loaded))


def test_loading_a_state_into_bfloat16_training_keeps_float32_through_every_door(backend):
    """torch.optim.Optimizer.load_state_dict casts floating-point state to the parameter's dtype."""
    model = network(torch.bfloat16)
    opt = rf.RegularizedAdamW(model.parameters(), lr=1e-3)
    one_step(opt, lambda: loss_of(model, torch.randn(8, 16)))
    saved = copy.deepcopy(opt.state_dict())
    fresh = rf.RegularizedAdamW(model.parameters(), lr=1e-3)
    fresh.load_state_dict(saved)
    for p in model.parameters():
        for name in ("exp_avg", "exp_avg_sq", "master"):
            kept = opt.state[p][name]
            assert kept.dtype == torch.float32 and torch.equal(fresh.state[p][name], kept)
            assert not torch.equal(kept, kept.bfloat16().float())
