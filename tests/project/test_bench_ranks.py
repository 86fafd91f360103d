"""The suite ranks: a step that processes share is the step of one, and a rank that does its part wrongly costs the
number."""

import os
import time
from dataclasses import replace
from datetime import timedelta

import pytest
import torch
from torch.testing._internal.distributed.fake_pg import FakeStore

from redit_fast.benchmarks import bench_ranks, command, report, roofline, table
from redit_fast.benchmarks.clock import clock
from redit_fast.benchmarks.collectives import Sent
from redit_fast.benchmarks.measure import Errors, measure
from redit_fast.benchmarks.place import here
from redit_fast.benchmarks.step_cases import of_table, prepare, weights
from redit_fast.benchmarks.step_hosts import Settings
from redit_fast.benchmarks.step_ranks import One, OnRanks, Ranks, merged
from redit_fast.benchmarks.step_worker import Process, Step, serve
from redit_fast.packing import plan
from redit_fast.training import distributed
from redit_fast.training.batch import Batch
from tests.training import processes

CPU = here("cpu")


class Forked:
    """Libraries whose processes are forked from the tests' server, which has the imports behind it."""

    def __init__(self, device="cpu", host=OnRanks):
        self.hosts = {"One": One, "OnRanks": host}

    def begin(self, module, name, settings, threads):
        ours, theirs = processes.context.Pipe()
        arguments = (theirs, self.hosts[name], settings, threads, time.perf_counter)
        processes.context.Process(target=serve, args=arguments, daemon=True).start()
        theirs.close()
        return Process(ours)

    def close(self):
        pass


class SecondRank(OnRanks):
    """Of which the second rank does its part wrongly."""

    patience = timedelta(seconds=3)

    def __init__(self, settings):
        if settings.rank:
            self.spoil()
        super().__init__(settings)

    def spoil(self):
        """In its process, before it is built."""


class ComputesNothing(SecondRank):
    def spoil(self):
        own = Batch.micro_batches.fget
        Batch.micro_batches = property(lambda batch: [(plan.unscored(True), graph) for _, graph in own(batch)])


class Scales(SecondRank):
    """Its share of the gradient."""

    by = 0.0

    def spoil(self):
        loss = Batch._loss

        def scaled(batch, *args):
            out, lengths = loss(batch, *args)
            return out._replace(loss=out.loss * self.by), lengths

        Batch._loss = scaled


class ScalesALittle(Scales):
    by = 1.0001  # which float64 would let pass


class SkipsTheAllReduce(SecondRank):
    def spoil(self):
        forward = distributed.Ranks.forward
        distributed.Ranks.forward = lambda ranks, model, compute, reduces=True: forward(
            ranks, model, compute, reduces=False
        )


class AllSkipTheAllReduce(SkipsTheAllReduce):
    def __init__(self, settings):
        self.spoil()
        OnRanks.__init__(self, settings)


class MovesAnotherWay(SecondRank):
    """Its weights, after the step."""

    def step(self, turn, phases, rollout):
        super().step(turn, phases, rollout)
        if self.settings.rank:
            with torch.no_grad():
                self.model.lm_head.weight[3, 3] += 1e-3


class SamplesLess(SecondRank):
    """Of its first sample."""

    def step(self, turn, phases, rollout):
        if rollout and self.settings.rank:
            self.ends.ending[0] = torch.tensor([0])
        super().step(turn, phases, rollout)


class Ends(SecondRank):
    def step(self, turn, phases, rollout):
        if rollout and self.settings.rank:
            os._exit(1)
        super().step(turn, phases, rollout)


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    case = replace(of_table("gsm8k", "cpu", "dry"), folder=str(tmp_path_factory.mktemp("case")))
    prepare(case, torch.device("cpu"), torch.float32)
    settings = Settings(case, "cpu", "float32", gr=True)
    Ranks([Forked().begin("step_ranks", "One", settings, 1)]).close()
    return settings


def rows_of(settings, host=OnRanks, strategies=("ddp", "fsdp2")):
    for made in bench_ranks.of_count(settings, 2, 2, Forked(host=host)):
        return measure(replace(made, providers=[p for p in made.providers if p.name.endswith(strategies)]))


def test_a_step_of_two_ranks_is_that_of_one_process_and_is_counted(settings):
    case, size = settings.case, sum(weight.nbytes for weight in weights(settings.case).values())
    for row in rows_of(settings):
        assert row.status == "measured" and row.n == 2, row
        assert row.value_error < 1e-5 and row.gradient_error < 1e-5 and 0 < row.ranks_error < bench_ranks.LIMITS.ranks
        assert set(row.parts) == {"rollout", "scoring", "update"} and row.peak_mb > 0
        assert row.computed == 2 * case.least  # by both ranks, in both passes
        tokens = [prompt + sum(of) - len(of) for prompt, of in zip(case.prompts, case.completions, strict=True)]
        assert row.dealt.fullest == max(tokens) / (sum(tokens) / 2)
        assert row.dealt.collectives >= 3 and 2 * size < row.dealt.sent_mb * 1e6 < 4 * size  # gradients of both passes


@pytest.mark.parametrize(
    "host, strategy, status, said",
    [
        (ComputesNothing, "ddp", "wrong", "ranks error"),
        (Scales, "ddp", "wrong", "ranks error"),
        (Scales, "fsdp2", "wrong", "ranks error"),
        (ScalesALittle, "ddp", "wrong", "ranks error"),
        (SkipsTheAllReduce, "ddp", "failed", "rank"),
        (AllSkipTheAllReduce, "ddp", "wrong", "ranks error"),
        (MovesAnotherWay, "ddp", "wrong", "rank 1: model.embed_tokens.weight was not updated"),
        (SamplesLess, "ddp", "wrong", "other lengths"),
        (Ends, "fsdp2", "failed", "rank 1: RuntimeError: its process was ended"),
    ],
)
def test_a_rank_that_does_its_part_wrongly_costs_the_number(settings, host, strategy, status, said):
    (row,) = rows_of(settings, host, (strategy,))
    assert row.status == status and said in row.note, row
    assert row.ms is row.p10 is row.times is row.peak_mb is row.dealt is None and row.n == 0


@pytest.mark.filterwarnings("ignore:.*is deprecated. Please use `torch.distributed:FutureWarning")  # new names in 2.13
def test_what_a_rank_sends_is_counted_by_hand():
    torch.distributed.init_process_group("fake", rank=0, world_size=4, store=FakeStore())
    try:
        with Sent(4) as sent:
            torch.distributed.all_reduce(torch.ones(10))  # 40 bytes, of which three quarters go and come
            torch.distributed.all_gather_into_tensor(torch.ones(40), torch.ones(10))
            torch.distributed.reduce_scatter_tensor(torch.ones(10), torch.ones(40))
            torch.distributed.all_gather([torch.ones(10)] * 4, torch.ones(10))
            assert (sent.collectives, sent.bytes) == (4, 60 + 120 + 120 + 120)
            with pytest.raises(KeyError, match="broadcast_"):
                torch.distributed.broadcast(torch.ones(1), 0)
    finally:
        torch.distributed.destroy_process_group()


def test_ranks_together_take_the_time_of_the_slowest_and_have_the_worst_errors(monkeypatch):
    quick = Step(Errors(1e-7, 2e-7, None, 3e-7), {"rollout": 1.0, "update": 2.0}, 10, 5e6, "", 7, 1e6)
    slow = Step(Errors(2e-7, 1e-7, None, float("nan")), {"rollout": 3.0, "update": 1.0}, 30, 4e6, "", 7, 2e6)
    both = merged([quick, slow])
    assert both.seconds == slow.seconds and (both.computed, both.peak, both.wrong) == (40, 5e6, "")
    assert both.errors[:3] == (2e-7, 2e-7, None) and both.errors.ranks != both.errors.ranks
    assert vars(both.dealt) == {"fullest": 1.5, "collectives": 7, "sent_mb": 2.0}
    said = merged([quick, replace(slow, wrong="no sample", computed=0)])
    assert (said.wrong, said.dealt) == ("rank 1: no sample", None)
    monkeypatch.setattr(clock, "timer", time.process_time)
    assert merged([quick, slow]).seconds == {"rollout": 4.0, "update": 3.0}


def test_the_series_is_printed_drawn_and_written(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(bench_ranks, "Libraries", Forked)
    monkeypatch.setattr(roofline, "speeds", lambda _: dict.fromkeys((*roofline.WAYS, "float32 products"), 1e3))
    results = command.run({"ranks": bench_ranks.tables}, CPU, tmp_path, "dry")
    assert [stored["sizes"]["ranks"] for stored in results["tables"]] == [1, 2]
    assert {entry["name"]: entry["size"] for entry in results["growth"]}["ranks, fsdp2"] == [1, 2]
    alone = next(row for row in results["tables"][0]["rows"] if row["name"] == "ranks, ddp")
    assert alone["dealt"] == {"fullest": 1.0, "collectives": alone["dealt"]["collectives"], "sent_mb": 0.0}
    results["tables"][1]["rows"][-1].update(status="failed", note="RuntimeError: rank 1: " + "many words " * 20)
    text = table.dealt(results["tables"])
    assert "2 ranks, fsdp2" in text and "rank 1: many words" in text and "1 ranks, ddp" in capsys.readouterr().out
    report.write(results, tmp_path)
    assert all(len(line) <= table.WIDTH for line in report.text(results).splitlines()) and text in report.text(results)
    assert {path.name for path in tmp_path.glob("*.png")} == {"growth.png"}
    page = (tmp_path / "report.html").read_text()
    assert "Ranks: step with GR" in page and "many words" in page
