"""Tiny models, a tokenizer and TRL's real trainers around them, as fixtures; imports TRL."""

import pytest
import torch
from datasets import Dataset
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    PrinterCallback,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from redit_fast.training import builtin

GROUP = 4
MODELS = {
    "qwen2": (Qwen2ForCausalLM, Qwen2Config, {"tie_word_embeddings": True}),
    "untied": (Qwen2ForCausalLM, Qwen2Config, {"tie_word_embeddings": False}),
    "gemma2": (Gemma2ForCausalLM, Gemma2Config, {"final_logit_softcapping": 0.7, "head_dim": 8}),
    "cohere": (CohereForCausalLM, CohereConfig, {"logit_scale": 0.5}),
}


@pytest.fixture(scope="session")
def tokenizer():
    return builtin.build(0)[1]


@pytest.fixture(scope="session")
def folders(tokenizer, tmp_path_factory):
    """Every model on disk, where TRL's reference model comes from."""
    folders = {}
    for kind, (cls, config, options) in MODELS.items():
        torch.manual_seed(0)
        folders[kind] = tmp_path_factory.mktemp(kind)
        sizes = {"vocab_size": len(tokenizer), "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
                 "num_attention_heads": 2, "num_key_value_heads": 1, "initializer_range": 0.2, "bos_token_id": None,
                 "pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}  # fmt: skip
        cls(config(**sizes, **options)).save_pretrained(folders[kind])
    return folders


def even_ids(completion_ids, **_):
    """Of a few values only, as rewards in RL are."""
    return [round(4 * sum(i % 2 == 0 for i in ids) / len(ids)) / 4 for ids in completion_ids]


def new_trainer(tokenizer, folder, out, cls, config, kind="qwen2", rewards=even_ids, steps=3, peft=None, **options):
    usual = {"learning_rate": 0.1, "optim": "sgd", "lr_scheduler_type": "constant", "max_steps": steps,
             "per_device_train_batch_size": 2 * GROUP, "num_generations": GROUP, "max_completion_length": 6,
             "logging_steps": 1, "save_strategy": "no", "report_to": "none", "use_cpu": True, "bf16": False,
             "disable_tqdm": True, "gradient_checkpointing": False, "max_grad_norm": 0.5}  # fmt: skip
    prompts = [record["prompt"][:30] for record in builtin.records(12, held_out=False, seed=0)]
    data = Dataset.from_list([{"prompt": prompt} for prompt in prompts])
    trainer = cls(
        MODELS[kind][0].from_pretrained(folder),
        rewards,
        args=config(output_dir=str(out), **(usual | options)),
        train_dataset=data,
        eval_dataset=data.select(range(2)),
        processing_class=tokenizer,
        peft_config=peft,
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


@pytest.fixture
def a_trainer(tokenizer, folders, tmp_path, monkeypatch):
    """Train each before the next is built: TRL seeds the process when it builds a trainer."""
    monkeypatch.setenv("CI", "1")  # TRL sends telemetry otherwise

    def build(cls, config, kind="qwen2", **options):
        return new_trainer(tokenizer, folders[kind], tmp_path, cls, config, kind, **options)

    return build


def logs(trainer):
    return [entry for entry in trainer.state.log_history if "loss" in entry]


def clipped_inputs(length, masks, beta):
    """A micro-batch of `_compute_loss`: completions of `length` tokens whose ratio is below 1 by far, with negative
    advantages; one row of `masks` a sequence."""
    draw = torch.Generator().manual_seed(3)
    mask = torch.tensor(masks)
    ids = torch.randint(5, 60, (len(mask), length + 3), generator=draw)
    inputs = {"prompt_ids": ids[:, :3], "prompt_mask": torch.ones_like(ids[:, :3]), "completion_ids": ids[:, 3:],
              "completion_mask": mask, "advantages": -torch.ones(len(mask)), "num_items_in_batch": mask.sum(),
              "old_per_token_logps": torch.zeros(mask.shape)}  # fmt: skip
    return inputs | ({"ref_per_token_logps": -2 * torch.ones(mask.shape)} if beta else {})


def logged(trainer, cls, inputs):
    """What the `_compute_loss` of `cls` logs."""
    trainer._metrics["train"].clear()
    trainer.current_gradient_accumulation_steps = 1
    cls._compute_loss(trainer, trainer.model.train(), inputs)
    return {name: values[-1] for name, values in trainer._metrics["train"].items()}
