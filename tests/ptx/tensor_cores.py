"""Hopper's matrix products, and the tensor copies that bring their tiles. A tensor map is 48 bytes of our own in the
parameters: address, rows, columns, bytes a row, and the box's rows and columns; elements have two bytes.
"""

from typing import NamedTuple

import numpy as np

from tests.ptx.copies import Copy, check_fenced, each_thread, issue_load
from tests.ptx.instructions import nothing
from tests.ptx.parse import Fault


def swizzled(at):
    """Where shared memory holds a byte under the 128-byte swizzle."""
    return at ^ (at >> 7 & 7) << 4


@each_thread
def tensor_load(m, thread, to, source, barrier, mask=None):
    """A box, 128 bytes wide, into this block or into all of the mask. What lies outside the tensor becomes zeros."""
    at = int(m.address(source, thread.one)[0])
    base, rows, columns, step, box_rows, box_columns = m.params[at : at + 48].view(np.int64).tolist()
    column, row = (thread.number(x, "s32") for x in source.coordinates)
    if column < 0 or row < 0:
        raise Fault("a box that begins outside its tensor")
    box = np.zeros((box_rows, box_columns), np.uint16)
    inside = box[: max(rows - row, 0), : max(columns - column, 0)]
    for i, cells in enumerate(inside if inside.size else ()):
        address = np.array([base + (row + i) * step + 2 * column])
        (first,), units = m.memory["global"].find(address, cells.nbytes, thread.one, 16)
        m.memory["global"].touch(units, thread.one, store=False)
        cells[:] = m.memory["global"].bytes[first : first + cells.nbytes].view(np.uint16)
    m.bytes["bulk read"] += box.nbytes
    rank = int(m.clock.block[thread.id + 1]) % m.cluster
    mask = 1 << rank if mask is None else thread.number(mask)
    places, key = thread.shared(to, box.nbytes, 128), thread.shared(barrier)[0]
    for peer in [peer for peer in range(m.cluster) if mask >> peer & 1]:
        block = (peer - rank) * m.shared.step
        within = swizzled(places % m.shared.step) - places % m.shared.step
        issue_load(m, thread, Copy(box.reshape(-1).view(np.uint8), None, places + within + block, key + block))


class Product(NamedTuple):
    """(64, 16) x (16, columns) of bfloat16, added to float32 in registers."""

    registers: tuple
    threads: np.ndarray  # of the warpgroup
    x: np.ndarray  # places of the bytes, a row each
    w: np.ndarray
    keep: bool  # else the registers' old values are dropped


def warpgroups(m, s):
    groups = m.ids(s).reshape(-1, 128) if len(m.ids(s)) % 128 == 0 else np.zeros((1, 1))
    if (groups != groups[:, :1] // 128 * 128 + np.arange(128)).any():
        raise Fault("wgmma by part of a warpgroup")
    return groups


def tile(m, descriptors, rows, block):
    if (descriptors != descriptors[0]).any() or descriptors[0] >> np.uint64(62) != 1:
        raise Fault("unknown descriptor: one for all threads, with a 128-byte swizzle, is known")
    start, step = (int(descriptors[0]) >> shift & 0x3FFF for shift in (0, 32))
    row = np.arange(rows)[:, None]
    at = swizzled(16 * start + row // 8 * 16 * step + row % 8 * 128 + np.arange(32))
    if at.max() >= m.shared.size:
        raise Fault(f"out of bounds: a tile up to shared address {at.max()}")
    return block * m.shared.step + at


def multiply(m, o, a, s):
    """Reads when it is waited for, as late as it may."""
    registers, x, w, keep, *signs = a
    rows, columns = 64, int(o[2][4:-3])
    if signs != [1, 1, 0, 0] or len(registers) != columns // 2:
        raise Fault("unknown operands")
    for threads in warpgroups(m, s):
        block = threads[0] // m.threads
        tiles = (tile(m, m.read(each, "u64", threads), n, block) for each, n in ((x, rows), (w, columns)))
        product = Product(registers, threads, *tiles, bool(m.predicate(keep, threads)[0]))
        for places in (product.x, product.w):
            m.shared.check_busy(places, threads[:1], store=False)
            check_fenced(m, places)
            m.shared.busy[places] += 1
        m.products.setdefault(threads[0], [[]])[-1].append(product)
        m.flop += 2 * rows * columns * 16


def commit(m, o, a, s):
    for threads in warpgroups(m, s):
        m.products.setdefault(threads[0], [[]]).append([])


def wait(m, o, a, s):
    for threads in warpgroups(m, s):
        groups = m.products.setdefault(threads[0], [[]])
        while len(groups) - 1 > a[0]:
            for product in groups.pop(0):
                finish(m, product)


def finish(m, product):
    """The sum of 16 products is exact, then rounded once with what was there: the hardware's order is its own."""
    tiles = []
    for places in (product.x, product.w):
        m.shared.busy[places] -= 1
        halves = np.ascontiguousarray(m.shared.bytes[places]).view(np.uint16).astype(np.uint32)
        tiles.append((halves << np.uint32(16)).view(np.float32).astype(np.float64))
    sums = tiles[0] @ tiles[1].T
    lane, warp = np.arange(128) % 32, np.arange(128) // 32
    for i, register in enumerate(product.registers):
        old = m.read(register, "f32", product.threads) if product.keep else np.float32(0)
        added = sums[16 * warp + lane // 4 + i // 2 % 2 * 8, i // 4 * 8 + lane % 4 * 2 + i % 2]
        m.write(register, (old + added).astype(np.float32), product.threads)


SHAPES = " ".join(f"m64n{columns}k16" for columns in range(8, 257, 8))
TENSOR = "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes"
TABLE = {
    TENSOR: (tensor_load, "multicast::cluster"),
    "wgmma.mma_async": (multiply, f"sync aligned {SHAPES}"),
    "wgmma.commit_group": (commit, "sync aligned"),
    "wgmma.wait_group": (wait, "sync aligned"),
    "wgmma.fence setmaxnreg": (nothing, "inc dec sync aligned"),
}
