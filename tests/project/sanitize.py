"""For `make sanitize` alone: the module that its tests run is the instrumented one."""

from pathlib import Path

from redit_fast.backends import cpu


def test_the_cpu_module_checks_accesses_and_overflows_and_stops():
    code = Path(cpu.module.compiled.__file__).read_bytes()
    # -fwrapv would leave out the overflow handler; its name ends in _abort with -fno-sanitize-recover.
    assert b"__asan_init" in code and b"__ubsan_handle_add_overflow_abort" in code
