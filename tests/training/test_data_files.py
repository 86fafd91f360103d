"""Parquet files, data sets of the hub, columns under other names, the conventions of known sets."""

import datetime
import decimal
import json
import shutil
from pathlib import Path

import pytest

from redit_fast.cli import main
from redit_fast.training import config_file, data, data_files, data_names, inputs
from redit_fast.training.trainer import train
from tests.training.jobs import flags, lines_of
from tests.training.test_stops import assert_equal_checkpoints, timeless

pytest.importorskip("pyarrow", reason="pyarrow is not installed: Parquet files need it")
datasets = pytest.importorskip("datasets", reason="datasets is not installed: data of the hub needs it")
import pyarrow as pa  # noqa: E402  after the skip
from pyarrow import parquet  # noqa: E402


def user(text, **more):
    return {"role": "user", "content": text, **more}


RECORDS = [
    {"prompt": [user("1 + 1")], "answer": "2", "level": 1, "tags": ["a", None], "more": {"x": 1.5, "y": None}},
    {"prompt": [user("2 + 2", name="Finn")], "answer": None, "level": 2, "tags": [], "more": {"x": 0.5, "y": "z"}},
    {"prompt": [{"role": "system", "content": "Be brief."}, user("3 + 3")], "answer": "6", "level": 2**60,
     "tags": None, "more": {"x": None, "y": "\u2028"}},
]  # fmt: skip


def jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def written(path, rows):
    parquet.write_table(pa.Table.from_pylist(rows), path, row_group_size=2, compression="gzip")
    return str(path)


def spoil(file, column, group=0):
    """Zeros in place of what a row group has of a column."""
    chunk = parquet.read_metadata(file).row_group(group).column(column)
    start = min(filter(None, (chunk.dictionary_page_offset, chunk.data_page_offset)))
    content = bytearray(Path(file).read_bytes())
    content[start : start + chunk.total_compressed_size] = bytes(chunk.total_compressed_size)
    Path(file).write_bytes(content)


@pytest.mark.parametrize("together", [1, 2, 1000])
def test_parquet_has_the_records_of_jsonl(tmp_path, monkeypatch, together):
    """Chat messages, each with the keys that it has; nulls, lists and objects in other columns."""
    monkeypatch.setattr(data_files, "BATCH", together)
    file = written(tmp_path / "d.parquet", RECORDS)
    assert data.read(file) == list(enumerate(RECORDS, 1)) == data.read(jsonl(tmp_path / "d.jsonl", RECORDS))
    assert parquet.read_metadata(file).num_row_groups == 2


def test_dictionaries_and_large_lists_are_texts_and_lists(tmp_path):
    """As pandas writes categories, and polars all texts and lists."""
    columns = {
        "prompt": pa.array(["a", "b"]).dictionary_encode(),
        "answer": pa.array(["1", "2"], pa.large_string()),
        "steps": pa.array([["x"], []], pa.large_list(pa.large_string())),
        "pair": pa.array([[1, 2], [3, 4]], pa.list_(pa.int8(), 2)),
    }
    parquet.write_table(pa.table(columns), tmp_path / "d.parquet")
    expected = {"prompt": "a", "answer": "1", "steps": ["x"], "pair": [1, 2]}
    assert data.read(tmp_path / "d.parquet")[0] == (1, expected)


def test_a_file_is_read_a_batch_after_the_other_and_of_its_columns_those_that_are_named(tmp_path, monkeypatch):
    """What is not read cannot be told from zeros."""
    monkeypatch.setattr(data_files, "BATCH", 2)
    file = written(tmp_path / "d.parquet", [{"prompt": f"{i} + 1", "heavy": f"{i}" * 99} for i in range(4)])
    spoil(file, 1, group=1)
    rows = data_files.rows(file)
    assert [next(rows)[0], next(rows)[0]] == [1, 2]
    with pytest.raises(ValueError, match=r"d.parquet: cannot be read behind row 2: "):
        next(rows)
    assert [record for _, record in data.read(file, ["prompt"])] == [{"prompt": f"{i} + 1"} for i in range(4)]


def bad_value(name, value):
    return lambda path: written(path, [{"prompt": "a", name: value}])


def twice(path):
    parquet.write_table(pa.Table.from_arrays([pa.array(["a"])] * 2, names=["prompt", "prompt"]), path)


def json_column(*texts):
    def write(path):
        more = pa.ExtensionArray.from_storage(pa.json_(), pa.array(texts))
        parquet.write_table(pa.table({"prompt": pa.array(["a"] * len(texts)), "more": more}), path)

    return write


BAD = {
    "no such column": (lambda path: written(path, RECORDS), "d.parquet: no column 'question', found 'prompt', 'answer'",
                       ["prompt=question"]),
    "no prompt": (lambda path: written(path, [{"question": "a"}]),
                  "d.parquet:1: no column 'prompt', found 'question'; where it has another name, columns says"),
    "no bytes": (lambda path: path.touch(), "d.parquet: no Parquet file that can be read: "),
    "junk": (lambda path: path.write_bytes(b"junk" * 100), "d.parquet: no Parquet file that can be read: "),
    "no rows": (lambda path: written(path, RECORDS) and parquet.write_table(parquet.read_table(path)[:0], path),
                "d.parquet: the file is empty, it needs rows with a prompt"),
    "a folder": (lambda path: path.mkdir(), "data d.parquet: Is a directory"),
    "nothing": (lambda path: None, "data d.parquet: No such file or directory"),
    "a time": (bad_value("when", datetime.datetime(2026, 1, 1)), "d.parquet: column 'when' has the type timestamp[us]"),
    "bytes": (bad_value("image", b"x"), "d.parquet: column 'image' has the type binary, needs what JSON has: text"),
    "a decimal": (bad_value("price", {"x": [decimal.Decimal("1.50")]}), "d.parquet: column 'price' has the type "),
    "a number": (lambda path: written(path, [{"prompt": 7}]), "d.parquet:1: the prompt needs text or a list of chat"),
    "a null": (lambda path: written(path, [{"prompt": "a"}, {"prompt": None}]), "d.parquet:2: the prompt needs text"),
    "a null message": (lambda path: written(path, [{"prompt": [user("a"), None]}]), "d.parquet:1: the prompt needs"),
    "a null text": (lambda path: written(path, [{"prompt": [user("a")]}, {"prompt": [user(None)]}]),
                    "d.parquet:2: the prompt needs text or a list of chat messages"),
    "other messages": (lambda path: written(path, [{"prompt": [{"from": "a"}]}]), "d.parquet:1: the prompt needs text"),
    "a reserved name": (bad_value("completions", "x"), "d.parquet:1: column 'completions' is a reserved name"),
    "no JSON": (json_column('{"x": 1}', "{"), "d.parquet:2: column 'more': malformed: Expecting property name"),
    "JSON too deep": (json_column("[" * 200000), "d.parquet:1: column 'more': malformed: maximum recursion depth"),
    "a JSON key twice": (json_column('{"x": 1, "x": 2}'),
                         "d.parquet:1: column 'more': malformed: key 'x' is there twice"),
    "a name twice": (twice, "d.parquet: column 'prompt' is there twice"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_a_bad_file_gets_one_sentence_with_file_row_and_column(tmp_path, monkeypatch, case):
    monkeypatch.chdir(tmp_path)
    make, sentence, *columns = BAD[case]
    make(Path("d.parquet"))
    with pytest.raises(ValueError) as error:
        data.read("d.parquet", *columns)
    assert str(error.value).startswith(sentence) and "\n" not in str(error.value)


def test_what_json_has_not_can_be_left_out(tmp_path):
    rows = [{"prompt": "a", "answer": "1", "when": datetime.datetime(2026, 1, 1)}]
    file = written(tmp_path / "d.parquet", rows)
    assert data.read(file, ["prompt", "answer"]) == [(1, {"prompt": "a", "answer": "1"})]


@pytest.mark.parametrize("write", [jsonl, written])
def test_columns_are_read_by_the_names_that_the_data_has(tmp_path, write):
    rows = [{"question": "1 + 1", "a=b": "2", "prompt": "other", "completions": ["x"]}]
    file = write(tmp_path / f"d.{'jsonl' if write is jsonl else 'parquet'}", rows)
    assert data.read(file, ["prompt=question", "answer=a=b"]) == [(1, {"prompt": "1 + 1", "answer": "2"})]
    assert data.read(file, ["prompt", "old=completions"]) == [(1, {"prompt": "other", "old": ["x"]})]
    with pytest.raises(ValueError, match=r"d.\w+(:1)?: no column 'problem', found 'question', 'a=b', 'prompt', 'compl"):
        data.read(file, ["prompt=problem"])


BOXED = {
    r"so $\boxed{\frac{1}{2}}$.": r"\frac{1}{2}",
    r"$\boxed{1}$, no, $\boxed{ 2 }$": "2",
    r"$x = \boxed 5$ is": "5",
    r"\fbox{3} is": "3",
    r"\boxed{\{1, 2\}}": r"\{1, 2\}",
    r"\boxed{\left\{ x \right.} and }": r"\left\{ x \right.",
    r"\boxed {a_{1}}": "a_{1}",
    "\\boxed{1,\n2}": "1,\n2",
}


def test_the_answer_of_a_known_set_is_what_its_mark_holds(tmp_path):
    rows = [{"problem": "p", "solution": text, "level": "Level 5", "type": "Algebra"} for text in BOXED]
    for file in (jsonl(tmp_path / "math.jsonl", rows), written(tmp_path / "math.parquet", rows)):
        expected = [{"prompt": "p", "answer": answer} for answer in BOXED.values()]
        assert [record for _, record in data.read(file, data_format="math")] == expected
    rows = [{"question": "How many?", "answer": f"{a} #### {b}"} for a, b in (("x #### y", "72"), ("", "$1,234"))]
    file = jsonl(tmp_path / "gsm8k.jsonl", rows)
    expected = [{"prompt": "How many?", "answer": answer} for answer in ("72", "1234")]
    assert [record for _, record in data.read(file, data_format="gsm8k")] == expected


@pytest.mark.parametrize(
    ("data_format", "row", "sentence"),
    [
        ("gsm8k", {"question": "a", "answer": "72"}, "d.jsonl:2: column 'answer' needs text with '####'"),
        ("gsm8k", {"question": "a", "answer": "72 ####"}, "d.jsonl:2: column 'answer' needs text with '####'"),
        ("gsm8k", {"question": "a", "answer": 72}, "d.jsonl:2: column 'answer' needs text with '####' with the answer "
         "behind it, got 72"),
        ("gsm8k", {"question": " ", "answer": "#### 72"}, "d.jsonl:2: the prompt is empty"),
        ("gsm8k", {"prompt": "a", "answer": "#### 72"}, "d.jsonl:2: no column 'question', found 'prompt', 'answer'"),
        ("math", {"problem": "a", "solution": "72"}, r"d.jsonl:2: column 'solution' needs text with '\boxed"),
        ("math", {"problem": "a", "solution": r"\boxed{7"}, r"d.jsonl:2: column 'solution' needs text with '\boxed"),
        ("math", {"problem": "a", "solution": r"\boxed{ }"}, r"d.jsonl:2: column 'solution' needs text with '\boxed"),
        ("math", {"problem": "a", "solution": r"\boxedx{7}"}, r"d.jsonl:2: column 'solution' needs text with '\boxed"),
    ],
)  # fmt: skip
def test_a_row_that_is_not_of_the_set_is_named(tmp_path, monkeypatch, data_format, row, sentence):
    monkeypatch.chdir(tmp_path)
    good = {"question": "a", "answer": "#### 1", "problem": "a", "solution": r"\boxed{1}"}
    with pytest.raises(ValueError) as error:
        data.read(jsonl(Path("d.jsonl"), [good, row]), data_format=data_format)
    assert str(error.value).startswith(sentence)


OWN = {"model": "m", "data": "d.parquet", "rewards": ["exact_answer"]}


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({**OWN, "columns": ["answer=solution"]}, "columns: got answer=solution, needs the prompt too, such as"),
        ({**OWN, "columns": ["=question"]}, "columns: got '=question', needs NAME or NAME=COLUMN"),
        ({**OWN, "columns": ["prompt="]}, "columns: got 'prompt=', needs NAME or NAME=COLUMN"),
        ({**OWN, "columns": ["prompt", "prompt=x"]}, "columns: got 'prompt' twice, needs each name once"),
        ({**OWN, "columns": ["prompt", "completions=x"]}, "columns: got 'completions=x', 'completions' is a reserved"),
        ({**OWN, "columns": "prompt"}, "columns: got 'prompt', needs a list"),
        ({**OWN, "columns": ["prompt"], "data_format": "math"}, "columns: got prompt with data_format math, which"),
        ({**OWN, "data_format": "aime"}, "data_format: got 'aime', needs 'gsm8k' or 'math'"),
        ({"columns": ["prompt"]}, "columns: the embedded demo has its own data"),
        ({"data_format": "gsm8k"}, "data_format: the embedded demo has its own data"),
        ({**OWN, "data": "hub:gsm8k"}, "data: got 'hub:gsm8k', needs hub:OWNER/NAME, hub:OWNER/NAME/CONFIG or one of"),
        ({**OWN, "eval_data": "hub:a/b@"}, "eval_data: got 'hub:a/b@', needs hub:OWNER/NAME"),
        ({**OWN, "data": "hub:a/b/c/d"}, "data: got 'hub:a/b/c/d', needs hub:OWNER/NAME"),
    ],
)
def test_a_bad_setting_gets_one_sentence(settings, sentence):
    with pytest.raises(ValueError) as error:
        config_file.load(overrides=settings)
    assert str(error.value).startswith(sentence)


def test_the_name_of_a_data_set_has_its_configuration_and_split():
    assert data_names.hub_of("hub:openai/gsm8k") == ("openai/gsm8k", None, "train")
    assert data_names.hub_of("hub:openai/gsm8k/main@test") == ("openai/gsm8k", "main", "test")
    assert data_names.hub_of("hub:a.b/c-d@validation_matched") == ("a.b/c-d", None, "validation_matched")
    assert data_names.hub_of("hub.jsonl") is data_names.hub_of("a/b") is None


@pytest.mark.parametrize("source", ["d.parquet", "hub:a/b"])
def test_without_the_extra_nothing_is_loaded(settings, tmp_path, monkeypatch, capsys, source):
    monkeypatch.setattr("redit_fast.extras.find_spec", lambda name: None if name == "datasets" else name)
    written(tmp_path / "d.parquet", RECORDS)
    monkeypatch.chdir(tmp_path)
    assert main(["train", *flags({**settings, "model": "nowhere", "data": source})]) == 2
    said = f'data {source} needs datasets, not installed here; run `pip install "redit-fast[data]"`'
    assert capsys.readouterr().err == f"redit-fast: {said}\n"


COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """Puts a data set into a cache, as a download leaves it; there is no network."""
    cache = tmp_path / "cache"
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(cache))
    data_files._loaded.cache_clear()

    def add(name, commit=COMMIT, config="main", **splits):
        files = {split: jsonl(tmp_path / f"{split}.jsonl", rows) for split, rows in splits.items()}
        builder = datasets.load_dataset_builder("json", data_files=files, cache_dir=str(tmp_path / "built"))
        builder.download_and_prepare()
        owner, name = name.split("/")
        folder = cache / f"{owner}___{name}" / config / "0.0.0" / commit
        shutil.copytree(builder.cache_dir, folder)
        for file in folder.glob("json-*"):
            file.rename(file.with_name(file.name.replace("json-", f"{name}-")))
        info = json.loads((folder / "dataset_info.json").read_text())
        (folder / "dataset_info.json").write_text(json.dumps({**info, "config_name": config}))
        data_files._loaded.cache_clear()

    yield add
    data_files._loaded.cache_clear()


def test_a_data_set_of_the_hub_is_read_from_the_cache(hub, tmp_path, monkeypatch):
    """Also where a folder of its name is here."""
    hub("someone/sums", train=RECORDS, test=RECORDS[:1])
    (tmp_path / "someone" / "sums").mkdir(parents=True)
    (tmp_path / "someone" / "sums" / "train.jsonl").write_text('{"prompt": "here"}\n')
    monkeypatch.chdir(tmp_path)
    assert data.read("hub:someone/sums/main") == data.read("hub:someone/sums") == list(enumerate(RECORDS, 1))
    assert data.read("hub:someone/sums@test", ["prompt", "right=answer"]) == [
        (1, {"prompt": RECORDS[0]["prompt"], "right": "2"})
    ]
    with pytest.raises(ValueError, match="^hub:someone/sums@test: no column 'solution', found 'prompt', 'answer'"):
        data.read("hub:someone/sums@test", ["prompt", "answer=solution"])


@pytest.mark.parametrize(
    ("source", "words"),
    [("hub:someone/sums@validation", 'Unknown split "validation"'), ("hub:someone/sums/other", "Couldn't find cache"),
     ("hub:someone/else", "ConnectionError|Couldn't reach")],
)  # fmt: skip
def test_a_data_set_that_is_not_there_gets_one_sentence(hub, source, words):
    hub("someone/sums", train=RECORDS)
    with pytest.raises(ValueError, match=rf"^data {source}: cannot be loaded: .*({words})") as error:
        data.read(source)
    assert "\n" not in str(error.value)


def test_a_run_on_hub_data_goes_on_bit_by_bit_and_notices_another_commit(hub, settings, problems, tmp_path, capsys):
    rows = [{"question": row["prompt"], "right": row["answer"], "steps": row["steps"]} for row in lines_of(problems)]
    hub("someone/sums", train=rows[:40], test=rows[40:])
    job = {**settings, "data": "hub:someone/sums", "eval_data": "hub:someone/sums@test", "steps": 1,
           "columns": ["prompt=question", "answer=right", "steps"]}  # fmt: skip
    assert main(["train", *flags(job)]) == 0
    known = json.loads((tmp_path / "run" / "inputs.json").read_text())["data"]
    assert known == dict.fromkeys(("hub:someone/sums", "hub:someone/sums@test"), f"commit {COMMIT}")
    resume = ["train", "--resume", "--name", "run", "--out-dir", str(tmp_path), "--steps", "2"]
    hub("someone/sums", commit="f" * 40, train=rows[:40], test=rows[40:])
    assert main(resume) == 2
    assert "data hub:someone/sums has changed since" in capsys.readouterr().err
    shutil.rmtree(tmp_path / "cache/someone___sums/main/0.0.0" / ("f" * 40))
    data_files._loaded.cache_clear()
    assert main(resume) == 0
    straight = config_file.load(overrides={**job, "steps": 2, "name": "straight"})
    assert inputs.of(straight)["data"] == known
    train(straight)
    runs = [tmp_path / name for name in ("run", "straight")]
    assert_equal_checkpoints(*(run / "checkpoints" / "step-000002" for run in runs))
    first, second = (timeless(run / "metrics.jsonl") for run in runs)
    held_out = [key for key in first[1] if "held_out" in key]  # one step ends with an evaluation
    assert len(held_out) == 5 and None not in [first[1].pop(key) for key in held_out] and first == second


def test_parquet_trains_as_jsonl_does_and_generate_reads_it(settings, problems, tmp_path, capsys):
    rows = [{"question": row["prompt"], **row} for row in lines_of(problems)]
    for row in rows:
        del row["prompt"]
    file = written(tmp_path / "own.parquet", rows)
    own = {**settings, "steps": 1, "data": file, "columns": ["prompt=question", "answer", "steps"]}
    for job in (own, {**settings, "steps": 1, "name": "jsonl"}):
        train(config_file.load(overrides=job))
    one, other = (tmp_path / name for name in ("run", "jsonl"))
    assert timeless(one / "metrics.jsonl") == timeless(other / "metrics.jsonl")
    assert (one / "completions.jsonl").read_text() == (other / "completions.jsonl").read_text()
    out = tmp_path / "out.jsonl"
    words = ["--data", file, "--columns", *own["columns"], "--out", str(out), "--max-completion-length", "2"]
    assert main(["generate", str(one / "checkpoints/step-000001"), *words]) == 0
    assert [row["data"] for row in lines_of(out)] == [f"{file}:{number}" for number in range(1, 61)]
