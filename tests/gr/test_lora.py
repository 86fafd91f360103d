"""LoRA: GR perturbs and trains the adapters alone; what they are attached to does not change by a bit."""

import copy

import pytest
import torch

import redit_fast as rf

peft = pytest.importorskip("peft", reason="peft is not installed")


@pytest.fixture(scope="module")
def base():
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    return Qwen2ForCausalLM(
        Qwen2Config(vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
                    num_key_value_heads=2)
    ).bfloat16()  # fmt: skip


def with_adapters(base, dtype):
    torch.manual_seed(1)
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj", "up_proj"], init_lora_weights=False)
    model = peft.get_peft_model(copy.deepcopy(base), config, autocast_adapter_dtype=dtype == torch.float32)
    assert {p.dtype for name, p in model.named_parameters() if "lora" in name} == {dtype}
    return model


def state_of(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def changed(model, before):
    return {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("perturb", ["decoder_layers", "lora_"])
def test_only_the_adapters_move_and_the_base_keeps_its_bits(base, perturb, dtype):
    model = with_adapters(base, dtype)
    tokens = torch.randint(0, 32, (2, 8))
    opt = rf.RegularizedAdamW(rf.parameter_groups(model, perturb), lr=1e-2, gamma=1e-2, epsilon=1e-2)
    adapters = {name for name in model.state_dict() if "lora_" in name}
    for _ in range(2):
        before = state_of(model)
        model(tokens, labels=tokens).loss.backward()
        assert opt.perturb()
        assert set() < changed(model, before) <= adapters  # bfloat16 keeps a small step only here and there
        model(tokens, labels=tokens).loss.backward()
        opt.step()
        opt.zero_grad()
        assert changed(model, before) == adapters
    for name, value in base.state_dict().items():
        wrapped = [key for key in model.state_dict() if key.replace("base_layer.", "").endswith(name)]
        assert len(wrapped) == 1 and torch.equal(model.state_dict()[wrapped[0]], value)


def test_float32_adapters_take_the_published_step_that_bfloat16_ones_lose(base):
    """Adapters are a percent of the weights: float32 costs little, and no rounding swallows epsilon = 0.001."""
    cosines = {}
    for dtype in (torch.float32, torch.bfloat16):
        model = with_adapters(base, dtype)
        tokens = torch.randint(0, 32, (2, 8), generator=torch.Generator().manual_seed(0))
        opt = rf.RegularizedAdamW(rf.parameter_groups(model), rounding="nearest")
        model(tokens, labels=tokens).loss.backward()
        assert opt.perturb()
        opt.restore()
        if dtype == torch.bfloat16:
            with pytest.warns(UserWarning, match="float32 parameters"):
                cosines[dtype] = opt.metrics()["gr/step_cos"]
        else:
            cosines[dtype] = opt.metrics()["gr/step_cos"]
    assert cosines[torch.float32] > 0.99 and cosines[torch.bfloat16] < 0.9


def test_a_base_of_four_bits_is_left_alone(tmp_path):
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    from transformers import BitsAndBytesConfig, Qwen2Config, Qwen2ForCausalLM

    config = Qwen2Config(vocab_size=32, hidden_size=64, intermediate_size=64, num_hidden_layers=2,
                         num_attention_heads=2, num_key_value_heads=2)  # fmt: skip
    Qwen2ForCausalLM(config).save_pretrained(tmp_path)
    four_bits = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32)
    model = with_adapters(Qwen2ForCausalLM.from_pretrained(tmp_path, quantization_config=four_bits), torch.float32)
    tokens = torch.randint(0, 32, (2, 8))
    model(tokens)  # the first forward pass packs the scales for the CPU
    before = state_of(model)
    opt = rf.RegularizedAdamW(rf.parameter_groups(model), lr=1e-2, gamma=1e-2, epsilon=1e-2)
    model(tokens, labels=tokens).loss.backward()
    assert opt.perturb()
    model(tokens, labels=tokens).loss.backward()
    opt.step()
    assert {p.dtype for p in model.parameters()} == {torch.uint8, torch.float32}
    assert changed(model, before) == {name for name in before if "lora_" in name}
