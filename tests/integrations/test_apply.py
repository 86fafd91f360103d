"""A Hugging Face causal LM's loss through `linear_logp`: the model's own loss and gradients, without its logits."""

import copy
import inspect

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from transformers import (
    BertConfig,
    BertLMHeadModel,
    CohereConfig,
    CohereForCausalLM,
    ElectraConfig,
    ElectraForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2ForSequenceClassification,
    T5Config,
    T5ForConditionalGeneration,
)
from transformers.utils import generic

import redit_fast as rf
from tests.tolerance import relative

SIZES = {"vocab_size": 67, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
         "num_attention_heads": 2, "num_key_value_heads": 1, "initializer_range": 0.2, "pad_token_id": 0,
         "bos_token_id": 1, "eos_token_id": 2}  # fmt: skip
MODELS = {
    "Qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SIZES, tie_word_embeddings=True)),
    "Gemma2": lambda: Gemma2ForCausalLM(Gemma2Config(**SIZES, head_dim=8, final_logit_softcapping=0.7)),
    "Cohere": lambda: CohereForCausalLM(CohereConfig(**SIZES, logit_scale=4.0)),
    "Granite": lambda: GraniteForCausalLM(GraniteConfig(**SIZES, logits_scaling=0.25)),
}


@pytest.fixture(params=MODELS)
def model(request):
    return MODELS[request.param]()


def a_batch():
    ids = torch.randint(3, 67, (3, 9))
    labels = ids.clone()
    labels[0, :4] = labels[2, 6:] = -100
    return ids, labels


def run(model, **inputs):
    model.zero_grad()
    out = model(**inputs)
    out.loss.backward()
    return out, {name: p.grad.clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("label", [67, -1])
def test_a_label_that_the_head_does_not_have_is_told_with_its_range(model, label):
    ids, labels = a_batch()
    labels[1, 3] = label
    with rf.apply_to(model), pytest.raises(ValueError, match=r"is NaN .* a label lies outside \[0, 67\)"):
        model(ids, labels=labels)


@pytest.mark.parametrize("items", [None, 11, torch.tensor(40)])
def test_loss_and_every_gradient_are_the_models_own_and_the_head_makes_no_logits(model, items):
    ids, labels = a_batch()
    inputs = {"input_ids": ids, "labels": labels, "attention_mask": torch.ones_like(ids)}
    if items is not None:
        inputs["num_items_in_batch"] = items
    own, gradients = run(model, **inputs)
    shapes = []
    with rf.apply_to(model):
        hook = model.get_output_embeddings().register_forward_hook(lambda *call: shapes.append(call[-1].shape))
        ours, found = run(model, **inputs)
    hook.remove()
    assert ours.logits is None and type(ours) is type(own) and shapes == [(*ids.shape, 1)]
    assert ours.loss.item() == pytest.approx(own.loss.item(), rel=2e-6)
    for name, gradient in gradients.items():
        assert gradient.norm() > 1e-3 and relative(found[name], gradient) < 1e-5, name


@pytest.mark.filterwarnings("error::FutureWarning", "error::DeprecationWarning")
def test_the_result_has_the_models_own_fields_but_the_logits(model, monkeypatch):
    """The cache under whichever name this transformers has, which says so once where it meets the other."""
    said = []
    monkeypatch.setattr(generic.logger, "warning_once", said.append, raising=False)
    ids, labels = a_batch()
    inputs = {"input_ids": ids, "labels": labels, "use_cache": True, "output_hidden_states": True}
    own = model(**inputs)
    with rf.apply_to(model):
        assert torch.equal(model(**inputs).logits, own.logits)  # who asks for hidden states may want these too
    with rf.apply_to(model, eval_logits=False):
        ours, as_tuple = model(**inputs), model(**inputs, return_dict=False)
    assert set(ours.keys()) == set(own.keys()) - {"logits"} >= {"loss", "hidden_states"}
    caches = [out[name] for out in (own, ours) for name in out.keys() if name in ("cache", "past_key_values")]
    assert [cache.get_seq_length() for cache in caches] == [ids.shape[1]] * 2 and len(as_tuple) == len(ours)
    assert said == []


def test_without_labels_the_call_is_the_original_one(model):
    ids, _ = a_batch()
    expected = model(ids).logits
    words = model.eval().generate(ids[:1], max_new_tokens=3, do_sample=False)
    with rf.apply_to(model):
        assert torch.equal(model(ids).logits, expected)
        assert torch.equal(model.generate(ids[:1], max_new_tokens=3, do_sample=False), words)


def test_the_instance_alone_changes_and_remove_puts_every_attribute_back():
    model, other = MODELS["Qwen2"](), MODELS["Qwen2"]()
    ids, labels = a_batch()
    attributes, signature = set(model.__dict__), inspect.signature(model.forward)
    handle = rf.apply_to(model)
    assert model(ids, labels=labels).logits is None and inspect.signature(model.forward) == signature
    assert other(ids, labels=labels).logits is not None
    handle.remove()
    handle.remove()
    assert set(model.__dict__) == attributes and model(ids, labels=labels).logits is not None
    with pytest.raises(KeyError), rf.apply_to(model):
        raise KeyError
    assert set(model.__dict__) == attributes


def test_a_forward_that_others_set_on_the_instance_is_kept_below_and_above_ours():
    model, calls = MODELS["Qwen2"](), []
    ids, labels = a_batch()

    def wrap(name):
        inner = model.forward

        def forward(*args, **kwargs):
            calls.append(name)
            return inner(*args, **kwargs)

        model.forward = forward
        return forward

    below = wrap("below")
    handle = rf.apply_to(model)
    assert model.forward is not below
    calls.clear()
    assert model(ids, labels=labels).logits is None and calls == ["below"]
    assert model(ids).logits is not None and calls == ["below"] * 2
    handle.remove()
    assert model.forward is below
    handle = rf.apply_to(model)
    above = wrap("above")
    handle.remove()
    calls.clear()
    assert model.forward is above and model(ids, labels=labels).logits is not None
    assert calls == ["above", "below"]


def test_mixed_precision_that_accelerate_put_around_forward_stays():
    model, ids, dtypes = MODELS["Qwen2"](), a_batch()[0], []
    AcceleratorState._reset_state(reset_partial_state=True)  # of other tests in this process
    model = Accelerator(cpu=True, mixed_precision="bf16").prepare(model)
    AcceleratorState._reset_state(reset_partial_state=True)
    expected = model(ids, labels=ids)
    with rf.apply_to(model):
        model.model.layers[0].mlp.register_forward_hook(lambda *call: dtypes.append(call[-1].dtype))
        ours = model(ids, labels=ids)
    assert ours.logits is None and dtypes == [torch.bfloat16]
    assert ours.loss.item() == pytest.approx(expected.loss.item(), rel=1e-3)


def test_a_copy_of_an_applied_model_computes_from_its_own_weights():
    model = MODELS["Qwen2"]()
    ids, labels = a_batch()
    with rf.apply_to(model):
        twin = copy.deepcopy(model)
        with torch.no_grad():
            model.model.norm.weight.zero_()
        assert twin(ids, labels=labels).loss != model(ids, labels=labels).loss
        assert twin(ids).logits.abs().max() > 0 == model(ids).logits.abs().max()


def test_shifted_labels_positional_labels_tuples_and_labels_that_are_all_masked():
    model = MODELS["Qwen2"]()
    ids, labels = a_batch()
    shifted = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=-100)
    expected = model(ids, labels=labels).loss
    names = list(inspect.signature(model.forward).parameters)
    places = [None] * names.index("labels")
    with rf.apply_to(model):
        results = [
            model(ids, shift_labels=shifted, labels=labels).loss,
            model(ids, shift_labels=shifted).loss,
            model(ids, *places[1:], labels).loss,
            model(ids, labels=labels, return_dict=False)[0],
            model(ids, labels=labels.masked_fill(labels == -100, -5), ignore_index=-5).loss,
        ]
        for result in results:
            assert result.item() == pytest.approx(expected.item(), rel=2e-6)
        nothing, gradients = run(model, input_ids=ids, labels=torch.full_like(ids, -100))
    assert nothing.loss == 0 and all(gradient.abs().max() == 0 for gradient in gradients.values())


def test_what_has_no_lm_head_on_its_backbone_is_refused_naming_the_class():
    small = {"vocab_size": 20, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1,
             "num_attention_heads": 2}  # fmt: skip
    t5 = T5Config(vocab_size=20, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
    refused = [
        (Qwen2ForSequenceClassification(Qwen2Config(**SIZES)), "an LM head, got Qwen2ForSequenceClassification"),
        (Qwen2ForCausalLM(Qwen2Config(**SIZES)).model, "an LM head, got Qwen2Model"),
        (T5ForConditionalGeneration(t5), "an LM head, got T5ForConditionalGeneration"),
        (torch.nn.Linear(2, 2), "an LM head, got Linear"),
        (BertLMHeadModel(BertConfig(**small, is_decoder=True)), "BertLMHeadModel, which also has cls"),
        (ElectraForCausalLM(ElectraConfig(**small, is_decoder=True)), "also has generator_predictions"),
    ]
    for model, message in refused:
        with pytest.raises(TypeError, match=message):
            rf.apply_to(model)
        assert "forward" not in model.__dict__
    model = MODELS["Qwen2"]()
    model.lm_head = torch.nn.Sequential(model.lm_head)
    with pytest.raises(TypeError, match="plain nn.Linear as the LM head of Qwen2ForCausalLM, got Sequential"):
        rf.apply_to(model)


def test_what_the_call_cannot_honour_is_refused_naming_it():
    model = MODELS["Qwen2"]()
    ids, labels = a_batch()
    with rf.apply_to(model):
        with pytest.raises(ValueError, match="logits_to_keep must be 0 with labels, got 2"):
            model(ids, labels=labels, logits_to_keep=2)
    model.loss_function = my_loss
    with pytest.raises(ValueError, match="loss of Qwen2ForCausalLM must be .* got my_loss"):
        rf.apply_to(model)
    unknown = MODELS["Granite"]()
    unknown.config.logit_multiplier = 2.0
    with pytest.raises(ValueError, match="logit_multiplier=2.0"):
        rf.apply_to(unknown)


def my_loss(logits, labels, **_):
    return logits.mean()
