"""Everything that a CUDA machine can show, in one go: python3 -m tools.gpu_check OUT, or make gpu-check OUT=DIR

Installs nothing: the python3 that runs it needs torch, triton and pytest. Builds the compiled modules, runs the tests
marked gpu with each backend forced and the self-test, then `redit-fast bench --device cuda`, whose tables come before
its series, then some tests under compute-sanitizer where that is installed. It goes on after a failure, each part for
at most its own time, 540 s in all. Leaves gpu_check.json, gpu_check.txt, the output of every part, and the benchmark's
results in OUT.
"""

import argparse
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch

from redit_fast.benchmarks import machine, report
from redit_fast.benchmarks.place import here

ROOT = Path(__file__).parent.parent
SECONDS = 540
# Of the tests on a GPU what needs one, and those whose subject is the device: 93 cases of a backend. `make test` there
# runs all 1,358; a new regime compiles kernels for seconds.
TESTS = ("tests/ops/test_gpu.py", "tests/ops/test_token_loss.py", "tests/ops/test_linear_rows.py",
         "tests/ops/test_linear_loss.py", "tests/backends/test_params.py")  # fmt: skip
PYTEST = (sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "gpu", *TESTS)
CASES = "test_gpu or strides or poisoned or same_bits or 70_000 or float32_exact or combined or transposed"
Parts = dict[str, tuple[int, tuple[str, ...]]]


def parts(folder: Path, capability: tuple[int, int]) -> Parts:
    """name -> seconds at most, command. `capability` is the device's, (9, 0) for an H100 or H200."""
    major, minor = capability
    built: tuple[str, ...] = ()
    if nvcc := shutil.which("nvcc"):
        built = ("env", "REDIT_FAST_CUDA=1", f"TORCH_CUDA_ARCH_LIST={major}.{minor}{'a' * (major == 9)}")
    found: Parts = {"build": (60, (*built, sys.executable, "setup.py", "-q", "build_ext", "--inplace"))}
    if nvcc:
        found["tests-cuda"] = (70, (*PYTEST, "-k", f"cuda-cuda and ({CASES})"))
    found["tests-triton"] = (100, (*PYTEST, "-k", f"triton-cuda and not dtype2 and ({CASES})"))
    found["selftest"] = (30, (sys.executable, "-m", "redit_fast", "selftest"))
    sanitizers: Parts = {}
    if sanitizer := shutil.which("compute-sanitizer"):
        cases = f"{'cuda' if nvcc else 'triton'}-cuda and (strides or (poisoned and 31))"
        for tool in ("memcheck", "racecheck", "synccheck"):
            command = (sanitizer, "--tool", tool, "--error-exitcode", "1", *PYTEST, "-k", cases)
            sanitizers[f"sanitizer-{tool}"] = (20, command)
    left = SECONDS - sum(seconds for seconds, _ in (found | sanitizers).values())
    bench = (sys.executable, "-m", "redit_fast", "bench", "--device", "cuda", "--out", str(folder / "bench"))
    return found | {"bench": (left, bench)} | sanitizers


def run(name: str, seconds: int, command: tuple[str, ...], folder: Path) -> dict:
    started = time.monotonic()
    with (folder / f"{name}.log").open("w") as log:
        try:
            code = subprocess.run(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, timeout=seconds).returncode
        except subprocess.TimeoutExpired:
            code = None
    outcome = {0: "ok", None: f"stopped after {seconds} s"}.get(code, f"exit code {code}")
    return {"outcome": outcome, "seconds": round(time.monotonic() - started, 1)}


def check(folder: Path, planned: Parts, card: dict) -> int:
    """Runs the parts, writes the report; 1 where a part is not ok."""
    done = {}
    for name, (seconds, command) in planned.items():
        done[name] = run(name, seconds, command, folder)
        print(f"{name}: {done[name]['outcome']}, {done[name]['seconds']} s", flush=True)
    stored = folder / "bench" / "results.json"
    results = json.loads(stored.read_text()) if stored.exists() else None
    lines = [f"{name}: {result['outcome']}, {result['seconds']} s" for name, result in done.items()]
    if results is not None:
        report.write(results, folder / "bench")  # also where the benchmark was stopped
        lines += ["", report.text(results)]
    (folder / "gpu_check.json").write_text(
        json.dumps({"machine": card, "parts": done, "bench": results}, indent=1) + "\n"
    )
    (folder / "gpu_check.txt").write_text("\n".join(lines) + "\n")
    print("\n" + "\n".join(lines))
    return 0 if all(result["outcome"] == "ok" for result in done.values()) else 1


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    folder = parser.parse_args().out.resolve()
    if not torch.cuda.is_available():
        parser.error("torch sees no CUDA device here")
    folder.mkdir(parents=True, exist_ok=True)
    return check(folder, parts(folder, torch.cuda.get_device_capability()), machine.card(here("cuda")))


if __name__ == "__main__":
    sys.exit(main())
