# `make demo`, `make test` and `make lint` do all the set-up themselves, once: .venv, torch, this package, its C++ module.

PYTHON ?= python3
VENV := .venv
READY := $(VENV)/.ready
NVIDIA := $(wildcard /proc/driver/nvidia)$(shell command -v nvidia-smi 2>/dev/null)
# Without an NVIDIA driver: the CPU build of one known release, where pip's index has it. From PyPI alone Linux gets the
# CUDA build, which runs on the CPU too but is larger by gigabytes; to avoid it:
#   make demo TORCH="torch==2.13.0 --index-url https://download.pytorch.org/whl/cpu"
TORCH ?= $(if $(NVIDIA),torch,torch==2.13.0)

.PHONY: demo test lint

demo: $(READY)
	$(VENV)/bin/redit-fast train

test: $(READY)
	$(VENV)/bin/python -m pytest

lint: $(READY)
	$(VENV)/bin/ruff check .

# A torch that is already in .venv stays.
$(READY): pyproject.toml setup.py $(wildcard csrc/*)
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -c "import torch" 2>/dev/null || $(VENV)/bin/pip install $(TORCH)
	$(VENV)/bin/pip install -e ".[dev]"
	touch $@
