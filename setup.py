"""Builds redit_fast._cpu (csrc/cpu, C++17) where a compiler works and redit_fast._cuda (csrc/cuda) where nvcc does;
without them the package installs as pure Python.

Nothing here imports or links PyTorch: the modules take raw pointers, so they build in an isolated environment and the
same binaries serve every torch version. `redit-fast info` says which backends an installation has.
"""

import os
import sys
import time
from glob import glob
from pathlib import Path

import pybind11
from pybind11.setup_helpers import ParallelCompile
from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

sys.path.insert(0, str(Path(__file__).parent))  # pip does not put this folder there
import setup_cuda

# x86-64 baseline (no -march): the wheel runs on every machine. No contraction and no fast-math: the results are pinned
# to the bit, and linking with -ffast-math would switch the whole process to flush-to-zero. Without errno sqrt is one
# instruction, correctly rounded, and loops around it are vectorised.
FLAGS = ["-std=c++17", "-O3", "-g0", "-fvisibility=hidden", "-ffp-contract=off", "-fno-fast-math", "-fno-math-errno"]
# Compiled for OpenMP and linked to no OpenMP library: the symbols resolve to the runtime that torch has loaded, so that
# the process has one (see redit_fast/backends/cpu/). Apple's clang has no -fopenmp; there the ops run on one thread.
OPENMP = ["-fopenmp"] if sys.platform.startswith("linux") else []

LINKED = {  # package -> folder
    "redit_fast.kernels": "kernels",
    "redit_fast.benchmarks": "benchmarks",
    "redit_fast.benchmarks.reproduction": "benchmarks/reproduction",
}

cpu = Extension(
    "redit_fast._cpu",
    sources=sorted(glob("csrc/cpu/*.cpp")),
    depends=sorted(glob("csrc/*/*.h")),
    include_dirs=["csrc", pybind11.get_include()],
    extra_compile_args=FLAGS + OPENMP,
    language="c++",
    optional=True,
)

cuda = Extension(
    "redit_fast._cuda",
    sources=sorted(glob("csrc/cuda/*.cpp")),
    include_dirs=["csrc", pybind11.get_include()],
    extra_compile_args=FLAGS,
    language="c++",
    optional=setup_cuda.CHOICE == "auto",
)


class Build(build_ext):
    def run(self):
        modules = [self.get_ext_filename(ext.name) for ext in (cpu, cuda)]
        for module in modules:  # of an earlier build, perhaps with other settings
            Path(self.build_lib, module).unlink(missing_ok=True)
        super().run()
        for module in modules if self.inplace else ():
            if not Path(self.build_lib, module).exists():
                Path(module).unlink(missing_ok=True)

    def build_extension(self, ext):
        if ext is not cuda:
            return super().build_extension(ext)
        start = time.monotonic()
        if setup_cuda.CHOICE == "auto" and setup_cuda.find_nvcc()[0] is None:
            print("redit_fast._cuda: left out, there is no nvcc")
            return
        try:
            made_by = setup_cuda.compile_kernels(ext, sorted(glob("csrc/cuda/*.cu"), key=os.path.getsize)[::-1])
            super().build_extension(ext)
        except OSError as error:
            raise CompileError(str(error)) from error
        print(f"redit_fast._cuda: {made_by}, {time.monotonic() - start:.0f} s", flush=True)


ParallelCompile().install()  # a source on each core
setup(
    # kernels/ has no __init__.py (a top-level package of that name would shadow Hugging Face's), so it is named here;
    # benchmarks/ too: an sdist has no links, through which it is found in a checkout.
    packages=sorted({*find_packages(include=["redit_fast", "redit_fast.*"]), *LINKED}),
    package_dir=LINKED,
    include_package_data=False,  # MANIFEST.in is the sdist's
    package_data={
        "redit_fast": ["py.typed", "training/report/page.*", "examples/word_problems.*"],
        "redit_fast.benchmarks": ["*.j2", "lengths.json"],
    },
    ext_modules=[cpu] if setup_cuda.CHOICE == "0" else [cuda, cpu],  # REDIT_FAST_CUDA=1 without nvcc fails at once
    cmdclass={"build_ext": Build},
)
