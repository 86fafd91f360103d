"""`redit-fast plot`: which runs are one curve, where its mean and its band are, the labels, and what bad input gets."""

import json

import matplotlib.image
import pytest

from redit_fast.cli import main
from redit_fast.training import config_file
from redit_fast.training.report import overlay

OWN = {"model": "gpt2", "data": "d.jsonl", "rewards": ["exact_answer"], "steps": 8}


def a_run(folder, value=0.0, steps=4, more="", **settings):
    """A run whose reward is `value` more than its step."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(config_file.load(None, {**OWN, **settings}).model_dump_json())
    rows = [{"schema": 2, "step": 0, "accuracy/held_out": 0.25, "step_time": 5.0}]
    rows += [
        {"schema": 2, "step": step, "reward": value + step, "num_tokens": 100 * step, "step_time": 60.0}
        for step in range(1, steps + 1)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + more)
    return folder


def drawn(runs, metric="reward", across="steps"):
    """The groups, and the curves of each."""
    read = [overlay._read(run) for run in runs]
    _, size = overlay._unit(read, across)
    return [(group, overlay._curves(group, metric, across, size)) for group in overlay._groups(read)]


@pytest.fixture
def runs(tmp_path):
    """Three seeds of one configuration, and one of another."""
    seeds = [a_run(tmp_path / f"dither-{seed}", value, seed=seed, name=f"dither-{seed}")
             for seed, value in enumerate((0.0, 1.0, 5.0))]  # fmt: skip
    return [*seeds, a_run(tmp_path / "none", 2.0, dither_level=0.0, name="none", out_dir="elsewhere")]


def test_runs_that_differ_in_their_seed_are_one_curve_with_a_band(runs):
    (seeds, (*thin, mean)), (alone, (only,)) = drawn(runs)
    assert (seeds.label, alone.label) == ("dither_level 0.05 (3 runs)", "dither_level 0.0")
    assert mean.steps == [1, 2, 3, 4] and mean.values == [3, 4, 5, 6]
    assert mean.low == [1, 2, 3, 4] and mean.high == [6, 7, 8, 9]
    assert [curve.values for curve in thin] == [[1, 2, 3, 4], [2, 3, 4, 5], [6, 7, 8, 9]]
    assert all(curve.thin and not curve.low for curve in thin) and not mean.thin
    assert only.values == [3, 4, 5, 6] and not only.low and not only.thin
    assert seeds.colour != alone.colour


def test_a_mean_is_of_what_all_its_runs_have_gone_through(tmp_path):
    """The last line of one is cut off."""
    long = a_run(tmp_path / "long", steps=6, seed=1)
    short = a_run(tmp_path / "short", 2.0, steps=3, more='{"schema": 2, "step": 4, "rew', seed=2)
    ((_, (first, second, mean)),) = drawn([long, short])
    assert mean.steps == [1, 2, 3] and mean.values == [2, 3, 4]
    assert first.steps == [1, 2, 3, 4, 5, 6] and second.steps == [1, 2, 3]


def test_time_and_tokens_are_across_and_what_lies_between_two_lines_is_on_their_join(tmp_path):
    slow, fast = a_run(tmp_path / "slow", seed=1), a_run(tmp_path / "fast", seed=2)
    rows = [json.loads(line) for line in (fast / "metrics.jsonl").read_text().splitlines()]
    for row in rows:
        row["step_time"] /= 2
    (fast / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    ((_, (first, second, mean)),) = drawn([slow, fast], across="time")
    assert first.steps == [65, 125, 185, 245] and second.steps == [32.5, 62.5, 92.5, 122.5]
    assert mean.steps == [65, 92.5, 122.5]
    assert mean.values[0] == pytest.approx((1 + 2 + 2.5 / 30) / 2)
    ((_, (first, *_)),) = drawn([slow, fast], across="tokens")
    assert first.steps == [100, 200, 300, 400]
    assert overlay._unit([overlay._read(slow)], "time") == ("seconds", 1.0)
    for name, settings in (("minutes", 400), ("hours", 40_000)):
        run = a_run(tmp_path / name, steps=1)
        with (run / "metrics.jsonl").open("a") as more:
            more.write(json.dumps({"schema": 2, "step": 2, "step_time": settings, "reward": 1}) + "\n")
        assert overlay._unit([overlay._read(run)], "time")[0] == name


def test_a_long_curve_has_the_means_of_stretches(tmp_path):
    ((_, (curve,)),) = drawn([a_run(tmp_path / "long", steps=250)])
    assert len(curve.steps) == 84 and curve.values[0] == 2 == curve.steps[0]


def test_labels_are_what_differs_or_names(tmp_path):
    def labels(*settings):
        runs = [a_run(tmp_path / f"{len(list(tmp_path.iterdir()))}", **each) for each in settings]
        return [group.label for group in overlay._groups([overlay._read(run) for run in runs])]

    assert labels({"gr_gamma": 0.0}, {"gr_gamma": 0.1, "beta": 0.2}) == [
        "gr_gamma 0.0, beta 0.0",
        "gr_gamma 0.1, beta 0.2",
    ]
    assert labels({}) == ["2"]
    many = {"gr_gamma": 0.1, "beta": 0.2, "learning_rate": 1.0, "top_p": 0.5}
    assert labels({}, many) == ["3", "4"]
    long = [{"data": f"{'x' * 50}/{name}.jsonl"} for name in "ab"]
    assert [label[-10:] for label in labels(*long)] == ["xx/a.jsonl", "xx/b.jsonl"]
    assert len(labels(*long)[0]) < 50
    assert labels({"data": f"a{'x' * 50}"}, {"data": f"b{'x' * 50}"}) == [str(tmp_path / "9"), str(tmp_path / "10")]


@pytest.mark.parametrize("name", ["all.png", "all.svg", "all.pdf"])
def test_the_picture_is_written_and_drawn_again(runs, tmp_path, capsys, name):
    out = tmp_path / name
    out.write_text("before")
    words = ["plot", *map(str, runs), "--out", str(out), "--x", "tokens"]
    assert main(words) == 0 and capsys.readouterr().out == f"{out}\n"
    assert out.read_bytes()[:4] in (b"\x89PNG", b"<?xm", b"%PDF") and not list(tmp_path.glob(".all*"))
    if name.endswith("png"):
        wide = matplotlib.image.imread(out).shape
        assert main([*words, "--metric", "reward"]) == 0
        assert matplotlib.image.imread(out).shape[1] < wide[1]  # one panel, not two


def test_a_run_given_twice_counts_once(runs, tmp_path, monkeypatch):
    figure, seen = overlay._figure, []
    monkeypatch.setattr(
        overlay, "_figure", lambda panels, groups, unit: seen.append(groups) or figure(panels, groups, unit)
    )
    overlay.write([runs[0], f"{runs[0]}/", runs[1]], tmp_path / "once.svg")
    assert [[run.folder.name for run in group.runs] for (group,) in seen] == [["dither-0", "dither-1"]]


@pytest.mark.parametrize("ending", ["png", "svg", "pdf"])
def test_half_a_surrogate_pair_in_a_label_is_drawn_as_an_escape(tmp_path, ending):
    runs = [a_run(tmp_path / name) for name in "ab"]
    settings = json.loads((runs[0] / "config.json").read_text())
    (runs[0] / "config.json").write_text(json.dumps({**settings, "model": "\ud800"}))
    assert [group.label for group, _ in drawn(runs)] == ["model \\ud800", "model gpt2"]
    assert overlay.write(runs, tmp_path / f"plot.{ending}").stat().st_size > 0


def test_bad_input_is_one_sentence_and_writes_nothing(runs, tmp_path, capsys):
    empty = a_run(tmp_path / "empty", steps=0)
    (empty / "metrics.jsonl").write_text('{"schema": 2, "st')
    (tmp_path / "other").mkdir()
    without = a_run(tmp_path / "without", steps=0)
    (without / "metrics.jsonl").write_text('{"schema": 2, "step": 0, "loss": 1.0, "reward": null}\n')
    broken = a_run(tmp_path / "broken", more="{\n")
    deep = a_run(tmp_path / "deep", more="[" * 100000 + "\n")
    huge = a_run(tmp_path / "huge", more=f'{{"step": {"9" * 400}}}\n')
    many = [a_run(tmp_path / f"many-{i}", dither_level=i / 20) for i in range(11)]
    before = sorted(path.name for path in tmp_path.iterdir())
    one = str(runs[0])
    for words, sentence in (
        ([], "the following arguments are required: RUN"),
        (["nowhere"], "nowhere holds no run: it has no config.json"),
        ([one, str(tmp_path / "other")], "other holds no run: it has no config.json"),
        ([one, str(empty)], "empty has no whole line in metrics.jsonl yet"),
        ([str(broken)], "metrics.jsonl:6: malformed line"),
        ([str(deep)], "metrics.jsonl:6: malformed line: maximum recursion depth"),
        ([str(huge)], "metrics.jsonl:6: malformed line: a whole number of 400 characters is beyond"),
        ([one, str(without)], "not all runs have reward or accuracy/held_out; in common they have none"),
        ([str(without)], "not all runs have reward or accuracy/held_out; in common they have loss"),
        ([one, str(without), "--metric", "reward"], "--metric reward: "),
        ([one, "--metric", "rewrd"], f"--metric rewrd: {one} has no number of it, the closest is 'reward'"),
        ([one, "--metric", "reward", "--metric", "loss"], "--metric is there twice: write all of its values after one"),
        ([one, "--x", "epochs"], "argument --x: invalid choice: 'epochs'"),
        ([str(without), "--x", "tokens", "--metric", "loss"], "--x tokens: "),
        ([one, "--out", ""], "--out is empty, needs a name"),
        ([one, "--out", "picture.txt"], "--out is 'picture.txt', needs a name that ends in .pdf, .png, .svg"),
        ([one, "--out", "no/such/folder.png"], "--out no/such/folder.png: No such file or directory: needs a file"),
        ([one, "--out", f"{one}/config.json/x.png"], "Not a directory: needs a file in a folder that is there"),
        (list(map(str, many)), "the runs have 11 different settings, a picture shows 10 at most"),
    ):
        try:
            code = main(["plot", *words])
        except SystemExit as exit:  # argparse
            code = exit.code
        said = capsys.readouterr()
        assert (code, said.out) == (2, "") and sentence in said.err.splitlines()[-1], (words, said.err)
        assert said.err.startswith("redit-fast: ") and said.err.count("\n") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == before
