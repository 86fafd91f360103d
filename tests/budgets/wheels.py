"""The bytes of the wheels that setup.py builds: without a compiler, with one, and with nvcc for its default
architectures."""

import os
import sys
import tempfile
from pathlib import Path

from tests.project.test_install import NO_COMPILER, checkout, only, run

WHEELS = {"pure Python": NO_COMPILER, "with _cpu": {}, "with _cpu and _cuda": {"REDIT_FAST_CUDA": "1"}}


def count():
    os.environ.pop("TORCH_CUDA_ARCH_LIST", None)
    found = {}
    for name, env in WHEELS.items():
        with tempfile.TemporaryDirectory() as folder:
            source = checkout(Path(folder, "source"))
            run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", folder, cwd=source, **env)
            found[name] = {"wheel bytes": only(Path(folder), "*.whl").stat().st_size}
    return found
