"""Heads as models have them: sharded, adapted, tied, padded, and the transforms of their logits."""

from types import SimpleNamespace

import pytest
import torch

import redit_fast as rf
from tests.ops.test_linear_loss import assert_right, exact_logp, head_oracle, leaves, oracle_gradients
from tests.tolerance import assert_gradient_no_worse

OPS = ("exp_product", "scale_in_place")


def calls(weight, bias=None):
    """Every op that takes a head."""
    hidden, targets, config = torch.randn(6, 8), torch.randint(9, (6,)), rf.LossConfig()
    yield lambda: rf.linear_logp(hidden, weight, targets, bias=bias)
    yield lambda: rf.linear_grpo_loss(hidden, weight, targets, torch.ones(1), bias=bias, config=config)
    yield lambda: rf.linear_grpo_loss_and_grad_(
        hidden, weight, targets, torch.ones(1), bias=bias, config=config, weight_grad=None
    )


@pytest.fixture(scope="module")
def mesh():
    """A process group of one rank, which FSDP2 shards over like any other."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def test_a_head_sharded_by_fsdp2_is_refused_by_name_and_what_the_message_names_works(mesh):
    from torch.distributed.fsdp import fully_shard

    module = torch.nn.Linear(8, 9)
    hidden, targets = torch.randn(6, 8), torch.randint(9, (6,))
    expected = rf.linear_logp(hidden, module.weight, targets).detach()
    fully_shard(module, mesh=mesh)
    for call in calls(module.weight):
        with pytest.raises(TypeError, match=r"weight is a DTensor .*Shard.*full_tensor\(\).*unshard\(\)"):
            call()
    for call in calls(torch.randn(9, 8), module.bias):
        with pytest.raises(TypeError, match="bias is a DTensor"):
            call()
    logp = rf.linear_logp(hidden, module.weight.full_tensor(), targets)
    logp.sum().backward()
    assert torch.equal(logp, expected) and module.weight.grad.full_tensor().abs().max() > 0
    module.unshard()
    assert torch.equal(rf.linear_logp(hidden, module.weight, targets), expected)


def test_a_zero3_partition_is_refused_naming_the_context_that_gathers_it():
    weight = torch.nn.Parameter(torch.empty(0))  # what DeepSpeed leaves of a parameter
    weight.ds_id, weight.ds_shape = 3, torch.Size((9, 8))
    for call in calls(weight):
        with pytest.raises(ValueError, match=r"weight is partitioned .*\(9, 8\).*deepspeed.zero.GatheredParameters"):
            call()
    weight.data = torch.randn(9, 8)  # inside the context
    for call in calls(weight):
        call()


def test_a_piece_of_fsdp1_is_refused_naming_what_gathers_it():
    weight = torch.nn.Parameter(torch.randn(36))  # what FSDP1 leaves of a (9, 8) on one of two ranks
    weight._fsdp_flattened = True
    for call in calls(weight):
        with pytest.raises(ValueError, match=r"weight is a piece of FSDP1's, got shape \(36,\).*summon_full_params"):
            call()


def test_a_weight_whose_storage_fsdp_has_freed_is_refused_instead_of_read():
    weight = torch.randn(9, 8)
    weight.untyped_storage().resize_(0)
    for call in calls(weight):
        with pytest.raises(ValueError, match="weight .* storage freed.*summon_full_params"):
            call()
    weight, bias = torch.randn(9, 8), torch.randn(9)
    bias.untyped_storage().resize_(0)
    with pytest.raises(ValueError, match="bias .* storage freed.*summon_full_params"):
        rf.linear_logp(torch.randn(3, 8), weight, torch.zeros(3, dtype=torch.int64), bias=bias)


def test_tied_embeddings_get_both_gradients(backend):
    ids = torch.randint(50, (3, 8))
    grads = []
    for dtype in (torch.float64, torch.float32, None):
        torch.manual_seed(1)
        embedding = torch.nn.Embedding(50, 16).to(dtype or torch.float32)
        hidden, targets, advantages = torch.tanh(embedding(ids[:, :-1])), ids[:, 1:], torch.tensor([1.0, -2.0, 0.5])
        if dtype:
            logp = torch.log_softmax(hidden @ embedding.weight.t(), -1).gather(-1, targets[..., None]).squeeze(-1)
            rf.policy_loss(logp, advantages, config=rf.LossConfig()).loss.backward()
        else:
            rf.linear_grpo_loss(hidden, embedding.weight, targets, advantages, config=rf.LossConfig()).loss.backward()
        grads.append(embedding.weight.grad)
    exact, low, found = grads
    assert_gradient_no_worse(found, low, exact)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_head_padded_beyond_the_vocabulary_is_passed_as_a_slice(backend, dtype):
    hidden, targets, advantages = torch.randn(20, 16).to(dtype), torch.randint(50, (20,)), torch.randn(20)
    ours = leaves(hidden, torch.randn(64, 16).to(dtype), torch.full((64,), 3.0, dtype=dtype))
    config = rf.LossConfig()
    rf.linear_grpo_loss(ours[0], ours[1][:50], targets, advantages, bias=ours[2][:50], config=config).loss.backward()

    def oracle_loss(x, w, b):
        return rf.policy_loss(head_oracle(x, w[:50], b[:50], targets)[0], advantages, config=config).loss

    logp, _ = exact_logp(ours[0], ours[1][:50], ours[2][:50], targets)
    assert (logp - exact_logp(*ours, targets)[0]).abs().mean() > 0.1  # the padding would count
    for kind, (x, right) in enumerate(zip(ours, oracle_gradients(oracle_loss, *ours))):
        assert x.grad.shape == x.shape
        assert_right(x.grad, right, kind)
    assert (ours[1].grad[50:] == 0).all() and (ours[2].grad[50:] == 0).all()


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"model_type": "qwen2"}, (1.0, None)),
        ({"model_type": "gemma2", "final_logit_softcapping": 30.0, "attn_logit_softcapping": 50.0}, (1.0, 30.0)),
        ({"model_type": "cohere", "logit_scale": 0.0625}, (0.0625, None)),
        ({"model_type": "granite", "logits_scaling": 8.0}, (0.125, None)),
        ({"model_type": "hyperclovax", "logits_scaling": 8.0}, (8.0, None)),
        ({"model_type": "falcon_h1", "lm_head_multiplier": 0.5}, (0.5, None)),
    ],
)
def test_logit_transforms_reads_every_known_field(config, expected):
    assert tuple(rf.logit_transforms(SimpleNamespace(**config)).values()) == expected
    assert tuple(rf.logit_transforms(SimpleNamespace(text_config=SimpleNamespace(**config))).values()) == expected


def test_logit_transforms_refuses_what_it_does_not_know():
    with pytest.raises(ValueError, match="logit_temperature"):
        rf.logit_transforms(SimpleNamespace(logit_temperature=2.0))


FAMILIES = {
    "gemma2": {},
    "gemma3_text": {"final_logit_softcapping": 12.0},
    "cohere": {},
    "cohere2": {},
    "granite": {"logits_scaling": 8.0},
    "falcon_h1": {"lm_head_multiplier": 0.4, "mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8,
                  "mamba_d_state": 8, "mamba_n_groups": 1, "mamba_chunk_size": 4},
}  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
def test_log_probs_are_those_of_the_hugging_face_model(family):
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(
        family, vocab_size=53, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, head_dim=8, pad_token_id=0, initializer_range=0.5, **FAMILIES[family],
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config).eval()
    tokens = torch.randint(1, 53, (2, 9))
    with torch.no_grad():
        logits = model(tokens).logits
        hidden = model.get_decoder()(tokens).last_hidden_state
    expected = torch.log_softmax(logits[:, :-1] / 0.7, -1).gather(-1, tokens[:, 1:, None]).squeeze(-1)
    transforms = rf.logit_transforms(model.config)
    weight = model.get_output_embeddings().weight
    logp = rf.linear_logp(hidden[:, :-1], weight, tokens[:, 1:], temperature=0.7, **transforms)
    torch.testing.assert_close(logp, expected, rtol=0, atol=1e-5)
    without = rf.linear_logp(hidden[:, :-1], weight, tokens[:, 1:], temperature=0.7)
    assert (without - expected).abs().max() > 0.01


def test_a_nested_text_config_gives_the_transforms_of_the_text_model():
    from transformers import AutoConfig

    nested = AutoConfig.for_model("gemma3", text_config={"final_logit_softcapping": 12.0})
    assert "text_config" in vars(nested)
    assert rf.logit_transforms(nested) == {"logit_scale": 1.0, "softcap": 12.0}
    assert rf.logit_transforms(AutoConfig.for_model("gemma3")) == {"logit_scale": 1.0, "softcap": None}
