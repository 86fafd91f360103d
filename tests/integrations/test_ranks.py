"""TRL's and transformers' trainers on two ranks, by DDP and by accelerate's FSDP2: gradients and weights of one rank.
One pair of processes computes every case (tests/integrations/trl_rank.py)."""

import os
import signal
import socket
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("trl", reason="TRL is not installed: its integration needs it")
pytest.register_assert_rewrite("tests.integrations.trl_trainers")  # imported below, and a plugin: its fixtures

from trl import GRPOConfig, GRPOTrainer  # noqa: E402

from redit_fast.integrations.trl import ReditGRPOConfig, ReditGRPOTrainer  # noqa: E402
from tests.integrations import trl_rank  # noqa: E402
from tests.integrations.trl_trainers import GROUP  # noqa: E402
from tests.project.test_floors import ROOT  # noqa: E402

pytest_plugins = ("tests.integrations.trl_trainers",)
pytestmark = pytest.mark.filterwarnings("ignore:.*pin_memory", "ignore:.*gradient_checkpointing")


@pytest.fixture(scope="module")
def process(folders, tokenizer, tmp_path_factory):
    """Both ranks, started before the other tests and run beside them."""
    out = tmp_path_factory.mktemp("ranks")
    tokenizer.save_pretrained(out / "tokenizer")
    trl_rank.a_model().save_pretrained(out / "small")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    started = subprocess.Popen(
        [sys.executable, "-m", "tests.integrations.trl_rank", folders["qwen2"], folders["untied"], out],
        env={**os.environ, **meeting, "CI": "1", "OMP_NUM_THREADS": "1"},
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    yield started, out
    if started.poll() is None:
        os.killpg(started.pid, signal.SIGKILL)  # the other rank too


@pytest.fixture(scope="module")
def one(process, tokenizer, folders, tmp_path_factory):
    """The same without ranks, on all of the batch."""
    out = tmp_path_factory.mktemp("one")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CI", "1")
        results = {
            name: trl_rank.trained(trl_rank.a_grpo_trainer(tokenizer, folders["untied"], out, name, 2 * GROUP))
            for name in trl_rank.SHARDED
        }
        for name, optimizer in (("mixin", None), ("own optimizer", "regularized_adamw")):
            results[name] = trl_rank.trained(trl_rank.a_mixin_trainer(out, 4, gr_optimizer=optimizer))
    return results


@pytest.fixture(scope="module")
def ranks(process, one):
    started, out = process
    output = started.communicate(timeout=240)[0].decode()
    assert started.returncode == 0, output
    return [torch.load(out / f"rank{rank}.pt", weights_only=True) for rank in range(2)]


def test_two_ranks_of_ddp_are_one(ranks, a_trainer):
    trainer = a_trainer(trl_rank.RankTrainer, ReditGRPOConfig, **trl_rank.OPTIONS)
    trainer.train()
    start = trl_rank.parameters(a_trainer(GRPOTrainer, GRPOConfig).model)
    expected = trl_rank.parameters(trainer.model)
    found = [rank["ddp"] for rank in ranks]
    for packing in (False, True):
        (first, second) = (weights[packing] for weights, _ in found)
        for name, q in expected.items():
            assert torch.equal(first[name], second[name]) and torch.allclose(first[name], q, rtol=0, atol=1e-6)
    assert max((expected[name] - start[name]).abs().max() for name in start) > 5e-3
    for _, logs in found:  # of which the second has scored nothing
        for theirs, ours in logs:
            assert ours == pytest.approx(theirs, rel=1e-5) and ours["clip_ratio/low_min"] == 1


def distance(found, expected):
    """Of two gradients, relative to the second's norm."""
    squares = [(found[name].double() - value.double()).square().sum() for name, value in expected.items()]
    return (sum(squares) / sum(value.double().square().sum() for value in expected.values())).sqrt().item()


@pytest.mark.parametrize(
    ("name", "alone"),
    [("loss", "loss"), ("log-probs", "log-probs"), ("ddp mixin", "mixin"), ("fsdp2 mixin", "mixin"),
     ("sharded as loaded", "mixin"), ("own optimizer", "own optimizer")],
)  # fmt: skip
def test_gradients_weights_and_epsilon_of_two_ranks_are_those_of_one(ranks, one, name, alone):
    steps, weights, logs = one[alone]
    start = {name: p.detach() for name, p in trl_rank.a_model().named_parameters()} if "mixin" in alone else {}
    assert len(steps) == 3 and all((weights[name] - p).abs().max() > 5e-3 for name, p in start.items())
    for rank in ranks:
        found, ended, logged = rank[name]
        assert found[0].keys() == steps[0].keys() and ended.keys() == weights.keys()
        # 1e-6 of each pass: GR's gradient is (1 - r) of the first and r = gamma / epsilon of the second.
        ratio = 0.6 if alone == "loss" else trl_rank.AUTO["gr_gamma"] / logs[0]["gr/epsilon"]
        assert distance(found[0], steps[0]) < 1e-6 * (abs(1 - ratio) + ratio)
        for key, value in weights.items():
            torch.testing.assert_close(ended[key], value, rtol=1e-5, atol=1e-6)
        for mine, theirs in zip(logged, logs, strict=True):
            assert mine == pytest.approx(theirs, rel=1e-5)
        if alone != "loss":
            assert logged[0]["gr/epsilon"] < 1e-3  # "auto", where the step is 0.02 |theta|


def test_epsilon_does_not_see_the_micro_batches(one, tmp_path):
    steps, weights, logs = trl_rank.trained(trl_rank.a_mixin_trainer(tmp_path, 8, gradient_accumulation_steps=1))
    expected, ended, theirs = one["mixin"]
    assert distance(steps[0], expected[0]) < 1e-6
    assert logs[0]["gr/epsilon"] == pytest.approx(theirs[0]["gr/epsilon"], rel=1e-5) and logs[0]["gr/epsilon"] < 1e-3
    for name, value in ended.items():
        torch.testing.assert_close(weights[name], value, rtol=1e-5, atol=1e-6)


def test_no_rank_gathers_a_weight_beside_fsdp2(ranks):
    assert [rank["gathered"] for rank in ranks] == [[], []]


def test_trls_fused_forward_by_our_head_has_the_gradients_of_all_ranks(ranks):
    for rank in ranks:
        expected = rank["fused forwards"].pop("alone")
        assert len(rank["fused forwards"]) == 3 and expected["lm_head.weight"].norm() > 0.1
        for kind, grads in rank["fused forwards"].items():
            assert distance(grads, expected) < 1e-6, kind


def test_a_step_after_a_backward_pass_that_was_cut_short_is_refused(ranks):
    for rank in ranks:
        assert rank["cut short"].startswith(
            "gr_gamma above 0 got a step after one whose backward passes were cut short"
        )
        assert rank["cut short"].endswith("build the trainer anew from a checkpoint")


def test_what_does_not_work_is_refused_in_a_sentence_that_names_what_does(ranks):
    fsdp1 = (
        "gr_gamma={} does not work under FSDP1, whose flat parameters do not say which rank holds what: use FSDP2 "
        "(fsdp_config={{'version': 2}}) or DDP"
    )
    for rank in ranks:
        mixin, trl, packing = rank["refusals"]
        assert mixin == fsdp1.format(trl_rank.AUTO["gr_gamma"]) and trl == fsdp1.format(0.03)
        assert packing.startswith("packing=True does not work")
        assert packing.endswith("FSDP shards it, use DDP or one device")


def test_deepspeed_is_refused_in_a_sentence_that_names_fsdp2(a_trainer):
    trainer = a_trainer(GRPOTrainer, GRPOConfig)
    hooks = SimpleNamespace(is_deepspeed_enabled=True, model=trainer.model)
    refused = r"^gr_gamma=0.03 does not work under DeepSpeed, which steps in backward\(\): use FSDP2 \(.*\) or DDP$"
    with pytest.raises(ValueError, match=refused):
        ReditGRPOTrainer._start_gr(hooks, ReditGRPOConfig("", gr_gamma=0.03, use_cpu=True, bf16=False))
