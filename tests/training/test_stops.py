"""What a run keeps when it stops: resume, Ctrl-C, kill -9, a full disk, a damaged checkpoint, a reward that raises."""

import json
import re
import resource
import shlex
import shutil
import signal
import sys
import time

import pytest
import torch
from safetensors.torch import load_file

from redit_fast import known_names
from redit_fast.cli import main
from redit_fast.training import builtin, checkpoint, config_file, trainer
from redit_fast.training.trainer import train
from tests.training.jobs import flags, launch, launch_anew, lines_of


@pytest.fixture
def demo(tmp_path):
    """Settings of a small demo, warm start included."""
    return {
        "out_dir": str(tmp_path), "name": "demo", "steps": 2, "warm_start_steps": 6, "prompts_per_step": 2,
        "group_size": 4, "max_completion_length": 12, "eval_problems": 8, "checkpoint_every": 2,
    }  # fmt: skip


def timeless(metrics):
    """The lines of metrics.jsonl without what differs between equal runs."""
    return [
        {
            key: value
            for key, value in line.items()
            if not key.startswith(("time/", "step_time", "tokens/per", "flops/share"))
        }
        for line in lines_of(metrics)
    ]


def assert_equal_checkpoints(a, b):
    for file in ("model.safetensors", "optimizer.safetensors"):
        one, other = load_file(a / file), load_file(b / file)
        assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("dropout", [0.0, 0.1], ids=["packed", "padded, with dropout"])
def test_ten_steps_are_five_a_fresh_process_and_five_more_bit_by_bit(settings, tmp_path, dropout):
    """Dither, GR with its second pass, dropout, sampling, data order and AdamW's state included."""
    shutil.copytree(settings["model"], tmp_path / "model")
    described = json.loads((tmp_path / "model" / "config.json").read_text())
    (tmp_path / "model" / "config.json").write_text(json.dumps({**described, "attention_dropout": dropout}))
    settings = {**settings, "model": str(tmp_path / "model")}
    straight = {**settings, "name": "straight", "steps": 10, "checkpoint_every": 5}
    halves = {**settings, "name": "halves", "checkpoint_every": 5}
    for job, more in ((straight, ()), ({**halves, "steps": 5}, ()), ({**halves, "steps": 10}, ("--resume",))):
        process = launch(job, *more)
        said, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors
        assert ("rows are padded, not packed: it has dropout" in said) == (dropout > 0)
    a, b = (tmp_path / name for name in ("straight", "halves"))
    assert_equal_checkpoints(*(run / "checkpoints" / "step-000010" for run in (a, b)))
    assert (a / "completions.jsonl").read_text() == (b / "completions.jsonl").read_text()

    ours, theirs = timeless(a / "metrics.jsonl"), timeless(b / "metrics.jsonl")
    held_out = [key for key in theirs[5] if "held_out" in key]  # five steps end with an evaluation
    assert len(held_out) == 5 and None not in [theirs[5].pop(key) for key in held_out] and ours == theirs


def test_kill_9_at_any_moment_never_damages_an_older_checkpoint(settings, tmp_path):
    job, run = {**settings, "steps": 500}, tmp_path / "run"
    complete = set()
    for attempt in range(3):
        process = launch(job, *(["--resume"] if attempt else ["--keep-checkpoints", "none"]))
        target = max(complete, default=-1) + 2 + attempt
        deadline = time.monotonic() + 300
        while not (run / "checkpoints" / f"step-{target:06d}").exists():
            assert process.poll() is None and time.monotonic() < deadline, process.communicate()
            time.sleep(0.01)
        time.sleep(0.07 * attempt)  # somewhere in the next step or its checkpoint
        process.kill()
        process.wait()
        for step in complete:
            assert checkpoint.damage(run / "checkpoints" / f"step-{step:06d}") is None
        newest = checkpoint.newest(run / "checkpoints")
        assert checkpoint.step_of(newest) >= target
        complete |= {int(path.name[5:]) for path in (run / "checkpoints").glob("step-*")}
        written = (run / "metrics.jsonl").read_text()
        steps = [json.loads(line)["step"] for line in written.split("\n")[:-1]]
        assert steps == sorted(set(steps))
    done = checkpoint.step_of(newest)
    train(config_file.load(overrides={**job, "steps": done + 1, "keep_checkpoints": None}), resume=True)
    assert [line["step"] for line in lines_of(run / "metrics.jsonl")] == list(range(done + 2))


def test_a_checkpoint_that_exists_has_all_the_lines_that_lead_to_it(settings, monkeypatch):
    publish, steps = checkpoint.publish, []

    def publish_after_reading(draft):
        run = draft.parent.parent
        steps.append(checkpoint.step_of(draft))
        for name in ("metrics.jsonl", "completions.jsonl"):
            assert steps[-1] == 0 or lines_of(run / name)[-1]["step"] == steps[-1]
        return publish(draft)

    monkeypatch.setattr(checkpoint, "publish", publish_after_reading)
    train(config_file.load(overrides=settings))
    assert steps == list(range(settings["steps"] + 1))


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_a_stop_saves_prints_the_resume_command_and_has_its_exit_code(settings, tmp_path, number, code):
    """Ctrl-C; Slurm, Kubernetes and kill; a terminal that was closed. A second one changes nothing."""
    job = {**settings, "name": "my run", "steps": 500, "checkpoint_every": 400}
    process = launch(job)
    deadline = time.monotonic() + 300
    metrics = tmp_path / "my run" / "metrics.jsonl"
    while not metrics.exists() or metrics.read_text().count("\n") < 3:
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.01)
    process.send_signal(number)
    while process.poll() is None and not list((tmp_path / "my run" / "checkpoints").glob("*draft-0*[1-9]*")):
        time.sleep(0.001)
    process.send_signal(number)  # while it saves
    _, errors = process.communicate(timeout=300)
    assert process.returncode == code and "Traceback" not in errors
    done = checkpoint.step_of(checkpoint.newest(tmp_path / "my run" / "checkpoints"))
    assert done >= 2 and f"after step {done} of 500, saved in {tmp_path / 'my run'}; " in errors
    words = shlex.split(errors.partition("to go on: ")[2])
    assert words[0] == "redit-fast" and main([*words[1:], "--steps", str(done + 1)]) == 0
    assert [line["step"] for line in lines_of(metrics)] == list(range(done + 2))


def test_more_stops_while_a_run_saves_are_dropped(settings, tmp_path, capsys, monkeypatch):
    write, stops = checkpoint.write, [signal.SIGTERM, signal.SIGINT]

    def pressed(folder, step, *args, **options):
        if step == 1 and stops:  # one stops the run, the other comes while it saves
            signal.raise_signal(stops.pop(0))
        return write(folder, step, *args, **options)

    monkeypatch.setattr(checkpoint, "write", pressed)
    assert main(["train", *flags({**settings, "steps": 3})]) == 143 and stops == []
    errors = capsys.readouterr().err
    assert "stopped after step 1 of 3, saved in" in errors and len(errors.splitlines()) == 1
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    assert checkpoint.step_of(checkpoint.newest(tmp_path / "run" / "checkpoints")) == 1


def test_a_stop_that_is_ignored_does_not_stop_a_run(settings, monkeypatch):
    """As nohup ignores SIGHUP, and a shell's `&` Ctrl-C."""
    write = checkpoint.write
    stops = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

    def pressed(*args, **options):
        for number in stops:
            signal.raise_signal(number)
        return write(*args, **options)

    monkeypatch.setattr(checkpoint, "write", pressed)
    handlers = {number: signal.signal(number, signal.SIG_IGN) for number in stops}
    try:
        assert main(["train", *flags({**settings, "steps": 1})]) == 0
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def test_a_stop_in_an_evaluation_does_not_wait_for_it_and_the_resume_makes_up_for_it(settings, tmp_path, monkeypatch):
    evaluate, calls = trainer.held_out_metrics, []

    def pressed(*args):
        calls.append(1)
        if len(calls) == 2:
            signal.raise_signal(signal.SIGINT)
        return evaluate(*args)

    job = {**settings, "checkpoint_every": 10, "steps": 3}
    with monkeypatch.context() as patch:
        patch.setattr(trainer, "held_out_metrics", pressed)
        assert main(["train", *flags(job)]) == 130
    metrics = tmp_path / "run" / "metrics.jsonl"
    assert ["accuracy/held_out" in line for line in lines_of(metrics)] == [True, False, False]
    assert len(lines_of(tmp_path / "run" / "completions.jsonl")) == 2 * 12
    train(config_file.load(overrides=job), resume=True)
    train(config_file.load(overrides={**job, "name": "straight"}))
    assert timeless(metrics) == timeless(tmp_path / "straight" / "metrics.jsonl")
    assert_equal_checkpoints(*(tmp_path / name / "checkpoints" / "step-000003" for name in ("run", "straight")))


def test_a_log_is_alive_in_the_warm_start_and_sigterm_there_leaves_no_run(demo, tmp_path):
    process = launch({**demo, "warm_start_steps": 2000})
    lines = [process.stdout.readline() for _ in range(2)]
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=300)
    pattern = r"0:0\d:\d\d warm start \d+/2000(, loss \d\.\d{3}, \d+:\d\d:\d\d left)?\n"
    assert all(re.fullmatch(pattern, line) for line in lines) and lines[0] != lines[1], (lines, errors)
    assert process.returncode == 143 and "nothing is saved; to start again: redit-fast train" in errors
    assert "--resume" not in errors and len(errors.splitlines()) == 1 and list(tmp_path.iterdir()) == []


def test_without_a_terminal_each_evaluation_is_a_line(settings, tmp_path, capsys):
    train(config_file.load(overrides=settings))
    lines = [line for line in capsys.readouterr().out.splitlines() if "held out" in line]  # others come every 10 s
    held_out = [line["accuracy/held_out"] for line in lines_of(tmp_path / "run" / "metrics.jsonl")[::2]]
    assert re.fullmatch(rf"\d:\d\d:\d\d GRPO 0/2, held out {held_out[0]:.1%}", lines[0])
    numbers = r"reward -?\d\.\d\d, accuracy \d+%, [\d,]+ tokens/s"
    assert re.fullmatch(rf"\d:\d\d:\d\d GRPO 2/2, {numbers}, held out {held_out[1]:.1%}, 0:00:00 left", lines[1])
    assert len(lines) == 2


def test_a_log_that_nobody_reads_any_more_does_not_stop_the_run(settings, tmp_path):
    process = launch(settings)
    process.stdout.close()
    process.wait(timeout=300)
    assert (tmp_path / "run" / "summary.json").exists(), process.stderr.read()


def test_a_full_disk_is_one_line_and_the_older_checkpoint_stays(settings, tmp_path):
    train(config_file.load(overrides={**settings, "steps": 1}))

    def small_files():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))

    process = launch_anew({**settings, "steps": 3}, "--resume", preexec_fn=small_files)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 2 and len(errors.strip().splitlines()) == 1, errors
    assert "large" in errors and checkpoint.step_of(checkpoint.newest(tmp_path / "run" / "checkpoints")) == 1
    train(config_file.load(overrides={**settings, "steps": 2}), resume=True)


@pytest.mark.parametrize("file", ["model.safetensors", checkpoint.MANIFEST])
def test_a_damaged_newest_checkpoint_is_named_and_the_one_before_used(settings, tmp_path, file):
    train(config_file.load(overrides=settings))
    newest = tmp_path / "run" / "checkpoints" / "step-000002"
    whole = (newest / file).read_bytes()
    (newest / file).write_bytes(whole[:-100] + b"\0" * 100 if file == "model.safetensors" else b"[1, 2]")
    with pytest.warns(UserWarning, match=rf"step-000002 is damaged \({file} (has changed|is missing or unreadable)\)"):
        summary = train(config_file.load(overrides=settings), resume=True)
    assert summary["steps"] == 2 and checkpoint.damage(newest) is None
    assert [line["step"] for line in lines_of(tmp_path / "run" / "metrics.jsonl")] == [0, 1, 2]


def test_a_manifest_that_is_nested_too_deep_is_damaged(tmp_path):
    (tmp_path / checkpoint.MANIFEST).write_text("[" * 100000)
    assert checkpoint.damage(tmp_path) == f"{checkpoint.MANIFEST} is missing or unreadable"


def run_with_reward(settings, tmp_path, body, capsys):
    (tmp_path / "mine.py").write_text(f"import math, os\ndef judge(prompts, completions, **columns):\n    {body}\n")
    job = {**settings, "rewards": [f"{tmp_path}/mine:judge"]}
    code = main(["train", *flags(job)])
    sys.modules.pop("mine", None)
    return code, capsys.readouterr().err


@pytest.mark.parametrize(
    ("body", "complaint"),
    [
        ("raise KeyError('oops')", "KeyError"),
        ("return [1.0]", "returned 1 rewards for"),
        ("return [math.inf] * len(completions)", "inf"),
        ("return ['good'] * len(completions)", "'good'"),
        ("return 1.0", "float"),
    ],
)
def test_a_reward_that_fails_stops_the_run_in_one_line_after_a_checkpoint(settings, tmp_path, capsys, body, complaint):
    body = f"if len(completions) > 2:\n        {body}\n    return [0.0, 0.0]"  # two are the trial before the run
    code, errors = run_with_reward({**settings, "eval_problems": 0}, tmp_path, body, capsys)
    assert code == 2 and "judge" in errors and complaint in errors and len(errors.strip().splitlines()) == 1
    assert checkpoint.step_of(checkpoint.newest(tmp_path / "run" / "checkpoints")) == 0


def test_a_reward_that_raises_in_the_first_evaluation_costs_no_warm_start(demo, tmp_path, capsys):
    """And the resumed run is the one that nothing stopped."""
    broken = tmp_path / "broken"
    broken.touch()
    fails = f"len(completions) > 2 and os.path.exists({str(broken)!r})"  # two are the trial before the run
    body = f"assert not ({fails}), 'no judge'; return [float(len(c) % 3) for c in completions]"
    code, errors = run_with_reward(demo, tmp_path, body, capsys)
    assert code == 2 and "no judge" in errors and len(errors.splitlines()) == 1
    run, judge = tmp_path / "demo", [f"{tmp_path}/mine:judge"]
    assert checkpoint.step_of(checkpoint.newest(run / "checkpoints")) == 0
    assert lines_of(run / "metrics.jsonl") == []

    broken.unlink()
    train(config_file.load(overrides={**demo, "rewards": judge}), resume=True)
    train(config_file.load(overrides={**demo, "rewards": judge, "name": "straight"}))
    straight = tmp_path / "straight"
    assert "accuracy/held_out" in lines_of(run / "metrics.jsonl")[0]
    assert timeless(run / "metrics.jsonl") == timeless(straight / "metrics.jsonl")
    for step in ("step-000000", "step-000002"):
        assert_equal_checkpoints(run / "checkpoints" / step, straight / "checkpoints" / step)


def test_ctrl_c_in_the_warm_start_says_that_nothing_is_saved_and_how_to_start_again(
    demo, tmp_path, capsys, monkeypatch
):
    warm_start = builtin.warm_start

    def pressed_at_step_3(*args, progress, **options):
        def press(step, loss):
            progress(step, loss)
            if step == 3:
                signal.raise_signal(signal.SIGINT)

        warm_start(*args, progress=press, **options)

    monkeypatch.setattr(builtin, "warm_start", pressed_at_step_3)
    assert main(["train", *flags({**demo, "name": "my run"})]) == 130
    errors = capsys.readouterr().err
    assert "in the warm start, nothing is saved; to start again" in errors and len(errors.splitlines()) == 1
    assert "--resume" not in errors and not (tmp_path / "my run").exists()

    monkeypatch.undo()
    words = shlex.split(errors.partition("to start again: ")[2])
    assert words[0] == "redit-fast" and main(words[1:]) == 0
    assert main(words[1:]) == 2 and "holds a run already: add --resume" in capsys.readouterr().err
    train(config_file.load(overrides=demo))
    assert timeless(tmp_path / "my run" / "metrics.jsonl") == timeless(tmp_path / "demo" / "metrics.jsonl")


def test_a_folder_of_another_kind_with_a_config_json_is_not_taken_for_a_run_that_has_saved_nothing(demo, tmp_path):
    (tmp_path / "demo").mkdir()
    (tmp_path / "demo" / "config.json").write_text('{"model_type": "qwen2"}')
    with pytest.raises(ValueError, match="demo holds a run already"):
        train(config_file.load(overrides=demo))
    assert (tmp_path / "demo" / "config.json").read_text() == '{"model_type": "qwen2"}'


def test_a_run_of_version_0_1_goes_on(settings, tmp_path):
    """Its config.json has other names for four settings, and lacks the newest."""
    train(config_file.load(overrides={**settings, "steps": 1}))
    path = tmp_path / "run" / "config.json"
    written = json.loads(path.read_text())
    for new in ("clip_low", "clip_high"):
        del written[new]
    for old, new in known_names.IN_OLD_RUNS.items():
        written[old] = written.pop(new)
    path.write_text(json.dumps(written))
    assert main(["train", "--resume", "--name", "run", "--out-dir", str(tmp_path), "--steps", "2"]) == 0
    assert json.loads(path.read_text())["gr_epsilon"] == settings["gr_epsilon"]
    assert [line["step"] for line in lines_of(tmp_path / "run" / "metrics.jsonl")] == [0, 1, 2]


def test_unscored_samples_are_counted_and_the_run_goes_on(settings, tmp_path, capsys):
    body = "return [None if i % 4 == 0 else float(len(str(c)) % 3) for i, c in enumerate(completions)]"
    with pytest.warns(UserWarning, match="'judge' left .* samples unscored"):
        code, _ = run_with_reward(settings, tmp_path, body, capsys)
    assert code == 0
    assert [line["rewards/judge/nan_frac"] for line in lines_of(tmp_path / "run" / "metrics.jsonl")[1:]] == [0.25, 0.25]


def test_an_existing_run_is_never_overwritten(settings, tmp_path, capsys):
    train(config_file.load(overrides={**settings, "steps": 1}))
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    assert main(["train", *flags(settings)]) == 2 and "--resume" in capsys.readouterr().err
    assert main(["train", *flags({**settings, "learning_rate": 0.5}), "--resume"]) == 2
    assert "learning_rate was 0.001" in capsys.readouterr().err
    assert main(["train", *flags({**settings, "name": "other"}), "--resume"]) == 2
    assert "no run to resume" in capsys.readouterr().err
    assert before == {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}


def test_an_empty_folder_becomes_the_run_and_anything_else_there_is_named(settings, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    assert main(["train", *flags({**settings, "name": "empty", "steps": 1})]) == 0
    (tmp_path / "file").write_text("mine")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes").write_text("mine")
    capsys.readouterr()
    for name, sentence in (("file", "is a file, a run needs a folder"), ("full", "is a folder with other files in it")):
        assert main(["train", *flags({**settings, "name": name})]) == 2
        errors = capsys.readouterr().err
        assert f"{tmp_path / name} {sentence}" in errors and "--resume" not in errors
    assert (tmp_path / "file").read_text() == "mine" and len(list((tmp_path / "full").iterdir())) == 1


def test_the_newest_checkpoint_is_the_one_of_the_highest_step(settings, tmp_path):
    train(config_file.load(overrides={**settings, "steps": 1}))
    folder = tmp_path / "run" / "checkpoints"
    for number in (999_999, 1_000_000):
        shutil.copytree(folder / "step-000001", folder / f"step-{number}")
    (folder / "step-1000000-copy").mkdir()
    assert [path.name for path in checkpoint.in_order(folder)] == [
        "step-000000", "step-000001", "step-999999", "step-1000000",
    ]  # fmt: skip
    assert checkpoint.newest(folder).name == "step-1000000"


def test_steps_cannot_change_where_the_dither_counts_back_from_the_last(settings, tmp_path, capsys):
    train(config_file.load(overrides={**settings, "steps": 1, "dither_schedule": "cosine_reverse"}))
    resume = ["train", "--resume", "--name", "run", "--out-dir", str(tmp_path)]
    assert main([*resume, "--steps", "3"]) == 2
    errors = capsys.readouterr().err
    assert "steps was 1 in" in errors and "cosine_reverse counts back from the last step" in errors
    assert main([*resume, "--steps", "1"]) == 0


def test_a_draft_that_a_kill_left_is_cleaned_up_by_the_next_resume(settings, tmp_path):
    train(config_file.load(overrides={**settings, "steps": 1}))
    folder = tmp_path / "run" / "checkpoints"
    shutil.copytree(folder / "step-000001", folder / ".draft-000007")
    train(config_file.load(overrides={**settings, "steps": 1}), resume=True)
    assert sorted(path.name for path in folder.iterdir()) == ["step-000000", "step-000001"]


def test_a_hostile_pickle_beside_a_checkpoint_is_never_opened(settings, tmp_path):
    train(config_file.load(overrides={**settings, "steps": 1}))
    newest = tmp_path / "run" / "checkpoints" / "step-000001"
    (newest / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'touch " + str(tmp_path / "ran").encode() + b"'\ntR.")
    train(config_file.load(overrides=settings), resume=True)
    assert not (tmp_path / "ran").exists()
