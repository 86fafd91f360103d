"""The policy: its head, and the tokens that end a completion."""

import pytest
import torch
from transformers import AutoTokenizer

import redit_fast as rf
from redit_fast.training import builtin, policy
from tests.training.test_batch import MIXED, batch_of


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
