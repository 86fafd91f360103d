"""python -m tests.backends.philox_twin: the Triton twin of Philox, in Triton's interpreter, against redit_fast.noise.

A program of its own because TRITON_INTERPRET must be set before Triton is imported.
"""

import os

os.environ["TRITON_INTERPRET"] = "1"

import torch  # noqa: E402
import triton  # noqa: E402
import triton.language as tl  # noqa: E402

from redit_fast import noise  # noqa: E402
from redit_fast.kernels.element import philox4x32  # noqa: E402


@triton.jit
def philox_kernel(words_ptr, ids_ptr, seed_ptr, step_ptr, n, stream, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    words = philox4x32(tl.load(seed_ptr), tl.load(ids_ptr + i, i < n, 0), stream, tl.load(step_ptr))
    for w in tl.static_range(4):
        tl.store(words_ptr + 4 * i + w, words[w].to(tl.int64), i < n)


if __name__ == "__main__":
    ids = torch.cat([torch.tensor([0, 1, -1, 2**63 - 1, -(2**63), 1 << 32]), torch.randint(-(2**63), 2**63 - 1, (50,))])
    for seed in (0, 1, 2**32, 2**63, 2**64 - 1, 0x123456789ABCDEF0):
        bits = torch.tensor([seed - 2**64 if seed >= 2**63 else seed])
        for step in (0, 1, 2**31, 2**32 - 1):
            for stream in (0, 1, 65535, noise.STREAM_ROUNDING, noise.STREAM_SAMPLING):
                words = torch.zeros(len(ids), 4, dtype=torch.int64)
                philox_kernel[(1,)](words, ids, bits, torch.tensor([step]), len(ids), stream, 64)
                assert torch.equal(words, torch.stack(noise.philox4x32(seed, ids, stream, step), 1)), (
                    seed,
                    step,
                    stream,
                )
    print("equal")
