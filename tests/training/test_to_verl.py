"""`redit-fast to-verl` without verl: every setting has a place, what is refused, what is written."""

import functools
import json
import os
import shlex
import stat
import subprocess
from pathlib import Path

import pytest
import torch
from tokenizers.processors import TemplateProcessing

from redit_fast.cli import main
from redit_fast.training import config_file, policy, to_verl, verl_options
from redit_fast.training.config import TrainConfig
from tests import ROOT

pytest.importorskip("pyarrow", reason="pyarrow is not installed: to-verl needs it")
from pyarrow import parquet  # noqa: E402  after the skip

LORA, SHIPPED = {"lora_rank": 4}, {"rewards": ["numeric_answer", "xml_format"]}
MASK, SERVER = {"correction": "token_mask"}, {"rollout": "http://localhost:1"}
JUDGED = {"rewards": ["judge:http://localhost:1"]}
# field -> another value, and what it needs beside itself to mean something
CHANGED = {
    "model": (None, {}), "data": ("other.jsonl", {}), "eval_data": ("other.jsonl", {}),
    "columns": (["prompt", "answer"], {}), "data_format": ("gsm8k", {"data": "known.jsonl"}), "track": (["wandb"], {}),
    "dtype": ("float16", {"gr_gamma": 0}),
    "device": ("cpu", {}), "strategy": ("fsdp2", {}), "lora_rank": (8, LORA), "lora_alpha": (3, LORA),
    "lora_targets": (["q_proj"], LORA), "rewards": (["xml_format"], {}), "reward_weights": ([2.0, 1.0], SHIPPED),
    "reward_scales": ([3.0], {}), "judge_template": ("t.txt", JUDGED), "judge_model": ("x", JUDGED),
    "judge_temperature": (0.1, JUDGED), "judge_top_p": (0.1, JUDGED), "judge_max_tokens": (9, JUDGED),
    "judge_failures": (9, JUDGED),
    "name": ("another", {}), "out_dir": ("elsewhere", {}), "seed": (5, {}), "steps": (7, {}),
    "warm_start_steps": (3, {}), "eval_problems": (1, {}), "eval_samples": (2, {}), "eval_every": (3, {}),
    "prompts_per_step": (4, {}), "group_size": (3, {}), "dynamic_sampling": (1, {}), "overlong": ("mask", {}),
    "checkpoint_activations": (True, {}), "tokens_per_micro_batch": (999, {}), "micro_batch_size": (2, {}),
    "packing": ("off", {}), "updates_per_rollout": (2, {}), "max_completion_length": (20, {}),
    "max_prompt_length": (900, {}), "temperature": (0.5, {}), "top_p": (0.5, {}), "rollout": ("paged", {}),
    "rollout_ahead": (1, SERVER), "rollout_timeout": (1.0, SERVER),
    "rollout_retries": (1, SERVER), "rollout_sleep": (True, SERVER), "correction": ("token_truncate", {}),
    "correction_cap": (3.5, MASK), "correction_floor": (0.5, MASK), "preset": ("gr", {"learning_rate": 1e-3}),
    "learning_rate": (1e-5, {}), "lr_scheduler_type": ("cosine", {}),
    "warmup_steps": (2, {"lr_scheduler_type": "cosine"}), "weight_decay": (0.1, {}),
    "adam_beta1": (0.8, {}), "adam_beta2": (0.95, {}),
    "max_grad_norm": (None, {}), "loss_type": ("grpo", {}), "clip_low": (0.1, {}), "clip_high": (0.4, {}),
    "dro_beta": (0.7, {"loss_type": "dro", "dro_beta": 0.3}), "advantage_scale": ("none", {}),
    "dither_level": (0.1, {}), "dither_distribution": ("uniform", {}), "dither_schedule": ("cosine", {}),
    "dither_dead_groups": ("skip", {}),
    "gr_gamma": (0.2, {}), "gr_epsilon": ("auto", {}), "gr_normalized": (True, {}), "gr_perturb_max_norm": (3.0, {}),
    "gr_rounding": ("nearest", {}), "gr_keep_first_grad": (True, {}), "gr_gamma_warmup_steps": (4, {}),
    "gr_every_k_steps": (2, {}), "gr_pass2_ratio": ("fresh", {}), "beta": (0.2, {}),
    "reference_reset_every": (5, {"beta": 0.2}), "sharpness_every": (5, {}), "checkpoint_every": (9, {}),
    "keep_checkpoints": (5, {}), "long_prompts": ("skip", {"max_prompt_length": 34, "prompts_per_step": 1}),
    "system_prompt": ("Be brief.", {}),
}  # fmt: skip


@pytest.fixture
def settings(model_folder, problems, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    lines = problems.read_text().splitlines()
    (tmp_path / "own.jsonl").write_text("\n".join(lines[:12]))
    (tmp_path / "other.jsonl").write_text("\n".join(lines[20:40]))
    known = [json.loads(line) for line in lines[:12]]
    known = [{**row, "question": row["prompt"], "answer": f"#### {row['answer']}"} for row in known]
    (tmp_path / "known.jsonl").write_text("\n".join(map(json.dumps, known)))
    return {
        "model": str(model_folder), "data": "own.jsonl", "rewards": ["numeric_answer"], "steps": 5,
        "prompts_per_step": 3, "group_size": 4, "max_completion_length": 12, "gr_pass2_ratio": "pass1",
    }  # fmt: skip


def written(settings, folder="verl", **more):
    """The bytes of what is written, of parquet files the lines, or the sentence that refuses."""
    given = {**settings, **more}
    if given["model"] is None:
        given = {name: value for name, value in given.items() if name not in ("data", "rewards")}
    try:
        made = to_verl.to_verl(config_file.load(overrides=given), folder, "run")
    except ValueError as error:
        assert not list(Path().glob(f"*{folder}*"))
        return str(error)
    found = {}
    for file in sorted(made.iterdir()):
        found[file.name] = parquet.read_table(file).to_pylist() if file.suffix == ".parquet" else file.read_text()
    for file in made.iterdir():
        file.unlink()
    made.rmdir()
    return found


@pytest.mark.filterwarnings("ignore:.*prompts are in:UserWarning", "ignore:.*held out:UserWarning")
def test_every_setting_is_written_or_refused_by_its_name_or_is_said_to_have_no_meaning(settings, monkeypatch):
    for name in ("tokenizer_of", "skeleton"):  # of one model a hundred times
        monkeypatch.setattr(policy, name, functools.cache(getattr(policy, name)))
    assert CHANGED.keys() == TrainConfig.model_fields.keys(), "a new setting: what is it in verl?"
    known = {}
    for name, (value, beside) in CHANGED.items():
        key = json.dumps(beside)
        before = known.setdefault(key, written(settings, **beside))
        after = written(settings, **{**beside, name: value})
        if name in verl_options.UNUSED and name not in verl_options.REFUSED:
            assert after == before or f"{name}: got" in after, name
        elif isinstance(after, str):
            assert f"{name}: got" in after, (name, after)
        else:
            assert after != before, name


@pytest.mark.parametrize(
    ("name", "more"),
    [
        ("model", {"model": None}),
        ("rewards", {"rewards": ["model:some/folder"]}),
        ("rewards", JUDGED),
        ("device", {"device": "cpu"}),
        ("seed", {"seed": 2**32}),
        ("dynamic_sampling", {"dynamic_sampling": 1}),
        ("overlong", {"overlong": "mask"}),
        ("micro_batch_size", {"micro_batch_size": 5}),
        ("lr_scheduler_type", {"lr_scheduler_type": "linear"}),
        ("updates_per_rollout", {"updates_per_rollout": 2, "lr_scheduler_type": "cosine"}),
        ("rollout", {"rollout": "http://localhost:8000"}),
        ("correction", {"correction": "token_mask", "loss_type": "gspo"}),
        ("correction_floor", {"correction": "sequence_truncate", "correction_floor": 0.5}),
        ("loss_type", {"loss_type": "luspo"}),
        ("advantage_scale", {"advantage_scale": "batch"}),
        ("dither_distribution", {"dither_distribution": "uniform", **SHIPPED}),
        ("gr_pass2_ratio", {"gr_pass2_ratio": "fresh"}),
        ("gr_pass2_ratio", {"gr_pass2_ratio": "fresh", "loss_type": "gpg", "correction": "token_truncate"}),
        ("reference_reset_every", {"reference_reset_every": 2, "beta": 0.1}),
        ("sharpness_every", {"sharpness_every": 2}),
        ("gr_rounding", {"dtype": "bfloat16"}),
        ("prompts_per_step", {"prompts_per_step": 11}),
    ],
)
def test_what_verl_cannot_do_is_refused_by_its_name_before_anything_is_written(settings, name, more):
    refused = written(settings, **more)
    assert refused.startswith(f"not for verl 0.9.1: {name}: got ") and " set " in refused
    assert "\n" not in refused and refused.count(": got ") == 1


def test_every_refusal_has_a_case_above_and_all_of_a_configuration_are_said_at_once(settings):
    (mark,) = test_what_verl_cannot_do_is_refused_by_its_name_before_anything_is_written.pytestmark
    assert verl_options.REFUSED.keys() | {"gr_rounding", "prompts_per_step"} == {name for name, _ in mark.args[1]}
    refused = written(settings, gr_pass2_ratio="fresh", overlong="mask", sharpness_every=3)
    assert [f"{name}: got" in refused for name in ("overlong", "gr_pass2_ratio", "sharpness_every")] == [True] * 3


@pytest.mark.parametrize(
    "more",
    [
        {"gr_pass2_ratio": "fresh", "gr_gamma": 0},
        {"gr_pass2_ratio": "fresh", "updates_per_rollout": 2},
        {"gr_pass2_ratio": "fresh", "loss_type": "reinforce"},
        {"dither_distribution": "uniform"},
        {"dither_distribution": "uniform", "dither_level": 0, **SHIPPED},
        {"dtype": "bfloat16", "gr_rounding": "nearest"},
        {"dtype": "float16", "gr_gamma": 0},
        {"correction": "token_truncate", "correction_floor": 0.0},
        {"prompts_per_step": 10},
    ],
)
def test_what_means_the_same_in_verl_is_not_refused(settings, more):
    assert isinstance(written(settings, **more), dict)


def lines(path, *prompts):
    Path(path).write_text("".join(json.dumps({"prompt": prompt, "answer": "1"}) + "\n" for prompt in prompts))
    return path


def user(text):
    return {"role": "user", "content": text}


def test_prompts_of_which_verl_would_make_other_tokens_are_refused_with_their_line(settings, model_folder):
    model, tokenizer = policy.load(model_folder, "cpu")
    tokenizer.chat_template = "{% for m in messages %}{{ m['name'] }}{{ m['content'] }}\n{% endfor %}"
    for part in (model, tokenizer):
        part.save_pretrained("chat")
    settings |= {"model": "chat", "eval_problems": 0, "prompts_per_step": 1}
    opened = [user("2 + 3?"), {"role": "assistant", "content": "It is"}]
    refused = written(settings, data=lines("opened.jsonl", [user("1 + 1?")], opened))
    assert refused.startswith("opened.jsonl:2: the prompt ends with an assistant message, which verl closes")
    refused = written(settings, data=lines("named.jsonl", [user("1 + 1?")], [user("2 + 3?") | {"name": "Finn"}]))
    assert refused.startswith("named.jsonl:2: the chat template reads 'name' of this prompt's messages")
    refused = written(settings, data=lines("mixed.jsonl", [user("1 + 1?")], "2 + 3?"))
    assert (
        refused.startswith("mixed.jsonl:2: verl has one chat template for all prompts") and "mixed.jsonl:1" in refused
    )
    assert "custom_chat_template" not in written(settings, data=lines("chat.jsonl", [user("1 + 1?")]))["run.sh"]


def test_a_tokenizer_that_begins_texts_with_a_token_gets_a_template_that_does_so(settings, model_folder):
    model, tokenizer = policy.load(model_folder, "cpu")
    tokenizer.bos_token = tokenizer.eos_token
    processor = TemplateProcessing(single="A $0", special_tokens=[("A", tokenizer.bos_token_id)])
    tokenizer.backend_tokenizer.post_processor = processor
    for part in (model, tokenizer):
        part.save_pretrained("begins")
    assert policy.tokenizer_of("begins")[1]("How")["input_ids"][0] == tokenizer.bos_token_id
    found = written(settings, model="begins")
    assert "{{ bos_token }}{{ messages[0]" in found["run.sh"] and "bos_token" not in written(settings)["run.sh"]


def test_a_dtype_of_auto_is_the_checkpoint_s(settings, model_folder):
    model, tokenizer = policy.load(model_folder, "cpu")
    for part in (model.to(torch.bfloat16), tokenizer):
        part.save_pretrained("bfloat16")
    assert "gr_rounding: got stochastic in bfloat16" in written(settings, model="bfloat16")
    run = written(settings, model="bfloat16", gr_rounding="nearest")["run.sh"]
    assert "param_dtype=bf16" in run and "rollout.dtype=bfloat16" in run and "attn_implementation" not in run
    run = written(settings)["run.sh"]
    assert "param_dtype=fp32" in run and "rollout.dtype=float32" in run and "attn_implementation=sdpa" in run


def test_adapters_outside_the_decoder_layers_are_refused(settings):
    refused = written(settings, lora_rank=4, lora_targets=["lm_head"])
    assert refused.startswith("lora_targets: 'lm_head' fits nothing")
    assert "target_modules=all-linear" in written(settings, lora_rank=4)["run.sh"]


def command(*words):
    return main(["to-verl", *words])


def test_the_command_writes_a_folder_that_bash_runs_and_overwrites_none(settings, capsys, monkeypatch):
    """Of the parquet files the lines are JSONL's; the options reach verl word by word, further ones behind them."""
    Path("c.yaml").write_text("".join(f"{name}: {json.dumps(value)}\n" for name, value in settings.items()))
    assert command("c.yaml", "--out", "a 'b' $HOME", "--steps", "9", "--keep-checkpoints", "none") == 0
    folder = Path.cwd() / "a 'b' $HOME"
    assert capsys.readouterr().out == f"bash {shlex.quote(str(folder / 'run.sh'))}\n"
    assert sorted(path.name for path in folder.iterdir()) == ["rewards.py", "run.sh", "test.parquet", "train.parquet"]
    assert stat.S_IMODE(folder.stat().st_mode) == 0o755
    rows = [row for split in ("train", "test") for row in parquet.read_table(folder / f"{split}.parquet").to_pylist()]
    records = [json.loads(row["reward_model"]["ground_truth"]) for row in rows]
    expected = [json.loads(line) for line in Path("own.jsonl").read_text().splitlines()]
    assert sorted(records, key=str) == sorted(expected, key=str) and len(rows) == 12
    assert [row["prompt"] for row in rows] == [[user(record["prompt"])] for record in records]
    python = Path("bin/python")
    python.parent.mkdir()
    python.write_text('#!/bin/sh\nprintf "%s\\0" "$@"\n')
    python.chmod(0o755)
    environment = {**os.environ, "PATH": f"{python.parent.resolve()}:{os.environ['PATH']}"}
    run = ["bash", str(folder / "run.sh"), "trainer.nnodes=2", "a b"]
    seen = subprocess.run(run, capture_output=True, text=True, env=environment, check=True).stdout.split("\0")[:-1]
    script = shlex.split((folder / "run.sh").read_text(), comments=True)
    options = script[script.index("options=(") + 1 : script.index(")")]
    assert seen == ["-m", "verl.trainer.main_ppo", *options, "trainer.nnodes=2", "a b"]
    assert "trainer.total_training_steps=9" in seen and "trainer.max_actor_ckpt_to_keep=null" in seen
    before = {path: path.read_bytes() for path in folder.iterdir()}
    assert command("c.yaml", "--out", str(folder)) == 2
    assert capsys.readouterr().err.endswith("is there already and stays as it is, needs another --out\n")
    assert {path: path.read_bytes() for path in folder.iterdir()} == before
    assert command("c.yaml") == 0 and Path("c-verl/run.sh").is_file()
    assert command("c.yaml", "--out", "x", "--stepz", "9") == 2 and "valid one is --steps" in capsys.readouterr().err
    assert command("nowhere.yaml", "--out", "x") == 2 and "nowhere.yaml" in capsys.readouterr().err
    monkeypatch.setattr("redit_fast.extras.find_spec", lambda name: None)
    assert command("c.yaml", "--out", "x") == 2
    said = 'to-verl needs pyarrow, datasets, not installed here; run `pip install "redit-fast[data]"`'
    assert said in capsys.readouterr().err
    assert not Path("x").exists()


@pytest.mark.parametrize("name", ["a\ntouch x", "a\rimport os", "a\0", "a\udc80", "a\u2028b", "", "x" * 201])
def test_a_name_that_no_run_can_have_is_in_no_file(settings, name):
    with pytest.raises(ValueError, match=r"^name: '.*', after the configuration's file, is none .* give a --name$"):
        to_verl.to_verl(config_file.load(overrides=settings), "verl", name)
    made = to_verl.to_verl(config_file.load(overrides={**settings, "name": "own"}), "verl", name)
    assert (made / "run.sh").read_text().splitlines()[1].startswith("# own by verl")


@pytest.mark.parametrize("text", ["a\nb", "a\rb", "a\0", "a\x1b[2J", "a\udc80"])
def test_a_text_that_a_line_of_the_script_cannot_have_is_refused(settings, text):
    for folder in (text, f"{text}/verl"):
        with pytest.raises(ValueError, match="^--out '.*' has a control character or bytes that are not UTF-8"):
            to_verl.to_verl(config_file.load(overrides=settings), folder, "run")
    with pytest.raises(ValueError, match="has a control character or bytes that are not UTF-8"):
        to_verl.hydra_value(["fine", text])


def test_a_folder_that_cannot_be_is_named_and_leaves_nothing(settings, capsys):
    Path("c.json").write_text(json.dumps(settings))
    before = sorted(Path().iterdir())
    for out in ("c.json/x", "/proc/x/y", f"new/{'a' * 300}", f"{'a' * 300}/new", f"new/er/{'a' * 300}/x"):
        assert command("c.json", "--out", out) == 2
        said = capsys.readouterr().err
        assert said.startswith("redit-fast: --out ") and f"{out}: it could not be written: " in said
        assert sorted(Path().iterdir()) == before
    assert command("c.json", "--out", "") == 2 and "--out is empty" in capsys.readouterr().err
    assert sorted(Path().iterdir()) == before
    assert command("c.json", "--out", "b" * 250) == 0  # the longest name has no room for that of a draft behind it


def test_weights_of_rewards_have_the_scale_of_their_noise_whatever_their_size(settings):
    two = {"rewards": ["numeric_answer", "xml_format"]}
    scale = "+algorithm.redit.dither_reward_scale="
    for weights, expected in (([-0.5, 1e38], 1e38), ([3e-200, 4e-200], 5e-200)):
        run = written(settings, **two, reward_weights=weights)["run.sh"]
        (found,) = [word.removeprefix(scale) for word in shlex.split(run, comments=True) if word.startswith(scale)]
        assert float(found) == pytest.approx(expected, rel=1e-12)
    for large in (1e300, -1e39):
        assert "reward_weights: got" in written(settings, **two, reward_weights=[-0.5, large])


def test_a_full_disk_leaves_nothing(settings, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    before = sorted(Path().iterdir())
    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError, match="^--out .*verl: it could not be written: No space left on device$"):
        to_verl.to_verl(config_file.load(overrides=settings), "verl", "run")
    assert sorted(Path().iterdir()) == before


def test_a_text_that_verl_would_take_for_a_reference_is_refused():
    with pytest.raises(ValueError, match=r"has \$\{, which verl's configuration takes for a reference"):
        to_verl.hydra_value("/data/${HOME}")


def test_the_page_says_what_becomes_of_every_setting():
    page = (ROOT / "docs/to_verl.md").read_text()
    missing = [name for name in TrainConfig.model_fields if f"`{name}`" not in page]
    assert not missing
