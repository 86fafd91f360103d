"""For `make sanitize` alone: the modules that its tests run are the instrumented ones."""

from pathlib import Path

from redit_fast.backends import cpu, cuda


def test_the_cpu_module_and_the_host_code_of_cuda_check_accesses_and_overflows_and_stop():
    modules = [cpu.module.compiled] + [cuda.module.compiled] * (cuda.module.missing is None)
    for path in (Path(module.__file__) for module in modules):
        code = path.read_bytes()
        # -fwrapv would leave out the overflow handler; its name ends in _abort with -fno-sanitize-recover.
        assert b"__asan_init" in code and b"__ubsan_handle_add_overflow_abort" in code, path
