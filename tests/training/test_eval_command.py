"""`redit-fast eval` and `redit-fast sample`: the numbers by hand, from the file that `generate` writes of the same
completions; one prompt on the terminal; and what bad input gets."""

import io
import itertools
import json
import math
import os
import re
import resource
import sys

import pytest
import torch

from redit_fast.cli import main
from redit_fast.training import builtin, config_file, evaluation, generation, report
from redit_fast.training.plain_text import visible
from redit_fast.training.trainer import train
from tests.training.jobs import lines_of

pytestmark = pytest.mark.filterwarnings("ignore:reward function 'even' left")
REWARD = """
def even(prompts, completions, **columns):
    return [None if len(text) % 5 == 0 else float(len(text) % 2 == 0) for text in completions]

def no_columns(prompts, completions):
    return [float(len(text)) for text in completions]

def needs_answer(prompts, completions, *, answer):
    return [1.0] * len(prompts)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("eval")


@pytest.fixture(scope="module")
def prompts(folder):
    records = builtin.records(6, held_out=True, seed=0)
    file = folder / "prompts.jsonl"
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    (folder / "some.py").write_text(REWARD)
    return file, records


@pytest.fixture(scope="module")
def run(folder, prompts, model_folder, problems):
    """A checkpoint whose run has a reward of the user's that leaves samples unscored."""
    draw, report.write = report.write, lambda run: None
    settings = {
        "model": str(model_folder), "data": str(problems), "rewards": [f"{folder}/some:even", "xml_format"],
        "reward_weights": [1.0, 0.5], "out_dir": str(folder), "name": "run", "steps": 1, "prompts_per_step": 2,
        "group_size": 2, "max_completion_length": 12, "eval_problems": 0, "temperature": 0.9,
    }  # fmt: skip
    train(config_file.load(overrides=settings))
    report.write = draw
    return folder / "run/checkpoints/step-000001"


def same_completions(run, prompts, out, *words):
    """The lines of `generate`, which samples the same."""
    assert main(["generate", str(run), "--data", str(prompts[0]), "--out", str(out), *words]) == 0
    return lines_of(out)


@pytest.mark.parametrize("n", [1, 2, 5, 6])
def test_pass_at_k_is_the_share_of_all_choices_of_k_answers_that_have_a_right_one(n):
    for c in range(n + 1):
        answers = [i < c for i in range(n)]
        for k in range(1, n + 1):
            chosen = list(itertools.combinations(answers, k))
            assert evaluation.pass_at(k, n, c) == pytest.approx(sum(map(any, chosen)) / len(chosen), abs=1e-12)


def test_its_sizes_are_the_powers_of_two_and_all():
    assert [evaluation.sizes(n) for n in (1, 2, 6, 8)] == [[1], [1, 2], [1, 2, 4, 6], [1, 2, 4, 8]]


def test_the_numbers_are_those_of_the_completions_that_generate_writes(run, prompts, tmp_path, capsys):
    out = tmp_path / "found.json"
    words = ["--samples", "3", "--seed", "4"]
    assert main(["eval", str(run), "--data", str(prompts[0]), *words, "--out", str(out)]) == 0
    found, said = json.loads(out.read_text()), capsys.readouterr().out
    lines = same_completions(run, prompts, tmp_path / "completions.jsonl", *words)
    groups = [lines[i : i + 3] for i in range(0, 18, 3)]
    right = [sum((line["rewards"]["even"] or 0) > 0 for line in group) for group in groups]
    assert 0 < sum(right) < 18 and len(set(right)) > 1
    for k in (1, 2, 3):
        chosen = [evaluation.pass_at(k, 3, c) for c in right]
        assert found["pass@k"][str(k)]["mean"] == pytest.approx(sum(chosen) / 6)
    assert [*found["pass@k"]] == ["1", "2", "3"]

    def mean(values):
        known = [value for value in values if value is not None]
        return sum(known) / len(known) if known else None

    even = [mean([line["rewards"]["even"] for line in group]) for group in groups]
    assert found["rewards"]["even"]["mean"] == pytest.approx(mean(even))
    assert found["rewards"]["even"]["unscored"] == sum(line["rewards"]["even"] is None for line in lines) > 0
    totals = [mean([(line["rewards"]["even"] or 0) + 0.5 * line["rewards"]["xml_format"] for line in group])
              for group in groups]  # fmt: skip
    assert found["reward"]["mean"] == pytest.approx(mean(totals))
    assert (found["problems"], found["samples"], found["temperature"], found["seed"]) == (6, 3, 0.9, 4)
    assert found["mean_length"] == pytest.approx(sum(line["tokens"] for line in lines) / 18)
    assert found["cut_off"] == pytest.approx(sum(not line["finished"] for line in lines) / 18)
    assert found["versions"]["redit-fast"] and found["checkpoint"] == str(run)
    for numbers in (found["reward"], *found["pass@k"].values()):
        assert numbers["low"] <= numbers["mean"] <= numbers["high"]
        assert f"{numbers['low']:.4f} to {numbers['high']:.4f}" in said
    assert f"{found['rewards']['even']['unscored']} of 18 unscored" in said
    assert "6 problems, 3 answers each at temperature 0.9; " in said


def test_one_answer_is_greedy_unless_a_temperature_is_given(run, prompts, tmp_path, capsys):
    for words, same, temperature in (([], ["--greedy"], 0.0), (["--temperature", "2"], ["--temperature", "2"], 2.0)):
        file = tmp_path / f"{temperature}.json"
        assert main(["eval", str(run), "--data", str(prompts[0]), *words, "--out", str(file)]) == 0
        found = json.loads(file.read_text())
        lines = same_completions(run, prompts, tmp_path / f"{temperature}.jsonl", *same)
        right = sum((line["rewards"]["even"] or 0) > 0 for line in lines)
        assert found["temperature"] == temperature and found["pass@k"]["1"]["mean"] == pytest.approx(right / 6)
        assert ("6 problems, greedy; " in capsys.readouterr().out) == (temperature == 0)
    assert not list(run.parent.glob("*.json"))


def test_the_interval_is_that_of_a_mean_over_problems(monkeypatch):
    """Of many, the normal one; of few, within their range; whatever is drawn at once."""
    values = torch.rand(4000, 1, dtype=torch.float64).square()
    low, high = evaluation.interval(values, 0).flatten().tolist()
    half = 1.96 * values.std().item() / 4000**0.5
    assert high - low == pytest.approx(2 * half, rel=0.1)
    assert (low + high) / 2 == pytest.approx(values.mean().item(), abs=0.1 * half)
    few = torch.tensor([[0.0, 2.0], [1.0, 2.0], [torch.nan, 2.0]], dtype=torch.float64)
    ends = evaluation.interval(few, 3)
    assert 0 <= ends[0, 0] < ends[1, 0] <= 1 and ends[:, 1].isnan().all()
    assert evaluation.interval(few, 3).nan_to_num().equal(ends.nan_to_num())
    again = evaluation.interval(values, 1).flatten()
    assert again.tolist() != [low, high]
    monkeypatch.setattr(evaluation, "TOGETHER", 10_000)
    in_parts = evaluation.interval(values, 0).flatten()
    assert (in_parts - values.new_tensor([low, high])).abs().max() < 0.1 * half


def test_what_is_not_known_is_null(run):
    scores = torch.full((2, 2, 1), torch.nan, dtype=torch.float64)
    found = evaluation.measured(scores, ["f"], config_file.load())
    assert found["pass@k"]["2"] == {"mean": 0.0, "low": None, "high": None}
    assert found["reward"]["mean"] is None and found["rewards"]["f"]["unscored"] == 4
    json.dumps(found, allow_nan=False)


BAD = [
    (["eval", "RUN"], "with the prompts: give --data"),
    (["eval", "RUN", "--data", "DATA", "--samples", "0"], "--samples is 0, needs a whole number from 1 to 4294967296"),
    (["eval", "RUN", "--data", "DATA", "--samples", "x"], "--samples is 'x', needs a whole number from 1 to"),
    (["eval", "RUN", "--data", "DATA", "--out", "DATA"], "prompts.jsonl is there already and stays as it is"),
    (["eval", "RUN", "--data", "DATA", "--out", "no/such/f.json"], "no/such/f.json: No such file or directory: needs"),
    (["eval", "RUN", "--data", "DATA", "--greedy"], "unknown flag --greedy, the closest valid one is"),
    (["eval", "MODEL", "--data", "DATA"], "is no checkpoint of a run, whose rewards would be taken: give --rewards"),
    (["eval", "RUN", "--data", "DATA", "--samples", "9" * 10], "--samples is 9999999999, needs a whole number from 1"),
    (["sample", "RUN", "--row", "2"], "--data and --row are the file and the place of a prompt in it: give both"),
    (["sample", "RUN", "text", "--data", "DATA"], "--data and --row are the file and the place of a prompt in it"),
    (["sample", "RUN", "text", "--data", "DATA", "--row", "1"], "--row is a prompt, and has its own form"),
    (["sample", "RUN", "--data", "DATA", "--row", "0"], "--row is 0, needs a whole number from 1 to 6"),
    (["sample", "RUN", "--data", "DATA", "--row", "7"], "--row is 7, needs a whole number from 1 to 6"),
    (["sample", "RUN", "--data", "DATA", "--row", "-1"], "--row is '-1', needs a whole number"),
    (["sample", "RUN", " \n"], "prompt: is empty, needs text"),
    (["sample", "RUN", "\udcff"], "prompt: is not text in UTF-8"),
    (["sample", "RUN", "1 + 1", "--chat"], "has no chat template: give the whole text instead"),
    (["sample", "RUN", "Ada has 3 cards. " * 400], "leave no room for 12 more in the model's context of 1024"),
    (["sample", "RUN", "text", "--greedy", "--samples", "2"], "--samples is 2, needs 1 with --greedy"),
    (["sample", "no/such/model", "text"], "model no/such/model: no such folder"),
    (["sample"], "the following arguments are required: CHECKPOINT"),
]


def test_bad_input_is_one_sentence_and_writes_nothing(run, prompts, model_folder, capsys):
    before = sorted(path.name for path in run.parent.iterdir())
    names = {"RUN": str(run), "DATA": str(prompts[0]), "MODEL": str(model_folder)}
    for words, sentence in BAD:
        try:
            code = main([names.get(word, word) for word in words])
        except SystemExit as exit:  # argparse
            code = exit.code
        said = capsys.readouterr()
        assert (code, said.out) == (2, "") and sentence in said.err.splitlines()[-1], (words, said.err)
        assert said.err.splitlines()[-1].startswith("redit-fast: ")
        assert sorted(path.name for path in run.parent.iterdir()) == before


def test_a_full_disk_leaves_no_file_and_the_table_is_printed(run, prompts, tmp_path, capsys):
    out, before = tmp_path / "found.json", resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, before[1]))  # Python ignores the signal
        code = main(["eval", str(run), "--data", str(prompts[0]), "--out", str(out)])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    said = capsys.readouterr()
    assert code == 2 and said.err.splitlines()[-1] == f"redit-fast: {out}: File too large"
    assert "pass@1" in said.out and not out.exists()


def shown(said):
    """The completions and what is told of each, and all before them."""
    head, *parts = re.split(r"\n--- \d+ of \d+: ", said)
    return head, [part.partition("\n")[::2] for part in parts]


def test_a_row_is_sampled_with_its_rewards(run, prompts, capsys, monkeypatch):
    score, seen = generation.rewards.score_texts, []

    def recorded(functions, records, texts):
        seen.append((records, texts, score(functions, records, texts)))
        return seen[-1][-1]

    monkeypatch.setattr(generation.rewards, "score_texts", recorded)
    words = ["sample", str(run), "--data", str(prompts[0]), "--row", "3", "--samples", "2", "--seed", "4"]
    assert main(words) == 0
    said = capsys.readouterr().out
    head, parts = shown(said)
    assert head.startswith(f"{prompts[0]}:3, ") and prompts[1][2]["prompt"].strip() in head
    assert len(parts) == 2 and "left out" not in said
    ((records, texts, scores),) = seen
    assert records == [prompts[1][2]] * 2
    for (told, shown_text), text, (even, xml) in zip(parts, texts, scores.tolist()):
        even = "unscored" if math.isnan(even) else f"{even:g}"
        assert re.fullmatch(rf"\d+ tokens(, cut off)?, even {even}, xml_format {xml:g}", told)
        assert shown_text == f"{visible(text)}\n"
    assert main(words) == 0 and capsys.readouterr().out == said
    assert main([*words[:-1], "5"]) == 0 and capsys.readouterr().out != said


def test_a_prompt_of_the_command_line_and_of_stdin_has_the_rewards_that_need_no_column(
    run, folder, prompts, model_folder, capsys, monkeypatch
):
    text, rewards = prompts[1][0]["prompt"], [f"{folder}/some:no_columns", f"{folder}/some:needs_answer"]
    assert main(["sample", str(run), text, "--reward-weights", "1", "1", "--rewards", *rewards]) == 0
    said = capsys.readouterr().out
    head, parts = shown(said)
    assert head.startswith("prompt, ") and len(parts) == 4
    assert all("no_columns" in told and "needs_answer" not in told for told, _ in parts)
    assert re.search(r"left out: rewards: '.*some:needs_answer': missing a required .*'answer'", said)
    monkeypatch.setattr(sys, "stdin", io.StringIO(text))
    assert main(["sample", str(run), "--reward-weights", "1", "1", "--rewards", *rewards]) == 0
    assert capsys.readouterr().out == said
    assert main(["sample", str(model_folder), text, "--greedy", "--max-completion-length", "5"]) == 0
    _, ((told, _),) = shown(capsys.readouterr().out)
    assert re.fullmatch(r"\d tokens(, cut off)?", told)  # a model has no rewards of its own


def test_a_terminal_as_stdin_is_not_waited_for(run, capsys, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setattr(sys, "stdin", Terminal("never"))
    assert main(["sample", str(run)]) == 2
    assert (
        "a prompt is missing: needs one behind CHECKPOINT, on stdin, or --data FILE --row N" in capsys.readouterr().err
    )


def test_what_a_model_writes_does_not_move_the_cursor(run, capsys, monkeypatch):
    from transformers import PreTrainedTokenizerBase

    texts = ["a\x1b[2Jb\r\u202ec"]
    monkeypatch.setattr(PreTrainedTokenizerBase, "batch_decode", lambda self, rows, **options: texts * len(rows))
    assert main(["sample", str(run), "1 + 1", "--samples", "1"]) == 0
    said = capsys.readouterr().out
    assert r"a\x1b[2Jb\r\u202ec" in said and not set(said) & set("\x1b\r\u202e")


def test_a_reader_that_has_gone_ends_it_quietly(run, capfd, monkeypatch):
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "w") as nobody:
        monkeypatch.setattr(sys, "stdout", nobody)
        assert main(["sample", str(run), "1 + 1", "--samples", "1"]) == 141
        monkeypatch.undo()
    assert capfd.readouterr().err == ""


def test_an_encoding_without_a_character_is_no_reason_to_fail(run, monkeypatch):
    out = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", out)
    assert main(["sample", str(run), "3 \N{MULTIPLICATION SIGN} 4", "--samples", "1"]) == 0
    monkeypatch.undo()
    assert rb"3 \xd7 4" in out.buffer.getvalue()
