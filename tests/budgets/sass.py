"""The instructions of every kernel of csrc/cuda in the machine code that ptxas makes, but those that only fill up."""

from tests.cuda import SOURCES, TARGETS, opcodes


def of(arch):
    kernels = {kernel: ops for name in sorted(SOURCES) for kernel, ops in opcodes(name, arch).items()}
    return {kernel: {f"instructions, {TARGETS[arch]}": len(ops)} for kernel, ops in kernels.items()}


def count():
    found = {}
    for arch in TARGETS:
        for kernel, units in of(arch).items():
            found.setdefault(kernel, {}).update(units)
    return found
