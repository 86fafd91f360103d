"""Rewards that are a model's: their names and settings, what a run knows of them, and runs that stop and go on."""

import sys

import pytest

from redit_fast.cli import main
from redit_fast.training import config_file, generation, inputs, setup
from redit_fast.training.config import TrainConfig
from redit_fast.training.config_values import JUDGE_KEY
from redit_fast.training.rewards import resolve, score
from redit_fast.training.rewards.user_code import RewardError
from redit_fast.training.rollout import connection
from redit_fast.training.trainer import train
from tests.training.fake_judge import OWN, FakeChat, config, of, save_grader, serving
from tests.training.fake_vllm import running
from tests.training.jobs import flags, lines_of


@pytest.fixture
def chat(monkeypatch):
    with serving(monkeypatch) as server:
        yield server


@pytest.fixture(scope="module")
def grader(tmp_path_factory):
    folder = tmp_path_factory.mktemp("grader")
    save_grader(folder)
    return folder


def write(path, text):
    path.write_text(text)
    return str(path)


def test_a_module_of_the_users_own_with_a_reserved_name_is_named_with_the_way_out(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "elsewhere" / "model").mkdir(parents=True)
    write(tmp_path / "elsewhere" / "model" / "__init__.py", "")
    monkeypatch.syspath_prepend(str(tmp_path / "elsewhere"))
    write(tmp_path / "judge.py", "def f(prompts, completions):\n    return [3.0] * len(prompts)\n")
    for name, file, way in (
        ("judge:f", tmp_path / "judge.py", "./judge:f"),
        ("model:f", tmp_path / "elsewhere" / "model" / "__init__.py", "elsewhere/model:f"),
    ):
        with pytest.raises(RewardError) as error:
            resolve([name], [])
        assert f"rewards: {name!r} is a " in str(error.value) and f"{file} write {way!r}" in str(error.value)
    assert score(resolve(["./judge:f"], []), ["q"], ["c"], {}).item() == 3.0
    del sys.modules["judge"]
    write(tmp_path / "elsewhere" / "c.yaml", "model: m\ndata: d\nrewards: [model:f]")
    with pytest.raises(ValueError, match=r"rewards: 'model:f' is a model in .* write 'elsewhere/model:f'$"):
        config_file.load("elsewhere/c.yaml")
    with pytest.raises(RewardError, match="'judge:a/b' needs the settings of a run"):
        resolve(["judge:a/b"], [])


def test_paths_of_a_configuration_are_looked_up_as_those_of_the_model(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sub" / "grader").mkdir(parents=True)
    write(tmp_path / "sub" / "t.txt", "{completion}")
    text = (
        "model: m\ndata: d\njudge_template: t.txt\nrewards: [judge:grader, model:grader, model:o/n, judge:http://h:1]"
    )
    write(tmp_path / "sub" / "c.yaml", text)
    found = config_file.load("sub/c.yaml")
    assert found.rewards == ["judge:sub/grader", "model:sub/grader", "model:o/n", "judge:http://h:1"]
    assert found.judge_template == "sub/t.txt"


BAD = [
    ({"rewards": ["judge:"]}, "rewards: judge: needs the path of a model behind the colon"),
    ({"rewards": ["model:"]}, "rewards: model: needs the path of a model behind the colon"),
    ({"rewards": ["model:http://u:secret@h"]}, "rewards: model: needs the path of a model behind the colon"),
    ({"rewards": ["judge:http://u:secret@h"]}, f"a key goes into the variable {JUDGE_KEY}"),
    ({"rewards": ["judge:u:secret@127.0.0.1:8000"]}, "needs the path of a model or the URL of a server, http://HOST"),
    ({"rewards": ["judge://u:secret@h"]}, "needs the path of a model or the URL of a server, http://HOST:PORT"),
    ({"rewards": ["judge:http:u:secret@h"]}, "needs the path of a model or the URL of a server, http://HOST:PORT"),
    ({"rewards": ["judge:ftp://h"]}, "rewards: judge: needs the path of a model or the URL of a server"),
    ({"rewards": ["judge:http://h?key=secret"]}, "the URL has a part after ? or #"),
    ({"rewards": "judge:http://u:secret@h"}, "needs a list"),
    ({"judge_temperature": 0.5}, "judge_temperature: got 0.5, only a reward judge:PATH or judge:URL has one"),
    ({"judge_template": "t"}, "judge_template: got 't', only a reward judge:PATH or judge:URL has one"),
    ({"rewards": ["judge:m"], "judge_model": "x"}, "judge_model: got 'x', only a reward judge:URL has one"),
    ({"rewards": ["judge:m"], "judge_failures": 3}, "judge_failures: got 3, only a reward judge:URL has one"),
    ({"rewards": ["judge:m"], "judge_top_p": 0}, "judge_top_p: got 0, needs a number greater than 0"),
    ({"rewards": ["judge:m"], "judge_temperature": -1}, "judge_temperature: got -1, needs a number greater than or eq"),
    ({"rewards": ["judge:m"], "judge_max_tokens": 0}, "judge_max_tokens: got 0, needs a number greater than or equal"),
    ({"rewards": ["judge:m"], "rollout_timeout": 3}, "rollout_timeout: got 3.0, only a rollout by a server has one"),
    ({"reward_scales": [1.0, 2.0]}, "reward_scales: got 2 for 1 reward functions"),
    ({"reward_scales": [0.0]}, "reward_scales: got 0.0, needs positive numbers that float32 has"),
    ({"reward_scales": [-1.0]}, "reward_scales: got -1.0, needs positive numbers that float32 has"),
    ({"reward_scales": [1e-40]}, "reward_scales: got 1e-40, needs positive numbers that float32 has"),
    ({"reward_scales": [1e39]}, "reward_scales: got 1e+39, needs positive numbers that float32 has"),
    ({"reward_scales": ["x"]}, "reward_scales[0]: got 'x', needs a number"),
]


@pytest.mark.parametrize(("settings", "sentence"), BAD)
def test_bad_settings_are_one_sentence_without_a_password(settings, sentence):
    given = {**OWN, "rewards": ["exact_answer"], **settings}
    with pytest.raises(ValueError) as error:
        config_file.load(None, given)
    assert sentence in str(error.value) and "secret" not in str(error.value)


def test_reward_scales_win_over_what_functions_say_and_reach_the_dither():
    names = ["gsm8k_correctness", "xml_format"]
    plain, scaled = (TrainConfig(**OWN, rewards=names, **more) for more in ({}, {"reward_scales": [3.0, 0.5]}))
    for given, scales in ((plain, [2.0, 1.0]), (scaled, [3.0, 0.5])):
        functions = resolve(names, ["answer"], given)
        assert list(setup.dither(given, functions).reward_scale) == scales


def test_inputs_know_a_judges_template_and_model(grader, tmp_path):
    template = write(tmp_path / "t.txt", "{completion}")
    data = write(tmp_path / "d.jsonl", "{}")
    given = config(grader, data=data, model=str(tmp_path), judge_template=template)
    before = inputs.of(given)
    assert before["judge_template"].keys() == {template}
    assert {name.rpartition("/")[2] for name in before["reward model"]} >= {"config.json", "model.safetensors"}
    write(tmp_path / "t.txt", "other {completion}")
    assert inputs.of(given)["judge_template"] != before["judge_template"]
    assert "reward model" not in inputs.of(config(data=data, model=str(tmp_path)))
    (tmp_path / "t.txt").unlink()
    with pytest.raises(ValueError, match=rf"^judge_template {template}: No such file or directory$"):
        inputs.of(given)


def rewarded(settings, reward, **more):
    return {**settings, "rewards": [reward], "steps": 3, "eval_problems": 0, "gr_gamma": 0, **more}


@pytest.mark.filterwarnings("ignore:.*judge.*:UserWarning")
def test_a_judge_that_falls_silent_stops_a_run_after_a_checkpoint_and_it_goes_on_with_another(
    settings, tmp_path, chat, monkeypatch, capsys
):
    monkeypatch.setattr(connection, "AT_ONCE", 1)  # the last ones in a row are those that come last
    chat.grades, chat.fault = [1 + i % 5 for i in range(1000)], of({"error": "down"}, 500)
    chat.good = 2 + 3 * 4 + 2  # of the trial, of a step, and a few of the next
    job = rewarded(settings, f"judge:{chat.url}", judge_failures=4, rollout_retries=0)
    assert main(["train", *flags(job)]) == 2
    assert "status 500, down; the last" in capsys.readouterr().err
    run = tmp_path / "run"
    assert [line["step"] for line in lines_of(run / "metrics.jsonl")][-1] == 1
    with running(FakeChat()) as another:
        another.grades = [1 + i % 5 for i in range(1000)]
        job["rewards"] = [f"judge:{another.url}/v1"]
        assert main(["train", "--resume", *flags(job)]) == 0
        assert another.seen
    lines = lines_of(run / "metrics.jsonl")
    assert [line["step"] for line in lines][-1] == 3 and all("rewards/judge/mean" in line for line in lines[1:])
    assert "127.0.0.1" in (run / "config.json").read_text()

    asked = {"samples": 1, "greedy": True}
    source = str(run / "checkpoints" / "step-000003")
    _, taken = generation.settings_of("generate", source, {"data": "d.jsonl"}, **asked)
    assert taken.rewards == job["rewards"] and taken.judge_failures == 4
    _, taken = generation.settings_of("generate", source, {"data": "d.jsonl", "rewards": ["math"]}, **asked)
    assert taken.rewards == ["math"] and taken.judge_failures == 16


def test_a_run_with_a_local_judge_that_is_resumed_is_the_same_run(settings, tmp_path, grader):
    job = rewarded(settings, f"judge:{grader}", judge_max_tokens=1)
    for name, parts in (("straight", [3]), ("resumed", [1, 3])):
        for steps in parts:
            train(config_file.load(None, {**job, "name": name, "steps": steps}), resume=steps != parts[0])
    for file in ("checkpoints/step-000003/model.safetensors", "completions.jsonl"):
        assert (tmp_path / "straight" / file).read_bytes() == (tmp_path / "resumed" / file).read_bytes()
    rewards = {line["rewards"]["judge"] for line in lines_of(tmp_path / "straight" / "completions.jsonl")}
    assert len(rewards) > 2
