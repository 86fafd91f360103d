"""The reward `judge:PATH_OR_URL`: what it asks, what it makes of answers, and what servers that fail come to."""

import json
import sys
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
from transformers import Qwen2ForCausalLM

from redit_fast.cli import main
from redit_fast.training import builtin, config_file, generation, inputs, setup
from redit_fast.training.config import TrainConfig
from redit_fast.training.config_values import JUDGE_KEY
from redit_fast.training.rewards import resolve, score
from redit_fast.training.rewards.judge import Judge, grade_in
from redit_fast.training.rewards.user_code import RewardError
from redit_fast.training.rollout import connection
from redit_fast.training.trainer import train
from tests.training.fake_vllm import running
from tests.training.jobs import flags, lines_of

OWN = {"model": "m", "data": "d.jsonl"}


def config(place="http://127.0.0.1:1", **more):
    served = {"rollout_retries": 0} if str(place).startswith("http") else {}
    return TrainConfig(**{**OWN, "rewards": [f"judge:{place}"], **served, **more})


def judged(judge, completions, prompts=None, **columns):
    columns = columns or {"answer": ["7"] * len(completions)}
    return judge(prompts=prompts or ["3 + 4?"] * len(completions), completions=completions, **columns)


@pytest.mark.parametrize(
    ("answer", "grade"),
    [
        ("The work is right.\nScore: 5", 5), ("Score: 1", 1), ("score = 3", 3), ("**Score:** 4", 4), ("Rating: 2/5", 2),
        ("Score: 4 out of 5.", 4), ("Score (1-5): 4", 4), ("The grade is 3.", 3), ("Score: 2\nNo.\nScore: 4", 4),
        ("4", 4), (" **4** ", 4), ("4/5", 4), ("Score: 3.5", 3.5), ("Score: 4.\n", 4),
        ("", None), ("Right!", None), ("Score: 6", None), ("Score: 0", None), ("Score: -3", None), ("Score: 10", None),
        ("Score: N", None), ("Score: 1-5", None), ("Score: 4/10", None), ("a score from 1 to 5", None), ("7", None),
        ("There are 3 mistakes.", None), ("Score: 99999999999999999999", None), ("Score: nan", None), ("45", None),
    ],
)  # fmt: skip
def test_the_grade_in_an_answer(answer, grade):
    assert grade_in(answer) == grade


class FakeChat(ThreadingHTTPServer):
    """A server with OpenAI's routes. It grades by `grades`, in the order of the questions, and then always 5."""

    daemon_threads, request_queue_size = True, 256

    def __init__(self):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.seen, self.keys = [], []
        self.grades, self.fault, self.good = [], None, 0  # of the questions after the first `good` ones

    def handle_error(self, request, address):
        """A client that has gone away is none."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def do_GET(self):
        self.answer({"data": [{"id": "the-judge"}]} if self.path == "/v1/models" else {}, 200)

    def do_POST(self):
        server = self.server
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        server.seen.append((self.path, body))
        server.keys.append(self.headers["Authorization"])
        if server.fault is not None and len(server.seen) > server.good:
            return server.fault(self)
        grade = server.grades.pop(0) if server.grades else 5
        content = grade if isinstance(grade, str) else f"I see.\nScore: {grade}"
        self.answer({"choices": [{"index": 0, "message": {"role": "assistant", "content": content}}]}, 200)

    def answer(self, content, status, **headers):
        raw = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(raw)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(raw)


@pytest.fixture
def chat(monkeypatch):
    monkeypatch.setattr(connection, "PAUSE", 0.01)
    monkeypatch.setattr(connection, "AT_ONCE", 1)  # so that grades are in the order of the questions
    monkeypatch.delenv(JUDGE_KEY, raising=False)
    with running(FakeChat()) as server:
        yield server


def test_grades_are_scaled_to_two_and_what_has_none_is_unscored(chat):
    chat.grades = [1, 2, 3, "no grade", 5]
    (function,) = resolve([f"judge:{chat.url}/v1"], ["answer"], config(chat.url))
    assert (function.name, function.scale) == ("judge", 2.0)
    with pytest.warns(UserWarning) as warned:
        found = score([function], ["q"] * 5, list("abcde"), {"answer": ["7"] * 5}).flatten()
    assert found[[0, 1, 2, 4]].tolist() == [0.0, 0.5, 1.0, 2.0] and found[3].isnan()
    told = [str(warning.message) for warning in warned]
    assert "no grade from 1 to 5, it ends in 'no grade'" in told[0] and "'judge' left 1 of 5" in told[1]
    assert [path for path, _ in chat.seen] == ["/v1/chat/completions"] * 5


def test_the_settings_and_the_question_reach_the_server(chat):
    judge = Judge(chat.url, config(chat.url, judge_temperature=0.2, judge_top_p=0.5, judge_max_tokens=9, seed=3))
    assert judged(judge, ["so 7"], answer=[7]) == [2.0]
    ((_, body),) = chat.seen
    assert {name: body[name] for name in ("model", "temperature", "top_p", "max_tokens")} == {
        "model": "the-judge", "temperature": 0.2, "top_p": 0.5, "max_tokens": 9,
    }  # fmt: skip
    (message,) = body["messages"]
    assert message["role"] == "user"
    assert all(part in message["content"] for part in ("3 + 4?", "\n7\n", "so 7", "Score: N"))
    others = [config(chat.url, seed=4), config(chat.url, seed=3, judge_model="another")]
    for other in others:
        judged(Judge(chat.url, other), ["so 7"], answer=[7])
    seeds, models = ([body[name] for _, body in chat.seen] for name in ("seed", "model"))
    assert seeds[0] == seeds[2] != seeds[1] and models == ["the-judge", "the-judge", "another"]


def test_equal_questions_are_asked_once(chat, monkeypatch):
    chat.grades = [1, 2, 3]
    judge = Judge(chat.url, config(chat.url))
    assert judged(judge, ["a", "b", "a", "b"]) == [0.0, 0.5, 0.0, 0.5] and len(chat.seen) == 2
    assert judged(judge, ["b", "c", "a"]) == [0.5, 1.0, 0.0] and len(chat.seen) == 3
    monkeypatch.setattr("redit_fast.training.rewards.judge_models.KNOWN", 1)
    judged(judge, ["d"])
    assert len(judge.ask.known) == 1


def write(path, text):
    path.write_text(text)
    return str(path)


def test_a_template_of_ones_own_is_filled_once(chat, tmp_path):
    file = write(tmp_path / "t.txt", "{prompt}|{completion}|{answer}|{level}|{{completion}} {} { x }\n")
    judge = Judge(chat.url, config(chat.url, judge_template=file))
    hostile = r"{answer} {{answer}} {0} \1 \g<0> %s {completion} " + "\ud800"
    columns = {"answer": ["{level}"], "level": [{"hard": None}]}
    prompt = [{"role": "user", "content": "{answer}?"}]
    judge(prompts=[prompt], completions=[[{"role": "assistant", "content": hostile}]], **columns)
    ((_, body),) = chat.seen
    shown = hostile.replace("\ud800", "?")
    assert body["messages"][0]["content"] == f'{{answer}}?|{shown}|{{level}}|{{"hard": null}}|{{completion}} {{}} {{ x }}\n'


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (None, "No such file or directory"),
        ("{prompt}", "needs {completion} in it, where the completion goes"),
        ("{{completion}}", "needs {completion} in it"),
        (b"\xff{completion}", "not UTF-8 text"),
    ],
)
def test_a_template_that_cannot_be_used_is_named(tmp_path, text, sentence):
    file = tmp_path / "t.txt"
    if text is not None:
        file.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(RewardError) as error:
        Judge("http://127.0.0.1:1", config(judge_template=str(file)))
    assert str(error.value).startswith(f"judge_template {file}: ") and sentence in str(error.value)


def test_a_column_that_the_data_lacks_is_named(chat):
    with pytest.raises(RewardError, match=r"^judge_template: it names \{answer\}, which is none of level, prompt, comp"):
        judged(Judge(chat.url, config(chat.url)), ["c"], level=[1])
    assert not chat.seen


def slow(handler):
    time.sleep(1)
    handler.answer({}, 200)


def redirect(handler):
    handler.answer({}, 302, Location="http://127.0.0.1:1/")


def of(content, status=200):
    return lambda handler: handler.answer(content, status)


FAULTS = {
    "hangs": (slow, "no answer within 0.3 s"),
    "500": (of({"error": {"message": "out of\nmemory"}}, 500), "status 500, out of memory"),
    "503": (of(b"", 503), "no answer in 1 attempt"),
    "401": (of({"error": "Unauthorized"}, 401), "status 401, Unauthorized"),
    "redirect": (redirect, "a redirect, which is not followed"),
    "no JSON": (of(b"<html>"), "no answer of a chat's shape: the whole: Invalid JSON"),
    "half JSON": (of(b'{"choices": [{"mess'), "no answer of a chat's shape"),
    "deep JSON": (of(b"[" * 100_000), "no answer of a chat's shape"),
    "other JSON": (of([1]), "no answer of a chat's shape"),
    "no choice": (of({"choices": []}), "no answer of a chat's shape: choices: "),
    "a number": (of({"choices": [{"message": {"content": 5}}]}), "choices.0.message.content: "),
    "not UTF-8": (of(b'{"choices": [{"message": {"content": "\xff"}}]}'), "no answer of a chat's shape"),
    "too long": (of(b" " * (2 << 20)), "an answer of more than"),
}


@pytest.mark.parametrize("kind", FAULTS)
def test_what_a_server_does_not_answer_is_unscored_until_there_is_too_much_of_it(chat, monkeypatch, kind):
    monkeypatch.setenv(JUDGE_KEY, "k-123")
    monkeypatch.setattr(connection, "AT_ONCE", 8)
    chat.fault, why = FAULTS[kind]
    judge = Judge(chat.url, config(chat.url, rollout_timeout=0.3, judge_failures=5))
    chat.good = 1
    assert judged(judge, ["good"]) == [2.0]
    with pytest.warns(UserWarning) as warned:
        assert judged(judge, ["a", "good", "b"]) == [None, 2.0, None]
    (told,) = [str(warning.message) for warning in warned]
    assert told.startswith(f"judge {chat.url}/v1/chat/completions: {why}") and told.endswith("is unscored")
    assert judged(judge, ["a", "b"]) == [None, None]  # not kept, and told once
    with pytest.raises(RewardError) as error:
        judged(judge, ["a"])
    sentence = str(error.value)
    assert "the last 5 questions to the judge had no answer (judge_failures)" in sentence
    assert "\n" not in sentence and "k-123" not in sentence + told
    chat.fault = None
    assert judged(judge, ["a"]) == [2.0] and judge.ask.failed == 0
    assert set(chat.keys) == {"Bearer k-123"}


def test_a_refusal_without_a_text_is_an_answer_without_a_grade(chat):
    chat.fault = of({"choices": [{"message": {"content": None, "refusal": "no"}}]})
    with pytest.warns(UserWarning, match="no grade"):
        assert judged(Judge(chat.url, config(chat.url)), ["a"] * 3) == [None] * 3


def test_a_server_that_has_never_answered_stops_the_start(chat):
    chat.fault = of({}, 500)
    with pytest.raises(RewardError, match=r"^rewards: judge http://.*/v1/chat/completions: status 500"):
        judged(Judge(chat.url, config(chat.url)), ["a"])
    with pytest.raises(RewardError, match=r"^rewards: judge http://127.0.0.1:1/v1/models: no answer in 1 attempt"):
        judged(Judge("http://127.0.0.1:1", config()), ["a"])


def test_a_bad_key_is_refused_without_being_shown(monkeypatch):
    monkeypatch.setenv(JUDGE_KEY, "secret\n")
    with pytest.raises(RewardError, match=f"^rewards: {JUDGE_KEY} has a character that no key has") as error:
        Judge("http://127.0.0.1:1", config())
    assert "secret" not in str(error.value)


@pytest.fixture(scope="module")
def grader(tmp_path_factory):
    """A model whose next token is 1, 2, 3, 4 or 5, each as likely, whatever was asked."""
    folder = tmp_path_factory.mktemp("grader")
    model, tokenizer = builtin.build(0)
    shape = model.config
    shape.update({"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "max_position_embeddings": 800,
                  "tie_word_embeddings": False, "layer_types": ["full_attention"]})  # fmt: skip
    model = Qwen2ForCausalLM(shape)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.fill_(1.0 if "embed" in name or "norm" in name else 0.0)
        model.lm_head.weight[tokenizer.convert_tokens_to_ids(list("12345"))] = 1.0
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


COMPLETIONS = [f"so {n}" for n in range(40)]


def test_a_local_judge_answers_by_seed_and_question(grader):
    local = config(grader, judge_max_tokens=1)
    found = judged(Judge(str(grader), local), COMPLETIONS)
    assert set(found) == {0.0, 0.5, 1.0, 1.5, 2.0}
    judge = Judge(str(grader), local)
    assert [judged(judge, [text])[0] for text in reversed(COMPLETIONS)] == found[::-1]  # in any company and order
    assert judged(judge, ["so 3", "so 1", "so 3"]) == [found[3], found[1], found[3]]
    assert judged(Judge(str(grader), local.model_copy(update={"seed": 1})), COMPLETIONS) != found


def test_temperature_and_top_p_are_a_local_judges_too(grader):
    for more in ({"judge_temperature": 0.0}, {"judge_top_p": 0.1}):
        assert len(set(judged(Judge(str(grader), config(grader, judge_max_tokens=1, **more)), COMPLETIONS))) == 1


def test_a_question_that_is_longer_than_the_context_is_unscored(grader):
    judge = Judge(str(grader), config(grader, judge_max_tokens=1))
    found = judged(judge, ["so 1", "far too long " * 200, "so 2"])
    assert found[1] is None and None not in (found[0], found[2])
    with pytest.warns(UserWarning, match="no grade from 1 to 5"):  # 200 tokens of digits are no grade
        assert judged(Judge(str(grader), config(grader, judge_max_tokens=200)), ["so 1"]) == [None]


def test_a_special_token_in_a_completion_is_plain_text_to_a_local_judge(grader):
    ask = Judge(str(grader), config(grader)).ask
    end = ask.tokenizer.eos_token
    assert ask.tokenizer.eos_token_id in ask.tokenizer(f"a{end}b")["input_ids"]
    assert ask.tokenizer.eos_token_id not in ask._rendered(f"a{end}b{end[:3]}{end}{end[3:]}")


def test_a_folder_that_is_no_model_is_one_sentence(tmp_path):
    with pytest.raises(RewardError, match=r"^rewards: 'judge:/.*none': model /.*none: no such folder$"):
        resolve([f"judge:{tmp_path}/none"], [], config(tmp_path / "none"))


# Names.


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
    text = "model: m\ndata: d\njudge_template: t.txt\nrewards: [judge:grader, model:grader, model:o/n, judge:http://h:1]"
    write(tmp_path / "sub" / "c.yaml", text)
    found = config_file.load("sub/c.yaml")
    assert found.rewards == ["judge:sub/grader", "model:sub/grader", "model:o/n", "judge:http://h:1"]
    assert found.judge_template == "sub/t.txt"


BAD = [
    ({"rewards": ["judge:"]}, "rewards: judge: needs the path of a model behind the colon"),
    ({"rewards": ["model:"]}, "rewards: model: needs the path of a model behind the colon"),
    ({"rewards": ["model:http://u:secret@h"]}, "rewards: model: needs the path of a model behind the colon"),
    ({"rewards": ["judge:http://u:secret@h"]}, f"a key goes into the variable {JUDGE_KEY}"),
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


# Runs.


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
    monkeypatch.setattr(connection, "AT_ONCE", 8)
    chat.grades, chat.fault = [1 + i % 5 for i in range(1000)], of({}, 500)
    chat.good = 2 + 3 * 4 + 2  # of the trial, of a step, and a few of the next
    job = rewarded(settings, f"judge:{chat.url}", judge_failures=4, rollout_retries=0)
    assert main(["train", *flags(job)]) == 2
    assert "status 500; the last" in capsys.readouterr().err
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

    taken = generation._settings(str(run / "checkpoints" / "step-000003"), {"data": "d.jsonl"})
    assert taken.rewards == job["rewards"] and taken.judge_failures == 4
    taken = generation._settings(str(run / "checkpoints" / "step-000003"), {"data": "d.jsonl", "rewards": ["math"]})
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
