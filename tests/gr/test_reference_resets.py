"""Reference Resets: the reference becomes the policy, in place and in its own dtype. Sharded models are in
tests/gr/test_distributed.py."""

import copy

import pytest
import torch
from torch import nn

import redit_fast as rf


def model(**options):
    return nn.Sequential(nn.Linear(4, 3, **options), nn.BatchNorm1d(3), nn.Linear(3, 2))


def test_parameters_and_buffers_are_copied_in_place_and_rounded_to_the_references_dtype():
    policy, reference = model(), model().bfloat16().requires_grad_(False)
    policy[1].running_mean.fill_(0.3)
    storages = [value.data_ptr() for value in reference.state_dict().values()]
    rf.reset_reference(reference, policy)
    for name, value in reference.state_dict().items():
        ours = policy.state_dict()[name]
        assert torch.equal(value, ours.bfloat16() if ours.is_floating_point() else ours), name
    assert [value.data_ptr() for value in reference.state_dict().values()] == storages
    with torch.no_grad():
        policy[0].weight += 1
    assert not torch.equal(reference[0].weight, policy[0].weight.bfloat16())


def test_a_cast_that_autocast_has_kept_is_dropped():
    policy, reference, x = model(), model(), torch.randn(5, 4)  # a reference that nobody froze
    with torch.autocast("cpu", torch.bfloat16):
        before = reference(x)
        rf.reset_reference(reference, policy)
        assert torch.equal(reference(x), policy(x)) and not torch.equal(reference(x), before)


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        (model(bias=False), "0.bias"),
        (nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, 2)), r"0.weight is \(3, 4\).*\(5, 4\)"),
        (nn.ModuleDict({"module": model()}), "without wrappers or adapters"),
    ],
)
def test_models_that_differ_are_refused_by_name_and_nothing_is_written(policy, message):
    reference = model()
    before = copy.deepcopy(reference.state_dict())
    with pytest.raises(ValueError, match=message):
        rf.reset_reference(reference, policy)
    assert all(torch.equal(before[name], value) for name, value in reference.state_dict().items())
