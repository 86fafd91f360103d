"""Stops around a reward's own code: its forked workers end as ever, and what it swallows comes again."""

import multiprocessing
import os
import shlex
import shutil
import signal

import pytest

from redit_fast import signals
from redit_fast.cli import main
from redit_fast.training import config_file
from redit_fast.training.trainer import train
from tests.training.jobs import flags, launch, launch_anew, lines_of

POOLED = """
import multiprocessing
def score(text): return float(len(text) % 3)
def judge(prompts, completions, **columns):
    with multiprocessing.get_context("fork").Pool(2) as pool:
        return pool.map(score, completions)
"""
SWALLOWS = """
import os, signal
def judge(prompts, completions, **columns):
    if len(completions) > 2:  # not in the trial
        try:
            os.kill(os.getpid(), signal.{name})
            while True:
                pass
        except:
            pass
    return [float(len(c) % 3) for c in completions]
"""


def with_reward(settings, tmp_path, source):
    (tmp_path / "graded.py").write_text(source)
    return {**settings, "rewards": [f"{tmp_path}/graded:judge"], "eval_problems": 0}


def test_a_rewards_pool_of_forked_workers_ends_with_it(settings, tmp_path):
    process = launch_anew(with_reward(settings, tmp_path, POOLED))
    _, errors = process.communicate(timeout=240)
    assert process.returncode == 0 and errors == ""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_forked_child_ends_though_no_handler_in_python_is_reached(number):
    lock = multiprocessing.get_context("fork").Lock()
    lock.acquire()
    with signals.handled(lambda earlier: lambda *_: None):
        child = multiprocessing.get_context("fork").Process(target=wait_blocked, args=(lock, number))
        child.start()
    child.join(60)
    assert child.exitcode == -number


def wait_blocked(lock, number):
    assert signal.getsignal(number) == signal.SIG_DFL
    os.kill(os.getpid(), number)
    lock.acquire()


@pytest.mark.parametrize(("name", "code"), [("SIGTERM", 143), ("SIGINT", 130)])
def test_a_stop_that_a_reward_swallows_stops_the_run(settings, tmp_path, name, code):
    process = launch(with_reward(settings, tmp_path, SWALLOWS.format(name=name)))
    _, errors = process.communicate(timeout=240)
    assert process.returncode == code and "stopped after step 0 of 2, saved in" in errors


@pytest.mark.parametrize("again", [False, True])
def test_a_folder_that_was_removed_under_a_run_is_left_alone(settings, tmp_path, capsys, again):
    """`again`: another run has the name by then."""
    run, moved = tmp_path / "run", tmp_path / "moved"
    (tmp_path / "removes.py").write_text(
        "import os\ndef judge(prompts, completions, **columns):\n"
        f"    if len(completions) > 2 and not os.path.exists({str(moved)!r}):\n"
        f"        os.rename({str(run)!r}, {str(moved)!r})\n"
        + (f"        os.makedirs({str(run)!r})\n        open({str(run / '.lock')!r}, 'w').close()\n" if again else "")
        + "    return [float(len(c) % 3) for c in completions]\n"
    )
    job = {**settings, "rewards": [f"{tmp_path}/removes:judge"], "eval_problems": 0}
    assert main(["train", *flags(job)]) == 2
    assert "was removed or moved while the run was at work in it: nothing more is written" in capsys.readouterr().err
    assert sorted(path.name for path in run.rglob("*")) == ([".lock"] if again else [])
    assert [line["step"] for line in lines_of(moved / "metrics.jsonl")] == [0]


def test_a_name_that_looks_like_a_flag_is_one_in_the_command_that_goes_on(settings, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    job = config_file.load(overrides={**settings, "name": "-x", "out_dir": "-runs", "steps": 1})
    train(job)
    words = shlex.split(job.resume_command())
    assert words[3:] == ["--name=-x", "--out-dir=-runs"] and main(words[1:]) == 0
    fresh = job.model_copy(update={"name": "-y"})
    assert main(shlex.split(fresh.command())[1:]) == 0 and os.path.isdir("-runs/-y")
    shutil.rmtree("-runs")
