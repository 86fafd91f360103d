"""The learned reward, `model:PATH`: its scores, packed and padded, what it sees, and what cannot score."""

import json
import math
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import CONFIG_MAPPING, AutoModelForSequenceClassification

from redit_fast.cli import main
from redit_fast.packing.attention import attending
from redit_fast.training import builtin, config_file, policy, rewards
from redit_fast.training.rewards.model import RewardModel, check, load, scores, tokens_of
from redit_fast.training.trainer import train
from tests.packing.models import BASE, FAMILIES
from tests.training.jobs import flags, lines_of

CHAT = "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}"


def scorer(kind, **more):
    torch.manual_seed(0)
    config = CONFIG_MAPPING[kind](**{**BASE, **FAMILIES[kind], "pad_token_id": 0, "num_labels": 1, **more})
    return AutoModelForSequenceClassification.from_config(config).eval()


def sequences(seed=0):
    """Twelve with four beginnings, of 14 to 40 tokens, and one that another goes on from."""
    generator = torch.Generator().manual_seed(seed)

    def draw(count):
        return torch.randint(1, 97, (count,), generator=generator).tolist()

    beginnings = [draw(n) for n in (12, 15, 9, 20)]
    found = [beginning + draw(n) for beginning in beginnings for n in (2, 11, 20)]
    return [*found, found[5][:-4]]


@pytest.mark.parametrize("kind", ["qwen2", "llama", "mistral", "gemma2", "gpt2"])
def test_scores_of_packed_rows_are_those_of_padded_ones_and_the_models_own(kind):
    model, ids = scorer(kind), sequences()
    assert check(model, "auto") is None and check(model, "off") == "packing is off"
    with torch.no_grad():
        own = torch.cat([model(torch.tensor([row])).logits[:, 0] for row in ids])
    assert own.std() > 0.05
    for budget in (10, 100, 10_000):
        for packed in (True, False):
            assert (scores(model, ids, budget, packed) - own).abs().max() < 1e-5
    assert scores(model, [], 100, True).shape == (0,)


def test_what_sequences_share_is_computed_once(monkeypatch):
    model, ids, computed = scorer("llama"), sequences()[:3], []
    model.model.embed_tokens.register_forward_hook(lambda _, inputs, out: computed.append(inputs[0].numel()))
    for packed in (True, False):
        scores(model, ids, 10_000, packed)
    own = 2 + 11 + 20
    assert computed[0] == 12 + own and sum(computed[1:]) == 3 * 12 + own  # so unlike that none is padded


def test_a_model_that_cannot_be_packed_is_padded_and_says_why():
    assert "dropout" in check(scorer("gpt2", attn_pdrop=0.1), "auto")
    model = scorer("llama")
    forward = type(model.model.layers[0].self_attn).forward

    def without_segments(self, *args, segments=None, **others):
        return forward(self, *args, **others)

    for layer in model.model.layers:
        layer.self_attn.forward = without_segments.__get__(layer.self_attn)
    assert "do not hand the decoder's arguments to their attention" in check(model, "auto")


def test_a_model_whose_own_score_is_another_is_refused():
    model = scorer("llama")
    model.score.register_forward_hook(lambda _, inputs, out: 2 * out if inputs[0].dim() == 3 else out)
    with pytest.raises(ValueError, match="its own scores of two texts are .* off those of its layer `score`"):
        check(model, "auto")


def test_padding_tokens_at_the_end_are_left_out_as_in_transformers(reward_folder):
    """Also where the end of a template is one."""
    model, tokenizer = load(str(reward_folder))
    pad = tokenizer.pad_token
    assert model.config.pad_token_id == tokenizer.pad_token_id
    text = "Ada has 3 coins."
    ids = tokens_of(tokenizer, model, text, f" 7{pad}{pad}")
    assert ids == tokenizer(f"{text} 7")["input_ids"]
    with torch.no_grad():
        own = model(torch.tensor([tokenizer(f"{text} 7{pad}{pad}")["input_ids"]])).logits[0]
    assert scores(model, [ids], 100, True).item() == pytest.approx(own.item(), abs=1e-5)


def test_text_is_joined_and_messages_go_through_the_template(reward_folder):
    model, tokenizer = load(str(reward_folder))
    answer = [{"role": "assistant", "content": "It is 7."}]
    asked = [{"role": "user", "content": "3+4?"}]
    opened = [*asked, {"role": "assistant", "content": "Well. "}]

    def read(prompt, completion):
        return tokenizer.decode(tokens_of(tokenizer, model, prompt, completion))

    assert read("3+4? ", "It is 7.") == "3+4? It is 7."
    assert read(asked, answer) == "3+4?\n\nIt is 7." and read(opened, answer) == "3+4?\n\nWell. It is 7."
    tokenizer.chat_template = CHAT
    assert read(asked, answer) == "<user>3+4?\n<assistant>It is 7.\n"
    assert read(opened, answer) == "<user>3+4?\n<assistant>Well. It is 7.\n"
    assert opened[1]["content"] == "Well. "


@pytest.fixture(scope="module")
def reward_folder(model_folder, tmp_path_factory):
    """A reward model of the demo's, whose score layer is random."""
    folder = tmp_path_factory.mktemp("judges") / "helpful"
    model, tokenizer = load(str(model_folder), seed=0)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_a_run_is_paid_what_the_model_scores(settings, reward_folder, tmp_path):
    """Its name in the metrics is the folder's."""
    job = {**settings, "rewards": [f"model:{reward_folder}"], "steps": 2}
    train(config_file.load(overrides=job))
    model, tokenizer = load(str(reward_folder))
    lines = lines_of(tmp_path / "run" / "completions.jsonl")
    ids = [tokens_of(tokenizer, model, line["prompt"], line["completion"]) for line in lines]
    expected = scores(model, ids, 100, packed=False)
    found = torch.tensor([line["rewards"]["helpful"] for line in lines])
    assert expected.std() > 1e-3 and (found - expected).abs().max() < 1e-5
    metrics = lines_of(tmp_path / "run" / "metrics.jsonl")
    means = [line["rewards/helpful/mean"] for line in metrics[1:]]
    assert means == pytest.approx(found.view(2, -1).mean(1).tolist(), abs=1e-6)
    assert math.isfinite(metrics[0]["rewards/helpful/held_out"])
    inputs = json.loads((tmp_path / "run" / "inputs.json").read_text())
    assert str(reward_folder / "model.safetensors") in inputs["reward model"]


def test_another_reward_model_is_refused_on_resume(settings, reward_folder, tmp_path, capsys):
    judge = shutil.copytree(reward_folder, tmp_path / "judge")
    job = {**settings, "rewards": [f"model:{judge}"], "steps": 1}
    train(config_file.load(overrides=job))
    weights = load_file(judge / "model.safetensors")
    save_file({name: tensor + 1 for name, tensor in weights.items()}, judge / "model.safetensors", {"format": "pt"})
    assert main(["train", *flags({**job, "steps": 2}), "--resume"]) == 2
    assert f"reward model {judge / 'model.safetensors'} has changed since" in capsys.readouterr().err


def config_with(settings, **more):
    return config_file.load(overrides={**settings, **more})


def test_what_is_longer_than_the_context_or_beyond_the_embedding_is_unscored(settings, reward_folder, tmp_path):
    short = shutil.copytree(reward_folder, tmp_path / "short")
    described = json.loads((short / "config.json").read_text())
    (short / "config.json").write_text(json.dumps({**described, "max_position_embeddings": 40}))
    reward = RewardModel(str(short), config_with(settings))
    ids = [reward.tokenizer.decode([i]) for i in range(300, 310)]
    texts = ["7", " ".join(ids * 8), "8"]
    found = reward(["Ada has 3 coins."] * 3, texts)
    assert found[1] is None and isinstance(found[0], float) and found[0] != found[2]
    (function,) = rewards.resolve([f"model:{short}"], [], config_with(settings))
    with pytest.warns(UserWarning, match="'short' left 1 of 3 samples unscored"):
        scored = rewards.score([function], ["Ada has 3 coins."] * 3, texts, {})
    assert scored[:, 0].isnan().tolist() == [False, True, False]
    reward.check_prompt("Ada has 3 coins.")
    with pytest.raises(ValueError, match="leaves no room for a completion in the context of 40 tokens of reward model"):
        reward.check_prompt(texts[1])
    reward.tokenizer.add_special_tokens({"extra_special_tokens": ["<image>"]})
    assert reward(["<image>"], ["7"]) == [None]
    with pytest.raises(ValueError, match="'<image>'"):
        reward.check_prompt("<image>")


def test_a_prompt_that_leaves_no_room_stops_the_start_with_its_line(settings, reward_folder, tmp_path, capsys):
    short = shutil.copytree(reward_folder, tmp_path / "short")
    described = json.loads((short / "config.json").read_text())
    (short / "config.json").write_text(json.dumps({**described, "max_position_embeddings": 30}))
    assert main(["train", *flags({**settings, "rewards": [f"model:{short}"]})]) == 2
    said = capsys.readouterr().err
    assert f"{settings['data']}:1: the prompt has " in said and "leaves no room" in said and said.count("\n") == 1
    assert not (tmp_path / "run").exists()


def two_labels(folder):
    weights = load_file(folder / "model.safetensors")
    weights["score.weight"] = weights["score.weight"].repeat(2, 1)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    described = json.loads((folder / "config.json").read_text())
    labels = {"id2label": {"0": "bad", "1": "good"}, "label2id": {"bad": 0, "good": 1}}
    (folder / "config.json").write_text(json.dumps({**described, **labels}))


def pickled(folder):
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def without_tokenizer(folder):
    for path in folder.glob("tokenizer*"):
        path.unlink()


def encoder(folder):
    shutil.rmtree(folder)
    shape = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    config = CONFIG_MAPPING["bert"](vocab_size=500, num_labels=1, **shape)
    AutoModelForSequenceClassification.from_config(config).save_pretrained(folder)
    builtin.build(0)[1].save_pretrained(folder)


def described_with(**more):
    def damage(folder):
        described = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**described, **more}))

    return damage


BAD = {
    "another hidden size": (described_with(hidden_size=32), "config.json does not fit the weights: "),
    "no context": (described_with(max_position_embeddings=1), "max_position_embeddings 1, a reward model needs 2"),
    "two labels": (two_labels, "has 2 labels, a reward model needs one"),
    "pickled": (pickled, "holds no .safetensors weights; pickled weights (.bin, .pt) are refused"),
    "no tokenizer": (without_tokenizer, "has no tokenizer, or one without tokens"),
    "encoder": (encoder, "a BertForSequenceClassification has no linear layer `score` on its last token"),
    "gone": (shutil.rmtree, "no such folder"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_folder_that_cannot_score_is_one_sentence(settings, reward_folder, tmp_path, capsys, name):
    damage, sentence = BAD[name]
    folder = shutil.copytree(reward_folder, tmp_path / "judge")
    damage(folder)
    assert main(["train", *flags({**settings, "rewards": [f"model:{folder}"]})]) == 2
    said = capsys.readouterr().err
    assert sentence in said and str(folder) in said and said.count("\n") == 1 and said.startswith("redit-fast: ")
    assert not (tmp_path / "run").exists()


def test_a_language_model_is_no_reward_model(settings, tmp_path, capsys):
    assert main(["train", *flags({**settings, "rewards": [f"model:{settings['model']}"]})]) == 2
    said = capsys.readouterr().err
    assert "has no score layer, it is a language model: `redit-fast reward-model` makes a reward model" in said
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("command", ["train", "eval"])
def test_a_reward_model_and_a_runs_folder_are_no_language_models(settings, reward_folder, tmp_path, capsys, command):
    (tmp_path / "old" / "checkpoints").mkdir(parents=True)
    own = ["--data", settings["data"], "--rewards", *settings["rewards"]]
    for folder, said in (
        (reward_folder, "is a reward model, no language"),
        (tmp_path / "old", "is a run's folder: give"),
    ):
        place = ["--model", str(folder), "--out-dir", str(tmp_path)] if command == "train" else [str(folder)]
        assert main([command, *place, *own]) == 2
        error = capsys.readouterr().err
        assert said in error and error.count("\n") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["old"]


def test_a_fresh_score_layer_is_the_seeds_and_all_else_the_models(model_folder):
    (one, _), (same, _), (other, _) = (load(str(model_folder), seed=seed) for seed in (1, 1, 2))
    assert torch.equal(one.score.weight, same.score.weight) and not torch.equal(one.score.weight, other.score.weight)
    width = one.score.weight.shape[1]
    assert one.score.weight.std().item() == pytest.approx((width + 1) ** -0.5, rel=0.3)
    base, _ = policy.load(model_folder)
    assert all(torch.equal(a, b) for a, b in zip(base.model.parameters(), one.model.parameters(), strict=True))


def test_the_attention_is_the_models_own_again(reward_folder):
    model, _ = load(str(reward_folder))
    before = model.config._attn_implementation
    scores(model, sequences(), 100, True)
    assert model.config._attn_implementation == before
    with attending(model):
        assert model.config._attn_implementation != before
