"""GR in verl's real TrainingWorker: FSDP2 on the CPU, verl's configurations, batches and losses."""

import copy
import inspect
import os
import subprocess
import sys
import warnings
from math import inf, isfinite, nan

import pytest
import torch

pytest.importorskip("verl", reason="verl is not installed: its integration needs it")
pytest.register_assert_rewrite("tests.integrations.verl_rank")  # imported below, and a plugin: its fixtures

import verl  # noqa: E402
import verl.models.transformers.monkey_patch as monkey_patch  # noqa: E402
from hydra import compose, initialize_config_dir  # noqa: E402
from torch.distributed.fsdp.sharded_grad_scaler import ShardedGradScaler  # noqa: E402
from transformers import Qwen2ForCausalLM  # noqa: E402
from verl.utils import tensordict_utils as tu  # noqa: E402
from verl.utils.config import omega_conf_to_dataclass  # noqa: E402
from verl.workers.config.engine import QATEngineConfig  # noqa: E402
from verl.workers.engine import EngineRegistry  # noqa: E402
from verl.workers.engine.fsdp import FSDPTurboEngineWithLMHead  # noqa: E402
from verl.workers.engine.fsdp.transformer_impl import FSDPEngineWithLMHead  # noqa: E402
from verl.workers.utils.losses import ppo_loss  # noqa: E402

import redit_fast as rf  # noqa: E402
from redit_fast.integrations import verl as ours  # noqa: E402
from redit_fast.integrations.verl import advantages as verl_advantages  # noqa: E402
from redit_fast.integrations.verl import config as verl_config  # noqa: E402
from redit_fast.integrations.verl import engine as verl_engine  # noqa: E402
from redit_fast.integrations.verl import head as verl_head  # noqa: E402
from redit_fast.integrations.verl import loss as verl_loss  # noqa: E402
from redit_fast.losses.terms import _kl_cov_tokens, loss_terms  # noqa: E402
from tests.integrations.verl_rank import (  # noqa: E402
    AUTO,
    CLIP,
    ENTROPY,
    GR,
    LR,
    batch_of,
    close,
    enlarged,
    new_worker,
    rows,
    same,
    train,
    weights,
)
from tests.project.test_floors import ROOT  # noqa: E402

pytest_plugins = ("tests.integrations.verl_rank",)
pytestmark = pytest.mark.usefixtures("verl_process")


@pytest.fixture(scope="module")
def ranks(folder, tmp_path_factory):
    """Two ranks of tests.integrations.verl_rank, started before the other tests and run beside them."""
    out = tmp_path_factory.mktemp("ranks")
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.integrations.verl_rank", folder, out],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    yield process, out
    process.kill()


def loss_of(model, samples):
    """verl's vanilla loss and entropy bonus of all tokens, written out."""
    total, count = 0.0, sum(len(response) for _, response, _, _ in samples)
    for prompt, response, old, advantages in samples:
        logits = model(torch.cat([prompt, response])[None]).logits[0, len(prompt) - 1 : -1]
        logp = torch.log_softmax(logits, -1)
        ratio = (logp.gather(1, response[:, None])[:, 0] - old).exp()
        loss = torch.maximum(-advantages * ratio, -advantages * ratio.clamp(0.8, 1.2))
        loss = torch.where(advantages < 0, torch.minimum(loss, -3.0 * advantages), loss)
        total = total + loss.sum() + ENTROPY * (logp.exp() * logp).sum()
    return total / count


def double_pass(model, samples, gamma, epsilon, longest):
    """A step of SGD, written out; the combined gradient's norm."""
    params = dict(model.named_parameters())
    start = {name: p.detach().clone() for name, p in params.items()}
    first = dict(zip(params, torch.autograd.grad(loss_of(model, samples), params.values())))
    layers = [name for name in params if name.startswith("model.layers.")]
    norm = torch.stack([first[name].norm() for name in layers]).norm()
    with torch.no_grad():
        for name in layers:
            params[name] += epsilon * min(1.0, longest / norm) * first[name]
    second = torch.autograd.grad(loss_of(model, samples), params.values())
    grads = [g1 + gamma / epsilon * (g2 - g1) for g1, g2 in zip(first.values(), second)]
    norm = torch.stack([g.norm() for g in grads]).norm()
    with torch.no_grad():
        for (name, p), g in zip(params.items(), grads):
            p.copy_(start[name] - LR * min(1.0, CLIP / norm) * g)
    return norm.item()


@pytest.fixture(scope="module")
def hand_written(folder):
    """Weights and gradient norms after two steps."""
    model = Qwen2ForCausalLM.from_pretrained(folder, attn_implementation="eager")
    norms = [double_pass(model, rows(seed), *GR.values()) for seed in (1, 2)]
    return {name: p.detach() for name, p in model.named_parameters()}, norms


PACKED = {"model": {"use_remove_padding": True, "enable_gradient_checkpointing": True}, "use_dynamic_bsz": True,
          "max_token_len_per_gpu": 16, "fused": "redit"}  # fmt: skip
OFFLOADED = {"param_offload": True, "optimizer_offload": True, "reshard_after_forward": False}


@pytest.mark.parametrize(
    "options", [{"micro_batch_size_per_gpu": 1}, {"micro_batch_size_per_gpu": 4}, PACKED, OFFLOADED]
)
def test_steps_with_gr_are_those_of_a_hand_written_double_pass(ranks, folder, hand_written, options):
    worker = new_worker(folder, optim=GR, **options)
    assert type(worker.engine) is verl_engine.ReditFSDPEngine
    found = [train(worker, batch_of(rows(seed)))["grad_norm"] for seed in (1, 2)]
    expected, norms = hand_written
    assert sum(found, []) == pytest.approx(norms, rel=1e-5) and min(norms) > CLIP
    assert close(weights(worker), expected) and worker.engine._gr.batches == []


def test_verls_metrics_are_the_first_passs_and_gr_adds_its_own(folder):
    stock, ours = (train(new_worker(folder, optim=optim), batch_of(rows())) for optim in (None, GR))
    timed = {name for name in stock if name == "mfu" or name.startswith("perf/")}
    for name in stock.keys() - timed - {"grad_norm"}:
        assert ours[name] == stock[name], name
    assert ours["gr/g1_norm"] == pytest.approx(stock["grad_norm"], rel=1e-5)
    assert abs(ours["grad_norm"][0] - stock["grad_norm"][0]) > 1e-2
    step = {f"gr/{name}" for name in ("g1_norm", "step_gain", "step_cos", "step_norm_ratio", "frac_moved", "epsilon")}
    assert ours.keys() - stock.keys() == {*step, "gr/skipped_steps", "time/gr_pass2"}


def test_the_second_pass_keeps_the_tokens_that_kl_cov_chose_in_the_first(folder, monkeypatch):
    chosen, anew = [], []

    def spy(rows, logp, kept):
        chosen.append(_kl_cov_tokens(rows, rows.masks_of[0]))
        anew.append(_kl_cov_tokens(rows, logp.detach()))
        return loss_terms(rows, logp, kept)

    verl_loss.register()
    monkeypatch.setattr(verl_loss, "loss_terms", spy)
    policy_loss = {"loss_mode": "redit_kl_cov", "kl_cov_ratio": 0.4}
    train(new_worker(folder, optim={**GR, "gr_epsilon": 20.0, "gr_perturb_max_norm": 10.0}, policy_loss=policy_loss),
          batch_of(rows()))  # fmt: skip
    first, second = chosen[:2], chosen[2:]
    assert len(second) == 2 and all(map(torch.equal, first, second)) and all(map(torch.equal, first, anew))
    assert not all(map(torch.equal, second, anew[2:]))


def test_without_gr_gamma_a_step_is_verls_own_bit_for_bit(folder):
    found = []
    for options in (None, {"momentum": 0.9}, {**GR, "gr_gamma": 0.0, "momentum": 0.9}):
        worker = new_worker(folder, optim=options)
        for seed in (1, 2):
            metrics = train(worker, batch_of(rows(seed)))
        found.append((weights(worker), metrics, worker.engine.optimizer.param_groups[0]["momentum"]))
    verl_engine.unregister()
    try:
        stock = new_worker(folder)
    finally:
        verl_engine.register()
    assert type(stock.engine) is FSDPEngineWithLMHead
    for seed in (1, 2):
        metrics = train(stock, batch_of(rows(seed)))
    assert same(found[0][0], weights(stock)) and found[0][1].keys() == metrics.keys()
    assert same(found[1][0], found[2][0]) and found[1][1].keys() == found[2][1].keys()
    assert [momentum for _, _, momentum in found] == [0.0, 0.9, 0.9]


def test_the_second_pass_draws_the_dropout_of_the_first(folder):
    """At a step this short both passes have the same gradient, if they drop the same."""
    found = []
    for optim in (None, {"gr_gamma": 1e-5, "gr_epsilon": 1e-5}, {"gr_gamma": 1e-5, "gr_epsilon": 1e-5}):
        worker = new_worker(folder, optim=optim, hf_config={"attention_dropout": 0.5})
        torch.manual_seed(len(found) // 2)
        train(worker, batch_of(rows()))
        found.append((weights(worker), torch.get_rng_state()))
    (stock, after), (ours, ours_after), (other, _) = found
    assert close(ours, stock, 1e-4) and not close(other, stock, 1e-2)
    assert torch.equal(after, ours_after)


class Breaking:
    """verl's loss, on whose n-th call something happens to it."""

    def __init__(self, n, break_it):
        self.left, self.break_it = n, break_it

    def __call__(self, config, model_output, data, dp_group=None):
        loss, metrics = ppo_loss(config, model_output, data, dp_group)
        self.left -= 1
        return (self.break_it(loss) if self.left == 0 else loss), metrics


@pytest.mark.parametrize("gamma", [GR["gr_gamma"], GR["gr_epsilon"]])  # with the second, g2 alone is in .grad
@pytest.mark.parametrize(("call", "value"), [(1, nan), (2, inf), (4, inf)])  # of two micro-batches a pass
def test_a_gradient_that_is_not_finite_in_either_pass_skips_the_step(folder, call, value, gamma):
    optim = {**GR, "gr_gamma": gamma, "momentum": 0.9}
    worker = new_worker(folder, optim=optim, loss=Breaking(call, lambda loss: loss * value))
    start = weights(worker)
    metrics = train(worker, batch_of(rows(1)))
    assert same(weights(worker), start) and not worker.engine.optimizer.state
    assert not isfinite(metrics["grad_norm"][0]) and metrics["gr/skipped_steps"] == [1.0]
    metrics = train(worker, batch_of(rows(1)))
    assert isfinite(metrics["grad_norm"][0]) and metrics["gr/skipped_steps"] == [1.0]
    assert not same(weights(worker), start)


def test_an_exception_in_the_second_pass_restores_the_weights(folder, hand_written):
    def broken(loss):
        raise OSError("no device")

    worker = new_worker(folder, optim=GR, loss=Breaking(3, broken))
    start = weights(worker)
    with pytest.raises(OSError, match="no device"):
        train(worker, batch_of(rows(1)))
    assert same(weights(worker), start) and worker.engine._gr.batches == []
    assert all(p.grad is None for p in worker.engine.module.parameters())
    for seed in (1, 2):
        train(worker, batch_of(rows(seed)))
    assert close(weights(worker), hand_written[0])


def test_an_exception_in_the_first_pass_leaves_no_batch_behind(folder):
    worker = new_worker(folder, optim=GR, loss=Breaking(2, lambda loss: 1 / 0))
    with pytest.raises(ZeroDivisionError):
        train(worker, batch_of(rows()))
    assert worker.engine._gr.batches == []


def out_of_memory(loss):
    raise torch.OutOfMemoryError("CUDA out of memory.")


def forward_backward(worker):
    data = batch_of(rows())
    tu.assign_non_tensor(data, use_remove_padding=False, use_dynamic_bsz=False, micro_batch_size_per_gpu=2)
    return worker.engine.forward_backward_batch(data, worker.loss_fn)


def test_a_mini_batch_that_did_not_fit_is_not_repeated(folder):
    found = []
    for call in (0, 1):  # none; the first micro-batch, of which nothing is left behind
        worker = new_worker(folder, optim=GR, loss=Breaking(call, out_of_memory))
        with worker.engine.train_mode():
            worker.engine.optimizer_zero_grad()
            if call:
                with pytest.raises(torch.OutOfMemoryError):
                    forward_backward(worker)
            forward_backward(worker)
            worker.engine.optimizer_step()
        found.append(weights(worker))
    assert close(found[1], found[0])


@pytest.mark.parametrize("call", [2, 4])  # the second micro-batch of either pass
def test_part_of_a_gradient_that_fsdp_keeps_is_refused(folder, call):
    """Its first micro-batch's, which zero_grad does not reach and FSDP2 adds to the next step's first pass."""
    worker = new_worker(folder, optim=GR, loss=Breaking(call, out_of_memory))
    start = weights(worker)
    with worker.engine.train_mode():
        worker.engine.optimizer_zero_grad()
        with pytest.raises(torch.OutOfMemoryError):
            forward_backward(worker)
            worker.engine.optimizer_step()
        worker.engine.optimizer_zero_grad()
        refused = "gr_gamma above 0 got a step after one .* cut short by an exception, .* build the worker anew"
        with pytest.raises(RuntimeError, match=refused):
            forward_backward(worker)
        with pytest.raises(RuntimeError, match=refused):
            worker.engine.optimizer_step()
    assert same(weights(worker), start)


def test_batches_that_are_only_scored_are_not_kept(folder):
    worker = new_worker(folder, optim=GR)
    worker.infer_batch(batch_of(rows()))
    assert worker.engine._gr.batches == []


def test_gradients_of_several_batches_are_all_repeated(folder):
    """As verl's Tinker worker calls the engine: forward_backward_batch more than once, then optimizer_step."""
    found = []
    for halves in (False, True):
        worker = new_worker(folder, optim=GR)
        samples = rows()
        parts = [samples[:2], samples[2:]] if halves else [samples]
        with worker.engine.train_mode():
            worker.engine.optimizer_zero_grad()
            for part in parts:
                data = batch_of(part)
                tu.assign_non_tensor(data, use_remove_padding=False, use_dynamic_bsz=False, micro_batch_size_per_gpu=2)
                worker.engine.forward_backward_batch(data, scaled(worker.loss_fn, part))
            worker.engine.optimizer_step()
            assert worker.engine._gr.batches == []
        found.append(weights(worker))
    assert close(found[1], found[0])


def scaled(loss_fn, part):
    """The loss over the tokens of all samples, of which `part` are some."""
    share = sum(len(response) for _, response, _, _ in part) / sum(len(response) for _, response, _, _ in rows())

    def loss(**kwargs):
        value, metrics = loss_fn(**kwargs)
        return value * share, metrics

    return loss


@pytest.mark.parametrize("normalized", [False, True])
def test_a_loss_scale_changes_nothing(folder, normalized):
    found = []
    for scaler in (None, ShardedGradScaler(device="cpu", init_scale=1024.0)):
        worker = new_worker(folder, optim={**GR, "gr_normalized": normalized})
        worker.engine.scaler = scaler
        found.append((train(worker, batch_of(rows())), weights(worker)))
    (expected, stepped), (metrics, scaled_step) = found
    assert close(scaled_step, stepped)
    for name in ("grad_norm", "gr/g1_norm", "gr/epsilon"):
        assert metrics[name] == pytest.approx(expected[name], rel=1e-5)
    assert scaler.get_scale() == 1024.0


def test_an_overflow_of_the_loss_scale_skips_the_step_and_lowers_the_scale(folder):
    worker = new_worker(folder, optim=GR, loss=Breaking(3, lambda loss: loss * inf))
    worker.engine.scaler = ShardedGradScaler(device="cpu", init_scale=1024.0)
    start = weights(worker)
    train(worker, batch_of(rows()))
    assert same(weights(worker), start) and worker.engine.scaler.get_scale() == 512.0


def test_every_k_steps_and_the_warm_up_go_on_after_a_checkpoint_of_verls(folder, tmp_path):
    optim = {**GR, "gr_every_k_steps": 2, "gr_gamma_warmup_steps": 3}  # gamma is 0 at step 0, 2/3 of the whole at 2
    worker = new_worker(folder, optim=optim)
    assert "gr/g1_norm" not in train(worker, batch_of(rows(1)))
    worker.save_checkpoint(str(tmp_path), None, 1, None)
    resumed = new_worker(folder, optim=optim)
    resumed.load_checkpoint(str(tmp_path))
    for seed, regularised in ((2, False), (3, True), (4, False)):
        metrics = [train(each, batch_of(rows(seed))) for each in (worker, resumed)]
        assert ["gr/g1_norm" in each for each in metrics] == [regularised] * 2
    assert same(weights(resumed), weights(worker))


@pytest.mark.filterwarnings("ignore:epsilon='auto' stops at")
def test_auto_epsilon_is_that_of_a_plain_loop_whatever_the_micro_batches_ranks_and_loss_scale(ranks, folder):
    model, found = Qwen2ForCausalLM.from_pretrained(folder, attn_implementation="eager"), []
    opt = rf.GradientRegularizer(torch.optim.SGD(rf.parameter_groups(model), lr=LR), gamma=1e-3, epsilon="auto",
                                 perturb_max_norm=1e9, max_norm=None)  # fmt: skip
    loss_of(model, enlarged(rows(1))).backward()
    opt.perturb()
    assert 0 < opt.epsilon < 9e-4
    for size, scaler in ((4, None), (1, None), (4, ShardedGradScaler(device="cpu", init_scale=1024.0))):
        worker = new_worker(folder, optim=AUTO, micro_batch_size_per_gpu=size)
        worker.engine.scaler = scaler
        epsilons = [train(worker, batch_of(enlarged(rows(seed))))["gr/epsilon"][0] for seed in (1, 2)]
        found.append((epsilons, weights(worker)))
    _, out = finished(ranks)
    for rank in range(2):
        of_rank = torch.load(out / f"{rank}.pt", weights_only=True)
        found.append((of_rank["epsilons"], of_rank["weights with auto"]))
    for epsilons, ended in found:
        assert epsilons[0] == pytest.approx(opt.epsilon, rel=1e-5) and epsilons[0] == epsilons[1]  # kept for 100 steps
        assert close(ended, found[0][1], 1e-5)


@pytest.mark.filterwarnings("ignore:epsilon='auto' stops at")
def test_auto_epsilon_is_kept_over_steps_without_a_second_pass_and_in_a_checkpoint(folder, tmp_path):
    optim = {**AUTO, "gr_every_k_steps": 2}
    worker = new_worker(folder, optim=optim)
    (first,) = train(worker, batch_of(enlarged(rows(1))))["gr/epsilon"]
    assert "gr/epsilon" not in train(worker, batch_of(enlarged(rows(2))))
    worker.save_checkpoint(str(tmp_path), None, 2, None)
    resumed = new_worker(folder, optim=optim)
    resumed.load_checkpoint(str(tmp_path))
    for each in (worker, resumed):
        assert train(each, batch_of(enlarged(rows(3))))["gr/epsilon"] == [first]
    assert same(weights(resumed), weights(worker))


def test_bfloat16_compute_is_what_the_step_metrics_see(folder):
    worker = new_worker(folder, optim=GR, mixed_precision={"param_dtype": "bf16"})
    with pytest.warns(UserWarning, match="rounding swallows it"):
        metrics = train(worker, batch_of(rows()))
    assert 0.5 < metrics["gr/step_cos"][0] < 0.9 and metrics["gr/frac_moved"][0] < 1


@pytest.mark.parametrize(
    ("optim", "options", "words"),
    [
        ({"gr_gamma": -1.0}, {}, "gr_gamma must be finite and at least 0, got -1.0"),
        ({"gr_gamma": 1e-3, "gr_epsilon": 0.0}, {}, "gr_epsilon must be finite and above 0, got 0.0"),
        ({"gr_gamma": "big"}, {}, "override_optimizer_config.gr_gamma must be a number, got 'big'"),
        ({"gr_every_k_steps": 1.5}, {}, "gr_every_k_steps must be an int, got 1.5"),
        ({"gr_normalized": 1}, {}, "gr_normalized must be a bool, got 1"),
        ({"gr_epsilon": "Auto"}, {}, "gr_epsilon must be a number above 0 or 'auto', got 'Auto'"),
        ({"gr_epsilon": True}, {}, "override_optimizer_config.gr_epsilon must be a number, got True"),
        ({"gr_rounding": "up"}, {}, "gr_rounding must be one of 'stochastic', 'nearest'; got 'up'"),
        ({"gr_optimizer": None}, {}, "override_optimizer_config.gr_optimizer is not an option"),
        ({"gr_gama": 1e-3}, {}, "override_optimizer_config.gr_gama is not an option; did you mean gr_gamma?"),
        (GR, {"strategy": "fsdp"}, "gr_gamma=0.03 needs FSDP2, got strategy=fsdp,.*actor.strategy=fsdp2"),
        (GR, {"qat": QATEngineConfig(enable=True)}, "gr_gamma=0.03 does not work with qat.enable=True"),
    ],
)
def test_settings_that_do_not_work_are_named(folder, optim, options, words):
    with pytest.raises((ValueError, TypeError), match=words):
        new_worker(folder, optim=optim, **options)


def test_verls_command_line_reaches_the_engine():
    overrides = [
        "actor_rollout_ref.actor.strategy=fsdp2",
        "+actor_rollout_ref.actor.optim.override_optimizer_config.gr_gamma=1e-3",
        "+actor_rollout_ref.actor.optim.override_optimizer_config.foreach=false",
    ]
    with initialize_config_dir(os.path.dirname(verl_engine.verl.__file__) + "/trainer/config", version_base=None):
        config = compose("ppo_trainer", overrides=overrides).actor_rollout_ref.actor
    for optim in (config.optim, omega_conf_to_dataclass(config.optim)):  # on the driver and in a worker
        gr, others = verl_engine.read_gr(optim.override_optimizer_config)
        assert gr.gamma == 1e-3 and others == {"foreach": False}
    assert verl_engine.read_gr(None) == (None, {})


def test_registering_is_idempotent_and_goes_back_to_what_was_there(monkeypatch):
    verl_engine.unregister()
    verl_head.unregister()
    engines, choose = copy.deepcopy(EngineRegistry._engines), monkey_patch.patch_forward_with_backends
    assert choose.__module__ == monkey_patch.__name__
    for _ in range(2):
        verl_engine.register()
        verl_head.register()
    assert EngineRegistry.get_engine_cls("language_model", "fsdp2") is verl_engine.ReditFSDPEngine
    assert EngineRegistry.get_engine_cls("language_model", "fsdp_turbo") is FSDPTurboEngineWithLMHead
    assert EngineRegistry._engines["value_model"] == engines["value_model"]
    verl_engine.unregister()
    verl_head.unregister()
    assert EngineRegistry._engines == engines and monkey_patch.patch_forward_with_backends is choose
    monkeypatch.setattr(FSDPEngineWithLMHead, "optimizer_step", lambda self, closure: None)
    monkeypatch.setattr(monkey_patch, "patch_forward_with_backends", lambda model: None)
    for module, name in ((verl_engine, "optimizer_step"), (verl_head, "patch_forward_with_backends")):
        with pytest.raises(RuntimeError, match=rf"verl 0.9.1, whose .*{name} is not \(.*\); supported: 0.9.1"):
            module.register()
    monkeypatch.undo()
    verl_engine.register()
    verl_head.register()


def test_verls_version_is_judged(monkeypatch):
    assert f"supported: {verl_loss.SUPPORTED}" in inspect.getsource(ours)
    monkeypatch.setattr(verl, "__version__", "0.8.0")
    for module in (verl_engine, verl_loss, verl_config, verl_advantages):
        with pytest.raises(RuntimeError, match="integrations.verl got verl 0.8.0, which is older than it supports; "):
            module.register()
    monkeypatch.setattr(verl, "__version__", "0.99.0")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        ours.register()
        ours.register()
    assert [str(w.message) for w in caught if "redit_fast" in str(w.message)] == [
        "redit_fast.integrations.verl got verl 0.99.0, which is newer than what it was tested with; supported: 0.9.1"
    ]


def finished(ranks):
    process, out = ranks
    if process.returncode is None:
        output = process.communicate(timeout=120)[0].decode()
        assert process.returncode == 0, output
    return ranks


def test_two_ranks_with_our_head_take_the_step_of_one(ranks, hand_written):
    _, out = finished(ranks)
    first, second = (torch.load(out / f"{rank}.pt", weights_only=True) for rank in range(2))
    assert same(first["weights"], second["weights"]) and close(first["weights"], hand_written[0])
    assert first["norms"] == second["norms"] and first["norms"] == pytest.approx(hand_written[1], rel=1e-5)
    assert first["g1_norm"] == second["g1_norm"]
