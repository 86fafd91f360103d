"""The passes of a step, packed and padded: the log-probs of rollouts, micro-batches, samples without a gradient."""

import dataclasses
from pathlib import Path

import pytest
import torch

import redit_fast as rf
from redit_fast.ops import chunks as head
from redit_fast.training import builtin, config, policy
from redit_fast.training.batch import Batch
from redit_fast.training.metrics import sampling_metrics
from redit_fast.training.rollout import Rollout
from redit_fast.training.rollout.local import generate
from tests.counting import Recorder

both = pytest.mark.parametrize("packed", [True, False], ids=["packed", "padded"])


@both
def test_rollout_log_probs_are_those_that_the_loss_sees(model_folder, packed):
    """What sampling drew from and what the loss scores are one distribution: padding, positions and cache agree."""
    model, tokenizer = policy.load(Path(model_folder))
    prompts = tokenizer([record["prompt"] for record in builtin.records(5, held_out=False, seed=3)])["input_ids"]
    rollout = generate(model, 0, prompts, group_size=2, max_new_tokens=9, seed=1)
    run = config.TrainConfig(model="m", data="d", rewards=["exact_answer"], group_size=2, steps=1)
    batch = Batch.of(prompts, rollout, torch.ones(10), rf.LossConfig(), run, 0, packed=packed)
    logp = batch.backward(model).logp
    for i, part in enumerate(logp.split(batch.lengths)):
        ids = torch.tensor(prompts[i // 2] + rollout.completions[i])[None]
        with torch.no_grad():
            expected = torch.log_softmax(model(ids).logits[0, :-1].float(), -1).gather(1, ids[0, 1:, None])[:, 0]
        torch.testing.assert_close(part, expected[-len(part) :], rtol=0, atol=1e-4)


@both
@pytest.mark.parametrize("loss_type", ["dapo", "grpo", "dr_grpo", "luspo"])
def test_micro_batches_give_the_same_gradient(model_folder, loss_type, packed):
    gradients, settings = [], rf.LossConfig(loss_type, max_completion_length=9)
    for limit in ({}, {"micro_batch_size": 3}, {"tokens_per_micro_batch": 100}):
        model, tokenizer = policy.load(Path(model_folder))
        prompts = tokenizer([record["prompt"] for record in builtin.records(4, held_out=False, seed=3)])["input_ids"]
        rollout = generate(model, 0, prompts, group_size=2, max_new_tokens=9, seed=1)
        run = config.TrainConfig(model="m", data="d", rewards=["exact_answer"], group_size=2, **limit)
        batch = Batch.of(prompts, rollout, torch.linspace(0, 1, 8), settings, run, 0, packed=packed)
        done = batch.backward(model)
        assert len(batch.micro_batches) > 1 or not limit
        ends = torch.tensor([0, *batch.lengths]).cumsum(0)
        whole = rf.policy_loss(done.logp, batch.advantages, cu_seqlens=ends, config=settings)
        assert done.loss == pytest.approx(whole.loss.item(), rel=1e-5)
        gradients.append((done.loss, torch.cat([p.grad.flatten() for p in model.parameters()])))
    for loss, found in gradients[1:]:
        assert loss == pytest.approx(gradients[0][0], rel=1e-5)
        torch.testing.assert_close(found, gradients[0][1], rtol=1e-4, atol=1e-6)


def batch_of(model_folder, advantages, settings, packed=True, **options):
    """A loaded model, and a step's batch of rollouts with these advantages."""
    model, tokenizer = policy.load(Path(model_folder))
    prompts = tokenizer([record["prompt"] for record in builtin.records(4, held_out=False, seed=3)])["input_ids"]
    rollout = generate(model, 0, prompts, group_size=len(advantages) // 4, max_new_tokens=9, seed=1)
    run = config.TrainConfig(model="m", data="d", rewards=["exact_answer"], group_size=len(advantages) // 4, **options)
    return model, Batch.of(prompts, rollout, torch.tensor(advantages), settings, run, 0, packed=packed)


def gradient(model):
    return torch.cat([p.grad.flatten() for p in model.parameters()])


MIXED = [0.0, 1.0, -0.5, 0.0, 0.0, 2.0, -1.0, 0.0]


@pytest.fixture
def hidden_rows(monkeypatch):
    """(rows, whether they have a graph) of every call of the loss."""
    calls, loss = [], rf.linear_grpo_loss

    def recorded(hidden, *args, **options):
        calls.append((len(hidden), hidden.requires_grad))
        return loss(hidden, *args, **options)

    monkeypatch.setattr(rf, "linear_grpo_loss", recorded)
    return calls


@both
@pytest.mark.parametrize("micro", [None, 3])
@pytest.mark.parametrize("loss_type", ["dapo", "grpo", "gspo", "dro"])
def test_samples_with_an_advantage_of_0_run_without_a_graph(
    model_folder, hidden_rows, loss_type, micro, packed, monkeypatch
):
    settings = rf.LossConfig(loss_type, dro_beta=0.5 if loss_type == "dro" else None)
    passes = []
    for silent in (settings.silent_at_zero, False):
        monkeypatch.setattr(rf.LossConfig, "silent_at_zero", silent)
        model, batch = batch_of(model_folder, MIXED, settings, packed, micro_batch_size=micro)
        hidden_rows.clear()
        done = batch.backward(model)
        passes.append((done, gradient(model), list(hidden_rows)))
    (ours, grad, calls), (all_with_graph, expected, _) = passes
    rows = {graph: sum(count for count, has_graph in calls if has_graph == graph) for graph in (True, False)}
    zero = sum(length for length, a in zip(batch.lengths, MIXED, strict=True) if a == 0)
    assert rows == ({True: sum(batch.lengths), False: 0} if loss_type == "dro"
                    else {True: sum(batch.lengths) - zero, False: zero})  # fmt: skip
    assert (grad - expected).norm() < 1e-6 * expected.norm() > 0
    assert ours.loss == pytest.approx(all_with_graph.loss, rel=1e-6)
    torch.testing.assert_close(ours.logp, all_with_graph.logp, rtol=0, atol=1e-5)  # each in its sample's place
    assert ours.metrics == pytest.approx(all_with_graph.metrics, rel=1e-5)
    if settings.route == "fused":
        assert ours.metrics["head/frac_rows_skipped"] == pytest.approx(zero / sum(batch.lengths))


def test_both_passes_drop_the_same_with_and_without_a_graph(model_folder):
    model, batch = batch_of(model_folder, MIXED, rf.LossConfig(), packed=False, micro_batch_size=3)
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.3
    first, again = batch.backward(model), batch.backward(model)
    assert torch.equal(first.logp, again.logp)
    assert again.metrics["ratio/max_abs_dev"] == batch.backward(model, first.logp).metrics["ratio/max_abs_dev"] == 0
    second = batch.backward(model, masks_of=first).logp
    assert torch.equal(second[second == second], first.logp[second == second])


@both
def test_a_second_pass_leaves_out_the_samples_without_a_gradient(model_folder, hidden_rows, packed):
    """Its gradient is the same. A hook on the decoder counts the tokens that the passes tell."""
    model, batch = batch_of(model_folder, MIXED, rf.LossConfig("grpo"), packed, tokens_per_micro_batch=150)
    counts = []
    model.get_decoder().register_forward_pre_hook(lambda _, inputs: counts.append(inputs[0].numel()))
    first = batch.backward(model)
    assert first.tokens == sum(counts) and set(first.metrics) > {"entropy", "ratio/mean"}
    expected = gradient(model)
    model.zero_grad()
    counts.clear()
    hidden_rows.clear()
    second = batch.backward(model, first.logp, masks_of=first)
    assert (gradient(model) - expected).norm() < 1e-6 * expected.norm()
    assert second.tokens == sum(counts) < 0.6 * first.tokens and second.metrics == {}
    left_out = torch.cat([torch.full((n,), a == 0) for n, a in zip(batch.lengths, MIXED)])
    assert sum(rows for rows, _ in hidden_rows) == (~left_out).sum() and torch.equal(second.logp.isnan(), left_out)
    assert second.loss == pytest.approx(first.loss, rel=1e-5)


@both
@pytest.mark.parametrize("loss_type", ["dapo", "grpo", "dr_grpo", "luspo", "gspo"])
def test_a_masked_completion_is_a_sequence_without_tokens(model_folder, loss_type, packed):
    """Loss, gradient and metrics are policy_loss's with a mask. It is not computed."""
    settings = rf.LossConfig(loss_type, max_completion_length=9)
    model, batch = batch_of(model_folder, MIXED, settings, packed)
    mask = torch.cat([torch.full((n,), i not in (1, 4)) for i, n in enumerate(batch.lengths)])
    logps = []
    for tokens, length in zip(batch.sequences, batch.lengths):
        logp = torch.log_softmax(model(tokens[None]).logits[0, :-1], -1).gather(1, tokens[1:, None])[:, 0]
        logps.append(logp[-length:])
    ends = torch.tensor([0, *batch.lengths]).cumsum(0)
    whole = rf.policy_loss(torch.cat(logps), batch.advantages, cu_seqlens=ends, mask=mask, config=settings)
    whole.loss.backward()
    expected = gradient(model)
    model.zero_grad()
    tokens = batch.backward(model).tokens
    model.zero_grad()
    masked = dataclasses.replace(batch, masked=frozenset((1, 4)))
    done = masked.backward(model)
    assert done.loss == pytest.approx(whole.loss.item(), rel=1e-4, abs=1e-6)
    assert (gradient(model) - expected).norm() < 1e-5 * expected.norm()
    assert torch.equal(done.logp.isnan(), ~mask) and done.tokens < tokens
    for name, value in whole.metrics.items():
        assert done.metrics[name] == pytest.approx(value.item(), rel=1e-4, abs=1e-6), name
    model.zero_grad()
    nothing = dataclasses.replace(batch, masked=frozenset(range(8)))
    for options in ({}, {"masks_of": nothing.backward(model)}):
        done = nothing.backward(model, **options)
        assert done.loss == done.tokens == 0 and (gradient(model) == 0).all()


@both
@pytest.mark.parametrize(
    ("loss_type", "correction"), [("dapo", "token_truncate"), ("grpo", "token_mask"), ("dapo", "sequence_truncate")]
)
def test_a_correction_is_policy_losses_own(model_folder, loss_type, correction, packed):
    """Every token has its own sampler's log-prob, in several micro-batches, with masked samples and old log-probs."""
    settings = rf.LossConfig(loss_type, correction=correction, correction_cap=1.2, correction_floor=0.7)
    model, batch = batch_of(model_folder, MIXED, settings, packed, micro_batch_size=3)
    masked = dataclasses.replace(batch, masked=frozenset((1, 4)))
    logps = []
    for tokens, length in zip(batch.sequences, batch.lengths):
        logp = torch.log_softmax(model(tokens[None]).logits[0, :-1], -1).gather(1, tokens[1:, None])[:, 0]
        logps.append(logp[-length:])
    torch.testing.assert_close(batch.sampling_logp, torch.cat(logps).detach(), rtol=0, atol=1e-5)  # generate's own
    generator = torch.Generator().manual_seed(0)
    old, sampling = (
        torch.cat(logps).detach() + 0.4 * torch.randn(sum(batch.lengths), generator=generator) for _ in "ab"
    )
    kept = torch.cat([torch.full((n,), i not in (1, 4)) for i, n in enumerate(batch.lengths)])
    ends = torch.tensor([0, *batch.lengths]).cumsum(0)
    whole = rf.policy_loss(
        torch.cat(logps), batch.advantages, old_logp=old, sampling_logp=sampling, cu_seqlens=ends, mask=kept,
        config=settings,
    )  # fmt: skip
    whole.loss.backward()
    expected = gradient(model)
    model.zero_grad()
    done = dataclasses.replace(masked, sampling_logp=sampling).backward(model, old)
    assert (gradient(model) - expected).norm() < 1e-4 * expected.norm() > 0
    assert done.loss == pytest.approx(whole.loss.item(), rel=1e-3)
    off = dataclasses.replace(masked, settings=rf.LossConfig(loss_type), sampling_logp=sampling)
    model.zero_grad()
    off.backward(model, old)
    assert (gradient(model) - expected).norm() > 0.01 * expected.norm()
    found = sampling_metrics(dataclasses.replace(masked, sampling_logp=sampling), done, None)
    gap = (torch.cat(logps).detach() - sampling)[kept].abs()
    assert found["sampling/sampling_logp_difference/mean"] == pytest.approx(gap.mean().item(), rel=1e-4)
    assert found["sampling/sampling_logp_difference/max"] == pytest.approx(gap.max().item(), rel=1e-4)
    assert 0.2 < found["sampling/frac_corrected"] < 0.9


def test_completions_that_are_cut_off_are_masked_where_overlong_says_so():
    rollout = Rollout([[5], [6, 7], [8], [9]], [True, False, True, False])
    for overlong, masked in (("keep", frozenset()), ("mask", frozenset((1, 3)))):
        run = config.TrainConfig(model="m", data="d", rewards=["exact_answer"], group_size=2, overlong=overlong)
        batch = Batch.of([[1], [2]], rollout, torch.ones(4), rf.LossConfig(), run, 0, packed=True)
        assert batch.masked == masked and batch.useful_tokens == sum(
            len(c) for i, c in enumerate(rollout.completions) if i not in masked
        )


def test_the_rows_attention_is_taken_back_after_a_pass_and_after_an_exception(model_folder, monkeypatch):
    model, batch = batch_of(model_folder, MIXED, rf.LossConfig())
    before = model.config._attn_implementation
    seen = []
    model.get_decoder().register_forward_pre_hook(lambda *_: seen.append(model.config._attn_implementation))
    batch.backward(model)
    batch.score_reference(model)
    assert set(seen) == {"redit_fast"} and model.config._attn_implementation == before

    def fails(*_, **__):
        raise ArithmeticError

    monkeypatch.setattr(rf, "linear_grpo_loss", fails)
    with pytest.raises(ArithmeticError):
        batch.backward(model)
    assert model.config._attn_implementation == before and before != "redit_fast"


def test_a_step_of_zero_advantages_has_zero_gradients(model_folder, hidden_rows):
    """Not None, which the optimizer would refuse."""
    model, batch = batch_of(model_folder, [0.0] * 8, rf.LossConfig())
    batch.backward(model)
    assert hidden_rows == [(sum(batch.lengths), True)] and (gradient(model) == 0).all()


@both
@pytest.mark.parametrize("loss_type", ["dapo", "gspo"])
@pytest.mark.parametrize("micro", [None, 8])
def test_no_tensor_as_large_as_the_logits_exists_in_a_training_step(monkeypatch, loss_type, micro, packed):
    """On the built-in task, its vocabulary widened and the chunk narrowed so that nothing else comes near."""
    model, tokenizer = builtin.build(0)
    model.resize_token_embeddings(8191)
    monkeypatch.setattr(head, "CHUNK_BYTES", 32 * 8191 * 4)
    prompts = tokenizer([record["prompt"] for record in builtin.records(2, held_out=False, seed=3)])["input_ids"]
    rollout = generate(model, 0, prompts, group_size=8, max_new_tokens=20, seed=1)
    run = config.TrainConfig(group_size=8, micro_batch_size=micro)
    batch = Batch.of(prompts, rollout, torch.linspace(-1, 1, 16), rf.LossConfig(loss_type), run, 0, packed=packed)
    with Recorder() as recorder:
        first = batch.backward(model)
        batch.backward(model, first.logp)
    rows = min(sum(batch.lengths[i] for i in part.samples) for part, _ in batch.micro_batches)
    assert rows > 96  # so that the logits are larger than the weight
    assert 32 * 8191 in recorder.sizes and max(recorder.sizes) <= 96 * 8191 < rows * 8191
    for n in range(16):
        assert (rows + n) * 8191 not in recorder.sizes
