"""The threads of a grid: their registers, which of them go on, and what wakes those that wait."""

import functools
from collections import Counter
from typing import NamedTuple

import numpy as np

from tests.ptx import copies, instructions, tensor_cores
from tests.ptx.instructions import DONE
from tests.ptx.memory import Clock, Global, Shared, U
from tests.ptx.parse import Fault, aligned

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
WAITS = ("runs", "waits at a block barrier", "waits at a cluster barrier", "waits at an mbarrier", "waits at a shuffle")
RUNS, AT_BLOCK, AT_CLUSTER, AT_MBARRIER, AT_SHUFFLE = range(5)


class Launch(NamedTuple):
    kernel: str
    grid: int | tuple  # blocks, or (x, y)
    threads: int
    cluster: int = 1
    shared: int = 0  # dynamic bytes
    params: bytes = b""


@functools.cache
def decode(opcode):
    """The function, and the modifiers and types after the name."""
    parts = opcode.split(".")
    for length in range(len(parts), 0, -1):
        function, known = TABLE.get(".".join(parts[:length]), (None, ""))
        if function and all(part in TYPES or part in known.split() for part in parts[length:]):
            return function, tuple(parts[length:])
    raise Fault(f"unknown opcode {opcode}")


class Machine:
    """One launch; `arrays` are all the memory that it may touch, at their own addresses.

    order: which warp goes on: the "lowest" or "highest" program counter, or "random" by `seed`. late: bulk loads land
    when nobody can go on, else at once. ulps: how far approximations are moved from the correctly rounded result. After
    run(): `instructions` (threads by opcode), `bytes` (by memory and direction), `flop` (of matrix products)."""

    types = TYPES

    def __init__(self, module, launch, arrays, order="lowest", seed=0, late=True, ulps=0, most_steps=10**6):
        entry, threads, cluster = module.entry(launch.kernel), launch.threads, launch.cluster
        self.kernel = launch.kernel
        width, height = launch.grid if isinstance(launch.grid, tuple) else (launch.grid, 1)
        self.blocks, self.count = width * height, width * height * threads
        self.unit = 128 if any(instruction.opcode.startswith("wgmma") for instruction in entry.code) else 32
        if threads % self.unit or not 0 < threads <= entry.most_threads or width % cluster or self.blocks < 1:
            raise Fault(f"it takes whole warps, whole clusters and at most {entry.most_threads} threads: {launch[:5]}")
        if len(launch.params) != entry.parameter_bytes:
            raise Fault(f"{launch.kernel} takes {entry.parameter_bytes} bytes of parameters, got {len(launch.params)}")
        self.order, self.random, self.late, self.ulps = order, np.random.default_rng(seed), late, ulps
        self.most_steps, self.threads, self.cluster = most_steps, threads, cluster
        self.code, self.labels = entry.code, entry.labels
        self.decoded = [decode(instruction.opcode) for instruction in self.code]
        self.clock = Clock(self.blocks, threads, cluster)
        self.shared = Shared(self.clock, self.blocks, entry.static_shared + launch.shared, cluster)
        self.memory = {"global": Global(arrays, self.clock), "shared": self.shared}
        self.params = np.frombuffer(launch.params.ljust(aligned(len(launch.params), 16), b"\0"), np.uint8)
        everybody = self.everybody = np.arange(self.count)
        self.registers = {}
        for size in set(entry.registers.values()):
            names = [name for name in entry.registers if entry.registers[name] == size]
            cells = np.full((len(names), self.count * (size or 1)), 0xFF if size else 1, np.uint8)
            self.registers |= zip(names, cells.view(U[size] if size else bool))
        x, y = everybody // threads % width, everybody // threads // width
        special = {"tid": everybody % threads, "ntid": threads, "ctaid": x, "nctaid": width, "clusterid": x // cluster}
        special |= {"nclusterid": width // cluster}
        special = {f"{name}.x": value for name, value in special.items()} | {"ctaid.y": y, "nctaid.y": height}
        special |= {"cluster_ctarank": x % cluster, "cluster_nctarank": cluster, "laneid": everybody % 32}
        self.registers |= {f"%{name}": np.full(self.count, value, np.uint32) for name, value in special.items()}
        self.pc, self.state = np.zeros(self.count, np.int64), np.zeros(self.count, np.int8)
        self.arrived = np.zeros(self.count, bool)  # at the cluster's barrier
        self.barriers, self.loads, self.stores, self.products = {}, [], {}, {}
        self.instructions, self.bytes, self.flop = Counter(), Counter(), 0

    def ids(self, s):
        return self.everybody[s]

    def read(self, operand, kind, s):
        """The operand of threads `s` as `kind`, such as "f32": an array, or a number where it is one for all."""
        if isinstance(operand, int):
            size = TYPES[kind].itemsize
            return np.array(operand & (1 << 8 * size) - 1, U[size]).view(TYPES[kind])[()]
        if operand not in self.registers:
            raise Fault(f"unknown operand {operand}")
        value = self.registers[operand][s]
        return value.astype(U[TYPES[kind].itemsize], copy=False).view(TYPES[kind])

    def predicate(self, name, s):
        return ~self.registers[name[1:]][s] if name[0] == "!" else self.registers[name][s]

    def write(self, name, value, s):
        """Into a wider register signed numbers are extended by their sign, others by zeros."""
        if name == "_":
            return
        register, value = self.registers[name], np.asarray(value)
        if register.dtype != bool:
            kind = "i" if value.dtype.kind == "i" else "u"
            bits = value if value.dtype.kind in "iu" else value.view(f"u{value.itemsize}")
            value = bits.astype(f"{kind}{register.itemsize}", copy=False).view(register.dtype)
        register[s] = value

    def address(self, address, s):
        if isinstance(address.base, int):
            return np.full(len(self.ids(s)), address.base + address.offset)
        return self.registers[address.base][s].astype(np.int64) + address.offset

    def run(self):
        with np.errstate(all="ignore"):
            for _ in range(self.most_steps):
                running = (self.state == RUNS) & (self.pc < DONE)
                if running.any():
                    self._step(running)
                elif (self.pc == DONE).all():
                    copies.check_nothing_open(self)
                    return self
                elif not (self._release() or copies.land_latest(self)):
                    raise Fault(f"deadlock: {self._census()}")
        raise Fault(f"not done after {self.most_steps} steps: {self._census()}")

    def _step(self, running):
        """The chosen warps, until they branch, block, or come to where others are: so divergent lanes meet again."""
        front = np.where(running, self.pc, DONE).reshape(-1, self.unit).min(1)
        live = np.unique(front[front < DONE])
        pc = int({"lowest": live[0], "highest": live[-1], "random": self.random.choice(live)}[self.order])
        ids = np.flatnonzero(running & (self.pc == pc) & np.repeat(front == pc, self.unit))
        s = slice(None) if len(ids) == self.count else ids
        stop = self.pc[running & (self.pc > pc)].min(initial=len(self.code))
        ends = False
        while not ends:
            instruction, (function, modifiers) = self.code[pc], self.decoded[pc]
            acting = s if not instruction.guard else ids[self.predicate(instruction.guard, s)]
            pc += 1
            ends = pc >= stop or function in (instructions.branch, instructions.leave)
            if ends:
                self.pc[ids] = pc
            self.clock.time += 1
            count = len(ids) if acting is s else len(acting)
            if count:
                self.instructions[instruction.opcode] += count
                try:
                    blocks = function(self, modifiers, instruction.operands, acting)
                except Fault as fault:
                    raise Fault(f"{fault} [{instruction.text}, statement {pc - 1}]") from None
                if blocks == instructions.AGAIN:
                    self.pc[ids], ends = pc - 1, True
                elif blocks and not ends:
                    self.pc[ids] = ends = pc

    def _release(self):
        """Full barriers, and warps whose lanes have met. A block's barrier does not wait for threads that have left, a
        cluster's does."""
        pc = self.pc.reshape(-1, 32)
        warp = (self.state == AT_SHUFFLE).reshape(-1, 32).all(1) & (pc == pc[:, :1]).all(1)
        self.state[np.repeat(warp, 32)] = RUNS
        left = (self.pc == DONE).reshape(self.blocks, -1)
        block = ((self.state == AT_BLOCK).reshape(self.blocks, -1) | left).all(1) & ~left.all(1)
        cluster = (self.state == AT_CLUSTER).reshape(self.blocks // self.cluster, -1).all(1)
        self.clock.block_epoch += block | np.repeat(cluster, self.cluster)
        self.clock.cluster_epoch += cluster
        for full, size in ((block, self.threads), (cluster, self.threads * self.cluster)):
            for first in np.flatnonzero(full) * size:
                members = slice(first, first + size)
                self.state[members], self.arrived[members] = RUNS, False
        return bool(warp.any() or block.any() or cluster.any())

    def _census(self):
        left = np.flatnonzero(self.pc < DONE)
        kinds = Counter(zip(self.state[left].tolist(), self.pc[left].tolist()))
        return "; ".join(f"{n} threads: {WAITS[state]} [{self.code[pc - 1].text}]" for (state, pc), n in kinds.items())
