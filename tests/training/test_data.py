"""Prompts from JSONL: what is read, how it is rendered, split and batched, and what bad files get."""

import json
import operator
import re
from collections import Counter
from fractions import Fraction

import pytest
from tokenizers import Tokenizer
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast, Qwen2Tokenizer

from redit_fast.training import config_file, data
from tests import ROOT

EXAMPLES = ROOT / "examples"


@pytest.fixture(scope="module")
def tokenizer():
    """Bytes as tokens, and a chat template."""
    made = Qwen2Tokenizer().train_new_from_iterator(["abc"], vocab_size=258, show_progress=False)
    made.chat_template = (
        "{% for m in messages %}{% if m['role'] == 'tool' %}{{ raise_exception('no tools here') }}{% endif %}"
        "[{{ m['role'] }}] {{ m['content'] }}\n{% endfor %}{% if add_generation_prompt %}[assistant] {% endif %}"
    )
    return made


def jsonl(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def settings(path, **changes):
    own = {"model": "m", "data": str(path), "rewards": ["exact_answer"], "eval_problems": 0}
    return config_file.load(None, {**own, **changes})


def test_data_too_small_to_hold_any_out_is_named(tokenizer, tmp_path, recwarn):
    few = jsonl(tmp_path / "few.jsonl", [{"prompt": "a"}, {"prompt": "b"}])
    equal = jsonl(tmp_path / "equal.jsonl", [{"prompt": "a"}] * 20)
    for path in (few, equal):
        assert data.load(settings(path), tokenizer).held_out == [] and not recwarn.list
        with pytest.warns(UserWarning, match="none of its .* prompts is held out"):
            assert data.load(settings(path, eval_problems=5), tokenizer).held_out == []
    enough = jsonl(tmp_path / "enough.jsonl", [{"prompt": letter} for letter in "abcde"])
    assert len(data.load(settings(enough, eval_problems=5), tokenizer).held_out) == 1 and not recwarn.list


GOOD = {"prompt": "2 + 2", "answer": "4"}


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ('{"prompt": "a" "answer": "4"}', "d.jsonl:37:16: malformed line: Expecting ',' delimiter"),
        ('{"prompt": "a", "answer": "4"', "d.jsonl:37:30: malformed line: Expecting ',' delimiter"),
        ("[1, 2]", "d.jsonl:37: malformed line: needs a JSON object, got list"),
        ('{"prompt": "a", "answer": ' + "9" * 5000 + "}", "d.jsonl:37: malformed line: Exceeds the limit"),
        ('{"prompt": "a", "answer": "4", "answer": "5"}', "d.jsonl:37: malformed line: key 'answer' is there twice"),
        ('{"prompt": "a", "answer": [{"x": 1, "x": 1}]}', "d.jsonl:37: malformed line: key 'x' is there twice"),
        ("[" * 100000, "d.jsonl:37: malformed line: maximum recursion depth"),
        ('{"question": "a", "answer": "4"}', "d.jsonl:37: no column 'prompt', found 'question', 'answer'"),
        ("{}", "d.jsonl:37: no column 'prompt', found none"),
        ('{"prompt": "a"}', "d.jsonl:37: column 'answer' is missing, line 1 has it"),
        ('{"prompt": "a", "answer": "4", "level": 1}', "d.jsonl:1: column 'level' is missing, line 37 has it"),
        ('{"prompt": " ", "answer": "4"}', "d.jsonl:37: the prompt is empty"),
        ('{"prompt": [{"role": "user", "content": ""}], "answer": "4"}', "d.jsonl:37: the prompt is empty"),
        ('{"prompt": 7, "answer": "4"}', "d.jsonl:37: the prompt needs text or a list of chat messages"),
        ('{"prompt": [], "answer": "4"}', "d.jsonl:37: the prompt needs text or a list of chat messages"),
        ('{"prompt": [{"role": "user"}], "answer": "4"}', "d.jsonl:37: the prompt needs text or a list of chat"),
        ('{"prompt": "a\\ud83d", "answer": "4"}', "d.jsonl:37: the prompt has half of a surrogate pair"),
        ('{"prompt": "a", "completions": "4"}', "d.jsonl:37: column 'completions' is a reserved name"),
        ('{"prompt": "a", "prompts": "4"}', "d.jsonl:37: column 'prompts' is a reserved name"),
    ],
)
def test_a_bad_line_37_is_named(tmp_path, line, sentence):
    path = tmp_path / "d.jsonl"
    path.write_text("".join(json.dumps(GOOD) + "\n" for _ in range(36)) + line + "\n" + json.dumps(GOOD) + "\n")
    with pytest.raises(ValueError) as error:
        data.read(path)
    assert sentence in str(error.value)
    assert "\n" not in str(error.value)


def test_a_line_that_is_not_utf8_is_named_with_its_column(tmp_path):
    (tmp_path / "d.jsonl").write_bytes(json.dumps(GOOD).encode() + b'\n{"prompt": "\xff"}\n')
    with pytest.raises(ValueError, match=r"d.jsonl:2:13: malformed line: not UTF-8 text"):
        data.read(tmp_path / "d.jsonl")


def test_files_that_cannot_be_read_at_all(tmp_path):
    for text in ("", "\n \n"):
        (tmp_path / "d.jsonl").write_text(text)
        with pytest.raises(ValueError, match=r"d.jsonl: the file is empty"):
            data.read(tmp_path / "d.jsonl")
    with pytest.raises(ValueError, match=r"data n+.jsonl: File name too long"):
        data.read("n" * 300 + ".jsonl")
    with pytest.raises(ValueError, match="data nowhere.jsonl: No such file"):
        data.read("nowhere.jsonl")
    for name in ("train.csv", "openai/gsm8k"):
        with pytest.raises(ValueError, match=rf"^data {name}: needs a .jsonl or .parquet file, or hub:OWNER/NAME for"):
            data.read(name)


def test_lines_end_at_line_feeds_alone_and_blank_ones_are_skipped(tmp_path):
    odd = {"prompt": "a\u2028b\x85c\u000bd", "answer": None}
    path = tmp_path / "d.jsonl"
    text = "\ufeff" + json.dumps(odd, ensure_ascii=False).replace("\u000b", "\\u000b") + "\r\n\n" + json.dumps(odd)
    path.write_text(text, encoding="utf-8", newline="")
    assert data.read(path) == [(1, odd), (3, odd)]


def test_text_prompts_are_taken_as_they_are(tokenizer):
    plain = data.render(tokenizer, {"prompt": " 2 + 2 =\n"})
    assert tokenizer.decode(plain) == " 2 + 2 =\n"
    assert tokenizer.decode(data.render(tokenizer, {"prompt": "2 + 2"}, "Be brief.")) == "Be brief.\n\n2 + 2"


def test_chat_prompts_go_through_the_chat_template(tokenizer):
    chat = {"prompt": [{"role": "user", "content": "2 + 2"}]}
    ids = data.render(tokenizer, chat)
    assert all(isinstance(token, int) for token in ids)
    assert tokenizer.decode(ids) == "[user] 2 + 2\n[assistant] "
    assert tokenizer.decode(data.render(tokenizer, chat, "Be brief.")).startswith("[system] Be brief.\n[user] 2 + 2\n")
    own = {"prompt": [{"role": "system", "content": "Be long."}, *chat["prompt"]]}
    assert "brief" not in tokenizer.decode(data.render(tokenizer, own, "Be brief."))
    assert chat["prompt"] == [{"role": "user", "content": "2 + 2"}]


def test_what_a_tokenizer_changes_in_the_messages_does_not_reach_the_record(tokenizer, monkeypatch):
    template = tokenizer.apply_chat_template

    def greedy(messages, **options):
        messages[0]["content"] += " spoilt"
        messages.append({"role": "user", "content": "more"})
        return template(messages, **options)

    monkeypatch.setattr(tokenizer, "apply_chat_template", greedy)
    for system in (None, "Be brief."):
        chat = {"prompt": [{"role": "user", "content": "2 + 2"}]}
        assert "spoilt" in tokenizer.decode(data.render(tokenizer, chat, system))
        assert chat == {"prompt": [{"role": "user", "content": "2 + 2"}]}


def test_a_tokenizer_without_a_template_gets_chat_prompts_as_text_and_one_warning(tmp_path):
    base = Qwen2Tokenizer().train_new_from_iterator(["abc"], vocab_size=258, show_progress=False)
    base.chat_template = None
    chat = {"prompt": [{"role": "user", "content": "2 + 2"}]}
    assert base.decode(data.render(base, chat, "Be brief.")) == "Be brief.\n\n2 + 2\n\n"
    with pytest.warns(UserWarning, match="no chat template") as caught:
        data.load(settings(jsonl(tmp_path / "chat.jsonl", [chat] * 3)), base)
    assert len(caught) == 1


def test_a_prompt_that_is_too_long_stops_the_start_or_is_left_out(tmp_path, tokenizer):
    path = jsonl(tmp_path / "d.jsonl", [{"prompt": "a" * n} for n in (10, 20, 30, 31)])
    fits = data.load(settings(path, max_completion_length=9), tokenizer, context=40)
    assert len(fits.train) == 4 and fits.skipped == 0
    with pytest.raises(ValueError, match=r"d.jsonl:4: the prompt has 31 tokens, the most that fit are 30 .*skip"):
        data.load(settings(path, max_completion_length=10), tokenizer, context=40)
    with pytest.raises(ValueError, match=r"d.jsonl:2: the prompt has 20 tokens, the most that fit are 19"):
        data.load(settings(path, max_completion_length=10, max_prompt_length=19), tokenizer, context=40)
    with pytest.raises(ValueError, match=r"d.jsonl:4: .* are 30"):
        data.load(settings(path, max_prompt_length=30), tokenizer)
    left = data.load(settings(path, max_prompt_length=25, long_prompts="skip"), tokenizer)
    assert [len(record["prompt"]) for record in left.train] == [10, 20] and left.skipped == 2
    with pytest.raises(ValueError, match=r"every one of its 4 prompts is longer than 5 tokens"):
        data.load(settings(path, max_prompt_length=5, long_prompts="skip"), tokenizer)
    with pytest.raises(ValueError, match=r"max_completion_length: got 40, which leaves no room .* of 40 tokens"):
        data.load(settings(path, max_completion_length=40), tokenizer, context=40)


def test_a_prompt_that_the_model_cannot_read_is_named(tmp_path, tokenizer):
    path = jsonl(tmp_path / "d.jsonl", [{"prompt": "aa"}, {"prompt": "zz"}])
    assert len(data.load(settings(path), tokenizer, vocabulary=256).train) == 2
    last, token = max((number, token) for token, number in ((t, tokenizer(t)["input_ids"][0]) for t in "az"))
    line = 1 if token == "a" else 2
    with pytest.raises(ValueError, match=rf"d.jsonl:{line}: the prompt has token {last} \('{token}'\), .* {last} rows"):
        data.load(settings(path), tokenizer, vocabulary=last)
    words = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(BPE({"a": 0}, [])))
    with pytest.raises(ValueError, match=r"d.jsonl:2: the tokenizer makes no tokens of this prompt"):
        data.load(settings(path), words)


def test_the_system_prompt_counts_towards_the_length(tmp_path, tokenizer):
    path = jsonl(tmp_path / "d.jsonl", [{"prompt": "a" * 10}])
    with pytest.raises(ValueError, match="the prompt has 20 tokens"):
        data.load(settings(path, max_prompt_length=15, system_prompt="b" * 8), tokenizer)


def test_what_the_chat_template_refuses_is_named(tmp_path, tokenizer):
    path = jsonl(tmp_path / "d.jsonl", [{"prompt": [{"role": "tool", "content": "x"}]}])
    with pytest.raises(ValueError, match=r"d.jsonl:1: the chat template refuses this prompt: no tools here"):
        data.load(settings(path), tokenizer)


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{{ 1 + 'a' }}", "TypeError: unsupported operand"),
        ("{{ 1 / 0 }}", "ZeroDivisionError: division by zero"),
        ("{{ messages[7]['content'] }}", "list object has no element 7"),
        ("{% for m in %}", "Expected an expression"),
    ],
)
def test_whatever_a_chat_template_raises_is_one_sentence_with_the_line(tmp_path, template, reason):
    odd = Qwen2Tokenizer().train_new_from_iterator(["abc"], vocab_size=258, show_progress=False)
    odd.chat_template = template
    path = jsonl(tmp_path / "d.jsonl", [{"prompt": [{"role": "user", "content": "x"}]}])
    with pytest.raises(ValueError, match=rf"^{path}:1: the chat template refuses this prompt: {reason}"):
        data.load(settings(path), odd)


def test_a_final_assistant_message_is_continued(tokenizer):
    chat = {"prompt": [{"role": "user", "content": "2 + 2"}, {"role": "assistant", "content": "<think>\n"}]}
    before = json.dumps(chat)
    closed = tokenizer.chat_template
    tokenizer.chat_template = closed.replace("\n{% endfor %}", "</end>\n{% endfor %}")
    try:
        assert tokenizer.decode(data.render(tokenizer, chat)) == "[user] 2 + 2</end>\n[assistant] <think>\n"
        system = tokenizer.decode(data.render(tokenizer, chat, "Be brief."))
        assert system == "[system] Be brief.</end>\n[user] 2 + 2</end>\n[assistant] <think>\n"
        chat["prompt"][-1]["content"] = "end"  # which the closing mark has too
        assert tokenizer.decode(data.render(tokenizer, chat)).endswith("</end>\n[assistant] end")
    finally:
        tokenizer.chat_template = closed
    chat["prompt"][-1]["content"] = "<think>\n"
    assert json.dumps(chat) == before


@pytest.mark.parametrize("ending", ["<think>", "<think>\n", "<think>\n\n", "<think> \t\n"])
def test_a_template_that_trims_contents_does_not_trim_what_the_model_continues(tokenizer, ending):
    closed = tokenizer.chat_template
    tokenizer.chat_template = closed.replace("m['content']", "m['content'] | trim").replace(
        "\n{% endfor %}", "</end>\n{% endfor %}"
    )
    chat = {"prompt": [{"role": "user", "content": " 2 + 2\n"}, {"role": "assistant", "content": ending}]}
    try:
        assert tokenizer.decode(data.render(tokenizer, chat)) == f"[user] 2 + 2</end>\n[assistant] {ending}"
    finally:
        tokenizer.chat_template = closed


def test_a_final_assistant_message_is_continued_without_a_template_too():
    base = Qwen2Tokenizer().train_new_from_iterator(["abc"], vocab_size=258, show_progress=False)
    base.chat_template = None
    chat = {"prompt": [{"role": "user", "content": "2 + 2"}, {"role": "assistant", "content": "<think>\n\n"}]}
    assert base.decode(data.render(base, chat)) == "2 + 2\n\n<think>\n\n"
    chat["prompt"].append({"role": "user", "content": "go on"})
    assert base.decode(data.render(base, chat)).endswith("go on\n\n")


def test_a_template_that_loses_the_final_message_is_named_with_the_line(tmp_path):
    only = Qwen2Tokenizer().train_new_from_iterator(["abc"], vocab_size=258, show_progress=False)
    only.chat_template = "{{ messages[0]['content'] }}"
    chat = {"prompt": [{"role": "user", "content": "2 + 2"}, {"role": "assistant", "content": "<think>"}]}
    path = jsonl(tmp_path / "d.jsonl", [chat])
    with pytest.raises(ValueError, match=r"d.jsonl:1: the chat template refuses this prompt: ValueError: .*final mess"):
        data.load(settings(path), only)


def test_no_prompt_is_on_both_sides_of_the_split():
    records = [{"prompt": f"p{i % 40}", "row": i} for i in range(100)]
    for seed in range(20):
        train, held_out = data.split(records, 15, seed)
        assert not {r["prompt"] for r in train} & {r["prompt"] for r in held_out}
        assert 13 <= len(held_out) <= 15  # groups of two and three
        assert sorted(r["row"] for r in train + held_out) == list(range(100))
    assert data.split(records, 15, 1) == data.split(records, 15, 1) != data.split(records, 15, 2)


def test_chat_prompts_are_equal_whatever_the_order_of_their_keys():
    a, b = [{"role": "user", "content": "x"}], [{"content": "x", "role": "user"}]
    records = [{"prompt": a}, {"prompt": b}] * 3 + [{"prompt": f"{i}"} for i in range(24)]
    train, held_out = data.split(records, 6, 0)
    assert sum(isinstance(record["prompt"], list) for record in train) in (0, 6)


def test_at_most_a_fifth_is_held_out():
    records = [{"prompt": str(i)} for i in range(11)]
    for wanted, found in ((0, 0), (1, 1), (2, 2), (500, 2)):
        assert len(data.split(records, wanted, 0)[1]) == found
    assert data.split(records[:4], 500, 0) == (records[:4], [])


def test_an_epoch_holds_every_record_once_and_the_next_one_in_another_order():
    records = [{"prompt": str(i)} for i in range(30)]
    stream = [record["prompt"] for step in range(10) for record in data.batch(records, 3, 6 * step, 6)]
    first, second = stream[:30], stream[30:]
    assert sorted(first) == sorted(second) == sorted(r["prompt"] for r in records)
    assert first != second != [r["prompt"] for r in records]
    assert [r["prompt"] for r in data.batch(records, 4, 0, 6)] != first[:6]


def test_a_batch_depends_on_its_position_alone():
    records = [{"prompt": str(i)} for i in range(7)]
    straight = [data.batch(records, 1, 3 * step, 3) for step in range(12)]
    data._permutation.cache_clear()
    assert data.batch(records, 1, 33, 3) == straight[11]
    assert [data.batch(records, 1, 3 * step, 3) for step in reversed(range(12))] == straight[::-1]
    counts = Counter(record["prompt"] for batch in straight[:7] for record in batch)
    assert set(counts.values()) == {3}  # 21 drawn from 7, batches across epochs included


def test_a_batch_may_be_larger_than_the_data():
    batch = data.batch([{"prompt": "a"}, {"prompt": "b"}], 0, 0, 5)
    assert Counter(record["prompt"] for record in batch).most_common(1)[0][1] == 3


def test_reward_functions_get_the_forms_of_trl():
    chat = [{"role": "user", "content": "2 + 2"}]
    assert data.completion("2 + 2", "4") == "4"
    assert data.completion(chat, "4") == [{"role": "assistant", "content": "4"}]
    assert data.text_of(data.completion(chat, "4")) == data.text_of("4") == "4"
    records = [{"prompt": "a", "answer": 1, "level": 2}, {"prompt": "b", "answer": 3, "level": 4}]
    assert data.columns_of(records) == {"answer": [1, 3], "level": [2, 4]}


def test_the_example_data_reads_and_its_arithmetic_is_right():
    records = [record for _, record in data.read(EXAMPLES / "word_problems.jsonl")]
    assert len(records) == len({record["prompt"][0]["content"] for record in records}) == 300
    assert Counter(record["level"] for record in records).keys() == {1, 2, 3, 4}
    assert all(record["answer"] in record["solution"] for record in records)
    assert len({Fraction(record["answer"]) for record in records}) > 100
    operations = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.truediv}
    lines = [line for record in records for line in record["solution"].splitlines()]
    number = r"(-?[\d./]+)"
    simple = [re.fullmatch(rf"{number} ([-+*/]) {number} = {number}", line) for line in lines]
    assert sum(match is not None for match in simple) > 500
    for match in filter(None, simple):
        left, sign, right, result = match.groups()
        assert operations[sign](Fraction(left), Fraction(right)) == Fraction(result), match[0]
