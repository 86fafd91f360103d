"""`redit-fast info`, on this machine and on pretended ones."""

import json
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

import redit_fast
from redit_fast import backends, cli, info
from redit_fast.backends import cpu
from redit_fast.backends.cuda import module as cuda
from redit_fast.packing import varlen

COMPILED = SimpleNamespace(architectures="sm_80 sm_90a sm_100 compute_100", toolkit=13000)
REBUILD = (
    "redit_fast._cuda has code for sm_80 and none for this device's 9.0; run `TORCH_CUDA_ARCH_LIST=9.0 "
    "REDIT_FAST_CUDA=1 pip install --no-deps --force-reinstall .` in the source folder"
)


def printed(capsys, *words):
    assert cli.main(words) == 0
    out, err = capsys.readouterr()
    assert err == ""
    return out


def pretend_gpus(monkeypatch, *names):
    """Devices of these names, of capability 9.0, on which every backend has one refusal."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(names))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", names.__getitem__)
    real = backends.report

    def report(device="cpu"):
        if device == "cpu":
            return real(device)
        return [
            (op, name, REBUILD if name == "cuda" else "ok") for op in backends.PRIMITIVES for name in backends.NAMES
        ]

    monkeypatch.setattr(backends, "report", report)


def table(out, device):
    """{op: [cell of each backend]} and the backends."""
    lines = iter(out.splitlines())
    names = next(line.split()[2:] for line in lines if line.startswith(f"on {device} "))
    rows = {}
    while (line := next(lines, "")) != "":
        rows[line.split()[0]] = line.split()[1:]
    return rows, names


def notes(out):
    """{[number]: its sentence}"""
    found = {}
    for paragraph in out.split("\n\n"):
        if paragraph.startswith("["):
            number, _, words = " ".join(line for line in paragraph.splitlines() if "$" not in line).partition(" ")
            found[number] = " ".join(words.split("      ")[0].split())
    return found


def test_every_op_and_backend_has_ok_or_its_sentence(capsys):
    out = printed(capsys, "info")
    rows, names = table(out, "cpu")
    assert tuple(names) == backends.NAMES and tuple(rows) == backends.PRIMITIVES
    sentences = notes(out)
    for op, backend, state in backends.report():
        cell = rows[op][names.index(backend)]
        assert cell == "ok" if state == "ok" else sentences[cell] == f"{backend}: {state}"
    assert "ok" in rows["adamw"] and sentences


def test_versions_are_those_of_the_libraries(capsys):
    import transformers

    head = printed(capsys, "doctor").split("\n\n")[0]
    for number in (redit_fast.__version__, torch.__version__, transformers.__version__):
        assert number in head
    assert f"{torch.get_num_threads()} threads" in head
    sets = cpu.instruction_sets()
    assert f"C++ module: runs {sets[-1]}, has {', '.join(sets)};" in head if sets else "C++ module: none;" in head


def test_the_doctor_is_info(capsys):
    assert printed(capsys, "doctor") == printed(capsys, "info")


def test_json_has_the_same(capsys):
    said = json.loads(printed(capsys, "info", "--json"))
    assert said["backends"]["cpu"]["reference"] == dict.fromkeys(backends.PRIMITIVES, "ok")
    for op, backend, state in backends.report():
        assert said["backends"]["cpu"][backend][op] == state
    assert said["versions"]["torch"] == torch.__version__ and said["gpus"].keys() == set(info._gpus())
    assert info.text(said) + "\n" == printed(capsys, "info")


def test_the_instruction_set_that_runs_is_the_one_that_the_ops_take(monkeypatch):
    """The widest, as csrc/cpu counts them; without the module there is none."""
    if cpu.missing:
        pytest.skip(cpu.missing)
    assert cpu.module.processor().level == -1 and info.found()["instruction_set"] == cpu.instruction_sets()[-1]
    monkeypatch.setattr(cpu.module, "compiled", None)
    said = info.found()
    assert said["instruction_set"] is None and "C++ module: none; " in info.text(said)


def test_without_the_cuda_module_it_says_what_to_type(capsys, monkeypatch):
    missing = (
        "redit_fast._cuda was not built; where nvcc is, run `REDIT_FAST_CUDA=1 pip install .` in the source folder"
    )
    monkeypatch.setattr(cuda, "missing", missing)
    monkeypatch.setattr(cuda, "compiled", None)
    out = printed(capsys, "info")
    assert "CUDA module: none" in out and f"cuda: {missing}" in notes(out).values()
    assert "    $ REDIT_FAST_CUDA=1 pip install .\n" in out
    said = info.found()
    assert said["cuda_module"] == {"missing": missing} and said["type"][missing] == ["REDIT_FAST_CUDA=1 pip install ."]


def test_architectures_compiled_and_present(capsys, monkeypatch):
    monkeypatch.setattr(cuda, "missing", None)
    monkeypatch.setattr(cuda, "compiled", COMPILED)
    pretend_gpus(monkeypatch, "NVIDIA H200", "NVIDIA H200", "NVIDIA H100")
    out = printed(capsys, "info")
    assert "CUDA module: CUDA 13.0, for sm_80, sm_90a, sm_100, compute_100\n" in out
    assert "cuda:0: NVIDIA H200, sm_90\ncuda:1: NVIDIA H200, sm_90\ncuda:2: NVIDIA H100, sm_90\n" in out
    assert [line.split()[1] for line in out.splitlines() if line.startswith("on ")] == ["cpu", "cuda:0", "cuda:2"]
    assert info.found()["cuda_module"] == {"toolkit": "13.0", "architectures": COMPILED.architectures.split()}
    monkeypatch.setattr(cuda, "compiled", SimpleNamespace(architectures="sm_90a", toolkit=12080))
    assert "CUDA module: CUDA 12.8, for sm_90a\n" in printed(capsys, "info")


def test_packed_rows_name_what_runs_and_why_the_others_do_not(capsys, monkeypatch):
    assert "packed rows on cpu: SDPA a segment\n" in printed(capsys, "info")
    pretend_gpus(monkeypatch, "NVIDIA H200")
    monkeypatch.setitem(sys.modules, "flash_attn", None)
    monkeypatch.setitem(sys.modules, "flash_attn_interface", None)
    varlen._missing.cache_clear()
    said = " ".join(printed(capsys, "info").split())
    assert "packed rows on cuda:0: torch varlen_attn; flash-attn 3 cannot be imported: " in said
    assert "; flash-attn 2 cannot be imported: " in said
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (7, 5))
    assert "packed rows on cuda:0: none, rows are padded; flash-attn 3 is for GPUs" in " ".join(
        printed(capsys, "info").split()
    )
    varlen._missing.cache_clear()


def test_what_to_type_is_a_whole_command(capsys, monkeypatch):
    """Too long for a line, it goes on after a backslash as a shell takes it."""
    pretend_gpus(monkeypatch, "NVIDIA H200")
    out = printed(capsys, "info")
    assert f"cuda: {REBUILD}" in notes(out).values()
    typed = out.split("    $ ")[-1]
    read = subprocess.run(["bash", "-c", f"printf '%s\n' {typed}"], capture_output=True, text=True).stdout.split()
    words = ["TORCH_CUDA_ARCH_LIST=9.0", "REDIT_FAST_CUDA=1", "pip", "install", "--no-deps", "--force-reinstall", "."]
    assert "\\\n" in typed and read == words


@pytest.mark.parametrize("name", [*info.SETTINGS, "TRITON_CACHE_DIR", "TRITON_HOME"])
def test_no_line_is_longer_than_80_columns(capsys, monkeypatch, name):
    monkeypatch.setattr(cuda, "missing", "x" * 300)
    pretend_gpus(monkeypatch, "NVIDIA " + "RTX PRO 6000 Blackwell Max-Q Workstation Edition " * 3)
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.delenv("TRITON_CACHE_DIR", raising=False)
    value = "/a-folder" * 20 if "TRITON_" in name else "1"
    monkeypatch.setenv(name, value)
    lines = printed(capsys, "info").splitlines()
    assert max(map(len, lines)) <= 80 and value in "".join(line.strip() for line in lines)


def test_the_cache_is_where_triton_keeps_it(monkeypatch, tmp_path):
    knobs = pytest.importorskip("triton", reason="Triton is not installed").knobs
    for name, value in (
        ("TRITON_CACHE_DIR", ""),
        ("TRITON_HOME", str(tmp_path)),
        ("TRITON_CACHE_DIR", str(tmp_path / "c")),
    ):
        monkeypatch.setenv(name, value) if value else monkeypatch.delenv(name, raising=False)
        assert info.found()["triton_cache"] == knobs.cache_knobs().dir


def test_packages_that_are_there_have_their_version_and_the_others_are_named(monkeypatch):
    monkeypatch.setattr(info, "OPTIONAL", ("pytest", "no-such-package"))
    assert info.found()["optional"] == {"pytest": pytest.__version__, "no-such-package": None}
    assert f"optional: pytest {pytest.__version__}, not installed: no-such-package" in info.text(info.found())
