"""Measures what docs/benchmarks.md and the README show and writes them: python -m tools.measure [--cpu-time]

About 25 minutes on two cores that do nothing else; --cpu-time where others use them too. Whole steps are measured
in CPU seconds of one thread in any case.
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
    "step": ("redit_fast", "bench", "step", "--cpu-time"),
    "trl": ("benchmarks.bench_trl",),
    "verl": ("tests.integrations.bench_verl",),
    "apply_hosts": ("benchmarks.bench_apply_hosts",),
}

if __name__ == "__main__":
    for name, words in COMMANDS.items():
        out = ROOT / "build" / "measured" / name
        threads = {"OMP_NUM_THREADS": "1"} if name == "step" else {}
        command = [sys.executable, "-m", *words, "--out", str(out), *sys.argv[1:]]
        subprocess.run(command, cwd=ROOT, check=True, env=os.environ | threads)
        shutil.copy(out / "results.json", RESULTS / f"{name}.json")
    tables.write()
    step_picture.PICTURE.write_bytes(step_picture.draw())
