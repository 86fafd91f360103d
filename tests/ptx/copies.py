"""What goes on beside the threads: barriers of blocks and clusters, mbarriers, bulk copies and the proxy fence."""

from typing import NamedTuple

import numpy as np

from tests.ptx.instructions import nothing
from tests.ptx.memory import EPOCH, LOADING, PEER, WHO
from tests.ptx.parse import Fault


class Copy(NamedTuple):
    data: np.ndarray  # in global memory
    units: np.ndarray  # its elements
    places: np.ndarray  # of the bytes in shared memory
    barrier: int  # of a load


class Mbarrier:
    """A phase is over when `count` threads have arrived and all bytes that they expect have come."""

    def __init__(self, count):
        self.count = self.pending = count
        self.bytes = self.phase = self.expected = 0
        self.over_since = 0  # the time of the end of its last phase, if that had no bytes
        self.landed = []  # copies that no thread has waited for


def block_barrier(m, o, a, s):
    if a != (0,):
        raise Fault("unknown operands: only barrier 0, of all threads, is known")
    m.state[s] = 1
    return True


def cluster_arrive(m, o, a, s):
    m.arrived[s] = True


def cluster_wait(m, o, a, s):
    if not m.arrived[s].all():
        raise Fault("waits at the cluster's barrier without having arrived")
    m.state[s] = 2
    return True


def map_address(m, o, a, s):
    m.write(a[0], m.read(a[1], "u32", s) | m.read(a[2], "u32", s) + np.uint32(1) << np.uint32(PEER), s)


def proxy_fence(m, o, a, s):
    m.shared.fences[m.ids(s)] += 1


class Thread:
    """One thread's view of its operands."""

    def __init__(self, m, thread):
        self.m, self.id, self.one = m, thread, np.array([thread])

    def number(self, operand, kind="u32"):
        return int(np.ravel(self.m.read(operand, kind, self.one))[0])

    def shared(self, address, n=8, align=8):
        return self.m.shared.find(self.m.address(address, self.one), n, self.one, align)[1][0]

    def copy(self, shared, address, size, barrier=None):
        n, memory = self.number(size), self.m.memory["global"]
        if n % 16:
            raise Fault(f"misaligned: a bulk copy of {n} bytes")
        (first,), (units,) = memory.find(self.m.address(address, self.one), n, self.one, 16)
        places = self.shared(shared, n, 16)
        return Copy(memory.bytes[first : first + n], units, places, barrier and self.shared(barrier)[0])


def each_thread(function):
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
        raise Fault(f"there is no mbarrier at {m.shared.describe(place)}")
    return m.barriers[place]


def arrive(m, place, threads, incoming):
    barrier = barrier_at(m, place)
    barrier.pending -= threads
    barrier.bytes += incoming
    barrier.expected += max(incoming, 0)
    if barrier.pending < 0:
        raise Fault(f"more threads arrive at the mbarrier at {m.shared.describe(place)} than it counts")
    if barrier.pending == barrier.bytes == 0:
        barrier.over_since = 0 if barrier.expected else m.clock.time
        barrier.pending, barrier.phase, barrier.expected = barrier.count, barrier.phase + 1, 0
        m.state[m.state == 3] = 0


def try_wait(m, o, a, s):
    ids = m.ids(s)
    places, phases = m.shared.find(m.address(a[1], s), 8, ids)[0], np.zeros(len(ids), np.int64)
    for place in np.unique(places):
        phases[places == place] = barrier_at(m, place).phase
    over = phases & 1 != m.read(a[2], "u32", s) & 1
    for place in np.unique(places[over]):
        barrier, waited = m.barriers[place], ids[over & (places == place)]
        m.clock.acquired[waited] = np.maximum(m.clock.acquired[waited], barrier.over_since)
        while barrier.landed:
            m.shared.busy[barrier.landed.pop().places] = 0
    m.write(a[0], over, s)
    m.state[ids[~over]] = 3
    return True


@each_thread
def bulk_load(m, thread, to, source, size, barrier):
    copy = thread.copy(to, source, size, barrier)
    m.memory["global"].touch(copy.units[None], thread.one, store=False)
    m.bytes["bulk read"] += len(copy.places)
    issue_load(m, thread, copy)


def issue_load(m, thread, copy):
    """From here until a thread has waited for the mbarrier nobody may touch the bytes."""
    m.shared.touch(copy.places[None], thread.one, store=True)
    m.shared.written[copy.places] = m.shared.read[copy.places] = m.shared.dirty[copy.places] = 0
    m.shared.busy[copy.places] = LOADING
    m.loads.append(copy)
    if not m.late:
        land_latest(m)


def land_latest(m):
    if m.loads:
        copy = m.loads.pop()
        m.shared.bytes[copy.places] = copy.data
        m.barriers[copy.barrier].landed.append(copy)
        arrive(m, copy.barrier, 0, -len(copy.places))
        return True


@each_thread
def bulk_store(m, thread, to, source, size):
    copy = thread.copy(source, to, size)
    m.shared.touch(copy.places[None], thread.one, store=False)
    check_fenced(m, copy.places)
    m.shared.busy[copy.places] += 1
    m.bytes["bulk written"] += len(copy.places)
    m.stores.setdefault(thread.id, [[]])[-1].append(copy)


def check_fenced(m, places):
    """Of bytes that an asynchronous copy or product is to read."""
    who, after = m.shared.dirty[places] & WHO, m.shared.dirty[places] >> EPOCH
    unfenced = (who != 0) & (m.shared.fences[who - 1] == after)
    if unfenced.any():
        place, name = places[unfenced][0], m.clock.name(who[unfenced][0])
        raise Fault(f"no fence.proxy.async: {name} wrote {m.shared.describe(place)}, read by an asynchronous operation")


@each_thread
def commit_group(m, thread):
    m.stores.setdefault(thread.id, [[]]).append([])


@each_thread
def wait_group(m, thread, open_groups):
    """Bulk stores read here, as late as they may."""
    groups = m.stores.setdefault(thread.id, [[]])
    while len(groups) - 1 > open_groups:
        for copy in groups.pop(0):
            m.shared.busy[copy.places] -= 1
            m.shared.touch(copy.places[None], thread.one, store=False)
            m.memory["global"].touch(copy.units[None], thread.one, store=True)
            copy.data[:] = m.shared.bytes[copy.places]


def check_nothing_open(m):
    stores = [thread for thread, groups in m.stores.items() if any(groups)]
    if stores or m.loads:
        raise Fault(f"the kernel ends during {len(m.loads)} bulk loads and bulk stores of {len(stores)} threads")


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
