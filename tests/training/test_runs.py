"""A run's folder: one process at a time, the same inputs after a resume, the checkpoints that are kept."""

import errno
import fcntl
import json
import os
import resource
import shutil
import sys
import time
from pathlib import Path

import pytest

from redit_fast.cli import main
from redit_fast.training import checkpoint, config_file, inputs, runs
from redit_fast.training.config_file import module_file
from redit_fast.training.trainer import train
from tests.training.jobs import flags, launch, lines_of

JUDGE = "def judge(prompts, completions, **columns):\n    return [float(len(c) % 3) for c in completions]\n"


FORKS = """
import os, pathlib, time
orphan = pathlib.Path(__file__).with_name("orphan")
def judge(prompts, completions, **columns):
    if not orphan.exists():
        child = os.fork()
        if child == 0:
            os.closerange(0, 3)
            time.sleep(600)
            os._exit(0)
        orphan.write_text(str(child))
    return [float(len(c) % 3) for c in completions]
"""


def resume(settings, *more):
    return main(["train", "--resume", "--name", settings["name"], "--out-dir", settings["out_dir"], *more])


def files_of(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def steps_kept(run):
    return [int(path.name[5:]) for path in checkpoint.in_order(run / "checkpoints")]


@pytest.mark.parametrize("named", [True, False])
def test_of_two_starts_at_once_one_has_the_folder(settings, tmp_path, named):
    """They meet where the reward is imported, when both have found the folder free."""
    (tmp_path / "meet.py").write_text(
        "import os, pathlib, time\nhere = pathlib.Path(__file__).parent\n(here / f'here-{os.getpid()}').touch()\n"
        "while len(list(here.glob('here-*'))) < 2:\n    time.sleep(0.01)\n" + JUDGE
    )
    job = {**settings, "rewards": [f"{tmp_path}/meet:judge"], "out_dir": str(tmp_path / "out")}
    if not named:
        del job["name"]
    both = [launch(job) for _ in range(2)]
    errors = [process.communicate(timeout=300)[1] for process in both]
    codes = [process.returncode for process in both]
    folders = sorted(path.name for path in (tmp_path / "out").iterdir())
    if named:
        assert sorted(codes) == [0, 2] and folders == ["run"], errors
        lost = errors[codes.index(2)]
        assert f"{tmp_path / 'out' / 'run'} holds a run" in lost and len(lost.splitlines()) == 1
    else:
        stem = config_file.load(overrides=job).with_name().name.removesuffix("-3")
        assert codes == [0, 0] and folders == [stem, f"{stem}-2"], errors
    for folder in folders:
        assert [line["step"] for line in lines_of(tmp_path / "out" / folder / "metrics.jsonl")] == [0, 1, 2]
        assert len(lines_of(tmp_path / "out" / folder / "completions.jsonl")) == 2 * 12


@pytest.mark.draws
def test_a_living_run_is_resumed_by_nobody_has_a_report_and_is_free_once_it_was_killed(settings, tmp_path, capsys):
    """Also where its reward functions have forked a process that outlives it."""
    (tmp_path / "forks.py").write_text(FORKS)
    job, run = {**settings, "steps": 500, "rewards": [f"{tmp_path}/forks:judge"]}, tmp_path / "run"
    process = launch(job)
    try:
        deadline = time.monotonic() + 300
        while not (run / "checkpoints" / "step-000002").exists():
            assert process.poll() is None and time.monotonic() < deadline, process.communicate()
            time.sleep(0.01)
        assert resume(job) == 2
        error = capsys.readouterr().err
        assert f"{run} holds a run that process {process.pid} on " in error and len(error.splitlines()) == 1
        assert main(["train", *flags(job)]) == 2 and "holds a run already" in capsys.readouterr().err
        assert main(["report", str(run)]) == 0 and "it has not ended" in (run / "report.html").read_text()
        assert process.poll() is None
    finally:
        process.kill()
        process.communicate()
    try:
        done = checkpoint.step_of(checkpoint.newest(run / "checkpoints"))
        assert resume(job, "--steps", str(done + 1)) == 0, capsys.readouterr().err
        os.kill(int((tmp_path / "orphan").read_text()), 0)  # it is still there
    finally:
        os.kill(int((tmp_path / "orphan").read_text()), 9)
    assert [line["step"] for line in lines_of(run / "metrics.jsonl")] == list(range(done + 2))


def test_several_processes_of_torchrun_are_refused_by_name(settings, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["train", *flags(settings)]) == 2
    error = capsys.readouterr().err
    assert "WORLD_SIZE is 2" in error and "torchrun" in error and len(error.splitlines()) == 1
    for one in ("1", ""):
        monkeypatch.setenv("WORLD_SIZE", one)
        assert main(["train", *flags({**settings, "model": "./nowhere"})]) == 2
        assert "no such folder" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_where_no_file_can_be_locked_nothing_is_written(settings, tmp_path, monkeypatch):
    def no_locks(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    with monkeypatch.context() as patch:
        patch.setattr(fcntl, "flock", no_locks)
        with pytest.raises(ValueError, match="locks no files .No locks available.*--out-dir"):
            train(config_file.load(overrides=settings))
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "fcntl", None)
        with pytest.raises(NotImplementedError, match="needs Linux or macOS"):
            train(config_file.load(overrides=settings))
    assert [path.name for path in (tmp_path / "run").iterdir()] == [runs.LOCK]


def test_what_a_start_that_was_killed_left_is_no_run_and_a_folder_that_goes_away_is_not_held(tmp_path, monkeypatch):
    run = tmp_path / "run"
    with runs.claimed(run, new=True):
        (run / "inputs.json").write_text("{}")
        with pytest.raises(runs.TakenError, match=f"process {os.getpid()} on"), runs.claimed(run, new=True):
            pass
    with runs.claimed(run, new=True):
        runs.remove(run)
    assert not run.exists()

    flock = fcntl.flock

    def too_late(lock, how):  # what holds the folder takes it back between open and lock
        shutil.rmtree(run)
        flock(lock, how)

    monkeypatch.setattr(fcntl, "flock", too_late)
    with pytest.raises(runs.TakenError, match="was removed"), runs.claimed(run, new=True):
        pass


@pytest.fixture
def own(settings, model_folder, tmp_path):
    """Settings of a run whose inputs may be changed."""
    shutil.copytree(model_folder, tmp_path / "model")
    shutil.copy(settings["data"], tmp_path / "problems.jsonl")
    (tmp_path / "judges.py").write_text(JUDGE)
    files = {"model": str(tmp_path / "model"), "data": str(tmp_path / "problems.jsonl")}
    return {**settings, **files, "rewards": [f"{tmp_path}/judges:judge", "xml_format"], "steps": 1}


def flipped(position):
    def change(content):
        content = bytearray(content)
        content[position] ^= 1
        return bytes(content)

    return change


CHANGES = {  # file: what becomes of it, what is said about it
    "problems.jsonl": (lambda content: content + content.splitlines(True)[0], "has changed"),
    "judges.py": (lambda content: content.replace(b"% 3", b"% 4"), "has changed"),
    "model/model.safetensors": (flipped(-1), "has changed"),
    "model/config.json": (lambda content: content + b" ", "has changed"),
    "model/tokenizer.json": (lambda content: content + b" ", "has changed"),
    "model/generation_config.json": (lambda content: None, "is gone"),
    "model/chat_template.jinja": (lambda content: b"{{ messages }}", "is new"),
}


def test_a_resume_on_other_inputs_is_refused_by_name_and_accepted_where_that_is_asked_for(own, tmp_path, capsys):
    train(config_file.load(overrides=own))
    run = tmp_path / "run"
    before = files_of(run)
    capsys.readouterr()  # the bars of a model that is loaded
    for name, (change, what) in CHANGES.items():
        file = tmp_path / name
        content = file.read_bytes() if file.exists() else None
        changed = change(content)
        file.unlink() if changed is None else file.write_bytes(changed)
        assert resume(own, "--steps", "2") == 2
        error = capsys.readouterr().err
        shown = str(file).removesuffix(".py")
        assert f"{shown} {what} since {run} began" in error and "--accept-changed-inputs" in error
        assert len(error.splitlines()) == 1 and files_of(run) == before
        file.unlink(missing_ok=True) if content is None else file.write_bytes(content)
    with (tmp_path / "problems.jsonl").open("a") as file:
        file.write((tmp_path / "problems.jsonl").read_text().splitlines()[0] + "\n")
    assert resume(own, "--steps", "2", "--accept-changed-inputs") == 0
    assert resume(own, "--steps", "3") == 0, "what was accepted is what the run reads from then on"
    assert json.loads((run / "inputs.json").read_text()) == inputs.of(config_file.load(run / "config.json"))


def test_a_run_without_inputs_or_without_its_start_model_goes_on_with_a_warning(own, tmp_path):
    train(config_file.load(overrides=own))
    run = tmp_path / "run"
    known = (run / "inputs.json").read_text()
    (run / "inputs.json").unlink()
    with pytest.warns(UserWarning, match="has no inputs.json") as given:
        train(config_file.load(overrides=own), resume=True)
    assert len(given) == 1 and (run / "inputs.json").read_text() == known

    shutil.move(tmp_path / "model", tmp_path / "elsewhere")
    with pytest.warns(UserWarning, match="the start model of .* is not at hand"):
        train(config_file.load(overrides=own), resume=True)
    assert (run / "inputs.json").read_text() == known
    shutil.move(tmp_path / "elsewhere", tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").write_bytes(b"other")
    with pytest.raises(ValueError, match=r"model.safetensors has changed"):
        train(config_file.load(overrides=own), resume=True)


@pytest.mark.parametrize("text", ["[]", "null", "3", "{", "[" * 100000, "{}", '{"model": []}', '{"the demo": {}}'])
def test_damaged_inputs_are_named(tmp_path, text):
    (tmp_path / "inputs.json").write_text(text)
    now = {"reward module": {}, "data": {}, "model": {}}
    with pytest.raises(ValueError, match=r"inputs.json: malformed: "):
        inputs.checked(now, tmp_path, accept_changed=False)


@pytest.mark.parametrize("new", [True, False])
def test_a_lock_that_is_a_folder_is_named(tmp_path, new):
    (tmp_path / "run" / runs.LOCK).mkdir(parents=True)
    with pytest.raises(ValueError, match=rf"run/{runs.LOCK}: Is a directory: needs a file"):
        with runs.claimed(tmp_path / "run", new=new):
            pass


@pytest.mark.parametrize("text", ["[]", "{"])
def test_damaged_settings_of_a_run_are_named(settings, tmp_path, text):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text(text)
    with pytest.raises(ValueError, match=r"run/config.json"):
        train(config_file.load(overrides=settings), resume=True)


def test_weights_are_known_by_their_size_header_and_ends_without_being_read(tmp_path):
    file = tmp_path / "model.safetensors"
    header = b"{" + b" " * (3 * inputs.END) + b"}"
    whole = len(header).to_bytes(8, "little") + header + bytes(3 * inputs.END)
    file.write_bytes(whole)
    seen = {inputs._weights(file)}
    for position in (9, 8 + 2 * inputs.END, -1, -inputs.END):
        file.write_bytes(flipped(position)(whole))
        seen.add(inputs._weights(file))
    file.write_bytes(whole + b"\0")
    assert len(seen | {inputs._weights(file)}) == 6
    for odd in (b"", b"123", b"\xff" * 8):
        file.write_bytes(odd)
        inputs._weights(file)
    with file.open("r+b") as large:  # 2 TB that take no room
        large.truncate(2**41)
        large.write((2).to_bytes(8, "little"))
    start = time.process_time()
    inputs._weights(file)
    assert time.process_time() - start < 1


def test_a_hub_model_is_known_by_its_commit_and_no_network_is_asked(own, model_folder, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    job = config_file.load(overrides={**own, "model": "someone/tiny", "rewards": ["model:someone/tiny"]})
    before = inputs.of(job)
    assert before["model"] == before["reward model"] == {}
    repository = tmp_path / "hub" / "models--someone--tiny"
    (repository / "refs").mkdir(parents=True)
    for commit in ("a" * 40, "b" * 40):
        shutil.copytree(model_folder, repository / "snapshots" / commit)
        (repository / "refs" / "main").write_text(commit)
        assert inputs.of(job)["model"] == {"someone/tiny": f"commit {commit}"}
    loaded = inputs.completed(before, job)  # which has brought it
    assert loaded == before | {kind: {"someone/tiny": f"commit {'b' * 40}"} for kind in ("model", "reward model")}
    known = before | {"model": {"someone/tiny": "commit then"}}
    assert inputs.completed(known, job)["model"] == known["model"]
    with runs.claimed(tmp_path / "run", new=True):
        then = inputs.of(job) | {"model": {"someone/tiny": f"commit {'a' * 40}"}}
        (tmp_path / "run" / "inputs.json").write_text(json.dumps(then))
    with pytest.raises(ValueError, match="model someone/tiny has changed"):
        inputs.checked(inputs.of(job), tmp_path / "run", accept_changed=False)


def test_reward_modules_count_wherever_they_are_found(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path / "lib")
    (tmp_path / "lib" / "package_of_judges").mkdir(parents=True)
    (tmp_path / "lib" / "package_of_judges" / "__init__.py").touch()
    (tmp_path / "lib" / "package_of_judges" / "mine.py").write_text(JUDGE)
    names = ["package_of_judges.mine:judge", "exact_answer", "redit_fast.training.builtin:correct_answer"]
    read = inputs.of(config_file.load(overrides={"rewards": names}))
    assert read["reward module"].keys() == {
        "package_of_judges", "package_of_judges.mine", "exact_answer", "redit_fast.training.rewards.answers",
        "redit_fast.training.builtin",
    }  # fmt: skip
    (tmp_path / "lib" / "package_of_judges" / "mine.py").write_text(JUDGE + "\n")
    again = inputs.of(config_file.load(overrides={"rewards": names}))
    differ = [name for name, digest in read["reward module"].items() if again["reward module"][name] != digest]
    assert differ == ["package_of_judges.mine"] and again["the demo"] == read["the demo"]


def test_what_a_reward_module_imports_from_its_folder_or_package_counts(tmp_path, monkeypatch):
    files = {
        "plain": "import json, torch, helper\ndef judge(prompts, completions, **columns):\n    import late\n",
        "helper": "from graders.deep import grade as g\n", "late": "", "unused": "",
        "graders/__init__": "from .base import *\n", "graders/base": "", "graders/unused": "",
        "graders/deep/__init__": "", "graders/deep/grade": "from .. import shared\nfrom ..other.one import x\n",
        "graders/shared": "import redit_fast\n", "graders/other/one": "import helper\n", "broken": "def",
    }  # fmt: skip
    for name, text in files.items():
        (tmp_path / f"{name}.py").parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / f"{name}.py").write_text(text)

    def read(*names):
        return inputs.of(config_file.load(overrides={"rewards": [f"{tmp_path}/{name}:judge" for name in names]}))

    graders = {"graders", "graders.base", "graders.deep", "graders.deep.grade", "graders.shared", "graders.other.one"}
    for name in ("plain", "graders.deep.grade"):
        before = read(name)["reward module"]
        expected = graders | {"helper"} | ({"plain", "late"} if name == "plain" else set())
        assert before.keys() == {f"{tmp_path}/{module}" for module in expected}
        for module in expected:
            file = module_file(tmp_path, module)
            text = file.read_text()
            file.write_text(text + "# other")
            after = read(name)["reward module"]
            assert [key for key in before if after[key] != before[key]] == [f"{tmp_path}/{module}"]
            file.write_text(text)
    assert read("broken")["reward module"].keys() == {f"{tmp_path}/broken"}
    monkeypatch.setattr(inputs, "INSTALLED", (str(tmp_path),))  # beside a judge are all packages there
    assert read("plain")["reward module"].keys() == {f"{tmp_path}/plain"}
    monkeypatch.chdir(tmp_path)
    found = inputs.of(config_file.load(overrides={"rewards": ["graders.deep.grade:judge"]}))
    assert found["reward module"].keys() == graders


@pytest.mark.parametrize(
    "name",
    ["additional_chat_templates/tools.jinja", "qwen.tiktoken", "tekken.json", "bpe.codes", "spm.vocab",
     "adapter_config.json"],
)  # fmt: skip
def test_every_file_that_a_tokenizer_or_an_adapter_is_read_from_counts(own, name):
    before = inputs.of(config_file.load(overrides=own))["model"]
    file = Path(own["model"], name)
    file.parent.mkdir(exist_ok=True)
    file.write_text("{}")
    assert inputs.of(config_file.load(overrides=own))["model"].keys() - before.keys() == {str(file)}


BEST_AT_1 = """
evaluations = []
def judge(prompts, completions, **columns):
    if len(prompts) != 5:
        return [float(len(c) % 3) for c in completions]
    evaluations.append(1)
    return [float(len(evaluations) == 2)] * 5
"""


def test_the_newest_checkpoints_stay_with_the_start_and_the_best(settings, tmp_path):
    (tmp_path / "best.py").write_text(BEST_AT_1)
    job = {**settings, "rewards": [f"{tmp_path}/best:judge"], "keep_checkpoints": 2, "eval_every": 1, "steps": 5}
    train(config_file.load(overrides=job))
    run = tmp_path / "run"
    accuracy = [line["accuracy/held_out"] for line in lines_of(run / "metrics.jsonl")]
    assert accuracy == [0, 1, 0, 0, 0, 0] and steps_kept(run) == [0, 1, 4, 5]

    weights = run / "checkpoints" / "step-000005" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.warns(UserWarning, match="step-000005 is damaged"):
        train(config_file.load(overrides={**job, "steps": 6}), resume=True)
    assert steps_kept(run) == [0, 1, 5, 6] and checkpoint.newest(run / "checkpoints").name == "step-000006"


def test_no_checkpoint_goes_before_a_newer_one_is_published(settings, tmp_path, monkeypatch):
    job, run = {**settings, "keep_checkpoints": 2, "eval_problems": 0, "steps": 3}, tmp_path / "run"
    train(config_file.load(overrides=job))
    assert steps_kept(run) == [0, 2, 3]

    def full_disk(draft):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "publish", full_disk)
        assert resume(job, "--steps", "4") == 2
    assert steps_kept(run) == [0, 2, 3]
    with monkeypatch.context() as patch:  # killed while it removes
        patch.setattr(shutil, "rmtree", lambda *_, **__: None)
        assert resume(job, "--steps", "5", "--checkpoint-every", "5") == 0
    assert steps_kept(run) == [0, 3, 5]
    train(config_file.load(overrides={**job, "steps": 5, "checkpoint_every": 5}), resume=True)
    assert len(list((run / "checkpoints").iterdir())) == 3


def test_all_checkpoints_stay_with_none_and_in_a_run_of_before(settings, tmp_path):
    job, run = {**settings, "eval_problems": 0, "steps": 5}, tmp_path / "run"
    train(config_file.load(overrides={**job, "keep_checkpoints": None}))
    assert steps_kept(run) == [0, 1, 2, 3, 4, 5]
    stored = json.loads((run / "config.json").read_text())
    del stored["keep_checkpoints"]
    (run / "config.json").write_text(json.dumps(stored))
    assert resume(job, "--steps", "6") == 0 and steps_kept(run) == [0, 1, 2, 3, 4, 5, 6]
    assert resume(job, "--steps", "7", "--keep-checkpoints", "2") == 0 and steps_kept(run) == [0, 6, 7]


def test_a_run_that_goes_on_has_no_summary_until_it_ends(settings, tmp_path):
    train(config_file.load(overrides={**settings, "steps": 1}))
    assert (tmp_path / "run" / "summary.json").exists()
    job = config_file.load(overrides={**settings, "steps": 2})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint, "publish", lambda draft: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            train(job, resume=True)
    assert not (tmp_path / "run" / "summary.json").exists()
    assert train(job, resume=True)["steps"] == 2


def test_a_disk_without_room_at_the_start_is_named_with_the_lock(tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, hard))
    try:
        with pytest.raises(OSError, match="/run/.lock: File too large$"), runs.claimed(tmp_path / "run", new=True):
            pass
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
