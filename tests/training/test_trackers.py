"""TensorBoard, wandb and trackio get the numbers of metrics.jsonl, and none of them stops a run."""

import json
import math
import socket
import sqlite3
import struct
import sys
import threading
import time

import numpy as np
import pytest

from redit_fast.cli import main
from redit_fast.training import config_file, trackers
from redit_fast.training.distributed import Ranks
from redit_fast.training.trainer import train
from tests.training.jobs import flags, lines_of
from tests.training.test_stops import timeless

NOT_NUMBERS = ("schema", "step")


def numbers_of(run):
    """{(step, key): number} of metrics.jsonl."""
    return {
        (line["step"], key): value
        for line in lines_of(run / "metrics.jsonl")
        for key, value in line.items()
        if key not in NOT_NUMBERS and value is not None
    }


def of_tensorboard(run):
    """All points, in the order of the files, as TensorBoard shows them; two of a step and key are two."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    read = EventAccumulator(str(run / "tensorboard"), size_guidance={"scalars": 0}).Reload()
    return [((event.step, key), event.value) for key in read.Tags()["scalars"] for event in read.Scalars(key)]


def resume(settings, steps):
    return main(["train", "--resume", "--name", "run", "--out-dir", settings["out_dir"], "--steps", str(steps)])


@pytest.fixture
def tensorboard():
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")


def test_tensorboard_has_what_metrics_jsonl_has_also_after_a_kill_and_a_resume(settings, tmp_path, tensorboard):
    """In float32, each once: steps behind the checkpoint that a run goes on from are taken again."""
    job, run = {**settings, "track": ["tensorboard"], "checkpoint_every": 2, "eval_every": 3}, tmp_path / "run"
    train(config_file.load(overrides={**job, "steps": 3}))
    last = run / "checkpoints" / "step-000003"
    last.rename(tmp_path / "gone")  # as if it had been killed before this one
    assert resume(job, 4) == 0
    expected, found = numbers_of(run), of_tensorboard(run)
    assert len(dict(found)) == len(found) and dict(found).keys() == expected.keys() and len(expected) > 150
    assert all(value == np.float32(expected[of]) for of, value in found)
    assert len(list((run / "tensorboard").iterdir())) == 2


def test_a_step_whose_evaluation_the_resume_makes_up_for_is_there_once(settings, tmp_path, tensorboard):
    """Three steps end with an evaluation that six have not; the line of step 3 lost its own as by a Ctrl-C there."""
    job, run = {**settings, "track": ["tensorboard"], "eval_every": 3}, tmp_path / "run"
    train(config_file.load(overrides={**job, "steps": 3}))
    lines = [
        {key: value for key, value in line.items() if line["step"] != 3 or "held_out" not in key}
        for line in lines_of(run / "metrics.jsonl")
    ]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert resume(job, 4) == 0
    expected, found = numbers_of(run), of_tensorboard(run)
    assert (3, "accuracy/held_out") in expected
    assert len(dict(found)) == len(found) and all(value == np.float32(expected[of]) for of, value in found)
    assert dict(found).keys() == expected.keys()


def test_tracking_changes_no_run_and_is_off_by_default_and_free_on_resume(settings, tmp_path, tensorboard):
    train(config_file.load(overrides={**settings, "steps": 1}))
    assert not (tmp_path / "run" / "tensorboard").exists()
    assert main(["train", "--resume", "--name", "run", "--out-dir", str(tmp_path), "--steps", "2",
                 "--track", "tensorboard"]) == 0  # fmt: skip
    assert {step for (step, _), _ in of_tensorboard(tmp_path / "run")} == {2}
    train(config_file.load(overrides={**settings, "steps": 2, "name": "without", "eval_every": 1}))
    one, other = (timeless(tmp_path / name / "metrics.jsonl")[2] for name in ("run", "without"))
    assert one == other


class Odd(BaseException):
    """What nobody expects."""


FAILS = {
    "at the start": lambda config, run, first: (_ for _ in ()).throw(Odd("no network. And more.\nSecond line")),
    "at a step": lambda config, run, first: (lambda step, numbers: 1 / 0, lambda: None),
    "at the end": lambda config, run, first: (lambda step, numbers: None, lambda: [][0]),
}


@pytest.mark.parametrize("when", FAILS)
def test_one_that_raises_is_left_with_one_warning_and_the_others_and_the_run_go_on(
    settings, tmp_path, monkeypatch, tensorboard, when
):
    monkeypatch.setitem(trackers.OPEN, "wandb", FAILS[when])
    monkeypatch.setattr("redit_fast.training.setup.extras.need", lambda *_: None)
    with pytest.warns(UserWarning) as caught:
        summary = train(config_file.load(overrides={**settings, "track": ["wandb", "tensorboard"]}))
    (said,) = [str(warning.message) for warning in caught if "track" in str(warning.message)]
    reason = {"at the start": "Odd: no network", "at a step": "ZeroDivisionError: division by zero",
              "at the end": "IndexError: list index out of range"}[when]  # fmt: skip
    assert said == f"track wandb: {reason}; it gets no more numbers, the run goes on and metrics.jsonl has all"
    run = tmp_path / "run"
    assert summary["steps"] == 2 and dict(of_tensorboard(run)).keys() == numbers_of(run).keys()


def test_a_tracker_that_stops_itself_is_one_warning(tmp_path, monkeypatch):
    def start(config, run, first):
        raise KeyboardInterrupt

    monkeypatch.setitem(trackers.OPEN, "wandb", start)
    uncaught = []
    monkeypatch.setattr(threading, "excepthook", uncaught.append)
    with pytest.warns(UserWarning, match="^track wandb: KeyboardInterrupt; it gets no more numbers"):
        with trackers.opened(config_file.load(overrides={"track": ["wandb"]}), tmp_path, 0, None, Ranks()):
            pass
    assert uncaught == []


def test_wandb_has_less_time_to_start_than_the_end_of_a_run_waits(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb", reason="wandb is not installed")
    given = {}

    def init(**settings):
        given.update(settings)
        raise KeyboardInterrupt

    monkeypatch.setattr(wandb, "init", init)
    with pytest.raises(KeyboardInterrupt):
        trackers.OPEN["wandb"](config_file.load(overrides={"name": "run"}), tmp_path, 0)
    assert 0 < given["settings"].init_timeout < trackers.CLOSING


@pytest.mark.parametrize("when", ["start", "step"])
def test_one_that_hangs_holds_up_no_step_and_is_left_at_the_end(settings, tmp_path, monkeypatch, when):
    hang = threading.Event()

    def start(config, run, first):
        if when == "start":
            hang.wait()
        return (lambda step, numbers: hang.wait()), (lambda: None)

    monkeypatch.setitem(trackers.OPEN, "trackio", start)
    monkeypatch.setattr(trackers, "CLOSING", 0.2)
    monkeypatch.setattr("redit_fast.training.setup.extras.need", lambda *_: None)
    with pytest.warns(UserWarning, match="^track trackio: it has not taken the run's last numbers in 0.2 s and is"):
        train(config_file.load(overrides={**settings, "track": ["trackio"]}))
    hang.set()
    assert (tmp_path / "run" / "summary.json").exists() and len(lines_of(tmp_path / "run" / "metrics.jsonl")) == 3


def test_a_stop_closes_them(settings, tmp_path, monkeypatch):
    """Its step included."""
    (tmp_path / "stops.py").write_text(
        "def judge(prompts, completions, **columns):\n    judge.calls = getattr(judge, 'calls', 0) + 1\n"
        "    if judge.calls == 4:\n        raise KeyboardInterrupt\n    return [0.5] * len(prompts)\n"
    )
    said = []
    monkeypatch.setitem(
        trackers.OPEN, "wandb", lambda *_: (lambda step, numbers: said.append(step), lambda: said.append("closed"))
    )
    monkeypatch.setattr("redit_fast.training.setup.extras.need", lambda *_: None)
    job = {**settings, "rewards": [f"{tmp_path}/stops:judge"], "track": ["wandb"]}
    with pytest.raises(KeyboardInterrupt, match="stopped after step 1 of 2"):
        train(config_file.load(overrides=job))
    assert said == [0, 1, "closed"]


def test_numbers_alone_are_given(settings, tmp_path, monkeypatch):
    given = []
    monkeypatch.setitem(trackers.OPEN, "wandb", lambda *_: (lambda *step: given.append(step), lambda: None))
    line = {"schema": 2, "step": 3, "a": 1, "b/c": 0.5, "d": None, "e": math.nan, "f": math.inf}
    with trackers.opened(config_file.load(overrides={"track": ["wandb"]}), tmp_path, 3, line, Ranks()) as track:
        track({**line, "step": 4})
    with trackers.opened(config_file.load(overrides={"track": ["wandb"]}), tmp_path, 3, line, Ranks(rank=1, size=2)):
        pass
    assert given == [(3, {"a": 1, "b/c": 0.5}), (4, {"a": 1, "b/c": 0.5})]


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--track", "mlflow"], "track[0]: got 'mlflow', needs 'tensorboard', 'wandb' or 'trackio'"),
        (["--track", "wandb", "wandb"], "track: got wandb wandb, needs each once"),
        (["--track"], "argument --track: expected at least one argument"),
    ],
)
def test_a_bad_choice_is_named(capsys, words, sentence):
    try:
        code = main(["train", *words])
    except SystemExit as error:
        code = error.code
    assert code == 2 and capsys.readouterr().err == f"redit-fast: {sentence}\n"


def test_one_that_is_not_installed_is_named_before_the_model_is_loaded(settings, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("redit_fast.extras.find_spec", lambda name: None)
    for name in ("tensorboard", "wandb", "trackio"):
        assert main(["train", *flags({**settings, "model": "nowhere", "track": name})]) == 2
        said = f'track {name} needs {name}, not installed here; run `pip install "redit-fast[{name}]"`'
        assert capsys.readouterr().err == f"redit-fast: {said}\n" and not (tmp_path / "run").exists()


def of_wandb(file):
    """The records of a run's own file, which `wandb sync` would send: a log of LevelDB behind a header of 7 bytes, in
    blocks of 32 KiB, whose parts have a checksum, a length and a kind (1 whole, 2 first, 3 middle, 4 last)."""
    from wandb.proto import wandb_internal_pb2

    content, place, whole = file.read_bytes(), 7, b""
    while place + 7 <= len(content):
        if (room := 32768 - place % 32768) < 7:
            place += room
            continue
        length, kind = struct.unpack_from("<HB", content, place + 4)
        whole += content[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):
            yield wandb_internal_pb2.Record.FromString(whole)
            whole = b""


def test_wandb_offline_has_the_numbers_and_a_resume_its_run(settings, tmp_path, monkeypatch):
    pytest.importorskip("wandb", reason="wandb is not installed")
    monkeypatch.setenv("WANDB_MODE", "offline")
    job, run = {**settings, "track": ["wandb"]}, tmp_path / "run"
    train(config_file.load(overrides={**job, "steps": 1}))
    assert resume(job, 2) == 0
    records, end = [], time.monotonic() + 60
    while sum(record.HasField("history") for record in records) < 3 and time.monotonic() < end:  # its process writes
        files = sorted((run / "wandb").glob("offline-*/*.wandb"))
        records = [record for file in files for record in of_wandb(file)]
    started = [record.run for record in records if record.HasField("run")]
    assert {(of.run_id, of.display_name, of.project) for of in started} == {
        ((run / ".wandb-id").read_text(), "run", "redit-fast")
    }
    steps = [{".".join(item.nested_key) or item.key: json.loads(item.value_json) for item in record.history.item}
             for record in records if record.HasField("history")]  # fmt: skip
    found = [((line["step"], key), value) for line in steps for key, value in line.items() if key[0] != "_"]
    found = [(of, value) for of, value in found if of[1] != "step"]
    assert dict(found) == numbers_of(run) and len(dict(found)) == len(found)


def test_trackio_has_the_numbers_in_its_own_file_and_a_resume_its_run(settings, tmp_path, monkeypatch):
    """Its dashboard is not started, and no network asked."""
    pytest.importorskip("trackio", reason="trackio is not installed")
    for name in [name for name in sys.modules if name.partition(".")[0] == "trackio"]:  # which keeps its folder
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    asked = []
    for name in ("listen", "connect"):
        monkeypatch.setattr(socket.socket, name, lambda *words: asked.append(words))
    train(config_file.load(overrides={**settings, "track": ["trackio"], "steps": 1}))
    assert resume(settings, 2) == 0 and asked == []
    (file,) = (tmp_path / "trackio").glob("*.db")
    with sqlite3.connect(file) as there:
        rows = there.execute("SELECT run_name, step, metrics FROM metrics").fetchall()
    found = {(step, key): value for _, step, text in rows for key, value in json.loads(text).items()}
    assert found == numbers_of(tmp_path / "run") and len({name for name, _, _ in rows}) == 1
