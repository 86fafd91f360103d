"""Everything that a CUDA machine can show, in one go: python3 -m benchmarks.gpu_check OUT, or make gpu-check OUT=DIR

Installs nothing: the python3 that runs it needs torch, triton and pytest. Builds the compiled modules, runs the tests
marked gpu with each backend forced, some of them under compute-sanitizer where that is installed, the self-test and
the benchmarks; goes on after a failure, each part for at most its own time, 570 s in all. Leaves gpu_check.json,
gpu_check.txt and the output of every part in OUT.
"""

import argparse
import json
import platform
import shutil
import subprocess
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from benchmarks.common import machine

ROOT = Path(__file__).parent.parent
# Of the tests on a GPU what needs one, and those whose subject is the device: 93 cases of a backend. `make test` there
# runs all 1,358; a new regime compiles kernels for seconds.
TESTS = ("tests/ops/test_gpu.py", "tests/ops/test_token_loss.py", "tests/ops/test_linear_rows.py",
         "tests/ops/test_linear_loss.py", "tests/backends/test_params.py")  # fmt: skip
PYTEST = (sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "gpu", *TESTS)
CASES = "test_gpu or strides or poisoned or same_bits or 70_000 or float32_exact or combined or transposed"
PACKAGES = ("torch", "triton", "transformers", "trl", "liger-kernel")


def parts(folder: Path, capability: tuple[int, int]) -> dict[str, tuple[int, tuple[str, ...]]]:
    """name -> seconds at most, command. `capability` is the device's, (9, 0) for an H100 or H200."""
    major, minor = capability
    built: tuple[str, ...] = ()
    if nvcc := shutil.which("nvcc"):
        built = ("env", "REDIT_FAST_CUDA=1", f"TORCH_CUDA_ARCH_LIST={major}.{minor}{'a' * (major == 9)}")
    found = {"build": (60, (*built, sys.executable, "setup.py", "-q", "build_ext", "--inplace"))}
    if nvcc:
        found["tests-cuda"] = (70, (*PYTEST, "-k", f"cuda-cuda and ({CASES})"))
    found["tests-triton"] = (110, (*PYTEST, "-k", f"triton-cuda and not dtype2 and ({CASES})"))
    found["selftest"] = (40, (sys.executable, "-m", "redit_fast", "selftest"))
    for group, seconds in (("forward", 30), ("gradient", 35), ("head-896", 30), ("head-3584", 40), ("step", 35)):
        found[group] = (seconds, _bench(folder, group, group))
    if nvcc:  # else these are of Triton already
        for group, seconds in (("forward", 25), ("gradient", 35)):
            name = f"{group}-triton"
            found[name] = (seconds, ("env", "REDIT_FAST_BACKEND=triton", *_bench(folder, group, name)))
    if sanitizer := shutil.which("compute-sanitizer"):
        cases = f"{'cuda' if nvcc else 'triton'}-cuda and (strides or (poisoned and 31))"
        for tool in ("memcheck", "racecheck", "synccheck"):
            command = (sanitizer, "--tool", tool, "--error-exitcode", "1", *PYTEST, "-k", cases)
            found[f"sanitizer-{tool}"] = (20, command)
    return found


def _bench(folder: Path, group: str, name: str) -> tuple[str, ...]:
    return sys.executable, "-m", "benchmarks.bench_gpu", group, "--json", str(folder / f"{name}.json")


def run(name: str, seconds: int, command: tuple[str, ...], folder: Path) -> dict:
    started = time.monotonic()
    with (folder / f"{name}.log").open("w") as log:
        try:
            code = subprocess.run(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, timeout=seconds).returncode
        except subprocess.TimeoutExpired:
            code = None
    outcome = {0: "ok", None: f"stopped after {seconds} s"}.get(code, f"exit code {code}")
    return {"outcome": outcome, "seconds": round(time.monotonic() - started, 1)}


def device() -> dict:
    fields = ("name", "driver_version", "clocks.sm", "clocks.mem", "clocks.max.sm", "memory.total")
    query = ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader"]
    if not shutil.which(query[0]):
        return {}
    lines = subprocess.run(query, capture_output=True, text=True).stdout.splitlines()
    return dict(zip(fields, lines[0].split(", "), strict=False)) if lines else {}


def versions() -> dict:
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    return found


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    folder = parser.parse_args().out.resolve()
    if not torch.cuda.is_available():
        parser.error("torch sees no CUDA device here")
    folder.mkdir(parents=True, exist_ok=True)
    results = {}
    for name, (seconds, command) in parts(folder, torch.cuda.get_device_capability()).items():
        results[name] = run(name, seconds, command, folder)
        print(f"{name}: {results[name]['outcome']}, {results[name]['seconds']} s", flush=True)
    tables = {}
    for name in results:
        measured = folder / f"{name}.json"
        tables |= json.loads(measured.read_text())["tables"] if measured.exists() else {}
    report = {
        "device": device(),
        "versions": versions(),
        "machine": machine(),
        "parts": results,
        "tables": tables,
    }
    (folder / "gpu_check.json").write_text(json.dumps(report, indent=1) + "\n")
    lines = [f"{report['device'].get('name', 'no NVIDIA device')}, driver {report['device'].get('driver_version')}"]
    lines += [f"{name}: {result['outcome']}, {result['seconds']} s" for name, result in results.items()]
    for title, rows in report["tables"].items():
        lines += ["", title]
        lines += [f"  {row['name']:36} {row['ms']:9.3f} ms [{row['p10']:.3f}, {row['p90']:.3f}], {row['of_copy']:.0%} "
                  f"of a copy, {row['peak_mb']:.0f} MB" for row in rows]  # fmt: skip
    (folder / "gpu_check.txt").write_text("\n".join(lines) + "\n")
    print("\n" + "\n".join(lines))
    return 0 if all(result["outcome"] == "ok" for result in results.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
