"""Rollouts: greedy tokens are those of `generate`, sampled ones follow the model and the counter-based numbers."""

import itertools
import math
from dataclasses import fields

import pytest
import torch
from torch import nn
from transformers import (
    Cache,
    FalconH1Config,
    FalconH1ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    Lfm2Config,
    Lfm2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3_5ForCausalLM,
    Qwen3_5TextConfig,
)
from transformers.generation.logits_process import TemperatureLogitsWarper, TopPLogitsWarper
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils import generic

from redit_fast.noise import STREAM_SAMPLING, counter_uniform
from redit_fast.training.rollout import head, local
from redit_fast.training.rollout.local import generate
from tests.counting import Recorder

V = 31
SMALL = dict(
    vocab_size=V, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=8, initializer_range=0.5, bos_token_id=None, eos_token_id=None, pad_token_id=None,
)  # fmt: skip
MODELS = {
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SMALL, tie_word_embeddings=True)),
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SMALL)),
    # Windows of 6 are shorter than the prompts and the completions.
    "mistral": lambda: MistralForCausalLM(MistralConfig(**SMALL, sliding_window=6)),
    "gemma3": lambda: Gemma3ForCausalLM(
        Gemma3TextConfig(
            **SMALL, tie_word_embeddings=False, sliding_window=6, layer_types=["sliding_attention", "full_attention"]
        )
    ),
    "gpt2": lambda: GPT2LMHeadModel(
        GPT2Config(vocab_size=V, n_embd=32, n_layer=2, n_head=4, initializer_range=0.5, bos_token_id=0, eos_token_id=0)
    ),
}
# Models with recurrent states beside or instead of keys and values: each kind of layer that a cache has.
HYBRID = {**SMALL, "layer_types": ["linear_attention", "full_attention"], "linear_num_value_heads": 4,
          "linear_num_key_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8}  # fmt: skip
RECURRENT = {
    "qwen3_5": lambda: Qwen3_5ForCausalLM(Qwen3_5TextConfig(**HYBRID)),
    "lfm2": lambda: Lfm2ForCausalLM(
        Lfm2Config(**{**SMALL, "initializer_range": 0.3}, layer_types=["conv", "full_attention"])
    ),
    "falcon_h1": lambda: FalconH1ForCausalLM(
        FalconH1Config(**SMALL, mamba_d_ssm=32, mamba_n_heads=4, mamba_d_head=8, mamba_d_state=8, mamba_chunk_size=8)
    ),
    "mamba": lambda: MambaForCausalLM(
        MambaConfig(vocab_size=V, hidden_size=32, num_hidden_layers=2, state_size=8, initializer_range=0.5)
    ),
}
MODELS |= RECURRENT
EOS = [3, 17]
CACHE = "cache" if "cache" in {field.name for field in fields(CausalLMOutputWithPast)} else "past_key_values"


def prompts_of(count, low=1, high=14):
    generator = torch.Generator().manual_seed(1)
    lengths = torch.randint(low, high, (count,), generator=generator).tolist()
    return [torch.randint(V, (n,), generator=generator).tolist() for n in lengths]


class Fixed(nn.Module):
    """A causal LM in form only: the same logits at every position of every row, and a record of how it was called."""

    def __init__(self, logits):
        super().__init__()
        self.embedding = nn.Embedding(len(logits), 1)
        self.logits, self.modes, self.rows, self.grad = logits, [], [], []

    def get_input_embeddings(self):
        return self.embedding

    def forward(self, input_ids, past_key_values=None, **kwargs):
        self.modes.append(self.training)
        self.rows.append(len(input_ids))
        self.grad.append(torch.is_grad_enabled())
        return CausalLMOutputWithPast(logits=self.logits.expand(len(input_ids), 1, -1), past_key_values=self)

    def reorder_cache(self, rows):
        pass


class Old(nn.Module):
    """A model of the user's own, with the argument's name before transformers 5.24."""

    def __init__(self, model):
        super().__init__()
        self.model, self.caches = model, []

    def get_input_embeddings(self):
        return self.model.get_input_embeddings()

    def forward(self, input_ids, past_key_values=None, **kwargs):
        self.caches.append(past_key_values)
        return self.model(input_ids, **({} if past_key_values is None else {CACHE: past_key_values}), **kwargs)


class PassesOn(Old):
    """As PEFT wraps a model: the argument's name is in no signature."""

    def forward(self, *args, **kwargs):
        self.caches.append(kwargs.get(CACHE))
        return self.model(*args, **kwargs)


@pytest.mark.filterwarnings("error::FutureWarning", "error::DeprecationWarning")
@pytest.mark.parametrize("wrapper", [Old, PassesOn])
def test_the_cache_goes_under_the_name_that_the_model_takes(wrapper, monkeypatch):
    torch.manual_seed(5)
    said = []
    monkeypatch.setattr(generic.logger, "warning_once", said.append, raising=False)
    model, prompts = MODELS["qwen2"]().eval(), prompts_of(4)
    wrapped = wrapper(model)
    expected = generate(model, EOS, prompts, max_new_tokens=6)
    assert generate(wrapped, EOS, prompts, max_new_tokens=6) == expected
    first, *others = wrapped.caches
    assert first is None and len(others) > 3 and all(isinstance(cache, Cache) for cache in others)
    assert said == []


@pytest.mark.parametrize("name", MODELS)
def test_greedy_tokens_are_those_of_generate(name):
    torch.manual_seed(5)
    model, prompts = MODELS[name]().eval(), prompts_of(32)
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
    expected = model.generate(
        ids, attention_mask=mask, max_new_tokens=24, do_sample=False, eos_token_id=EOS, pad_token_id=0
    )[:, longest:].tolist()
    rollout = generate(model, EOS, prompts, max_new_tokens=24, temperature=0)

    for got, row in zip(rollout.completions, expected, strict=True):
        ends = [i for i, token in enumerate(row) if token in EOS]
        assert got == row[: ends[0] + 1 if ends else len(row)]
    assert rollout.finished == [got[-1] in EOS for got in rollout.completions]
    # The comparison says nothing if all rows end at once, if none ends, or if all rows are alike.
    assert 0 < sum(rollout.finished) and len(set(map(len, rollout.completions))) > 3
    assert len(set(map(tuple, rollout.completions))) > 8
    assert rollout.tokens == sum(map(len, rollout.completions))


@pytest.mark.parametrize("name", ["qwen2", *RECURRENT])
def test_a_prompt_gets_the_same_tokens_alone_and_in_a_batch(name):
    """Per sample id: other prompts, their lengths and rows that end early change nothing (float32 noise aside)."""
    model, prompts = MODELS[name]().eval(), prompts_of(12)
    sampling = dict(group_size=4, max_new_tokens=16, temperature=0.7, seed=9, step=4)
    together = generate(model, EOS, prompts, **sampling).completions
    for i, prompt in enumerate(prompts):
        alone = generate(model, EOS, [prompt], **sampling, sample_ids=torch.arange(4 * i, 4 * i + 4)).completions
        assert alone == together[4 * i : 4 * i + 4]
    assert len(set(map(tuple, together))) > 40
    assert len(set(map(len, together))) > 5


@pytest.mark.parametrize("temperature", [1.0, 0.5, 3.0])
def test_samples_follow_the_distribution_at_the_temperature(temperature):
    logits = torch.tensor([0.0, 1.0, -1.0, 2.0, float("-inf"), 0.5])
    samples, length = 64 * 8, 25
    rollout = generate(
        Fixed(logits), 99, [[0]] * 64, group_size=8, max_new_tokens=length, temperature=temperature, seed=3
    )
    counts = torch.bincount(torch.tensor(rollout.completions).flatten(), minlength=6).double()
    expected = torch.softmax(logits.double() / temperature, 0) * samples * length
    assert counts[4] == 0  # probability zero is never drawn
    kept = expected > 0
    chi_square = ((counts - expected)[kept] ** 2 / expected[kept]).sum()
    assert chi_square < 20.5  # 4 degrees of freedom: p = 4e-4; the seed is fixed
    # The wrong temperature is far outside that bound.
    wrong = torch.softmax(logits.double() / temperature / 1.3, 0) * samples * length
    assert ((counts - wrong)[kept] ** 2 / wrong[kept]).sum() > 60


def test_token_t_of_sample_i_inverts_the_counter_uniform():
    """The random number is u(seed, step, sample id, position), by definition and not by batch place."""
    logits = torch.tensor([0.3, -0.2, 0.9, 0.1, -1.5])
    sample_ids = torch.tensor([7, 2**32 - 1, 0, 12345])
    rollout = generate(
        Fixed(logits),
        99,
        [[0], [1, 2]],
        group_size=2,
        max_new_tokens=50,
        seed=2**63 + 5,
        step=77,
        sample_ids=sample_ids,
    )
    cumulative = torch.softmax(logits.double(), 0).cumsum(0)
    for sample, tokens in zip(sample_ids.tolist(), rollout.completions, strict=True):
        ids = sample + (torch.arange(50) << 32)
        u = counter_uniform(2**63 + 5, ids, STREAM_SAMPLING, 77)
        assert tokens == [int((cumulative <= x).sum()) for x in u]


@pytest.mark.parametrize("vocabulary", [5, 255, 256, 257, 1000, 50257])
def test_a_token_in_two_levels_is_the_one_of_a_cumulative_sum_in_float64(vocabulary):
    """But where u is within float32's rounding of where two tokens meet. A token of probability 0 is never drawn."""
    logits = 3 * torch.randn(64, vocabulary)
    logits[:, vocabulary // 3 :: 7] = -math.inf
    u = torch.cat([torch.rand(62, dtype=torch.float64), torch.tensor([0.5 * 2.0**-24, 1 - 0.5 * 2.0**-24]).double()])
    for temperature in (1.0, 0.3):
        cumulative = torch.softmax(logits.double() / temperature, -1).cumsum(-1)
        expected = torch.searchsorted(cumulative, (u * cumulative[:, -1])[:, None], right=True)[:, 0]
        found, _ = local._choose(logits, temperature, 1.0, u)
        assert logits.gather(1, found[:, None]).isfinite().all()
        away = found != expected
        near = [(cumulative[row] - u[row]).abs().min() < 1e-6 for row in away.nonzero()[:, 0].tolist()]
        assert all(near) and away.sum() <= 2


@pytest.mark.parametrize("top_p", [0.05, 0.5, 0.9])
@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_top_p_draws_the_tokens_that_transformers_keeps(top_p, temperature):
    """Each of them as often as its share among them."""
    logits = 2 * torch.randn(300)
    kept = TopPLogitsWarper(top_p)(None, TemperatureLogitsWarper(temperature)(None, logits[None]))[0].isfinite()
    rollout = generate(
        Fixed(logits), [], [[0]] * 64, group_size=8, max_new_tokens=25, temperature=temperature, top_p=top_p, seed=3
    )
    counts = torch.bincount(torch.tensor(rollout.completions).flatten(), minlength=300).double()
    assert 0 < kept.sum() < 200 and not counts[~kept].any()
    share = torch.where(kept, torch.softmax(logits.double() / temperature, 0), 0)
    expected = share / share.sum() * counts.sum()
    often = expected > 20
    assert (((counts - expected)[often] / expected[often].sqrt()).abs() < 4.5).all() and often.any()


@pytest.mark.parametrize("name", ["qwen2", "mistral", "gemma3"])
@pytest.mark.parametrize("high", [2, 14], ids=["prompts of one length", "padded prompts"])
def test_the_host_waits_for_the_device_once_in_eight_tokens(name, high):
    torch.manual_seed(5)
    model, prompts = MODELS[name]().eval(), prompts_of(6, high=high)
    counts = []
    for tokens in (16, 48):
        with Recorder() as recorder:
            generate(model, [], prompts, group_size=2, max_new_tokens=tokens)
        counts.append(len(recorder.waits))
    assert counts[1] - counts[0] <= 32 // 8 and counts[0] > 1
    assert model.config._attn_implementation == "sdpa"


def test_seed_and_step_change_the_samples():
    def run(**key):
        return generate(Fixed(torch.zeros(7)), 99, [[0]], group_size=4, max_new_tokens=20, **key).completions

    assert run() == run(seed=0, step=0)
    assert len({str(run(**key)) for key in ({}, {"seed": 1}, {"step": 1}, {"seed": 1, "step": 1})}) == 4
    assert len(set(map(tuple, run()))) == 4


def test_one_prefill_a_prompt_and_finished_rows_leave_the_batch_every_eight_tokens():
    model = Fixed(torch.zeros(4))  # a quarter of the samples ends at every token
    rollout = generate(model, [2], [[1], [0, 1], [3]], group_size=100, max_new_tokens=30)
    lengths = [len(c) for c in rollout.completions]
    last = min(30, math.ceil(max(lengths) / 8) * 8)
    assert model.rows == [3] + [sum(n > t // 8 * 8 for n in lengths) for t in range(1, last)] and last < 30
    assert all(2 not in c[:-1] for c in rollout.completions)
    assert rollout.finished == [c[-1] == 2 for c in rollout.completions]


def test_the_limit_cuts_off_unfinished_samples():
    rollout = generate(Fixed(torch.tensor([9.0, 0.0])), 1, [[0]], max_new_tokens=5, temperature=0)
    assert rollout.completions == [[0] * 5] and rollout.finished == [False]


def test_modes_are_put_back_and_nothing_is_differentiated():
    model = Fixed(torch.zeros(4, requires_grad=True))
    model.frozen = nn.Dropout().eval()
    model.train(True)
    model.frozen.eval()
    generate(model, 9, [[0]], max_new_tokens=3)
    assert set(model.modes) == {False} and set(model.grad) == {False}
    assert model.training and not model.frozen.training and torch.is_grad_enabled()

    for bad, temperature in itertools.product((math.nan, math.inf), (0, 1.0)):
        model.logits = torch.tensor([0.0, bad, 0.0, -math.inf])
        with pytest.raises(FloatingPointError, match="NaN or infinite logits"):
            generate(model, 9, [[0]], max_new_tokens=3, temperature=temperature)
    assert model.training and not model.frozen.training


@pytest.mark.parametrize(
    "change, message",
    [
        ({"prompts": []}, "prompts .* none"),
        ({"prompts": [[1], []]}, "prompt 1 has no tokens"),
        ({"group_size": 0}, "group_size .* 0"),
        ({"max_new_tokens": 0}, "max_new_tokens .* 0"),
        ({"top_p": 0}, "top_p .* 0"),
        ({"top_p": 1.5}, "top_p .* 1.5"),
        ({"temperature": -1.0}, "temperature .* -1.0"),
        ({"temperature": float("nan")}, "temperature .* nan"),
        ({"sample_ids": torch.arange(3)}, r"sample_ids must be 2 int64 .*\(3,\)"),
        ({"sample_ids": torch.tensor([0.0, 1.0])}, "sample_ids .*float32"),
        ({"sample_ids": torch.tensor([0, 2**32])}, "sample_ids"),
    ],
)
def test_bad_arguments_are_named(change, message):
    arguments = {"prompts": [[1], [2]], "max_new_tokens": 2, **change}
    with pytest.raises(ValueError, match=message):
        generate(Fixed(torch.zeros(4)), 3, **arguments)


def a_model_with_a_large_head(vocabulary=9000, width=128):
    torch.manual_seed(0)
    sizes = {"hidden_size": width, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2,
             "num_key_value_heads": 1, "initializer_range": 0.3}  # fmt: skip
    return Qwen2ForCausalLM(Qwen2Config(vocab_size=vocabulary, **sizes))


def test_the_head_in_blocks_is_the_models_own_and_is_taken_back(monkeypatch):
    model = a_model_with_a_large_head()
    hidden = torch.randn(5, 1, 128)
    with torch.no_grad():
        own = model.lm_head(hidden)
        exact = hidden.double() @ model.lm_head.weight.double().T
        with head.in_blocks(model, rows=5, tokens=8):
            assert "forward" in vars(model.lm_head)
            found = model.lm_head(hidden)
        limit = 1.25 * (own - exact).abs().max() + 1e-6
        assert (found - exact).abs().max() <= limit
        with pytest.raises(KeyError), head.in_blocks(model, rows=5, tokens=8):
            raise KeyError
    assert "forward" not in vars(model.lm_head)
    greedy = {"group_size": 3, "max_new_tokens": 16, "temperature": 0}  # sampling would follow the last bits
    in_blocks = generate(model, [0], [[1, 2, 3], [4, 5]], **greedy)
    with monkeypatch.context() as patch:
        patch.setattr(head, "LEAST_TOKENS", 10**9)
        assert generate(model, [0], [[1, 2, 3], [4, 5]], **greedy) == in_blocks
    with torch.no_grad():
        model.lm_head.weight.mul_(-1)
    assert generate(model, [0], [[1, 2, 3], [4, 5]], **greedy) != in_blocks, "the weight of the step before"


@pytest.mark.parametrize("change", ["bfloat16", "small", "short", "hooked", "no head"])
def test_heads_that_are_not_put_in_blocks(change):
    model, tokens = a_model_with_a_large_head(900 if change == "small" else 9000), 7 if change == "short" else 8
    if change == "bfloat16":
        model.bfloat16()
    if change == "hooked":
        model.lm_head.forward = lambda x: x
    before = vars(model.lm_head).get("forward")
    with head.in_blocks(nn.Linear(2, 2) if change == "no head" else model, rows=5, tokens=tokens):
        assert vars(model.lm_head).get("forward") is before
