"""`redit-fast bench`: a wrong result gets no number, the models of bytes and growth, what is printed and written, the
doors, and the whole of `make gpu-check` on CPU tensors."""

import json
import os
import re
import shutil
import subprocess
import sys
import weakref
from dataclasses import replace
from functools import partial

import pytest
import torch
from PIL import Image

import redit_fast as rf
from redit_fast import cli
from redit_fast.benchmarks import (
    SUITES,
    bench_advantages,
    bench_apply,
    bench_apply_hosts,
    bench_linear_loss,
    bench_params,
    bench_token_loss,
    command,
    growth,
    peers,
    report,
    roofline,
    table,
)
from redit_fast.benchmarks.clock import Peak, clock
from redit_fast.benchmarks.measure import SHORT, Absent, Errors, Measurement, Provider, Table, Wrong, measure
from redit_fast.benchmarks.params_steps import step_table
from redit_fast.benchmarks.place import here
from redit_fast.benchmarks.roofline import Work
from tests import ROOT
from tools import gpu_check, overlap

CPU = here("cpu")
F32, BF16 = torch.float32, torch.bfloat16
CASES = {  # one table of every op and way, small
    "token_loss forward": lambda: bench_token_loss.forward(CPU, 32, 300, F32, 2),
    "token_loss gradient": lambda: bench_token_loss.gradient(CPU, 32, 300, BF16, 2),
    "linear_loss": lambda: bench_linear_loss.table(CPU, 32, 16, 90, F32, 2),
    "params norm": lambda: bench_params.norm(CPU, F32, 1000, 2),
    "params perturb": lambda: bench_params.perturb(CPU, BF16, 1000, 2),
    "params adamw": lambda: bench_params.adamw(CPU, BF16, 1000, 2),
    "params step": lambda: step_table(CPU, F32, 1.0, 1, 2, small=True),
    "params step combined": lambda: step_table(CPU, BF16, 0.75, 1, 2, small=True),
    "apply": lambda: bench_apply.table(CPU, 60, 8, 16, 2),
    "advantages": lambda: bench_advantages.table(CPU, 4, 2),
}


def ours(case, rounds=2):
    """Its table with the first provider of ours alone."""
    made = CASES[case]()
    return replace(made, providers=[next(p for p in made.providers if p.ours)], rounds=rounds)


@pytest.mark.benchmark(timer=lambda: clock.seconds)
@pytest.mark.parametrize("case", CASES)
def test_case(benchmark, case):
    """pytest tests/project/test_benchmarks.py --benchmark-only"""
    made = ours(case)
    run, turns = made.providers[0].build(), iter(range(1000))

    def once():
        for found, limit in zip(run(next(turns), True), made.limits):
            assert found is None or limit is None or found <= limit

    clock.restart()
    benchmark.pedantic(once, rounds=3, warmup_rounds=1)
    assert clock.seconds > 0


# What a broken kernel leaves: each takes the result and the one before it, or what was in the buffer.
MUTANTS = {
    "sign": lambda new, old: -new,
    "zero": lambda new, old: torch.zeros_like(new),
    "stale": lambda new, old: old,
    "nan": lambda new, old: torch.where(torch.arange(new.numel()).view(new.shape) == 0, torch.nan, new),
    "row": lambda new, old: torch.cat([torch.zeros_like(new[:1]), new[1:]]) if new.dim() else torch.zeros_like(new),
}


class Broken:
    """`change` of the results of a function, called in turn."""

    def __init__(self, change):
        self.change, self.last = change, {}

    def __call__(self, new, key=0):
        new = new.detach()
        old = self.last.get(key, torch.zeros_like(new))
        self.last[key] = new.clone()
        return self.change(new.flatten(0, -2) if new.dim() > 2 else new, old.view_as(new)).view_as(new)


def with_gradients(leaves, loss, broken):
    """A loss of the same value whose gradients are broken."""
    grads = torch.autograd.grad(loss, leaves)
    linear = sum((leaf * broken(grad, i)).sum() for i, (leaf, grad) in enumerate(zip(leaves, grads)))
    return loss.detach() + linear - linear.detach()


def break_logp(monkeypatch, broken):
    whole = rf.token_logp
    monkeypatch.setattr(rf, "token_logp", lambda *args, **options: broken(whole(*args, **options)))


def break_gradients(monkeypatch, broken, name, leaves):
    whole = getattr(rf, name)

    def call(*args, **options):
        out = whole(*args, **options)
        return out._replace(loss=with_gradients(args[:leaves], out.loss, broken))

    monkeypatch.setattr(rf, name, call)


def break_primitive(monkeypatch, broken, place):
    """`place`: the argument that holds what is written."""
    found = bench_params._primitive

    def primitive(backend, name):
        whole = found(backend, name)

        def call(*args):
            outputs = args[place] if isinstance(args[place], list) else [args[place]]
            before = [out.clone() for out in outputs]
            whole(*args)
            for out, old in zip(outputs, before):
                out.copy_(broken.change(out.clone(), old))

        return call

    monkeypatch.setattr(bench_params, "_primitive", primitive)


def break_step(monkeypatch, broken):
    """Of the step that is taken, the move: what is added to the weights and their masters."""
    whole = rf.RegularizedAdamW.step

    def step(self):
        params = [p for group in self.param_groups for p in group["params"]]
        weights = [self.state[p].get("master", p) for p in params]
        before = [w.detach().clone() for w in weights]
        whole(self)
        with torch.no_grad():
            for i, (w, old) in enumerate(zip(weights, before)):
                w.copy_(old + broken(w - old, i))

    monkeypatch.setattr(rf.RegularizedAdamW, "step", step)


def break_master(monkeypatch, broken):
    """AdamW with masters writes both; the masters are what is compared."""
    break_primitive(monkeypatch, broken, 1)


def break_model(monkeypatch, broken):
    whole = rf.apply_to

    def apply_to(model):
        whole(model)
        weight = model.get_input_embeddings().weight

        def change(grad):
            order = grad.norm(dim=1).argsort(descending=True)  # the row left out is one that has a gradient
            return torch.empty_like(grad).index_copy(0, order, broken(grad[order]))

        weight.register_hook(change)

    monkeypatch.setattr(rf, "apply_to", apply_to)


def break_advantages(monkeypatch, broken):
    whole = rf.group_advantages

    def call(*args, **options):
        out = whole(*args, **options)
        order = out.values.abs().argsort(descending=True)
        values = torch.empty_like(out.values).index_copy(0, order, broken(out.values[order]))
        return out._replace(values=values)

    monkeypatch.setattr(rf, "group_advantages", call)


BREAK = {
    "token_loss forward": break_logp,
    "token_loss gradient": partial(break_gradients, name="grpo_loss", leaves=1),
    "linear_loss": partial(break_gradients, name="linear_grpo_loss", leaves=2),
    "params norm": partial(break_primitive, place=0),
    "params perturb": partial(break_primitive, place=1),
    "params adamw": break_master,
    "params step": break_step,
    "params step combined": break_step,
    "apply": break_model,
    "advantages": break_advantages,
}


@pytest.mark.parametrize("case", BREAK)
def test_the_right_result_gets_a_number(case):
    (row,) = measure(ours(case))
    assert row.status == "measured" and row.ms > 0 and row.n == 2, row
    assert row.warm_ms is None if min(row.seconds) >= SHORT else row.warm_ms > 0, row  # long calls have no warm time


@pytest.mark.parametrize("mutant", MUTANTS)
@pytest.mark.parametrize("case", BREAK)
def test_a_wrong_result_gets_its_error_and_no_number(case, mutant, monkeypatch):
    BREAK[case](monkeypatch, Broken(MUTANTS[mutant]))
    (row,) = measure(ours(case, rounds=4))
    assert row.status == "wrong" and row.ms is row.times is row.warm_ms is row.peak_mb is None, row
    assert row.note.startswith("wrong: ") and (row.value_error or row.gradient_error), row
    suites = {name.split()[0] for name in CASES}
    assert set(BREAK) == set(CASES) and suites == set(SUITES) - {"step", "ranks"}  # which their own tests break


@pytest.mark.parametrize("mutant", [None, "sign", "row"])
def test_a_wrong_gradient_in_trls_sft_trainer_gets_no_number(mutant, monkeypatch):
    pytest.importorskip("trl", reason="TRL is not installed: its steps need it")
    if mutant:
        break_model(monkeypatch, Broken(MUTANTS[mutant]))
    _, made = bench_apply_hosts.tables(CPU, "dry")
    (row,) = measure(replace(made, providers=made.providers[:1], rounds=2))
    assert row.ours and row.status == ("wrong" if mutant else "measured"), row
    assert (row.ms is None) == (row.gradient_error > 1e-4) == bool(mutant)


def a_provider(name, value=0.0, ours=False, fails=None, cause=""):
    def build():
        if isinstance(fails, Absent):
            raise fails

        def run(turn, thorough):
            with clock:
                sum(range(2000))
            if fails is not None:
                raise fails
            return Errors(value)

        return run

    return Provider(name, build, ours, cause)


def a_table(*providers, sizes=None, axis=""):
    work = Work(reads=10**9)
    return Table("suite", "op", sizes or {"R": 2}, "float32", work, providers, "log-prob", Errors(1.0), 3, axis)


def test_what_does_not_run_and_what_is_not_a_number_have_a_row_with_one_sentence():
    rows = measure(
        a_table(
            a_provider("absent", fails=Absent("it is not installed here")),
            a_provider("failed", fails=RuntimeError("no kernel\nmore")),
            a_provider("judged", fails=Wrong("it moved nothing")),
            a_provider("nan", value=float("nan")),
            a_provider("peer"),
            a_provider("main", ours=True),
        )
    )
    said = {row.name: (row.status, row.note) for row in rows}
    assert said["absent"] == ("absent", "it is not installed here")
    assert said["failed"] == ("failed", "RuntimeError: no kernel")
    assert said["judged"] == ("wrong", "wrong: it moved nothing") and said["nan"][0] == "wrong"
    assert said["peer"] == said["main"] == ("measured", "")
    assert [row.times is not None for row in rows] == [False, False, False, False, True, False]
    assert rows[3].stored()["value_error"] is None  # JSON has no NaN


def test_cold_runs_empty_the_caches_before_the_clock_starts(monkeypatch):
    done = []
    monkeypatch.setattr(clock, "_flush", lambda: done.append(clock.seconds))
    measure(a_table(a_provider("main", ours=True)))
    assert done == [0.0] * 3  # of three cold runs; the warm ones and the first two are not


def test_the_peak_is_that_of_the_block():
    with Peak() as peak:
        torch.ones(8 * 2**20).sum()
    assert peak.bytes != peak.bytes or 32e6 < peak.bytes < 40e6  # NaN where Linux does not count


def test_slopes_of_known_data():
    sizes = [10, 20, 40, 80, 160]
    exact = growth.slope(sizes, [3 * size**1.5 for size in sizes])
    assert exact.value == pytest.approx(1.5) and exact.high - exact.low < 1e-9
    # By hand: log y is off by 0.1, -0.1, 0, -0.1, 0.1, which has no slope; the spread of log x is 10 log(2)^2.
    factors = [1.1051709, 0.9048374, 1.0, 0.9048374, 1.1051709]
    wide = growth.slope(sizes, [size * factor for size, factor in zip(sizes, factors)])
    error = (4 * 0.1**2 / 3 / (10 * 0.480453)) ** 0.5
    assert wide.value == pytest.approx(1.0) and wide.low < 1 < wide.high
    assert wide.high - wide.value == pytest.approx(3.182 * error, rel=0.02)
    with pytest.raises(ValueError, match="3 to"):
        growth.slope([1, 2], [1, 2])


def results_of(*tables, speeds=None):
    """As `command.run` stores them."""
    stored = [
        {"suite": made.suite, "title": made.title, "sizes": made.sizes, "dtype": made.dtype, "axis": made.axis,
         "value": made.value, "work": vars(made.work), "rows": [row.stored() for row in measure(made)]}
        for made in tables
    ]  # fmt: skip
    speeds = speeds or {"read": 1e9, "update": 1e9, "copy": 2e9, "AdamW": 1e9, "copy_": 1.0, "float32 products": 1.0}
    card = {"cpu": "<script>alert(1)</script>", "cores": 2, "threads": 2, "caches": {"L3 Unified": "32K"},
            "gpu": None, "clock": "perf_counter", "redit-fast": "0", "commit": None, "python": "3", "torch": "2",
            "peers": {}}  # fmt: skip
    results = {"schema": 1, "device": "cpu", "size": "dry", "machine": card, "speeds": speeds, "tables": stored}
    command.rate(results, 1)
    return results | {"growth": growth.series(stored)}


def test_bytes_are_counted_as_they_cross_to_memory():
    work = Work(reads=100, updates=10, writes=5, flops=0)
    assert work.bytes(cache=62) == 125 and work.bytes(cache=63) == 110  # what is written stays in a cache that large
    speeds = {"read": 3.0, "update": 4.0, "copy": 4.0, "AdamW": 5.0, "copy_": 9.0, "float32 products": 2.0}
    assert Work(reads=10**9).floor_ms(speeds, "float32", 1) == pytest.approx(200)  # at 5 GB/s: copy_ counts for nothing
    assert Work(reads=10**9, flops=10**9).floor_ms(speeds, "float32", 1) == pytest.approx(500)  # at 2 GFLOP/s


def test_a_share_above_110_percent_is_said_to_be_a_wrong_model():
    assert roofline.sentence(1.1) is None and "131%" in roofline.sentence(1.31)
    results = results_of(
        a_table(a_provider("main", ours=True)), speeds={"read": 1e-6, "update": 0, "copy": 0, "AdamW": 0}
    )
    (stored,) = results["tables"]
    (said,) = table.warnings(stored)
    assert said.startswith("main: ") and said in " ".join(table.of(stored).split())


def test_the_speeds_are_those_of_real_traffic():
    found = roofline.speeds(CPU)
    assert set(found) == {"read", "update", "copy", "AdamW", "copy_", "float32 products", "bfloat16 products"}
    assert all(speed > 0.1 for speed in found.values())


def test_no_committed_result_is_wrong_or_above_the_roofline_and_slower_ones_have_a_cause():
    folder = ROOT / "benchmarks" / "results" / "cpu"
    files = [json.loads((folder / f"{name}.json").read_text()) for name in ("bench", "step", "ranks", "apply_hosts")]
    every = [stored for results in files for stored in results["tables"]]
    tables = [stored for stored in every if not stored["axis"] or stored["suite"] == "ranks"]
    assert {stored["suite"] for stored in tables} == {*SUITES, "apply_hosts"}
    assert {results["size"] for results in files} == {"cpu"}
    assert [said for stored in every for said in table.warnings(stored)] == []
    rows = [row | {"of": stored["title"]} for stored in tables for row in stored["rows"]]
    assert [(row["of"], row["name"]) for row in rows if row["status"] in ("wrong", "failed")] == []
    slower = [row for row in rows if row["times"] is not None and row["times"] < 0.95 and not row["ours"]]
    assert [(row["of"], row["name"]) for row in slower if not row["cause"]] == []
    causes = {row["cause"] for stored in tables if stored["dtype"] == "float32" for row in stored["rows"]}
    assert [cause for cause in causes if re.search("(?<!in )bfloat16", cause)] == []  # of another table


def test_the_text_fits_100_columns_and_survives_json():
    many = [a_provider(f"a provider with a long name, {i}" * 2, value=1e-12) for i in range(3)]
    absent = a_provider("absent", fails=Absent("a reason of many words " * 8))
    series = [a_table(*many, a_provider("main", ours=True), sizes={"R": 10**i}, axis="R") for i in range(1, 6)]
    results = results_of(a_table(a_provider("main", ours=True), *many, absent), *series)
    for row in results["tables"][0]["rows"]:
        row.update(peak_mb=99999.0, ms=123456.0, p10=123455.0, p90=123457.0) if row["ms"] else None
    shown = report.text(results)
    assert max(map(len, shown.splitlines())) <= table.WIDTH and "a reason of many words" in shown
    assert report.text(json.loads(json.dumps(results))) == shown


def test_two_runs_are_compared_by_the_intervals_of_their_ratios():
    first = results_of(a_table(a_provider("main", ours=True), a_provider("peer"), a_provider("other")))
    second = json.loads(json.dumps(first))
    first["tables"][0]["rows"][1].update(times_p10=1.0, times_p90=2.0)
    second["tables"][0]["rows"][1].update(times_p10=2.1, times_p90=3.0)
    one, other = overlap.ratios(first), overlap.ratios(second)
    assert [key.split(" | ")[-1] for key in overlap.apart(one, other)] == ["peer"] and overlap.apart(one, one) == []
    assert overlap.told(one, one).startswith("100.0% of ") and not overlap.told(one, other).startswith("100")


def test_a_second_run_replaces_the_suites_that_it_has(tmp_path, monkeypatch):
    again, kept = tmp_path / "again.json", {"other | x": [1.0, 2.0]}
    again.write_text(json.dumps({"commits": {"other": "a"}, "ratios": kept}))
    monkeypatch.setattr(overlap, "STORED", again)
    run = results_of(a_table(a_provider("main", ours=True), a_provider("peer")))
    run["machine"]["commit"] = "b"
    (tmp_path / "run.json").write_text(json.dumps(run))
    both = [str(tmp_path / "run.json"), "--", str(tmp_path / "run.json")]
    overlap.main(both)
    assert json.loads(again.read_text())["ratios"] == kept
    overlap.main([*both, "--store"])
    overlap.main([*both, "--store"])
    stored, ratios = json.loads(again.read_text()), json.loads(json.dumps(overlap.ratios(run)))
    assert stored == {"commits": {"other": "a", overlap.suite_of(next(iter(ratios))): "b"}, "ratios": kept | ratios}
    for words in ([], both[:1], both[:2], both[1:]):
        with pytest.raises(SystemExit, match="needs the files of two runs"):
            overlap.main(words)


def test_results_that_cannot_be_written_leave_those_before(tmp_path):
    command._store({"tables": [1]}, tmp_path)
    kept = (tmp_path / "results.json").read_text()
    assert json.loads(kept) == {"tables": [1]} and [each.name for each in tmp_path.iterdir()] == ["results.json"]
    (tmp_path / ".results.json").mkdir()
    with pytest.raises(OSError):
        command._store({"tables": [1, 2]}, tmp_path)
    assert (tmp_path / "results.json").read_text() == kept


def test_the_report_needs_nothing_else(tmp_path):
    series = [a_table(a_provider("<b>", ours=True), sizes={"R": 10**i}, axis="R") for i in range(1, 6)]
    others = [a_table(a_provider("main", ours=True), sizes={"V": 10**i}, axis="V") for i in range(1, 6)]
    results = results_of(a_table(a_provider("main", ours=True)), *series, *others)
    report.write(results, tmp_path)
    page = (tmp_path / "report.html").read_text()
    pictures = sorted(path.name for path in tmp_path.glob("*.png"))
    assert pictures == ["growth.png", "memory.png", "roofline.png", "time.png"]
    assert page.count("data:image/png;base64,") == 4 and not re.search(
        r"(src|href)=\"(?!data:)|url\(|@import|<script", page
    )
    assert "&lt;script&gt;" in page and "&lt;b&gt;" in page and "<b>" not in page
    assert all(Image.open(tmp_path / name).size[0] > 300 for name in pictures)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["token_los"], "unknown suite 'token_los', did you mean token_loss?"),
        (["--device", "tpu"], "--device must be one of cpu, cuda, got 'tpu'"),
        (["--device", "cuda"], "--device cuda: torch sees no CUDA device here"),
        (["--out", ""], "--out is empty, needs a name"),
        (["--out", "{file}/x"], "nothing can be written there: Not a directory"),
        (["--fast"], "unknown flag --fast"),
    ],
)
def test_bad_input_gets_one_sentence_before_anything_runs(words, said, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(command, "run", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    (tmp_path / "file").touch()
    monkeypatch.chdir(tmp_path)
    assert cli.main(["bench", *(word.format(file=tmp_path / "file") for word in words)]) == 2
    out, err = capsys.readouterr()
    assert out == "" and said in err and err.count("\n") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) in (["file"], ["bench-results", "file"])


def a_suite(place, size):
    yield a_table(a_provider("main", ours=True), sizes={"R": 1})


@pytest.mark.parametrize("value", [0.0, 9.0])
def test_a_door_measures_writes_and_says_whether_ours_is_right(value, tmp_path, monkeypatch, capsys):
    def tables(place, size):
        assert (place, size) == (CPU, "quick")
        yield a_table(a_provider("main", ours=True, value=value))
        for rows in (1, 2, 3):
            yield a_table(a_provider("main", ours=True), sizes={"R": rows}, axis="R")

    monkeypatch.setattr(roofline, "speeds", lambda _: {"read": 1.0, "update": 1.0, "copy": 1.0, "AdamW": 1.0})
    code = command.main("suite", tables, ["--quick", "--cpu-time", "--out", str(tmp_path / "out")])
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert code == (1 if value else 0) and "suite: op" in capsys.readouterr().out
    assert results["machine"]["clock"] == "process_time" and len(results["tables"]) == 4
    assert results["growth"][0]["time_slope"] is not None and (tmp_path / "out" / "report.html").exists()
    clock.timer = __import__("time").perf_counter


def test_blocks_lie_apart_and_tables_come_before_series():
    def tables(name):
        yield a_table(sizes={name: 1})
        yield a_table(sizes={name: 2}, axis=name)
        yield a_table(sizes={name: 3}, axis=name)

    suites = {name: lambda place, size, name=name: tables(name) for name in ("R", "step", "V")}
    found = [(block, *made.sizes.items()) for block, made in command.ordered(suites, CPU, "dry", 2)]
    assert found[:5] == [(0, ("R", 1)), (0, ("step", 1)), (0, ("V", 1)), (1, ("R", 1)), (1, ("V", 1))]
    assert found[5:] == [(0, (name, n)) for name in suites for n in (2, 3)]


def test_blocks_are_built_anew_and_their_rounds_are_pooled(monkeypatch):
    built, sizes, measurement = [], (10.0, 20.0, 40.0), Measurement()

    def table_of(block, value=0.0):
        """In which the peer takes twice as long as ours, in the second block four times."""

        def provider(name, seconds):
            inputs = torch.zeros(1)
            built.append(weakref.ref(inputs))

            def build():
                def run(turn, thorough):
                    clock.seconds += seconds + 0 * inputs.item()
                    return Errors(value)

                return run

            return Provider(name, build, name == "main")

        return a_table(provider("main", sizes[block]), provider("peer", sizes[block] * (4 if block == 1 else 2)))

    for block in range(3):
        measurement.block(table_of(block), 3)
        assert [reference() for reference in built] == [None] * len(built), "inputs of a block stay"
    main, peer = measurement.rows()
    assert (main.n, peer.n, main.ms) == (3, 3, 20_000) and main.peak_mb is not None  # 3 rounds, one a block
    assert (peer.times_p10, peer.times, peer.times_p90) == (2, 2, pytest.approx(3.6))
    measurement.block(table_of(2, value=9.0), 3)
    assert [(row.status, row.ms, row.times, row.n) for row in measurement.rows()] == [("wrong", None, None, 0)] * 2


def test_the_modules_import_with_torch_alone():
    script = """
import sys
for name in ("trl", "verl", "liger_kernel", "transformers", "triton", "datasets", "cut_cross_entropy", "quack"):
    sys.modules[name] = None
import importlib, pkgutil, redit_fast.benchmarks as package
names = [name for _, name, _ in pkgutil.iter_modules(package.__path__)]
for name in names: importlib.import_module(f"{package.__name__}.{name}")
print(len(names))
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and int(done.stdout) > 15, done.stderr


def test_a_peer_that_cannot_run_says_why():
    with pytest.raises(Absent, match="^its kernels run on CUDA devices only$"):
        peers.cut_cross_entropy(CPU)
    with pytest.raises(Absent, match="^nothing is not installed here$"):
        peers.load("nothing", "no_such_module.x", "y")
    with pytest.raises(Absent, match="^this release of json has no json.nothing$"):
        peers.load("json", "json", "nothing")


@pytest.mark.parametrize("tools", [(), ("nvcc",), ("nvcc", "compute-sanitizer")])
def test_the_parts_of_gpu_check_fit_nine_minutes_and_tests_come_first(tools, tmp_path, monkeypatch):
    for tool in tools:
        (tmp_path / tool).touch(mode=0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    parts = gpu_check.parts(tmp_path / "out", (9, 0))
    names = list(parts)
    assert sum(seconds for seconds, _ in parts.values()) == 540 and parts["bench"][0] >= 200
    assert ("TORCH_CUDA_ARCH_LIST=9.0a" in parts["build"][1]) == ("tests-cuda" in parts) == bool(tools)
    assert sum(name.startswith("sanitizer-") for name in parts) == 3 * ("compute-sanitizer" in tools)
    assert all((ROOT / path).is_file() for path in gpu_check.TESTS)
    assert names.index("tests-triton") < names.index("selftest") < names.index("bench")


def test_gpu_check_runs_from_end_to_end_on_twins(tmp_path):
    """Every part is a command of its own, as on a GPU: the tests are collected by the ids of the reference, what is
    built is nothing, and the benchmark is the same code with twins for what has no CPU."""
    planned = {name: part for name, part in gpu_check.parts(tmp_path, (9, 0)).items() if not name.startswith("sanit")}
    twins = {
        "build": (sys.executable, "setup.py", "--version"),
        "selftest": (sys.executable, "-m", "redit_fast", "--version"),
        "bench": (
            "env",
            "TORCH_COMPILE_DISABLE=1",
            sys.executable,
            "-m",
            "tests.project.gpu_twins",
            f"{tmp_path}/bench",
        ),
    }
    planned.pop("tests-cuda", None)  # where nvcc is; the same tests as
    cases = planned["tests-triton"][1][-1].replace("triton-cuda", "reference")
    collect = (sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider", *gpu_check.TESTS)
    twins["tests-triton"] = (*collect, "-k", cases)
    assert set(planned) == set(twins)
    code = gpu_check.check(tmp_path, {name: (600, twins[name]) for name in planned}, {"cpu": "twin"})
    text = (tmp_path / "gpu_check.txt").read_text()
    assert code == 0, text[:3000] + (tmp_path / "bench.log").read_text()[-3000:]
    assert "tests collected" in (tmp_path / "tests-triton.log").read_text()
    found = json.loads((tmp_path / "gpu_check.json").read_text())
    names = {row["name"] for stored in found["bench"]["tables"] for row in stored["rows"]}
    assert {"Liger, Triton", "quack", "Unsloth", "Cut Cross-Entropy", "verl, Triton head", "TRL, fused head"} <= names
    assert {stored["suite"] for stored in found["bench"]["tables"]} == set(SUITES)
    assert (tmp_path / "bench" / "report.html").exists() and "token_loss" in text


def test_a_part_of_gpu_check_that_fails_is_said_and_the_next_one_runs(tmp_path):
    parts = {"a": (5, (sys.executable, "-c", "raise SystemExit(3)")), "b": (1, (shutil.which("sleep"), "9")),
             "c": (5, (sys.executable, "-c", "print(1)"))}  # fmt: skip
    assert gpu_check.check(tmp_path, parts, {}) == 1
    done = json.loads((tmp_path / "gpu_check.json").read_text())["parts"]
    assert [done[name]["outcome"] for name in "abc"] == ["exit code 3", "stopped after 1 s", "ok"]
    assert os.path.exists(tmp_path / "gpu_check.txt")
