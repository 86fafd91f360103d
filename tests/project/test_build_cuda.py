"""Builds of the package with and without nvcc; the real redit_fast._cuda: what it links, shows, loads and weighs."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import time
import venv
import zipfile
from pathlib import Path

import pybind11
import pytest

from tests import ROOT
from tests.project.fake_nvcc import Toolkit
from tests.project.test_install import NO_COMPILER, checkout, only, python, run
from tests.project.test_setup_cuda import NVCC, REFUSED, SETTINGS


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return checkout(tmp_path_factory.mktemp("cuda") / "source")


@pytest.fixture(scope="module")
def hidden(tmp_path_factory):
    """For PYTHONPATH: no nvcc is found but in CUDA_HOME."""
    folder = tmp_path_factory.mktemp("hidden")
    (folder / "sitecustomize.py").write_text(
        "import os\naccess, home = os.access, os.environ.get('CUDA_HOME', '//')\n"
        "os.access = lambda path, *mode: (not str(path).endswith('nvcc') or str(path).startswith(home)) "
        "and access(path, *mode)\n"
    )
    return folder


def outcome(*command, cwd, **env):
    """Exit code and all that it printed, without the settings of this process."""
    clean = {name: value for name, value in os.environ.items() if name not in SETTINGS}
    done = subprocess.run(
        command, cwd=cwd, env=clean | env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    return done.returncode, done.stdout


def test_a_build_that_must_have_cuda_stops_at_once_without_nvcc(source, hidden):
    start = time.monotonic()
    code, said = outcome(sys.executable, "setup.py", "build", cwd=source, REDIT_FAST_CUDA="1", PYTHONPATH=str(hidden))
    assert code == 1 and time.monotonic() - start < 5
    assert (
        "error: REDIT_FAST_CUDA=1 and no nvcc; looked for CUDA_HOME (not set), CUDA_PATH (not set), PATH (no " in said
    )
    assert "/usr/local/cuda/bin/nvcc" in said and "csrc/cpu" not in said


def wheel_of(source, folder, **env):
    """The names in the wheel, and what its build printed; no isolation, no C++ compiler."""
    build = (sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", folder)
    code, said = outcome(*build, cwd=source, **NO_COMPILER, **env)
    assert code == 0, said
    with zipfile.ZipFile(only(folder, "*.whl")) as archive:
        return archive.namelist(), said


def test_without_nvcc_the_package_installs_and_one_line_says_so(source, hidden, tmp_path):
    names, said = wheel_of(source, tmp_path, PYTHONPATH=str(hidden))
    assert "redit_fast/ops/token_loss.py" in names and not any("_cuda." in name for name in names)
    assert [line for line in said.splitlines() if "_cuda" in line] == ["redit_fast._cuda: left out, there is no nvcc"]


@pytest.mark.parametrize("fault", ["refuses", "no program", "no folder"])
def test_where_nvcc_fails_the_package_installs_with_one_warning(source, hidden, tmp_path, fault):
    toolkit = Toolkit(tmp_path / "toolkit")
    if fault == "refuses":
        toolkit.say("-MF", REFUSED, code=1)
        sentence = "nvcc refuses the host compiler: GNU version! gcc versions later than 15"
    elif fault == "no program":
        toolkit.nvcc.write_bytes(b"\x7fELF")
        sentence = "Exec format error"
    else:
        shutil.copytree(source, tmp_path / "source")
        source = tmp_path / "source"
        (source / "build").mkdir(exist_ok=True)
        shutil.rmtree(source / "build" / "cuda", ignore_errors=True)
        (source / "build" / "cuda").write_text("a file where the objects are to go")
        sentence = "Not a directory"
    names, said = wheel_of(source, tmp_path, CUDA_HOME=str(toolkit.home), PYTHONPATH=str(hidden))
    assert "redit_fast/ops/token_loss.py" in names and not any("_cuda." in name for name in names)
    (warning,) = [line for line in said.splitlines() if re.search("warning.*_cuda", line)]
    assert sentence in warning


def test_a_module_of_an_earlier_build_is_not_left_where_this_one_has_none(source, tmp_path):
    shutil.copytree(source, tmp_path / "source")
    source = tmp_path / "source"
    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    platform = f"build/lib.{sysconfig.get_platform()}-{sys.implementation.cache_tag}"
    in_place = {name: source / "redit_fast" / f"{name}{suffix}" for name in ("_cpu", "_cuda")}
    to_ship = {name: source / platform / "redit_fast" / f"{name}{suffix}" for name in ("_cpu", "_cuda")}
    to_ship["_cuda"].parent.mkdir(parents=True, exist_ok=True)
    other = source / "redit_fast" / "_cuda.cpython-999-x86_64-linux-gnu.so"
    for path in (*in_place.values(), *to_ship.values(), other):
        path.write_text("old")
    for words in (("build",), ("build_ext", "--inplace")):
        code, said = outcome(sys.executable, "setup.py", *words, cwd=source, REDIT_FAST_CUDA="0", **NO_COMPILER)
        assert code == 0, said
        assert not any(path.exists() for path in to_ship.values())
        assert all(path.exists() == (words == ("build",)) for path in in_place.values())
    assert other.exists()  # of another Python


# The real module: the one of this environment where `make` has built it.
@pytest.fixture(scope="module")
def module():
    found = importlib.util.find_spec("redit_fast._cuda")
    if found is None and (NVCC is None or os.environ.get("REDIT_FAST_CUDA") == "0"):
        pytest.skip("redit_fast._cuda was not built: no nvcc, or REDIT_FAST_CUDA=0")
    if found is None:
        pytest.fail("`make` left redit_fast._cuda out, pip shows why: REDIT_FAST_CUDA=1 pip install -v -e .")
    return Path(found.origin)


def test_the_module_needs_no_cuda_library_and_shows_no_cuda_symbol(module, tmp_path):
    libraries = run("readelf", "-d", module, cwd=tmp_path)
    needed = re.findall(r"NEEDED.*\[(.*)\]", libraries)
    assert "libc.so.6" in needed and not [name for name in needed if re.search("torch|c10|cuda|nv|gomp|omp", name)]
    undefined = run("nm", "-D", "--undefined-only", module, cwd=tmp_path)
    assert "PyErr_Occurred" in undefined and not re.search(r" _*(cu|nv)[A-Z]| _*cuda", undefined)
    defined = re.findall(r" [TDBR] (\w+)", run("nm", "-D", "--defined-only", module, cwd=tmp_path))
    assert defined == ["PyInit__cuda"]


DRIVER = """
#include <stdio.h>
#include <unistd.h>
__attribute__((constructor)) static void loaded(void) { printf("driver of %d\\n", getpid()); fflush(stdout); }
"""


def test_importing_starts_no_driver_and_a_forked_child_can(module, tmp_path):
    (tmp_path / "driver.c").write_text(DRIVER)
    run("gcc", "-shared", "-fPIC", "driver.c", "-o", "libcuda.so.1", cwd=tmp_path)
    script = """
import os, sys, redit_fast, redit_fast._cuda as cuda
from redit_fast.backends import cuda as backend
print("imported", flush=True)
def answer():
    try: return str(cuda.device(0))
    except RuntimeError as error: return str(error).replace("\\n", " ")
child = os.fork()
if child == 0:
    print("child", os.getpid(), flush=True)
    print(answer(), flush=True)
    os._exit(0)
os.waitpid(child, 0)
print(answer())
"""
    environment = {"PYTHONPATH": str(ROOT), "LD_LIBRARY_PATH": str(tmp_path)}
    code, said = outcome(sys.executable, "-c", script, cwd=tmp_path, **environment)
    assert code == 0, said
    lines = said.splitlines()
    child = re.search(r"^child (\d+)$", said, re.M)[1]
    assert lines[0] == "imported" and lines.index(f"driver of {child}") > lines.index(f"child {child}")
    answers = [line for line in lines if "cuda" in line]
    assert len(answers) == 2 and answers[0] == answers[1] and "nitialization" not in answers[0]


def without_cpu(source, folder):
    """A copy that has nothing to compile for redit_fast._cpu, which would take most of the time."""
    shutil.copytree(source, folder, ignore=shutil.ignore_patterns("build"))
    for path in (folder / "csrc" / "cpu").glob("*.cpp"):
        path.unlink()
    return folder


@pytest.mark.skipif(NVCC is None, reason="nvcc is not installed")
@pytest.mark.parametrize("compiler", ["g++", "clang++"])
def test_host_code_compiles_without_a_warning(compiler, tmp_path):
    if not shutil.which(compiler):
        pytest.skip(f"{compiler} is not installed")
    plan = subprocess.run([NVCC, "--dryrun", "-c", "-x", "cu", os.devnull], capture_output=True, text=True).stderr
    folders = [pybind11.get_include(), sysconfig.get_path("include"), *re.findall('INCLUDES="-I([^"]*)"', plan)]
    sources = sorted((ROOT / "csrc" / "cuda").glob("*.cpp"))
    assert len(sources) >= 2
    run(compiler, "-std=c++17", "-fsyntax-only", "-Wall", "-Wextra", "-Wconversion", "-Werror", f"-I{ROOT / 'csrc'}",
        *(word for folder in folders for word in ("-isystem", folder)), '-DREDIT_CUDA_ARCHITECTURES="sm_80"', *sources,
        cwd=tmp_path)  # fmt: skip


# By `make kernel-gates`: everything compiled anew, in isolated environments.
gates = pytest.mark.skipif("KERNEL_ARCHS" not in os.environ, reason="make kernel-gates compiles everything anew")


@gates
@pytest.mark.parametrize(
    ("asked", "names"), [("9.0a", "sm_90a"), (None, "sm_80 sm_90a sm_100 compute_100")], ids=["one", "default"]
)
def test_a_wheel_is_built_from_the_sdist(source, module, tmp_path, capsys, asked, names):
    settings = {"REDIT_FAST_CUDA": "1"} | ({"TORCH_CUDA_ARCH_LIST": asked} if asked else {})
    source, start = without_cpu(source, tmp_path / "source"), time.monotonic()
    code, said = outcome(sys.executable, "-m", "build", "--outdir", tmp_path, cwd=source, **settings)
    assert code == 0, said
    (line,) = re.findall(r"^redit_fast._cuda: CUDA .*", said, re.M)
    seconds, size = time.monotonic() - start, only(tmp_path, "*.whl").stat().st_size
    with capsys.disabled():
        print(f"\n{line}; sdist and wheel {seconds:.0f} s, {size} bytes")
    assert re.fullmatch(r"redit_fast._cuda: CUDA \d+\.\d of \S*nvcc, ((sm|compute)_\d+[af]? ?)+, \d+ s", line)
    assert f", {names}, " in line and size < 8e6
    with zipfile.ZipFile(only(tmp_path, "*.whl")) as archive:
        archive.extractall(tmp_path / "there")
    script = "import redit_fast._cuda as cuda; print(cuda.__file__, cuda.architectures)"
    path, *found = python(script, tmp_path, PYTHONPATH=str(tmp_path / "there"))
    assert Path(path).is_relative_to(tmp_path) and found == names.split()


@gates
def test_an_editable_install_has_the_module(source, module, tmp_path):
    source = without_cpu(source, tmp_path / "source")
    venv.create(tmp_path / "venv", with_pip=True)
    bin = tmp_path / "venv" / "bin"
    settings = {"REDIT_FAST_CUDA": "1", "TORCH_CUDA_ARCH_LIST": "9.0a"}
    code, said = outcome(bin / "pip", "install", "-q", "--no-deps", "-e", source, cwd=tmp_path, **settings)
    assert code == 0, said
    site = run(bin / "python", "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=tmp_path).strip()
    Path(site, "dependencies.pth").write_text(sysconfig.get_path("purelib"))
    assert "CUDA module: CUDA" in run(bin / "redit-fast", "info", cwd=tmp_path)
    assert only(source / "redit_fast", "_cuda.*.so") and only(source / "build" / "cuda", "advantages.o")
