"""Model FLOPs against torch's counter, and what the metrics make of them."""

import json

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, Qwen2Config

from redit_fast.training import config_file, flops, report
from redit_fast.training.metrics import work_metrics
from redit_fast.training.trainer import train
from tests.packing.models import FAMILIES, batch_of, model_of
from tests.training.jobs import lines_of
from tests.training.test_trial import SUPPORTED

SHAPES = {
    "0.5B": dict(hidden_size=896, intermediate_size=4864, num_hidden_layers=24, num_attention_heads=14,
                 num_key_value_heads=2, vocab_size=151936, tie_word_embeddings=True),
    "7B": dict(hidden_size=3584, intermediate_size=18944, num_hidden_layers=28, num_attention_heads=28,
               num_key_value_heads=4, vocab_size=152064),
}  # fmt: skip


@pytest.mark.parametrize("name", SHAPES)
def test_a_row_has_those_that_torch_counts_within_a_hundredth(name):
    """Torch's attention without a kernel computes all pairs, also those that the mask hides."""
    tokens = 512
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(Qwen2Config(**SHAPES[name]), attn_implementation="eager")
        row = torch.zeros(1, tokens, dtype=torch.int64)
    with FlopCounterMode(display=False) as counted:
        hidden = model.get_decoder()(row, {"full_attention": None}, use_cache=False).last_hidden_state
        model.get_output_embeddings()(hidden).sum().backward()
    shape = flops.of(model)
    hidden_pairs = tokens**2 - tokens * (tokens + 1) // 2
    expected = counted.get_total_flops() - 12 * hidden_pairs * sum(width for width, _ in shape.layers)
    batch = batch_of(packed=False, samples=[0])
    batch.prompts, batch.completions = [[1]], [[1] * tokens]
    assert flops.of_pass(shape, batch) == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize("kind", FAMILIES)
def test_weights_of_every_family_are_those_that_torch_counts_in_packed_rows(kind):
    model, batch = model_of(kind), batch_of()
    shape = flops.of(model)
    with FlopCounterMode(display=False) as counted:
        first = batch.logp(model)
    by_op = counted.get_flop_counts()["Global"]
    products = sum(count for op, count in by_op.items() if "mm" in str(op) and "bmm" not in str(op))
    ((micro, _),) = batch.micro_batches
    assert len(first) == sum(batch.lengths)
    assert 2 * shape.decoder * micro.tokens <= products <= 2 * (shape.decoder * micro.tokens + shape.head * len(first))


@pytest.mark.parametrize("window", [None, 1, 7, 100])
def test_pairs_of_queries_and_keys(window):
    for start in (0, 3, 7, 20):
        for length in (1, 2, 9):
            seen = [min(place + 1, window or place + 1) for place in range(start, start + length)]
            assert flops._pairs(start, length, window) == sum(seen)


def test_packed_rows_need_fewer_and_samples_without_a_gradient_a_third():
    model = model_of("qwen2")
    shape, packed, padded = flops.of(model), batch_of(samples=range(6)), batch_of(samples=range(6), packed=False)
    assert 0 < flops.of_pass(shape, packed) < flops.of_pass(shape, padded)
    for batch in (packed, padded):
        batch.advantages = torch.ones(6)
    whole = flops.of_pass(shape, padded)
    assert flops.of_pass(shape, padded, second=True) == whole
    half = batch_of(samples=range(6), packed=False)
    half.advantages = torch.tensor([1.0, 1.0, 1.0, 0.0, 0.0, 0.0])
    second = flops.of_pass(shape, half, second=True)
    assert 3 * (flops.of_pass(shape, half) - second) == whole - second > 0


def test_weights_that_are_not_trained_need_two_thirds():
    model, batch = model_of("qwen2", tie_word_embeddings=False), batch_of(samples=range(6))
    batch.advantages = torch.ones(6)
    shape = flops.of(model)
    whole, attention = (flops.of_pass(each, batch) for each in (shape, shape._replace(decoder=0, head=0)))
    assert flops.of_pass(flops.of(model.requires_grad_(False)), batch) - attention == (whole - attention) * 2 / 3
    attached = flops.of(model)
    model.get_output_embeddings().requires_grad_(True)
    assert (attached.frozen_head, flops.of(model).frozen_head) == (shape.head, 0) and shape.frozen == 0 < shape.decoder


def test_windows_are_those_of_the_layers():
    assert {window for _, window in flops.of(model_of("qwen2")).layers} == {7, None}
    assert {window for _, window in flops.of(model_of("mistral")).layers} == {7}
    assert {window for _, window in flops.of(model_of("llama")).layers} == {None}


@pytest.mark.parametrize("kind", ["qwen3_next", "falcon_h1", "lfm2", "mamba"])
def test_recurrent_models_have_none(kind):
    assert flops.of(AutoModelForCausalLM.from_config(CONFIG_MAPPING[kind](**SUPPORTED[kind]))) is None


def test_models_with_experts_or_latent_attention_have_none():
    experts = {"num_experts": 4, "moe_intermediate_size": 16, "head_dim": 8}
    assert flops.of(model_of("qwen3_moe", **experts)) is None
    latent = model_of("llama")
    assert flops.of(latent) is not None
    latent.config.kv_lora_rank = 16
    assert flops.of(latent) is None


@pytest.mark.parametrize(
    "name, expected",
    [
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA H200 NVL", 836e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA L4", 121e12),
        ("NVIDIA L40", None),
        ("NVIDIA H200 MIG 1g.18gb", None),
    ],
)
def test_the_peak_is_that_of_the_device_by_its_name(monkeypatch, name, expected):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)

    class OnAGpu(torch.nn.Module):
        device, dtype = torch.device("cuda"), torch.bfloat16

    assert flops.peak(OnAGpu()) == expected
    OnAGpu.dtype = torch.float32
    assert flops.peak(OnAGpu()) is None
    assert flops.peak(model_of("qwen2")) is None


def test_rollout_and_update_have_their_tokens_a_second_apart():
    model, batch = model_of("qwen2"), batch_of(samples=range(6))
    first, shape = batch.backward(model), flops.of(model)
    seconds = {"rollout": 2.0, "pass1": 1.0, "pass2": 0.5, "optimizer": 0.5}
    done = 3 * flops.of_pass(shape, batch) + 2 * flops.of_pass(shape, batch, second=True)
    found = work_metrics(batch, 300, seconds, (3, 2), shape, 1e9)
    assert found == {
        "tokens/useful": batch.useful_tokens, "tokens/computed": first.tokens, "tokens/generated": 300,
        "tokens/per_second_rollout": 150.0, "tokens/per_second_update": batch.useful_tokens * 3 / 2.0,
        "flops/model": done, "flops/share_of_peak": pytest.approx(done / 1.5e9),
    }  # fmt: skip
    assert not any("flops" in name for name in work_metrics(batch, 300, seconds, (3, 2), None, 1e9))


@pytest.mark.draws
def test_a_run_of_schema_1_goes_on_in_schema_2(settings, tmp_path, monkeypatch):
    draw, pictures = report.write, []
    monkeypatch.setattr(report, "write", pictures.append)
    job = config_file.load(overrides={**settings, "steps": 2, "eval_every": 1})
    train(job)
    metrics = tmp_path / "run" / "metrics.jsonl"
    names = {new: old for old, new in report.OF_SCHEMA_1.items()}
    lines = [{names.get(key, key): value for key, value in line.items() if key != "num_tokens"} | {"schema": 1}
             for line in lines_of(metrics)]  # fmt: skip
    lines[-1] = {key: value for key, value in lines[-1].items() if "held_out" not in key}  # stopped in its evaluation
    metrics.write_text("".join(json.dumps(line) + "\n" for line in lines))
    summary = train(job.model_copy(update={"steps": 3}), resume=True)
    after = lines_of(metrics)
    assert [line["schema"] for line in after] == [1, 1, 2, 2] and "accuracy/held_out" in after[2]
    assert after[2]["step_time"] > lines[2]["time/step"] and "time/step" not in after[2]
    assert after[3]["num_tokens"] > 0 and "step" not in summary["time"]
    assert summary["tokens_generated"] == sum(line["tokens/generated"] for line in after[1:])
    draw(tmp_path / "run")
    assert len(pictures) == 2
