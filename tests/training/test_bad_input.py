"""A start that fails gets one line on stderr and exit code 2, and writes nothing."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from redit_fast.cli import main
from redit_fast.training import builtin, config_file, policy
from redit_fast.training.trainer import train
from tests.training.jobs import flags, launch_anew


def test_nothing_is_written_when_the_start_fails(settings, tmp_path, capsys):
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"prompt": "a"}\n' * 36 + '{"prompt": }\n')
    for change, complaint in [
        ({"data": str(bad)}, "bad.jsonl:37"),
        ({"model": str(tmp_path / "nowhere")}, "nowhere"),
        ({"rewards": ["no_such_reward"]}, "no_such_reward"),
        ({"max_completion_length": 1010}, "tokens"),
        ({"max_prompt_length": 3}, "tokens"),
    ]:
        assert main(["train", *flags({**settings, **change})]) == 2
        errors = capsys.readouterr().err
        assert complaint in errors and len(errors.strip().splitlines()) == 1, errors
        assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("kind", ["pipe", "device"])
def test_data_that_can_be_read_only_once_is_refused_and_not_waited_for(settings, tmp_path, capsys, kind):
    data = tmp_path / "data.jsonl"
    os.mkfifo(data) if kind == "pipe" else data.symlink_to("/dev/zero")
    assert main(["train", *flags({**settings, "data": str(data)})]) == 2
    assert capsys.readouterr().err == (
        f"redit-fast: data {data}: needs a regular file, since it is read more than once\n"
    )
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("command", ["eval", "generate"])
def test_a_pipe_of_data_is_refused_by_the_commands_that_read_it_once(settings, tmp_path, capsys, command):
    data = tmp_path / "data.jsonl"
    os.mkfifo(data)
    assert main([command, settings["model"], "--data", str(data), "--rewards", *settings["rewards"]]) == 2
    assert f"data {data}: needs a regular file, since it is read more than once\n" in capsys.readouterr().err


@pytest.mark.parametrize("under", ["file", "file/deeper", "/proc/none"])
def test_an_out_dir_that_cannot_be_made_is_named(settings, tmp_path, capsys, under):
    (tmp_path / "file").write_text("")
    out = tmp_path / under
    assert main(["train", *flags({**settings, "out_dir": str(out)})]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"redit-fast: out_dir {out}: ") and error.endswith(": needs a folder to write to\n"), error


def change_config(**settings):
    def change(folder):
        found = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**found, **settings}))

    return change


def write(name, text):
    return lambda folder: (folder / name).write_text(text)


def remove(pattern):
    return lambda folder: [path.unlink() for path in folder.glob(pattern)]


def cut_off(folder):
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])


def pickled(folder):
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def narrow_embedding(folder):
    weights = load_file(folder / "model.safetensors")
    weights["model.embed_tokens.weight"] = weights["model.embed_tokens.weight"][:400].clone()
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    change_config(vocab_size=400)(folder)


def missing_package(folder):
    """Of a tokenizer class: transformers asks for it only when the tokenizer is made."""
    (folder / "tokenizer.json").unlink()
    (folder / "vocab.txt").write_text("a\nb\n")
    made_of = {"tokenizer_class": "BertJapaneseTokenizer", "word_tokenizer_type": "mecab"}
    (folder / "tokenizer_config.json").write_text(json.dumps(made_of))
    change_config(model_type="bert")(folder)


OWN_CODE = {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M", "AutoTokenizer": ["evil.T", None]}


def own_code(folder):
    (folder / "evil.py").write_text(f"open({str(folder / 'ran')!r}, 'w')\n")
    change_config(model_type="evil", auto_map=OWN_CODE)(folder)


DAMAGES = {  # what happened to a good model folder, and what the line says of it
    "weights cut off": (cut_off, "cannot be loaded: SafetensorError: "),
    "weights of junk": (write("model.safetensors", "junk" * 100), "cannot be loaded: SafetensorError: "),
    "pickled weights": (pickled, "holds no .safetensors weights; pickled weights (.bin, .pt) are refused"),
    "no config": (remove("config.json"), "holds no config.json"),
    "broken config": (write("config.json", "{"), "/config.json: malformed JSON: Expecting property name"),
    "listed config": (write("config.json", "[]"), "/config.json: needs a JSON object, got list"),
    "other width": (
        change_config(hidden_size=48, head_dim=24),
        "fit the weights: model.embed_tokens.weight has",
    ),
    "more layers": (change_config(num_hidden_layers=3, layer_types=["full_attention"] * 3), "12 tensors are missing"),
    "no heads": (change_config(num_attention_heads=0), "cannot be loaded: ZeroDivisionError"),
    "wrong type": (change_config(hidden_size="wide"), "Field 'hidden_size' expected int, got str"),
    "not causal": (change_config(model_type="t5"), "model_type is 't5' in its config.json, which is no causal"),
    "own code": (own_code, "'evil' in its config.json, which is no causal language model of transformers"),
    "no tokenizer": (remove("tokenizer*"), "has no tokenizer, or one without tokens"),
    "broken tokenizer": (write("tokenizer.json", "{broken"), "/tokenizer.json: malformed JSON: Expecting property"),
    "empty tokenizer": (write("tokenizer.json", "{}"), "the tokenizer of model"),
    "tokenizer of another": (narrow_embedding, "its tokenizer has token 412 ('</answer>'), beyond the 400 rows"),
    "quantised": (
        change_config(quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True}),
        "is quantised (quant_method bitsandbytes in its config.json) and quantised weights cannot be trained",
    ),
    "quantised inside": (
        change_config(text_config={"quantization_config": {"quant_method": "fp8"}}),
        "is quantised (quant_method fp8 in its config.json)",
    ),
    "tokenizer without its package": (missing_package, "without its package cannot be loaded: ModuleNotFoundError"),
    "attention without its package": (
        change_config(attn_implementation="flash_attention_2"),
        "cannot be loaded: ImportError: FlashAttention2",
    ),
    "end token beyond": (
        write("generation_config.json", '{"eos_token_id": [0, 99999]}'),
        "its generation_config.json says that eos_token_id is [0, 99999], needs token numbers below 413",
    ),
    "odd end token": (write("generation_config.json", '{"eos_token_id": "x"}'), "eos_token_id is ['x'], needs token"),
}
NAMES = {  # of models that are not there
    "./nowhere": "model ./nowhere: no such folder",
    "/abs/nowhere": "model /abs/nowhere: no such folder",
    "~/nowhere": "model ~/nowhere: no such folder",
    "some/where/else": "model some/where/else: no such folder",
    "some/nowhere": "model some/nowhere: no such folder, nor can it be had from the hub: ",
    "nowhere": "model nowhere: no such folder, nor can it be had from the hub: ",
    "no where": "model no where: no such folder, nor can it be had from the hub: Repo id must use alphanumeric",
    "a_file": "model a_file is a file, needs a folder",
}
PROGRAM = """
import json, sys
from redit_fast.cli import main
for words in json.loads(sys.argv[1]):
    print("exit code", main(words), file=sys.stderr, flush=True)
"""


def unreachable_hub(folder):
    """The environment of a process whose hub is a closed port of this machine and whose cache is in `folder`."""
    return {**os.environ, "PYTHONPATH": os.getcwd(), "HF_ENDPOINT": "http://127.0.0.1:9",
            "HF_HUB_CACHE": str(folder / "cache")}  # fmt: skip


@pytest.fixture(scope="module")
def answers(model_folder, problems, tmp_path_factory):
    """What a process makes of each damaged folder and name: its lines on stderr, of which pytest would miss those that
    are logged, the exit code, and whether there is a run."""
    folder = tmp_path_factory.mktemp("damaged")
    (folder / "a_file").touch()
    for name, (damage, _) in DAMAGES.items():
        shutil.copytree(model_folder, folder / name)
        damage(folder / name)
    common = ["--data", str(problems), "--rewards", "exact_answer", "--steps", "1", "--max-completion-length", "9"]
    models = [*(str(folder / name) for name in DAMAGES), *NAMES]
    jobs = json.dumps([["train", "--model", model, "--name", f"{i}", *common] for i, model in enumerate(models)])
    process = subprocess.run([sys.executable, "-c", PROGRAM, jobs], cwd=folder, env=unreachable_hub(folder),
                             capture_output=True, text=True, timeout=300)  # fmt: skip
    assert process.returncode == 0, process.stderr
    assert not list(folder.rglob("ran"))
    found, lines = [], []
    for line in process.stderr.splitlines():
        if line.startswith("exit code"):
            found.append((lines, int(line.split()[-1]), (folder / "runs" / f"{len(found)}").exists()))
            lines = []
        else:
            lines.append(line)
    return dict(zip([*DAMAGES, *NAMES], found, strict=True))


@pytest.mark.parametrize("name", [*DAMAGES, *NAMES])
def test_a_model_that_cannot_be_loaded_gets_one_line_that_names_it_and_is_not_run(answers, name):
    lines, code, run_exists = answers[name]
    sentence = DAMAGES[name][1] if name in DAMAGES else NAMES[name]
    assert code == 2 and len(lines) == 1 and name in lines[0] and sentence in lines[0], lines
    assert not run_exists
    assert lines[0].startswith("redit-fast: ") and "trust_remote_code" not in lines[0]


def test_a_model_of_the_hub_is_used_from_its_cache_without_a_network(settings, model_folder, tmp_path):
    cached = tmp_path / "cache" / "models--me--tiny"
    (cached / "refs").mkdir(parents=True)
    (cached / "refs" / "main").write_text("0" * 40)
    shutil.copytree(model_folder, cached / "snapshots" / ("0" * 40))
    process = launch_anew({**settings, "model": "me/tiny", "steps": 1}, env=unreachable_hub(tmp_path))
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    assert config_file.load(tmp_path / "run" / "config.json").model == "me/tiny"


def test_weights_without_a_place_in_the_model_are_named_in_a_warning(model_folder, tmp_path):
    shutil.copytree(model_folder, tmp_path / "model")
    change_config(num_hidden_layers=1, layer_types=["full_attention"])(tmp_path / "model")
    with pytest.warns(UserWarning, match=r"12 of its tensors are not used, such as model.layers.1.input_layernorm"):
        policy.load(tmp_path / "model")


def test_a_special_token_beyond_the_embedding_is_refused_only_where_a_prompt_has_it(settings, model_folder, tmp_path):
    """As Gemma 3's image token; the trainer used to find out after it had written the run's folder."""
    model, tokenizer = policy.load(model_folder)
    tokenizer.add_special_tokens({"extra_special_tokens": ["<image>"]})
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path / "model")
    job = {**settings, "model": str(tmp_path / "model"), "steps": 1}
    train(config_file.load(overrides=job))
    record = {**builtin.records(1, held_out=False, seed=0)[0], "prompt": "Look: <image>"}
    (tmp_path / "images.jsonl").write_text(json.dumps(record))
    with pytest.raises(
        ValueError, match=r"images.jsonl:1: the prompt has token 413 \('<image>'\), .* only has 413 rows"
    ):
        train(config_file.load(overrides={**job, "data": str(tmp_path / "images.jsonl"), "name": "images"}))
    assert not (tmp_path / "images").exists()
