"""`redit-fast reward-model`: its loss and gradient, what it learns, its run's folder, and the whole path to GRPO."""

import copy
import errno
import json
import math
import re
import shutil
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional as F
from transformers import AutoModelForSequenceClassification

from redit_fast.cli import main
from redit_fast.training import config_file, runs
from redit_fast.training.config import TrainConfig
from redit_fast.training.reward_model import trainer
from redit_fast.training.reward_model.batch import PairBatch, bradley_terry, held_out_metrics
from redit_fast.training.reward_model.config import RewardModelConfig, describe
from redit_fast.training.reward_model.data import Pair
from redit_fast.training.reward_model.setup import parts
from redit_fast.training.reward_model.trainer import train
from redit_fast.training.rewards.model import load
from tests import ROOT
from tests.training import preferences
from tests.training.jobs import flags, lines_of
from tests.training.test_config import HOSTILE
from tests.training.test_reward_model_scores import scorer
from tests.training.test_stops import assert_equal_checkpoints, timeless
from tests.training.test_trackers import numbers_of, of_tensorboard

PAGE = (ROOT / "docs" / "reward_model.md").read_text()


@pytest.fixture(scope="module")
def pairs_file(tmp_path_factory):
    return preferences.write(tmp_path_factory.mktemp("pairs") / "pairs.jsonl", preferences.records(40))


@pytest.fixture
def job(model_folder, pairs_file, tmp_path):
    return {
        "model": str(model_folder), "data": str(pairs_file), "out_dir": str(tmp_path), "name": "judge", "steps": 2,
        "pairs_per_step": 6, "eval_pairs": 5, "eval_every": 2, "checkpoint_every": 1, "learning_rate": 1e-3,
    }  # fmt: skip


def config_of(job, **more):
    return config_file.load_as(RewardModelConfig, None, {**job, **more})


def some_pairs(count=7, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def draw(low, high):
        length = int(torch.randint(low, high, (1,), generator=generator))
        return torch.randint(1, 97, (length,), generator=generator).tolist()

    pairs = []
    for i in range(count):
        prompt = draw(4, 12)
        pairs.append(Pair(prompt + draw(1, 9), prompt + draw(1, 9), margin=0.5 * i))
    return pairs


def batch_of(pairs, packed=True, budget=10_000, center=0.0):
    return PairBatch(pairs, packed, budget, center, seed=0, step=0)


def test_the_loss_is_the_formula_with_margin_and_centring():
    rewards = torch.tensor([[2.0, 0.5], [-1.0, 3.0], [60.0, -60.0]])
    margin = torch.tensor([0.0, 0.25, 2.0])
    for center in (0.0, 0.1):
        expected = [
            math.log1p(math.exp(-(c - r - m))) + center * (c + r) ** 2
            for (c, r), m in zip(rewards.tolist(), margin.tolist())
        ]
        assert bradley_terry(rewards, margin, center).tolist() == pytest.approx(expected, rel=1e-6)
    far = bradley_terry(torch.tensor([[-1e4, 1e4]]), torch.tensor([0.0]), 0.0)
    assert far.item() == pytest.approx(2e4)


def exact_gradient(model, pairs, center):
    """In float64, each text alone, by the model's own forward pass; the rewards, too."""
    exact = copy.deepcopy(model).double()
    rewards = torch.stack([
        torch.cat([exact(torch.tensor([ids])).logits[0] for ids in (pair.chosen, pair.rejected)]) for pair in pairs
    ])  # fmt: skip
    gaps = rewards[:, 0] - rewards[:, 1] - torch.tensor([pair.margin for pair in pairs], dtype=torch.float64)
    (-F.logsigmoid(gaps).mean() + center * rewards.sum(1).square().mean()).backward()
    return torch.cat([p.grad.flatten() for p in exact.parameters()]), rewards.detach()


def gradient(model):
    return torch.cat([p.grad.flatten() for p in model.parameters()])


@pytest.mark.parametrize("kind", ["qwen2", "gemma2"])
@pytest.mark.parametrize("center", [0.0, 0.3])
def test_the_gradient_is_that_of_float64_in_every_layout(kind, center):
    model, pairs = scorer(kind), some_pairs()
    expected, exact = exact_gradient(model, pairs, center)
    for packed in (True, False):
        for budget in (10_000, 80, 1):
            model.zero_grad()
            batch = batch_of(pairs, packed, budget, center)
            rewards, losses = batch.backward(model)
            assert (rewards.double() - exact).abs().max() < 1e-5
            assert ((gradient(model).double() - expected).norm() / expected.norm()) < 2e-6
            assert (len(batch.parts) == 1) == (budget == 10_000) and (len(batch.parts) == 7) == (budget == 1)
            assert sorted(i for part in batch.parts for i in part.pairs) == list(range(7))
            assert losses.shape == (7,) and losses.mean() > 0


def test_margins_and_the_centring_change_the_gradient():
    model, pairs, found = scorer("qwen2"), some_pairs(), []
    flat = [Pair(pair.chosen, pair.rejected, 0.0) for pair in pairs]
    for those, center in ((pairs, 0.0), (flat, 0.0), (pairs, 0.3)):
        model.zero_grad()
        batch_of(those, center=center).backward(model)
        found.append(gradient(model))
    assert all((found[0] - other).norm() > 0.05 * found[0].norm() for other in found[1:])


def test_what_the_two_texts_of_a_pair_share_is_computed_once():
    pairs = [Pair([5, 6, 7, 8, 9], [5, 6, 7, 1], 0.0), Pair([20, 21, 22], [20, 21, 22], 0.0)]
    for budget, tokens in ((100, [9]), (6, [6, 3])):
        assert [part.micro.tokens for part in batch_of(pairs, budget=budget).parts] == tokens
    assert [part.micro.tokens for part in batch_of(pairs, packed=False, budget=100).parts] == [20]
    assert [part.pairs for part in batch_of(pairs, packed=False, budget=16).parts] == [[0], [1]]


def test_it_learns_a_preference_to_95_percent_of_held_out_pairs(job, tmp_path):
    file = preferences.write(tmp_path / "many.jsonl", preferences.records(1200))
    more = {"data": str(file), "steps": 25, "pairs_per_step": 24, "eval_pairs": 200, "eval_every": 25}
    summary = train(config_of(job, **more, checkpoint_every=25, gr_gamma=1e-3, learning_rate=1e-3))
    assert summary["eval_pairs"] == 200 and summary["accuracy_before"] < 0.7
    assert summary["accuracy_after"] >= 0.95
    last = lines_of(tmp_path / "judge" / "metrics.jsonl")[-1]
    assert last["margin/held_out"] > 1 and last["loss/held_out"] < 0.3 and last["gr/step_cos"] > 0.9


@pytest.mark.parametrize(
    "more",
    [{"gr_gamma": 0.1, "gr_epsilon": 0.1, "lr_scheduler_type": "constant_with_warmup", "warmup_steps": 2}, "dropout"],
    ids=["GR", "padded, with dropout"],
)
def test_four_steps_are_two_and_two_more_bit_by_bit(job, tmp_path, more, capsys):
    if more == "dropout":
        shutil.copytree(job["model"], tmp_path / "model")
        described = json.loads((tmp_path / "model" / "config.json").read_text())
        (tmp_path / "model" / "config.json").write_text(json.dumps({**described, "attention_dropout": 0.1}))
        more = {"model": str(tmp_path / "model")}
    job = {**job, **more, "center_coefficient": 0.01, "checkpoint_every": 2}
    train(config_of(job, name="straight", steps=4))
    train(config_of(job, name="halves", steps=2))
    train(config_of(job, name="halves", steps=4), resume=True)
    assert ("rows are padded, not packed: it has dropout" in capsys.readouterr().out) == ("model" in more)
    a, b = (tmp_path / name for name in ("straight", "halves"))
    assert_equal_checkpoints(*(run / "checkpoints" / "step-000004" for run in (a, b)))
    assert timeless(a / "metrics.jsonl") == timeless(b / "metrics.jsonl")
    before, after = (load_file(a / "checkpoints" / f"step-00000{n}" / "model.safetensors") for n in (2, 4))
    assert all(not torch.equal(before[name], after[name]) for name in before)


def test_gr_changes_what_is_learned_and_nothing_else(job, tmp_path):
    for name, gamma in (("without", 0.0), ("with", 1.0)):
        train(config_of(job, name=name, gr_gamma=gamma, gr_epsilon=0.5, steps=1))
    one, other = (lines_of(tmp_path / name / "metrics.jsonl")[1] for name in ("without", "with"))
    assert one["loss/train"] == other["loss/train"] and "gr/step_cos" not in one and other["gr/step_cos"] > 0.99
    assert one["grad_norm"] != other["grad_norm"]


@pytest.mark.draws
def test_a_run_has_the_folder_of_a_run_and_its_keys_are_on_the_page(job, tmp_path, capsys):
    assert main(["reward-model", *flags({**job, "gr_gamma": 0.01, "gr_epsilon": 0.01, "steps": 3})]) == 0
    run = tmp_path / "judge"
    said = capsys.readouterr().out
    assert "Accuracy on held-out pairs after training" in said and "Held-out pairs" in said
    names = {"config.json", "inputs.json", "metrics.jsonl", "checkpoints", "summary.json", "report.html", "curves.png"}
    assert {path.name for path in run.iterdir() if not path.name.startswith(".")} == names
    metrics = lines_of(run / "metrics.jsonl")
    assert [line["step"] for line in metrics] == [0, 1, 2, 3] and {line["schema"] for line in metrics} == {runs.SCHEMA}
    assert ["accuracy/held_out" in line for line in metrics] == [True, False, True, True]
    rows = [row.split(" | ")[0] for row in PAGE.splitlines() if row.startswith("| `")]
    documented = {key for row in rows for key in re.findall(r"`([^`]+)`", row)}
    assert {key for line in metrics for key in line} == documented - {"prompt", "chosen", "rejected", "margin"}
    assert metrics[3]["num_tokens"] == sum(line["tokens/useful"] for line in metrics[1:])
    assert all(line["tokens/computed"] < line["tokens/useful"] for line in metrics[1:])
    page = (run / "report.html").read_text()
    for text in ("Accuracy on held-out pairs after training", "Margin", "6 pairs, center_coefficient 0",
                 "redit-fast reward-model --model", "--name judge-again"):  # fmt: skip
        assert text in page
    assert "dither" not in page
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == [f"step-00000{n}" for n in (1, 2, 3)]
    model = AutoModelForSequenceClassification.from_pretrained(run / "checkpoints" / "step-000003")
    assert model.config.num_labels == 1 and model.config.architectures == ["Qwen2ForSequenceClassification"]
    (run / "report.html").unlink()
    assert main(["report", str(run)]) == 0 and (run / "report.html").exists()


def test_it_goes_on_from_a_reward_model_too(job, tmp_path):
    train(config_of(job))
    first = tmp_path / "judge" / "checkpoints" / "step-000002"
    again = parts(config_of(job, model=str(first), name="again"), None)
    kept, _ = load(str(first))
    assert torch.equal(again.model.score.weight, kept.score.weight)


def test_a_stop_saves_and_its_command_goes_on(job, tmp_path, monkeypatch, capsys):
    backward, calls = PairBatch.backward, []

    def pressed(self, model):
        calls.append(self.step)
        if calls.count(1) == 1 and calls[-1] == 1:
            signal.raise_signal(signal.SIGINT)
        return backward(self, model)

    job = {**job, "name": "my judge", "steps": 3, "checkpoint_every": 3}
    train(config_of(job, name="straight"))
    monkeypatch.setattr(PairBatch, "backward", pressed)
    assert main(["reward-model", *flags(job)]) == 130
    error = capsys.readouterr().err.strip()
    run = tmp_path / "my judge"
    assert error == (
        f"stopped after step 1 of 3, saved in {run}; to go on: redit-fast reward-model --resume --name 'my judge' "
        f"--out-dir {tmp_path}"
    )
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step-000001"]
    assert main(["reward-model", "--resume", "--name", "my judge", "--out-dir", str(tmp_path)]) == 0
    assert timeless(run / "metrics.jsonl") == timeless(tmp_path / "straight" / "metrics.jsonl")
    assert_equal_checkpoints(*(tmp_path / name / "checkpoints" / "step-000003" for name in ("straight", "my judge")))


def test_a_stop_in_an_evaluation_keeps_the_step(job, tmp_path, monkeypatch, capsys):
    whole, stops = trainer.held_out_metrics, [2]

    def pressed(model, pairs, config, *, packed):
        if stops and lines_of(tmp_path / "judge" / "metrics.jsonl"):
            stops.pop()
            signal.raise_signal(signal.SIGINT)
        return whole(model, pairs, config, packed=packed)

    monkeypatch.setattr(trainer, "held_out_metrics", pressed)
    assert main(["reward-model", *flags({**job, "steps": 3})]) == 130 and stops == []
    assert "stopped after step 2 of 3" in capsys.readouterr().err
    metrics = tmp_path / "judge" / "metrics.jsonl"
    assert "accuracy/held_out" not in lines_of(metrics)[2]
    train(config_of(job, steps=3), resume=True)
    assert ["accuracy/held_out" in line for line in lines_of(metrics)] == [True, False, True, True]


def test_eval_data_max_length_and_margins_are_read(job, pairs_file, tmp_path):
    lines = preferences.records(8, seed=5)
    apart = preferences.write(tmp_path / "apart.jsonl", [{**line, "margin": 0.5} for line in lines])
    long = {**lines[0], "chosen": "cards " * 40, "margin": 1}
    file = preferences.write(tmp_path / "own.jsonl", [{**line, "margin": i} for i, line in enumerate(lines)] + [long])
    config = config_of(job, data=str(file), eval_data=str(apart), eval_pairs=3, max_length=80, long_pairs="skip")
    found = parts(config, None).pairs
    assert (len(found.train), len(found.held_out), found.skipped) == (8, 3, 1)
    assert [pair.margin for pair in found.train] == list(range(8)) and found.held_out[0].margin == 0.5
    assert max(len(pair.chosen) for pair in found.train) <= 80
    nothing = held_out_metrics(None, [], config, packed=True)
    assert nothing == {}


def test_a_loss_that_is_not_finite_is_said_once(job, tmp_path):
    with pytest.warns(UserWarning, match="the loss is not finite") as said:
        train(config_of(job, learning_rate=1e30, steps=4, eval_every=4))
    (words,) = [str(each.message) for each in said if "not finite" in str(each.message)]
    assert words.startswith("step 2: the loss is not finite; the run goes on, without the steps whose gradient is not")
    last = lines_of(tmp_path / "judge" / "metrics.jsonl")[-1]
    assert last["loss/train"] is None and last["gr/skipped_steps"] > 0


def test_a_disk_that_is_full_is_named_and_no_draft_is_left(job, tmp_path, monkeypatch, capsys):
    def full(path, text, encoding=None):
        if path.name == "state.json":
            raise OSError(errno.ENOSPC, "No space left on device")
        return whole(path, text, encoding)

    whole = Path.write_text
    monkeypatch.setattr(Path, "write_text", full)
    assert main(["reward-model", *flags(job)]) == 2
    checkpoints = tmp_path / "judge" / "checkpoints"
    named = f"{checkpoints}/.draft-000001/state.json"
    assert capsys.readouterr().err == f"redit-fast: {named}: No space left on device\n"
    assert list(checkpoints.iterdir()) == []


def test_what_teaches_nothing_is_said(job, tmp_path):
    lines = [{"prompt": f"{i}", "chosen": "a", "rejected": "a"} for i in range(3)]
    file = preferences.write(tmp_path / "same.jsonl", lines)
    with pytest.warns(UserWarning) as said:
        parts(config_of(job, data=str(file)), None)
    words = [str(warning.message) for warning in said]
    assert "3 pairs have two texts of the same tokens, of which nothing is learned" in words
    assert any("none of its 3 pairs is held out" in word for word in words)


CHAT = [{"role": "user", "content": "3+4?"}]
ANSWERS = {"chosen": [{"role": "assistant", "content": "7"}], "rejected": [{"role": "assistant", "content": "8"}]}
LINE = {"prompt": "3+4?", "chosen": "7", "rejected": "8"}
BAD_LINES = [
    ({"chosen": "7", "rejected": "8"}, "no column 'prompt', found 'chosen', 'rejected'"),
    ({"prompt": "3+4?", "chosen": "7"}, "no column 'rejected', found 'prompt', 'chosen'"),
    ({**LINE, "chosen": 7}, "'chosen' needs text, as the prompt is, got 7"),
    ({**LINE, **ANSWERS}, "'chosen' needs text, as the prompt is, got [{"),
    ({**LINE, "prompt": CHAT}, "'chosen' needs a list of chat messages, as the prompt is, got \"7\""),
    ({"prompt": CHAT, **ANSWERS, "rejected": []}, "'rejected' needs a list of chat messages, as the prompt is, got []"),
    ({"prompt": CHAT, **ANSWERS, "rejected": [{"role": "user"}]}, "'rejected' needs a list of chat messages"),
    ({**LINE, "margin": "wide"}, "'margin' needs a number that float32 has, up to 3.4e+38, got \"wide\""),
    ({**LINE, "margin": True}, "'margin' needs a number that float32 has, up to 3.4e+38, got true"),
    ({**LINE, "margin": 10**400}, "'margin' needs a number that float32 has, up to 3.4e+38, got 1000"),
    ({**LINE, "margin": -1e308}, "'margin' needs a number that float32 has, up to 3.4e+38, got -1e+308"),
    ({**LINE, "margin": math.inf}, "'margin' needs a number that float32 has, up to 3.4e+38, got Infinity"),
    ({**LINE, "chosen": "\ud800"}, "'chosen' has half of a surrogate pair"),
    ({**LINE, "rejected": "cards " * 1100}, "prompt and 'rejected' have "),
    ({**LINE, "prompt": " "}, "the prompt is empty"),
]
BAD_FLAGS = [
    (["--data", "none.jsonl"], "data none.jsonl: No such file"),
    (["--model", "./nowhere"], "model ./nowhere: no such folder"),
    (["--center-coefficient", "-1"], "center_coefficient: got '-1', needs a number greater than or equal to 0"),
    (["--pairs-per-step", "0"], "pairs_per_step: got '0', needs a number greater than or equal to 1"),
    (["--gr-pass2-ratio", "pass1"], "unknown flag --gr-pass2-ratio, the closest valid one is"),
    (["--rewards", "math"], "unknown flag --rewards"),
    (["--max-length", "3"], "tokens, the most that fit are 3 (long_pairs: skip leaves such pairs out)"),
    (["--max-length", "3", "--long-pairs", "skip"], "every one of its 40 pairs has a text longer than 3 tokens"),
    (["--eval-data", "DATA", "--eval-pairs", "0"], "eval_data: eval_pairs is 0, which evaluates nothing"),
    (["--warmup-steps", "3"], "warmup_steps: got 3, lr_scheduler_type constant has none"),
    (["--name", "a/b"], "name: got 'a/b', needs one printable path component"),
    (["--gr-gamma", "1e30"], "gr_gamma: must be 0 or within a factor of 2**64 of epsilon"),
    (["--accept-changed-inputs"], "--accept-changed-inputs needs --resume"),
    (["--resume"], "holds no run to resume"),
    (["--model", "none"], "model: got None, needs text"),
]


def test_bad_input_is_one_sentence_and_writes_nothing(job, tmp_path, capsys):
    """One test, so that the model is loaded by one process."""

    def check(words, sentence):
        assert main(["reward-model", *words]) == 2
        said = capsys.readouterr().err
        assert sentence in said and said.startswith("redit-fast: ") and said.count("\n") == 1, said
        assert not (tmp_path / "judge").exists()

    for line, sentence in BAD_LINES:
        file = preferences.write(tmp_path / "bad.jsonl", [line])
        check(flags({**job, "data": str(file)}), sentence if "prompt and" in sentence else f"bad.jsonl:1: {sentence}")
    for words, sentence in BAD_FLAGS:
        check([*flags(job), *(job["data"] if word == "DATA" else word for word in words)], sentence)
    for missing in ("model", "data"):
        check(flags({name: value for name, value in job.items() if name != missing}), f"{missing}: a reward model is ")
    check(["--resume"], "--resume needs --name")


def test_every_hostile_value_is_one_sentence_with_the_name(job):
    for field in RewardModelConfig.model_fields:
        for value in HOSTILE:
            try:
                RewardModelConfig(**{"model": "m", "data": "d", field: value})
                continue
            except ValueError:
                pass
            with pytest.raises(ValueError, match=field) as error:
                config_of(job, **{field: value})
            assert "another value" not in str(error.value) and len(str(error.value).splitlines()) == 1
            assert len(str(error.value)) < 500


def test_parquet_with_columns_of_other_names_gives_the_same_pairs(job, tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet", reason="pyarrow is not installed")
    from pyarrow import Table

    lines = preferences.records(8)
    names = {"prompt": "question", "chosen": "better", "rejected": "worse"}
    renamed = [{"id": i, **{names[key]: text for key, text in line.items()}} for i, line in enumerate(lines)]
    parquet.write_table(Table.from_pylist(renamed), tmp_path / "pairs.parquet")
    file = preferences.write(tmp_path / "pairs.jsonl", lines)
    columns = [f"{ours}={theirs}" for ours, theirs in names.items()]
    one, other = (
        parts(config_of(job, eval_pairs=0, **more), None).pairs
        for more in ({"data": str(file)}, {"data": str(tmp_path / "pairs.parquet"), "columns": columns})
    )
    assert one == other and len(one.train) == 8


def test_a_tracker_has_the_numbers_of_metrics_jsonl(job, tmp_path):
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    train(config_of(job, name="run", track=["tensorboard"]))
    found = dict(of_tensorboard(tmp_path / "run"))
    expected = numbers_of(tmp_path / "run")
    assert found.keys() == expected.keys() and found == pytest.approx(expected, rel=1e-6)
    assert (0, "accuracy/held_out") in found and (2, "margin/train") in found


LIVE = [
    {"center_coefficient": 0.5}, {"pairs_per_step": 5}, {"packing": "off"}, {"seed": 1}, {"eval_pairs": 3},
    {"learning_rate": 0.1}, {"weight_decay": 5.0}, {"max_grad_norm": 1e-3}, {"gr_gamma": 0.1},
    {"adam_beta1": 0.5}, {"adam_beta2": 0.5},
    {"lr_scheduler_type": "linear"}, {"dtype": "bfloat16"}, {"max_length": 60, "long_pairs": "skip"},
]  # fmt: skip


@pytest.mark.filterwarnings("ignore:the applied perturbation has cosine")
def test_every_setting_changes_what_happens(job, tmp_path):
    """Of two steps the lines without times, and where they are equal the weights. Those of files and times of
    evaluations and checkpoints have tests of their own."""
    lines = preferences.records(40)
    long = [{**line, "chosen": line["chosen"] + " cards" * 40} for line in lines[20:]]
    file = preferences.write(tmp_path / "mixed.jsonl", lines[:20] + long)
    found = []
    for number, change in enumerate(({}, {}, *LIVE)):
        train(config_of(job, data=str(file), name=f"{number}", **change, checkpoint_every=2))
        run = tmp_path / f"{number}"
        found.append((timeless(run / "metrics.jsonl"), load_file(run / "checkpoints/step-000002/model.safetensors")))
    (base, weights), (again, same), *others = found
    assert base == again and all(torch.equal(weights[name], same[name]) for name in weights)
    for change, (other, moved) in zip(LIVE, others):
        assert other != base or any(not torch.equal(weights[name], moved[name]) for name in weights), change


def test_a_run_of_another_command_is_named(job, settings, tmp_path, capsys):
    train(config_of(job))
    assert main(["train", "--resume", "--name", "judge", "--out-dir", str(tmp_path)]) == 2
    assert capsys.readouterr().err == f"redit-fast: {tmp_path}/judge holds a run of `redit-fast reward-model`\n"
    for name in ("config.json", "metrics.jsonl"):
        (tmp_path / "grpo").mkdir(exist_ok=True)
        (tmp_path / "grpo" / name).write_text(json.dumps(settings) if name == "config.json" else "")
    assert main(["reward-model", "--resume", "--name", "grpo", "--out-dir", str(tmp_path)]) == 2
    assert capsys.readouterr().err == f"redit-fast: {tmp_path}/grpo holds a run of `redit-fast train`\n"


def test_what_may_not_change_on_resume_is_named(job, tmp_path, capsys):
    train(config_of(job, lr_scheduler_type="linear"))
    place = ["reward-model", "--resume", "--name", "judge", "--out-dir", str(tmp_path)]
    for words, sentence in (
        (["--center-coefficient", "1"], "center_coefficient was 0.0 in"),
        (["--pairs-per-step", "2"], "pairs_per_step was 6 in"),
        (["--steps", "5"], "lr_scheduler_type linear ends at the last step"),
    ):
        assert main([*place, *words]) == 2
        assert sentence in capsys.readouterr().err
    data = tmp_path / "pairs.jsonl"
    shutil.copy(job["data"], data)
    train(config_of(job, data=str(data), name="changed"))
    data.write_text(data.read_text().replace("cards", "coins", 1))
    words = ["reward-model", "--resume", "--name", "changed", "--out-dir", str(tmp_path), "--steps", "3"]
    assert main(words) == 2
    assert f"data {data} has changed since" in capsys.readouterr().err
    assert main([*words, "--accept-changed-inputs"]) == 0
    assert lines_of(tmp_path / "changed" / "metrics.jsonl")[-1]["step"] == 3


def test_several_processes_are_refused(job, monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="redit-fast reward-model is one process: start it without torchrun"):
        train(config_of(job))


def test_fields_that_train_has_too_are_that_ones():
    own = {"model", "data", "eval_data", "device", "name"}  # which the demo has no part in here
    for name in RewardModelConfig.model_fields.keys() & TrainConfig.model_fields.keys() - own:
        here, there = RewardModelConfig.model_fields[name], TrainConfig.model_fields[name]
        assert repr((here.annotation, here.metadata)) == repr((there.annotation, there.metadata)), name
    for name in RewardModelConfig.model_fields:
        assert "Default:" in describe(name)


def test_the_command_of_a_run_gives_it_back(job):
    import shlex

    from redit_fast import cli, commands

    original = config_of(job, gr_gamma=0.5, checkpoint_activations=True, max_grad_norm=None, long_pairs="skip")
    words = shlex.split(original.command())
    assert words[:2] == ["redit-fast", "reward-model"]
    parser = cli._Parser()
    cli._add_reward_model_flags(parser)
    given = commands.settings(parser.parse_args(words[2:]), RewardModelConfig.model_fields)
    assert config_file.load_as(RewardModelConfig, None, given) == original


def test_a_configuration_file_is_read_with_its_places(job, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sub").mkdir()
    preferences.write(tmp_path / "sub" / "pairs.jsonl", preferences.records(2))
    file = tmp_path / "sub" / "judge.yaml"
    file.write_text("model: m\ndata: pairs.jsonl\ncenter_coefficient: 0.1\n")
    found = config_file.load_as(RewardModelConfig, "sub/judge.yaml", {"steps": "7"})
    assert (found.data, found.center_coefficient, found.steps) == ("sub/pairs.jsonl", 0.1, 7)
    file.write_text("model: m\ndata: d\npairs_per_stepp: 1\n")
    with pytest.raises(
        ValueError, match="judge.yaml:3: unknown key 'pairs_per_stepp', the closest valid one is 'pairs_"
    ):
        config_file.load_as(RewardModelConfig, file)


def test_activations_are_computed_again_with_the_same_gradient(job):
    found = []
    for again in (False, True):
        whole = parts(config_of(job, checkpoint_activations=again), None)
        PairBatch.of(whole.pairs.train[:4], config_of(job), 0, packed=True).backward(whole.model)
        found.append(gradient(whole.model))
    assert torch.equal(*found)


@pytest.mark.draws
def test_from_pairs_to_a_reward_model_to_grpo_with_gr_to_the_report(settings, job, tmp_path, monkeypatch):
    """The RLHF path: GRPO is paid by what was learned from pairs, and the reward rises."""
    monkeypatch.chdir(tmp_path)
    file = preferences.write(tmp_path / "pairs.jsonl", preferences.records(300))
    judging = {**job, "data": "pairs.jsonl", "out_dir": "runs", "name": "judge", "steps": 24, "pairs_per_step": 16}
    assert main(["reward-model", *flags({**judging, "checkpoint_every": 24, "learning_rate": 2e-3})]) == 0
    assert file.exists()
    rlhf = {**settings, "rewards": ["model:runs/judge/checkpoints/step-000024"], "out_dir": "runs", "name": "policy"}
    rlhf |= {"steps": 8, "prompts_per_step": 4, "group_size": 8, "checkpoint_every": 8, "eval_every": 8}
    assert main(["train", *flags({**rlhf, "gr_gamma": 1e-3, "gr_epsilon": 1e-3, "learning_rate": 3e-3})]) == 0
    metrics = lines_of(tmp_path / "runs" / "policy" / "metrics.jsonl")
    paid = [line["rewards/judge-step-000024/mean"] for line in metrics[1:]]
    assert sum(paid[-3:]) > sum(paid[:3]) and metrics[-1]["gr/step_cos"] > 0.99
    assert "judge-step-000024" in (tmp_path / "runs" / "policy" / "report.html").read_text()
