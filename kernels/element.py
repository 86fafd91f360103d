"""Per-element maths as `@triton.jit` helpers, the twins of csrc/element.h; redit_fast/dither.py is the definition."""

import triton
import triton.language as tl


@triton.jit
def philox4x32(seed, ids, stream, step):
    """Philox4x32-10: key = seed, counter = (id lo, id hi, stream, step). Four uint32 words shaped like `ids` (int64).

    `seed` is an int64 holding the seed's 64 bits, read from memory: Triton types an integer argument by its value.
    """
    c0 = ids.to(tl.uint32)
    c1 = (ids >> 32).to(tl.uint32)
    c2 = (ids * 0 + stream).to(tl.uint32)
    c3 = (ids * 0 + step).to(tl.uint32)
    k0 = seed.to(tl.uint32)
    k1 = (seed >> 32).to(tl.uint32)
    for _ in tl.static_range(10):
        p0 = c0.to(tl.uint64) * 0xD2511F53
        p1 = c2.to(tl.uint64) * 0xCD9E8D57
        c0 = (p1 >> 32).to(tl.uint32) ^ c1 ^ k0
        c1 = p1.to(tl.uint32)
        c2 = (p0 >> 32).to(tl.uint32) ^ c3 ^ k1
        c3 = p0.to(tl.uint32)
        k0 += 0x9E3779B9
        k1 += 0xBB67AE85
    return c0, c1, c2, c3
