"""curves.png and report.html from the files of a run: whole, cut off, empty or hostile."""

import json
import math
import re
from html.parser import HTMLParser

import matplotlib.image
import pytest

from redit_fast.training import config, report
from redit_fast.training.report import curves
from redit_fast.training.report.summary import closing_rows, environment

PHASES = {"rollout": 2.0, "reward": 0.5, "pass1": 3.0, "pass2": 3.0, "optimizer": 0.5, "eval": 1.0}


def metrics(steps):
    """The line before the first step, then those of the steps 1 to `steps`."""
    yield {
        "schema": 2,
        "step": 0,
        "accuracy/held_out": 0.0,
        "time/warm_start": 30.0,
        "time/other": 0.0,
        "step_time": 30.0,
    }
    for step in range(1, steps + 1):
        row = {
            "schema": 2,
            "step": step,
            "reward": 0.5 + step / steps,
            "reward_std": 0.3,
            "reward/dithered_mean": None if step == 3 else 0.51 + step / steps,
            "reward/dithered_std": 0.31,
            "accuracy/train": step / steps,
            "frac_reward_zero_std": 0.25,
            "grad_norm": 1.5 + math.sin(step),
            "gr/step_cos": 0.999,
            "completions/mean_length": 20 + step,
            **{f"time/{phase}": seconds for phase, seconds in PHASES.items()},
            "step_time": 10.0,
        }
        if step % 5 == 0:
            row["accuracy/held_out"] = step / steps
        yield row


def completions(step):
    for sample, value in enumerate((0.5, 1.0, 0.0, None)):
        yield {
            "schema": 2,
            "step": step,
            "sample": sample,
            "prompt": f"prompt {sample}",
            "completion": f"completion {sample} of step {step}",
            "rewards": {"exact_answer": value, "xml_format": 0.25},
            "advantage": None if value is None else value - 0.5,
        }


SUMMARY = {
    "schema": 2,
    "accuracy_before": 0.312,
    "accuracy_after": 0.948,
    "eval_problems": 500,
    "steps": 12,
    "tokens_generated": 72123,
    "tokens_per_second": 20123.4,
    "seconds": 101.3,
    "time": {"warm_start": 60.0, "rollout": 20.0, "pass 1": 20.0},
    "commit": "0123abc",
    "versions": {"redit-fast": "9.9.9", "torch": "8.8.8"},
}


@pytest.fixture
def run(tmp_path):
    """A finished run of 12 steps with a model of the user's own."""
    folder = tmp_path / "my run"
    folder.mkdir()
    own = {"model": "gpt2", "data": "d.jsonl", "rewards": ["exact_answer", "xml_format"], "steps": 12, "seed": 3}
    (folder / "config.json").write_text(config.load(None, own).model_dump_json())
    write(folder / "metrics.jsonl", metrics(12))
    write(folder / "completions.jsonl", [*completions(1), *completions(12)])
    (folder / "summary.json").write_text(json.dumps(SUMMARY))
    return folder


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


class Page(HTMLParser):
    """The text and the tags of a page; every tag closed, nothing loaded from elsewhere."""

    def __init__(self, text):
        super().__init__()
        self.text, self.open, self.tags, self.links = "", [], [], []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.links += [value for name, value in attributes if name in ("src", "href", "srcset", "data")]
        if tag not in ("meta", "img", "br", "wbr"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open:
            self.text += data + "\n"


def read(run):
    return Page((run / "report.html").read_text("utf-8"))


def test_a_finished_run_has_a_picture_and_a_page_that_stands_alone(run):
    report.write(run)
    picture = matplotlib.image.imread(run / "curves.png")
    assert picture.shape[1] > picture.shape[0] > 600
    assert len({tuple(pixel) for pixel in picture[::7, ::7].reshape(-1, picture.shape[2])}) > 20
    page = read(run)
    assert len(page.links) == 1 and page.links[0].startswith("data:image/png;base64,")
    assert "script" not in page.tags and "link" not in page.tags and "@import" not in (run / "report.html").read_text()
    for expected in (
        "my run",
        "gpt2 on d.jsonl: 12 of 12 steps",
        "31.2%",
        "94.8%",
        "+63.6 points",
        "72,123 (20,123/s of rollout)",
        "1 min 41 s",
        "warm start 1 min 0 s (60%)",
        "redit-fast 9.9.9, torch 8.8.8",
        "commit 0123abc",
        "learning_rate",
    ):
        assert expected in page.text, expected
    assert "@media print" in (run / "report.html").read_text()
    assert not list(run.glob(".*"))


def test_the_rerun_command_gives_the_same_config(run):
    import shlex

    from redit_fast import cli

    report.write(run)
    command = re.search(r"redit-fast train .*", read(run).text)[0]
    parser = cli._Parser()
    cli._add_train_flags(parser)
    again = config.load(None, cli.settings(parser.parse_args(shlex.split(command)[2:])))
    assert again == config.load(run / "config.json").model_copy(update={"name": "my run-again"})


def test_best_and_worst_completion_of_the_last_step_are_shown_by_weighted_reward(run):
    report.write(run)
    page = read(run)
    shown = re.findall(r"completion \d of step \d+", page.text)
    assert shown == ["completion 1 of step 12", "completion 2 of step 12"]
    assert "exact_answer 1, xml_format 0.25 · advantage 0.5" in page.text
    negative = config.load(run / "config.json", {"reward_weights": [-1, 1]})
    (run / "config.json").write_text(negative.model_dump_json())
    write(run / "completions.jsonl", list(completions(4))[:2])
    report.write(run)
    shown = re.findall(r"completion \d of step \d+", read(run).text)
    assert shown == ["completion 0 of step 4", "completion 1 of step 4"]


def test_an_unscored_reward_says_so(run):
    write(run / "completions.jsonl", list(completions(2))[3:])
    report.write(run)
    assert "exact_answer unscored, xml_format 0.25 · advantage unscored" in read(run).text


def test_a_run_of_schema_1_has_the_same_report(run):
    pages = []
    names = {new: old for old, new in report.OF_SCHEMA_1.items()}
    for lines in (metrics(12), [{names.get(key, key): row[key] for key in row} | {"schema": 1} for row in metrics(12)]):
        write(run / "metrics.jsonl", lines)
        report.write(run)
        pages.append((run / "report.html").read_text() + (run / "curves.png").read_bytes().hex())
    assert "reward/raw_mean" in (run / "metrics.jsonl").read_text() and pages[0] == pages[1]
    assert report.metrics_of(run) == list(metrics(12))


def test_a_killed_run_has_a_report_without_its_half_line(run):
    (run / "summary.json").unlink()
    with open(run / "metrics.jsonl", "a") as file:
        file.write('{"schema": 2, "step": 13, "reward/ra')
    with open(run / "completions.jsonl", "a") as file:
        file.write('{"schema": 2, "step": 13}')  # whole, but without its line end
    report.write(run)
    page = read(run)
    assert "it has not ended" in page.text
    assert "12 of 12 steps" in page.text and "of step 12" in page.text
    assert "Where the time went: 2 min 30 s" in page.text and "pass1 36.0 s (24%)" in page.text
    assert page.text.index("pass1 36.0 s") < page.text.index("warm start 30.0 s (20%)") < page.text.index("other 0.0 s")
    assert "(where this report was made)" in page.text


@pytest.mark.parametrize("damage", ["empty", "missing", "one", "bare"])
def test_a_run_that_has_hardly_begun_has_a_report(run, damage):
    for name in ("metrics.jsonl", "completions.jsonl"):
        (run / name).unlink()
        if damage == "empty":
            (run / name).write_text("")
    if damage == "one":
        write(run / "metrics.jsonl", metrics(0))
    if damage == "bare":
        write(run / "metrics.jsonl", [{"schema": 2, "step": 0}, {"schema": 2, "step": 1, "grad_norm": None}])
    (run / "summary.json").unlink()
    report.write(run)
    steps = {"empty": 0, "missing": 0, "one": 0, "bare": 1}[damage]
    assert f"{steps} of 12 steps" in read(run).text
    assert matplotlib.image.imread(run / "curves.png").shape[0] > 600


def test_a_damaged_line_in_the_middle_is_named(run):
    lines = (run / "metrics.jsonl").read_text().splitlines()
    (run / "metrics.jsonl").write_text("\n".join([*lines[:4], lines[4][:30], *lines[5:]]) + "\n")
    with pytest.raises(ValueError, match=r"metrics.jsonl:5: malformed line"):
        report.write(run)


@pytest.mark.parametrize("line", ["[]", "{}", "null", '{"step": "1"}', '{"step": true}'])
@pytest.mark.parametrize("name", ["metrics.jsonl", "completions.jsonl"])
def test_a_line_that_is_of_no_step_is_named(run, name, line):
    (run / name).write_text(line + "\n")
    with pytest.raises(ValueError, match=rf"{name}:1: malformed line: needs an object with the number of its step"):
        report.write(run)


@pytest.mark.parametrize("text", ["[]", "null", "{"])
def test_a_damaged_summary_is_named(run, text):
    (run / "summary.json").write_text(text)
    with pytest.raises(ValueError, match=r"summary.json: malformed"):
        report.write(run)


def test_a_folder_without_a_run_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"nothing here holds no run: it has no config.json"):
        report.write(tmp_path / "nothing here")


EVIL = "</pre><script>alert(1)</script><img src=x onerror=alert(2)>&amp;\"'"


def test_every_text_is_escaped(run):
    settings = {"model": EVIL, "data": EVIL, "rewards": [EVIL], "system_prompt": EVIL, "steps": 12}
    (run / "config.json").write_text(config.load(None, settings).model_dump_json())
    row = next(completions(0))
    write(run / "completions.jsonl", [{**row, "prompt": EVIL, "completion": EVIL, "rewards": {EVIL: 1.0}}])
    summary = {**SUMMARY, "commit": EVIL, "versions": {EVIL: EVIL}, "time": {EVIL: 1.0}}
    (run / "summary.json").write_text(json.dumps(summary))
    evil_run = run.rename(run.parent / "<b>&")
    report.write(evil_run)
    page = read(evil_run)
    assert "script" not in page.tags and page.tags.count("img") == 1 and len(page.links) == 1
    assert page.text.count(EVIL) >= 9
    assert "<b>&" in page.text


def test_a_picture_is_drawn_of_what_was_switched_off_and_of_a_long_run(run):
    off = config.load(run / "config.json", {"gr_gamma": 0, "dither_level": 0, "max_grad_norm": None})
    with_all = curves.draw(config.load(run / "config.json"), list(metrics(12)))
    figure = curves.draw(off, list(metrics(500)))
    reward, _, _, norm, cosine, _, _, each, sharp = figure.axes
    assert [text.get_text() for text in cosine.texts] == ["no perturbation: gr_gamma is 0"] and not cosine.lines
    assert len(with_all.axes[3].lines) == 2 and not any(line.get_label().startswith("clipped") for line in norm.lines)
    labels = [[text.get_text() for text in axes.get_legend().texts] for axes in (reward, with_all.axes[0])]
    assert labels == [["clean"], ["clean", "dithered"]]
    assert [len(axes.lines) for axes in (reward, norm)] == [2, 2]  # the steps, faint, and the smoothed curve
    assert [text.get_text() for text in sharp.texts] == ["not probed: sharpness_every is 0"] and not sharp.lines
    assert not each.lines  # these runs have no single rewards
    assert all(axes.get_title() and axes.get_ylabel() for axes in figure.axes)
    assert [axes.get_xlabel() for axes in figure.axes[6:]] == ["step"] * 3


def test_a_gamed_reward_shows_in_one_panel_and_each_reward_in_another(run):
    """The training reward with what is true of the held-out problems; format beside correctness."""
    probed = config.load(run / "config.json", {"sharpness_every": 4})
    rows = list(metrics(12))
    for row in rows[1:]:
        row |= {"rewards/exact_answer/mean": 0.1, "rewards/xml_format/mean": row["step"] / 12, "ratio/mean": 1.0}
        if row["step"] % 4 == 0:
            row |= {"sharpness/curvature": 2.0 * row["step"], "rewards/xml_format/held_out": 0.7}
    *_, gamed, each, sharp = curves.draw(probed, rows).axes
    assert [line.get_label() for line in gamed.lines] == ["training reward", "held-out acc."]
    assert list(gamed.lines[1].get_ydata()) == [0.0, 5 / 12, 10 / 12]
    assert [text.get_text() for text in each.get_legend().texts] == ["exact_answer", "xml_format"]
    assert list(each.lines[3].get_xdata()) == [4, 8, 12] and set(each.lines[3].get_ydata()) == {0.7}
    assert list(sharp.lines[0].get_ydata()) == [8.0, 16.0, 24.0]


def test_null_is_a_gap_in_a_curve():
    figure = curves.draw(config.load(), list(metrics(12)))
    dithered = next(line for line in figure.axes[0].lines if line.get_label() == "dithered")
    assert [math.isnan(value) for value in dithered.get_ydata()] == [step == 3 for step in range(1, 13)]
    held_out = next(line for line in figure.axes[1].lines if line.get_label().startswith("held out"))
    assert list(held_out.get_xdata()) == [0, 5, 10]


def test_smoothing_keeps_the_mean_and_bridges_single_gaps():
    values = [float(i % 2) for i in range(400)]
    values[100] = math.nan
    smooth = curves._smooth(values)
    assert len(smooth) == 400 and all(abs(value - 0.5) < 0.11 for value in smooth[10:-10])
    assert curves._smooth(values[:50]) == values[:50]


def test_the_closing_table_leaves_out_what_it_does_not_know():
    assert closing_rows({}) == []
    assert closing_rows({"accuracy_before": None, "accuracy_after": 0.5, "steps": 1200}) == [
        ("Held-out accuracy after RL", "50.0%"),
        ("RL steps", "1,200"),
    ]
    assert dict(closing_rows(SUMMARY))["Gain"] == "+63.6 points"


def test_the_environment_names_the_versions_that_run():
    import torch

    versions = environment()["versions"]
    assert versions["torch"] == torch.__version__ and set(versions) >= {"python", "redit-fast", "transformers"}
