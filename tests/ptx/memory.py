"""Memory, and who touched a byte last. Two accesses, one of them a write, are a race when they are by threads of a
block in one epoch of the block, by blocks of a cluster in one epoch of the cluster, or by two clusters. A barrier
starts an epoch. An mbarrier's phase without bytes orders, for who waits for it, what was before. The last writer and
the last reader are kept, or that there were several.
"""

import ctypes

import numpy as np

from tests.ptx.parse import Fault, aligned

U = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
WHO, EPOCH, CLUSTER_EPOCH = (1 << 24) - 1, 24, 44  # a stamp: who, the block's epoch, the cluster's
LOADING = -1
PEER = 24  # of a shared address: the bits above hold 1 + the rank of another block


class Clock:
    """Who may have touched a byte: nobody, a thread, several of a block, several of a cluster, several clusters."""

    def __init__(self, blocks, threads, cluster):
        self.threads, count, clusters = threads, blocks * threads, blocks // cluster
        self.block_epoch, self.cluster_epoch = np.zeros(blocks, np.int64), np.zeros(clusters, np.int64)
        self.of_block, self.of_cluster, self.of_all = count + 1, count + 1 + blocks, count + 1 + blocks + clusters
        self.time, self.acquired = 0, np.zeros(count, np.int64)
        thread, block = np.arange(count), np.arange(blocks)
        self.block = np.concatenate([[-1], thread // threads, block, np.full(clusters + 1, -1)])
        of_threads = [thread // threads // cluster, block // cluster, np.arange(clusters)]
        self.cluster = np.concatenate([[-1], *of_threads, [-1]])

    def stamp(self, ids):
        block, cluster = self.block[ids + 1], self.cluster[ids + 1]
        return ids + 1 | self.block_epoch[block] << EPOCH | self.cluster_epoch[cluster] << CLUSTER_EPOCH

    def unordered(self, old, now):
        who, me, apart = old & WHO, now & WHO, old ^ now
        other = (who != 0) & (who != me)
        if not other.any():
            return other
        same_epoch = apart << 64 - CLUSTER_EPOCH >> 64 - CLUSTER_EPOCH + EPOCH == 0
        same_cluster_epoch = (self.cluster[who] != self.cluster[me]) | (apart >> CLUSTER_EPOCH == 0)
        return other & np.where(self.block[who] == self.block[me], same_epoch, same_cluster_epoch)

    def several(self, old, now):
        block, cluster = self.block[now & WHO], self.cluster[now & WHO]
        apart = np.where(self.cluster[old & WHO] == cluster, self.of_cluster + cluster, self.of_all)
        return np.where(self.block[old & WHO] == block, self.of_block + block, apart) | now & ~WHO

    def name(self, who):
        if who >= self.of_block:
            return "several threads"
        return f"thread {(who - 1) % self.threads} of block {(who - 1) // self.threads}"


def cells(flat, n, size):
    """Bytes as rows of n, each of n / size unsigned numbers."""
    return flat[: len(flat) // n * n].view(U[size]).reshape(-1, n // size)


class Memory:
    def __init__(self, flat, units, clock):
        self.bytes, self.clock = flat, clock
        self.written, self.read, self.time = (np.zeros(units, np.int64) for _ in range(3))

    def load(self, at, n, size, ids):
        place, units = self.find(at, n, ids)
        self.touch(units, ids, store=False)
        return cells(self.bytes, n, size)[place // n]

    def store(self, at, n, values, ids):
        place, units = self.find(at, n, ids)
        self.touch(units, ids, store=True)
        cells(self.bytes, n, values.itemsize)[place // n] = values

    def touch(self, units, ids, store):
        """Thread ids[i] reads or writes units[i]."""
        now = np.broadcast_to(self.clock.stamp(ids)[:, None], units.shape)
        recent = self.time[units] >= self.clock.acquired[ids][:, None]
        self.time[units] = self.clock.time
        for last, did in ((self.written, "wrote"), (self.read, "read"))[: 1 + store]:
            self.fault_where(recent & self.clock.unordered(last[units], now), last, units, now, store, did)
        if store:
            self.written[units] = now
            self.fault_where(self.written[units] != now, self.written, units, now, store, "writes too")
        else:
            old = self.read[units]
            open_too = recent & self.clock.unordered(old, now)
            mine = np.where(open_too, self.clock.several(old, now), now) if open_too.any() else now
            self.read[units] = mine
            old = self.read[units]
            apart = old != mine
            if apart.any():  # several threads of this instruction
                self.read[units[apart]] = self.clock.several(old[apart], now[apart])

    def fault_where(self, bad, last, units, now, store, did):
        if bad.any():
            i = tuple(np.argwhere(bad)[0])
            me, other = (self.clock.name(stamp & WHO) for stamp in (now[i], last[units[i]]))
            raise Fault(f"race: {me} {'writes' if store else 'reads'} {self.describe(units[i])}, which {other} {did}")


def check_alignment(at, n, space):
    if (at % n != 0).any():
        raise Fault(f"misaligned: {space} address {at[at % n != 0][0]:#x} for {n} bytes")


class Global(Memory):
    """The process's own memory, inside the arrays only. A unit is an element of an array."""

    def __init__(self, arrays, clock):
        if not all(array.flags.c_contiguous for array in arrays):
            raise ValueError("arrays must be contiguous: what lies between their elements is out of bounds")
        arrays = sorted((array for array in arrays if array.size), key=lambda array: array.ctypes.data)
        self.begin = np.array([array.ctypes.data for array in arrays])
        self.end = self.begin + [array.nbytes for array in arrays]
        self.item = np.array([array.itemsize for array in arrays])
        self.first = np.cumsum([0] + [array.size for array in arrays])
        self.base = self.begin[0] // 16 * 16
        whole = (ctypes.c_uint8 * int(aligned(self.end[-1] - self.base, 16))).from_address(int(self.base))
        super().__init__(np.ctypeslib.as_array(whole), self.first[-1], clock)

    def find(self, at, n, ids, align=None):
        check_alignment(at, align or n, "global")
        which = np.searchsorted(self.begin, at, "right") - 1
        stray = (which < 0) | (at + n > self.end[which])
        if stray.any():
            raise Fault(f"out of bounds: {n} bytes at global address {at[stray][0]:#x} are in no array")
        within = (at - self.begin[which])[:, None] + np.arange(0, n, self.item[which].min())
        return at - self.base, self.first[which, None] + within // self.item[which, None]

    def describe(self, unit):
        which = np.searchsorted(self.first, unit, "right") - 1
        return f"element {unit - self.first[which]} of the array at {self.begin[which]:#x}"


class Shared(Memory):
    """A block's bytes, 0xFF at first. What asynchronous copies add: copies.py."""

    def __init__(self, clock, blocks, size, cluster):
        self.size, self.cluster, self.step = size, cluster, aligned(size, 16)
        super().__init__(np.full(blocks * self.step, 0xFF, np.uint8), blocks * self.step, clock)
        self.fences = np.zeros(blocks * clock.threads, np.int64)
        self.dirty = np.zeros(blocks * self.step, np.int64)  # who wrote a byte, after how many of its proxy fences
        self.busy = np.zeros(blocks * self.step, np.int8)  # LOADING, or how many asynchronous operations still read it

    def find(self, at, n, ids, align=None):
        peer, at, block = at >> PEER, at & (1 << PEER) - 1, self.clock.block[ids + 1]
        block = np.where(peer > 0, block // self.cluster * self.cluster + peer - 1, block)
        if (at + n > self.size).any():
            raise Fault(f"out of bounds: {n} bytes at shared address {at.max()} of {self.size} bytes")
        check_alignment(at, align or n, "shared")
        place = block * self.step + at
        return place, place[:, None] + np.arange(n)

    def describe(self, unit):
        return f"shared byte {unit % self.step} of block {unit // self.step}"

    def check_busy(self, units, ids, store):
        busy = self.busy[units]
        bad = busy != 0 if store else busy == LOADING
        if bad.any():
            thread, unit = (x[bad][0] for x in (np.broadcast_to(ids[:, None], bad.shape), units))
            what = "of a bulk load not waited for" if self.busy[unit] == LOADING else "that something has still to read"
            raise Fault(f"race: {self.clock.name(thread + 1)} touches {self.describe(unit)}, {what}")

    def touch(self, units, ids, store):
        self.check_busy(units, ids, store)
        super().touch(units, ids, store)
        if store:
            self.dirty[units] = (ids + 1 | self.fences[ids] << EPOCH)[:, None]
