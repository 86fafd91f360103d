"""Budgets: what the package costs, counted without a clock and compared with tests/budgets.json.

    {group: {"with": {tool: version}, name: {unit: number, or parts that add up to it}}}

A group is a module of this package with count(), which gives the names. Its numbers mean something under the versions
that they were stored with, and are compared under those alone. 5 % above is a failure, 5 % below asks to be stored:
`make budgets` shows every number, `make budgets STORE=1` stores new and lower ones, `STORE=all` higher ones too.
"""

import importlib.metadata
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path
from typing import NamedTuple

from redit_fast.backends.cpu import module as cpu
from redit_fast.backends.cuda import module as cuda
from tests import ROOT

FILE = ROOT / "tests" / "budgets.json"
GROUPS = {
    "ops": ("torch",),
    "steps": ("torch", "transformers", "trl"),
    "ranks": ("torch",),
    "loops": ("compiler of _cpu", "objdump"),
    "imports": ("python", "torch"),
    "cuda": ("torch", "nvcc", "_cuda"),
    "sass": ("nvcc", "nvidia-cuda-cuobjdump"),
    "triton": ("torch", "triton"),
    "instructions": ("g++", "valgrind"),
    "compilations": ("torch",),
    "wheels": ("python", "setuptools", "pybind11", "g++", "nvcc"),
}
PROGRAMS = ("g++", "nvcc", "objdump", "valgrind")
IN_MAKE_TEST = ("ops", "steps", "loops", "imports", "cuda")
UNITS = {
    "operators": "of torch that run, each some microseconds of the host",
    "waits": "operators, and tolist, for which the host waits where tensors are a GPU's; some here are the host's own",
    "calls of _cpu": "of the C++ module: passes over memory",
    "compilations": "of torch.compile",
    "launches": "of kernels on a GPU",
    "collectives": "of torch.distributed, on the first of two ranks",
    "bytes sent": "of the tensors that they are given and that they fill",
    "bytes read": "of a GPU's memory, in the interpreter of PTX",
    "bytes written": "the same",
    "instructions": "that callgrind saw, for 4 rows of 4099 logits, 40,000 weights or 512 samples with 2 rewards each",
    "instructions, sm_80": "of a kernel's machine code",
    "instructions, sm_90": "the same",
    "instructions, sm_90a": "the same",
    "instructions, sm_100": "the same",
    "instructions a turn": "of the innermost loops of a function for AVX-512, which callgrind does not run",
    "modules": "that come into sys.modules",
    "wheel bytes": "of the file",
    "peak bytes": "of the operators' results that were there at once, at most",
}


class Change(NamedTuple):
    name: str
    unit: str
    old: int | dict | None
    new: int | dict | None

    @property
    def verdict(self):
        if self.old is None or self.new is None:
            return "gone" if self.new is None else "new"
        old, new = total(self.old), total(self.new)
        return "higher" if 20 * new > 21 * old else "lower" if 20 * new < 19 * old else ""

    @property
    def parts(self):
        """Which parts make the difference, the most first."""
        if not isinstance(self.old, dict) or not isinstance(self.new, dict):
            return ""
        moved = {part: self.new.get(part, 0) - self.old.get(part, 0) for part in self.old | self.new}
        return ", ".join(f"{n:+} {part}" for part, n in sorted(moved.items(), key=lambda item: -abs(item[1])) if n)

    def __str__(self):
        old, new = ("-" if value is None else f"{total(value)}" for value in (self.old, self.new))
        change = f"{total(self.new) / total(self.old) - 1:+.1%}" if self.old and self.new and old != new else ""
        line = f"  {self.name + ': ' + self.unit:<66}{old:>12}{new:>12}{change:>9}  {self.verdict}".rstrip()
        return line + f"\n      {self.parts}" * bool(self.parts)


def total(value):
    return sum(value.values()) if isinstance(value, dict) else value


def changes(stored, found):
    """Of every number that is stored or counted."""
    names = [name for name in dict.fromkeys([*stored, *found]) if name != "with"]
    both = [(name, stored.get(name, {}), found.get(name, {})) for name in names]
    return [Change(name, unit, old.get(unit), new.get(unit)) for name, old, new in both for unit in old | new]


def assert_within(stored, found):
    """No number is above its budget, and none is new or gone; of one below it a warning tells."""
    both = changes(stored, found)
    wrong = [str(change) for change in both if change.verdict in ("higher", "new", "gone")]
    assert not wrong, "\n".join(["`make budgets` shows all; stored and now:", *wrong])
    for change in both:
        if change.verdict == "lower":
            warnings.warn(f"`make budgets STORE=1` stores a lower number:\n{change}", stacklevel=2)


def kept(stored, found, how):
    """What is stored of a group from now on: new and lower numbers, with `how` "all" every one."""
    result = {name: {} for name in found}
    for change in changes(stored, found):
        if change.new is not None:
            stays = how != "all" and change.old is not None and total(change.new) >= total(change.old)
            result[change.name][change.unit] = change.old if stays else change.new
    return result


def read():
    return json.loads(FILE.read_text()) if FILE.exists() else {}


def write(budgets):
    """A line for each name."""
    groups = []
    for group, names in ((group, budgets[group]) for group in GROUPS if group in budgets):
        lines = [f"  {json.dumps(name)}: {json.dumps(units, sort_keys=True)}" for name, units in names.items()]
        groups.append(f" {json.dumps(group)}: {{\n" + ",\n".join(lines) + "\n }")
    FILE.write_text("{\n" + ",\n".join(groups) + "\n}\n")


def version(tool):
    """None where the tool is not there."""
    if tool == "python":
        return ".".join(platform.python_version_tuple()[:2])
    if tool == "_cuda":
        return None if cuda.missing else f"{cuda.compiled.toolkit // 1000}.{cuda.compiled.toolkit % 1000 // 10}"
    if tool == "compiler of _cpu":
        return re.search(r"GCC: \(.*?\) ([\d.]+)|$", said("readelf", "-p", ".comment", cpu.compiled.__file__))[1]
    if tool in PROGRAMS:
        return re.search(r"\d+(\.\d+)+", said(tool, "--version"))[0] if shutil.which(tool) else None
    try:
        return importlib.metadata.version(tool).partition("+")[0]
    except importlib.metadata.PackageNotFoundError:
        return None


def said(*command):
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, f"{command}\n{done.stderr}"
    return done.stdout


def versions(group):
    return {tool: version(tool) for tool in GROUPS[group]}


def why_not(group, stored=None):
    """Why the group cannot be counted here or, where its numbers are `stored`, not be compared; or None."""
    if cpu.missing:
        return cpu.missing
    for tool, here in versions(group).items():
        if here is None:
            return f"{tool} is not installed"
        if stored is not None and here != stored["with"][tool]:
            return f"the budgets were stored with {tool} {stored['with'][tool]}, here is {here}"
    return None


def counted(group):
    """In a process of its own, which no other test has changed, in one thread."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "counts.json")
        command = [sys.executable, "-m", "tests.budgets.count", group, str(out)]
        env = {key: value for key, value in os.environ.items() if not key.startswith(("REDIT_FAST_", "TRITON_"))}
        done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return json.loads(out.read_text())
