"""Gradient regularisation on torch's own engines: DDP, FSDP2 and hand-made DTensors, two ranks of gloo. One pair of
processes computes all cases (tests/gr/distributed_cases.py); the tests compare what it wrote with one process.
"""

import os
import signal
import subprocess
import sys

import pytest
import torch
from torch import nn

import redit_fast as rf
from tests import ROOT
from tests.gr.distributed_cases import given_gradients, network, optimizer, sequential, train, whole

pytestmark = pytest.mark.skipif(
    not (torch.distributed.is_available() and torch.distributed.is_gloo_available()), reason="torch without gloo"
)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What each of the two ranks wrote."""
    folder = tmp_path_factory.mktemp("ranks")
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.gr.distributed_cases", folder],
        cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    try:
        errors = process.communicate(timeout=120)[1]
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)  # the other rank too
    assert process.returncode == 0, errors
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


def alone(kind="adamw", parts=1, **gr):
    model = network()
    opt = optimizer(model, kind, **gr)
    train(model, opt, parts)
    return whole(model), opt.metrics()


def assert_close(ours, expected):
    assert ours.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(ours[name], value, rtol=1e-5, atol=1e-6)


def test_accumulation_over_4_micro_batches_equals_one_batch():
    one, four = alone(), alone(parts=4)
    assert_close(four[0], one[0])
    assert four[1] == pytest.approx(one[1], rel=1e-5, nan_ok=True)


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("kind", ["adamw", "sgd"])
@pytest.mark.parametrize("engine", ["ddp_steps", "fsdp_steps"])
def test_two_ranks_equal_one(ranks, engine, kind, keep):
    """Over three steps of two micro-batches each, only the last of which communicates; under DDP gradients are views
    into its buckets, under FSDP2 gathered weights are kept from pass to pass. The norms are global: the metrics show
    it. A tied, a frozen and an unused layer take part."""
    expected, metrics = alone(kind, keep_first_grad=keep)
    plain, _ = alone(kind, gamma=0.0)
    assert not torch.allclose(plain["fc1.weight"], expected["fc1.weight"], rtol=1e-3)  # GR is far above the tolerance
    for name in ("frozen.weight", "unused.weight"):
        assert torch.equal(expected[name], dict(network().named_parameters())[name])
    for rank in ranks:
        weights, measured = rank[engine][kind, keep]
        assert_close(weights, expected)
        assert measured == pytest.approx(metrics, rel=1e-4, nan_ok=True)


def test_collectives_are_one_in_perturb_and_one_in_step_and_none_under_ddp(ranks):
    for rank in ranks:
        counts = {key: value[:2] for key, value in rank["collectives"].items()}
        assert all(count == (0, 0) for (engine, *_), count in counts.items() if engine == "ddp")
        assert counts["fsdp",] == counts["fsdp", "keep_first_grad"] == (1, 1)
        assert counts["fsdp", "gamma"] == (0, 1)
        assert counts["fsdp", "epsilon"] == (2, 1)  # the search for epsilon adds one


def test_ranks_agree_on_an_epsilon_that_is_searched(ranks):
    chosen = {rank["collectives"][engine, "epsilon"][2] for rank in ranks for engine in ("ddp", "fsdp")}
    assert chosen == {1e-3}  # float32


@pytest.mark.parametrize("bad", [1, 2])
@pytest.mark.parametrize("engine", ["ddp", "fsdp"])
def test_a_gradient_that_is_not_finite_on_one_rank_skips_the_step_on_all(ranks, engine, bad):
    for rank in ranks:
        untouched, skipped = rank["one_rank_is_not_finite"][engine, bad]
        assert untouched and skipped == 1


def test_an_overflow_in_one_shard_skips_the_step_and_lowers_the_scale_on_all_ranks(ranks):
    for rank in ranks:
        assert rank["grad_scaler"] == [(False, 4.0, 0), (True, 2.0, 1), (True, 2.0, 1)]


@pytest.mark.parametrize("layout", ["rows", "columns", "copies", "copies of rows", "rows of columns"])
def test_the_rounding_of_an_element_does_not_depend_on_how_it_is_sharded(ranks, layout):
    params = []
    for weight, grad in given_gradients():
        params.append(nn.Parameter(weight.clone()))
        params[-1].grad = grad.clone()
    opt = rf.RegularizedAdamW(params, gamma=0.3, epsilon=0.3, seed=7)
    opt.perturb()
    moved = [p.detach().clone() for p in params]
    with pytest.warns(UserWarning, match="cosine"):
        metrics = opt.metrics()
    assert 0.1 < metrics["gr/frac_moved"] < 0.9  # some are rounded away
    for rank in ranks:
        perturbed, measured, restored = rank["rounding_by_element"][layout]
        assert all(map(torch.equal, perturbed, moved))
        assert all(torch.equal(p, weight) for p, (weight, _) in zip(restored, given_gradients()))
        for name in ("gr/g1_norm", "gr/step_gain", "gr/step_cos", "gr/frac_moved"):
            assert measured[name] == pytest.approx(metrics[name], rel=1e-6)


def test_tensor_parallel_weights_beside_plain_ones_take_the_step_of_one_process(ranks):
    model = sequential()
    opt = optimizer(model)
    train(model, opt, 1)
    for rank in ranks:
        weights, metrics = rank["tensor_parallel"]
        assert_close(weights, whole(model))
        assert metrics == pytest.approx(opt.metrics(), rel=1e-4, nan_ok=True)


def test_a_mixed_precision_policy_is_seen_by_the_metrics_and_by_the_warning(ranks):
    """float32 shards, gathered as bfloat16: a step of 0.001 is lost on the way to the forward pass."""
    for rank in ranks:
        weights, metrics, messages = rank["mixed_precision"]
        assert metrics["gr/step_cos"] < 0.9 and any("cosine" in message for message in messages)
        assert all(value.dtype == torch.float32 and value.isfinite().all() for value in weights.values())
        assert not torch.equal(weights["fc1.weight"], network().fc1.weight)


def test_a_checkpoint_by_torch_distributed_goes_on_bit_by_bit(ranks):
    """In bfloat16, where a master that was cast, or a counter that was lost, changes the rounding."""
    for rank in ranks:
        unbroken, reloaded = rank["checkpoint"]
        assert all(torch.equal(unbroken[name], reloaded[name]) for name in unbroken)


def test_a_reference_reset_reaches_sharded_and_gathered_weights(ranks):
    for rank in ranks:
        before, after, policy = rank["reference_reset"]
        assert not torch.equal(before, after) and torch.equal(after, policy)


def test_a_swapped_head_of_fsdp2_has_the_gradients_of_all_ranks(ranks):
    for rank in ranks:
        expected = rank["swapped_heads"]["alone"]
        assert all(grad.norm() > 1e-2 for name, grad in expected.items() if not name.endswith("k_proj.bias"))
        for kind in rank["swapped_heads"]:
            assert_close(rank["swapped_heads"][kind], expected)


def test_what_cannot_be_sharded_is_refused_in_one_sentence(ranks):
    for rank in ranks:
        placed, flat = rank["refusals"]
        assert "Replicate" in placed and "Shard(dim=0)" in placed and "fully_shard" in flat
