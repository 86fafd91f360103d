"""`apply_to` trains the model's own objective or refuses: architectures, what they add to the loss, and evaluation."""

import copy

import pytest
import torch
from torch import nn
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    Qwen2Config,
    Qwen2ForCausalLM,
    Trainer,
    TrainingArguments,
    WhisperConfig,
    WhisperForCausalLM,
)
from transformers.loss.loss_utils import ForCausalLMLoss

import redit_fast as rf
from tests.integrations.test_apply import MODELS, SIZES, a_batch, run
from tests.tolerance import relative

EXPERTS = {"num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24,
           "shared_expert_intermediate_size": 24, "decoder_sparse_step": 1}  # fmt: skip
LATENT = {"num_key_value_heads": 2, "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24,
          "n_group": 2, "topk_group": 1, "q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "v_head_dim": 4,
          "qk_nope_head_dim": 4, "first_k_dense_replace": 1}  # fmt: skip
ARCHITECTURES = {
    "llama": {}, "mistral": {}, "qwen3": {"head_dim": 8}, "gemma": {"head_dim": 8}, "gemma3_text": {"head_dim": 8},
    "phi": {"num_key_value_heads": 2}, "olmo2": {}, "glm4": {"head_dim": 8}, "nemotron": {}, "gpt_neox": {},
    "mamba": {},
    "gpt2": {"n_embd": 16, "n_layer": 2, "n_head": 2, "bos_token_id": None, "eos_token_id": None},
    "opt": {"ffn_dim": 24, "word_embed_proj_dim": 16, "init_std": 0.2}, "bloom": {"n_head": 2}, "deepseek_v3": LATENT,
    "mixtral": EXPERTS, "qwen2_moe": EXPERTS, "qwen3_moe": EXPERTS | {"head_dim": 8}, "olmoe": EXPERTS,
}  # fmt: skip
ROUTED = ["mixtral", "qwen2_moe", "qwen3_moe", "olmoe"]


def build(name, **more):
    config = CONFIG_MAPPING[name](**SIZES | {"max_position_embeddings": 32} | ARCHITECTURES[name] | more)
    torch.manual_seed(3)
    return MODEL_FOR_CAUSAL_LM_MAPPING[type(config)](config)


def same_as_own(model, **inputs):
    own, gradients = run(model, **inputs)
    with rf.apply_to(model):
        ours, found = run(model, **inputs)
    assert ours.logits is None and type(ours) is type(own)
    assert ours.loss.item() == pytest.approx(own.loss.item(), rel=3e-6)
    for name, gradient in gradients.items():
        assert relative(found[name], gradient) < 2e-5 or gradient.norm() < 1e-6, name
    return own, ours


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_loss_of_an_architecture_is_its_own(name):
    model = build(name).eval()
    ids, labels = a_batch()
    kept = [{}, {"num_items_in_batch": 11}]
    own = [model(ids, labels=labels, **more).loss.item() for more in kept]
    with rf.apply_to(model, eval_logits=False):
        outputs = [model(ids, labels=labels, **more) for more in kept]
    assert [output.logits for output in outputs] == [None, None]
    assert [output.loss.item() for output in outputs] == pytest.approx(own, rel=3e-6)


@pytest.mark.parametrize("by", ["config", "call"])
@pytest.mark.parametrize("name", ROUTED)
def test_the_routers_loss_stays_in_the_loss(name, by):
    switch = {"output_router_logits": True}
    model = build(name, router_aux_loss_coef=0.5, **(switch if by == "config" else {}))
    ids, labels = a_batch()
    inputs = {"input_ids": ids, "labels": labels} | (switch if by == "call" else {})

    def pass_():
        model.zero_grad()
        output = model(**inputs)
        output.loss.backward()
        return output, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    own, gradients = pass_()
    with rf.apply_to(model):
        ours, found = pass_()
    assert own.aux_loss > 0.1 and torch.equal(ours.aux_loss, own.aux_loss) and ours.logits is None
    assert len(ours.router_logits) == len(own.router_logits)
    assert ours.loss.item() == pytest.approx(own.loss.item(), rel=3e-6)
    assert all(relative(found[name], gradient) < 2e-5 for name, gradient in gradients.items())


class Smoothed(Qwen2ForCausalLM):
    def forward(self, input_ids, labels=None, **kwargs):
        output = super().forward(input_ids, labels=labels, **kwargs)
        if labels is not None:
            output.loss = 0.9 * output.loss - 0.1 * output.logits.log_softmax(-1).mean()
        return output


class ZLoss(Qwen2ForCausalLM):
    def forward(self, input_ids, labels=None, **kwargs):
        output = super().forward(input_ids, labels=labels, **kwargs)
        if labels is not None:
            output.loss = output.loss + 1e-6 * output.logits.logsumexp(-1).square().mean()
        return output


class Shifted(Qwen2ForCausalLM):
    """Labels that are the targets already, as the Whisper decoder's."""

    def forward(self, input_ids, labels=None, **kwargs):
        return super().forward(input_ids, labels=labels, shift_labels=labels, **kwargs)


class Inline(Qwen2ForCausalLM):
    def forward(self, input_ids, labels=None, **kwargs):
        output = super().forward(input_ids, **kwargs)
        if labels is not None:
            output.loss = nn.functional.cross_entropy(output.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        return output


class Scaled(Qwen2ForCausalLM):
    def __init__(self, config):
        super().__init__(config)
        self.lm_head.register_forward_hook(lambda module, args, logits: 1.01 * logits)


class Weighted(Qwen2ForCausalLM):
    """A term that is not made from logits."""

    def forward(self, input_ids, labels=None, **kwargs):
        output = super().forward(input_ids, labels=labels, **kwargs)
        if labels is not None:
            output.loss = 0.5 * output.loss + 0.1 * self.lm_head.weight.square().mean()
        return output


# A factor of 1.01 on the logits is within what bfloat16 rounds them by.
@pytest.mark.parametrize(
    ("kind", "dtype"),
    [(Scaled, torch.float32)]
    + [(kind, dtype) for kind in (Smoothed, ZLoss, Shifted, Inline) for dtype in (torch.float32, torch.bfloat16)],
)
def test_another_objective_is_refused_with_both_numbers(kind, dtype):
    model = kind(Qwen2Config(**SIZES)).to(dtype)
    with pytest.raises(ValueError, match=rf"not compute the loss of {kind.__name__}, .* is \d.*being \d"):
        rf.apply_to(model)
    assert "forward" not in model.__dict__ and "_loss_function" not in model.__dict__
    assert not model.model._forward_hooks


def trained_otherwise(term):
    """A model whose loss has another term in training mode alone."""

    class InTraining(Qwen2ForCausalLM):
        def forward(self, input_ids, labels=None, **kwargs):
            output = super().forward(input_ids, labels=labels, **kwargs)
            if self.training and labels is not None:
                output.loss = term(output, labels)
            return output

    return InTraining(Qwen2Config(**SIZES))


def halved_in_training():
    model = Qwen2ForCausalLM(Qwen2Config(**SIZES))
    model.lm_head.register_forward_hook(lambda module, _, logits: 0.5 * logits if module.training else logits)
    return model


@pytest.mark.parametrize(
    "make",
    [
        lambda: trained_otherwise(lambda out, _: out.loss + 0.1 * out.logits.float().logsumexp(-1).square().mean()),
        lambda: trained_otherwise(
            lambda out, labels: nn.functional.cross_entropy(
                out.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), label_smoothing=0.1
            )
        ),
        halved_in_training,
    ],
)
@pytest.mark.parametrize("training", [False, True])
def test_an_objective_of_training_mode_alone_is_refused_with_both_numbers(make, training):
    with pytest.raises(ValueError, match=r"in training mode with labels .* is \d.*being \d"):
        rf.apply_to(make().train(training))


class Sometimes(Qwen2ForCausalLM):
    """A z-loss where there is an attention mask, or more tokens than the comparison has."""

    def forward(self, input_ids, labels=None, attention_mask=None, **kwargs):
        output = super().forward(input_ids, labels=labels, attention_mask=attention_mask, **kwargs)
        if labels is not None and (attention_mask is not None or labels.shape[1] > 8):
            output.loss = output.loss + 0.1 * output.logits.float().logsumexp(-1).square().mean()
        return output


def test_what_reads_the_logits_after_the_comparison_gets_nan_and_the_first_call_of_a_mode_says_so():
    model, ids = Sometimes(Qwen2Config(**SIZES)).train(), torch.randint(3, 60, (2, 12))
    with rf.apply_to(model):
        with pytest.raises(ValueError, match="the loss of Sometimes is NaN under apply_to: its forward reads the log"):
            model(ids, labels=ids)
        assert model(ids[:, :8], labels=ids[:, :8]).loss.isfinite()
        assert model(ids[:, :8], labels=ids[:, :8], attention_mask=torch.ones(2, 8)).loss.isnan()


def test_the_whisper_decoder_which_does_not_shift_is_refused_with_both_numbers():
    config = WhisperConfig(vocab_size=67, d_model=16, decoder_layers=1, decoder_attention_heads=2, decoder_ffn_dim=24,
                           encoder_layers=1, encoder_attention_heads=2, encoder_ffn_dim=24, init_std=0.3,
                           pad_token_id=0, bos_token_id=1, eos_token_id=2)  # fmt: skip
    with pytest.raises(ValueError, match=r"WhisperForCausalLM, .* is \d.*being \d"):
        rf.apply_to(WhisperForCausalLM(config))


def test_what_a_model_adds_without_logits_is_kept():
    model = Weighted(Qwen2Config(**SIZES))
    ids, labels = a_batch()
    own, _ = same_as_own(model, input_ids=ids, labels=labels)
    assert abs(own.loss - ForCausalLMLoss(own.logits, labels, 67)) > 0.1


def test_a_forward_wrapped_on_the_instance_is_part_of_the_objective():
    model = MODELS["Qwen2"]()
    inner = model.forward

    def forward(*args, **kwargs):
        output = inner(*args, **kwargs)
        if output.loss is not None:
            output.loss = output.loss + 1e-3 * output.logits.square().mean()
        return output

    model.forward = forward
    with pytest.raises(ValueError, match="would not compute the loss of Qwen2ForCausalLM"):
        rf.apply_to(model)
    assert model.forward is forward


class Counting(Qwen2ForCausalLM):
    """Dropout, noise and counters, in buffers and attributes."""

    def __init__(self, config):
        super().__init__(config)
        self.register_buffer("calls", torch.zeros(1))
        self.seen, self.model.config.attention_dropout = 0, 0.5

    def forward(self, input_ids, labels=None, **kwargs):
        self.calls.add_(1)
        self.seen += 1
        self.noise = torch.rand(3)
        return super().forward(input_ids, labels=labels, **kwargs)


def test_the_comparison_leaves_no_trace():
    model = Counting(Qwen2Config(**SIZES))
    model.model.layers[0].eval()  # modes that one call of train() would not put back
    modes = {name: module.training for name, module in model.named_modules()}
    state, attributes = copy.deepcopy(model.state_dict()), [dict(vars(module)) for module in model.modules()]
    generator = torch.get_rng_state()
    rf.apply_to(model).remove()
    assert torch.equal(torch.get_rng_state(), generator) and model.seen == 0 == model.calls
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert [list(vars(module)) for module in model.modules()] == [list(kept) for kept in attributes]
    assert all(p.grad is None for p in model.parameters()) and not hasattr(model, "noise")


def test_parameters_that_are_not_here_are_waited_for():
    with torch.device("meta"):
        model, other = Qwen2ForCausalLM(Qwen2Config(**SIZES)), Smoothed(Qwen2Config(**SIZES))
    ids, labels = a_batch()
    for kind in (model, other):
        rf.apply_to(kind)
        kind.to_empty(device="cpu")
        kind.load_state_dict(MODELS["Qwen2"]().state_dict())
        kind.model.rotary_emb = MODELS["Qwen2"]().model.rotary_emb  # its buffers are in no state
    output = model(ids, labels=labels)
    output.loss.backward()
    assert output.logits is None and model.lm_head.weight.grad.norm() > 0
    with pytest.raises(ValueError, match="would not compute the loss of Smoothed"):
        other(ids, labels=labels)


def test_tokens_of_the_comparison_are_no_special_ones():
    class NoImages(Qwen2ForCausalLM):
        def forward(self, input_ids, labels=None, **kwargs):
            assert not torch.isin(input_ids, torch.arange(60)).any(), "image tokens"
            return super().forward(input_ids, labels=labels, **kwargs)

    config = Qwen2Config(**SIZES, image_token_id=5, stop_token_ids=list(range(60)))
    rf.apply_to(NoImages(config)).remove()
    with pytest.raises(ValueError, match="its forward fails: AssertionError: image tokens"):
        rf.apply_to(NoImages(Qwen2Config(**SIZES)))


def test_a_second_apply_to_is_refused_until_the_first_is_removed():
    model = MODELS["Qwen2"]()
    with rf.apply_to(model), pytest.raises(ValueError, match="called on this Qwen2ForCausalLM before"):
        rf.apply_to(model)
    rf.apply_to(model).remove()


@pytest.mark.parametrize("shifted", [False, True])
def test_in_eval_mode_logits_are_there_unless_they_are_declined(shifted):
    model = MODELS["Gemma2"]()
    ids, labels = a_batch()
    targets = nn.functional.pad(labels[:, 1:], (0, 1), value=-100)
    inputs = {"input_ids": ids} | ({"shift_labels": targets} if shifted else {"labels": labels})
    own = model.eval()(ids, labels=labels)
    with rf.apply_to(model):
        kept = model(**inputs)
        assert torch.equal(kept.logits, own.logits) and kept.loss.item() == pytest.approx(own.loss.item(), rel=1e-6)
        assert model.train()(**inputs).logits is None
    with rf.apply_to(model.eval(), eval_logits=False):
        ours = model(**inputs)
        assert ours.logits is None and ours.loss.item() == pytest.approx(own.loss.item(), rel=2e-6)
    for wrong in (None, 1, "yes"):
        with pytest.raises(TypeError, match=f"eval_logits must be True or False, got {wrong!r}"):
            rf.apply_to(model, eval_logits=wrong)


def test_the_trainers_metrics_get_the_models_predictions(tmp_path):
    model, rows = MODELS["Qwen2"](), [{"input_ids": row, "labels": row} for row in a_batch()[0]]
    found = []

    def metrics(prediction):
        found.append((prediction.predictions, prediction.label_ids))
        return {}

    args = TrainingArguments(tmp_path, report_to="none", use_cpu=True, disable_tqdm=True)
    trainer = Trainer(model, args, eval_dataset=rows, compute_metrics=metrics,
                      preprocess_logits_for_metrics=lambda logits, labels: logits.argmax(-1))  # fmt: skip
    losses = [trainer.evaluate()["eval_loss"]]
    with rf.apply_to(model):
        losses.append(trainer.evaluate()["eval_loss"])
    own, ours = found
    assert own[0].shape == (3, 9) and (own[0] == ours[0]).all() and losses[1] == pytest.approx(losses[0], rel=1e-6)


def test_what_else_the_model_returns_is_there_in_training():
    model = MODELS["Qwen2"]()
    ids, labels = a_batch()
    asked = {"output_hidden_states": True, "use_cache": True}
    own = model(ids, labels=labels, **asked)
    with rf.apply_to(model, eval_logits=False):
        ours = model(ids, labels=labels, **asked)
        pair = model(ids, labels=labels, return_dict=False)
    assert set(own) - set(ours) == {"logits"} and len(ours.hidden_states) == 3
    assert all(torch.equal(a, b) for a, b in zip(ours.hidden_states, own.hidden_states, strict=True))
    assert isinstance(pair, tuple) and pair[0].item() == pytest.approx(own.loss.item(), rel=2e-6)


class Asking(Qwen2ForCausalLM):
    def forward(self, input_ids, labels=None, weight=1.0, **kwargs):
        self.unknown = kwargs.pop("unknown", None)
        output = super().forward(input_ids, labels=labels, **kwargs)
        if output.loss is not None:
            output.loss = weight * output.loss
        return output


class Strict(Qwen2ForCausalLM):
    def forward(self, input_ids, labels=None, use_cache=None, return_dict=None):
        return super().forward(input_ids, labels=labels, use_cache=use_cache, return_dict=return_dict)


def test_a_keyword_that_apply_to_does_not_know_reaches_the_models_forward_or_raises():
    model = Asking(Qwen2Config(**SIZES))
    ids, labels = a_batch()
    own = model(ids, labels=labels).loss.item()
    with rf.apply_to(model):
        output = model(ids, labels=labels, weight=3.0, unknown="here")
    assert model.unknown == "here" and output.loss.item() == pytest.approx(3 * own, rel=2e-6)
    model = Strict(Qwen2Config(**SIZES))
    with rf.apply_to(model):
        assert model(ids, labels=labels).logits is None
        with pytest.raises(TypeError, match="unknown"):
            model(ids, labels=labels, unknown=1)


def test_labels_that_the_model_changes_before_its_loss_are_refused():
    class Changing(Qwen2ForCausalLM):
        def forward(self, input_ids, labels=None, masked=False, **kwargs):
            labels = labels.masked_fill(labels > 30, -100) if masked else labels
            return super().forward(input_ids, labels=labels, **kwargs)

    model = Changing(Qwen2Config(**SIZES))
    ids, labels = a_batch()
    with rf.apply_to(model), pytest.raises(ValueError, match="other labels than it was called with"):
        model(ids, labels=labels, masked=True)
    assert "_loss_function" not in model.__dict__ and "forward" not in model.lm_head.__dict__


@pytest.mark.parametrize("kind", ["compiled", "checkpointed", "peft"])
def test_hosts_around_forward(kind):
    model = MODELS["Qwen2"]()
    ids, labels = a_batch()
    if kind == "peft":
        from peft import LoraConfig, get_peft_model

        model = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
        assert model(ids, labels=labels).logits is not None
    own = model(ids, labels=labels)
    own.loss.backward()
    trained = [p for p in model.parameters() if p.requires_grad]
    expected = [p.grad.clone() for p in trained]
    model.zero_grad()
    with rf.apply_to(model):
        if kind == "checkpointed":
            model.gradient_checkpointing_enable()
        call = torch.compile(model, backend="aot_eager") if kind == "compiled" else model
        ours = call(ids, labels=labels)
        ours.loss.backward()
    assert ours.logits is None and ours.loss.item() == pytest.approx(own.loss.item(), rel=3e-6)
    assert all(relative(p.grad, gradient) < 2e-5 for p, gradient in zip(trained, expected, strict=True))
