"""An entry of PTX made ready to run: each instruction a function of the machine and some of its threads."""

import functools
from typing import NamedTuple

import numpy as np

from tests.ptx import copies, instructions, tensor_cores
from tests.ptx.memory import U
from tests.ptx.parse import Fault

BITS = (8, 16, 32, 64)
TYPES = {f"{name}{bits}": np.dtype(f"{kind}{bits // 8}") for name, kind in zip("sub", "iuu") for bits in BITS}
TYPES |= {f"f{bits}": np.dtype(f"f{bits // 8}") for bits in BITS[1:]}
TYPES |= {"bf16": np.dtype("u2"), "bf16x2": np.dtype("u4"), "f16x2": np.dtype("u4"), "pred": np.dtype(bool)}
TABLE = {
    name: entry
    for file in (instructions, copies, tensor_cores)
    for names, entry in file.TABLE.items()
    for name in names.split()
}
SPECIAL = "tid.x ntid.x ctaid.x ctaid.y nctaid.x nctaid.y clusterid.x nclusterid.x laneid".split()
SPECIAL += ["cluster_ctarank", "cluster_nctarank"]


class Step(NamedTuple):
    opcode: str
    run: object  # of the machine and threads; a result that is true ends the threads' turn
    guard: object  # which of the threads, or None
    jumps: bool


class Program:
    types = TYPES

    def __init__(self, entry, ulps):
        self.ulps = ulps  # of approximations
        self.sizes, self.labels = entry.registers | {f"%{name}": 4 for name in SPECIAL}, entry.labels
        self.code, self.steps = entry.code, [None] * len(entry.code)
        self.unit = 128 if any(each.opcode.startswith("wgmma") for each in entry.code) else 32  # threads in step
        self.units = {"global": 16, "shared": 16}  # bytes of a memory's smallest access
        for place, instruction in enumerate(self.code):
            if decode(instruction.opcode)[0] in (instructions.load, instructions.store):
                self.bind(place)

    def bind(self, place):
        """A kernel has thousands of instructions that a launch does not come to."""
        guard, opcode, operands, _ = self.code[place]
        make, modifiers = decode(opcode)
        run, guard = make(self, modifiers, operands), self.read(guard, "pred") if guard else None
        self.steps[place] = step = Step(opcode, run, guard, make in instructions.JUMPS)
        return step

    def size(self, register):
        if register not in self.sizes:
            raise Fault(f"unknown operand {register}")
        return self.sizes[register]

    def read(self, operand, kind):
        """Gives the operand of threads as `kind`, such as "f32": an array, or a number where it is one for all."""
        dtype = TYPES[kind]
        if isinstance(operand, int):
            bits = operand & (1 << 8 * dtype.itemsize) - 1
            number = np.bool_(operand) if kind == "pred" else np.array(bits, U[dtype.itemsize]).view(dtype)[()]
            return lambda m, s: number
        name = operand.lstrip("!")
        if self.size(name) == 0:
            return (lambda m, s: m.registers[name][s]) if name == operand else (lambda m, s: ~m.registers[name][s])
        if self.size(name) != dtype.itemsize:
            return lambda m, s: m.registers[name][s].astype(U[dtype.itemsize]).view(dtype)
        return (
            (lambda m, s: m.registers[name][s]) if dtype.kind == "u" else lambda m, s: m.registers[name][s].view(dtype)
        )

    def write(self, name):
        """Takes values. Into a wider register signed numbers are extended by their sign, others by zeros."""
        if name == "_":
            return lambda m, s, value: None
        self.size(name)

        def write(m, s, value):
            m.registers[name][s] = value.view(U[value.itemsize]) if value.dtype.kind == "f" else value

        return write

    def address(self, address):
        if isinstance(address.base, int):
            return lambda m, s: np.full(len(m.ids(s)), address.base + address.offset)
        read, offset = self.read(address.base, f"u{8 * self.size(address.base)}"), address.offset
        return lambda m, s: read(m, s).astype(np.int64) + offset


@functools.cache
def decode(opcode):
    """What makes the instruction, and the modifiers and types after the name."""
    parts = opcode.split(".")
    for length in range(len(parts), 0, -1):
        make, known = TABLE.get(".".join(parts[:length]), (None, ""))
        if make and all(part in TYPES or part in known.split() for part in parts[length:]):
            return make, tuple(parts[length:])
    raise Fault(f"unknown opcode {opcode}")
