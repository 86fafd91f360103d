"""The commands of docs/benchmarks.md, small: every case runs, and each checks what it timed."""

import os
import subprocess
import sys

from benchmarks import bench_advantages, bench_linear_loss, bench_params, bench_token_loss
from tests import ROOT


def test_every_benchmark_runs_under_pytest_benchmark():
    command = [sys.executable, "-m", "pytest", "benchmarks", "--benchmark-only", "-q", "--no-header"]
    environment = os.environ.copy()
    environment.pop("PYTEST_XDIST_WORKER", None)  # where it is set pytest-benchmark refuses
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    modules = bench_advantages, bench_linear_loss, bench_params, bench_token_loss
    cases = sum(len(module.SMALL) for module in modules)
    assert done.returncode == 0 and f"{cases} passed" in done.stdout, done.stdout[-3000:] + done.stderr
