"""`redit-fast generate`: completions of a file with rewards, by the engines, and what bad input gets."""

import json
import resource
import shutil
from pathlib import Path

import pytest
import torch

from redit_fast.cli import main
from redit_fast.training import builtin, checkpoint, config_file, generation, lora, policy, report, runs
from redit_fast.training.merge import merge
from redit_fast.training.rewards import resolve, score_texts
from redit_fast.training.rollout.local import generate
from redit_fast.training.trainer import train
from tests.training.jobs import lines_of


@pytest.fixture
def prompts(tmp_path, monkeypatch):
    """A file with a blank line in it, and its records."""
    monkeypatch.setattr(report, "write", lambda run: None)
    records = builtin.records(5, held_out=True, seed=0)
    file = tmp_path / "prompts.jsonl"
    file.write_text("\n".join(json.dumps(record) for record in records).replace("\n", "\n\n", 1))
    return file, records


@pytest.fixture
def run(settings, tmp_path, prompts):
    train(config_file.load(overrides={**settings, "steps": 1, "temperature": 0.8, "top_p": 0.95, "eval_problems": 0}))
    return tmp_path / "run/checkpoints/step-000001"


def test_completions_are_sampled_and_scored_as_in_the_run(run, prompts, capsys, monkeypatch):
    """Also with adapters in a checkpoint, and whatever is sampled in one call."""
    file, records = prompts
    assert main(["generate", str(run), "--data", str(file), "--samples", "3", "--seed", "4"]) == 0
    out = run.with_name("step-000001-completions.jsonl")
    said, rows = capsys.readouterr().out, lines_of(out)
    model, tokenizer = policy.load(run)
    ids = tokenizer([record["prompt"] for record in records])["input_ids"]
    expected = generate(
        model, policy.end_tokens(model, tokenizer), ids, group_size=3, max_new_tokens=12, temperature=0.8, top_p=0.95,
        seed=4, step=generation.STEP,
    )  # fmt: skip
    assert [row["completion"] for row in rows] == tokenizer.batch_decode(expected.completions, skip_special_tokens=True)
    assert [row["finished"] for row in rows] == expected.finished
    assert [row["tokens"] for row in rows] == [len(completion) for completion in expected.completions]
    assert [row["data"] for row in rows][::3] == [f"{file}:{line}" for line in (1, 3, 4, 5, 6)]
    assert [row["sample"] for row in rows] == [0, 1, 2] * 5 and rows[3]["prompt"] == records[1]["prompt"]
    names = json.loads((run.parent.parent / "config.json").read_text())["rewards"]
    functions = resolve(names, [name for name in records[0] if name != "prompt"])
    scores = score_texts(functions, [r for r in records for _ in range(3)], [row["completion"] for row in rows])
    assert torch.tensor([list(row["rewards"].values()) for row in rows]).double().equal(scores)
    assert [*rows[0]["rewards"]] == [function.name for function in functions]
    assert "15 completions: correct_answer 0.000" in said and said.splitlines()[-1] == str(out)
    assert "; 0.0% of the prompts have a completion with correct_answer above 0" in said
    monkeypatch.chdir(run)
    for together in (4, 2):  # a prompt in a call, a prompt in two
        monkeypatch.setitem(generation.TOGETHER, "local", together)
        out = run.with_name(f"by-{together}.jsonl")
        again = generation.generate(".", {"data": str(file), "seed": 4}, samples=3, out=out)
        assert lines_of(out) == rows and again[1] in said


def test_every_engine_gives_the_most_likely_tokens(run, prompts, tmp_path):
    file, _ = prompts
    found = []
    for rollout in ("local", "paged"):
        out = tmp_path / f"{rollout}.jsonl"
        words = ["--rollout", rollout, "--greedy", "--out", str(out), "--max-completion-length", "20"]
        assert main(["generate", str(run), "--data", str(file), *words]) == 0
        found.append(lines_of(out))
    assert found[0] == found[1] and len(found[0]) == 5 and max(row["tokens"] for row in found[0]) == 20


def test_a_checkpoint_with_adapters_is_the_merged_model(settings, prompts, tmp_path, capsys):
    file, _ = prompts
    train(
        config_file.load(overrides={**settings, "steps": 1, "lora_rank": 2, "learning_rate": 0.1, "eval_problems": 0})
    )
    folder = tmp_path / "run/checkpoints/step-000001"
    merged = merge(folder)
    words = ["--data", str(file), "--greedy", "--rewards", "redit_fast.training.builtin:right_steps"]
    words += ["--max-completion-length", "20"]
    for source, name in ((folder, "adapters"), (merged, "merged"), (settings["model"], "base")):
        assert main(["generate", str(source), *words, "--out", str(tmp_path / f"{name}.jsonl")]) == 0
    adapters, merged, base = (lines_of(tmp_path / f"{name}.jsonl") for name in ("adapters", "merged", "base"))
    assert adapters == merged != base
    (folder / lora.WEIGHTS).unlink()
    check_damaged(folder, f"{lora.WEIGHTS} is missing", [*words, "--out", str(tmp_path / "none.jsonl")], capsys)


def test_the_data_is_read_as_the_run_read_it(settings, prompts, tmp_path, capsys):
    """Unless a flag says otherwise."""
    file, records = prompts
    renamed = tmp_path / "renamed.jsonl"
    rows = [{"question": record["prompt"], **{k: v for k, v in record.items() if k != "prompt"}} for record in records]
    renamed.write_text("".join(json.dumps(row) + "\n" for row in rows * 4))
    columns = ["prompt=question", *(name for name in records[0] if name != "prompt")]
    job = {**settings, "data": str(renamed), "columns": columns, "steps": 1, "eval_problems": 0}
    train(config_file.load(overrides=job))
    folder = str(tmp_path / "run/checkpoints/step-000001")
    words = ["generate", folder, "--greedy", "--max-completion-length", "2", "--data"]
    assert main([*words, str(renamed), "--out", str(tmp_path / "as-the-run.jsonl")]) == 0
    assert main([*words, str(file), "--columns", "none", "--out", str(tmp_path / "other.jsonl")]) == 0
    assert main([*words, str(file), "--out", str(tmp_path / "refused.jsonl")]) == 2
    assert "no column 'question'" in capsys.readouterr().err and not (tmp_path / "refused.jsonl").exists()


def check_damaged(folder, why, words, capsys):
    before = sorted(folder.parent.iterdir())
    own = ["--data", words[1], "--rewards", "redit_fast.training.builtin:right_steps", "--out-dir", str(folder.parent)]
    for command in (["generate", str(folder), *words], ["train", "--model", str(folder), *own]):
        assert main(command) == 2
        assert capsys.readouterr().err.splitlines()[-1] == f"redit-fast: checkpoint {folder} is damaged ({why})"
    assert sorted(folder.parent.iterdir()) == before


def test_a_damaged_checkpoint_is_named(run, prompts, tmp_path, capsys):
    """Also a copy of one elsewhere. A folder that has only the model's files is a model."""
    words = ["--data", str(prompts[0]), "--rewards", "redit_fast.training.builtin:right_steps"]
    copied = shutil.copytree(run, tmp_path / "copied")
    for folder in (run, copied):
        weights = bytearray((folder / "model.safetensors").read_bytes())
        weights[-1] ^= 1
        (folder / "model.safetensors").write_bytes(weights)
        check_damaged(folder, "model.safetensors has changed", words, capsys)
    (run / "manifest.json").unlink()
    check_damaged(run, "manifest.json is missing or unreadable", words, capsys)
    (copied / "state.json").unlink()
    assert main(["generate", str(copied), *words, "--max-completion-length", "2"]) == 0


BAD = [
    ([], "data: needs a JSONL or Parquet file, or hub:OWNER/NAME, with the prompts: give --data"),
    (["--samples", "0"], "--samples is 0, needs a whole number from 1 to 4294967296"),
    (["--samples", "many"], "--samples is 'many', needs a whole number from 1 to 4294967296"),
    (["--samples", "\N{FULLWIDTH DIGIT FOUR}"], "needs a whole number from 1 to 4294967296"),
    (["--samples", "9" * 20], "--samples is 99999999999999999999, needs a whole number from 1 to 4294967296"),
    (["--samples", "9" * 5000], "needs a whole number from 1 to 4294967296"),
    (["--data", "DATA", "--samples", "1000000000"], "--samples is 1000000000, needs at most 858993459 for 5 prompts"),
    (["--greedy", "--samples", "2"], "--samples is 2, needs 1 with --greedy"),
    (["--data", "none.jsonl"], "data none.jsonl: No such file"),
    (["--data", "DATA", "--out", "DATA"], "prompts.jsonl is there already and stays as it is"),
    (["--data", "DATA", "--out", ""], "--out is empty, needs a name"),
    (["--data", "DATA", "--out", "no/such/folder.jsonl"], "no/such/folder.jsonl: No such file or directory: needs"),
    (["--data", "DATA", "--rewards", "nonsense"], "rewards: 'nonsense' is neither package.module:function nor"),
    (["--data", "DATA", "--rollout", "vllm"], "rollout: needs local, paged or the URL of a server"),
    (["--data", "DATA", "--rollout", "http://me:key@host"], "rollout: the URL has a user name or a password"),
    (["--data", "DATA", "--max-prompt-length", "2"], "prompts.jsonl:1: the prompt has"),
    (["--data", "DATA", "--steps", "3"], "unknown flag --steps, the closest valid one is --"),
    (["--data", "DATA", "--temperature", "0"], "temperature: got '0', needs a number greater than 0"),
]


def test_bad_input_is_one_sentence_and_writes_nothing(run, prompts, capsys):
    """One test, so that the run is made once."""
    before = sorted(path.name for path in run.parent.iterdir())
    for words, sentence in BAD:
        words = [str(prompts[0]) if word == "DATA" else word for word in words]
        assert main(["generate", str(run), *words]) == 2
        said = capsys.readouterr().err.splitlines()
        assert sentence in said[-1] and said[-1].startswith("redit-fast: ") and "key@" not in said[-1]
        assert sorted(path.name for path in run.parent.iterdir()) == before


def test_a_url_with_a_password_is_not_shown_where_rollout_may_not_change(run, capsys):
    words = ["--resume", "--name", "run", "--out-dir", str(run.parents[2]), "--rollout"]
    for url, sentence in (("http://me:key@host", "rollout: the URL has a user name"), ("http://host", "cannot become")):
        assert main(["train", *words, url]) == 2
        assert sentence in (said := capsys.readouterr().err) and "key@" not in said


def test_a_model_that_is_no_checkpoint_needs_rewards(settings, prompts, capsys):
    assert main(["generate", settings["model"], "--data", str(prompts[0])]) == 2
    assert "is no checkpoint of a run, whose rewards would be taken: give --rewards" in capsys.readouterr().err
    assert main(["generate", "no/such/model", "--data", str(prompts[0]), "--rewards", "exact_answer"]) == 2
    assert "model no/such/model: no such folder" in capsys.readouterr().err


def test_a_reward_that_raises_leaves_the_lines_before_it(run, prompts, tmp_path, capsys, monkeypatch):
    (tmp_path / "some.py").write_text(
        "def judge(prompts, completions, **columns):\n    judge.calls = getattr(judge, 'calls', 0) + 1\n"
        "    return [1 / (2 - judge.calls)] * len(prompts)\n"
    )
    monkeypatch.setitem(generation.TOGETHER, "local", 2)
    out = tmp_path / "out.jsonl"
    words = ["--data", str(prompts[0]), "--rewards", f"{tmp_path}/some:judge", "--out", str(out)]
    assert main(["generate", str(run), *words]) == 2
    assert "reward function 'judge'" in capsys.readouterr().err and len(lines_of(out)) == 2


def test_a_stop_and_a_full_disk_leave_whole_lines_or_no_file(run, prompts, tmp_path, capsys, monkeypatch):
    """No file, so that the same command can be given again. One test, so that the run is made once."""
    out = tmp_path / "out.jsonl"
    words = ["generate", str(run), "--data", str(prompts[0]), "--out", str(out)]
    for stop in (ValueError("no"), FloatingPointError("NaN"), KeyboardInterrupt()):

        def fails(functions, records, texts, stop=stop):
            assert out.is_file()
            raise stop

        with monkeypatch.context() as patch:
            patch.setattr(generation.rewards, "score_texts", fails)
            assert main(words) == (130 if isinstance(stop, KeyboardInterrupt) else 2)
        assert not out.exists()
    assert main(words) == 0
    lines = out.read_bytes().splitlines(keepends=True)
    assert len(lines) == 5
    room = len(lines[0]) + len(lines[1])
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    for limit, kept in ((room + 5, 2), (room, 2), (5, 0)):
        out.unlink()
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))  # Python ignores the signal
            code = main(words)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        assert code == 2 and capsys.readouterr().err.splitlines()[-1] == f"redit-fast: {out}: File too large"
        assert out.read_bytes() == b"".join(lines[:kept]) if kept else not out.exists()
        out.touch()


def test_a_full_disk_is_named_with_the_file_by_a_run_too(tmp_path):
    full, file = Path("/dev/full"), tmp_path / "config.json"
    (tmp_path / ".config.json").symlink_to(full)
    for write, named in (
        (lambda: runs.append(full, [{}]), full),
        (lambda: runs.replace(file, "{}"), file),
        (lambda: checkpoint._write_json(full, {}), full),
    ):
        with pytest.raises(OSError, match=f"^{named}: No space left on device$"):
            write()
