"""Measures what docs/benchmarks.md and the README show and writes them: python -m tools.measure [--cpu-time]

About 11 minutes on two cores that do nothing else; --cpu-time where others use them too.
"""

import shutil
import subprocess
import sys
from pathlib import Path

from tools import step_picture, tables

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "cpu"
COMMANDS = {  # file of results -> what writes it
    "bench": ("redit_fast", "bench"),
    "trl": ("benchmarks.bench_trl",),
    "verl": ("tests.integrations.bench_verl",),
    "apply_hosts": ("benchmarks.bench_apply_hosts",),
}

if __name__ == "__main__":
    for name, words in COMMANDS.items():
        out = ROOT / "build" / "measured" / name
        subprocess.run([sys.executable, "-m", *words, "--out", str(out), *sys.argv[1:]], cwd=ROOT, check=True)
        shutil.copy(out / "results.json", RESULTS / f"{name}.json")
    tables.write()
    step_picture.PICTURE.write_bytes(step_picture.draw())
