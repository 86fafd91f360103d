"""Measures what docs/benchmarks.md and the README show and writes them: python -m tools.measure [FILE ...] [--cpu-time]

Half an hour on two cores that do nothing else; less where only some of the files are named. --cpu-time where others
use them too: whole steps are then on one thread, since two of them wait for each other.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from redit_fast.benchmarks import SUITES
from tools import step_picture, tables

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "cpu"
COMMANDS = {  # file of results -> what writes it
    "bench": ("redit_fast", "bench", *(suite for suite in SUITES if suite not in ("step", "ranks"))),
    "step": ("redit_fast", "bench", "step"),
    "ranks": ("redit_fast", "bench", "ranks"),
    "apply_hosts": ("benchmarks.bench_apply_hosts",),
}

if __name__ == "__main__":
    chosen = [word for word in sys.argv[1:] if word != "--cpu-time"] or list(COMMANDS)
    if unknown := [word for word in chosen if word not in COMMANDS]:
        raise SystemExit(f"unknown file {unknown[0]!r}, must be one of {', '.join(COMMANDS)}")
    options = ["--cpu-time"] if "--cpu-time" in sys.argv else []
    for name in chosen:
        out = ROOT / "build" / "measured" / name
        threads = {"OMP_NUM_THREADS": "1"} if name == "step" and options else {}
        command = [sys.executable, "-m", *COMMANDS[name], "--out", str(out), *options]
        subprocess.run(command, cwd=ROOT, check=True, env=os.environ | threads)
    for name in chosen:  # when all have run, so that every card names a commit without changes
        shutil.copy(ROOT / "build" / "measured" / name / "results.json", RESULTS / f"{name}.json")
    tables.write()
    step_picture.PICTURE.write_bytes(step_picture.draw())
