"""Measures what docs/benchmarks.md and the README show and writes them: python -m tools.measure [--cpu-time]

Half an hour on two cores that do nothing else. --cpu-time where others use them too: whole steps are then
on one thread, since two of them wait for each other.
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
    "bench": ("redit_fast", "bench", *(suite for suite in SUITES if suite != "step")),
    "step": ("redit_fast", "bench", "step"),
    "apply_hosts": ("benchmarks.bench_apply_hosts",),
}

if __name__ == "__main__":
    for name, words in COMMANDS.items():
        out = ROOT / "build" / "measured" / name
        threads = {"OMP_NUM_THREADS": "1"} if name == "step" and "--cpu-time" in sys.argv else {}
        command = [sys.executable, "-m", *words, "--out", str(out), *sys.argv[1:]]
        subprocess.run(command, cwd=ROOT, check=True, env=os.environ | threads)
    for name in COMMANDS:  # when all have run, so that every card names a commit without changes
        shutil.copy(ROOT / "build" / "measured" / name / "results.json", RESULTS / f"{name}.json")
    tables.write()
    step_picture.PICTURE.write_bytes(step_picture.draw())
