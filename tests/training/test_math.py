r"""The reward `math`: what equals what; hostile text, a hang and a kill of its process cost an answer at most."""

import os
import signal
import subprocess
import sys
import threading
import time
from importlib.util import find_spec
from pathlib import Path

import pytest

from redit_fast import extras
from redit_fast.training.rewards import math_answer, resolve, score
from redit_fast.training.rewards.functions import SHIPPED
from redit_fast.training.rewards.math_answer import CHILD
from redit_fast.training.rewards.user_code import RewardError

if find_spec("math_verify") is None:
    pytest.skip("math-verify is not installed: the reward math needs it", allow_module_level=True)


def math(completion, answer):
    (reward,) = SHIPPED["math"](prompts=["q"], completions=[completion], answer=[answer])
    return reward


# The column answer, a completion, and whether it is right. Bare and boxed, in words and in tags.
PAIRS = [
    # numbers
    ("72", r"So she has \boxed{72} apples.", 1),
    ("72", r"So she has \boxed{73} apples.", 0),
    (72, "The answer is 72.", 1),
    (7.5, r"\boxed{\frac{15}{2}}", 1),
    (1e-7, r"\boxed{0.0000001}", 1),
    ("-3", r"$x = -3$", 1),
    ("-3", r"$x = 3$", 0),
    ("1,234", r"\boxed{1234}", 1),
    ("1234", "<answer>1,234</answer>", 1),
    ("#### 1,200", "<answer>$1,200</answer>", 1),
    ("He has 3 + 4 = <<3+4=7>>7 pears.\n#### 7", r"\boxed{7}", 1),
    ("#### 18", "She makes 9 * 2 = $18.", 1),
    ("0.75", r"\boxed{\frac{3}{4}}", 1),
    (r"\frac{3}{4}", r"\boxed{0.75}", 1),
    (r"\frac{3}{4}", "<answer>3/4</answer>", 1),
    (r"\frac34", r"\boxed{\dfrac{3}{4}}", 1),
    (r"\frac{3}{4}", r"\boxed{\frac{4}{3}}", 0),
    ("50\\%", r"\boxed{50\%}", 1),
    (r"2\frac{1}{2}", r"\boxed{\frac{5}{2}}", 1),
    (r"3.2 \times 10^{4}", r"\boxed{32000}", 1),
    ("10", r"\boxed{2 \cdot 5}", 1),
    ("1024", r"\boxed{2^{10}}", 1),
    ("12", r"\boxed{12\text{ cm}}", 1),
    ("90", r"\boxed{90^\circ}", 1),
    # irrational and complex ones
    (r"\sqrt{8}", r"\boxed{2\sqrt{2}}", 1),
    (r"\frac{1}{\sqrt{2}}", r"\boxed{\frac{\sqrt{2}}{2}}", 1),
    (r"\sqrt{2}", r"\boxed{\sqrt{3}}", 0),
    (r"2\pi", r"The area is $2\pi$.", 1),
    (r"2\pi", r"\boxed{\pi}", 0),
    (r"\frac{\pi}{4}", r"\boxed{\arctan(1)}", 1),
    ("3+4i", r"\boxed{4i+3}", 1),
    ("3+4i", r"\boxed{3-4i}", 0),
    (r"e^2", r"\boxed{e \cdot e}", 1),
    (r"\log_{2} 8", r"\boxed{3}", 1),
    # expressions
    ("x^2-1", r"\boxed{(x-1)(x+1)}", 1),
    ("x^2-1", r"\boxed{(x-1)^2}", 0),
    (r"\frac{x+1}{2}", r"\boxed{\frac{x}{2}+\frac{1}{2}}", 1),
    ("2x+3", r"<answer>3+2x</answer>", 1),
    ("2x+3", r"<answer>3+2y</answer>", 0),
    (r"\sin^2 x + \cos^2 x", r"\boxed{1}", 1),
    ("y=2x+3", r"\boxed{y=3+2x}", 1),
    ("y=2x+3", r"\boxed{y=2x-3}", 0),
    ("5", r"\boxed{x=5}", 1),
    (r"n!", r"\boxed{n \cdot (n-1)!}", 1),
    # sets, intervals, points and matrices
    (r"\{1,2,3\}", r"\boxed{\{3,2,1\}}", 1),
    (r"\{1,2,3\}", r"\boxed{\{1,2\}}", 0),
    (r"(0,1]", r"\boxed{(0,1]}", 1),
    (r"(0,1]", r"\boxed{[0,1]}", 0),
    (r"(-\infty,2)\cup(3,\infty)", r"\boxed{(-\infty,2)\cup(3,\infty)}", 1),
    (r"(3,\frac{\pi}{2})", r"\boxed{\left(3, \frac{\pi}{2}\right)}", 1),
    ("(1,2)", r"\boxed{(2,1)}", 0),
    (r"\begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix}", r"$\begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix}$", 1),
    (r"\begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix}", r"$\begin{pmatrix} 1 & 2 \\ 3 & 5 \end{pmatrix}$", 0),
    ("x > 3", r"\boxed{x > 3}", 1),
    ("x > 3", r"\boxed{x < 3}", 0),
    # where the answer is
    (r"We get \boxed{42}.", r"First $\boxed{41}$, no: $\boxed{42}$", 1),
    (r"We get \boxed{42}.", r"First $\boxed{42}$, no: $\boxed{41}$", 0),
    (r"\boxed{42}", r"Either \boxed{41} or \boxed{42}", 0),
    ("4, 10", r"The boat makes \boxed{10} and the river \boxed{4}", 1),
    ("7", "<think>7</think><answer>8</answer>", 0),
    ("7", "<think>8</think><answer>The answer is 7</answer>", 1),
    ("7", "I do not know.", 0),
    ("7", "", 0),
]


def test_the_table_of_pairs():
    assert len(PAIRS) >= 60
    found = SHIPPED["math"](
        prompts=["q"] * len(PAIRS), completions=[text for _, text, _ in PAIRS], answer=[gold for gold, _, _ in PAIRS]
    )
    wrong = [(*pair, reward) for pair, reward in zip(PAIRS, found, strict=True) if reward != pair[2]]
    assert not wrong
    assert "math_verify" not in sys.modules  # nothing is read in this process


def test_chat_messages_and_the_place_among_the_shipped_functions():
    (function,) = resolve(["math"], ["answer", "level"])
    assert (function.name, function.scale) == ("math", 1.0)
    chat = [[{"role": "assistant", "content": text}] for text in (r"\boxed{1}", r"\boxed{2}")]
    columns = {"answer": ["1", "1"], "level": [1, 2]}
    assert score([function], [[{"role": "user", "content": "q"}]] * 2, chat, columns).tolist() == [[1.0], [0.0]]


def test_an_answer_of_the_data_that_is_no_mathematics_leaves_its_samples_unscored():
    with pytest.warns(UserWarning, match="'math' left 2 of 3 samples unscored"):
        found = score(resolve(["math"], ["answer"]), ["q"] * 3, ["7"] * 3, {"answer": ["$$", "$$", "7"]})
    assert found.isnan().flatten().tolist() == [True, True, False]


DEEP = 4000
HOSTILE = [
    "__import__('os').mkdir('made')",
    r"\boxed{__import__('os').mkdir('made')}",
    "$__import__('os').mkdir('made')$",
    r"\boxed{().__class__.__bases__[0].__subclasses__()}",
    "$exec(\"open('made','w')\")$",
    r"\boxed{\text{eval(open('made','w'))}}",
    "$lambda: 7$",
    r"\boxed{9^{9^{9^{9^{9}}}}}",
    "9**9**9**9**9",
    "9^9^9^9^9 + 1",
    r"\boxed{100000000!}",
    r"\boxed{\sum_{n=1}^{10^{15}} \frac{1}{n!}}",
    r"\boxed{\int_0^{\infty} x^{x^{x^x}} \, dx}",
    "$" + "(" * DEEP + "7" + ")" * DEEP + "$",
    r"\boxed{" + r"\frac{1}{" * DEEP + "7" + "}" * DEEP + "}",
    r"\boxed{7" + "\0" + "}",
    "7\0\0",
    "\ud800 7 \udfff",
    r"\boxed{" + "7" * 100_000 + "}",
    "answer " * 3000 + "is " + "$" * 3001,
]


@pytest.fixture
def quick(monkeypatch):
    """A deadline that a hang may be waited for."""
    math("1", "1")
    monkeypatch.setattr(math_answer, "DEADLINE", 1.0)


@pytest.mark.filterwarnings("ignore:reward function 'math' left")
def test_hostile_text_is_no_right_answer_and_does_nothing(tmp_path, monkeypatch, quick):
    assert len(HOSTILE) >= 20
    monkeypatch.chdir(tmp_path)
    CHILD._end()  # the next one has this folder
    for text in HOSTILE:
        assert math(text, "8") in (0.0, None), text[:80]
    assert not list(tmp_path.iterdir())
    assert math(r"\boxed{8}", "8") == 1.0


def test_a_hang_ends_at_the_deadline_and_the_next_answer_has_a_new_process(quick):
    process, _ = CHILD.running
    os.kill(process.pid, signal.SIGSTOP)
    begin = time.monotonic()
    assert math("7", "7") is None
    assert 1 <= time.monotonic() - begin < 4
    assert process.returncode == -signal.SIGKILL and CHILD.running is None
    assert math("7", "7") == 1.0


@pytest.mark.parametrize("busy", [False, True])
def test_a_process_that_is_killed_from_outside_costs_no_answer(busy):
    assert math("7", "7") == 1.0
    process, _ = CHILD.running
    if busy:
        os.kill(process.pid, signal.SIGSTOP)
        threading.Timer(0.1, process.kill).start()
    else:
        process.kill()
        process.wait()
    assert math("7", "7") == 1.0
    assert CHILD.running[0].pid != process.pid


def test_one_that_is_killed_again_and_again_leaves_the_sample_unscored(monkeypatch):
    assert math("7", "7") == 1.0
    exchange = CHILD._exchange

    def killed(process, pipe, sent, *limits):
        if sent is not None:
            process.kill()
        return exchange(process, pipe, sent, *limits)

    with monkeypatch.context() as patch:
        patch.setattr(CHILD, "_exchange", killed)
        assert math("7", "7") is None
    assert math("7", "7") == 1.0


def test_ctrl_c_leaves_no_answer_to_the_next_question():
    assert math("7", "7") == 1.0
    os.kill(CHILD.running[0].pid, signal.SIGSTOP)
    threading.Timer(0.1, signal.pthread_kill, [threading.main_thread().ident, signal.SIGINT]).start()
    with pytest.raises(KeyboardInterrupt):
        math("8", "7")
    assert CHILD.running is None and math("7", "7") == 1.0


def test_the_process_has_no_keys_and_ends_with_this_one(monkeypatch):
    monkeypatch.setenv("SOME_API_KEY", "a-secret")
    CHILD._end()
    assert math("7", "7") == 1.0
    process, pipe = CHILD.running
    environment = Path(f"/proc/{process.pid}/environ")
    if environment.exists():  # of Linux
        assert b"a-secret" not in environment.read_bytes()
    pipe.close()
    assert process.wait(10) == 0
    CHILD.running = None


def test_a_process_that_does_not_start_is_an_error_of_one_sentence(tmp_path, monkeypatch):
    CHILD._end()
    (tmp_path / "math_verify.py").write_text("raise ImportError('no parser here')\n")
    with monkeypatch.context() as patch:
        patch.setenv("PYTHONPATH", str(tmp_path))
        with pytest.raises(RewardError, match="^rewards: the process of math does not start: no parser here$"):
            math("7", "7")
    with monkeypatch.context() as patch:
        patch.setattr(sys, "executable", str(tmp_path / "none"))
        with pytest.raises(RewardError, match="^rewards: the process of math cannot be started: .*No such file"):
            math("7", "7")
    assert math("7", "7") == 1.0


def test_without_math_verify_the_command_that_installs_it_is_named(monkeypatch):
    monkeypatch.setitem(extras.MODULES, "math", ("not_there",))
    with pytest.raises(
        extras.MissingExtra, match=r"^the reward math needs not_there, .*pip install .redit-fast\[math\]"
    ):
        resolve(["math"], ["answer"])


def test_the_process_imports_nothing_of_this_package():
    """It would load torch: 5 s and 0.3 GB."""
    code = "import runpy, sys; runpy.run_path(sys.argv[1], run_name='x'); print(*sys.modules)"
    file = Path(math_answer.__file__).with_name("math_child.py")
    found = subprocess.run([sys.executable, "-P", "-c", code, str(file)], capture_output=True, text=True, check=True)
    assert not {name.partition(".")[0] for name in found.stdout.split()} & {"torch", "redit_fast", "transformers"}
