"""Reward functions: the values of the shipped ones, where the user's are found, and what bad ones get."""

import copy
import inspect
import math
import sys
import warnings

import numpy
import pytest
import torch

from redit_fast.foreign import Foreign
from redit_fast.training import builtin, config_file, data
from redit_fast.training.rewards import RewardFunction, resolve, score
from redit_fast.training.rewards.functions import SHIPPED
from redit_fast.training.rewards.user_code import RewardError, source_of
from tests import ROOT

EXAMPLES = ROOT / "examples"


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path, monkeypatch):
    """A test's reward modules and folders are gone behind it: they must not meet another's."""
    monkeypatch.chdir(tmp_path)
    path = list(sys.path)
    yield
    for name, loaded in list(sys.modules.items()):
        if str(getattr(loaded, "__file__", None)).startswith((str(tmp_path), str(EXAMPLES))):
            del sys.modules[name]
    sys.path[:] = path


def one(name, completion, **columns):
    """The reward of one text completion, and of the same as a chat message."""
    columns = {key: [value] for key, value in columns.items()}
    text = SHIPPED[name](prompts=["q"], completions=[completion], **columns)
    chat = [[{"role": "assistant", "content": completion}]]
    assert SHIPPED[name](prompts=[[{"role": "user", "content": "q"}]], completions=chat, **columns) == text
    return text[0]


@pytest.mark.parametrize(
    ("completion", "answer", "reward"),
    [
        ("so 3 + 4 = 7", "7", 1.0),
        ("<think>7</think><answer>8</answer>", "7", 0.0),
        ("<answer>7</answer> or 8?", 7, 1.0),
        ("<answer>8</answer> no, <answer>7.0</answer>", "7", 1.0),
        ("<answer> $1,200 </answer>", 1200.0, 1.0),
        ("<answer>0.75</answer>", "3/4", 1.0),
        ("<answer>7", "7", 1.0),
        ("<answer></answer> 7", "7", 0.0),
        ("7", "He has 3 + 4 = <<3+4=7>>7 pears.\n#### 7", 1.0),
        ("1200", "#### 1,200", 1.0),
        ("7.5", 7.5, 1.0),
        ("0.0000001", 1e-7, 1.0),
        ("seven", "7", 0.0),
    ],
)
def test_numeric_answer(completion, answer, reward):
    assert one("numeric_answer", completion, answer=answer) == reward


def test_numeric_answer_refuses_a_column_without_numbers():
    with pytest.raises(RewardError, match=r"'numeric_answer', sample 1 raised ValueError: .* needs one number, .* got"):
        score(resolve(["numeric_answer"], ["answer"]), ["q"] * 3, ["7"] * 3, {"answer": ["7", "seven", "7"]})


@pytest.mark.parametrize("name", ["exact_answer", "gsm8k_correctness", "numeric_answer"])
def test_shipped_functions_say_what_their_column_needs(name):
    check = SHIPPED[name].check_column
    for good in ("7", 7, 7.5, "so 7\n#### 7", 0, "#### $1,200"):
        check(good)
    needed = "one number, .* got" if name == "numeric_answer" else "text or a number, got"
    for bad in (None, True, [], ["7"], {"a": 7}, "", "  ", "7\n#### "):
        with pytest.raises(ValueError, match=rf"^the column 'answer' needs {needed} .{{1,80}}$"):
            check(bad)
    assert all(hasattr(fn, "check_column") == ("answer" in inspect.signature(fn).parameters) for fn in SHIPPED.values())


@pytest.mark.parametrize(
    ("completion", "reward"),
    [
        ("blue", 1.0),
        (" <think>x</think><answer> blue </answer>", 1.0),
        ("Blue", 0.0),
        ("blue.", 0.0),
        ("<answer>red</answer>blue", 0.0),
    ],
)
def test_exact_answer(completion, reward):
    assert one("exact_answer", completion, answer="blue") == reward


@pytest.mark.parametrize(
    ("completion", "reward"),
    [
        ("<think>a\nb</think><answer>1</answer>", 1.0),
        ("\n<reasoning>a</reasoning>\n<answer>1</answer>\n", 1.0),
        ("Well: <think>a</think><answer>1</answer>", 0.5),
        ("<think>a</think><answer>1</answer> Done.", 0.5),
        ("<think>a</reasoning><answer>1</answer>", 0.0),
        ("<answer>1</answer><think>a</think>", 0.0),
        ("<think>a</think> so <answer>1</answer>", 0.0),
        ("1", 0.0),
    ],
)
def test_xml_format(completion, reward):
    assert one("xml_format", completion) == reward


PERFECT = "<reasoning>\n3 + 4 = 7\nso 7\n</reasoning>\n<answer>\n7\n</answer>"
# completion, then correctness, int, strict format, soft format, xmlcount for the answer "#### 7"
GSM8K = [
    (PERFECT, 2.0, 0.5, 1.0, 1.0, 0.5 + 0.001),  # the scripts subtract len("") - 1 characters behind the last tag
    (PERFECT + "\n", 2.0, 0.5, 1.0, 1.0, 0.5),
    (PERFECT + "\nThe answer is 7.", 2.0, 0.5, 0.0, 0.0, 0.5 - 0.016),
    ("<reasoning>x</reasoning> so <answer>7</answer>", 2.0, 0.5, 0.0, 1.0, 0.0),
    ("<reasoning>\nx\n</reasoning>\n<answer>\n7.0\n</answer>\n", 0.0, 0.0, 1.0, 1.0, 0.5),
    ("7", 2.0, 0.5, 0.0, 0.0, 0.0),
    ("", 0.0, 0.0, 0.0, 0.0, 0.0),
]


@pytest.mark.parametrize(("completion", "correct", "digits", "strict", "soft", "count"), GSM8K)
def test_the_gsm8k_set(completion, correct, digits, strict, soft, count):
    assert one("gsm8k_correctness", completion, answer="3 + 4 = 7\n#### 7") == correct
    assert one("gsm8k_int", completion) == digits
    assert one("gsm8k_strict_format", completion) == strict
    assert one("gsm8k_soft_format", completion) == soft
    assert one("gsm8k_xmlcount", completion) == pytest.approx(count)


def test_gsm8k_answers_lose_commas_and_dollars_as_in_the_scripts():
    assert one("gsm8k_correctness", "<answer>1200</answer>", answer="#### $1,200") == 2.0
    assert one("gsm8k_correctness", "<answer>1,200</answer>", answer="#### $1,200") == 0.0


def test_the_full_scales_of_the_gsm8k_set_are_those_of_the_papers():
    names = ["gsm8k_correctness", "gsm8k_int", "gsm8k_strict_format", "gsm8k_soft_format", "gsm8k_xmlcount"]
    assert [fn.scale for fn in resolve(names, ["answer"])] == [2.0, 0.5, 1.0, 1.0, 0.5]


def module(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def test_a_function_of_the_current_folder_wins_over_sys_path(tmp_path, monkeypatch):
    for value, file in enumerate(("mine.py", "elsewhere/mine.py", "elsewhere/only.py"), 1):
        module(tmp_path / file, f"def f(prompts, completions, **columns):\n    return [{value}] * len(prompts)\n")
    monkeypatch.syspath_prepend(str(tmp_path / "elsewhere"))
    for name, value in (("mine:f", 1), ("elsewhere/mine:f", 2), ("elsewhere/mine.py:f", 2), ("only:f", 3)):
        assert score(resolve([name], []), ["q"], ["c"], {}).item() == value, name
    assert [fn.name for fn in resolve(["mine:f"], [])] == ["f"]


def test_a_module_keeps_its_name_and_its_neighbours_even_where_a_standard_module_has_it(tmp_path):
    import statistics

    module(tmp_path / "statistics.py", "from helper import value\ndef f(prompts, completions):\n    return [value]\n")
    module(tmp_path / "helper.py", "value = 4.0\n")
    module(tmp_path / "pkg" / "inner.py", "from . import deep\nf = deep.f\n")
    module(tmp_path / "pkg" / "deep.py", "def f(prompts, completions):\n    return [5.0]\n")
    assert score(resolve(["statistics:f"], []), ["q"], ["c"], {}).item() == 4
    assert score(resolve(["pkg.inner:f"], []), ["q"], ["c"], {}).item() == 5
    assert sys.modules["statistics"] is statistics


def test_a_module_is_run_once_for_all_its_functions(tmp_path):
    text = "seen = []\ndef f(prompts, completions):\n    seen.append(1)\n    return [len(seen)]\ng = f\n"
    module(tmp_path / "mine.py", text)
    functions = resolve(["mine:f"], []) + resolve(["mine:g"], [])
    assert score(functions, ["q"], ["c"], {}).tolist() == [[1.0, 2.0]]


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("exact", "'exact' is neither package.module:function nor a shipped function (exact_answer, numeric_answer"),
        ("nowhere:f", "'nowhere:f': no module 'nowhere' in "),
        ("nowhere.inner:f", "'nowhere.inner:f': no module 'nowhere.inner' in "),
        ("mine:g", "mine.py has no function 'g'"),
        ("mine:number", "mine.py has no function 'number'"),
        ("needy:f", "'needy:f': importing "),
        ("needy:f", "raised ModuleNotFoundError: No module named 'not_installed_anywhere'"),
        ("broken:f", "raised SyntaxError"),
        ("mine:wants", "'mine:wants': missing a required argument: 'level'; the data has the columns answer"),
        ("mine:narrow", "'mine:narrow': got an unexpected keyword argument 'answer'; the data has the columns answer"),
        (":f", "':f' lacks a name, needs package.module:function"),
        ("mine:", "'mine:' lacks a name, needs package.module:function"),
        ("sub/:f", "'sub/:f' lacks a name, needs package.module:function"),
        ("a..b:f", "'a..b:f': no module"),
        ("folder_of_nothing:f", "folder_of_nothing has no function 'f'"),
        ("math:hypot", "'math:hypot' does not say which arguments it takes, needs a function"),
        ("collections:OrderedDict", "'collections:OrderedDict' does not say which arguments it takes"),
        ("mine:large", "reward_scale of 'mine:large' is 1000000"),
        ("mine:larger", "reward_scale of 'mine:larger' raised ValueError: Exceeds the limit"),
        ("mine:huge", "reward_scale of 'mine:huge' is inf, needs a positive number"),
    ],
)
def test_a_function_that_cannot_be_had_is_named_before_anything_runs(tmp_path, monkeypatch, name, sentence):
    text = "number = 3\ndef f(prompts, completions, **columns): ...\n"
    text += "def wants(prompts, completions, level, **columns): ...\ndef narrow(prompts, completions): ...\n"
    text += "def huge(prompts, completions, **columns): ...\nhuge.reward_scale = float('inf')\n"
    text += "def large(prompts, completions, **columns): ...\nlarge.reward_scale = 10**400\n"
    text += "def larger(prompts, completions, **columns): ...\nlarger.reward_scale = 10**5000\n"
    (tmp_path / "folder_of_nothing").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    module(tmp_path / "mine.py", text)
    module(tmp_path / "needy.py", "import not_installed_anywhere\n")
    module(tmp_path / "broken.py", "def f(:\n")
    with pytest.raises(RewardError) as error:
        resolve([name], ["answer"])
    assert sentence in str(error.value)
    config_file.load(
        None, {"rewards": [name]}
    )  # neither reading the settings nor looking for the files fails otherwise
    source_of(name)


def test_two_functions_of_one_name_are_refused(tmp_path):
    module(tmp_path / "mine.py", "def xml_format(prompts, completions, **columns): ...\n")
    with pytest.raises(RewardError, match="more than one function is named 'xml_format'"):
        resolve(["xml_format", "mine:xml_format"], [])


def scored(fn, samples=3, **columns):
    return score([RewardFunction("fn", fn)], ["p"] * samples, ["c"] * samples, columns)


@pytest.mark.parametrize(
    "values",
    [
        [1, 0.5, True],
        (1.0, 0.5, 1),
        torch.tensor([1.0, 0.5, 1.0]),
        numpy.array([1.0, 0.5, 1.0]),
        [torch.tensor(1.0), numpy.float32(0.5), numpy.bool_(True)],
    ],
)
def test_numbers_of_every_kind_are_rewards(values):
    found = scored(lambda **_: values)
    assert found.dtype == torch.float64 and found.tolist() == [[1.0], [0.5], [1.0]]


def test_rewards_keep_all_bits_of_a_double():
    assert scored(lambda **_: [0.1, 1e-300, 1 / 3]).flatten().tolist() == [0.1, 1e-300, 1 / 3]


def test_none_and_nan_leave_a_sample_unscored_with_one_warning_for_each_function():
    functions = [
        RewardFunction("sometimes", lambda **_: [1.0, None, math.nan]),
        RewardFunction("always", lambda **_: [1.0, 2.0, 3.0]),
        RewardFunction("never", lambda **_: [None] * 3),
    ]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            found = score(functions, ["p"] * 3, ["c"] * 3, {})
    assert found.isnan().tolist() == [[False, False, True], [True, False, True], [True, False, True]]
    assert [str(warning.message).split(";")[0] for warning in caught] == [
        "reward function 'sometimes' left 2 of 3 samples unscored (None or NaN)",
        "reward function 'never' left 3 of 3 samples unscored (None or NaN)",
    ]


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ([1.0, math.inf, 1.0], "'fn' returned inf for sample 1"),
        ([1.0, 1.0, -math.inf], "'fn' returned -inf for sample 2"),
        ([1.0, 10**400, 1.0], "for sample 1, needs a finite number"),
        (torch.tensor([1.0, math.inf, 1.0]), "'fn' returned inf for sample 1"),
        ([1.0, "1.0", 1.0], "'fn' returned '1.0' for sample 1, needs a finite number, None or NaN"),
        ([[1.0], [1.0], [1.0]], "'fn' returned [1.0] for sample 0"),
        ([1.0, 1j, 1.0], "'fn' returned 1j for sample 1"),
        ([1.0, 1.0], "'fn' returned 2 rewards for 3 samples"),
        ([], "'fn' returned 0 rewards for 3 samples"),
        (1.0, "'fn' returned float, needs a list"),
        (None, "'fn' returned NoneType, needs a list"),
        ({0: 1.0, 1: 1.0, 2: 1.0}, "'fn' returned dict, needs a list"),
    ],
)
def test_what_is_no_reward_is_named_with_its_sample(values, sentence):
    with pytest.raises(RewardError) as error:
        scored(lambda **_: values)
    assert sentence in str(error.value)


class Hostile(float):
    def __abs__(self):
        raise OSError("no size")

    def tolist(self):
        raise OSError("no list")


class HostileList(list):
    def __iter__(self):
        raise OSError("no items")


class Unprintable:
    def __repr__(self):
        raise OSError("no words")


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ([1.0, Hostile(1.0), 1.0], "'fn': reading what it returned for sample 1 raised OSError: no size"),
        ([1.0, 1.0, Unprintable()], "'fn': reading what it returned for sample 2 raised OSError: no words"),
        (Hostile(1.0), "'fn': reading what it returned raised OSError: no list"),
        (HostileList([1.0] * 3), "'fn': reading what it returned raised OSError: no items"),
    ],
)
def test_a_result_whose_own_code_raises_is_told_with_its_function(values, sentence):
    with pytest.raises(RewardError) as error:
        scored(lambda **_: values)
    assert sentence in str(error.value)


def test_an_exception_without_words_is_told_by_its_type():
    class Mute(Exception):
        def __str__(self):
            raise self

    def mute(**_):
        raise Mute

    with pytest.raises(RewardError, match="reward function 'fn', sample 0 raised Mute: <"):
        scored(mute)
    with pytest.raises(ValueError, match="the model: Mute"), Foreign("the model"):
        mute()


def test_an_exception_is_chained_and_names_function_and_sample():
    def picky(prompts, completions, answer):
        return [1.0 / a for a in answer]

    with pytest.raises(RewardError, match=r"'fn', sample 2 raised ZeroDivisionError") as error:
        scored(picky, 4, answer=[1, 2, 0, 0])
    assert isinstance(error.value.__cause__, ZeroDivisionError)

    def batches_only(prompts, completions):
        raise SystemExit(3) if len(prompts) > 1 else KeyError("never")

    with pytest.raises(RewardError, match=r"'fn', sample 0 raised KeyError: 'never'"):
        scored(batches_only)

    def large(prompts, completions):
        if len(prompts) > 1:
            sys.exit("too many")
        return [1.0]

    with pytest.raises(RewardError, match=r"'fn' raised SystemExit: too many"):
        scored(large)


BROKEN = """import functools, json
import helper

def wrapped(fn):
    @functools.wraps(fn)
    def inner(**arguments):
        return fn(**arguments)
    return inner

@wrapped
def plain(prompts, completions):
    raise KeyError("oops")

def in_a_library(prompts, completions):
    return [json.loads("{") for _ in completions]

def in_a_neighbour(prompts, completions):
    return helper.value({})

def through_our_own(prompts, completions):
    from redit_fast.training.data import text_of
    return [text_of(3)]

class Judge:
    def __call__(self, prompts, completions):
        assert not prompts

judge = Judge()
partial = functools.partial(plain)
"""


@pytest.mark.parametrize(
    ("name", "told", "file", "source"),
    [
        ("plain", "KeyError: 'oops'", "mine.py:12", 'raise KeyError("oops")'),
        ("partial", "KeyError: 'oops'", "mine.py:12", 'raise KeyError("oops")'),
        ("in_a_library", "JSONDecodeError: Expecting property name", "mine.py:15", 'return [json.loads("{")'),
        ("in_a_neighbour", "KeyError: 'level'", "helper.py:2", 'return columns["level"]'),
        ("through_our_own", "TypeError: 'int' object is not iterable", "mine.py:22", "return [text_of(3)]"),
        ("judge", "AssertionError", "mine.py:26", "assert not prompts"),
    ],
)
def test_a_failing_function_is_told_by_its_own_words_file_and_line(tmp_path, name, told, file, source):
    module(tmp_path / "mine.py", BROKEN)
    module(tmp_path / "helper.py", 'def value(columns):\n    return columns["level"]\n')
    with pytest.raises(RewardError) as error:
        score(resolve([f"mine:{name}"], []), ["q"], ["c"], {})
    assert f"{name!r}, sample 0 raised {told}" in str(error.value)
    assert f" ({tmp_path}/{file}: {source}" in str(error.value)


def test_a_module_that_fails_when_imported_is_told_by_its_line(tmp_path):
    module(tmp_path / "mine.py", "import json\n\nlevels = json.loads('{')\n")
    with pytest.raises(RewardError, match=r"raised JSONDecodeError: .* \(.*mine.py:3: levels = json.loads"):
        resolve(["mine:f"], [])


def test_ctrl_c_in_a_reward_function_is_not_an_error_of_it():
    def interrupted(prompts, completions):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        scored(interrupted)


def spoil(value):
    """Changes every list and dict inside."""
    for item in list(value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()):
        spoil(item)
    if isinstance(value, dict):
        value.update(dict.fromkeys(value, "spoilt"), more="spoilt")
    elif isinstance(value, list):
        value.append("spoilt")


CHAT = [{"role": "user", "content": "q"}]
NESTED = {"answer": 7, "tests": [[1, 2], {"in": [3], "out": {"x": None}}], "label": "a"}


@pytest.mark.parametrize("prompt", ["q", CHAT])
def test_what_a_function_changes_reaches_neither_the_next_one_nor_the_data_nor_another_sample(prompt):
    """Prompts, completions and columns, at every depth, from the list itself down; a group shares its record."""
    record = {"prompt": copy.deepcopy(prompt), **copy.deepcopy(NESTED)}
    records, seen = [record] * 3, []
    completions = [data.completion(prompt, "c") for _ in records]

    def greedy(**arguments):
        seen.append(copy.deepcopy(arguments))
        for i in range(3):  # one sample at a time: the others must be whole
            for values in arguments.values():
                spoil(values[i])
            rest = {name: values[i + 1 :] for name, values in arguments.items()}
            assert rest == {name: values[i + 1 :] for name, values in seen[-1].items()}
        for values in arguments.values():
            values.clear()
        return [1.0, 2.0, 3.0]

    functions = [RewardFunction("first", greedy), RewardFunction("second", greedy)]
    columns = data.columns_of(records)
    found = score(functions, [r["prompt"] for r in records], completions, columns)
    assert found.tolist() == [[1.0, 1.0], [2.0, 2.0], [3.0, 3.0]]
    assert seen[0] == seen[1] and seen[0]["prompts"] == [prompt] * 3 and seen[0]["tests"] == [NESTED["tests"]] * 3
    assert record == {"prompt": prompt, **NESTED} and columns == {name: [NESTED[name]] * 3 for name in NESTED}
    assert completions == [data.completion(prompt, "c")] * 3


def test_the_search_for_the_failing_sample_starts_from_unspoilt_arguments():
    def picky(prompts, completions, tests):
        if 0 in [test.pop() for test in tests]:
            raise ValueError("no test passes")
        return [1.0] * len(prompts)

    with pytest.raises(RewardError, match=r"'fn', sample 1 raised ValueError: no test passes"):
        scored(picky, tests=[[1], [0], [1]])


def test_the_demos_own_functions_are_found_from_any_folder():
    records = builtin.records(4, held_out=False, seed=0)
    columns = data.columns_of(records)
    functions = resolve(config_file.load().rewards, columns)
    right = [f"<think>{';'.join(r['steps'])}</think><answer>{r['answer']}</answer>" for r in records]
    found = score(functions, [r["prompt"] for r in records], [*right[:3], "no idea"], columns)
    assert found.tolist() == [[1.0, 0.5, 0.25]] * 3 + [[0.0, 0.0, 0.0]]


def test_the_example_functions_run_on_the_example_data(monkeypatch):
    monkeypatch.chdir(EXAMPLES.parent)
    names = ["numeric_answer", "rewards:shows_work", "rewards:brevity"]
    loaded = config_file.load("examples/word_problems.yaml", {"rewards": names, "reward_weights": None})
    assert loaded.rewards[1] == "examples/rewards:shows_work"
    records = [record for _, record in data.read(loaded.data)]
    columns = data.columns_of(records)
    functions = resolve(loaded.rewards, columns)
    prompts = [record["prompt"] for record in records]
    right = [data.completion(r["prompt"], f"{r['solution']} <answer>{r['answer']}</answer>") for r in records]
    wrong = [data.completion(p, "well " * 300) for p in prompts]
    with pytest.warns(UserWarning, match="'shows_work' left"):
        best, worst = (score(functions, prompts, texts, columns) for texts in (right, wrong))
    assert best.nanmean(0).tolist() == [1.0, 1.0, 0.0]
    assert worst.nanmean(0).tolist() == [0.0, 0.0, -0.5]
    assert [fn.scale for fn in functions] == [1.0, 1.0, 0.5]
