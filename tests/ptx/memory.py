"""Memory, and who touched it last. Two accesses, one of them a write, are a race when they are by two threads and no
barrier lies between: of the block, of the cluster, or an mbarrier whose phase had no bytes, for who waits for it. Of
other clusters there is none. The last writer and the last reader are kept, or that there were several.
"""

import ctypes

import numpy as np

from tests.ptx.parse import Fault, aligned

U = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
WHO, TIME = (1 << 24) - 1, 24  # a stamp: who, and when
LOADING = -1
PEER = 24  # of a shared address: the bits above hold 1 + the rank of another block
some = np.count_nonzero  # as any(), in a tenth of its time
BLOCK, CLUSTER, GRID = range(3)  # whom a thread shares a block, a cluster or only the grid with


class Clock:
    """Who: nobody, a thread, several of a block, several of a cluster, several clusters."""

    def __init__(self, blocks, threads, cluster):
        self.threads, count, clusters = threads, blocks * threads, blocks // cluster
        self.of_block, self.of_cluster, self.of_all = count + 1, count + 1 + blocks, count + 1 + blocks + clusters
        self.time = 1
        self.since = np.ones((3, count), np.int64)  # for each thread: what is older is over, of BLOCK, CLUSTER, GRID
        thread, block = np.arange(count), np.arange(blocks)
        self.block = np.concatenate([[-1], thread // threads, block, np.full(clusters + 1, -1)])
        of_threads = [thread // threads // cluster, block // cluster, np.arange(clusters)]
        self.cluster = np.concatenate([[-1], *of_threads, [-1]])

    def barrier(self, threads, reach):
        """Of all threads of a block or a cluster."""
        self.since[: reach + 1, threads] = self.time + 1

    def acquire(self, threads, time):
        self.since[:, threads] = np.maximum(self.since[:, threads], time)

    def unordered(self, old, ids, reach):
        """Which of the stamps `old`, a row each of `ids`, are of others in `reach` who may still be at it."""
        other = (old >> TIME >= self.since[reach, ids][:, None]) & (old & WHO != ids[:, None] + 1)
        if reach != BLOCK and some(other):
            row, column = np.nonzero(other)
            who, thread = old[row, column] & WHO, ids[row]
            near = np.where(self.cluster[who] == self.cluster[thread + 1], CLUSTER, GRID)
            near[self.block[who] == self.block[thread + 1]] = BLOCK
            other[row, column] = old[row, column] >> TIME >= self.since[near, thread]
        return other

    def several(self, old, now):
        block, cluster = self.block[now & WHO], self.cluster[now & WHO]
        apart = np.where(self.cluster[old & WHO] == cluster, self.of_cluster + cluster, self.of_all)
        return np.where(self.block[old & WHO] == block, self.of_block + block, apart) | now & ~WHO

    def name(self, who):
        if who >= self.of_block:
            return "several threads"
        return f"thread {(who - 1) % self.threads} of block {(who - 1) // self.threads}"


class Memory:
    """Bytes, of which every access takes whole units."""

    def __init__(self, flat, count, unit, clock, reach):
        self.bytes, self.unit, self.clock, self.reach = flat, unit, clock, reach
        self.written, self.read = np.zeros(count, np.int64), np.zeros(count, np.int64)

    def access(self, at, n, size, ids, values=None):
        """Loads rows of n bytes as numbers of `size`, or stores them."""
        place, units = self.find(at, n, ids)
        self.touch(units, ids, store=values is not None)
        cells = self.bytes[: len(self.bytes) // n * n].view(U[size]).reshape(-1, n // size)
        if values is None:
            return cells[place // n]
        cells[place // n] = values

    def touch(self, units, ids, store):
        """Thread ids[i] reads or writes units[i]."""
        now = (self.clock.time << TIME | ids + 1)[:, None]
        self.check(self.clock.unordered(self.written[units], ids, self.reach), self.written, units, now, store, "wrote")
        old = self.read[units]
        open_too = self.clock.unordered(old, ids, self.reach)
        if store:
            self.check(open_too, self.read, units, now, store, "read")
            self.written[units] = now
            self.check(self.written[units] != now, self.written, units, now, store, "writes too")
        else:
            mine = np.where(open_too, self.clock.several(old, now), now) if some(open_too) else now
            self.read[units] = mine
            old = self.read[units]
            apart = old != mine
            if some(apart):  # several threads of this instruction
                self.read[units[apart]] = self.clock.several(old, now)[apart]

    def check(self, bad, last, units, now, store, did):
        if some(bad):
            i = tuple(np.argwhere(bad)[0])
            me, other = (self.clock.name(stamp & WHO) for stamp in (now[i[0], 0], last[units[i]]))
            raise Fault(f"race: {me} {'writes' if store else 'reads'} {self.describe(units[i])}, which {other} {did}")


def check_alignment(at, n, space):
    if some(at & n - 1):
        raise Fault(f"misaligned: {space} address {at[at % n != 0][0]:#x} for {n} bytes")


class Global(Memory):
    """The process's own memory, inside the arrays only."""

    def __init__(self, arrays, unit, clock):
        if not all(array.flags.c_contiguous for array in arrays):
            raise ValueError("arrays must be contiguous: what lies between their elements is out of bounds")
        arrays = sorted((array for array in arrays if array.size), key=lambda array: array.ctypes.data)
        self.begin = np.array([array.ctypes.data for array in arrays])
        self.end = self.begin + [array.nbytes for array in arrays]
        self.item = [array.itemsize for array in arrays]
        last = np.cumsum((self.end - 1) // unit - self.begin // unit + 1)
        self.first = last - (self.end - 1) // unit - 1  # of an array's first unit, less its address in units
        self.base = int(self.begin[0]) // 16 * 16
        whole = (ctypes.c_uint8 * int(aligned(self.end[-1] - self.base, 16))).from_address(self.base)
        super().__init__(np.ctypeslib.as_array(whole), last[-1], unit, clock, GRID)

    def find(self, at, n, ids, align=None):
        check_alignment(at, align or n, "global")
        which = np.searchsorted(self.begin, at, "right") - 1
        stray = (which < 0) | (at + n > self.end[which])
        if some(stray):
            raise Fault(f"out of bounds: {n} bytes at global address {at[stray][0]:#x} are in no array")
        return at - self.base, (self.first[which] + at // self.unit)[:, None] + np.arange(-(-n // self.unit))

    def describe(self, unit):
        which = np.searchsorted(self.first + self.begin // self.unit, unit, "right") - 1
        element = max((unit - self.first[which]) * self.unit - self.begin[which], 0) // self.item[which]
        return f"element {element} of the array at {self.begin[which]:#x}"


class Shared(Memory):
    """A block's bytes, 0xFF at first. What asynchronous copies add: copies.py."""

    def __init__(self, clock, blocks, size, cluster, unit):
        self.size, self.cluster, self.step = size, cluster, aligned(size, 16)
        count = blocks * self.step // unit
        super().__init__(
            np.full(blocks * self.step, 0xFF, np.uint8), count, unit, clock, CLUSTER if cluster > 1 else BLOCK
        )
        self.left = np.zeros(blocks, bool)  # all of the block's threads
        self.reached = np.zeros(blocks, np.int64)  # the stamp of the last of another block who did something here
        self.fences = np.zeros(blocks * clock.threads, np.int64)
        self.dirty = np.zeros(count, np.int64)  # who wrote a unit, after how many of its proxy fences
        self.busy = np.zeros(count, np.int8)  # LOADING, or how many asynchronous operations still read it

    def find(self, at, n, ids, align=None):
        peer, at, block = at >> PEER, at & (1 << PEER) - 1, self.clock.block[ids + 1]
        if some(peer):
            block = np.where(peer > 0, block // self.cluster * self.cluster + peer - 1, block)
            self.check_there(block, ids)
            away = block != self.clock.block[ids + 1]
            self.reached[block[away]] = self.clock.time << TIME | ids[away] + 1
        if some(at + n > self.size):
            raise Fault(f"out of bounds: {n} bytes at shared address {at.max()} of {self.size} bytes")
        check_alignment(at, align or n, "shared")
        place = block * self.step + at
        return place, (place // self.unit)[:, None] + np.arange(-(-n // self.unit))

    def check_there(self, block, ids):
        left = self.left[block]
        if some(left):
            thread, gone = (np.broadcast_to(x, left.shape)[left][0] for x in (ids, block))
            raise Fault(f"{self.clock.name(thread + 1)} reaches into block {gone}, which has left")

    def leave(self, block):
        """Its memory is gone: what others do there, and what is asynchronous, must be over."""
        self.left[block] = True
        threads, last = slice(block * self.clock.threads, (block + 1) * self.clock.threads), self.reached[block]
        if last >> TIME >= self.clock.since[CLUSTER, threads].max():
            name = self.clock.name(last & WHO)
            raise Fault(f"race: block {block} leaves, {name} reached into it, and no barrier was between")
        first = block * self.step // self.unit
        for unit in first + np.flatnonzero(self.busy[first : first + self.step // self.unit])[:1]:
            what = "a bulk load" if self.busy[unit] == LOADING else "a bulk store or product"
            raise Fault(f"block {block} leaves during {what} of {self.describe(unit)}")

    def describe(self, unit):
        return f"shared byte {unit * self.unit % self.step} of block {unit * self.unit // self.step}"

    def check_busy(self, units, ids, store):
        busy = self.busy[units]
        bad = busy != 0 if store else busy == LOADING
        if some(bad):
            thread, unit = (x[bad][0] for x in (np.broadcast_to(ids[:, None], bad.shape), units))
            what = "of a bulk load not waited for" if self.busy[unit] == LOADING else "that something has still to read"
            raise Fault(f"race: {self.clock.name(thread + 1)} touches {self.describe(unit)}, {what}")

    def touch(self, units, ids, store):
        self.check_busy(units, ids, store)
        super().touch(units, ids, store)
        if store:
            self.dirty[units] = (ids + 1 | self.fences[ids] << TIME)[:, None]
