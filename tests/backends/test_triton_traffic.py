"""Bytes that the Triton kernels move, counted at the loads and stores of Triton's interpreter, and what of them a model
of the L2 cache finds there.

Runs where TRITON_INTERPRET is set before pytest starts; tests/backends/test_triton.py does that.
"""

from collections import OrderedDict
from typing import NamedTuple

import pytest
import torch

import redit_fast as rf
from redit_fast.backends import triton
from tests.backends.test_params import OFFSETS, adamw_state, scalar, tensors

refusal = triton.why_not("perturb", torch.device("cpu"))
pytestmark = pytest.mark.skipif(refusal is not None, reason=f"triton: {refusal}")

PROCESSORS, L2_MEGABYTES = 132, (30, 48)
ROW_BYTES = 96  # of numbers beside a row of logits


class Access(NamedTuple):
    launch: int
    program: int
    store: bool
    hint: str
    width: int  # bytes an element
    addresses: object  # where the mask is set

    @property
    def bytes(self):
        return self.width * len(self.addresses)


@pytest.fixture
def accesses(monkeypatch):
    from triton.runtime import interpreter

    builder, found, launches = interpreter.interpreter_builder, [], [0]
    load, store, set_grid = builder.create_masked_load, builder.create_masked_store, builder.set_grid_dim

    def record(pointers, mask, hint, is_store):
        width = pointers.get_element_ty().primitive_bitwidth // 8
        addresses = pointers.data[mask.data].reshape(-1)
        found.append(Access(launches[0], builder.grid_idx[0], is_store, hint, width, addresses))

    def recorded_load(pointers, mask, other, hint, is_volatile):
        record(pointers, mask, hint, False)
        return load(pointers, mask, other, hint, is_volatile)

    def recorded_store(pointers, value, mask, hint):
        record(pointers, mask, hint, True)
        return store(pointers, value, mask, hint)

    def counted_launch(*grid):
        launches[0] += 1
        set_grid(*grid)

    monkeypatch.setattr(builder, "get_cache_policy", lambda cache, hint: hint, raising=False)
    monkeypatch.setattr(builder, "create_masked_load", recorded_load, raising=False)
    monkeypatch.setattr(builder, "create_masked_store", recorded_store, raising=False)
    monkeypatch.setattr(builder, "set_grid_dim", counted_launch, raising=False)
    return found


def moved(accesses):
    """Bytes read and written, of tiles and of single numbers."""
    tiles = [access for access in accesses if len(access.addresses) >= 128]
    single = sum(access.bytes for access in accesses if len(access.addresses) < 128)
    return sum(a.bytes for a in tiles if not a.store), sum(a.bytes for a in tiles if a.store), single


def token_args(dtype, rows, vocabulary):
    logits, targets = torch.randn(rows, vocabulary).to(dtype), torch.randint(vocabulary, (rows,))
    return logits, targets, torch.empty(rows), torch.empty(rows), torch.empty(3, rows)


DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocabulary", [1000, 40_000])  # less than a tile, several
def test_log_probs_read_every_scored_logit_once_and_their_gradient_reads_and_writes_it(accesses, vocabulary, dtype):
    logits, targets, logp, entropy, sums = token_args(dtype, 5, vocabulary)
    targets[1] = -100
    row = vocabulary * dtype.itemsize
    transform = rf.LossConfig().transform
    triton.token_logp(logp, entropy, sums, logits, targets, transform)
    read, written, single = moved(accesses)
    assert (read, written) == (4 * row, 0) and single <= 5 * ROW_BYTES
    accesses.clear()
    upstream = torch.tensor([1.0, 1, 1, 1, 0])
    triton.token_logp_grad(torch.empty_like(logits), logits, targets, sums, upstream, None, None, transform)
    read, written, single = moved(accesses)
    assert (read, written) == (3 * row, 5 * row) and single <= 5 * ROW_BYTES


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_loss_reads_a_row_twice_and_writes_it_once(accesses, dtype):
    """A masked row not at all, one without a coefficient once."""
    logits, targets, logp, entropy, _ = token_args(dtype, 5, 20_000)
    targets[1], row = -100, 20_000 * dtype.itemsize
    numbers = torch.ones(5), torch.tensor([1.0, 1, 1, 1, 0]), None, None, None
    for out, read, written in ((torch.empty_like(logits), 7 * row, 5 * row), (None, 4 * row, 0)):
        accesses.clear()
        triton.token_loss(torch.empty(()), logp, entropy, out, logits, targets, *numbers, rf.LossConfig(), None)
        *tiles, single = moved(accesses)
        assert tiles == [read, written] and single <= 5 * (ROW_BYTES + 128)


@pytest.mark.parametrize("dtype", DTYPES)
def test_few_rows_write_and_read_sums_by_lanes_besides(accesses, dtype):
    """Two of float32 for 16 bytes of logits; a tile has 32 KB."""
    logits, targets, logp, entropy, _ = token_args(dtype, 1, 40_000)
    row, lanes = 40_000 * dtype.itemsize, -(-40_000 * dtype.itemsize // 32768) * 32768 // 2
    numbers = torch.ones(1), torch.ones(1), None, None, None
    triton.token_loss(torch.empty(()), logp, entropy, logits, logits, targets, *numbers, rf.LossConfig(), None)
    *tiles, single = moved(accesses)
    assert tiles == [2 * row + lanes, row + lanes] and single <= 20 * ROW_BYTES
    assert max(access.program for access in accesses) + 1 == -(-row // 32768)


def test_a_row_that_is_repaired_is_read_three_times_more(accesses):
    logits, targets, logp, entropy, sums = token_args(torch.float32, 2, 1000)
    logits[1, targets[1]] = -100
    triton.token_logp(logp, entropy, sums, logits, targets, rf.LossConfig().transform)
    assert moved(accesses)[0] == (1 + 3) * 4000


def test_an_upstream_gradient_of_one_touches_nothing(accesses):
    x = torch.randn(3, 10_000).bfloat16()
    triton.scale_in_place(x, torch.tensor(1.0))
    assert moved(accesses)[:2] == (0, 0)
    triton.scale_in_place(x, torch.tensor(2.0))
    assert moved(accesses)[:2] == (60_000, 60_000)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_head_reads_a_tile_once_and_writes_e_once(accesses, dtype):
    rows, vocabulary = 3, 5000
    hidden, weight = torch.randn(rows, 16).to(dtype), torch.randn(vocabulary, 16).to(dtype)
    e = torch.empty(rows, vocabulary, dtype=torch.bfloat16 if dtype == torch.bfloat16 else torch.float32)
    numbers = torch.empty(rows), torch.empty(rows), torch.empty(3, rows)
    inputs = hidden, weight, None, torch.randint(vocabulary, (rows,)), rf.LossConfig().transform
    triton.exp_product(e, *numbers, *inputs)
    assert moved(accesses)[:2] == (rows * vocabulary * 4, rows * vocabulary * e.element_size())
    accesses.clear()
    triton.exp_product_grad(e, numbers[2], numbers[1], *inputs, torch.ones(rows), torch.ones(rows))
    assert moved(accesses)[:2] == (rows * vocabulary * 4, rows * vocabulary * e.element_size())


@pytest.mark.parametrize(
    ("dtype", "passes"), [(torch.bfloat16, (2, 6, 8, 6, 28)), (torch.float32, (4, 12, 16, 12, 28))]
)
def test_parameter_passes_move_the_bytes_of_the_specification(accesses, monkeypatch, dtype, passes):
    monkeypatch.setattr("redit_fast.kernels.params.ROWS", 1024)
    sizes = [3 * 65536, 8000]
    params, grads, sums = tensors(dtype, sizes=sizes), tensors(dtype, sizes=sizes), torch.empty(4, dtype=torch.float64)
    p, masters, g, m, v, steps = adamw_state(dtype, sizes)
    state = scalar(1.0), torch.tensor(True), 1e-2, 0.9, 0.999, 1e-8, 0.1
    perturbation = [0, 3 * 65536], scalar(1e-3)
    for run, bytes_a_weight in zip(
        (
            lambda: triton.squared_norm(scalar(0.0), grads),
            lambda: triton.perturb(sums, params, grads, *perturbation, 1.0, "stochastic", 7, torch.tensor(5), None),
            lambda: triton.perturb(sums, params, grads, *perturbation, 0.5, "stochastic", 7, torch.tensor(5), None),
            lambda: triton.combine(sums[:3], params, grads, 0.5),
            lambda: triton.adamw(p, masters, g, m, v, steps, *state),
        ),
        passes,
    ):
        accesses.clear()
        run()
        total = sum(access.bytes for access in accesses)
        assert bytes_a_weight <= total / sum(sizes) < 1.01 * bytes_a_weight


def assert_programs_are_independent(accesses):
    """Within a launch none touches what another writes."""
    owners = {}
    for access in accesses:
        if access.store:
            for address in access.addresses.tolist():
                assert owners.setdefault((access.launch, address), access.program) == access.program
    for access in accesses:
        if not access.store:
            for address in access.addresses.tolist():
                assert owners.get((access.launch, address), access.program) == access.program


@pytest.mark.parametrize(
    ("scale", "combine"),
    [("group", "sum_then_normalize"), ("batch", "sum_then_normalize"), ("group", "normalize_then_sum")],
)
def test_no_program_of_the_advantages_touches_what_another_writes(accesses, scale, combine):
    with rf.use_backend("triton"):
        options = dict(group_size=4, dither=rf.Dither(), scale=scale, combine=combine)
        rf.group_advantages(torch.randn(300, 2), **options)
    assert len({access.program for access in accesses}) >= 3
    assert_programs_are_independent(accesses)


def test_no_program_touches_what_another_writes(accesses):
    logits, targets, logp, entropy, _ = token_args(torch.float32, 7, 300)
    rows = torch.ones(7), torch.ones(7), None, None, None
    triton.token_loss(torch.empty(()), logp, entropy, logits, logits, targets, *rows, rf.LossConfig(), None)
    row, target, *one, _ = token_args(torch.float32, 1, 20_000)  # its tiles are programs
    rows = torch.ones(1), torch.ones(1), None, None, None
    triton.token_loss(torch.empty(()), *one, row, row, target, *rows, rf.LossConfig(), None)
    e, numbers = torch.empty(7, 1300), (torch.empty(7), torch.empty(7), torch.empty(3, 7))
    hidden, weight, transform = torch.randn(7, 8), torch.randn(1300, 8), rf.LossConfig().transform
    triton.exp_product(e, *numbers, hidden, weight, None, targets, transform)
    triton.exp_product_grad(e, numbers[2], numbers[1], hidden, weight, None, targets, transform, logp, entropy)
    sizes = [9, 3000, 17]
    p, masters, g, m, v, steps = adamw_state(torch.bfloat16, sizes)
    triton.adamw(p, masters, g, m, v, steps, scalar(1.0), torch.tensor(True), 1e-2, 0.9, 0.999, 1e-8, 0.1)
    sums = torch.empty(4, dtype=torch.float64)
    triton.perturb(sums, p, g, OFFSETS[:3], scalar(1.0), 0.5, "stochastic", 7, torch.tensor(5), None)
    assert_programs_are_independent(accesses)
    stray = accesses[0]._replace(store=True, program=stray_program(accesses))
    with pytest.raises(AssertionError):
        assert_programs_are_independent([*accesses, stray, stray._replace(program=stray.program + 1)])


def stray_program(accesses):
    return 1 + max(access.program for access in accesses)


class Cache:
    """The least recently used goes first, what was marked evict_first before it; of 128-byte lines, here of a tile's
    together, since a program asks for them together."""

    def __init__(self, megabytes):
        self.room, self.lines = megabytes << 20, OrderedDict()

    def touch(self, name, size, hint):
        """Whether it was there."""
        hit = self.lines.pop(name, None) is not None
        self.room += size if hit else 0
        self.lines[name] = size
        self.lines.move_to_end(name, last=hint != "evict_first")
        self.room -= size
        while self.room < 0:
            self.room += self.lines.popitem(last=False)[1]
        return hit


def second_reading(steps, megabytes, programs, rows=3):
    """The share of hits when every program walks through `steps` of its own row, tile by tile in turn."""
    cache, hits, asked = Cache(megabytes), 0, 0
    for row in range(rows):
        for store, tile, size, hint, again in steps:
            for program in range(programs):
                hit = cache.touch((row, program, store, tile), size, hint)
                hits, asked = hits + (hit and again), asked + again
    return hits / asked


@pytest.mark.parametrize("inplace", [True, False])
def test_the_second_reading_hits_the_l2_cache(accesses, inplace, monkeypatch):
    monkeypatch.setattr("redit_fast.kernels.token_loss.processors", lambda device: 1)
    vocabulary = 151_936
    logits, targets, logp, entropy, _ = token_args(torch.bfloat16, 1, vocabulary)
    out = logits if inplace else torch.empty_like(logits)
    rows = torch.ones(1), torch.ones(1), None, None, None
    triton.token_loss(torch.empty(()), logp, entropy, out, logits, targets, *rows, rf.LossConfig(), None)
    tiles = [access for access in accesses if len(access.addresses) >= 128]
    first = {int(access.addresses[0]) for access in tiles if not access.store}
    origin, seen, steps = min(first), set(), []
    for access in tiles:
        place = int(access.addresses[0])
        is_output = access.store and not inplace
        tile = (place - origin) // 128
        again = not access.store and tile in seen
        seen.add(tile)
        steps.append((is_output, tile, -(-access.bytes // 128) * 128, access.hint, again))
    assert sum(step[2] for step in steps) >= 3 * 2 * vocabulary and sum(step[4] for step in steps) == len(first)
    hits = {megabytes: second_reading(steps, megabytes, PROCESSORS) for megabytes in L2_MEGABYTES}
    assert hits[48] == 1 and hits[30] > 0.6, hits
    assert second_reading(steps, 48, 2 * PROCESSORS) < 0.8  # two rows an SM do not fit
    half = len(first)
    forward = steps[:half] + [step for tile in range(half) for step in steps[-2 - 2 * tile : len(steps) - 2 * tile]]
    assert second_reading([step[:3] + ("normal",) + step[4:] for step in forward], 30, PROCESSORS) < 0.1
