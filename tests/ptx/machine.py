"""The threads of a grid: their registers, which of them go on, and what wakes those that wait."""

from collections import Counter
from typing import NamedTuple

import numpy as np

from tests.ptx import copies
from tests.ptx.instructions import AGAIN, DONE
from tests.ptx.memory import BLOCK, CLUSTER, Clock, Global, Shared, U
from tests.ptx.parse import Fault, aligned
from tests.ptx.program import Program

WAITS = ("runs", "waits at a block barrier", "waits at a cluster barrier", "waits at an mbarrier", "waits at a shuffle")
RUNS, AT_BLOCK, AT_CLUSTER, AT_MBARRIER, AT_SHUFFLE = range(5)


class Launch(NamedTuple):
    kernel: str
    grid: int | tuple  # blocks, or (x, y)
    threads: int
    cluster: int = 1
    shared: int = 0  # dynamic bytes
    params: bytes = b""


class Registers(dict):
    """By name, of all threads; what nothing has written is ones, and a predicate is true."""

    def __init__(self, sizes, count):
        super().__init__()
        self.sizes, self.count = sizes, count

    def __missing__(self, name):
        size = self.sizes[name]
        self[name] = register = np.full(self.count, -1, f"i{size}").view(U[size]) if size else np.ones(self.count, bool)
        return register


class Machine:
    """One launch; `arrays` are all the memory that it may touch, at their own addresses.

    order: which warp goes on: the "lowest" or "highest" program counter, or "random" by `seed`. late: bulk loads land
    when nobody can go on, else at once. ulps: how far approximations are moved from the correctly rounded result. After
    run(): `instructions` (threads by opcode), `bytes` (by memory and direction), `flop` (of matrix products)."""

    def __init__(self, module, launch, arrays, order="lowest", seed=0, late=True, ulps=0, most_steps=10**6):
        entry, threads, cluster = module.entry(launch.kernel), launch.threads, launch.cluster
        width, height = launch.grid if isinstance(launch.grid, tuple) else (launch.grid, 1)
        self.blocks, self.count = width * height, width * height * threads
        if (launch.kernel, ulps) not in module.programs:
            module.programs[launch.kernel, ulps] = Program(entry, ulps)
        self.program = module.programs[launch.kernel, ulps]
        self.unit = self.program.unit
        if threads % self.unit or not 0 < threads <= entry.most_threads or width % cluster or self.blocks < 1:
            raise Fault(f"it takes whole warps, whole clusters and at most {entry.most_threads} threads: {launch[:5]}")
        if len(launch.params) != entry.parameter_bytes:
            raise Fault(f"{launch.kernel} takes {entry.parameter_bytes} bytes of parameters, got {len(launch.params)}")
        self.order, self.random, self.late = order, np.random.default_rng(seed), late
        self.most_steps, self.threads, self.cluster, self.kernel = most_steps, threads, cluster, launch.kernel
        units, shared_bytes = self.program.units, entry.static_shared + launch.shared
        self.clock = Clock(self.blocks, threads, cluster)
        self.shared = Shared(self.clock, self.blocks, shared_bytes, cluster, units["shared"])
        self.memory = {"global": Global(arrays, units["global"], self.clock), "shared": self.shared}
        self.params = np.frombuffer(launch.params.ljust(aligned(len(launch.params), 16), b"\0"), np.uint8)
        everybody = self.everybody = np.arange(self.count)
        self.registers = Registers(self.program.sizes, self.count)
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
        return self.program.read(operand, kind)(self, s)

    def write(self, name, value, s):
        self.program.write(name)(self, s, value)

    def run(self):
        with np.errstate(all="ignore"):
            for _ in range(self.most_steps):
                ready = np.where(self.state == RUNS, self.pc, DONE)
                front = np.minimum.reduce(ready.reshape(-1, self.unit), axis=1)
                if np.minimum.reduce(front) < DONE:
                    self._step(ready, front)
                elif (self.pc == DONE).all():
                    return self
                elif not (self._release() or copies.land_latest(self)):
                    raise Fault(f"deadlock: {self._census()}")
        raise Fault(f"not done after {self.most_steps} steps: {self._census()}")

    def _choose(self, front):
        if self.order == "lowest":
            return int(front.min())
        live = front[front < DONE]
        return int(live.max() if self.order == "highest" else self.random.choice(np.unique(live)))

    def _step(self, ready, front):
        """The chosen warps, until they branch, block, or come to where others are: so divergent lanes meet again."""
        pc = self._choose(front)
        ids = ((ready.reshape(-1, self.unit) == pc) & (front == pc)[:, None]).ravel().nonzero()[0]
        stop = np.minimum.reduce(ready, where=ready > pc, initial=len(self.program.code))
        adjacent = ids[-1] - ids[0] + 1 == len(ids)
        s = slice(ids[0], ids[-1] + 1) if adjacent else ids  # which NumPy reads without a copy
        ends = False
        while not ends:
            try:
                opcode, run, guard, jumps = self.program.steps[pc] or self.program.bind(pc)
                acting, count = s, len(ids)
                if guard:
                    mask = guard(self, s)
                    count = np.count_nonzero(mask)
                    acting = s if count == len(ids) else ids[mask]
                self.clock.time += 1
                ends = pc + 1 >= stop or jumps and count > 0
                if ends:
                    self.pc[s] = pc + 1
                if count:
                    self.instructions[opcode] += count
                    if blocks := run(self, acting):
                        self.pc[s], ends = pc + (blocks != AGAIN), True
            except Fault as fault:
                raise Fault(f"{fault} [{self.program.code[pc].text}, statement {pc}]") from None
            pc += 1

    def _release(self):
        """Full barriers, and warps whose lanes have met. A block's barrier does not wait for threads that have left, a
        cluster's does."""
        pc = self.pc.reshape(-1, 32)
        warp = (self.state == AT_SHUFFLE).reshape(-1, 32).all(1) & (pc == pc[:, :1]).all(1)
        self.state[np.repeat(warp, 32)] = RUNS
        left = (self.pc == DONE).reshape(self.blocks, -1)
        block = ((self.state == AT_BLOCK).reshape(self.blocks, -1) | left).all(1) & ~left.all(1)
        cluster = (self.state == AT_CLUSTER).reshape(self.blocks // self.cluster, -1).all(1)
        for full, size, reach in ((block, self.threads, BLOCK), (cluster, self.threads * self.cluster, CLUSTER)):
            for first in np.flatnonzero(full) * size:
                members = slice(first, first + size)
                self.state[members], self.arrived[members] = RUNS, False
                self.clock.barrier(members, reach)
        return bool(warp.any() or block.any() or cluster.any())

    def _census(self):
        left, code = np.flatnonzero(self.pc < DONE), self.program.code
        kinds = Counter(zip(self.state[left].tolist(), self.pc[left].tolist()))
        return "; ".join(f"{n} threads: {WAITS[state]} [{code[pc - 1].text}]" for (state, pc), n in kinds.items())
