"""Candidates measured side by side: in turn, round by round, in one process, with every result checked off the clock.

    def make():                  # builds what the candidate holds, gives the function that is run every round
        state = ...
        def run():
            reset(state)
            with clock:          # only this is timed
                out = pass_(state)
            check(out)           # raises
        return run

    rows = measure([Candidate("ours", bytes, make), Candidate("torch", bytes, make_torch, baseline=True)], rounds=9)

The same candidates run under pytest-benchmark with `@pytest.mark.benchmark(timer=clock)` and `benchmark.pedantic`.
"""

import argparse
import ctypes
import gc
import json
import os
import platform
import re
import subprocess
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median, quantiles

import torch

LIBC = ctypes.CDLL(None)
COPIED = 32 * 2**20  # float32 elements of the copy that speeds are compared with: 128 MB, four times the L3 cache here


class Clock:
    """Seconds spent inside `with clock:`; calling it reads them."""

    def __init__(self):
        self.seconds, self.timer = 0.0, time.perf_counter

    def __enter__(self):
        _wait()
        self.started = self.timer()

    def __exit__(self, *error):
        _wait()
        self.seconds += self.timer() - self.started

    def __call__(self):
        return self.seconds


def _wait():
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


clock = Clock()


@dataclass
class Candidate:
    name: str
    bytes: int  # that it has to move
    make: Callable[[], Callable[[], None]]
    baseline: bool = False
    flops: int = 0  # of its products, where they and not the bytes take the time


@dataclass
class Row:
    name: str
    ms: float
    p10: float
    p90: float
    gb_per_s: float
    of_copy: float  # above 1 where a pass works in place: a copy's stores also read the lines that they fill
    peak_mb: float  # resident memory that making it and its first run add at their peak: state, copies, temporaries
    gflop_per_s: float
    ratios: dict[str, float] = field(default_factory=dict)  # baseline -> how many times faster than it


def measure(candidates: list[Candidate], rounds: int, device: str = "cpu") -> list[Row]:
    """The copy's row, then one for each candidate; ratios are medians over the rounds."""
    copied = COPIED if device == "cpu" else 16 * COPIED
    candidates = [Candidate("torch copy_", 8 * copied, lambda: _make_copy(copied, device)), *candidates]
    runs, peaks, seconds = {}, {}, {candidate.name: [] for candidate in candidates}
    for candidate in candidates:
        first_run = _first_run if device == "cpu" else _first_run_on_cuda
        runs[candidate.name], peaks[candidate.name] = first_run(candidate.make)
    for _ in range(rounds):
        for name, run in runs.items():
            before = clock()
            run()
            seconds[name].append(clock() - before)
    copy_speed = 8 * copied / median(seconds["torch copy_"])
    rows = []
    for candidate in candidates:
        taken = seconds[candidate.name]
        tenths, speed = quantiles(taken, n=10, method="inclusive"), candidate.bytes / median(taken)
        row = Row(candidate.name, 1e3 * median(taken), 1e3 * tenths[0], 1e3 * tenths[-1], speed / 1e9,
                  speed / copy_speed, peaks[candidate.name] / 1e6, candidate.flops / median(taken) / 1e9)  # fmt: skip
        if not candidate.baseline and candidate is not candidates[0]:
            for other in candidates:
                if other.baseline:
                    pairs = zip(seconds[other.name], taken, strict=True)
                    row.ratios[other.name] = median(theirs / ours for theirs, ours in pairs)
        rows.append(row)
    return rows


def _make_copy(copied, device):
    source, target = torch.randn(copied, device=device), torch.empty(copied, device=device)

    def run():
        with clock:
            target.copy_(source)
        assert target[-1] == source[-1]

    return run


def _first_run(make):
    """The run function and the bytes by which the process grew at its peak (NaN where Linux does not count them)."""
    gc.collect()
    if hasattr(LIBC, "malloc_trim"):
        LIBC.malloc_trim(0)  # else what earlier candidates freed is used again unseen
    try:
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from what is resident now
    except OSError:
        run = make()
        run()
        return run, float("nan")
    before = _resident("VmRSS")
    run = make()
    run()
    return run, _resident("VmHWM") - before


def _first_run_on_cuda(make):
    """The run function and the bytes that its first run allocates at their peak."""
    run = make()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run()
    return run, torch.cuda.max_memory_allocated() - before


def _resident(name):
    return 1024 * int(re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1])


def show(title: str, rows: list[Row]) -> None:
    width = max(len(row.name) for row in rows)
    flops = any(row.gflop_per_s for row in rows)
    print(f"\n{title}\n{'':{width}}   median ms [p10, p90]      GB/s  of copy  peak MB  "
          f"{'GFLOP/s  ' if flops else ''}times faster than")  # fmt: skip
    for row in rows:
        ratios = ", ".join(f"{name} {ratio:.2f}" for name, ratio in row.ratios.items())
        spread = f"{row.ms:8.2f} [{row.p10:.2f}, {row.p90:.2f}]"
        products = f"{row.gflop_per_s:7.0f}  " if flops else ""
        print(f"{row.name:{width}}  {spread:26}{row.gb_per_s:6.1f}  {row.of_copy:6.0%}  {row.peak_mb:7.0f}  "
              f"{products}{ratios}")  # fmt: skip


def machine() -> dict:
    names = re.findall(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text()) if os.path.exists("/proc") else []
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=Path(__file__).parent)
    return {
        "cpu": names[0] if names else platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "clock": clock.timer.__name__,
        "torch": torch.__version__,
        "commit": commit.stdout.strip() or None,
    }


def main(tables: Callable[[bool], dict[str, list[Row]]]) -> None:
    """The command line of a bench file: `tables(small)` measures, shows and returns its tables."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--small", action="store_true", help="seconds instead of minutes; sizes that fit a cache")
    parser.add_argument("--json", type=Path, help="also write the results there")
    parser.add_argument("--cpu-time", action="store_true", help="of all threads, where others use the cores too")
    arguments = parser.parse_args()
    if arguments.cpu_time:
        clock.timer = time.process_time
    print(machine())
    results = {title: [asdict(row) for row in rows] for title, rows in tables(arguments.small).items()}
    if arguments.json:
        arguments.json.write_text(json.dumps({"machine": machine(), "tables": results}, indent=1) + "\n")
