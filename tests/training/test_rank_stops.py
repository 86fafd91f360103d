"""Several ranks stop together, say one sentence and lose no checkpoint: signals, a killed rank, an error of one."""

import os
import random
import resource
import signal
import subprocess
import sys
import time

import pytest

from redit_fast.cli import main
from redit_fast.training import checkpoint
from tests.training import processes
from tests.training.jobs import flags, lines_of

POINTS = int(os.environ.get("STOP_POINTS", "2"))  # `make rank-gates` has 20


@pytest.fixture
def job(settings, tmp_path):
    return settings | {"out_dir": str(tmp_path / "out"), "steps": 500, "checkpoint_every": 2, "eval_every": 50}


def started(job, tmp_path, size=2, work=processes.train):
    """The ranks, once there is a checkpoint after the first."""
    ranks = processes.start(size, work, flags(job), folder=tmp_path)
    wait_for(tmp_path / "out" / "run" / "checkpoints" / "step-000002", ranks, tmp_path)
    return ranks


def wait_for(path, ranks, folder, text=""):
    end = time.monotonic() + 120
    while not path.exists() or (text and text not in path.read_text()):
        assert all(rank.is_alive() for rank in ranks) and time.monotonic() < end, processes.finish(ranks, folder, 1)
        time.sleep(0.02)


def said(printed):
    """What the ranks print on stderr besides warnings and transformers' bars."""
    lines = [line for text in printed for line in text.splitlines()]
    return [line for line in lines if line.startswith(("redit-fast:", "stopped", "Traceback")) or "Error" in line]


def goes_on(job, tmp_path):
    run = tmp_path / "out" / "run"
    done = checkpoint.step_of(checkpoint.newest(run / "checkpoints"))
    assert main(["train", *flags(job | {"steps": done + 1, "strategy": "ddp"}), "--resume"]) == 0
    assert [line["step"] for line in lines_of(run / "metrics.jsonl")] == list(range(done + 2))


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_ctrl_c_at_random_points_is_one_message_and_loses_nothing(job, tmp_path, strategy):
    job, delays = job | {"strategy": strategy}, random.Random(strategy)
    ranks = started(job, tmp_path)
    for point in range(POINTS):
        if point:
            ranks = processes.start(2, processes.train, [*flags(job), "--resume"], folder=tmp_path)
            wait_for(tmp_path / "out" / "run" / ".lock", ranks, tmp_path, f"process {ranks[0].pid} ")  # they have met
        time.sleep(delays.uniform(0, 2))
        for rank in ranks:
            os.kill(rank.pid, signal.SIGINT)
        codes, printed = processes.finish(ranks, tmp_path, 30)
        assert codes == [130, 130], printed
        (words,) = said(printed)
        assert words.startswith("stopped after step ") and "--resume" in words or words == "stopped", printed  # loading
    goes_on(job, tmp_path)


def test_sigterm_of_one_rank_stops_both(job, tmp_path):
    ranks = started(job, tmp_path)
    os.kill(ranks[1].pid, signal.SIGTERM)
    codes, printed = processes.finish(ranks, tmp_path, 30)
    assert codes == [130, 143] and said(printed)[0].startswith("stopped after step "), printed
    goes_on(job, tmp_path)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_is_killed_ends_the_others_and_costs_no_checkpoint(job, tmp_path, rank):
    ranks = started(job | {"strategy": "fsdp2"}, tmp_path)
    ranks[rank].kill()
    processes.finish(ranks, tmp_path, 30)
    goes_on(job, tmp_path)


def full_disk(words):
    """As `train`, on the second rank with files of at most 100 KB: the optimizer's shard has more."""
    if os.environ["RANK"] == "1":
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
    return main(["train", *words])


def test_a_full_disk_of_one_rank_is_one_line_and_the_older_checkpoint_stays(job, tmp_path):
    ranks = processes.start(2, full_disk, flags(job | {"strategy": "fsdp2"}), folder=tmp_path)
    codes, printed = processes.finish(ranks, tmp_path)
    (words,) = said(printed)
    assert codes == [2, 2] and words.startswith("redit-fast: checkpoint ") and "could not be written" in words
    assert checkpoint.newest(tmp_path / "out" / "run" / "checkpoints").name == "step-000000"  # it has no state yet
    goes_on(job, tmp_path)


REWARD = """
import os
calls = 0

def judge(prompts, completions, **columns):
    global calls
    calls += 1
    if calls == 4 and os.environ["RANK"] == "1":
        raise KeyError("no such thing")
    return [float(len(text) % 2) for text in completions]
"""


def test_a_reward_that_raises_on_one_rank_is_one_line_after_a_checkpoint(job, tmp_path):
    (tmp_path / "judges.py").write_text(REWARD)
    job |= {"rewards": [f"{tmp_path}/judges:judge"], "eval_problems": 0}
    codes, printed = processes.finish(processes.start(2, processes.train, flags(job), folder=tmp_path), tmp_path)
    (words,) = said(printed)
    assert codes == [2, 2] and "no such thing" in words and "judge" in words, printed
    run = tmp_path / "out" / "run"
    assert (
        checkpoint.step_of(checkpoint.newest(run / "checkpoints")) == 2 == lines_of(run / "metrics.jsonl")[-1]["step"]
    )


def test_what_all_ranks_find_wrong_the_first_one_says(job, tmp_path):
    for wrong in ({"model": "./nowhere"}, {"strategy": "tp"}, {"rewards": ["nowhere:judge"]}):
        ranks = processes.start(2, processes.train, flags(job | wrong), folder=tmp_path)
        codes, printed = processes.finish(ranks, tmp_path)
        assert codes == [2, 2] and len(said(printed)) == 1 == len(said(printed[:1])), printed
    assert not (tmp_path / "out").exists()


def test_torchrun(job, tmp_path):
    """The launcher itself, once."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "redit_fast", "train"]
    done = subprocess.run([*command, *flags(job | {"steps": 1})], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("the report: ") == 1
    assert [line["step"] for line in lines_of(tmp_path / "out" / "run" / "metrics.jsonl")] == [0, 1]


@pytest.mark.parametrize(
    ("variables", "more", "complaint"),
    [
        ({"WORLD_SIZE": "2"}, {}, "WORLD_SIZE is 2 and RANK is not set: start the run with torchrun"),
        ({}, {"strategy": "fsdp2"}, "strategy is fsdp2, which shards the model over processes"),
        ({"WORLD_SIZE": "4", "RANK": "0", "LOCAL_WORLD_SIZE": "2"}, {}, "a run is on one machine"),
        ({"WORLD_SIZE": "x", "RANK": "0"}, {}, "WORLD_SIZE is 'x', needs a whole number"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_written(
    job, tmp_path, monkeypatch, capsys, variables, more, complaint
):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert main(["train", *flags(job | more)]) == 2
    error = capsys.readouterr().err
    assert complaint in error and len(error.splitlines()) == 1
    assert not (tmp_path / "out").exists()
