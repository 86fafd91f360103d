"""What the packed attention computes and holds, what it refuses, and who has it."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

import redit_fast as rf
from redit_fast.backends import cpu, reference
from redit_fast.ops import chunks
from redit_fast.packing.attention import Segments, UnpackableError, attending, attention, refusal
from redit_fast.packing.plan import Budget, Segment
from redit_fast.training.batch import Batch
from tests.counting import Recorder
from tests.packing.models import batch_of, gradient, model_of
from tests.tolerance import relative


def test_the_registered_attention_is_softmax_over_the_path():
    """Against float64, query by query: three segments below a root, one of them two levels down, one longer than its
    path."""
    segments = Segments(
        [Segment(0, 0, 5, None), Segment(0, 5, 3, 0), Segment(0, 8, 4, 1), Segment(1, 5, 9, 0)], torch.device("cpu")
    )
    q, k, v = (torch.randn(1, heads, 21, 8, requires_grad=True) for heads in (4, 2, 2))
    rows = [range(0, 5), range(5, 8), range(8, 12), range(12, 21)]
    paths = [[0], [0, 1], [0, 1, 2], [0, 3]]
    for window, softcap, scale in (
        (None, None, None),
        (4, None, 0.2),
        (None, 1.5, None),
        (3, 1.5, 0.7),
        (100, None, None),
    ):
        layer = torch.nn.Module()
        out, weights = attention(layer, q, k, v, None, scaling=scale, sliding_window=window, softcap=softcap,
                                 segments=segments)  # fmt: skip
        assert weights is None and out.shape == (1, 21, 4, 8)
        for own, path in zip(rows, paths):
            before = [row for place in path[:-1] for row in rows[place]]
            for number, row in enumerate(own):
                seen = [*before, *own[: number + 1]][-window if window else 0 :]
                for head in range(4):
                    keys, values = (x[0, head // 2, seen].double() for x in (k, v))
                    scores = keys @ q[0, head, row].double() * (8**-0.5 if scale is None else scale)
                    scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
                    expected = torch.softmax(scores, 0) @ values
                    assert (out[0, row, head] - expected).abs().max() < 1e-5


def test_no_tensor_is_as_large_as_all_pairs_of_tokens_nor_as_all_logits():
    """And the largest one grows with the budget, not with the step."""
    model = model_of("qwen2", max_position_embeddings=512)

    def largest(groups, budget):
        generator = torch.Generator().manual_seed(0)
        prompts = [torch.randint(1, 97, (60,), generator=generator).tolist() for _ in range(groups) for _ in [0]]
        prompts = [prompt for prompt in prompts for _ in range(8)]
        completions = [torch.randint(1, 97, (n,), generator=generator).tolist() for n in [40, 50, 60, 55] * 2 * groups]
        batch = Batch(prompts, completions, torch.ones(8 * groups), rf.LossConfig(), Budget(tokens=budget), True, 0, 0)
        with Recorder() as recorder:
            done = batch.backward(model)
        return max(recorder.sizes), done.tokens, recorder.sizes

    most, tokens, seen = largest(6, 10**6)
    assert most < tokens**2 / 10 and tokens > 2500
    assert most <= tokens * 97  # the loss's chunk of logits: rows there are fewer than tokens
    few, many = (largest(groups, 1000)[0] for groups in (3, 9))
    assert few == many < most / 2


def test_a_packed_pass_waits_for_a_gpu_in_the_loss_alone(monkeypatch):
    """In the decoder's forward and backward pass no value of a tensor is asked for, with a loss that asks for none."""

    def plain(hidden, weight, targets, advantages, **options):
        logp = torch.log_softmax(hidden @ weight.T, -1).gather(1, targets[:, None])[:, 0]
        return rf.LossOutput(logp.sum(), logp.detach(), logp.detach(), {}, "fused")

    monkeypatch.setattr(rf, "linear_grpo_loss", plain)
    monkeypatch.setattr(
        rf, "policy_loss", lambda logp, *_, **options: rf.LossOutput(logp, logp, None, {"a": logp[0]}, "")
    )
    for kind in ("qwen2", "gemma2"):
        model = model_of(kind)
        waits = []
        for packed in (True, False):
            with Recorder() as recorder:
                batch_of(packed=packed, budget=Budget(tokens=60), model=model).backward(model)
            waits.append(sum(name != "tolist" for name in recorder.waits))  # those are of the host's own tensors
        assert waits[0] == 0 < waits[1]  # transformers looks whether the positions of padded rows begin anew


def test_a_gpu_is_waited_for_three_times_a_micro_batch_and_twice_a_pass(monkeypatch):
    """With the head's loop of a GPU, whose kernels read the upstream gradient where it lies."""
    monkeypatch.setattr(chunks, "whole_chunks", lambda device: True)
    monkeypatch.setattr(cpu, "scale_in_place", reference.scale_in_place)
    model, waits = model_of("qwen2"), {}
    for tokens in (10**6, 130, 90):
        batch = batch_of(budget=Budget(tokens=tokens), model=model)
        parts = len(batch.micro_batches)
        with Recorder() as recorder:
            batch.backward(model)
        waits[parts] = len(recorder.waits) - parts  # a micro-batch asks for its segments' offsets, which are the host's
    assert waits == {1: 5, 2: 8, 3: 11}  # the offsets, scored rows and silent ones; in a pass offsets and all numbers


def test_a_layer_that_cannot_be_packed_is_named():
    segments = Segments([Segment(0, 0, 3, None)], torch.device("cpu"))
    q = torch.randn(1, 2, 3, 4)
    layer = torch.nn.Module()
    for words, change in {
        "do not hand the decoder's arguments": {"segments": None},
        "has sinks": {"s_aux": torch.zeros(2)},
        "adds a bias": {"position_bias": q},
        "has dropout": {"dropout": 0.1},
        "make a mask of their own": {"attention_mask": torch.ones(1, 1, 3, 3)},
    }.items():
        with pytest.raises(UnpackableError, match=words):
            attention(layer, q, q, q, **{"attention_mask": None, "segments": segments, **change})
    with pytest.raises(UnpackableError, match="of other tokens"):
        attention(layer, *[q[:, :, :2]] * 3, segments=segments)
    layer.config = model_of("mistral").config
    with pytest.raises(UnpackableError, match="do not hand their window"):
        attention(layer, q, q, q, segments=segments)


def test_what_a_model_is_tells_why_it_is_not_packed():
    assert refusal(model_of("qwen2")) is None and refusal(model_of("gpt_neox")) is None
    assert refusal(model_of("gpt2", resid_pdrop=0.2)) == "it has dropout: transformer.h.0.attn.resid_dropout.p is 0.2"
    assert "from transformers' registry" in refusal(model_of("bloom", hidden_dropout=0.0))
    assert "self_attn.attention_dropout is 0.1" in refusal(model_of("llama", attention_dropout=0.1))


def test_an_exception_gives_the_model_its_own_attention_back():
    model = model_of("gemma2")
    before = model.config._attn_implementation
    with pytest.raises(KeyError), attending(model):
        assert model.config._attn_implementation == "redit_fast" != before
        raise KeyError
    assert model.config._attn_implementation == before
    ids = torch.randint(97, (2, 9))
    assert model(ids).logits.shape == (2, 9, 97)


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing")  # the newest transformers have another name for it
@pytest.mark.parametrize("reentrant", [False, True])
def test_a_layer_that_is_computed_again_in_a_later_backward_pass_has_that_attention(reentrant):
    model = model_of("mistral").train()
    gradients = []
    for checkpointed in (False, True):
        model.zero_grad()
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        batch = batch_of()
        ((micro, _),) = batch.micro_batches
        with attending(model):
            hidden, _, _ = batch.hidden(model, micro)
        assert model.config._attn_implementation != "redit_fast"
        hidden.square().sum().backward()
        gradients.append(gradient(model))
    assert gradients[0].norm() > 1 and relative(gradients[1], gradients[0]) < 1e-6


SHAPES = {
    "Qwen2.5-0.5B": dict(hidden_size=896, intermediate_size=4864, num_hidden_layers=24, num_attention_heads=14,
                         num_key_value_heads=2),
    "Qwen2.5-7B": dict(hidden_size=3584, intermediate_size=18944, num_hidden_layers=28, num_attention_heads=28,
                       num_key_value_heads=4),
}  # fmt: skip


@pytest.mark.parametrize("name", SHAPES)
def test_counted_flops_are_those_of_each_token_once_and_of_its_pairs(name):
    """Without weights, on the meta device: the decoder's forward and backward pass of 2 prompts x 8 samples."""
    shape = SHAPES[name]
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(CONFIG_MAPPING["qwen2"](vocab_size=1000, **shape))
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(100, 500, (16,), generator=generator).tolist()
    prompts = [[i // 8 + 1] * (100 + 50 * (i // 8)) for i in range(16)]
    batch = Batch(prompts, [[7] * n for n in lengths], torch.ones(16), rf.LossConfig(), Budget(), True, 0, 0)
    ((micro, _),) = batch.micro_batches
    tokens = 100 + 150 + sum(lengths) - 16
    assert micro.tokens == tokens
    with attending(model), FlopCounterMode(display=False) as counter:
        hidden, _, _ = batch.hidden(model, micro)
        hidden.sum().backward()
    weights = sum(p.numel() for n, p in model.model.named_parameters() if p.ndim == 2 and "embed" not in n)
    pairs = 100**2 + 150**2 + sum((n - 1) * (len(prompt) + n - 1) for prompt, n in zip(prompts, lengths))
    head_dim = shape["hidden_size"] // shape["num_attention_heads"]
    attention_flops = 12 * shape["num_hidden_layers"] * shape["num_attention_heads"] * head_dim * pairs
    assert counter.get_total_flops() == pytest.approx(6 * weights * tokens + attention_flops, rel=0.01)
    assert attention_flops > 0.01 * 6 * weights * tokens  # so that they count
