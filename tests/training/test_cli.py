"""The command line: flags, exit codes, and one line on stderr for bad input."""

import json
import os
import pty
import re
import subprocess
import sys
import textwrap

import pytest

import redit_fast
from redit_fast import cli, commands
from redit_fast.training import config, config_file
from tests import ROOT

PINNED = """--config --model --data --rewards --reward-weights --name --out-dir --seed --steps --warm-start-steps
--eval-problems --prompts-per-step --group-size --max-completion-length --learning-rate --dither-level
--dither-dead-groups --gr-gamma --gr-epsilon --clip-low --clip-high --checkpoint-every --keep-checkpoints
--resume --long-prompts --print-config""".split()


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(capsys, *words):
    """(exit code, stdout, stderr) of the command in this process."""
    try:
        code = cli.main(words)
    except SystemExit as exit:  # argparse
        code = exit.code
    out = capsys.readouterr()
    return code, out.out, out.err


def test_help_lists_every_pinned_flag_and_every_field(capsys):
    code, out, _ = run(capsys, "train", "--help")
    assert code == 0
    flags = set(out.replace(",", " ").split())
    assert flags >= set(PINNED)
    assert flags >= {"--" + name.replace("_", "-") for name in config.TrainConfig.model_fields}
    assert {"--no-gr-normalized"} <= flags and "--dry-run" in flags


def test_flags_override_the_file_and_print_config_shows_the_result(capsys, tmp_path):
    (tmp_path / "c.yaml").write_text("steps: 5\nseed: 1\ngr_normalized: true\nmax_grad_norm: 2.0\n")
    words = ["--steps", "7", "--reward-weights", "1", "-0.5", "2", "--no-gr-normalized", "--max-grad-norm", "none"]
    code, out, err = run(capsys, "train", "--config", "c.yaml", *words, "--learning-rate", "1e-5", "--print-config")
    assert (code, err) == (0, "")
    (tmp_path / "printed.yaml").write_text(out)
    loaded = config_file.load("printed.yaml")
    assert (loaded.steps, loaded.seed, loaded.gr_normalized, loaded.max_grad_norm) == (7, 1, False, None)
    assert loaded.reward_weights == [1.0, -0.5, 2.0] and loaded.learning_rate == 1e-5
    assert not (tmp_path / "runs").exists()


def test_print_config_needs_neither_rewards_nor_data(capsys, tmp_path):
    for words, missing in (
        ([], {"data", "rewards"}),
        (["--reward-weights", "1", "2"], {"data", "rewards"}),
        (["--rewards", "exact_answer"], {"data"}),
        (["--data", "d.jsonl"], {"rewards"}),
        (["--data", "d.jsonl", "--rewards", "exact_answer"], set()),
    ):
        code, out, err = run(capsys, "train", "--model", "m", *words, "--steps", "7", "--print-config")
        assert (code, err) == (0, "")
        lines = out.splitlines()
        assert {name for name in config.TrainConfig.model_fields if f"# {name}:" in lines} == missing
        filled = out.replace("# data:\n", "data: d.jsonl\n")
        filled = filled.replace("# rewards:\n", "rewards: [exact_answer, xml_format]\n")
        (tmp_path / "printed.yaml").write_text(filled)
        loaded = config_file.load("printed.yaml")
        assert (loaded.model, loaded.data, loaded.steps, loaded.rewards[0]) == ("m", "d.jsonl", 7, "exact_answer")
    with pytest.raises(ValueError, match="rewards: training a model of your own needs at least one reward function"):
        config_file.load(None, {"model": "m"})


def test_the_old_name_of_a_flag_is_taken_and_answered_with_the_new_one(capsys, tmp_path):
    program = """
    from redit_fast.cli import main
    main(["train", "--gamma", "0", "--pass2-ratio", "pass1", "--dead-groups", "skip", "--print-config"])
    """
    done = command("-c", textwrap.dedent(program))
    assert done.stderr.splitlines() == [
        "warning: gamma is called gr_gamma now",
        "warning: pass2_ratio is called gr_pass2_ratio now",
        "warning: dead_groups is called dither_dead_groups now",
    ]
    for line in ("gr_gamma: 0.0", "gr_pass2_ratio: pass1", "dither_dead_groups: skip"):
        assert f"\n{line}\n" in done.stdout
    assert "--gamma" not in run(capsys, "train", "--help")[1]


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["train", "--stepz", "3"], "unknown flag --stepz, the closest valid one is --steps"),
        (["train", "--learning_rate=1"], "unknown flag --learning_rate, the closest valid one is --learning-rate"),
        (["train", "--dead-group", "skip"], "unknown flag --dead-group, the closest valid one is --dither-dead-groups"),
        (["train", "--lr", "1e-5"], "unknown flag --lr, it is --learning-rate here"),
        (["train", "--num_generations=8"], "unknown flag --num_generations, it is --group-size here"),
        (["train", "--lora"], "unknown flag --lora: adapters are --lora-rank, --lora-alpha and --lora-targets"),
        (
            ["train", "--epsilon", "0.2"],
            "unknown flag --epsilon: GR's step is --gr-epsilon, a clip range is --clip-low and --clip-high",
        ),
        (
            ["train", "--vllm-mode", "colocate"],
            "unknown flag --vllm-mode: completions come from --rollout, a vLLM server",
        ),
        (["train", "--gama", "1"], "unknown flag --gama, the closest valid one is --gr-gamma"),
        (
            ["train", "--gr-epsilon", "auot"],
            "gr_epsilon: got 'auot', needs a number or 'auto'",
        ),
        (["train", "--gamma", "0", "--gr-gamma", "1"], "gamma is another name of gr_gamma, which is set too"),
        (["train", "--gamma", "-1"], "gr_gamma: got '-1', needs a number greater than or equal to 0"),
        (["train", "--model", "m", "--steps", "x", "--print-config"], "steps: got 'x', needs an integer"),
        (["train", "--steps", "many"], "steps: got 'many', needs an integer"),
        (["train", "--steps", "-3"], "steps: got '-3', needs a number greater than or equal to 1"),
        (["train", "--steps"], "argument --steps: expected one argument"),
        (["train", "--rewards"], "argument --rewards: expected at least one argument"),
        (
            ["train", "--rewards", "xml_format", "--seed", "1", "--rewards", "exact_answer"],
            "--rewards is there twice: write all of its values after one",
        ),
        (["train", "--reward-weights=1", "--reward-weights=1"], "--reward-weights is there twice"),
        (["train", "--gr-normalized=yes"], "ignored explicit argument 'yes'"),
        (["train", "--long-prompts", "cut"], "long_prompts: got 'cut', needs 'error' or 'skip'"),
        (["train", "--name", "a/b"], "name: got 'a/b', needs one printable path component"),
        (["train", "--config", "nowhere.yaml"], "config nowhere.yaml: No such file"),
        (["train", "--config", "bad.yaml"], "bad.yaml:2: unknown key 'stepz', the closest valid one is 'steps'"),
        (["train", "--data", "d.jsonl"], "data: the embedded demo has its own"),
        (["train", "--model", "m"], "rewards: training a model of your own needs at least one reward function"),
        (["train", "--resume"], "--resume needs --name"),
        (["train", "--accept-changed-inputs"], "--accept-changed-inputs needs --resume"),
        (["train", "--resume", "--name", "x", "--dry-run"], "--dry-run is of a run that begins, --resume goes on"),
        (["generate", "m", "--dry-run"], "unknown flag --dry-run: it is a flag of redit-fast train"),
        (["train", "--keep-checkpoints", "1"], "keep_checkpoints: got '1', needs a number greater than or equal to 2"),
        (["train", "now"], "unexpected argument 'now'"),
        (["trian"], "invalid choice: 'trian'"),
        (["--verbose"], "unknown flag --verbose, the closest valid one is --version"),
        (["report"], "the following arguments are required: RUN"),
        (["report", "nowhere"], "nowhere holds no run"),
        (["report", ""], "argument RUN: is empty, needs a path"),
        (["merge", ""], "argument CHECKPOINT: is empty, needs a path"),
        (["generate", ""], "argument CHECKPOINT: is empty, needs a path"),
        (["eval", ""], "argument CHECKPOINT: is empty, needs a path"),
        (["sample", ""], "argument CHECKPOINT: is empty, needs a path"),
        (["plot", ""], "argument RUN: is empty, needs a path"),
        (["to-verl", ""], "argument CONFIG: is empty, needs a path"),
        (["train", "--config", ""], "argument --config: is empty, needs a path"),
        (["info", "--all"], "unknown flag --all, the closest valid one is"),
        (["info", "--lr"], "unknown flag --lr, the closest valid one is --help"),
        (["doctor", "--jsn"], "unknown flag --jsn, the closest valid one is --json"),
        (["example"], "the following arguments are required: NAME"),
        (["example", "word_problem"], "no example is named 'word_problem'; there is word_problems"),
        (["example", "../cli"], "no example is named '../cli'; there is word_problems"),
    ],
)
@pytest.mark.draws
def test_bad_input_gets_one_line_and_exit_code_2(capsys, recwarn, tmp_path, words, line):
    (tmp_path / "bad.yaml").write_text("seed: 1\nstepz: 3\n")
    code, out, err = run(capsys, *words)
    assert (code, out) == (2, "")
    assert line in err and not recwarn
    assert err.startswith("redit-fast: ") and err.count("\n") == 1


def test_an_error_of_many_lines_is_printed_as_one(capsys):
    cli._complain("no such model\n\n  look here\n")
    assert capsys.readouterr().err == "redit-fast: no such model look here\n"


def test_without_a_command_it_prints_its_help(capsys):
    code, out, err = run(capsys)
    assert (code, err) == (0, "") and "train" in out and "report" in out and "info" in out


def test_version(capsys):
    assert run(capsys, "--version") == (0, f"redit-fast {redit_fast.__version__}\n", "")


def test_an_example_is_written_once_and_never_over_a_file(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = ["word_problems.jsonl", "word_problems.yaml"]
    (tmp_path / names[1]).write_text("mine")
    assert run(capsys, "example", "word_problems") == (
        2,
        "",
        f"redit-fast: {names[1]} is there already and stays as it is\n",
    )
    assert [path.name for path in tmp_path.iterdir()] == [names[1]] and (tmp_path / names[1]).read_text() == "mine"
    (tmp_path / names[1]).unlink()
    assert run(capsys, "example", "word_problems") == (0, "\n".join(names) + "\n", "")
    for name in names:
        assert (tmp_path / name).read_bytes() == (ROOT / "examples" / name).read_bytes()


@pytest.mark.draws
def test_report_redraws_a_run(capsys, tmp_path):
    (tmp_path / "r").mkdir()
    (tmp_path / "r" / "config.json").write_text(config_file.load().model_dump_json())
    (tmp_path / "r" / "metrics.jsonl").write_text(json.dumps({"schema": 1, "step": 0, "grad_norm": 1.0}) + "\n")
    assert run(capsys, "report", "r")[0] == 0
    assert {path.name for path in (tmp_path / "r").iterdir()} >= {"curves.png", "report.html"}


def command(*words, **environment):
    """The command in a process of its own, PYTHONPATH at the repository."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    return subprocess.run([sys.executable, *words], env=environment, capture_output=True, text=True, timeout=120)


def test_the_module_is_the_command():
    done = command("-m", "redit_fast", "train", "--steps", "x")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "redit-fast: steps: got 'x', needs an integer\n"


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="torch has GNU OpenMP on Linux")
@pytest.mark.parametrize(
    ("given", "policy", "spins"),
    [({}, "PASSIVE", "3000"), ({"OMP_WAIT_POLICY": "active"}, "ACTIVE", "30000000000"),
     ({"GOMP_SPINCOUNT": "7"}, "PASSIVE", "7")],
)  # fmt: skip
def test_the_threads_of_the_command_spin_little_unless_the_user_says_otherwise(monkeypatch, given, policy, spins):
    for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT"):
        monkeypatch.delenv(name, raising=False)
    said = command("-m", "redit_fast", "info", OMP_DISPLAY_ENV="verbose", **given).stderr
    assert f"OMP_WAIT_POLICY = '{policy}'" in said
    assert f"GOMP_SPINCOUNT = '{spins}'" in said


def test_a_terminal_shows_the_demo_and_no_warning_of_a_dependency(tmp_path):
    few = {"warm-start-steps": 2, "steps": 2, "eval-problems": 8, "out-dir": tmp_path}
    words = [word for name, value in few.items() for word in (f"--{name}", str(value))]
    terminal, end = pty.openpty()
    process = subprocess.Popen([sys.executable, "-m", "redit_fast", "train", *words], cwd=ROOT, stdout=end, stderr=end)
    os.close(end)
    shown = b""
    while part := read(terminal):
        shown += part
    assert process.wait() == 0, shown.decode()
    text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", shown.decode())
    assert "warm start" in text and "GRPO" in text and "report.html" in text
    assert not re.search("warning|deprecat", text, re.I), text


def read(terminal):
    try:
        return os.read(terminal, 1 << 16)
    except OSError:  # on Linux, of a terminal whose other end is closed
        return b""


@pytest.mark.parametrize("word", ["--help", "--version"])
def test_help_and_version_answer_without_loading_torch(word):
    program = f"""
    import sys
    from redit_fast.cli import main
    try:
        code = main(["{word}"])
    except SystemExit as exit:
        code = exit.code
    print(code, sorted({{"torch", "pydantic", "matplotlib", "transformers"}} & set(sys.modules)), file=sys.stderr)
    """
    assert command("-c", textwrap.dedent(program)).stderr == "0 []\n"


@pytest.mark.parametrize(("words", "line"), [(["saved; go on with ..."], "saved; go on with ...\n"), ([], "stopped\n")])
def test_ctrl_c_ends_with_130_and_the_trainers_words_or_one_of_our_own(capsys, monkeypatch, words, line):
    def interrupted(args):
        raise KeyboardInterrupt(*words)

    monkeypatch.setattr(commands, "train", interrupted)
    assert run(capsys, "train") == (130, "", line)


def test_a_warning_is_one_line_without_file_and_source():
    program = """
    import sys, warnings
    from redit_fast import cli, commands
    def warns(args):
        warnings.warn("a reward\\nwas None", stacklevel=1)
    commands.train = warns
    sys.exit(cli.main(["train"]))
    """
    done = command("-c", textwrap.dedent(program))
    assert (done.returncode, done.stderr) == (0, "warning: a reward was None\n")
