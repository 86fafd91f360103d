"""setup_cuda.py on a script in nvcc's place: which nvcc it takes, what that gets, and a sentence for each failure."""

import importlib.util
import os
import re
import shutil
import subprocess
import time
from pathlib import Path

import pytest
from setuptools import Extension
from setuptools.errors import CompileError

from tests import ROOT
from tests.project.fake_nvcc import KNOWN, Toolkit

NVCC = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
os_access = os.access
SETTINGS = ("REDIT_FAST_CUDA", "CUDA_HOME", "CUDA_PATH", "TORCH_CUDA_ARCH_LIST", "MAX_JOBS", "CXX", "NVCC_CCBIN",
            "NVCC_PREPEND_FLAGS", "NVCC_APPEND_FLAGS")  # fmt: skip


@pytest.fixture
def toolkit(tmp_path):
    return Toolkit(tmp_path / "toolkit")


@pytest.fixture
def bare(tmp_path, monkeypatch):
    """A folder with three .cu files, without settings and without an nvcc."""
    folder = tmp_path / "bare"
    (folder / "csrc").mkdir(parents=True)
    for name in ("advantages", "params", "token_loss"):
        (folder / "csrc" / f"{name}.cu").write_text(f'#include "csrc/{name}.h"\n#include "csrc/shared.h"\n')
        (folder / "csrc" / f"{name}.h").write_text("")
    (folder / "csrc" / "shared.h").write_text("")
    for name in ("advantages", "params"):
        with (folder / "csrc" / f"{name}.cu").open("a") as file:
            file.write("// compiled with -fmad=false\n")
    age(folder, 10)
    for name in SETTINGS:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    monkeypatch.chdir(folder)
    access = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: str(path).startswith(str(tmp_path)) and access(path, mode))
    return folder


def age(folder, seconds):
    """As if nothing in it had been touched since."""
    for path in folder.rglob("*.*"):
        os.utime(path, (time.time() - seconds, time.time() - seconds))


def setup_cuda():
    spec = importlib.util.spec_from_file_location("setup_cuda", ROOT / "setup_cuda.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def compile_kernels(names=("advantages", "params", "token_loss")):
    """The extension as setup.py links it, and what is said of it."""
    ext = Extension("redit_fast._cuda", [])
    ext.said = setup_cuda().compile_kernels(ext, [f"csrc/{name}.cu" for name in names])
    return ext


@pytest.mark.parametrize("choice", ["maybe", "yes", "", "2"])
def test_another_choice_is_refused_and_the_three_are_named(monkeypatch, choice):
    monkeypatch.setenv("REDIT_FAST_CUDA", choice)
    with pytest.raises(SystemExit, match=f"^REDIT_FAST_CUDA must be auto, 0 or 1, got '{choice}'$"):
        setup_cuda()


def test_nvcc_is_looked_for_in_order(bare, tmp_path, monkeypatch):
    found = {name: Toolkit(tmp_path / name) for name in ("home", "path", "search", "local")}
    access = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: path == "/usr/local/cuda/bin/nvcc" or access(path, mode))
    assert setup_cuda().find_nvcc()[0] == "/usr/local/cuda/bin/nvcc"
    for variable, name, value in (
        ("PATH", "search", "{}/bin"),
        ("CUDA_PATH", "path", "{}"),
        ("CUDA_HOME", "home", "{}"),
    ):
        monkeypatch.setenv(variable, value.format(found[name].home))
        assert setup_cuda().find_nvcc()[0] == str(found[name].nvcc)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))  # no nvcc in it
    assert setup_cuda().find_nvcc()[0] == str(found["path"].nvcc)


def test_only_nvcc_is_run(bare, toolkit, monkeypatch):
    programs = []
    real = subprocess.Popen.__init__

    def popen(self, command, *args, **kwargs):
        programs.append(command[0])
        real(self, command, *args, **kwargs)

    monkeypatch.setattr(subprocess.Popen, "__init__", popen)
    monkeypatch.setenv("CUDA_HOME", str(toolkit.home))
    compile_kernels()
    assert len(programs) == 6 and set(programs) == {str(toolkit.nvcc)}


def test_without_a_list_the_default_is_compiled_for(bare, toolkit, monkeypatch, capsys):
    monkeypatch.setenv("CUDA_HOME", str(toolkit.home))
    ext = compile_kernels()
    architectures = ["-gencode=arch=compute_80,code=[sm_80]", "-gencode=arch=compute_90a,code=[sm_90a]",
                     "-gencode=arch=compute_100,code=[sm_100,compute_100]"]  # fmt: skip
    commands = toolkit.compiled()
    assert commands.keys() == {"advantages.cu", "params.cu", "token_loss.cu"}
    for name, words in commands.items():
        assert [word for word in words if "gencode" in word] == architectures
        assert "-Xfatbin=-compress-all" in words and "-std=c++17" in words and "-Icsrc" in words
        assert ("-fmad=false" in words) == (name in ("advantages.cu", "params.cu"))
        assert not any(re.search("fast.math|ftz|prec-", word) for word in words)
    assert ext.define_macros == [("REDIT_CUDA_ARCHITECTURES", '"sm_80 sm_90a sm_100 compute_100"')]
    assert ext.include_dirs == [f"{toolkit.home}/include"] and f"-L{toolkit.home}/lib" in ext.extra_link_args
    assert {"-lcudart_static", "-Wl,--exclude-libs,ALL"} <= set(ext.extra_link_args)
    assert ext.extra_objects == [f"build/cuda/{name}.o" for name in ("advantages", "params", "token_loss")]
    assert ext.said == f"CUDA 13.0 of {toolkit.nvcc}, sm_80 sm_90a sm_100 compute_100" and capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("asked", "names", "flags"),
    [
        ("9.0a", "sm_90a", ["arch=compute_90a,code=[sm_90a]"]),
        ("8.6;9.0+PTX", "sm_86 sm_90 compute_90",
         ["arch=compute_86,code=[sm_86]", "arch=compute_90,code=[sm_90,compute_90]"]),
        (" 8.9, 12.0 ", "sm_89 sm_120", ["arch=compute_89,code=[sm_89]", "arch=compute_120,code=[sm_120]"]),
        ("10.0f+PTX", "sm_100f compute_100f", ["arch=compute_100f,code=[sm_100f,compute_100f]"]),
    ],
)  # fmt: skip
def test_a_list_is_obeyed_exactly(bare, toolkit, monkeypatch, capsys, asked, names, flags):
    monkeypatch.setenv("CUDA_HOME", str(toolkit.home))
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", asked)
    ext = compile_kernels(["token_loss"])
    (words,) = toolkit.compiled().values()
    assert [word.removeprefix("-gencode=") for word in words if "gencode" in word] == flags
    assert ext.define_macros == [("REDIT_CUDA_ARCHITECTURES", f'"{names}"')] and capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("asked", "known", "line", "names"),
    [(None, "compute_80 compute_90", "without 10.0+PTX, this nvcc is older", "sm_80 sm_90a"),
     ("7.5 8.0", KNOWN, "without 7.5, the kernels need 8.0", "sm_80"),
     ("7.0;8.0", KNOWN, "without 7.0, the kernels need 8.0", "sm_80")],
)  # fmt: skip
def test_what_cannot_be_compiled_for_is_left_out_in_one_line(
    bare, toolkit, monkeypatch, capsys, asked, known, line, names
):
    """Of the default; of a list what no kernel can run on: NVIDIA's containers ask for 7.5 too."""
    monkeypatch.setenv("CUDA_HOME", str(toolkit.home))
    if asked:
        monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", asked)
    toolkit.say("--list-gpu-arch", known.replace(" ", "\n"))
    ext = compile_kernels()
    assert ext.define_macros[0][1] == f'"{names}"'
    assert capsys.readouterr().out == f"redit_fast._cuda: {line}\n"


# What nvcc 13.0 prints.
REFUSED = """/usr/local/cuda-13.0/include/crt/host_config.h:137:2: error: #error -- unsupported GNU version! gcc \
versions later than 15 are not supported! The nvcc flag '-allow-unsupported-compiler' can be used to override \
this version check; however, using an unsupported host compiler may cause compilation failure.
"""
REFUSED_CLANG = """#error -- unsupported clang version! clang version must be less than 21 and greater than 3.2 . The \
nvcc flag '-allow-unsupported-compiler' can be used
"""
NO_HOST = "gcc: No such file or directory\nnvcc fatal   : Failed to preprocess host compiler properties.\n"
KILLED = "nvcc error   : 'cicc' died due to signal 9 (Kill signal)"
# What nvcc says to an option, and what is set -> the sentence.
SENTENCES = {
    "refused": ({"-MF": REFUSED}, {}, "nvcc refuses the host compiler: GNU version! gcc versions later than 15 are not "
                "supported; set NVCC_CCBIN to one that it takes"),
    "clang": ({"-MF": REFUSED_CLANG}, {}, "nvcc refuses the host compiler: clang version! clang version must be less "
              "than 21 and greater than 3.2; set NVCC_CCBIN to one that it takes"),
    "no host": ({"--dryrun": NO_HOST}, {}, "nvcc does not find its host compiler; install g++, or set NVCC_CCBIN to "
                "one that is there"),
    "error": ({"-MF": "x.cu\nx.cu(3): error: expected a ;\n1 error detected\n"}, {},
              "nvcc fails: x.cu(3): error: expected a ;"),
    "killed": ({"-MF": KILLED + "\n"}, {}, f"nvcc fails: {KILLED}"),
    "nothing": ({"-MF": ""}, {}, "nvcc fails: exit code 1"),
    "old": ({"--version": "release 12.3, V12.3.107"}, {}, "is of CUDA 12.3, the oldest supported is 12.4"),
    "other": ({"--version": "hello"}, {}, "is of CUDA ?, the oldest supported is 12.4"),
    "word": ({}, {"TORCH_CUDA_ARCH_LIST": "8.0 Hopper"}, "TORCH_CUDA_ARCH_LIST takes numbers such as 8.0, 9.0a and "
             "10.0+PTX, got 'Hopper'"),
    "unknown": ({}, {"TORCH_CUDA_ARCH_LIST": "8.0 13.0"}, "TORCH_CUDA_ARCH_LIST asks for 13.0, this nvcc knows "
                + KNOWN),
    "too old": ({}, {"TORCH_CUDA_ARCH_LIST": "7.5"}, "TORCH_CUDA_ARCH_LIST is '7.5', the kernels need 8.0 or newer"),
    "jobs": ({}, {"MAX_JOBS": "two"}, "MAX_JOBS must be a whole number, got 'two'"),
}  # fmt: skip


NO_RUNTIME = "has no libcudart_static.a in {}; install its toolkit's runtime"
PAGE = (ROOT / "docs" / "build_cuda.md").read_text()


def rows(heading):
    """The first cells of the table there, as patterns."""
    section = PAGE.split(f"## {heading}")[1].split("\n## ")[0]
    return {cell: re.escape(cell).replace(r"\.\.\.", ".*") for cell in re.findall(r"^\| `(.*?)` \|", section, re.M)}


def test_the_page_has_every_sentence_and_no_other():
    said = [
        f"/cuda/bin/nvcc {sentence}" if sentence.startswith("is of") else sentence
        for _, _, sentence in SENTENCES.values()
    ]
    said += ["/cuda/bin/nvcc " + NO_RUNTIME.format("/lib"), "REDIT_FAST_CUDA=1 and no nvcc; looked for /cuda/bin/nvcc"]
    said += ["REDIT_FAST_CUDA must be auto, 0 or 1, got 'yes'"]
    patterns = rows("What each failure prints")
    for sentence in said:
        if "clang" not in sentence and "?" not in sentence:
            assert any(re.fullmatch(pattern, sentence) for pattern in patterns.values()), sentence
    code = "".join(path.read_text() for path in (ROOT / "redit_fast" / "backends" / "cuda").glob("*.py"))
    for cell, pattern in patterns.items():
        later = cell.split("CUDA 13.0")[0].split(" for sm_80")[0].split(" ...")[0].rstrip(";,")
        assert any(re.fullmatch(pattern, sentence) for sentence in said) or later in code, cell


def test_the_page_has_the_settings():
    module = setup_cuda()
    assert set(SETTINGS) - {"CXX", "NVCC_PREPEND_FLAGS"} == set(re.findall(r"\w+", " ".join(rows("What can be set"))))
    assert f"| `{module.ARCHITECTURES}`, of these" in PAGE
    assert f"CUDA {module.OLDEST[0]}.{module.OLDEST[1]} or newer" in PAGE


@pytest.mark.parametrize("case", SENTENCES)
def test_each_failure_has_its_sentence(bare, toolkit, monkeypatch, case):
    says, settings, sentence = SENTENCES[case]
    for option, text in says.items():
        toolkit.say(option, text, code=0 if option == "--version" else 1)
    for name, value in {"CUDA_HOME": str(toolkit.home), **settings}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(CompileError) as error:
        compile_kernels(["token_loss"])
    assert str(error.value).removeprefix(f"{toolkit.nvcc} ") == sentence


def test_a_toolkit_without_the_static_runtime_is_named(bare, toolkit, monkeypatch):
    monkeypatch.setenv("CUDA_HOME", str(toolkit.home))
    (toolkit.home / "lib" / "libcudart_static.a").unlink()
    with pytest.raises(CompileError, match=NO_RUNTIME.format(f"{toolkit.home}/lib")):
        compile_kernels()
    assert toolkit.compiled() == {}
    debian = f"#$ INCLUDES=\n#$ LIBRARIES=  -L/nowhere/stubs -L{toolkit.home}/include\n"  # without quotation marks
    toolkit.say("--dryrun", debian)
    (toolkit.home / "include" / "libcudart_static.a").write_text("!<arch>\n")
    assert f"-L{toolkit.home}/include" in compile_kernels().extra_link_args


def test_the_host_compiler_is_the_users(bare, toolkit, monkeypatch):
    monkeypatch.setenv("CUDA_HOME", str(toolkit.home))

    def given():
        compile_kernels()
        return [word for word in toolkit.compiled()["params.cu"] if "ccbin" in word]

    assert given() == []
    monkeypatch.setenv("CXX", "ccache g++-12")
    assert given() == ["-ccbin=g++-12"]
    monkeypatch.setenv("NVCC_CCBIN", "g++-11")  # which nvcc reads itself
    assert given() == []


@pytest.mark.parametrize(
    ("cores", "gigabytes", "given", "expected", "threads"),
    [(2, 24, None, 2, 1), (16, 24, None, 6, 2), (16, 128, None, 16, 5), (4, 2, None, 1, 1), (2, 24, "", 2, 1),
     (2, 24, "8", 8, 2), (64, 999, "1", 1, 1)],
)  # fmt: skip
def test_jobs_are_bound_by_cores_and_memory(bare, toolkit, monkeypatch, cores, gigabytes, given, expected, threads):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(cores))
    pages = {"SC_PAGE_SIZE": 4096, "SC_PHYS_PAGES": gigabytes * 2**18}
    monkeypatch.setattr(os, "sysconf", pages.__getitem__)
    monkeypatch.setenv("CUDA_HOME", str(toolkit.home))
    if given is not None:
        monkeypatch.setenv("MAX_JOBS", given)
    assert setup_cuda().jobs() == expected
    pools = []
    module = setup_cuda()
    monkeypatch.setattr(module, "ThreadPoolExecutor", lambda count: pools.append(count) or Pool())
    module.compile_kernels(Extension("x", []), [f"csrc/{name}.cu" for name in ("advantages", "params", "token_loss")])
    assert pools == [expected]
    assert {f"--threads={threads}" in words for words in toolkit.compiled().values()} == {True}


class Pool:
    map = staticmethod(map)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass


def test_only_what_changed_is_compiled_again(bare, toolkit, monkeypatch):
    monkeypatch.setenv("CUDA_HOME", str(toolkit.home))

    def again(changed=None):
        age(bare / "build", -1)  # setuptools may copy a source within the clock's second
        if changed:
            (bare / "csrc" / changed).write_text((bare / "csrc" / changed).read_text() + "//\n")
            os.utime(bare / "csrc" / changed, (time.time() + 2, time.time() + 2))
        compile_kernels()
        names = {name.removesuffix(".cu") for name in toolkit.compiled()}
        age(bare, 10)
        return names

    every = {"advantages", "params", "token_loss"}
    assert again() == every and again() == set()
    assert again("params.cu") == {"params"} and again("token_loss.h") == {"token_loss"} and again("shared.h") == every
    assert again() == set()
    for name, value in {"TORCH_CUDA_ARCH_LIST": "9.0a", "NVCC_APPEND_FLAGS": "-lineinfo", "CXX": "g++-12"}.items():
        monkeypatch.setenv(name, value)
        assert again() == every and again() == set()
    toolkit.say("--version", "release 13.1, V13.1.2")
    assert again() == every
    monkeypatch.setenv("MAX_JOBS", "1")
    assert again() == set()
    (bare / "csrc" / "params.h").unlink()
    assert again() == {"params"}
    (bare / "build" / "cuda" / "token_loss.txt").unlink()
    assert again() == {"params", "token_loss"}


def test_what_is_saved_while_nvcc_runs_or_after_it_fails_is_compiled_again(bare, toolkit, monkeypatch):
    monkeypatch.setenv("CUDA_HOME", str(toolkit.home))
    module = setup_cuda()
    real = module.run

    def save_meanwhile(*words):
        said = real(*words)
        if "-MF" in words:
            (bare / "csrc" / "params.h").write_text("//")
        return said

    module.run = save_meanwhile
    module.compile_kernels(Extension("x", []), ["csrc/params.cu"])
    toolkit.calls()
    compile_kernels(["params"])
    assert toolkit.compiled()
    age(bare, 10)
    compile_kernels(["params"])
    toolkit.calls()
    os.utime(bare / "csrc" / "params.cu")
    toolkit.say("-MF", "error: no", code=1)
    for _ in range(2):
        with pytest.raises(CompileError, match="error: no"):
            compile_kernels(["params"])
        os.utime(bare / "csrc" / "params.cu", (0, 0))


@pytest.mark.skipif(NVCC is None, reason="nvcc is not installed")
@pytest.mark.parametrize(
    ("script", "sentence"),
    [("exec g++ -U__GNUC__ -D__GNUC__=99 $*", "nvcc refuses the host compiler: GNU version! gcc versions later than"),
     (None, "nvcc does not find its host compiler")],
)  # fmt: skip
def test_nvcc_itself_says_so_of_a_host_compiler(bare, monkeypatch, script, sentence):
    compiler = bare / "compiler"
    if script:
        compiler.write_text(f"#!/bin/sh\n{script}\n")
        compiler.chmod(0o755)
    monkeypatch.setattr(os, "access", os_access)
    monkeypatch.setenv("NVCC_CCBIN", str(compiler))
    monkeypatch.setenv("CUDA_HOME", str(Path(NVCC).parent.parent))
    with pytest.raises(CompileError, match=sentence):
        compile_kernels(["params"])
