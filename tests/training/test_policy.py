"""The passes of a step: the log-probs of rollouts, micro-batches, samples without a gradient, the head."""

from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoTokenizer

import redit_fast as rf
from redit_fast.ops import chunks as head
from redit_fast.training import builtin, config, policy
from redit_fast.training.rollout.local import generate


def test_rollout_log_probs_are_those_that_the_loss_sees(model_folder):
    """What sampling drew from and what the loss scores are one distribution: padding, positions and cache agree."""
    model, tokenizer = policy.load(Path(model_folder))
    prompts = tokenizer([record["prompt"] for record in builtin.records(5, held_out=False, seed=3)])["input_ids"]
    rollout = generate(model, 0, prompts, group_size=2, max_new_tokens=9, seed=1)
    run = config.TrainConfig(model="m", data="d", rewards=["exact_answer"], group_size=2, steps=1)
    batch = policy.Batch.of(prompts, rollout, torch.ones(10), rf.LossConfig(), run, 0)
    model.config.attention_dropout = 0.0
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.0
    logp = batch.backward(model).logp
    for i, part in enumerate(logp.split(batch.lengths)):
        ids = torch.tensor(prompts[i // 2] + rollout.completions[i])[None]
        with torch.no_grad():
            expected = torch.log_softmax(model(ids).logits[0, :-1].float(), -1).gather(1, ids[0, 1:, None])[:, 0]
        torch.testing.assert_close(part, expected[-len(part) :], rtol=0, atol=1e-4)


@pytest.mark.parametrize("loss_type", ["dapo", "grpo", "dr_grpo", "luspo"])
def test_micro_batches_give_the_same_gradient(model_folder, loss_type):
    gradients, settings = [], rf.LossConfig(loss_type, max_completion_length=9)
    for micro in (None, 3):
        model, tokenizer = policy.load(Path(model_folder))
        model.config.attention_dropout = 0.0
        for layer in model.model.layers:
            layer.self_attn.attention_dropout = 0.0
        prompts = tokenizer([record["prompt"] for record in builtin.records(4, held_out=False, seed=3)])["input_ids"]
        rollout = generate(model, 0, prompts, group_size=2, max_new_tokens=9, seed=1)
        run = config.TrainConfig(model="m", data="d", rewards=["exact_answer"], group_size=2, micro_batch_size=micro)
        batch = policy.Batch.of(prompts, rollout, torch.linspace(0, 1, 8), settings, run, 0)
        done = batch.backward(model)
        ends = torch.tensor([0, *batch.lengths]).cumsum(0)
        whole = rf.policy_loss(done.logp, batch.advantages, cu_seqlens=ends, config=settings)
        assert done.loss == pytest.approx(whole.loss.item(), rel=1e-5)
        gradients.append((done.loss, torch.cat([p.grad.flatten() for p in model.parameters()])))
    assert gradients[0][0] == pytest.approx(gradients[1][0], rel=1e-5)
    torch.testing.assert_close(gradients[0][1], gradients[1][1], rtol=1e-4, atol=1e-6)


def batch_of(model_folder, advantages, settings, dropout=0.0, **options):
    """A loaded model, and a step's batch of rollouts with these advantages."""
    model, tokenizer = policy.load(Path(model_folder))
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = dropout
    prompts = tokenizer([record["prompt"] for record in builtin.records(4, held_out=False, seed=3)])["input_ids"]
    rollout = generate(model, 0, prompts, group_size=len(advantages) // 4, max_new_tokens=9, seed=1)
    run = config.TrainConfig(model="m", data="d", rewards=["exact_answer"], group_size=len(advantages) // 4, **options)
    return model, policy.Batch.of(prompts, rollout, torch.tensor(advantages), settings, run, 0)


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


@pytest.mark.parametrize("micro", [None, 3])
@pytest.mark.parametrize("loss_type", ["dapo", "grpo", "gspo", "dro"])
def test_samples_with_an_advantage_of_0_run_without_a_graph(model_folder, hidden_rows, loss_type, micro, monkeypatch):
    settings = rf.LossConfig(loss_type, dro_beta=0.5 if loss_type == "dro" else None)
    passes = []
    for silent in (settings.silent_at_zero, False):
        monkeypatch.setattr(rf.LossConfig, "silent_at_zero", silent)
        model, batch = batch_of(model_folder, MIXED, settings, micro_batch_size=micro)
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
    model, batch = batch_of(model_folder, MIXED, rf.LossConfig(), dropout=0.3, micro_batch_size=3)
    first, second = batch.backward(model), batch.backward(model)
    assert torch.equal(first.logp, second.logp)
    assert second.metrics["ratio/max_abs_dev"] == batch.backward(model, first.logp).metrics["ratio/max_abs_dev"] == 0


def test_a_step_of_zero_advantages_has_zero_gradients(model_folder, hidden_rows):
    """Not None, which the optimizer would refuse."""
    model, batch = batch_of(model_folder, [0.0] * 8, rf.LossConfig())
    batch.backward(model)
    assert hidden_rows == [(sum(batch.lengths), True)] and (gradient(model) == 0).all()


class Elements(TorchDispatchMode):
    """The elements of every tensor that an operation gives."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.seen |= {tensor.numel() for tensor in tree_leaves(out) if isinstance(tensor, torch.Tensor)}
        return out


@pytest.mark.parametrize("loss_type", ["dapo", "gspo"])
@pytest.mark.parametrize("micro", [None, 8])
def test_no_tensor_as_large_as_the_logits_exists_in_a_training_step(monkeypatch, loss_type, micro):
    """On the built-in task, its vocabulary widened and the chunk narrowed so that nothing else comes near."""
    model, tokenizer = builtin.build(0)
    model.resize_token_embeddings(8191)
    monkeypatch.setattr(head, "CHUNK_BYTES", 32 * 8191 * 4)
    prompts = tokenizer([record["prompt"] for record in builtin.records(2, held_out=False, seed=3)])["input_ids"]
    rollout = generate(model, 0, prompts, group_size=8, max_new_tokens=20, seed=1)
    run = config.TrainConfig(group_size=8, micro_batch_size=micro)
    batch = policy.Batch.of(prompts, rollout, torch.linspace(-1, 1, 16), rf.LossConfig(loss_type), run, 0)
    with Elements() as recorder:
        first = batch.backward(model)
        batch.backward(model, first.logp)
    rows = min(sum(batch.lengths[start : start + 8]) for start in (0, 8))  # of the smallest micro-batch
    assert rows > 96  # so that the logits are larger than the weight
    assert 32 * 8191 in recorder.seen and max(recorder.seen) <= 96 * 8191 < rows * 8191
    for n in range(16):
        assert (rows + n) * 8191 not in recorder.seen


class AdaptedHead(torch.nn.Module):
    """As peft wraps a layer: what it shows as `weight` is not all of it."""

    def __init__(self, base_layer):
        super().__init__()
        self.base_layer = base_layer
        self.lora_A, self.lora_B = torch.nn.Linear(96, 2, bias=False), torch.nn.Linear(2, 1, bias=False)
        torch.nn.init.zeros_(self.lora_B.weight)

    weight = property(lambda self: self.base_layer.weight)
    bias = property(lambda self: self.base_layer.bias)

    def forward(self, hidden):
        return self.base_layer(hidden) + self.lora_B(self.lora_A(hidden))


def test_an_adapter_on_the_head_is_refused_before_training(model_folder):
    """A fresh adapter changes no log-prob, so that only its type tells."""
    model, batch = batch_of(model_folder, MIXED, rf.LossConfig())
    policy.check_head(model, AutoTokenizer.from_pretrained(model_folder), rf.LossConfig())
    model.set_output_embeddings(AdaptedHead(model.lm_head))
    with pytest.raises(ValueError, match=r"AdaptedHead.*merge_and_unload.*target_modules"):
        policy.check_head(model, AutoTokenizer.from_pretrained(model_folder), rf.LossConfig())
    with pytest.raises(ValueError, match="AdaptedHead"):
        batch.backward(model)


@pytest.mark.parametrize(
    ("own", "of_the_config", "tokenizers", "ends"),
    [
        (3, 5, "<think>", {3, 409}),  # a base model's end of text, and the tokenizer's end of turn
        ([3, 4], None, "<think>", {3, 4, 409}),
        (None, 5, "<think>", {5, 409}),
        (None, [5, 6], None, {5, 6}),
        ([], None, "<think>", {409}),
        (412, 5, None, {412}),
        (413, 5, None, r"its generation_config.json says that eos_token_id is \[413\], needs token numbers below 413"),
        ([3, -1], 5, None, r"generation_config.json says that eos_token_id is \[3, -1\]"),
        ([3, [4]], 5, None, r"generation_config.json says that eos_token_id is \[3, \[4\]\]"),
        ([True], 5, None, r"generation_config.json says that eos_token_id is \[True\]"),
        (2.5, 5, None, r"its generation_config.json says that eos_token_id is \[2.5\]"),
        ({"a": 1}, 5, None, r"its generation_config.json says that eos_token_id is \[{'a': 1}\]"),
        (None, 99999, None, r"its config.json says that eos_token_id is \[99999\]"),
        (3, None, "<beyond>", r"its tokenizer says that eos_token_id is \[413\]"),
        (None, None, None, "has no end-of-sequence token"),
    ],
)
def test_a_completion_ends_at_the_models_and_the_tokenizers_end_tokens(own, of_the_config, tokenizers, ends):
    model, tokenizer = builtin.build(0)
    tokenizer.add_special_tokens({"extra_special_tokens": ["<beyond>"]})
    model.generation_config.eos_token_id, model.config.eos_token_id = own, of_the_config
    tokenizer.eos_token = tokenizers
    if isinstance(ends, str):
        with pytest.raises(ValueError, match=ends):
            policy.end_tokens(model, tokenizer)
    else:
        assert policy.end_tokens(model, tokenizer) == sorted(ends)
