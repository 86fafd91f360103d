"""Builds redit_fast._cpu (csrc/, C++17) where a compiler works; without one the package installs as pure Python.

Nothing here imports or links PyTorch: the module takes raw pointers, so it builds in an isolated environment and the
same binary serves every torch version. `redit-fast info` says which backends an installation has.
"""

import sys
from glob import glob

import pybind11
from pybind11.setup_helpers import ParallelCompile
from setuptools import Extension, find_packages, setup

# x86-64 baseline (no -march): the wheel runs on every machine. No contraction and no fast-math: the results are pinned
# to the bit, and linking with -ffast-math would switch the whole process to flush-to-zero. Without errno sqrt is one
# instruction, correctly rounded, and loops around it are vectorised.
FLAGS = ["-std=c++17", "-O3", "-g0", "-fvisibility=hidden", "-ffp-contract=off", "-fno-fast-math", "-fno-math-errno"]
# Compiled for OpenMP and linked to no OpenMP library: the symbols resolve to the runtime that torch has loaded, so that
# the process has one (see redit_fast/backends/cpu/). Apple's clang has no -fopenmp; there the ops run on one thread.
OPENMP = ["-fopenmp"] if sys.platform.startswith("linux") else []

cpu = Extension(
    "redit_fast._cpu",
    sources=sorted(glob("csrc/cpu/*.cpp")),
    depends=sorted(glob("csrc/*/*.h")),
    include_dirs=["csrc", pybind11.get_include()],
    extra_compile_args=FLAGS + OPENMP,
    language="c++",
    optional=True,
)

ParallelCompile().install()  # a source on each core
setup(
    # kernels/ has no __init__.py (a top-level package of that name would shadow Hugging Face's), so it is named here.
    packages=[*find_packages(include=["redit_fast", "redit_fast.*"]), "redit_fast.kernels"],
    package_dir={"redit_fast.kernels": "kernels"},
    package_data={"redit_fast": ["py.typed"]},
    ext_modules=[cpu],
)
