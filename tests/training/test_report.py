"""curves.png and report.html from the files of a run: whole, cut off, empty or hostile."""

import json
import math
import re
from html.parser import HTMLParser

import matplotlib.image
import pytest

from redit_fast.training import config_file, report
from redit_fast.training.report import curves, panels, samples, svg
from redit_fast.training.report.summary import closing_rows, environment

pytestmark = pytest.mark.draws

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
            "loss": -1 / step,
            "entropy": 0.2,
            "grad_norm": 1.5 + math.sin(step),
            "gr/step_cos": 0.999,
            "completions/mean_length": 20 + step,
            "completions/clipped_ratio": 0.1,
            "tokens/per_second_rollout": 9000.0,
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
    (folder / "config.json").write_text(config_file.load(None, own).model_dump_json())
    write(folder / "metrics.jsonl", metrics(12))
    write(folder / "completions.jsonl", [line for step in range(1, 13) for line in completions(step)])
    (folder / "summary.json").write_text(json.dumps(SUMMARY))
    return folder


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


class Page(HTMLParser):
    """The text and the tags of a page; every tag closed."""

    def __init__(self, text):
        super().__init__()
        self.text, self.open, self.tags, self.links = "", [], [], []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.links += [value for name, value in attributes if name in ("src", "href", "srcset", "data")]
        if tag not in ("meta", "br", "wbr"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open:
            self.text += data


def page_of(run):
    return Page(report.page.render(report.read(run)))


def test_a_finished_run_has_a_picture_and_a_page_that_stands_alone(run):
    report.write(run)
    picture = matplotlib.image.imread(run / "curves.png")
    assert picture.shape[0] > picture.shape[1] > 600
    assert len({tuple(pixel) for pixel in picture[::7, ::7].reshape(-1, picture.shape[2])}) > 20
    source = (run / "report.html").read_text("utf-8")
    page = Page(source)
    assert page.links == [] and not {"script", "link", "img", "image", "use"} & set(page.tags)
    assert "@import" not in source and "url(" not in source and "@media print" in source
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
    assert not list(run.glob(".*"))


def test_the_rerun_command_gives_the_same_config(run):
    import shlex

    from redit_fast import cli, commands

    command = re.search(r"redit-fast train .*", page_of(run).text)[0]
    parser = cli._Parser()
    cli._add_train_flags(parser)
    again = config_file.load(None, commands.settings(parser.parse_args(shlex.split(command)[2:])))
    assert again == config_file.load(run / "config.json").model_copy(update={"name": "my run-again"})


def shown_in(page):
    return re.findall(r"completion \d of step \d+", page.text)


def test_best_and_worst_completions_of_four_steps_are_shown_by_weighted_reward(run):
    page = page_of(run)
    assert shown_in(page) == [f"completion {i} of step {step}" for step in (1, 5, 8, 12) for i in (1, 2)]
    assert "exact_answer 1, xml_format 0.25 · advantage 0.5" in page.text
    assert "Step 8 mean reward 1.17, 67% correct" in page.text and "Best of 4" in page.text
    negative = config_file.load(run / "config.json", {"reward_weights": [-1, 1]})
    (run / "config.json").write_text(negative.model_dump_json())
    write(run / "completions.jsonl", list(completions(4))[:2])
    assert shown_in(page_of(run)) == ["completion 0 of step 4", "completion 1 of step 4"]


@pytest.mark.parametrize(("steps", "chosen"), [(1, [1]), (2, [1, 2]), (3, [1, 2, 3]), (5000, [1, 1667, 3334, 5000])])
def test_the_steps_are_the_first_the_last_and_some_between(steps, chosen):
    lines = (line for step in range(1, steps + 1) for line in completions(step))
    assert [found.step for found in samples.chosen(lines, [1.0, 1.0])] == chosen


def test_samples_of_equal_rewards_are_shown_once_and_unscored_ones_say_so(run):
    write(run / "completions.jsonl", list(completions(2))[3:] * 2)
    page = page_of(run)
    assert "exact_answer unscored, xml_format 0.25 · advantage unscored" in page.text
    assert "One of 2 with equal rewards" in page.text and len(shown_in(page)) == 1


@pytest.mark.parametrize("length", [0, 1, 2000, 2001, 3000])
def test_a_text_of_some_length_is_whole(length):
    whole = "x" * length
    text = samples.Text.of(whole, 1000)
    assert text.beginning + text.end == whole and text.left_out == 0


@pytest.mark.parametrize(("whole", "most"), [("y" * 100_000, 3000), ("\n" * 900, 60), ("word " * 30 + "\n" * 900, 210)])
def test_a_long_text_has_its_two_ends_and_says_what_is_left_out(whole, most):
    text = samples.Text.of(whole, 1000)
    assert len(text.beginning) + text.left_out + len(text.end) == len(whole) and text.left_out > 0
    assert whole.startswith(text.beginning) and whole.endswith(text.end)
    assert len(text.beginning) + len(text.end) <= most


@pytest.mark.parametrize(
    "change",
    [
        {"prompt": None},
        {"rewards": {}},
        {"rewards": {"a": "1", "b": 1}},
        {"rewards": [1, 1]},
        {"advantage": "0"},
        {"completion": 3},
    ],
)
def test_a_line_that_is_no_sample_is_named(run, change):
    write(run / "completions.jsonl", [next(completions(7)) | change])
    with pytest.raises(ValueError, match="completions.jsonl: malformed: a sample of step 7 lacks"):
        report.read(run)


def test_a_run_of_schema_1_has_the_same_report(run):
    pages = []
    names = {new: old for old, new in report.OF_SCHEMA_1.items()}
    for lines in (metrics(12), [{names.get(key, key): row[key] for key in row} | {"schema": 1} for row in metrics(12)]):
        write(run / "metrics.jsonl", lines)
        pages.append(report.page.render(report.read(run)))
    written = (run / "metrics.jsonl").read_text()
    assert all(f'"{old}": ' in written for old in report.OF_SCHEMA_1) and pages[0] == pages[1]
    assert all(title in pages[1] for title in ("Completions cut off", "Tokens a second", "Time of a step"))
    assert report.metrics_of(run) == list(metrics(12))


def test_a_killed_run_has_a_report_without_its_half_line(run):
    (run / "summary.json").unlink()
    with open(run / "metrics.jsonl", "a") as file:
        file.write('{"schema": 2, "step": 13, "reward/ra')
    with open(run / "completions.jsonl", "a") as file:
        file.write('{"schema": 2, "step": 13}')  # whole, but without its line end
    page = page_of(run)
    assert "it has not ended" in page.text
    assert "12 of 12 steps" in page.text and "of step 12" in page.text and "step 13" not in page.text
    assert "Held-out accuracy so far83.3%" in page.text and "after RL" not in page.text
    assert "Where the time went: 2 min 30 s" in page.text and "pass1 36.0 s (24%)" in page.text
    assert page.text.index("pass1 36.0 s") < page.text.index("warm start 30.0 s (20%)")
    assert "other" not in page.text  # which took no time
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
    assert f"{steps} of 12 steps" in page_of(run).text
    assert matplotlib.image.imread(run / "curves.png").shape[1] > 600


def test_a_damaged_line_in_the_middle_is_named(run):
    lines = (run / "metrics.jsonl").read_text().splitlines()
    (run / "metrics.jsonl").write_text("\n".join([*lines[:4], lines[4][:30], *lines[5:]]) + "\n")
    with pytest.raises(ValueError, match=r"metrics.jsonl:5: malformed line"):
        report.read(run)


@pytest.mark.parametrize("line", ["[]", "{}", "null", '{"step": "1"}', '{"step": true}', '{"step": 10000000000000000}'])
@pytest.mark.parametrize("name", ["metrics.jsonl", "completions.jsonl"])
def test_a_line_that_is_of_no_step_is_named(run, name, line):
    (run / name).write_text(line + "\n")
    with pytest.raises(ValueError, match=rf"{name}:1: malformed line: needs an object with the number of its step"):
        report.read(run)


@pytest.mark.parametrize("name", ["metrics.jsonl", "completions.jsonl"])
def test_a_line_that_is_nested_too_deep_is_named(run, name):
    (run / name).write_text("[" * 100000 + "\n")
    with pytest.raises(ValueError, match=rf"{name}:1: malformed line: maximum recursion depth"):
        report.read(run)


@pytest.mark.parametrize(
    "name", ["metrics.jsonl:1: malformed line", "completions.jsonl:1: malformed line", "summary.json: malformed"]
)
def test_a_whole_number_that_no_float_has_room_for_is_named(run, name):
    (run / name.partition(":")[0]).write_text('{"step": 1, "time/rollout": -' + "9" * 400 + "}\n")
    with pytest.raises(ValueError, match=f"{name}: a whole number of 401 characters is beyond the largest float"):
        report.read(run)


def test_half_a_surrogate_pair_in_a_setting_is_written_as_an_escape(run):
    settings = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps({**settings, "model": "a\ud800", "data": "d.jsonl"}))
    report.write(run)
    assert "a\\ud800" in page_of(run).text


@pytest.mark.parametrize("text", ["[]", "null", "{", "[" * 100000])
def test_a_damaged_summary_is_named(run, text):
    (run / "summary.json").write_text(text)
    with pytest.raises(ValueError, match=r"summary.json: malformed"):
        report.read(run)


def test_a_folder_without_a_run_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"nothing here holds no run: it has no config.json"):
        report.read(tmp_path / "nothing here")


EVIL = "</pre></style><script>alert(1)</script><img src=x onerror=alert(2)>&amp;\"'{{ 7 * 7 }}{% raw %}"


def test_every_text_is_escaped(run):
    tags = set(page_of(run).tags)
    settings = {"model": EVIL, "data": EVIL, "rewards": [EVIL], "system_prompt": EVIL, "steps": 12}
    (run / "config.json").write_text(config_file.load(None, settings).model_dump_json())
    row = next(completions(0))
    write(run / "completions.jsonl", [{**row, "prompt": EVIL, "completion": EVIL, "rewards": {EVIL: 1.0}}])
    write(run / "metrics.jsonl", [line | {f"rewards/{EVIL}/mean": 0.5} for line in metrics(12)])
    summary = {**SUMMARY, "commit": EVIL, "versions": {EVIL: EVIL}, "time": {EVIL: 1.0}}
    (run / "summary.json").write_text(json.dumps(summary))
    evil_run = run.rename(run.parent / "<b>&")
    page = page_of(evil_run)
    assert set(page.tags) <= tags and page.links == []
    assert page.text.count(EVIL) >= 11
    assert "<b>&" in page.text


UNSEEN = "\0 \x07 \x1b[31m \x7f \x85 \r\n \u202eright to left\u202c \u2067 \ud800 \udfff"


def test_a_character_that_shows_nothing_is_spelled_and_the_others_are_as_they_are(run):
    seen = "\n\tمرحبا 12 + 4 \u200d😀\n"
    line = {**next(completions(1)), "prompt": UNSEEN, "completion": seen, "rewards": {"a": 1.0, UNSEEN: 0.5}}
    write(run / "completions.jsonl", [line])
    source = report.page.render(report.read(run))
    assert source.encode() and not re.search("[\0-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]", source)
    page = Page(source)
    spelled = r"\x00 \x07 \x1b[31m \x7f \x85 \r" + "\n " + r"\u202eright to left\u202c \u2067 \ud800 \udfff"
    assert page.text.count(spelled) == 2
    assert f"\n{seen}" in page.text  # a browser drops the line end that is right after <pre>


def titles(found):
    return {panel.title for section in found for panel in section.panels}


def panel_of(run_config, rows, title):
    return next(p for section in panels.of_run(run_config, rows) for p in section.panels if p.title == title)


def test_a_panel_and_a_part_that_the_run_has_nothing_for_are_left_out(run):
    off = config_file.load(run / "config.json", {"gr_gamma": 0, "dither_level": 0, "max_grad_norm": None})
    rows = [{key: value for key, value in row.items() if not key.startswith("gr/")} for row in metrics(12)]
    everything = titles(panels.of_run(config_file.load(run / "config.json"), list(metrics(12))))
    assert everything - titles(panels.of_run(off, rows)) == {"Perturbation"}
    assert {"Reward", "Loss", "Entropy", "Accuracy", "Completion length"} < everything
    assert not {"Sharpness", "Each reward", "KL to the reference", "Learning rate"} & everything
    assert [curve.label for curve in panel_of(off, rows, "Reward").curves] == ["clean"]
    assert panel_of(off, rows, "Gradient norm").mark is None
    for name in ("metrics.jsonl", "completions.jsonl", "summary.json"):
        (run / name).unlink()
    page = page_of(run)
    assert not {"svg", "article", "figure"} & set(page.tags)
    assert not re.search("Curves|Completions|Where the time|accuracy", page.text) and "Run it again" in page.text


def test_the_picture_has_every_panel(run):
    found = panels.of_run(config_file.load(run / "config.json"), list(metrics(12)))
    figure = curves.draw(found, 12)
    assert {axes.get_title() for axes in figure.axes} == titles(found)
    legends = [axes.get_legend() for axes in figure.axes if axes.get_title() == "Reward"]
    assert [text.get_text() for text in legends[0].texts] == ["clean", "dithered"]
    assert all(axes.lines and axes.get_xlim()[1] >= 12 for axes in figure.axes)
    assert [axes.get_xlabel() for axes in figure.axes[-3:]] == ["step"] * 3


def test_a_gamed_reward_shows_in_one_panel_and_each_reward_in_another(run):
    """The training reward with what is true of the held-out problems; format beside correctness."""
    rows = list(metrics(12))
    for row in rows[1:]:
        row |= {"rewards/exact_answer/mean": 0.1, "rewards/xml_format/mean": row["step"] / 12, "ratio/mean": 1.0}
        if row["step"] % 4 == 0:
            row |= {"sharpness/curvature": 2.0 * row["step"], "rewards/xml_format/held_out": 0.7}
    gamed, each, sharp = (
        panel_of(config_file.load(run / "config.json"), rows, title)
        for title in ("Reward and truth", "Each reward", "Sharpness")
    )
    assert [curve.label for curve in gamed.curves] == ["training reward", "held out, greedy"]
    assert gamed.curves[1].values == [0.0, 5 / 12, 10 / 12]
    assert [curve.label for curve in each.curves] == ["exact_answer", "xml_format", ""]
    assert each.curves[2].steps == [4, 8, 12] and set(each.curves[2].values) == {0.7}
    assert each.curves[1].colour == each.curves[2].colour != each.curves[0].colour
    assert sharp.curves[0].values == [8.0, 16.0, 24.0]


def test_null_is_a_gap_in_a_curve():
    reward = panel_of(config_file.load(), list(metrics(12)), "Reward")
    clean, dithered = reward.curves
    assert [math.isnan(value) for value in dithered.values] == [step == 3 for step in range(1, 13)]
    drawn = svg.drawing(reward, 12).lines
    assert [line.line.count("M") for line in drawn] == [1, 2] and drawn[0].band.count("z") == 1
    assert clean.last() == 1.5 and dithered.last() == 1.51
    lone = svg.drawing(
        panels.Panel("", "", panels.curve_of([{"step": i, "x": [1, None][i % 2]} for i in range(4)], "x")), 3
    )
    assert len(lone.lines[0].dots) == 2  # a path through one point draws nothing


@pytest.mark.parametrize("value", [None, math.nan, math.inf, "x", True, 10**400, 1e308, -1e308, 5e-324, 1e17])
def test_no_value_stops_a_report(run, value):
    rows = list(metrics(12))
    rows[5] |= {"loss": value, "reward": value, "reward_std": value, "grad_norm": value}
    found = panels.of_run(config_file.load(run / "config.json"), rows)
    for section in found:
        for panel in section.panels:
            drawn = svg.drawing(panel, 12)
            numbers = re.findall(r"[-\d.e+]+|nan|inf", " ".join(line.line + line.band for line in drawn.lines))
            assert all(-1 <= float(number) <= svg.WIDTH + 1 for number in numbers) and drawn.rows
    if value in (math.nan, 1e308, 1e17):
        write(run / "metrics.jsonl", rows)
        report.write(run)


def test_a_long_curve_has_the_means_of_its_stretches_and_what_is_around_them():
    rows = [{"step": i, "x": float(i % 2)} for i in range(400)]
    rows[100]["x"] = None
    (curve,) = panels.curve_of(rows, "x")
    assert len(curve.values) == 100 and curve.steps[:2] == [1.5, 5.5]
    assert [value for i, value in enumerate(curve.values) if i != 25] == [0.5] * 99 and curve.values[25] == 2 / 3
    assert set(curve.low) == {0.0} and set(curve.high) == {1.0}
    (short,) = panels.curve_of(rows[:50], "x")
    assert short.values == [row["x"] for row in rows[:50]] and short.low == []
    (around,) = panels.curve_of([row | {"d": 0.25} for row in rows], "x", around="d")
    assert around.low[0] == 0.25 and around.high[0] == 0.75


def test_a_page_of_5000_steps_is_small(run):
    own = config_file.load(run / "config.json", {"steps": 5000})
    (run / "config.json").write_text(own.model_dump_json())
    long = "word " * 4000
    write(run / "metrics.jsonl", metrics(5000))
    write(run / "completions.jsonl", [{**line, "prompt": long, "completion": long} for line in completions(3)])
    assert "5,000 of 5,000 steps" in page_of(run).text and "means of up to 51 steps" in page_of(run).text
    assert len(report.page.render(report.read(run)).encode()) < 150_000


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [(0, 1, "0 0.2 0.4 0.6 0.8 1"), (-3, 41, "0 10 20 30 40"), (0.99991, 1, "0.99992 0.99994 0.99996 0.99998 1"),
     (0, 3e4, "0 10k 20k 30k"), (-0.7, 0, "−0.6 −0.4 −0.2 0"), (0, 2.4e6, "0 500k 1M 1.5M 2M")],
)  # fmt: skip
def test_an_axis_has_round_numbers(low, high, expected):
    assert " ".join(map(svg.number, svg.ticks(low, high, 5))) == expected


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


def test_the_page_says_what_the_run_warns_of_and_where_help_is(run):
    assert "choosing.md" not in page_of(run).text
    write(run / "metrics.jsonl", [row | {"frac_reward_zero_std": 0.75} for row in metrics(12)])
    page = page_of(run)
    assert "75% of the groups" in page.text and "docs/choosing.md#dead-groups" in page.text
