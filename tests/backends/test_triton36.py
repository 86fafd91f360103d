"""What Triton 3.6 compiles, which GPU machines have: the gates of tests/backends/test_triton.py in an environment that
`make` sets up, with numpy < 2.4 and the torch of these tests."""

import os
import subprocess

import pytest

from tests import NO_PLUGINS, ROOT

PYTHON = ROOT / ".venv-triton36" / "bin" / "python"
SCRIPT = "import sys, pytest, triton; print(triton.__version__, flush=True); sys.exit(pytest.main(sys.argv[1:]))"

# `make test` takes what ships as default: bfloat16 without softcap, for sm_90. All of it takes several processes.
ALL = "KERNEL_ARCHS" in os.environ
CASES = "sm_" if ALL else "sm_90 and not 30.0"
GATES = ["token_kernels", "advantages", "not token_kernels and not advantages"] if ALL else [""]


@pytest.mark.skipif(not PYTHON.exists(), reason="no .venv-triton36: make test sets it up on Linux")
@pytest.mark.parametrize("gates", GATES)
def test_the_gates_hold_for_triton_3_6(gates):
    cases = f"{CASES} and {gates}" if gates else CASES
    options = ("-q", "-p", "no:cacheprovider", "-k", cases, "tests/backends/test_triton.py")
    command = [PYTHON, "-c", SCRIPT, *options]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | NO_PLUGINS, capture_output=True, text=True)
    version, _, report = done.stdout.partition("\n")
    assert done.returncode == 0 and " passed" in report, report + done.stderr
    assert version == "3.6.0"
