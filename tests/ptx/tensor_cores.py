"""Hopper's matrix products, and the tensor copies that bring their tiles. A tensor map is 48 bytes of our own in the
parameters: address, rows, columns, bytes a row, and the box's rows and columns; elements have two bytes.
"""

from itertools import groupby
from typing import NamedTuple

import numpy as np

from tests.ptx.copies import Copy, check_fenced, each_thread, issue_load
from tests.ptx.instructions import action, nothing
from tests.ptx.parse import Fault


def swizzled(at):
    """Where shared memory holds a byte under the 128-byte swizzle."""
    return at ^ (at >> 7 & 7) << 4


@each_thread
def tensor_load(m, thread, to, source, barrier, mask=None):
    """A box, 128 bytes wide, into this block or into all of the mask. What lies outside the tensor becomes zeros."""
    at = int(thread.address(source)[0])
    base, rows, columns, step, box_rows, box_columns = m.params[at : at + 48].view(np.int64).tolist()
    column, row = (thread.number(x, "s32") for x in source.coordinates)
    if column < 0 or row < 0:
        raise Fault("a box that begins outside its tensor")
    box = np.zeros((box_rows, box_columns), np.uint16)
    inside = box[: max(rows - row, 0), : max(columns - column, 0)]
    if inside.size:
        addresses, memory = base + (row + np.arange(len(inside))) * step + 2 * column, m.memory["global"]
        first, units = memory.find(addresses, 2 * inside.shape[1], np.repeat(thread.one, len(inside)), 16)
        memory.touch(units.reshape(1, -1), thread.one, store=False)
        inside[:] = memory.bytes[first[:, None] + np.arange(2 * inside.shape[1])].view(np.uint16)
    m.bytes["bulk read"] += box.nbytes
    rank = int(m.clock.block[thread.id + 1]) % m.cluster
    mask = 1 << rank if mask is None else thread.number(mask)
    (place, units), key = thread.shared(to, box.nbytes, 128), thread.shared(barrier)[0]
    within = place % m.shared.step + np.arange(box.nbytes)
    data = box.reshape(-1).view(np.uint8)[swizzled(within) - within[0]]  # which is its own inverse
    for peer in [peer for peer in range(m.cluster) if mask >> peer & 1]:
        block = (peer - rank) * m.shared.step
        issue_load(m, thread, Copy(data, None, place + block, units + block // m.shared.unit, key + block))


class Product(NamedTuple):
    """(64, 16) x (16, columns) of bfloat16, added to float32 in registers."""

    registers: tuple
    threads: slice  # the warpgroup
    x: np.ndarray  # the tiles' 16 bytes in shared memory, two a row
    w: np.ndarray
    keep: bool  # else the registers' old values are dropped


def warpgroups(m, s):
    groups = m.ids(s).reshape(-1, 128) if len(m.ids(s)) % 128 == 0 else np.zeros((1, 1))
    if (groups != groups[:, :1] // 128 * 128 + np.arange(128)).any():
        raise Fault("wgmma by part of a warpgroup")
    return [slice(first, first + 128) for first in groups[:, 0].tolist()]


def tile(m, descriptors, rows, block):
    if (descriptors != descriptors[0]).any() or descriptors[0] >> np.uint64(62) != 1:
        raise Fault("unknown descriptor: one for all threads, with a 128-byte swizzle, is known")
    start, step = (int(descriptors[0]) >> shift & 0x3FFF for shift in (0, 32))
    row = np.arange(rows)[:, None]
    at = swizzled(16 * start + row // 8 * 16 * step + row % 8 * 128 + 16 * np.arange(2))
    if at.max() + 16 > m.shared.size:
        raise Fault(f"out of bounds: a tile up to shared address {at.max()}")
    return (block * m.shared.step + at) // 16


def units_of(m, tile):
    each = 16 // m.shared.unit
    return (tile[..., None] * each + np.arange(each)).reshape(1, -1)


@action
def multiply(m, o, a, s):
    """Reads when it is waited for, as late as it may."""
    registers, x, w, keep, *signs = a
    rows, columns = 64, int(o[2][4:-3])
    if signs != [1, 1, 0, 0] or len(registers) != columns // 2:
        raise Fault("unknown operands")
    for threads in warpgroups(m, s):
        block = threads.start // m.threads
        tiles = (tile(m, m.read(each, "u64", threads), n, block) for each, n in ((x, rows), (w, columns)))
        product = Product(registers, threads, *tiles, bool(m.read(keep, "pred", threads)[0]))
        for units in (units_of(m, product.x), units_of(m, product.w)):
            m.shared.check_busy(units, m.ids(threads)[:1], store=False)
            check_fenced(m, units)
            m.shared.busy[units] += 1
        m.products.setdefault(threads.start, [[]])[-1].append(product)
        m.flop += 2 * rows * columns * 16


@action
def commit(m, o, a, s):
    for threads in warpgroups(m, s):
        m.products.setdefault(threads.start, [[]]).append([])


@action
def wait(m, o, a, s):
    for threads in warpgroups(m, s):
        groups = m.products.setdefault(threads.start, [[]])
        while len(groups) - 1 > a[0]:
            for registers, products in groupby(groups.pop(0), lambda product: product.registers):
                finish(m, registers, list(products))


def finish(m, registers, products):
    """The sum of 16 products is exact, then rounded once with what was there: the hardware's order is its own."""
    lane, warp, i = np.arange(128) % 32, np.arange(128) // 32, np.arange(len(registers))[:, None]
    place = 16 * warp + lane // 4 + i // 2 % 2 * 8, i // 4 * 8 + lane % 4 * 2 + i % 2
    sums = np.zeros((64, 2 * len(registers)), np.float32)
    sums[place] = [m.read(register, "f32", products[0].threads) for register in registers]
    for product in products:
        x, w = (numbers(m, tile) for tile in (product.x, product.w))
        sums = ((sums if product.keep else np.float32(0)) + x @ w.T).astype(np.float32)
        for units in (units_of(m, product.x), units_of(m, product.w)):
            m.shared.busy[units] -= 1
    for register, values in zip(registers, sums[place]):
        m.write(register, values, products[0].threads)


def numbers(m, tile):
    halves = m.shared.bytes.view(np.uint16).reshape(-1, 8)[tile].reshape(len(tile), 16)
    return (halves.astype(np.uint32) << np.uint32(16)).view(np.float32).astype(np.float64)


SHAPES = " ".join(f"m64n{columns}k16" for columns in range(8, 257, 8))
TENSOR = "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes"
TABLE = {
    TENSOR: (tensor_load, "multicast::cluster"),
    "wgmma.mma_async": (multiply, f"sync aligned {SHAPES}"),
    "wgmma.commit_group": (commit, "sync aligned"),
    "wgmma.wait_group": (wait, "sync aligned"),
    "wgmma.fence setmaxnreg": (nothing, "inc dec sync aligned"),
}
