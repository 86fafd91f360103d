"""`apply_to` and TRL's SFTTrainer, which calls a forward of its own with fused_lm_head=True, in both orders."""

import copy
import tempfile

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import Qwen2Config, Qwen2ForCausalLM
from trl import SFTConfig, SFTTrainer
from trl.trainer import utils

import redit_fast as rf
from redit_fast.integrations import trl_function
from redit_fast.training import builtin

METRICS = ("loss", "entropy", "mean_token_accuracy", "grad_norm")
START = {}


@pytest.fixture
def count(monkeypatch):
    """The rows that our head is called for."""
    calls, linear_logp = [], trl_function.linear_logp

    def counted(hidden, *args, **options):
        calls.append(len(hidden))
        return linear_logp(hidden, *args, **options)

    monkeypatch.setattr(trl_function, "linear_logp", counted)
    return calls


def a_model():
    """One that has learnt something, so that some targets are the likeliest token."""
    torch.manual_seed(5)
    model = Qwen2ForCausalLM(
        Qwen2Config(vocab_size=len(builtin.build(0)[1]), hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                    num_attention_heads=2, num_key_value_heads=2, initializer_range=0.3, eos_token_id=1)
    )  # fmt: skip
    if not START:
        twin = copy.deepcopy(model)  # TRL's forward, which stays on a model, computes from the model it was put on
        trainer(twin, tempfile.mkdtemp(), steps=12, rate=1e-2).train()
        START.update(twin.state_dict())
    model.load_state_dict(START)
    return model


def trainer(model, folder, steps=3, rate=1e-3, **options):
    _, tokenizer = builtin.build(0)
    pairs = builtin.demonstrations(24, short=0.0, seed=0)
    rows = [{"input_ids": tokenizer(prompt + completion).input_ids} for prompt, completion in pairs]
    args = SFTConfig(folder, per_device_train_batch_size=4, max_steps=steps, learning_rate=rate, logging_steps=1,
                     report_to="none", save_strategy="no", use_cpu=True, bf16=False, gradient_checkpointing=False,
                     disable_tqdm=True, max_length=48)  # fmt: skip
    rows = Dataset.from_list(rows)
    held_out = rows.select(range(6))
    return SFTTrainer(model, args, train_dataset=rows, eval_dataset=held_out, processing_class=tokenizer, **options)


def logged(trainer):
    return [[entry[name] for name in METRICS] for entry in trainer.state.log_history if "loss" in entry]


def adapter():
    return LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=True)


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("order", ["trainer first", "apply_to first"])
def test_in_both_orders_every_step_is_our_heads_and_its_numbers_are_trls(order, lora, count, tmp_path):
    theirs, forward = getattr(utils, trl_function.NAME), utils.add_fused_lm_head
    options = {"peft_config": adapter()} if lora else {}
    expected = trainer(a_model(), tmp_path, **options)
    expected.train()
    assert count == [] and 0.1 < logged(expected)[-1][2] < 0.99
    model = a_model()
    if order == "trainer first":
        ours = trainer(model, tmp_path, **options)
        with rf.apply_to(ours.model):
            ours.train()
    else:
        with rf.apply_to(model):
            ours = trainer(model, tmp_path, **options)
            ours.train()
    assert len(count) == 3 and getattr(utils, trl_function.NAME) is theirs and utils.add_fused_lm_head is forward
    assert torch.tensor(logged(ours)) == pytest.approx(torch.tensor(logged(expected)).numpy(), rel=1e-4, abs=2e-5)
    losses = [[numbers[0] for numbers in logged(of)] for of in (ours, expected)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-4)  # four decimals are logged
    for a, b in zip(ours.model.parameters(), expected.model.parameters(), strict=True):
        assert torch.allclose(a, b, rtol=1e-4, atol=2e-5)
    ours.train()  # outside the block TRL's head is back
    assert len(count) == 3


@pytest.mark.parametrize("order", ["trainer first", "apply_to first"])
def test_one_call_has_trls_outputs_and_gradients(order, count, tmp_path):
    ids = torch.randint(3, 20, (3, 11))
    labels = ids.clone()
    labels[0, :5] = -100

    def one(model):
        model.zero_grad()
        output = model(ids, labels=labels, fused_lm_head=True, num_items_in_batch=17)
        (output.loss + 0.1 * output.entropy.sum()).backward()
        return output, [p.grad.clone() for p in model.parameters()]

    model = a_model()
    expected, gradients = one(trainer(a_model(), tmp_path).model)
    if order == "trainer first":
        trainer(model, tmp_path)
        rf.apply_to(model)
    else:
        rf.apply_to(model)
        trainer(model, tmp_path)
    for _ in range(2):
        output, found = one(model)
        for name in ("loss", "log_probs", "entropy"):
            assert torch.allclose(output[name], expected[name], rtol=1e-5, atol=1e-5), name
        assert torch.equal(output.is_top1, expected.is_top1) and 0 < output.is_top1.sum() < output.label_mask.sum()
        for a, b in zip(found, gradients, strict=True):
            assert torch.allclose(a, b, rtol=1e-4, atol=1e-5)
    assert len(count) == 2
    plain = model.train()(ids, labels=labels)
    assert plain.logits is None and model.eval()(ids, labels=labels).logits is not None


def test_evaluation_has_trls_loss_and_predictions(count, tmp_path):
    predictions = []

    def metrics(found):
        predictions.append(found.predictions)
        return {}

    ours = trainer(a_model(), tmp_path, compute_metrics=metrics)
    expected = ours.evaluate()
    with rf.apply_to(ours.model):
        found = ours.evaluate()
    assert len(count) >= 1 and found["eval_loss"] == pytest.approx(expected["eval_loss"], rel=1e-5)
    for name in ("eval_mean_token_accuracy", "eval_entropy"):
        assert found[name] == pytest.approx(expected[name], rel=1e-5)
    assert predictions[0].shape == predictions[1].shape and abs(predictions[0] - predictions[1]).max() < 1e-5


def test_a_head_of_another_contract_is_refused_by_name(monkeypatch, tmp_path):
    ids = torch.randint(3, 20, (2, 6))
    model = a_model()
    trainer(model, tmp_path)
    monkeypatch.setattr(utils, trl_function.NAME, type("Other", (), {"forward": lambda ctx, hidden: None}))
    with rf.apply_to(model), pytest.raises(RuntimeError, match=r"got trl .*_ChunkedLogProbFunction is not \(ctx"):
        model(ids, labels=ids, fused_lm_head=True)


@pytest.mark.parametrize("entropy", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_top1_is_trls_whatever_the_spread(entropy, masked):
    torch.manual_seed(0)
    theirs = getattr(utils, trl_function.NAME)
    outputs = ("log_probs", "entropy", "is_top1") if entropy else ("log_probs", "is_top1")
    for spread in (0.0, 0.05, 0.3, 1.0, 5.0):
        hidden, weight = torch.randn(64, 16), spread * torch.randn(40, 16)
        targets = torch.where(torch.rand(64) < 0.5, (hidden @ weight.T).argmax(-1), torch.randint(40, (64,)))
        scored = torch.rand(64) < 0.7 if masked else torch.ones(64, dtype=torch.bool)
        arguments = hidden, weight, None, targets, 1.0, 32768, None, 1.0, outputs
        expected = theirs.apply(*arguments)[4]
        found = trl_function.LinearLogpFunction(theirs, "grad", scored).apply(*arguments)[4]
        assert torch.equal(found[scored], expected[scored]) and 0 < expected.sum() < 64 or spread == 0
