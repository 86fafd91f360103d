"""`packing=True` in TRL's real trainers: log-probs, gradients and runs are those of the padded rows."""

import copy
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM

pytest.importorskip("trl", reason="TRL is not installed: its integration needs it")
pytest.register_assert_rewrite("tests.integrations.trl_trainers")  # imported below, and a plugin: its fixtures

from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer  # noqa: E402

from redit_fast.integrations.trl import ReditGRPOConfig, ReditGRPOTrainer, patch  # noqa: E402
from redit_fast.packing.attention import UnpackableError  # noqa: E402
from tests.integrations.trl_trainers import MODELS, logs  # noqa: E402
from tests.packing.models import BASE, model_of  # noqa: E402
from tests.tolerance import relative  # noqa: E402

pytest_plugins = ("tests.integrations.trl_trainers",)
pytestmark = pytest.mark.filterwarnings("ignore:.*pin_memory", "ignore:.*gradient_checkpointing")
VISION = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
          "image_size": 28}  # fmt: skip
TIMES = {"step_time", "train_runtime", "time/gr_pass2"}
GR = {"gr_gamma": 0.03, "gr_epsilon": 0.05}
RUNS = {
    "a KL term and GR": ({"beta": 0.1, "gradient_accumulation_steps": 2, **GR}, "qwen2"),
    "GR with the first pass's ratio": ({"loss_type": "grpo", "gr_pass2_ratio": "pass1", **GR}, "qwen2"),
    "iterations": ({"num_iterations": 2, "loss_type": "dr_grpo"}, "qwen2"),
    "one generation for two steps": ({"steps_per_generation": 2, "loss_type": "cispo", "beta": 0.1}, "gemma2"),
    "checkpointing": ({"gradient_checkpointing": True, "beta": 0.1, **GR}, "qwen2"),
    "checkpointing, reentrant": (
        {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
        "qwen2",
    ),
    "TRL's own head": ({"fused_head": False, "beta": 0.1}, "cohere"),
    "a bonus for entropy": ({"entropy_coef": 0.05, "top_entropy_quantile": 0.4, **GR}, "qwen2"),
    "a loss by the sequence": ({"importance_sampling_level": "sequence", "num_iterations": 2}, "cohere"),
}


def rows(seed=0):
    """A micro-batch: three prompts, of which two are one and the third begins like it; completions of 7, 1, 4 and 0
    scored tokens, one of a tool's among them."""
    draw = torch.Generator().manual_seed(seed)
    prompt_ids = torch.randint(5, 60, (4, 9), generator=draw)
    prompt_ids[1] = prompt_ids[0]
    prompt_ids[2, 3:7] = prompt_ids[0, :4]
    prompt_mask = torch.ones_like(prompt_ids)
    prompt_mask[2, :3] = 0
    completion_ids = torch.randint(5, 60, (4, 7), generator=draw)
    completion_mask = (torch.arange(7) < torch.tensor([[7], [1], [4], [0]])).long()
    tool_mask = torch.ones_like(completion_mask)
    tool_mask[0, 3] = 0
    return {"prompt_ids": prompt_ids, "prompt_mask": prompt_mask, "completion_ids": completion_ids,
            "completion_mask": completion_mask, "tool_mask": tool_mask, "num_items_in_batch": completion_mask.sum(),
            "advantages": torch.randn(4, generator=draw),
            "old_per_token_logps": -3 * torch.rand(4, 7, generator=draw),
            "ref_per_token_logps": -3 * torch.rand(4, 7, generator=draw)}  # fmt: skip


def logp_of(trainer, inputs, model, entropy):
    ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
    mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1)
    length = inputs["completion_ids"].shape[1]
    found = trainer._get_per_token_logps_and_entropies(model, ids, mask, length, compute_entropy=entropy)
    return torch.stack(found[: 1 + entropy]).detach()


def passed(trainer, inputs):
    """Log-probs and entropies of policy and reference model, and the policy's gradient."""
    trainer.model.train().zero_grad()
    trainer.current_gradient_accumulation_steps = 1
    trainer._compute_loss(trainer.model, inputs).backward()
    gradient = torch.cat([p.grad.flatten() for p in trainer.model.parameters() if p.grad is not None])
    logps = [logp_of(trainer, inputs, model, model is trainer.model) for model in (trainer.model, trainer.ref_model)]
    return *logps, gradient


def counted(model):
    """The tokens of each call of the model's embedding."""
    counts = []
    model.get_input_embeddings().register_forward_pre_hook(lambda _, inputs: counts.append(inputs[0].numel()))
    return counts


@pytest.mark.parametrize("loss", ["dapo", "vespo"])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kind", list(MODELS))
def test_log_probs_and_gradients_are_those_of_padded_rows(a_trainer, kind, checkpointing, loss):
    trainer = a_trainer(GRPOTrainer, GRPOConfig, kind, beta=0.1, loss_type=loss)
    if checkpointing:
        trainer.model.gradient_checkpointing_enable({"use_reentrant": False})
    for seed in range(2):
        inputs = rows(seed)
        expected = passed(trainer, inputs)
        with patch(trainer, packing=True):
            counts = counted(trainer.model)
            found = passed(trainer, copy.copy(inputs))
        # 9 tokens of the shared prompt and 2 of the third's, 6 + 0 + 3 of completions; the fourth row scores nothing
        assert counts == [9 + 2 + 6 + 3] * 2
        for ours, theirs in zip(found[:2], expected[:2]):
            assert ours.shape == theirs.shape and (ours - theirs).abs().max() < 1e-5 < theirs.abs().max()
        assert relative(found[2], expected[2]) < 1e-5
        trainer.model.get_input_embeddings()._forward_pre_hooks.clear()


def test_bfloat16_is_as_near_to_float32_as_that_of_padded_rows(a_trainer):
    """Under autocast, as TRL trains by default."""
    errors = []
    for packing in (False, True):
        options = {"packing": packing, "beta": 0.1, "learning_rate": 0.0}
        exact = a_trainer(ReditGRPOTrainer, ReditGRPOConfig, **options)
        rounded = a_trainer(ReditGRPOTrainer, ReditGRPOConfig, bf16=True, **options)
        found = [passed(trainer, rows(seed)) for trainer in (exact, rounded) for seed in range(4)]
        errors.append([
            torch.stack([theirs[i] - ours[i] for theirs, ours in zip(found[:4], found[4:])]).norm() for i in range(3)
        ])  # fmt: skip
    for padded, packed in zip(*errors):
        assert 0 < packed <= 1.25 * padded


def test_rows_of_which_none_is_scored_are_trls(a_trainer):
    trainer = a_trainer(ReditGRPOTrainer, ReditGRPOConfig, packing=True)
    inputs = rows()
    inputs["completion_mask"] = torch.zeros_like(inputs["completion_mask"])
    counts = counted(trainer.model)
    trainer.current_gradient_accumulation_steps = 1
    trainer._compute_loss(trainer.model.train(), inputs).backward()
    assert counts == [4 * 16]
    assert all(p.grad is not None and not p.grad.any() for p in trainer.model.parameters())


def test_a_mask_with_a_hole_is_refused(a_trainer):
    trainer = a_trainer(ReditGRPOTrainer, ReditGRPOConfig, packing=True)
    trainer.current_gradient_accumulation_steps = 1
    for name, place in (("prompt_mask", (0, 4)), ("completion_mask", (2, 1)), ("prompt_mask", (1,))):
        inputs = rows()
        inputs[name][place] = 0
        with pytest.raises(UnpackableError, match="prompts padded on the left, completions on the right"):
            trainer._compute_loss(trainer.model, inputs)
    inputs = rows() | {"token_type_ids": torch.zeros(4, 16, dtype=torch.int64)}
    with pytest.raises(UnpackableError, match="is for rows of text, these come with token_type_ids"):
        trainer._compute_loss(trainer.model, inputs)


@pytest.mark.parametrize("run", RUNS)
def test_a_run_is_that_of_padded_rows(a_trainer, run):
    options, kind = RUNS[run]
    padded = a_trainer(ReditGRPOTrainer, ReditGRPOConfig, kind, **options)
    start, counts = [p.detach().clone() for p in padded.model.parameters()], counted(padded.model)
    padded.train()
    packed = a_trainer(ReditGRPOTrainer, ReditGRPOConfig, kind, packing=True, **options)
    own, fewer = packed.model.config._attn_implementation, counted(packed.model)
    packed.train()
    assert sum(fewer) < sum(counts) and packed.model.config._attn_implementation == own != "redit_fast"
    moved = 0
    for p, q, before in zip(packed.model.parameters(), padded.model.parameters(), start):
        assert torch.allclose(p, q, rtol=0, atol=1e-5)
        moved = max(moved, (q - before).abs().max().item())
    assert moved > 1e-3
    for ours, theirs in zip(logs(packed), logs(padded)):
        assert set(ours) == set(theirs)
        for name in set(ours) - TIMES:
            assert ours[name] == pytest.approx(theirs[name], rel=1e-4, abs=1e-5, nan_ok=True), name


def test_rloo_and_adapters_are_packed_too_and_a_patch_leaves_nothing(a_trainer):
    peft = pytest.importorskip("peft", reason="PEFT is not installed: LoRA needs it")
    lora = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    for peft_config in (None, lora):
        stock = a_trainer(RLOOTrainer, RLOOConfig, peft=peft_config, beta=0.1)
        counts = counted(stock.model)
        stock.train()
        trainer = a_trainer(RLOOTrainer, RLOOConfig, peft=peft_config, beta=0.1)
        before, fewer = [vars(module).get("forward") for module in trainer.model.modules()], counted(trainer.model)
        with patch(trainer, packing=True, fused_head=False):
            trainer.train()
        assert [vars(module).get("forward") for module in trainer.model.modules()] == before
        assert sum(fewer) < sum(counts)
        for p, q in zip(trainer.model.parameters(), stock.model.parameters()):
            assert torch.allclose(p, q, rtol=0, atol=1e-5)


def test_what_cannot_be_packed_is_refused_by_name(a_trainer, folders, tokenizer, tmp_path, monkeypatch):
    peft = pytest.importorskip("peft", reason="PEFT is not installed: LoRA needs it")

    def refused(words, trainer):
        before = [vars(module).get("forward") for module in trainer.model.modules()]
        training = trainer.model.training
        with pytest.raises(ValueError, match=f"^packing=True does not work with model .*: {words}"):
            with patch(trainer, packing=True, gr_gamma=0.1):
                pass
        assert type(trainer) is GRPOTrainer and trainer.model.training == training
        assert [vars(module).get("forward") for module in trainer.model.modules()] == before

    dropout = peft.LoraConfig(r=4, target_modules=["q_proj"], lora_dropout=0.1)
    refused(r"it has dropout: .*lora_dropout.default.p is 0.1", a_trainer(GRPOTrainer, GRPOConfig, peft=dropout))
    prompts = peft.PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM")
    refused("its adapter puts tokens of its own before", a_trainer(GRPOTrainer, GRPOConfig, peft=prompts))
    refused("torch_compile=True compiles", a_trainer(GRPOTrainer, GRPOConfig, torch_compile=True))
    for flag, words in {"is_fsdp_enabled": "FSDP shards it", "is_deepspeed_enabled": "DeepSpeed shards it"}.items():
        trainer = a_trainer(GRPOTrainer, GRPOConfig)
        setattr(trainer, flag, True)
        refused(f"{words}, use DDP or one device", trainer)
    trainer = a_trainer(GRPOTrainer, GRPOConfig)
    trainer.model.hf_device_map = {"model.embed_tokens": "cpu", "model.layers": 0}
    refused("it is on several devices", trainer)
    by_name = "packing=True does not work beside unsloth"
    with monkeypatch.context() as patched, pytest.raises(ValueError, match=by_name):
        patched.setitem(sys.modules, "unsloth", torch)
        with patch(a_trainer(GRPOTrainer, GRPOConfig), packing=True):
            pass
    with pytest.raises(ValueError, match="has dropout"):  # while the trainer is built
        a_trainer(ReditGRPOTrainer, ReditGRPOConfig, peft=dropout, packing=True)
    sizes = {"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id,
             "eos_token_id": tokenizer.eos_token_id}  # fmt: skip
    for kind, words in {
        # whose learned positions TRL counts from the padding on
        "gpt2": r"the log-probs of packed rows are [0-9.e-]+ off those of padded ones",
        "lfm2": "it keeps a state along the row, in its layers of kind conv",
        "bloom": "its layers do not take their attention from transformers' registry",
        "gpt_oss": "its attention has sinks",
        "mixtral": "the loss of its router counts the tokens of every row: set router_aux_loss_coef to 0",
        "qwen3_moe": "the loss of its router counts the tokens of every row: set router_aux_loss_coef to 0",
        "gemma3": "it reads more than text",
    }.items():
        own = {
            "lfm2": {"layer_types": ["conv", "full_attention"]},
            "gpt_oss": {"router_aux_loss_coef": 0.0},
            "qwen3_moe": {"num_experts": 4, "output_router_logits": True, "moe_intermediate_size": 16},
            "gemma3": {"text_config": BASE | sizes, "vision_config": VISION},
        }.get(kind, {})
        model_of(kind, **sizes, **own).save_pretrained(tmp_path / kind)
        tokenizer.save_pretrained(tmp_path / kind)
        monkeypatch.setitem(folders, kind, tmp_path / kind)
        monkeypatch.setitem(MODELS, kind, (AutoModelForCausalLM, None, None))
        refused(words, a_trainer(GRPOTrainer, GRPOConfig, kind))
