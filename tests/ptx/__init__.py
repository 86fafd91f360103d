"""Runs the PTX that nvcc makes on the CPU: all threads of a grid at once, one NumPy operation an instruction.

    Machine(Module(text), Launch("scale", grid=4, threads=128, params=b"..."), arrays).run()

docs/kernels.md says what it finds, and what stays unproven without a GPU.
"""

from tests.ptx.machine import Launch, Machine
from tests.ptx.parse import Fault, Module

__all__ = ["Fault", "Launch", "Machine", "Module"]
