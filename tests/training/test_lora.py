"""LoRA by `redit-fast train`: what is trained, its checkpoints, going on, merging."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from redit_fast.cli import main
from redit_fast.training import checkpoint as checkpoint_files
from redit_fast.training import config_file, lora, merge, policy, report, setup, trainer
from redit_fast.training.config import TrainConfig
from tests.training.jobs import flags, lines_of

peft = pytest.importorskip("peft", reason="peft is not installed: LoRA needs it")
LINEAR = ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]
LORA = {"lora_rank": 4, "beta": 0.05, "packing": "on", "eval_problems": 0, "checkpoint_every": 1, "eval_every": 3}
pytestmark = pytest.mark.filterwarnings("ignore:beta is")


@pytest.fixture(scope="module", autouse=True)
def without_reports():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report, "write", lambda run: None)
        yield


def job(base, out, **more):
    rewards = [f"redit_fast.training.builtin:{name}" for name in ("correct_answer", "right_steps")]
    return {
        "model": str(base), "rewards": rewards, "out_dir": str(out), "prompts_per_step": 3, "group_size": 4,
        "max_completion_length": 12, "learning_rate": 1e-2, "gr_gamma": 0.1, "gr_epsilon": 0.1, **LORA, **more,
    }  # fmt: skip


def trained(base, problems, out, **more):
    made = job(base, out, data=str(problems), name="run", **more)
    trainer.train(
        config_file.load(overrides={k: v for k, v in made.items() if k != "resume"}), resume=more.get("resume", 0)
    )
    return out / "run"


@pytest.fixture(scope="module")
def base(tmp_path_factory, model_folder):
    return shutil.copytree(model_folder, tmp_path_factory.mktemp("base") / "model")


@pytest.fixture(scope="module")
def run(base, problems, tmp_path_factory):
    return trained(base, problems, tmp_path_factory.mktemp("lora"), steps=2)


@pytest.fixture(scope="module")
def checkpoint(run):
    return run / "checkpoints/step-000002"


def logp_of(model):
    with torch.no_grad():
        return model(torch.arange(20, device="cpu")[None]).logits.log_softmax(-1)


def test_adapters_alone_are_trained_and_a_checkpoint_is_peft_s(base, run, checkpoint):
    names = {path.name for path in checkpoint.iterdir()}
    assert {"adapter_model.safetensors", "adapter_config.json", "base.json", "optimizer.safetensors"} <= names
    assert "model.safetensors" not in names and "tokenizer.json" in names
    first, last = (load_file(run / f"checkpoints/step-00000{n}/adapter_model.safetensors") for n in (0, 2))
    model, _ = policy.load(base)
    assert len(last) == 2 * len(LINEAR) * model.config.num_hidden_layers
    for name, tensor in last.items():
        assert tensor.dtype == torch.float32 and not torch.equal(tensor, first[name]), name
        assert first[name].any() == name.endswith("lora_A.weight")
    stored = json.loads((checkpoint / "base.json").read_text())
    assert stored["model"] == str(base) and set(stored["content"]) == {"model.safetensors", "config.json"}
    lines = lines_of(run / "metrics.jsonl")
    assert lines[1]["kl"] == pytest.approx(0, abs=1e-7) and lines[2]["kl"] > 1e-4
    assert lines[2]["gr/step_cos"] > 0.9 and lines[2]["grad_norm"] > 1e-3
    adapted = peft.PeftModel.from_pretrained(policy.load(base)[0], str(checkpoint)).eval()
    assert (logp_of(adapted) - logp_of(model.eval())).abs().max() > 1e-2


def test_merged_is_unmerged(base, checkpoint, tmp_path, capsys):
    assert main(["merge", str(checkpoint), str(tmp_path / "merged")]) == 0
    assert capsys.readouterr().out.split() == [str(tmp_path / "merged")]
    merged, tokenizer = policy.load(tmp_path / "merged")
    assert not hasattr(merged, "peft_config") and len(tokenizer)
    unmerged, _ = policy.load(base)
    made = config_file.load(overrides=job(base, tmp_path, data="-"))
    lora.attach(unmerged, made, lora.base_of(str(base)))
    fresh = logp_of(unmerged.eval())
    lora.load(checkpoint, unmerged, lora.base_of(str(base)))
    assert {p.requires_grad for name, p in unmerged.named_parameters() if "lora_" not in name} == {False}
    torch.testing.assert_close(logp_of(merged.eval()), logp_of(unmerged), rtol=0, atol=1e-5)
    assert (logp_of(unmerged) - fresh).abs().max() > 1e-2
    with lora.switched_off(unmerged):
        assert torch.equal(logp_of(unmerged), fresh)
    assert (logp_of(unmerged) - fresh).abs().max() > 1e-2
    assert all(p.requires_grad for name, p in unmerged.named_parameters() if "lora_" in name)


def test_it_goes_on_bit_by_bit(base, problems, run, tmp_path):
    trained(base, problems, tmp_path, steps=1)
    again = trained(base, problems, tmp_path, steps=2, resume=True)
    for file in ("adapter_model.safetensors", "optimizer.safetensors"):
        expected, found = (load_file(each / "checkpoints/step-000002" / file) for each in (run, again))
        assert all(torch.equal(found[name], value) for name, value in expected.items()), file


def test_another_base_is_refused_by_name(base, problems, checkpoint, tmp_path, capsys):
    other = shutil.copytree(base, tmp_path / "other")
    trained(other, problems, tmp_path, steps=1)
    resume = flags(job(other, tmp_path, data=str(problems), name="run", steps=2))
    weights = load_file(other / "model.safetensors")
    save_file({name: tensor * 1.5 for name, tensor in weights.items()}, other / "model.safetensors", {"format": "pt"})
    place = tmp_path / "run/checkpoints/step-000001"
    sentence = (
        f"redit-fast: checkpoint {place} holds adapters of model {other}, whose model.safetensors has changed since: "
        "on other weights they are another model, put back what it was"
    )
    for words in (["train", *resume, "--resume", "--accept-changed-inputs"], ["merge", str(place)]):
        assert main(words) == 2
        assert capsys.readouterr().err.splitlines()[-1] == sentence
    assert not (place.parent / "step-000001-merged").exists()
    assert main(["train", *resume, "--resume", "--model", str(base)]) == 2
    assert f"model was '{other}'" in capsys.readouterr().err
    shutil.rmtree(other)
    assert main(["train", *resume, "--resume"]) == 2
    assert capsys.readouterr().err.splitlines()[-1] == f"redit-fast: model {other}: no such folder"
    with pytest.raises(ValueError, match=f"adapters of model {other}, not of {base}"):
        lora.check_base(place, lora.base_of(str(base)))


def only(*names):
    def remove(folder):
        for path in folder.iterdir():
            if path.name not in names:
                path.unlink()

    return remove


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (
            lambda folder: (folder / "adapter_model.safetensors").unlink(),
            "is damaged (adapter_model.safetensors is missing)",
        ),
        (lambda folder: (folder / "base.json").write_text("[]"), "is damaged (base.json has changed)"),
        (only("model.safetensors", "state.json"), "is damaged (manifest.json is missing or unreadable)"),
        (only("adapter_config.json", "adapter_model.safetensors"), "base.json is missing or malformed"),
        (only("adapter_config.json"), "holds no adapters"),
        (
            lambda folder: save_file({"a": torch.ones(1)}, folder / "adapter_model.safetensors"),
            "step-000002 is damaged (adapter_model.safetensors has changed)",
        ),
        (lambda folder: shutil.rmtree(folder), "no such folder"),
        (lambda folder: folder.with_name("step-000002-merged").mkdir(), "is there already and stays as it is"),
    ],
)
def test_what_cannot_be_merged_is_one_sentence(checkpoint, tmp_path, capsys, damage, sentence):
    folder = shutil.copytree(checkpoint, tmp_path / "step-000002")
    damage(folder)
    assert main(["merge", str(folder)]) == 2
    error = capsys.readouterr().err
    assert sentence in error and len(error.splitlines()) == 1
    assert {path.name for path in tmp_path.iterdir()} <= {"step-000002", "step-000002-merged"}


def test_a_base_that_is_nested_too_deep_is_malformed(tmp_path):
    (tmp_path / lora.WEIGHTS).touch()
    (tmp_path / lora.BASE).write_text("[" * 100000)
    with pytest.raises(ValueError, match="base.json is missing or malformed"):
        lora.read_base(tmp_path)


def test_a_merged_model_that_cannot_be_written_is_named_and_leaves_nothing(checkpoint, tmp_path, capsys):
    for out in (tmp_path / "new" / ("a" * 300), checkpoint / "base.json/x"):
        assert main(["merge", str(checkpoint), str(out)]) == 2
        assert f"redit-fast: OUT {out}: it could not be written: " in capsys.readouterr().err
    assert main(["merge", str(checkpoint), ""]) == 2 and "OUT is empty, needs a name" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_adapters_are_no_start_model(checkpoint):
    with pytest.raises(ValueError, match="is an adapter, not a model; `redit-fast merge`"):
        policy.load(checkpoint)


def test_a_bfloat16_base_has_float32_adapters_and_merges_to_bfloat16(base, tmp_path):
    folder = shutil.copytree(base, tmp_path / "base")
    model, _ = policy.load(base, dtype="bfloat16")
    model.save_pretrained(folder)
    model, tokenizer = policy.load(folder, dtype="bfloat16")
    made = config_file.load(overrides=job(folder, tmp_path, data="-", lora_targets=["q_proj", "mlp.up_proj"]))
    own = lora.base_of(str(folder))
    lora.attach(model, made, own)
    adapters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert {p.dtype for p in adapters.values()} == {torch.float32} and model.dtype == torch.bfloat16
    assert {name.split(".")[-4] for name in adapters} == {"q_proj", "up_proj"}
    optimizer = setup.optimizer(made, model)
    (groups,) = optimizer.param_groups  # of the decoder layers, which GR perturbs
    assert groups["perturb"] and set(groups["params"]) == set(adapters.values())
    place = checkpoint_files.publish(
        checkpoint_files.write(tmp_path / "checkpoints", 1, model, tokenizer, optimizer, position=0, base=own)
    )
    merged = load_file(merge.merge(place) / "model.safetensors")
    assert {tensor.dtype for tensor in merged.values()} == {torch.bfloat16}


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        ({"lora_rank": 0}, "lora_rank: .*greater than or equal to 1"),
        ({"lora_rank": 4.0}, "lora_rank: .*needs an integer"),
        ({"lora_rank": True}, "lora_rank: .*truth value"),
        ({"lora_alpha": 0}, "lora_alpha: .*greater than or equal to 1"),
        ({"lora_alpha": 1.5}, "lora_alpha: .*needs an integer"),
        ({"lora_targets": []}, "lora_targets: .*at least 1"),
        ({"lora_targets": "q_proj"}, "lora_targets: .*list"),
        ({"lora_targets": [3]}, r"lora_targets\[0\]: got 3, needs text"),
        ({"lora_rank": None, "lora_alpha": 8}, "lora_alpha: got 8 without adapters, needs a lora_rank"),
        ({"lora_rank": None, "lora_targets": ["q_proj"]}, r"lora_targets: got \['q_proj'\] without adapters"),
        ({"model": None, "data": None}, "lora_rank: got 4, the embedded demo trains all weights; needs a model"),
        ({"reference_reset_every": 2}, "reference_reset_every: got 2 with a lora_rank"),
    ],
)
def test_settings_of_the_wrong_type_range_or_that_contradict_are_named(tmp_path, wrong, sentence):
    with pytest.raises(ValueError, match=sentence) as error:
        config_file.load(overrides=job("model", tmp_path, data="-") | wrong)
    assert "\n" not in str(error.value)
    assert {name for name in TrainConfig.model_fields if name.startswith("lora_")} == {
        "lora_rank", "lora_alpha", "lora_targets"
    }  # fmt: skip


@pytest.mark.parametrize(
    ("target", "why"),
    [
        ("lm_head", "adapters on the output head are not trained"),
        ("embed_tokens", "no linear layer is so"),
        ("proj", "no linear layer is so"),
    ],
)
def test_targets_that_fit_nothing_are_refused_before_anything_is_written(base, problems, tmp_path, target, why):
    with pytest.raises(
        ValueError, match=f"lora_targets: '{target}' fits nothing .*: {why}; .* are {', '.join(LINEAR)}"
    ):
        trained(base, problems, tmp_path, lora_targets=["q_proj", target], steps=1)
    assert not list(tmp_path.iterdir())


def test_without_peft_it_is_one_sentence(base, problems, checkpoint, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "peft", None)
    monkeypatch.setattr("redit_fast.extras.find_spec", lambda name: None if name == "peft" else True)
    train = ["train", *flags(job(base, tmp_path / "out", data=str(problems), name="run", steps=1))]
    merging = ["merge", str(checkpoint), str(tmp_path / "merged")]
    for words, user in ((train, "lora_rank"), (merging, "redit-fast merge")):
        assert main(words) == 2
        said = f'redit-fast: {user} needs peft, not installed here; run `pip install "redit-fast[lora]"`\n'
        assert capsys.readouterr().err == said
    assert not list(tmp_path.iterdir()) and Path(checkpoint).is_dir()
