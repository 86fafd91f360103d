"""The command `redit-fast bench`, and `python -m benchmarks.bench_<suite>`."""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from importlib import import_module
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import SUITES

if TYPE_CHECKING:  # --help imports no torch
    from .measure import Table
    from .place import Place

Tables = Callable[["Place", str], Iterator["Table"]]
DEVICES = ("cpu", "cuda")
OUT = "bench-results"
BLOCKS = {"cpu": 3, "cuda": 3, "quick": 1, "dry": 1}  # into which the rounds of a table are split
SCHEMA = 1


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("suites", nargs="*", metavar="SUITE", help=f"{', '.join(SUITES)}; without any: all")
    _add_settings(parser)


def _add_settings(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", default="cpu", metavar="DEVICE", help="cpu or cuda")
    parser.add_argument("--out", default=OUT, metavar="DIR", help=f"folder of the results, {OUT} by default")
    parser.add_argument("--quick", action="store_true", help="small sizes: minutes become seconds")
    parser.add_argument("--cpu-time", action="store_true", help="CPU seconds of all threads: others use the cores too")


def main(name: str, tables: Tables, argv: Sequence[str] | None = None, devices: tuple[str, ...] = DEVICES) -> int:
    """`python -m benchmarks.bench_<name>`: that suite alone."""
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks.bench_{name}")
    _add_settings(parser)
    try:
        return _bench({name: tables}, parser.parse_args(argv), devices)
    except (ValueError, OSError) as error:
        print(f"redit-fast: {error}", file=sys.stderr)
        return 2


def bench(args: argparse.Namespace) -> int:
    """Measure, show, write; 1 where a result of ours is wrong or did not run.

    Raises:
        ValueError, OSError: an unknown suite, a device that is not there, a folder that cannot be written; before
        anything runs.
    """
    return _bench({name: partial(_tables, name) for name in _suites(args.suites)}, args)


def _bench(suites: Mapping[str, Tables], args: argparse.Namespace, devices: tuple[str, ...] = DEVICES) -> int:
    _check_device(args.device, devices)
    out = _folder(args.out)
    from .place import here

    results = run(suites, here(args.device), out, "quick" if args.quick else args.device, cpu_time=args.cpu_time)
    from . import report

    report.write(results, out)
    print(f"\n{out / 'results.json'}\n{out / 'report.html'}")
    ours = [row for table in results["tables"] for row in table["rows"] if row["ours"]]
    return 1 if any(row["status"] in ("wrong", "failed") for row in ours) else 0


def _suites(names: Sequence[str]) -> list[str]:
    from redit_fast.checks import did_you_mean

    for name in names:
        if name not in SUITES:
            raise ValueError(f"unknown suite {name!r}, {did_you_mean(name, SUITES)}")
    return [name for name in SUITES if name in names or not names]


def _check_device(device: str, devices: tuple[str, ...]) -> None:
    if device not in devices:
        raise ValueError(f"--device must be one of {', '.join(devices)}, got {device!r}")
    if device == "cuda":
        import torch

        if not torch.cuda.is_available():
            raise ValueError("--device cuda: torch sees no CUDA device here")


def _folder(name: str) -> Path:
    if not name:
        raise ValueError("--out is empty, needs a name")
    folder = Path(name)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ValueError(f"--out {name}: nothing can be written there: {error.strerror}") from None
    return folder


def _tables(suite: str, place: Place, size: str) -> Iterator[Table]:
    return import_module(f"{__package__}.bench_{suite}").tables(place, size)


def run(suites: Mapping[str, Tables], place: Place, out: Path, size: str, *, cpu_time: bool = False) -> dict[str, Any]:
    """The results as they are stored in `out`/results.json, which is written after every table."""
    from . import growth, machine, roofline, table
    from .clock import clock
    from .measure import Measurement

    if cpu_time:
        clock.timer = time.process_time
    elif clock.timer is time.process_time:
        clock.timer = time.perf_counter
    results: dict[str, Any] = {
        "schema": SCHEMA, "device": place.kind, "size": size, "blocks": BLOCKS[size],
        "machine": machine.card(place), "speeds": {},
        "tables": [], "growth": [],
    }  # fmt: skip
    began, cache = time.monotonic(), roofline.cache_of(place)
    blocks, measured, last = BLOCKS[size], {}, None
    for block, made in ordered(suites, place, size, blocks):
        if last != (block, made.suite):
            for way, speed in roofline.speeds(place).items():
                results["speeds"][way] = max(speed, results["speeds"].get(way, 0.0))
        last = block, made.suite
        sizes = " ".join(f"{name}={value}" for name, value in made.sizes.items())
        of = f", block {block + 1} of {blocks}" if blocks_of(made.suite, blocks) > 1 and not made.axis else ""
        print(f"[{time.monotonic() - began:4.0f} s] {made.suite}: {made.title}, {made.dtype}, {sizes}{of}", flush=True)
        key = (made.suite, made.title, made.dtype, sizes, made.axis)
        if key not in measured:
            stored = {
                "suite": made.suite, "title": made.title, "sizes": made.sizes, "dtype": made.dtype, "axis": made.axis,
                "tokens": made.tokens, "value": made.value, "bytes": made.work.bytes(cache), "flops": made.work.flops,
                "work": asdict(made.work),
            }  # fmt: skip
            results["tables"].append(stored)
            measured[key] = Measurement(), stored
        measurement, stored = measured[key]
        measurement.block(made, 1 if made.axis else blocks_of(made.suite, blocks))
        stored["rows"] = [row.stored() for row in measurement.rows()]
        rate(results, cache)
        if not made.axis and block == blocks_of(made.suite, blocks) - 1:
            print(f"\n{table.of(stored)}\n", flush=True)
        _store(results, out)
    results["growth"] = growth.series(results["tables"])
    results["machine"]["seconds"] = round(time.monotonic() - began)
    _store(results, out)
    ranks = [stored for stored in results["tables"] if stored["suite"] == "ranks"]
    if ranks:
        print(f"\n{table.dealt(ranks)}")
    if results["growth"]:
        print(f"\n{table.growth(results['growth'])}")
    print(f"\n{table.machine(results['machine'], results['speeds'])}\n")
    print(table.legend())
    return results


def blocks_of(suite: str, blocks: int) -> int:
    """A round of whole steps takes a minute by itself."""
    return 1 if suite == "step" else blocks


def ordered(suites: Mapping[str, Tables], place: Place, size: str, blocks: int) -> Iterator[tuple[int, Table]]:
    """A block of every suite's tables, then the next block, then every suite's series: what is stopped early has the
    tables. A suite builds its tables anew in each block."""
    waiting: dict[str, Iterator[Table]] = {}
    for block in range(blocks):
        for suite, tables in suites.items():
            of_suite = blocks_of(suite, blocks)
            made = tables(place, size) if block < of_suite else iter(())
            for table in made:
                if table.axis:
                    if block == of_suite - 1:
                        waiting[suite] = chain([table], made)
                    break
                yield block, table
    for suite in suites:
        for table in waiting.get(suite, ()):
            yield 0, table


def _store(results: dict[str, Any], out: Path) -> None:
    draft = out / ".results.json"  # a full disk or a kill leaves the tables that are done
    draft.write_text(json.dumps(results, indent=1) + "\n")
    draft.replace(out / "results.json")


def rate(results: dict[str, Any], cache: int) -> None:
    """Floors and shares of every table, by the best speeds so far."""
    from .roofline import Work

    for stored in results["tables"]:
        stored["floor_ms"] = Work(**stored["work"]).floor_ms(results["speeds"], stored["dtype"], cache)
        for row in stored["rows"]:
            row["share"] = None if row["ms"] is None else stored["floor_ms"] / row["ms"]
