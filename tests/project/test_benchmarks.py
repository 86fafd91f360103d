"""The commands of docs/benchmarks.md, small: every case runs, and each checks what it timed."""

import os
import subprocess
import sys

import pytest

from benchmarks import bench_advantages, bench_linear_loss, bench_params, bench_token_loss, gpu_check
from tests import ROOT


def test_every_benchmark_runs_under_pytest_benchmark():
    command = [sys.executable, "-m", "pytest", "benchmarks", "--benchmark-only", "-q", "--no-header"]
    environment = os.environ.copy()
    environment.pop("PYTEST_XDIST_WORKER", None)  # where it is set pytest-benchmark refuses
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    modules = bench_advantages, bench_linear_loss, bench_params, bench_token_loss
    cases = sum(len(module.SMALL) for module in modules)
    assert done.returncode == 0 and f"{cases} passed" in done.stdout, done.stdout[-3000:] + done.stderr


@pytest.mark.parametrize("tools", [(), ("nvcc",), ("nvcc", "compute-sanitizer")])
def test_the_parts_of_gpu_check_fit_their_time_and_name_what_there_is(tools, tmp_path, monkeypatch):
    for tool in tools:
        (tmp_path / tool).touch(mode=0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    parts = gpu_check.parts(tmp_path / "out", (9, 0))
    assert 300 < sum(seconds for seconds, _ in parts.values()) <= 570
    assert ("TORCH_CUDA_ARCH_LIST=9.0a" in parts["build"][1]) == ("tests-cuda" in parts) == bool(tools)
    assert sum(name.startswith("sanitizer-") for name in parts) == 3 * ("compute-sanitizer" in tools)
    assert all((ROOT / path).is_file() for path in gpu_check.TESTS)


def test_gpu_check_selects_tests(tmp_path):
    """Without a GPU there are no ids of one: those of the reference on the CPU stand for them."""
    cases = gpu_check.parts(tmp_path, (9, 0))["tests-triton"][1][-1].replace("triton-cuda", "reference")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "--collect-only", "-q", *gpu_check.TESTS, "-k", cases],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and "tests collected" in done.stdout, done.stdout[-2000:]
