"""What a run shows while it goes: the bar at any width, and times that an evaluation does not push up."""

import io
import re
from types import SimpleNamespace

import pytest
from rich.console import Console

from redit_fast.training import progress

NUMBERS = "reward 0.53, accuracy 45%, 1,234 tokens/s"
TIMES = r"elapsed (\d+:\d\d:\d\d), left (\d+:\d\d:\d\d|-:--:--)"


@pytest.fixture
def clock(monkeypatch):
    """The time of this module, which a test sets."""
    now = SimpleNamespace(seconds=1000.0)
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: now.seconds))
    return now


def drawn(bar, width):
    file = io.StringIO()
    Console(file=file, width=width, force_terminal=True, color_system="standard").print(bar)
    return [line.rstrip() for line in re.sub(r"\x1b\[[\d;]*m", "", file.getvalue()).splitlines()]


@pytest.fixture
def bar(clock):
    """Of a run after 20 of 1000 steps, 10 hours after it began."""
    made = progress.Bar(Console(file=io.StringIO()))
    warm = made.add_task("warm start", total=40)
    clock.seconds += 80
    made.update(warm, advance=40, numbers="loss 1.234")
    task = made.add_task("GRPO", total=1000)
    clock.seconds += 36000
    made.update(task, advance=20, numbers=NUMBERS)
    return made


@pytest.mark.parametrize("width", [40, 70, 100, 200])
def test_times_are_whole_and_the_bar_is_as_wide_as_the_terminal_allows(bar, width):
    lines = drawn(bar, width)
    assert max(map(len, lines)) <= width
    text = "\n".join(lines)
    assert re.findall(TIMES, text) == [("0:01:20", "0:00:00"), ("10:00:00", "490:00:00")]
    assert " ".join(text.split()).count(NUMBERS) == text.count("loss 1.234") == 1
    bars = [line for line in lines if "━" in line]
    assert [re.search(r"\d+/\d+", line)[0] for line in bars] == ["40/40", "20/1000"]
    beside = [line for line in bars if re.search(TIMES, line)]
    assert len(beside) == (0 if width == 40 else 2) and bars[1].endswith(NUMBERS) == (width == 200)
    assert len(lines) == {40: 7, 70: 3, 100: 3, 200: 2}[width]
    for line in bars:
        assert len(line) == width and len(re.search("[━╸╺]+", line)[0]) >= progress.LEAST


def test_before_the_first_step_nothing_is_said_of_what_is_left(clock):
    made = progress.Bar(Console(file=io.StringIO()))
    made.add_task("GRPO", total=10, completed=4)
    clock.seconds += 7
    assert re.findall(TIMES, drawn(made, 70)[0]) == [("0:00:07", "-:--:--")]


def seconds(text):
    hours, minutes, rest = map(int, text.split(":"))
    return (hours * 60 + minutes) * 60 + rest


def test_the_time_that_is_left_counts_evaluations_apart_and_never_rises_in_one(clock):
    """Steps of 10 s; an evaluation of 300 s before the first step and behind each third."""
    shown = progress.Shown()
    task = shown.add_task("GRPO", total=9, evaluations=3)
    clock.seconds += 300
    shown.update(task, advance=0, numbers="", evaluation=300.0)
    told = []
    for step in range(1, 10):
        took = 10 + (300 if step % 3 == 0 else 0)
        for _ in range(took):
            clock.seconds += 1
            told.append(shown.tasks[task].left(clock.seconds))
        shown.update(task, advance=1, numbers="", evaluation=300.0 if step % 3 == 0 else None)
        expected = (9 - step) * 10 + (3 - step // 3) * 300
        assert seconds(shown.tasks[task].left(clock.seconds)) == expected
    assert told[:10] == [None] * 10
    left = [seconds(text) for text in told[10:]]
    assert left == sorted(left, reverse=True) and left[0] == 8 * 10 + 3 * 300 - 1


def test_without_the_seconds_of_an_evaluation_the_time_left_still_does_not_rise_while_it_goes_on(clock):
    shown = progress.Shown()
    task = shown.add_task("samples", total=100)
    clock.seconds += 50
    shown.update(task, advance=50, numbers="")
    told = []
    for _ in range(500):
        clock.seconds += 1
        told.append(seconds(shown.tasks[task].left(clock.seconds)))
    assert told[0] == 49 and set(told) == {49}


def test_plain_lines_have_the_same_time_left(clock, capsys):
    lines = progress.Lines()
    task = lines.add_task("GRPO", total=4, evaluations=1)
    clock.seconds += 100
    lines.update(task, advance=0, numbers="", held_out=0.25, evaluation=100.0)
    clock.seconds += 10
    lines.update(task, advance=1, numbers=NUMBERS)
    clock.seconds += 500  # of a slow evaluation, say
    lines._print()
    lines.update(task, advance=1, numbers=NUMBERS, held_out=0.5, evaluation=490.0)
    assert capsys.readouterr().out.splitlines() == [
        "0:01:40 GRPO 0/4, held out 25.0%",
        f"0:10:10 GRPO 1/4, {NUMBERS}, 0:02:00 left",
        f"0:10:10 GRPO 2/4, {NUMBERS}, held out 50.0%, 0:00:20 left",
    ]


def test_a_rank_after_the_first_shows_nothing(capsys):
    with progress.shown(Console(quiet=True)) as shown:
        task = shown.add_task("GRPO", total=2)
        shown.update(task, advance=1, numbers=NUMBERS, held_out=0.5)
    assert capsys.readouterr() == ("", "")
