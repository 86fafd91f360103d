"""clang and an aarch64 compiler take the sources without a warning; their programs give the bits of g++ on x86-64."""

import runpy
import shutil
import sysconfig

import pybind11
import pytest

from tests import ROOT
from tests.project.test_install import run

EMULATOR = {"clang++": (), "aarch64-linux-gnu-g++": ("qemu-aarch64", "-L", "/usr/aarch64-linux-gnu")}
HEADERS = (f"-I{ROOT / 'csrc'}", "-isystem", pybind11.get_include(), "-isystem", sysconfig.get_path("include"))
OPS = [path for path in (ROOT / "csrc" / "cpu").glob("*.cpp") if not path.name.startswith("bindings")]
WARNINGS = ("-Wall", "-Wextra", "-Werror")
BINDINGS = list((ROOT / "csrc" / "cpu").glob("bindings*.cpp"))
pytestmark = pytest.mark.parametrize("compiler", EMULATOR)


def names_of_setup():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("setuptools.setup", lambda **settings: None)
        return runpy.run_path(str(ROOT / "setup.py"))


@pytest.fixture(scope="module")
def setup():
    return names_of_setup()


def need(*programs):
    for program in programs:
        if not shutil.which(program):
            pytest.skip(f"{program} is not installed")


# The ops become code below, without OpenMP, whose library a compiler may not have here. Code for the bindings, which
# only pass their arguments on, would take 30 s more.
@pytest.mark.parametrize("sources", [OPS, BINDINGS], ids=["ops", "bindings"])
def test_every_source_is_read_without_a_warning(compiler, sources, setup, tmp_path):
    need(compiler)
    if sources is BINDINGS and "aarch64" in compiler and "/usr/include" in sysconfig.get_path("include"):
        pytest.skip("Debian's python3-dev has the pyconfig.h of this processor only")
    assert sources
    run(compiler, *setup["FLAGS"], *setup["OPENMP"], *WARNINGS, *HEADERS, "-fsyntax-only", *sources, cwd=tmp_path)


def lines_of_a_program(builder, emulator, setup, folder):
    flags = (*setup["FLAGS"], *WARNINGS, "-Wno-unknown-pragmas", "-Wno-unused-parameter", f"-I{ROOT / 'csrc'}")
    run(builder, *flags, ROOT / "tests" / "backends" / "bits.cpp", *OPS, cwd=folder)
    return run(*emulator, folder / "a.out", cwd=folder).splitlines()


@pytest.fixture(scope="module")
def expected(setup, tmp_path_factory):
    need("g++")
    return lines_of_a_program("g++", (), setup, tmp_path_factory.mktemp("expected"))


def test_programs_give_the_same_bits(compiler, expected, setup, tmp_path):
    need(compiler, *EMULATOR[compiler][:1])
    assert lines_of_a_program(compiler, EMULATOR[compiler], setup, tmp_path) == expected
    assert len({line.split()[-1] for line in expected}) == len(expected) == 36  # 6 token losses, 2 noises
