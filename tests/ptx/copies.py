"""What goes on beside the threads: barriers of blocks and clusters, mbarriers, bulk copies and the proxy fence."""

from typing import NamedTuple

import numpy as np

from tests.ptx.instructions import action, nothing
from tests.ptx.memory import LOADING, PEER, TIME, WHO
from tests.ptx.parse import Fault


class Copy(NamedTuple):
    data: np.ndarray  # the bytes in global memory
    elements: np.ndarray  # the units of global memory, as one row
    place: int  # of the first byte in shared memory
    units: np.ndarray  # of shared memory, as one row
    barrier: int | None  # of a load


class Mbarrier:
    """A phase is over when `count` threads have arrived and all bytes that they expect have come."""

    def __init__(self, count):
        self.count = self.pending = count
        self.bytes = self.phase = self.expected = 0
        self.over_since = 0  # the time of the end of its last phase, if that had no bytes
        self.landed = []  # copies that no thread has waited for


@action
def block_barrier(m, o, a, s):
    if a != (0,):
        raise Fault("unknown operands: only barrier 0, of all threads, is known")
    m.state[s] = 1
    return True


@action
def cluster_arrive(m, o, a, s):
    m.arrived[s] = True


@action
def cluster_wait(m, o, a, s):
    if not m.arrived[s].all():
        raise Fault("waits at the cluster's barrier without having arrived")
    m.state[s] = 2
    return True


@action
def map_address(m, o, a, s):
    m.write(a[0], m.read(a[1], "u32", s) | m.read(a[2], "u32", s) + np.uint32(1) << np.uint32(PEER), s)


@action
def proxy_fence(m, o, a, s):
    m.shared.fences[s] += 1


class Thread:
    """One thread's view of its operands."""

    def __init__(self, m, thread):
        self.m, self.id, self.one = m, thread, np.array([thread])

    def number(self, operand, kind="u32"):
        return int(np.ravel(self.m.read(operand, kind, self.one))[0])

    def address(self, operand):
        return self.m.program.address(operand)(self.m, self.one)

    def shared(self, operand, n=8, align=8):
        """The place of the first byte, and the units."""
        (place,), units = self.m.shared.find(self.address(operand), n, self.one, align)
        return place, units

    def copy(self, shared, address, size, barrier=None):
        n, memory = self.number(size), self.m.memory["global"]
        if n % 16:
            raise Fault(f"misaligned: a bulk copy of {n} bytes")
        (first,), elements = memory.find(self.address(address), n, self.one, 16)
        return Copy(
            memory.bytes[first : first + n],
            elements,
            *self.shared(shared, n, 16),
            None if barrier is None else self.shared(barrier)[0],
        )


def each_thread(function):
    @action
    def instruction(m, o, a, s):
        for thread in m.ids(s):
            function(m, Thread(m, thread), *a)

    return instruction


@each_thread
def init(m, thread, address, count):
    m.barriers[thread.shared(address)[0]] = Mbarrier(thread.number(count))


@each_thread
def arrive_at(m, thread, _, address, expected=0):
    arrive(m, thread.shared(address)[0], 1, thread.number(expected))


def barrier_at(m, place):
    if place not in m.barriers:
        raise Fault(f"there is no mbarrier at {m.shared.describe(place // m.shared.unit)}")
    return m.barriers[place]


def arrive(m, place, threads, incoming):
    barrier = barrier_at(m, place)
    barrier.pending -= threads
    barrier.bytes += incoming
    barrier.expected += max(incoming, 0)
    if barrier.pending < 0:
        where = m.shared.describe(place // m.shared.unit)
        raise Fault(f"more threads arrive at the mbarrier at {where} than it counts")
    if barrier.pending == barrier.bytes == 0:
        barrier.over_since = 0 if barrier.expected else m.clock.time
        barrier.pending, barrier.phase, barrier.expected = barrier.count, barrier.phase + 1, 0
        m.state[m.state == 3] = 0


@action
def try_wait(m, o, a, s):
    ids = m.ids(s)
    places, phases = m.shared.find(m.program.address(a[1])(m, s), 8, ids)[0], np.zeros(len(ids), np.int64)
    for place in np.unique(places):
        phases[places == place] = barrier_at(m, place).phase
    over = phases & 1 != m.read(a[2], "u32", s) & 1
    for place in np.unique(places[over]):
        barrier = m.barriers[place]
        m.clock.acquire(ids[over & (places == place)], barrier.over_since)
        while barrier.landed:
            m.shared.busy[barrier.landed.pop().units] = 0
    m.write(a[0], over, s)
    m.state[ids[~over]] = 3
    return True


@each_thread
def bulk_load(m, thread, to, source, size, barrier):
    copy = thread.copy(to, source, size, barrier)
    m.memory["global"].touch(copy.elements, thread.one, store=False)
    m.bytes["bulk read"] += len(copy.data)
    issue_load(m, thread, copy)


def issue_load(m, thread, copy):
    """From here until a thread has waited for the mbarrier nobody may touch the bytes."""
    m.shared.check_there(copy.place // m.shared.step, thread.one)
    m.shared.touch(copy.units, thread.one, store=True)
    m.shared.written[copy.units] = m.shared.read[copy.units] = m.shared.dirty[copy.units] = 0
    m.shared.busy[copy.units] = LOADING
    m.loads.append(copy)
    if not m.late:
        land_latest(m)


def land_latest(m):
    if m.loads:
        copy = m.loads.pop()
        m.shared.bytes[copy.place : copy.place + len(copy.data)] = copy.data
        m.barriers[copy.barrier].landed.append(copy)
        arrive(m, copy.barrier, 0, -len(copy.data))
        return True


@each_thread
def bulk_store(m, thread, to, source, size):
    copy = thread.copy(source, to, size)
    m.shared.touch(copy.units, thread.one, store=False)
    check_fenced(m, copy.units)
    m.shared.busy[copy.units] += 1
    m.bytes["bulk written"] += len(copy.data)
    m.stores.setdefault(thread.id, [[]])[-1].append(copy)


def check_fenced(m, units):
    """Of what an asynchronous copy or product is to read."""
    who, after = m.shared.dirty[units] & WHO, m.shared.dirty[units] >> TIME
    unfenced = (who != 0) & (m.shared.fences[who - 1] == after)
    if unfenced.any():
        unit, name = units[unfenced][0], m.clock.name(who[unfenced][0])
        raise Fault(f"no fence.proxy.async: {name} wrote {m.shared.describe(unit)}, read by an asynchronous operation")


@each_thread
def commit_group(m, thread):
    m.stores.setdefault(thread.id, [[]]).append([])


@each_thread
def wait_group(m, thread, open_groups):
    """Bulk stores read here, as late as they may."""
    groups = m.stores.setdefault(thread.id, [[]])
    while len(groups) - 1 > open_groups:
        for copy in groups.pop(0):
            m.shared.busy[copy.units] -= 1
            m.shared.touch(copy.units, thread.one, store=False)
            m.memory["global"].touch(copy.elements, thread.one, store=True)
            copy.data[:] = m.shared.bytes[copy.place : copy.place + len(copy.data)]


SHARED = "shared shared::cta shared::cluster"
SCOPES = "release acquire relaxed aligned cta cluster gpu gl"
TABLE = {
    "bar.sync barrier.sync barrier.cta.sync": (block_barrier, "aligned"),
    "barrier.cluster.arrive": (cluster_arrive, SCOPES),
    "barrier.cluster.wait": (cluster_wait, SCOPES),
    "mapa": (map_address, SHARED),
    "mbarrier.init": (init, SHARED),
    "mbarrier.arrive mbarrier.arrive.expect_tx": (arrive_at, f"{SHARED} {SCOPES}"),
    "mbarrier.try_wait.parity": (try_wait, f"{SHARED} {SCOPES}"),
    "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes": (bulk_load, ""),
    "cp.async.bulk.global.shared::cta.bulk_group": (bulk_store, ""),
    "cp.async.bulk.commit_group": (commit_group, ""),
    "cp.async.bulk.wait_group": (wait_group, "read"),
    "fence.proxy.async": (proxy_fence, SHARED),
    "fence.mbarrier_init fence.acq_rel fence.sc membar": (nothing, SCOPES),
    "createpolicy.fractional": (nothing, "L2::evict_last L2::evict_first"),
}
