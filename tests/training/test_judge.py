"""The reward `judge:PATH_OR_URL`: what it asks, what it makes of answers, and what servers that fail come to."""

import os
import time

import pytest

from redit_fast.training.config_values import JUDGE_KEY
from redit_fast.training.rewards import resolve, score
from redit_fast.training.rewards.judge import Judge, grade_in
from redit_fast.training.rewards.user_code import RewardError
from redit_fast.training.rollout import connection
from tests.training.fake_judge import config, of, save_grader, serving


@pytest.fixture
def chat(monkeypatch):
    with serving(monkeypatch) as server:
        yield server


@pytest.fixture(scope="module")
def grader(tmp_path_factory):
    folder = tmp_path_factory.mktemp("grader")
    save_grader(folder)
    return folder


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


@pytest.mark.parametrize("filling", ["\n", " ", "*", "=", "Score", "Score ", "1", "1.", "Score: (", "is "])
def test_no_answer_takes_long_to_read(filling):
    """A small judge may go on with one token for ever."""
    start = time.process_time()
    assert grade_in("Score" + filling * (2**20 // len(filling))) in (None, 1)
    assert grade_in(f"Score:{' ' * 10**6}4") == 4
    assert time.process_time() - start < 2


def test_a_key_that_the_server_sends_back_is_not_shown(chat, monkeypatch):
    monkeypatch.setenv(JUDGE_KEY, "secret")
    chat.grades = ["Bearer secret" + "x" * 190]
    with pytest.warns(UserWarning, match="no grade from 1 to 5") as warned:
        assert judged(Judge(chat.url, config(chat.url)), ["so 7"]) == [None]
    assert "secret" not in str(warned[0].message) and "cret" not in str(warned[0].message)


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
    assert (
        body["messages"][0]["content"]
        == f'{{answer}}?|{shown}|{{level}}|{{"hard": null}}|{{completion}} {{}} {{ x }}\n'
    )


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


def test_a_template_that_is_a_pipe_is_refused_and_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "t.txt")
    with pytest.raises(RewardError, match=r"^judge_template .*t.txt: needs a regular file, since it is read more than"):
        Judge("http://127.0.0.1:1", config(judge_template=str(tmp_path / "t.txt")))


def test_a_column_that_the_data_lacks_is_named(chat):
    with pytest.raises(
        RewardError, match=r"^judge_template: it names \{answer\}, which is none of level, prompt, comp"
    ):
        judged(Judge(chat.url, config(chat.url)), ["c"], level=[1])
    assert not chat.seen


def slow(handler):
    time.sleep(3)
    handler.answer({}, 200)


def redirect(handler):
    handler.answer({}, 302, Location="http://127.0.0.1:1/")


FAULTS = {
    "hangs": (slow, "no answer within 1.5 s"),
    "500": (of({"error": {"message": "out of\nmemory"}}, 500), "status 500, out of memory"),
    "503": (of(b"", 503), "no answer in 1 attempt"),
    "401": (of({"error": "Unauthorized"}, 401), "status 401, Unauthorized"),
    "redirect": (redirect, "a redirect, which is not followed"),
    "no JSON": (of(b"<html>"), "no answer of a chat's shape: the whole: Invalid JSON"),
    "half JSON": (of(b'{"choices": [{"mess'), "no answer of a chat's shape"),
    "deep JSON": (of(b"[" * 100_000), "no answer of a chat's shape"),
    "other JSON": (of([1]), "no answer of a chat's shape"),
    "no choice": (of({"choices": []}), "no answer of a chat's shape: choices: "),
    "a number": (
        of({"choices": [{"message": {"content": 5}}]}),
        "no answer of a chat's shape: choices.0.message.content: ",
    ),
    "not UTF-8": (of(b'{"choices": [{"message": {"content": "\xff"}}]}'), "no answer of a chat's shape"),
    "too long": (of(b" " * (2 << 20)), "an answer of more than"),
}


@pytest.mark.parametrize("kind", FAULTS)
def test_what_a_server_does_not_answer_is_unscored_until_there_is_too_much_of_it(chat, monkeypatch, kind):
    monkeypatch.setenv(JUDGE_KEY, "k-123")
    monkeypatch.setattr(connection, "AT_ONCE", 8)
    chat.fault, why = FAULTS[kind]
    timeout = 1.5 if kind == "hangs" else 30.0  # a busy machine answers late
    judge = Judge(chat.url, config(chat.url, rollout_timeout=timeout, judge_failures=5))
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


COMPLETIONS = [f"so {n}" for n in range(40)]


def test_a_local_judge_answers_by_seed_and_question(grader):
    local = config(grader, judge_max_tokens=1, judge_top_p=1.0)
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
