# Every command here does all the set-up itself, once: .venv, torch, this package, its C++ module.

PYTHON ?= python3
VENV := .venv
READY := $(VENV)/.ready
NVIDIA := $(wildcard /proc/driver/nvidia)$(shell command -v nvidia-smi 2>/dev/null)
# Without an NVIDIA driver: one known release from PyTorch's CPU index, whose 2.13.0+cpu sorts above the 2.13.0 of PyPI,
# which on Linux is the CUDA build and larger by gigabytes. Its dependencies come with this package's, so that without a
# network pip tries that index once, for 0.5 s: with them 50 warnings take 75 s.
CPU_INDEX := https://download.pytorch.org/whl/cpu
TORCH ?= $(if $(NVIDIA),torch,torch==2.13.0 --no-deps --retries 1 --extra-index-url $(CPU_INDEX))

.PHONY: demo test lint sanitize kernel-gates gpu-check

demo: $(READY)
	$(VENV)/bin/redit-fast train

test: $(READY)
	$(VENV)/bin/python -m pytest

# What Triton compiles, for every architecture, and all of its interpreted tests; `make test` looks at sm_90 and bfloat16.
kernel-gates: $(READY)
	KERNEL_ARCHS="80 90 100" $(VENV)/bin/python -m pytest tests/test_triton.py

# On a CUDA machine, with the python3 that is there: make gpu-check OUT=DIR
OUT ?= gpu-check
gpu-check:
	$(PYTHON) -m benchmarks.gpu_check $(OUT)

lint: $(READY)
	$(VENV)/bin/ruff check .

# The tests of the C++ module on a second build of it, with the shipped flags and checks of every access and overflow.
# CXXFLAGS takes the place of Python's own flags, so without their -fwrapv. libasan must come first in the process, and
# libstdc++ with it: else it finds no __cxa_throw. Python itself leaks. Fifty repeats touch no further memory. The
# tests of Triton would load its LLVM.
CHECKS := -fsanitize=address,undefined -fno-sanitize-recover=all
sanitize: $(READY)
	rm -rf build/sanitize
	CXXFLAGS="$(CHECKS) -D_GLIBCXX_ASSERTIONS" LDFLAGS="$(CHECKS)" $(VENV)/bin/python setup.py -q build \
		--build-lib build/sanitize/lib --build-temp build/sanitize/temp
	PYTHONPATH=build/sanitize/lib ASAN_OPTIONS=detect_leaks=0 \
	LD_PRELOAD="$(foreach name,asan stdc++,$(shell $(CXX) -print-file-name=lib$(name).so))" \
		$(VENV)/bin/pytest -x --import-mode=append --capture=sys -k "cpu and not fifty and not 151936" tests/sanitize.py \
		$(filter-out tests/test_triton%,$(wildcard tests/test_*.py))

# A torch that is already in .venv stays. The tests compare with the peers of tests/peers.txt.
$(READY): pyproject.toml setup.py tests/peers.txt $(wildcard csrc/*)
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -c "import torch" 2>/dev/null || $(VENV)/bin/pip install $(TORCH)
	$(VENV)/bin/pip install -c tests/peers.txt -e ".[dev]"
	touch $@
