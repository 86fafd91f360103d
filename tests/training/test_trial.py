"""What a run needs is tried before it writes anything: models of other designs, rewards, the data's answers."""

import gc
import json
import random
import re
import warnings

import pytest
import torch
import transformers
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, GenerationConfig
from transformers.cache_utils import DynamicLayer

import redit_fast as rf
from redit_fast.cli import main
from redit_fast.training import builtin, config_file, data, policy, rewards, setup, trial
from redit_fast.training.rewards.functions import numeric_answer
from tests.training.jobs import flags, lines_of

BASE = dict(hidden_size=32, num_hidden_layers=2, initializer_range=0.3, bos_token_id=None, pad_token_id=None)
ATTENTION = dict(intermediate_size=48, num_attention_heads=4, num_key_value_heads=2)
LINEAR = dict(
    **BASE, **ATTENTION, head_dim=8, layer_types=["linear_attention", "full_attention"], linear_num_value_heads=4,
    linear_num_key_heads=2, linear_key_head_dim=8, linear_value_head_dim=8,
)  # fmt: skip
EXPERTS = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, shared_expert_intermediate_size=16)
MAMBA = dict(mamba_n_heads=4, mamba_d_head=8, mamba_n_groups=1, mamba_d_state=8, mamba_chunk_size=8)
SUPPORTED = {
    "qwen3_next": {**LINEAR, **EXPERTS, "decoder_sparse_step": 1},
    "qwen3_5_text": LINEAR,
    "falcon_h1": {**BASE, **ATTENTION, **MAMBA, "head_dim": 8, "mamba_d_ssm": 32, "lm_head_multiplier": 2.0},
    "lfm2": {**BASE, **ATTENTION, "layer_types": ["conv", "full_attention"]},
    "mamba": {**BASE, "state_size": 8},
    "mamba2": {**BASE, "state_size": 8, "num_heads": 8, "head_dim": 8, "n_groups": 1, "chunk_size": 8},
    "jamba": {
        **BASE, **ATTENTION, "attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2,
        "expert_layer_offset": 1, "num_experts": 2, "mamba_d_state": 8, "mamba_dt_rank": 4,
    },
}  # fmt: skip
REFUSED = {
    "minimax": {**BASE, **ATTENTION, "head_dim": 8, "layer_types": ["linear_attention", "full_attention"],
                "num_local_experts": 2, "block_size": 8},
    "rwkv": {"hidden_size": 32, "num_hidden_layers": 2, "attention_hidden_size": 32, "context_length": 64},
}  # fmt: skip


def job_of(kind, sizes, settings, tmp_path):
    """A run of a random model of that kind, which ends half of its completions at each token."""
    _, tokenizer = builtin.build(0)
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[kind](vocab_size=len(tokenizer), **sizes))
    model.generation_config = GenerationConfig(eos_token_id=list(range(len(tokenizer) // 2)))
    model.save_pretrained(tmp_path / kind)
    tokenizer.save_pretrained(tmp_path / kind)
    return {**settings, "model": str(tmp_path / kind), "max_completion_length": 6, "prompts_per_step": 2}


@pytest.mark.parametrize("kind", SUPPORTED)
def test_models_with_recurrent_layers_train_on_padded_rows(kind, settings, tmp_path, capsys):
    assert main(["train", *flags(job_of(kind, SUPPORTED[kind], settings, tmp_path))]) == 0, capsys.readouterr().err
    assert "rows are padded, not packed: it keeps a state along the row" in capsys.readouterr().out
    metrics = lines_of(tmp_path / "run" / "metrics.jsonl")
    assert [line["step"] for line in metrics] == [0, 1, 2]
    for line in metrics[1:]:
        assert line["grad_norm"] > 0 and 1 < line["completions/mean_length"] < 6 and line["gr/step_cos"] > 0.5


@pytest.mark.parametrize("kind", REFUSED)
def test_other_designs_are_refused_by_name_before_anything_is_written(kind, settings, tmp_path, capsys):
    assert main(["train", *flags(job_of(kind, REFUSED[kind], settings, tmp_path))]) == 2
    errors = capsys.readouterr().err.strip().splitlines()
    assert f"({kind}) cannot be rolled out: " in errors[-1] and not (tmp_path / "run").exists()


def unpacked(kind, sizes, settings, tmp_path):
    """Why the trial pads the rows of a random model."""
    made = config_file.load(overrides={**job_of(kind, sizes, settings, tmp_path), "rewards": ["exact_answer"]})
    model, tokenizer = policy.load(made.model)
    function = rewards.RewardFunction("zero", lambda completions, **rest: [0.0] * len(completions))
    return trial.check(model, tokenizer, data.load(made, tokenizer), [function], rf.LossConfig(), made)


SINKS = {**BASE, **ATTENTION, "head_dim": 8, "num_local_experts": 2, "num_experts_per_tok": 1, "sliding_window": 4}
QWEN2 = {**BASE, **ATTENTION, "attention_dropout": 0.2}


@pytest.mark.parametrize(
    ("kind", "sizes", "why"),
    [
        ("qwen3_next", SUPPORTED["qwen3_next"], "a state along the row, in its layers of kind linear_attention"),
        ("lfm2", SUPPORTED["lfm2"], "a state along the row, in its layers of kind conv"),
        ("falcon_h1", SUPPORTED["falcon_h1"], "a state along the row"),
        ("gpt_oss", SINKS, "its attention has sinks"),
        ("qwen2", QWEN2, "it has dropout: model.layers.0.self_attn.attention_dropout is 0.2"),
    ],
)
def test_packing_is_refused_by_name_where_it_is_on_and_cannot_be(kind, sizes, why, settings, tmp_path, capsys):
    job = job_of(kind, sizes, settings, tmp_path)
    assert main(["train", *flags({**job, "packing": "on"})]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert "packing is on and model" in error and f"({kind}) needs padded rows: " in error and why in error
    assert not (tmp_path / "run").exists()
    if kind == "gpt_oss":
        assert main(["train", *flags({**job, "steps": 1})]) == 0
        assert why in capsys.readouterr().out


def test_log_probs_that_differ_are_found_where_nothing_else_tells(settings, tmp_path, monkeypatch):
    """Qwen3-Next runs on packed rows without an error. A state runs on from one sample into the next."""
    assert unpacked("qwen2", {**BASE, **ATTENTION}, settings, tmp_path) is None
    assert unpacked("qwen2", {**BASE, **ATTENTION}, {**settings, "packing": "off"}, tmp_path) == "packing is off"
    monkeypatch.setattr(trial, "refusal", lambda model: None)
    for kind in ("qwen3_next", "falcon_h1", "lfm2"):
        why = unpacked(kind, SUPPORTED[kind], settings, tmp_path)
        off = re.fullmatch(r"the log-probs of packed rows are (\S+) off those of padded ones", why)
        assert float(off[1]) > 0.05, why


def without_mask(monkeypatch):
    forward = transformers.Qwen2ForCausalLM.forward

    def ignores(self, *args, attention_mask=None, **options):
        return forward(self, *args, **options)

    monkeypatch.setattr(transformers.Qwen2ForCausalLM, "forward", ignores)


def with_mixed_rows(monkeypatch):
    reorder = DynamicLayer.reorder_cache
    monkeypatch.setattr(DynamicLayer, "reorder_cache", lambda self, rows: reorder(self, rows.flip(0)))


@pytest.mark.parametrize("break_it", [without_mask, with_mixed_rows])
def test_a_rollout_that_is_not_the_training_pass_is_refused(break_it, settings, tmp_path, capsys, monkeypatch):
    """As by a model that ignores its mask, or whose cache loses its rows: nothing raises."""
    break_it(monkeypatch)
    assert main(["train", *flags(settings)]) == 2
    assert "(qwen2) cannot be rolled out: with padding and a cache its hidden states are " in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_the_trial_leaves_everything_as_it_was(settings):
    made = config_file.load(overrides={**settings, "rewards": ["exact_answer"], "beta": 0.1})
    model, tokenizer = policy.load(made.model)
    model.train()
    function = rewards.RewardFunction("draws", lambda completions, **rest: [random.random(), None])
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    states = torch.get_rng_state(), random.getstate()
    trial.check(model, tokenizer, data.load(made, tokenizer), [function], rf.LossConfig(beta=0.1), made)
    assert torch.equal(states[0], torch.get_rng_state()) and states[1] == random.getstate()
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters()) and all(m.training for m in model.modules())
    assert not function.warned and not model.get_output_embeddings()._forward_pre_hooks


def test_the_trial_holds_one_gradient_at_a_time(settings):
    made = config_file.load(overrides={**settings, "rewards": ["exact_answer"]})
    model, tokenizer = policy.load(made.model)
    function = rewards.RewardFunction("zero", lambda completions, **rest: [0.0] * len(completions))
    params, there = list(model.parameters()), []
    for p in params:
        p.register_post_accumulate_grad_hook(lambda _: there.append(sum(p.grad is not None for p in params)))
    trial.check(model, tokenizer, data.load(made, tokenizer), [function], rf.LossConfig(), made)
    assert there == [1] * len(params)


FAILURES = {
    "raise KeyError('oops')": "KeyError",
    "return [1.0]": "returned 1 rewards for 2 samples",
    "return ['good'] * len(completions)": "'good'",
    "return ask()": "is asynchronous, needs one that returns a list",
}


@pytest.mark.parametrize("body", [*FAILURES, "async"])
def test_a_reward_that_fails_at_once_is_refused_before_anything_is_written(body, settings, tmp_path, capsys):
    start = "async def" if body == "async" else "def"
    last = "return [1.0] * len(completions)" if body == "async" else body
    file = tmp_path / f"mine{abs(hash(body))}.py"
    file.write_text(f"async def ask(): pass\n{start} judge(prompts, completions, **columns):\n    {last}\n")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert main(["train", *flags({**settings, "rewards": [f"{file.with_suffix('')}:judge"]})]) == 2
        gc.collect()
    assert not [w for w in caught if "never awaited" in str(w.message)]
    errors = capsys.readouterr().err.strip()
    assert "'judge'" in errors and FAILURES.get(body, "is asynchronous") in errors and len(errors.splitlines()) == 1
    assert not (tmp_path / "run").exists()


def test_a_shipped_reward_checks_its_column_in_the_whole_file(settings, problems, tmp_path, capsys, monkeypatch):
    def check_column(value):
        if value == "N/A":
            raise ValueError(f"the column 'answer' holds no number: {value!r}")

    monkeypatch.setattr(numeric_answer, "check_column", check_column, raising=False)
    lines = problems.read_text().splitlines()
    lines[36] = json.dumps({**json.loads(lines[36]), "answer": "N/A"})
    (tmp_path / "d.jsonl").write_text("\n".join(["", *lines]))  # the blank line counts
    job = {**settings, "data": str(tmp_path / "d.jsonl"), "rewards": ["xml_format", "numeric_answer"]}
    assert main(["train", *flags(job)]) == 2
    assert f"{tmp_path}/d.jsonl:38: the column 'answer' holds no number: 'N/A'" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
    assert main(["train", *flags({**job, "rewards": ["exact_answer"]})]) == 0


def test_what_the_passes_never_reach_is_frozen_and_in_the_decoder_refused_on_ranks(settings, tmp_path, monkeypatch):
    """DDP and FSDP2 wait for the gradient of every parameter that requires one."""
    made = config_file.load(overrides={**settings, "rewards": ["exact_answer"]})
    load = policy.load

    def with_tower(*args):
        model, tokenizer = load(*args)
        model.tower = torch.nn.Linear(2, 2)
        return model, tokenizer

    def with_unused(*args):
        model, tokenizer = load(*args)
        model.model.layers[0].unused = torch.nn.Linear(2, 2)
        return model, tokenizer

    for name, value in {"RANK": "0", "WORLD_SIZE": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(policy, "load", with_tower)
    model = setup.parts(made, None).model
    assert [p.requires_grad for p in model.tower.parameters()] == [False, False] and model.lm_head.weight.requires_grad
    monkeypatch.setattr(policy, "load", with_unused)
    with pytest.raises(ValueError, match="processes: 2 of its parameters, such as model.layers.0.unused.weight"):
        setup.parts(made, None)
    monkeypatch.delenv("RANK")
    assert setup.parts(made, None).why_padded is None
