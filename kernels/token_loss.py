"""Token log-probs and losses from logits (R, V); redit_fast/backends/reference/token_loss.py is the definition.

    token_logp       logp, entropy, sums                                    reads 2 bytes a logit of 16 bits, 4 of 32
    token_logp_grad  g (1{j = t} - p_j) - h p_j (log p_j + H), times dz/dx   reads and writes 2 / 4
    token_loss       both, and the coefficient g between them               reads 2 / 4 and writes 2 / 4

One program an SM, a row at a time: its second reading hits the L2 cache, where 132 rows of 304 KB (V = 151936, 16 bits)
fit. The second pass begins at the row's end, which was read last. A tile is 32 KB, 64 bytes a thread of 512, asked for
at once: a memory of 4 TB/s and 900 cycles needs 16 KB on the way to each SM. (Asked for a tile ahead, a logit would
take 10.2 instructions instead of 9.1, and spill.) Rows whose stride is not a multiple of 16 bytes (V = 50257)
are read 2 or 4 bytes at a time: the kernels are then limited by their instructions. Masked rows are not read, rows with
a coefficient of 0 are read once. With less than a row for every second SM a program takes a tile, and another adds a
row's tiles in the same order: the same bits, for a launch or two and 16 KB of sums a tile more.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from redit_fast.kernels.element import nearest, widen
from redit_fast.kernels.launch import bits, first_that_fits, processors, table
from redit_fast.kernels.policy_loss import policy_numbers, token_coefficient
from redit_fast.kernels.row_math import INNER, OUTER, SLOPE, columns, finish, number, squash, transform_numbers
from redit_fast.kernels.row_tiles import backward, clear, forward, target_logit, tile_sums, within

IGNORE = tl.constexpr(-100)
TILE_BYTES = (32768, 16384, 8192)  # of a tile, in the order of trial; a thread has 64
# Without maxnreg ptxas gives a float32 row under softcap 64, for a second program an SM, and spills. AMD has no such
# option. Triton 3.10 will fuse no multiply-adds unless it is told to.
LAUNCH = {"enable_fp_fusion": True} | ({} if torch.version.hip else {"maxnreg": 128})
SPAN = 8192  # elements a program of scale_in_place


@triton.jit
def _lanes_kernel(
    lanes_ptr, logits_ptr, row_stride, stride, targets_ptr, numbers_ptr, vocabulary,
    CAPPED: tl.constexpr, WEIGH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A tile of a row, where rows are too few for a program each."""
    item, tiles = tl.program_id(0).to(tl.int64), tl.cdiv(vocabulary, BLOCK)
    row, start = item // tiles, item % tiles * BLOCK
    target = tl.load(targets_ptr + row)
    if target != IGNORE:
        inner, outer, x_ptr = number(numbers_ptr, INNER), number(numbers_ptr, OUTER), logits_ptr + row * row_stride
        anchor = squash(target_logit(x_ptr, stride, vocabulary, target), inner, CAPPED)
        others, weighted = tile_sums(
            x_ptr, stride, vocabulary, target, start, anchor, inner, outer, CAPPED, WEIGH, "evict_last", BLOCK
        )
        LANES: tl.constexpr = others.shape[0]
        lane_ptr = lanes_ptr + item * (2 * LANES) + tl.arange(0, LANES)
        tl.store(lane_ptr, others)
        tl.store(lane_ptr + LANES, weighted)


@triton.jit(do_not_specialize=["rows", "sums_stride"])
def _logp_kernel(
    logp_ptr, entropy_ptr, sums_ptr, sums_stride, logits_ptr, row_stride, stride, targets_ptr, lanes_ptr, numbers_ptr,
    rows, vocabulary, CAPPED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    inner, outer = number(numbers_ptr, INNER), number(numbers_ptr, OUTER)
    for row in range(tl.program_id(0).to(tl.int64), rows, tl.num_programs(0)):
        target = tl.load(targets_ptr + row)
        logp, entropy, anchor, others, total = 0.0, 0.0, 0.0, 0.0, 0.0
        if target != IGNORE:
            at_target, anchor, others, weighted = forward(
                logits_ptr + row * row_stride, stride, vocabulary, target, inner, outer, lanes_ptr, row,
                CAPPED, entropy_ptr is not None, "evict_first", BLOCK,
            )  # fmt: skip
            logp, entropy, total = finish(anchor, at_target, others, weighted, inner, outer, CAPPED)
        tl.store(logp_ptr + row, logp)
        if entropy_ptr is not None:
            tl.store(entropy_ptr + row, entropy)
        tl.store(sums_ptr + row, anchor)
        tl.store(sums_ptr + sums_stride + row, others)
        tl.store(sums_ptr + 2 * sums_stride + row, total)


@triton.jit(do_not_specialize=["rows", "parts", "sums_stride"])
def _grad_kernel(
    grad_ptr, grad_row_stride, grad_stride, logits_ptr, row_stride, stride, targets_ptr, sums_ptr, sums_stride,
    grad_logp_ptr, grad_entropy_ptr, entropy_ptr, numbers_ptr, rows, parts, vocabulary,
    CAPPED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A row's tiles in `parts` parts of one program each."""
    slope, inner, outer = number(numbers_ptr, SLOPE), number(numbers_ptr, INNER), number(numbers_ptr, OUTER)
    tiles = tl.cdiv(vocabulary, BLOCK)
    for item in range(tl.program_id(0).to(tl.int64), rows * parts, tl.num_programs(0)):
        row, part = item // parts, (item % parts).to(tl.int32)
        first, last = part * tiles // parts, (part + 1) * tiles // parts
        target = tl.load(targets_ptr + row)
        out_ptr = grad_ptr + row * grad_row_stride
        if target == IGNORE:
            clear(out_ptr, grad_stride, vocabulary, first, last, BLOCK)
        else:
            x_ptr = logits_ptr + row * row_stride
            anchor, others = tl.load(sums_ptr + row), tl.load(sums_ptr + sums_stride + row)
            total, g = tl.load(sums_ptr + 2 * sums_stride + row), tl.load(grad_logp_ptr + row)
            h, entropy = 0.0, 0.0
            if grad_entropy_ptr is not None:
                h, entropy = tl.load(grad_entropy_ptr + row), tl.load(entropy_ptr + row)
            mine = within(target, first, last, vocabulary, BLOCK)
            at_target = widen(tl.load(x_ptr + target * stride, mine, float("nan")))
            tl.debug_barrier()  # the gradient may be written where it was read
            backward(
                out_ptr, grad_stride, x_ptr, stride, vocabulary, first, last, target, at_target, anchor, others, total,
                entropy, g, h, slope, inner, outer, CAPPED, grad_entropy_ptr is not None, BLOCK,
            )  # fmt: skip


@triton.jit(do_not_specialize=["rows", "state_stride"])
def _loss_kernel(
    row_losses_ptr, logp_ptr, entropy_ptr, grad_ptr, grad_row_stride, grad_stride, state_ptr, state_stride, logits_ptr,
    row_stride, stride, targets_ptr, weights_ptr, advantages_ptr, old_ptr, ref_ptr, sampling_ptr, scale_ptr, lanes_ptr,
    numbers_ptr, rows, vocabulary,
    FORM: tl.constexpr, KL: tl.constexpr, RATIO_CORRECTED: tl.constexpr, CORRECTION: tl.constexpr,
    CAPPED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The gradient, or in state (4, rows) what `_grad_kernel` needs, sums and coefficient, or neither."""
    HINT: tl.constexpr = "evict_first" if grad_ptr is None else "evict_last"
    slope, inner, outer = number(numbers_ptr, SLOPE), number(numbers_ptr, INNER), number(numbers_ptr, OUTER)
    for row in range(tl.program_id(0).to(tl.int64), rows, tl.num_programs(0)):
        target = tl.load(targets_ptr + row)
        logp, entropy, loss = 0.0, 0.0, 0.0
        if target == IGNORE:
            if grad_ptr is not None:
                clear(grad_ptr + row * grad_row_stride, grad_stride, vocabulary, 0, tl.cdiv(vocabulary, BLOCK), BLOCK)
        else:
            x_ptr = logits_ptr + row * row_stride
            at_target, anchor, others, weighted = forward(
                x_ptr, stride, vocabulary, target, inner, outer, lanes_ptr, row, CAPPED, True, HINT, BLOCK
            )
            logp, entropy, total = finish(anchor, at_target, others, weighted, inner, outer, CAPPED)
            weight, old, ref, sampling = tl.load(weights_ptr + row), logp, logp, logp
            if old_ptr is not None:
                old = tl.load(old_ptr + row)
            if ref_ptr is not None:
                ref = tl.load(ref_ptr + row)
            if sampling_ptr is not None:
                sampling = tl.load(sampling_ptr + row)
            loss, g = token_coefficient(
                numbers_ptr, logp, tl.load(advantages_ptr + row), old, ref, sampling,
                FORM, KL, RATIO_CORRECTED, CORRECTION,
            )  # fmt: skip
            loss *= weight
            g *= weight
            if scale_ptr is not None:
                g *= tl.load(scale_ptr).to(tl.float32)
            if state_ptr is not None:
                tl.store(state_ptr + row, anchor)
                tl.store(state_ptr + state_stride + row, others)
                tl.store(state_ptr + 2 * state_stride + row, total)
                tl.store(state_ptr + 3 * state_stride + row, g)
            if grad_ptr is not None:
                backward(
                    grad_ptr + row * grad_row_stride, grad_stride, x_ptr, stride, vocabulary, 0,
                    tl.cdiv(vocabulary, BLOCK), target, at_target, anchor, others, total, entropy, g, 0.0,
                    slope, inner, outer, CAPPED, False, BLOCK,
                )  # fmt: skip
        tl.store(logp_ptr + row, logp)
        tl.store(entropy_ptr + row, entropy)
        tl.store(row_losses_ptr + row, loss)


@triton.jit(do_not_specialize=["rows"])
def _total_kernel(loss_ptr, row_losses_ptr, rows, BLOCK: tl.constexpr):
    """In 1024 lanes of float64, then over the lanes."""
    total = tl.zeros([BLOCK], tl.float64)
    for start in range(0, rows, BLOCK):
        row = start + tl.arange(0, BLOCK)
        total += tl.load(row_losses_ptr + row, row < rows, 0.0).to(tl.float64)
    tl.store(loss_ptr, tl.sum(total).to(tl.float32))


@triton.jit(do_not_specialize=["spans"])
def _scale_kernel(x_ptr, row_stride, stride, factor_ptr, spans, width, SPAN: tl.constexpr):
    """A factor of 1 touches nothing."""
    factor = tl.load(factor_ptr).to(tl.float32)
    if factor != 1.0:
        span = tl.program_id(0).to(tl.int64)
        at = columns(span % spans * SPAN, SPAN, x_ptr.dtype.element_ty)
        here_ptr = x_ptr + span // spans * row_stride + at * stride
        x = widen(tl.load(here_ptr, at < width))
        tl.store(here_ptr, nearest(x * factor, x_ptr.dtype.element_ty), at < width)


def tiles(vocabulary: int, width: int) -> list[tuple[int, int, int]]:
    """BLOCK, num_warps and programs an SM for rows of `vocabulary` elements of `width` bytes, in the order of trial."""
    shapes = []
    for most in TILE_BYTES:
        block = max(256, min(most // width, triton.next_power_of_2(vocabulary)))
        warps = max(1, block * width // 2048)
        shapes.append((block, warps, max(1, 16 // warps)))
    return shapes


def parts_of(logits: Tensor, block: int) -> int:
    """Programs a row: as many as it has tiles where that leaves no more than one program for two processors."""
    rows, vocabulary = logits.shape
    return triton.cdiv(vocabulary, block) if 2 * rows <= processors(logits.device) else 1


def _lanes(logits: Tensor, targets: Tensor, numbers: Tensor, capped: bool, weigh: bool, block: int, warps: int):
    """The sums of every tile by lanes, where the rows are few; else None."""
    (rows, vocabulary), parts = logits.shape, parts_of(logits, block)
    if parts == 1:
        return None
    lanes = logits.new_empty(rows, parts, 2, block * logits.element_size() // 16, dtype=torch.float32)
    _lanes_kernel[(rows * parts,)](
        lanes, logits, *logits.stride(), targets, numbers, vocabulary, capped, weigh, block, num_warps=warps,
        **LAUNCH,
    )  # fmt: skip
    return lanes


def token_logp(
    logp: Tensor, entropy: Tensor | None, sums: Tensor, logits: Tensor, targets: Tensor,
    transform,
) -> None:  # fmt: skip
    rows, vocabulary = logits.shape
    with torch.cuda.device_of(logits):
        numbers, capped = table(bits(*transform_numbers(transform)), logits.device), transform.capped

        def launch(block, warps, programs):
            lanes = _lanes(logits, targets, numbers, capped, entropy is not None, block, warps)
            _logp_kernel[(min(rows, programs * processors(logits.device)),)](
                logp, entropy, sums, sums.stride(0), logits, *logits.stride(), targets, lanes, numbers, rows,
                vocabulary, capped, block, num_warps=warps, **LAUNCH,
            )  # fmt: skip

        if rows:
            first_that_fits(launch, tiles(vocabulary, logits.element_size()))


def token_logp_grad(
    grad: Tensor, logits: Tensor, targets: Tensor, sums: Tensor, grad_logp: Tensor, grad_entropy: Tensor | None,
    entropy: Tensor | None, transform,
) -> None:  # fmt: skip
    rows, vocabulary = logits.shape
    with torch.cuda.device_of(logits):
        numbers, capped = table(bits(*transform_numbers(transform)), logits.device), transform.capped

        def launch(block, warps, programs):
            parts = parts_of(logits, block)
            _grad_kernel[(min(rows * parts, programs * processors(logits.device)),)](
                grad, *grad.stride(), logits, *logits.stride(), targets, sums, sums.stride(0), grad_logp, grad_entropy,
                entropy, numbers, rows, parts, vocabulary, capped, block, num_warps=warps, **LAUNCH,
            )  # fmt: skip

        if rows:
            first_that_fits(launch, tiles(vocabulary, logits.element_size()))


def token_loss(
    loss: Tensor, logp: Tensor, entropy: Tensor, grad: Tensor | None, logits: Tensor, targets: Tensor, weights: Tensor,
    advantages: Tensor, old_logp: Tensor | None, ref_logp: Tensor | None, sampling_logp: Tensor | None,
    grad_scale: Tensor | None, policy, transform,
) -> None:  # fmt: skip
    """policy, transform: PolicyConstants of redit_fast/losses/coefficients.py, TransformConstants of transforms.py."""
    rows, vocabulary = logits.shape
    kl, capped = policy.kl if policy.beta else "none", transform.capped
    with torch.cuda.device_of(logits):
        numbers = table(bits(*transform_numbers(transform), *policy_numbers(policy)), logits.device)
        row_losses = torch.empty_like(logp)

        def launch(block, warps, programs):
            lanes = _lanes(logits, targets, numbers, capped, True, block, warps)
            later = grad is not None and lanes is not None
            state = logp.new_empty(4, triton.cdiv(rows, 4) * 4)  # rows of whole 16 bytes: others compile anew
            _loss_kernel[(min(rows, programs * processors(logits.device)),)](
                row_losses, logp, entropy, None if later else grad, *((1, 1) if grad is None else grad.stride()),
                state if later else None, state.stride(0), logits, *logits.stride(), targets, weights, advantages,
                old_logp, ref_logp, sampling_logp, grad_scale, lanes, numbers, rows, vocabulary,
                policy.form, kl, bool(policy.beta and policy.kl_ratio_correction), policy.correction, capped, block,
                num_warps=warps, **LAUNCH,
            )  # fmt: skip
            if later:
                token_logp_grad(grad, logits, targets, state, state[3], None, None, transform)

        if rows:
            first_that_fits(launch, tiles(vocabulary, logits.element_size()))
        _total_kernel[(1,)](loss, row_losses, rows, BLOCK=1024, **LAUNCH)


def scale_in_place(x: Tensor, factor: Tensor) -> None:
    """x (rows, columns) *= factor."""
    spans = triton.cdiv(x.shape[1], SPAN)
    with torch.cuda.device_of(x):
        if x.numel():
            _scale_kernel[(x.shape[0] * spans,)](
                x, *x.stride(), factor, spans, x.shape[1], SPAN=SPAN, num_warps=8, **LAUNCH
            )
