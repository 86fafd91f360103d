"""Held-out problems in a file of their own, and several sampled answers to each."""

import json

import pytest
import torch
from transformers import AutoTokenizer

from redit_fast.cli import main
from redit_fast.training import builtin, config_file, data, metrics, policy, report, rewards
from redit_fast.training.distributed import Ranks
from redit_fast.training.report.summary import closing_rows
from redit_fast.training.rollout.local import LocalEngine, generate
from redit_fast.training.trainer import train
from tests.training.jobs import flags, lines_of


@pytest.fixture
def apart(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "write", lambda run: None)
    file = tmp_path / "apart.jsonl"
    records = builtin.records(9, held_out=True, seed=0)
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    return file, records


def loaded(settings, **more):
    made = config_file.load(overrides={**settings, **more})
    return data.load(made, AutoTokenizer.from_pretrained(settings["model"]))


def test_a_file_of_its_own_is_evaluated_and_all_of_the_data_trained_on(settings, apart):
    file, records = apart
    whole = loaded(settings, eval_data=str(file), eval_problems=9)
    assert len(whole.train) == 60 and whole.held_out == records
    assert [place for place, _ in whole.numbered][59:61] == [f"{settings['data']}:60", f"{file}:1"]
    few = loaded(settings, eval_data=str(file), eval_problems=4)
    assert len(few.held_out) == 4 and few.train == whole.train
    assert [record for record in records if record in few.held_out] == few.held_out  # in the file's order
    assert few.held_out == loaded(settings, eval_data=str(file), eval_problems=4).held_out != records[:4]
    assert few.held_out != loaded(settings, eval_data=str(file), eval_problems=4, seed=1).held_out


def test_prompts_that_are_in_both_files_are_counted_in_a_warning(settings, apart):
    file, _ = apart
    with file.open("a") as more, open(settings["data"]) as trained:
        more.write(trained.readline())
    with pytest.warns(UserWarning, match=r"apart.jsonl: 1 of its prompts are in .*problems.jsonl too"):
        loaded(settings, eval_data=str(file))


def test_what_is_wrong_with_it_is_said_of_the_file_that_it_is_wrong_with(settings, apart, tmp_path, capsys):
    file, (first, *_) = apart
    job = {**settings, "eval_data": str(file)}
    lines = file.read_text()
    cases = {
        json.dumps(first)[:20]: f"{file}:1:12: malformed line",
        json.dumps({**first, "more": 1}): f"{settings['data']}:1: column 'more' is missing, {file}:1 has it",
        json.dumps({"prompt": "a"}): f"{file}:1: column 'answer' is missing, {settings['data']}:1 has it",
        json.dumps({**first, "prompt": "1" * 5000}): f"{file}:1: the prompt has",
        "": f"{file}: the file is empty",
    }
    for text, error in cases.items():
        file.write_text(text and text + "\n")
        assert main(["train", *flags(job)]) == 2
        said = capsys.readouterr().err.strip()
        assert error in said and len(said.splitlines()) == 1
    file.write_text(lines)
    for more, error in (
        ({"eval_data": str(tmp_path / "none.jsonl")}, "none.jsonl: No such file"),
        ({"eval_problems": 0}, "eval_data: eval_problems is 0, which evaluates nothing"),
        ({"eval_samples": 0}, "eval_samples: got '0', needs a number greater than or equal to 1"),
    ):
        assert main(["train", *flags({**job, **more})]) == 2
        assert error in capsys.readouterr().err
    assert main(["train", "--eval-data", str(file), "--out-dir", str(tmp_path)]) == 2
    assert "eval_data: the embedded demo has its own" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_it_is_part_of_what_a_run_was_started_with_and_found_beside_the_config(settings, apart, tmp_path, capsys):
    file, _ = apart
    (tmp_path / "job.yaml").write_text(json.dumps({**settings, "steps": 1, "eval_data": "apart.jsonl"}))
    assert main(["train", "--config", str(tmp_path / "job.yaml")]) == 0
    assert "accuracy/held_out" in lines_of(tmp_path / "run" / "metrics.jsonl")[0]
    file.write_text(file.read_text() + file.read_text().splitlines()[0] + "\n")
    capsys.readouterr()
    job = {**settings, "steps": 2, "eval_data": str(file)}
    assert main(["train", "--resume", *flags(job)]) == 2
    assert f"data {file} has changed since" in capsys.readouterr().err


def test_several_answers_are_sampled_as_in_training_the_same_in_every_evaluation(settings, apart, monkeypatch):
    """pass@k by hand; the batches that they are decoded in change nothing."""
    _, records = apart
    model, tokenizer = policy.load(settings["model"])
    ends = policy.end_tokens(model, tokenizer)
    engine = LocalEngine(model, ends)

    def judge(prompts, completions, **columns):
        return [float(len(text) % 7 == 0) - 0.5 for text in completions]

    functions = [rewards.RewardFunction("judge", judge)]
    made = config_file.load(overrides={**settings, "eval_samples": 3, "top_p": 0.9, "temperature": 0.8})
    found = metrics.held_out_metrics(engine, model, tokenizer, records, functions, made, Ranks())
    prompts = [tokenizer(record["prompt"])["input_ids"] for record in records]
    options = {"max_new_tokens": 12, "temperature": 0.8, "top_p": 0.9, "group_size": 3, "step": 2**32 - 1}
    texts = tokenizer.batch_decode(generate(model, ends, prompts, **options).completions, skip_special_tokens=True)
    right = torch.tensor([len(text) % 7 == 0 for text in texts]).view(9, 3)
    assert 0 < right.sum() < 27 and len(set(texts)) > 15
    assert found["accuracy/held_out"] == pytest.approx(right.double().mean().item())
    assert found["accuracy/held_out_pass_at_k"] == pytest.approx(right.any(1).double().mean().item())
    monkeypatch.setattr(metrics, "EVAL_BATCH", 7)
    assert metrics.held_out_metrics(engine, model, tokenizer, records, functions, made, Ranks()) == found
    greedy = made.model_copy(update={"eval_samples": 1})
    assert "accuracy/held_out_pass_at_k" not in metrics.held_out_metrics(
        engine, model, tokenizer, records, functions, greedy, Ranks()
    )


def test_a_run_with_several_answers_tells_pass_at_k(settings, apart, tmp_path):
    summary = train(config_file.load(overrides={**settings, "eval_samples": 2, "eval_every": 1}))
    lines = lines_of(tmp_path / "run" / "metrics.jsonl")
    assert all(line["accuracy/held_out_pass_at_k"] >= line["accuracy/held_out"] for line in lines)
    assert summary["pass_at_k_before"] == lines[0]["accuracy/held_out_pass_at_k"]
    table = dict(closing_rows(summary | {"pass_at_k_before": 0.25, "pass_at_k_after": 0.5}))
    assert table["Held-out pass@2 before and after RL"] == "25.0%, 50.0%"
    assert table["Held-out problems, 2 sampled answers each"] == "5"
    assert "Held-out problems, answered greedily" in dict(closing_rows(summary | {"eval_samples": 1}))
