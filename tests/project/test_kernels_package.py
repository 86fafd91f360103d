"""kernels/ is `redit_fast.kernels` and nothing else."""

import importlib.util
import os
import subprocess
import sys

import pytest

from tests import ROOT


def test_the_folder_is_a_namespace_reached_through_a_relative_link():
    assert not (ROOT / "kernels" / "__init__.py").exists()  # it would shadow Hugging Face's package `kernels`
    assert os.readlink(ROOT / "redit_fast" / "kernels") == "../kernels"
    spec = importlib.util.find_spec("redit_fast.kernels.element")
    assert os.path.samefile(spec.origin, ROOT / "kernels" / "element.py")


def test_a_regular_package_called_kernels_wins_over_the_folder(tmp_path):
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text("OWNER = 'hugging face'\n")
    script = "import sys, kernels; print(sys.path[0] == '', kernels.OWNER)"
    env = os.environ | {"PYTHONPATH": str(tmp_path)}
    result = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, env=env, capture_output=True, text=True, check=True
    )
    assert result.stdout.split() == ["True", "hugging", "face"]


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_the_triton_philox_gives_the_words_of_the_definition():
    command = [sys.executable, "-m", "tests.backends.philox_twin"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.stdout == "equal\n", result.stderr
