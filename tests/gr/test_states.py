"""What load_state_dict takes: everything that it reads is asked for first, and a state of another optimizer, or of an
AdamW that goes another way, is refused. What is refused changes nothing."""

import copy
import pickle

import pytest
import torch
from torch import nn

import redit_fast as rf
from tests.gr.test_regularize import loss_of, network

COUNTERS = "gradient_regularizer"


def stepped(optimizer, model):
    loss_of(model, torch.randn(8, 16)).backward()
    if hasattr(optimizer, "perturb") and optimizer.perturb():
        loss_of(model, torch.randn(8, 16)).backward()
    optimizer.step()
    optimizer.zero_grad()
    return optimizer


def ours(model):
    return rf.RegularizedAdamW(model.parameters())


def around_sgd(model):
    return rf.GradientRegularizer(torch.optim.SGD(model.parameters(), 0.1, momentum=0.9))


def refused(make, state, error, sentence):
    """By an optimizer that has taken a step, whose state stays."""
    model = network()
    optimizer = stepped(make(model), model)
    before = repr(optimizer.state_dict())
    with pytest.raises(error, match=sentence):
        optimizer.load_state_dict(state)
    assert repr(optimizer.state_dict()) == before


def changed(make, change):
    model = network()
    state = copy.deepcopy(stepped(make(model), model).state_dict())
    change(state)
    return state


@pytest.mark.parametrize("make", [ours, around_sgd])
@pytest.mark.parametrize("counters", ["3", None, 5, []])
def test_counters_are_a_dict(make, counters):
    state = changed(make, lambda state: state["param_groups"][0].update({COUNTERS: counters}))
    refused(make, state, TypeError, f"^{COUNTERS} in state_dict must be a dict, got ")


@pytest.mark.parametrize("make", [ours, around_sgd])
@pytest.mark.parametrize("name", ["attempts", "completed", "skipped", "searched_at", "epsilon"])
@pytest.mark.parametrize("value", ["3", -1, torch.tensor(3), True, float("nan")])
def test_counters_are_numbers(make, name, value):
    state = changed(make, lambda state: state["param_groups"][0][COUNTERS].update({name: value}))
    refused(make, state, (TypeError, ValueError), f"^{name} of {COUNTERS} in state_dict must be ")


@pytest.mark.parametrize("make", [ours, around_sgd])
def test_the_flag_of_a_group_is_a_bool(make):
    state = changed(make, lambda state: state["param_groups"][0].update(perturb="no"))
    refused(make, state, TypeError, "^perturb of a parameter group in state_dict must be a bool, got 'no'")


@pytest.mark.parametrize(
    "name, value",
    [("lr", "1"), ("lr", torch.tensor(0.1)), ("lr", -1.0), ("betas", 0.9), ("eps", None), ("weight_decay", True)],
)
def test_the_numbers_of_a_group_are_those_of_the_constructor(name, value):
    state = changed(ours, lambda state: state["param_groups"][0].update({name: value}))
    refused(ours, state, (TypeError, ValueError), f"^{name} must be ")


@pytest.mark.parametrize("name", ["lr", "betas", "eps", "weight_decay"])
def test_a_group_has_all_numbers(name):
    state = changed(ours, lambda state: state["param_groups"][0].pop(name))
    refused(ours, state, ValueError, f"^state_dict must be of an AdamW, a parameter group of it lacks {name}$")


@pytest.mark.parametrize("name", ["step", "exp_avg", "exp_avg_sq"])
def test_a_parameter_has_all_of_its_state(name):
    state = changed(ours, lambda state: state["state"][1].pop(name))
    refused(ours, state, ValueError, f"^state_dict must be of an AdamW, its state of parameter 1 lacks {name}$")


@pytest.mark.parametrize("name", ["exp_avg", "exp_avg_sq"])
@pytest.mark.parametrize("dtype", [torch.int64, torch.complex64, torch.bool])
def test_moments_are_floating_point(name, dtype):
    state = changed(ours, lambda state: state["state"][1].update({name: state["state"][1][name].to(dtype)}))
    refused(ours, state, TypeError, f"^{name} of parameter 1 in state_dict must be a floating-point tensor, got ")


@pytest.mark.parametrize("step", ["1", None, -1, torch.ones(3), torch.tensor(torch.nan), torch.tensor(1j)])
def test_the_step_is_a_number(step):
    state = changed(ours, lambda state: state["state"][1].update(step=step))
    refused(ours, state, (TypeError, ValueError), "^step of parameter 1 in state_dict must be ")


@pytest.mark.parametrize("key", ["0", 99])
def test_a_state_of_no_parameter_of_the_groups_is_refused(key):
    state = changed(ours, lambda state: state["state"].update({key: state["state"][0]}))
    refused(ours, state, ValueError, f"^state_dict has a state of parameter {key!r}, which is in none of its groups$")


@pytest.mark.parametrize("name", ["amsgrad", "maximize"])
def test_an_adamw_that_goes_another_way_is_refused(name):
    model = network()
    theirs = stepped(torch.optim.AdamW(model.parameters(), **{name: True}), model)
    refused(ours, theirs.state_dict(), ValueError, f"^state_dict must be of an AdamW without {name}, got {name}=True$")


def test_adam_is_refused_where_its_weight_decay_is_another():
    model = network()
    theirs = stepped(torch.optim.Adam(model.parameters(), weight_decay=0.1), model)
    refused(
        ours, theirs.state_dict(), ValueError, "^state_dict must be of an AdamW, got one of Adam, whose weight_decay"
    )
    theirs = stepped(torch.optim.Adam(model.parameters()), model)
    optimizer = ours(model)
    optimizer.load_state_dict(theirs.state_dict())
    p = next(model.parameters())
    assert torch.equal(optimizer.state[p]["exp_avg"], theirs.state[p]["exp_avg"])


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_sgd_is_refused(momentum):
    model = network()
    theirs = stepped(torch.optim.SGD(model.parameters(), 0.1, momentum=momentum), model)
    refused(
        ours,
        theirs.state_dict(),
        ValueError,
        "^state_dict must be of an AdamW, a parameter group of it lacks eps, betas$",
    )


@pytest.mark.parametrize(
    "wrap", [rf.RegularizedAdamW, lambda groups: rf.GradientRegularizer(torch.optim.AdamW(groups))]
)
def test_a_plain_state_leaves_what_is_perturbed(wrap):
    """torch replaces a group by the saved one, in which the flag is missing: everything would be perturbed."""
    model = nn.ModuleDict({"layers": nn.ModuleList([nn.Linear(2, 2)]), "head": nn.Linear(2, 2)})
    groups = rf.parameter_groups(model)
    plain = torch.optim.AdamW([{"params": group["params"]} for group in groups], lr=0.5)
    optimizer = wrap(groups)
    optimizer.load_state_dict(plain.state_dict())
    assert [(group["perturb"], group["lr"]) for group in optimizer.param_groups] == [(True, 0.5), (False, 0.5)]
    saved = optimizer.state_dict()
    saved["param_groups"][1]["perturb"] = True
    optimizer.load_state_dict(saved)
    assert [group["perturb"] for group in optimizer.param_groups] == [True, True]


@pytest.mark.parametrize("make", [ours, around_sgd])
def test_counters_beside_the_groups_are_read_too(make):
    """So the first states had them."""
    model = network()
    state = stepped(make(model), model).state_dict()
    first = {name: value for name, value in state["param_groups"][0].items() if name != COUNTERS}
    old = {"state": state["state"], "param_groups": [first], COUNTERS: {"attempts": 7, "completed": 5, "skipped": 2}}
    optimizer = make(model)
    optimizer.load_state_dict(old)
    assert optimizer.state_dict()["param_groups"][0][COUNTERS] == old[COUNTERS]


@pytest.mark.parametrize("twice", [copy.deepcopy, lambda both: pickle.loads(pickle.dumps(both))])
@pytest.mark.parametrize("make", [ours, around_sgd])
def test_a_copy_goes_on_as_the_optimizer_does(make, twice):
    """With its options, counters, masters and momentum; the scheduler's hooks stay with the one that has it."""
    model = network().bfloat16()
    first = make(model)
    first.gamma, first.max_norm = 2e-3, 0.5
    x = torch.randn(8, 16).bfloat16()

    def take_step(optimizer, model):
        loss_of(model, x).backward()
        with optimizer.perturb():
            loss_of(model, x).backward()
        optimizer.step()
        optimizer.zero_grad()

    take_step(first, model)
    torch.optim.lr_scheduler.StepLR(first, 1)
    start = [p.detach().clone() for p in model.parameters()]
    second_model, second = twice((model, first))
    for optimizer, of in ((second, second_model), (first, model)):
        take_step(optimizer, of)
        take_step(optimizer, of)
    pairs = list(zip(model.parameters(), second_model.parameters(), start, strict=True))
    assert all(torch.equal(p, q) and not torch.equal(p, old) for p, q, old in pairs)
    assert second.gr == first.gr and second.max_norm == 0.5
    assert repr(second.state_dict()) == repr(first.state_dict())
