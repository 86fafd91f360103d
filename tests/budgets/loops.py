"""The innermost loops of the functions of `_cpu` for AVX-512, in its machine code."""

import re
from collections import Counter

from redit_fast.backends.cpu.module import compiled
from tests.budgets import said
from tests.project.test_install import functions

INSTRUCTION = re.compile(r"^ *([0-9a-f]+):\t(\S+) *(.*)$", re.M)


def innermost_loops(body):
    """The instructions of each: from where a jump goes back to as far as the jump, with no such jump between."""
    code = [(int(address, 16), name, operands) for address, name, operands in INSTRUCTION.findall(body)]
    places = {address: place for place, (address, _, _) in enumerate(code)}
    loops = []
    for place, (_, name, operands) in enumerate(code):
        target = re.match(r"([0-9a-f]+) <", operands) if name.startswith("j") else None
        start = places.get(int(target[1], 16), place + 1) if target else place + 1
        if start <= place:
            loops.append((start, place))
    inner = [loop for loop in loops if not any(loop[0] <= a and b <= loop[1] and (a, b) != loop for a, b in loops)]
    return [code[start : end + 1] for start, end in sorted(set(inner))]


def short(symbol):
    """sums<Float16, true> of its full name."""
    symbol = re.sub(r"redit::|\(anonymous namespace\)::|kernels_avx512(?:_bf16|_amx)?::", "", symbol)
    return re.sub(r"^.*?(\w+(?:<.*?>)?)\(.*$", r"\1", symbol)


def count():
    listing = said("objdump", "-d", "-C", "--no-show-raw-insn", compiled.__file__)
    found = Counter()
    for symbol, body in functions(listing):
        if "kernels_avx512" in symbol:
            for loop in innermost_loops(body):
                found[short(symbol)] += len(loop) * any(re.search("%[zt]mm", operands) for _, _, operands in loop)
    return {name: {"instructions a turn": number} for name, number in sorted(found.items()) if number}
