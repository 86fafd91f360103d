"""The suite step: a provider's whole step is right, and one that is wrong gets its error and no number."""

import time
from dataclasses import replace
from functools import partial
from importlib import import_module

import pytest
import torch

from redit_fast.benchmarks import bench_step, command, report, step_prefix, step_trl, step_verl, table
from redit_fast.benchmarks.measure import Absent, Errors, Provider, Table, Wrong, measure
from redit_fast.benchmarks.place import here
from redit_fast.benchmarks.roofline import Work
from redit_fast.benchmarks.step_cases import GROUP, LENGTHS, Case, batches, few, of_table, prepare
from redit_fast.benchmarks.step_hosts import Ends, Phases, Settings, Trainer, check_rollout
from redit_fast.benchmarks.step_worker import Libraries, Measured, Step, taken
from redit_fast.training.batch import Batch

CPU = here("cpu")


@pytest.fixture(scope="module", params=[0.0, 0.04], ids=["", "KL"])
def settings(request, tmp_path_factory):
    case = replace(of_table("gsm8k", "cpu", "dry"), folder=str(tmp_path_factory.mktemp("case")), beta=request.param)
    prepare(case, torch.device("cpu"), torch.float32)
    return Settings(case, "cpu", "float32")


def row_of(settings, host=Trainer, rollout=True, rounds=2):
    """The row of a provider that runs in this process."""

    def build():
        measured = Measured(settings, host)
        step = partial(measured.step, rollout=rollout, timer=time.perf_counter, watch=True)
        return lambda turn, thorough: taken(step(turn), *table.PHASES)

    limits = bench_step.LIMITS[torch.float32]
    work = bench_step.work(settings.case, rollout)
    ours, tokens = [Provider("ours", build, True)], settings.case.useful
    (row,) = measure(
        Table("step", "a step", {"R": 1}, "float32", work, ours, "log-prob", limits, rounds, tokens=tokens)
    )
    return row


@pytest.mark.parametrize("gr", [False, True])
@pytest.mark.parametrize("rollout", [False, True])
def test_a_step_of_the_trainer_is_right(settings, gr, rollout):
    row = row_of(replace(settings, gr=gr), rollout=rollout)
    assert row.status == "measured", row.note
    assert row.value_error < 1e-5 and row.gradient_error < 1e-5
    assert set(row.parts) == {"scoring", "update", *(["rollout"] if rollout else [])}
    assert sum(row.parts.values()) == pytest.approx(row.ms, rel=0.2)
    assert row.computed == (1 + gr) * settings.case.least


def flipped(grads, before):
    return {name: -grad for name, grad in grads.items()}


def zero(grads, before):
    return {name: torch.zeros_like(grad) for name, grad in grads.items()}


def stale(grads, before):
    return before or grads


def a_row_skipped(grads, before):
    name = "model.embed_tokens.weight"
    last = grads[name].norm(dim=1).argmax()
    grads[name][last] = 0
    return grads


@pytest.mark.parametrize("mutant", [flipped, zero, stale, a_row_skipped])
@pytest.mark.parametrize("gr", [False, True])
def test_a_wrong_gradient_gets_its_error_and_no_number(settings, mutant, gr, monkeypatch):
    backward, before = Batch.backward, {}

    def broken(self, model, *args, **options):
        found = backward(self, model, *args, **options)
        grads = {name: p.grad.clone() for name, p in model.named_parameters()}
        wrong = mutant({name: grad.clone() for name, grad in grads.items()}, dict(before))
        before.update(grads)
        for name, p in model.named_parameters():
            p.grad.copy_(wrong[name])
        return found

    monkeypatch.setattr(Batch, "backward", broken)
    row = row_of(replace(settings, gr=gr), rollout=False)
    assert row.status == "wrong" and row.ms is None and "error" in row.note, row


def test_a_sample_left_out_a_second_pass_left_out_and_a_weight_that_stays_are_wrong(settings, monkeypatch):
    class OneSampleLess(Trainer):
        def step(self, turn, phases, rollout):
            self.batches[turn % 2].rewards[:GROUP] = 0.5  # the first prompt's
            super().step(turn, phases, rollout)

    class FirstPassOnly(Trainer):
        def __init__(self, settings):
            super().__init__(replace(settings, gr=False))

    class NoStep(Trainer):
        def step(self, turn, phases, rollout):
            start = self.model.lm_head.weight.detach().clone()
            super().step(turn, phases, rollout)
            with torch.no_grad():
                self.model.lm_head.weight.copy_(start)

    class NoLogp(Trainer):
        def logp(self):
            return dict(list(super().logp().items())[1:])

    for host, gr, said in ((OneSampleLess, False, "error"), (FirstPassOnly, True, "gradient error"),
                           (NoStep, False, "not updated"), (NoLogp, False, "value error inf")):  # fmt: skip
        row = row_of(replace(settings, gr=gr), host, rollout=False)
        assert row.status == "wrong" and row.ms is None and said in row.note, row


def test_a_rollout_has_the_frozen_lengths_or_is_refused(settings):
    case = settings.case
    host = Trainer(settings)
    host.step(0, Phases(time.perf_counter), True)
    host.ends = Ends(host.model, [n + 1 for n in case.lengths], drops=True)
    with pytest.raises(Wrong, match="other lengths"):
        host.step(0, Phases(time.perf_counter), True)
    host.ends = Ends(host.model, case.lengths, drops=False)  # rows that ended stay: this package's leave
    with pytest.raises(Wrong, match="rows, expected"):
        host.step(0, Phases(time.perf_counter), True)
    with pytest.raises(Wrong, match="twice"):
        check_rollout(replace(case, completions=((9,) * GROUP,) * 2), [list(range(9)) for _ in range(2 * GROUP)])


def test_no_two_completions_are_the_same():
    short = replace(few("dry"), completions=((2,) * GROUP,) * 4, prompts=(3,) * 4)  # 32 of 59 that there are
    for batch in batches(short):
        assert len(set(map(tuple, batch.completions))) == 32


def test_phases_do_not_count_what_is_inside_them():
    now = iter(range(100))
    phases = Phases(lambda: next(now))
    with phases("update"):
        with phases("scoring"), phases("rollout"):
            pass
    assert phases.seconds == {"update": 2, "scoring": 2, "rollout": 1}


def test_the_tables_of_lengths_keep_their_shape_when_they_are_scaled():
    for name, table_of in LENGTHS.items():
        whole = Case(name, table_of["prompts"], table_of["completions"], {}, 1, 1)
        for size in ("cpu", "quick"):
            case = of_table(name, "cpu", size)  # of a few groups, rounded
            assert case.least / case.useful == pytest.approx(whole.least / whole.useful, abs=0.06), (name, size)
            assert 0.9 < case.useful / (len(case.lengths) * {"cpu": 64, "quick": 24}[size]) < 1.1
        on_gpu = of_table(name, "cuda", "cuda")
        assert list(on_gpu.prompts) == table_of["prompts"]
        assert name == "reasoning" or on_gpu.useful == whole.useful
    equal = few("cpu")
    assert (equal.prompts, equal.lengths, equal.vocabulary) == ((32, 36, 40, 44), [64] * 32, 50_257)


def test_a_provider_that_cannot_run_says_why(monkeypatch):
    for module, host in ((step_verl, "Logits"), (step_trl, "TRL"), (step_prefix, "PrefixGrouper")):
        monkeypatch.setattr(module, "find_spec", lambda name: None)
        with pytest.raises(Absent, match="is not installed"):
            getattr(module, host).load()
    hosts = [
        getattr(import_module(f"redit_fast.benchmarks.{module}"), host) for module, host in bench_step.HOSTS.values()
    ]
    assert all(callable(host.step) and host.pass2 in ("fresh", "pass1") for host in hosts)


@pytest.mark.parametrize("settings", [0.0], indirect=True)
def test_processes_of_one_library_say_what_they_raise_and_how_they_end(settings):
    libraries = Libraries("cpu")
    try:
        with pytest.raises(AttributeError, match="NoHost"):
            libraries.start("step_hosts", "NoHost", settings)
        first, second = (libraries.start("step_hosts", "Trainer", settings) for _ in range(2))
        assert len(libraries.started) == 1
        assert first(0, False).errors == second(0, False).errors
        with pytest.raises(TypeError, match="not all arguments converted"):
            first("turn", False)
        assert not first.alive and second(1, False).computed == settings.case.least
        first.close()
        second.close()
        assert second.connection.closed
    finally:
        libraries.close()
    assert [process.exitcode for process, _ in libraries.started.values()] == [0]


@pytest.mark.parametrize("settings", [0.0], indirect=True)
def test_the_table_with_rollouts_has_the_same_steps_and_a_step_that_failed_fails_there_too(settings, monkeypatch):
    steps, calls = bench_step.Steps(settings, None), []

    def process(turn, rollout):
        calls.append((turn, rollout))
        if turn == 2:
            raise RuntimeError("no memory")
        return Step(Errors(0.0), {"rollout": 2.0, "scoring": 0.5, "update": 1.0 + turn}, 7, 1e6)

    monkeypatch.setattr(steps, "_process", lambda name: process)
    rows = []
    for build in (steps.builder("TRL"), steps.again("TRL")):
        made = Table("step", "", {}, "float32", Work(), [Provider("TRL", build)], "log-prob", Errors(1.0), 1, tokens=9)
        rows += measure(made)
    assert calls == [(turn, True) for turn in range(3)]
    assert [row.status for row in rows] == ["failed"] * 2 and {row.note for row in rows} == {"RuntimeError: no memory"}
    with pytest.raises(Absent, match="vLLM or SGLang"):
        steps.again("verl, logits")()


def test_the_tables_and_pictures_of_a_step(tmp_path):
    results = command.run({"step": bench_step.tables}, CPU, tmp_path, "dry")
    assert [stored["tokens"] for stored in results["tables"]] == [of_table("gsm8k", "cpu", "dry").useful] * 2
    for stored in results["tables"]:
        text = table.of(stored)
        assert all(len(line) <= table.WIDTH for line in text.splitlines()) and "tok/s" in text
        (row,) = stored["rows"]
        assert row["status"] == "measured" and row["computed"] and row["peak_mb"] > 0
    (without,), (whole,) = (stored["rows"] for stored in results["tables"])
    assert whole["parts"] == {"rollout": whole["parts"]["rollout"], **without["parts"]} and whole["ms"] > without["ms"]
    report.write(results, tmp_path)
    assert (tmp_path / "steps.png").exists() and "tokens a second" in (tmp_path / "report.html").read_text()
