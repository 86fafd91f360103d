"""Tiny random models of many families, and steps of samples whose prompts share a beginning."""

import copy

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

import redit_fast as rf
from redit_fast.packing.plan import Budget
from redit_fast.training.batch import Batch

BASE = dict(
    vocab_size=97, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    intermediate_size=48, max_position_embeddings=128, initializer_range=0.2, pad_token_id=None, bos_token_id=None,
    eos_token_id=None,
)  # fmt: skip
WINDOW = {"sliding_window": 7}  # shorter than the prompts' shared part
SCALED = {"head_dim": 8, "query_pre_attn_scalar": 8}
NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
FAMILIES = {
    "qwen2": {"use_sliding_window": True, "max_window_layers": 1, "tie_word_embeddings": True, **WINDOW},
    "qwen3": {"head_dim": 8},
    "llama": {"tie_word_embeddings": True},
    "mistral": WINDOW,
    "gemma2": {**WINDOW, **SCALED, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 5.0},
    "gemma3_text": {**WINDOW, **SCALED},
    "phi3": WINDOW,
    "olmo2": {},
    "smollm3": {},
    "glm4": {"head_dim": 8},
    "cohere2": {**WINDOW, "logit_scale": 0.5},
    "starcoder2": WINDOW,
    "gpt2": NO_DROPOUT,
    "gpt_neox": {},
    "granite": {"logits_scaling": 2.0, "attention_multiplier": 0.4},
}

WHOLE = Budget(samples=15)  # one micro-batch, padded too


def model_of(kind, **more):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(CONFIG_MAPPING[kind](**{**BASE, **FAMILIES.get(kind, {}), **more}))


def batch_of(settings=None, packed=True, budget=WHOLE, samples=range(15), model=None, seed=0):
    """Five prompts of three samples each: three begin with nine tokens, one with four of those; two completions have
    one token."""
    if settings is None:
        settings = rf.LossConfig(**(rf.logit_transforms(model.config) if model is not None else {}))
    generator = torch.Generator().manual_seed(seed)

    def draw(count):
        return torch.randint(1, 97, (count,), generator=generator).tolist()

    system = draw(9)
    prompts = [system + draw(5), system + draw(3), system + draw(3), draw(12), system[:4] + draw(9)]
    prompts = [prompt for prompt in prompts for _ in range(3)]
    lengths = torch.randint(2, 20, (15,), generator=generator).tolist()
    lengths[1] = lengths[4] = 1
    completions = [draw(length) for length in lengths]
    advantages = torch.randn(15, generator=generator)
    chosen = list(samples)
    return Batch(
        [prompts[i] for i in chosen], [completions[i] for i in chosen], advantages[chosen], settings,
        budget, packed, 0, 0,
    )  # fmt: skip


def gradient(model):
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def exact_logp(model, batch):
    """In float64, each sample alone, from the model's own logits."""
    exact = copy.deepcopy(model).double()
    with torch.no_grad():
        logps = [
            torch.log_softmax(exact(ids[None]).logits[0, :-1], -1).gather(1, ids[1:, None])[-length:, 0]
            for ids, length in zip(batch.sequences, batch.lengths)
        ]
    return torch.cat(logps)
