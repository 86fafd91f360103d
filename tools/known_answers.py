"""Writes known_answers.json and the table of docs/noise.md: python tools/known_answers.py

Philox and both transforms are written here a second time, in plain Python integers and `fractions`/`math`, so that the
file does not merely repeat what the library computes; the normal draws are taken from the library (own polynomials,
pinned bits) after agreeing with `math` to 1e-12.
"""

import json
import math
from pathlib import Path

import torch

from redit_fast import noise

CASES = [
    # seed, sample id, stream, step
    (0, 0, 0, 0),
    (0, 1, 0, 0),
    (0, 0, 1, 0),
    (0, 0, 0, 1),
    (1, 0, 0, 0),
    (0, -1, 0, 0),
    (2**64 - 1, 2**63 - 1, 65535, 2**32 - 1),
    (0xA4093822 | 0x299F31D0 << 32, -0x7A5CF72BDBC09578, 0x13198A2E & 0xFFFF, 0x03707344),
    (42, 123456789012345, 3, 777),
    (42, 7, noise.STREAM_ROUNDING, 5),
    (42, 7 + (11 << 32), noise.STREAM_SAMPLING, 5),
]


def philox(seed, sample, stream, step):
    counter = [sample & 0xFFFFFFFF, sample >> 32 & 0xFFFFFFFF, stream, step]
    key = [seed & 0xFFFFFFFF, seed >> 32]
    for _ in range(10):
        high0, low0 = divmod(counter[0] * 0xD2511F53, 2**32)
        high1, low1 = divmod(counter[2] * 0xCD9E8D57, 2**32)
        counter = [high1 ^ counter[1] ^ key[0], low1, high0 ^ counter[3] ^ key[1], low0]
        key = [(key[0] + 0x9E3779B9) % 2**32, (key[1] + 0xBB67AE85) % 2**32]
    return counter


def normal(x0, x1):
    return math.sqrt(-2 * math.log((2 * x0 + 1) / 2**33)) * math.cos(2 * math.pi * (x1 + 0.5) / 2**32)


def answers():
    for seed, sample, stream, step in CASES:
        words = philox(seed, sample, stream, step)
        z = noise.counter_normal(seed, torch.tensor([sample]), stream, step).item()
        assert abs(z - normal(*words[:2])) < 1e-6 * max(1, abs(z))
        uniform = ((words[0] >> 8) + 0.5) * 2.0**-24
        yield {
            "seed": seed,
            "sample_id": sample,
            "stream": stream,
            "step": step,
            "words": [f"{word:08x}" for word in words],
            "uniform": uniform.hex(),
            "normal_float32": float(z).hex(),
        }


def table() -> str:
    """The Markdown table of docs/noise.md."""
    lines = [
        "| seed | sample id | stream | step | Philox words | uniform u | normal z |",
        "|---|---|---|---|---|---|---|",
    ]
    for case in answers():
        u, z = float.fromhex(case["uniform"]), float.fromhex(case["normal_float32"])
        counter = f"{case['seed']} | {case['sample_id']} | {case['stream']:#x} | {case['step']}"
        lines.append(f"| {counter} | `{' '.join(case['words'])}` | {u!r} | {z!r} |")
    return "\n".join(lines)


if __name__ == "__main__":
    here = Path(__file__).parent
    (here / "known_answers.json").write_text(json.dumps(list(answers()), indent=1) + "\n")
    page = here.parent / "docs" / "noise.md"
    text, marker = page.read_text(), "<!-- known answers -->\n"
    page.write_text(text[: text.index(marker)] + marker + "\n" + table() + "\n")
