# Every command here does all the set-up itself, once: .venv, torch, this package, its C++ module. tests/lock.txt
# has the release of everything that is installed, and `make lock` writes it again; torch's stands here.

PYTHON ?= python3
VENV := .venv
READY := $(VENV)/.ready
DOCS := $(VENV)/.docs
TESTS := $(VENV)/.tests
NVIDIA := $(wildcard /proc/driver/nvidia)$(shell command -v nvidia-smi 2>/dev/null)
# Without an NVIDIA driver: the release from PyTorch's CPU index, whose 2.13.0+cpu sorts above the 2.13.0 of PyPI,
# which on Linux is the CUDA build and larger by gigabytes. Its dependencies come with this package's, so that without a
# network pip tries that index once, for 0.5 s: with them 50 warnings take 75 s.
CPU_TORCH := torch==2.13.0 --no-deps --retries 1 --extra-index-url https://download.pytorch.org/whl/cpu
TORCH ?= $(if $(NVIDIA),torch==2.13.0,$(CPU_TORCH))
LOCK := $(VENV)/lock.txt

# Triton has wheels for Linux only.
TRITON36 := $(if $(filter Linux,$(shell uname)),.venv-triton36/.ready)
SANITIZED := build/sanitize/.ready
# Two processes share the cores, so a thread that waits must sleep. Spinning, OpenMP's default, took 102 CPU seconds for
# tests/ops/test_linear_loss.py beside other work on two cores, and this 13.
PYTEST := OMP_WAIT_POLICY=passive $(VENV)/bin/python -m pytest -n 2 --dist worksteal

.PHONY: demo reproduce-quick test check verl-extra test-newest lock lint docs wheels sanitize kernel-gates packing-gates rank-gates budgets gpu-check

demo: $(READY)
	$(VENV)/bin/redit-fast train

# Some tests build this package in environments of their own: from the variable pip takes the lock there too.
test: $(TESTS) $(TRITON36)
	PIP_CONSTRAINT=$(abspath $(LOCK)) $(PYTEST)

# A contributor's loop: lint, floors, links, defaults, the losses' formulas and the ops' tests. Without the fuzz tests, the
# hostile logits and the allocator's records, what compiles or interprets, float16, fifty repeats, the vocabularies of
# 50,000 and more, and the reference by itself.
SLOW := $(addprefix tests/ops/test_,arguments.py hostile_logits.py linear_memory.py compile.py) \
	tests/backends/test_compilers.py $(wildcard $(addprefix tests/backends/test_,ptx.py sass.py triton*.py *cuda.py *mutants.py))
# One line a failure, twenty at most: a wrong constant breaks hundreds of cases.
check: lint
	COLUMNS=200 $(PYTEST) -q --tb=no -rfE --disable-warnings --maxfail=20 \
		-k "not dtype2 and not fifty and not 50257 and not 151936 and not [reference" \
		$(filter-out $(SLOW),$(wildcard tests/ops/test_*.py tests/backends/test_*.py)) \
		tests/losses/test_losses.py::test_every_loss_and_its_gradient_is_its_formula \
		$(addprefix tests/project/test_,floors.py links.py public_names.py) || \
		{ echo "One of them in full: $(VENV)/bin/python -m pytest 'FILE::NAME'"; exit 1; }

# Every claim of docs/reproduction.md with a few methods, one seed and few steps, in some minutes. The claims themselves take
# hours: python -m redit_fast.benchmarks.reproduction.
reproduce-quick: $(TESTS)
	$(VENV)/bin/python -m redit_fast.benchmarks.reproduction quick

# verl with what its extra brings and nothing of the tests' releases: verl bounds transformers below them.
verl-extra:
	$(PYTHON) -m venv .venv-verl
	.venv-verl/bin/python -c "import torch" 2>/dev/null || .venv-verl/bin/pip install $(TORCH)
	.venv-verl/bin/pip install -e ".[verl]" matplotlib pytest
	OMP_WAIT_POLICY=passive .venv-verl/bin/python -m pytest $(addprefix tests/integrations/test_verl_,engine.py head.py loss.py)

# The same as `make test` with the newest releases of the day, in an environment of its own; torch as above, or TORCH=torch.
test-newest:
	rm -rf .venv-newest
	$(MAKE) test VENV=.venv-newest LOCK= TRITON36=

# With the oldest Python that is supported, so that no release in it needs a newer one.
lock:
	rm -rf .venv-lock
	$(MAKE) .venv-lock/.tests VENV=.venv-lock LOCK= NVIDIA= PYTHON=python3.11
	.venv-lock/bin/pip freeze --all --exclude pip --exclude torch --exclude-editable > tests/lock.txt
	rm -rf .venv-lock

# What Triton and Triton 3.6 compile, for every architecture, and all of the interpreted tests. `make test` looks at sm_90
# in bfloat16 and, of the interpreted ones, at one case a regime (REPEATED in tests/backends/test_triton.py and
# test_cuda.py). And what takes nvcc minutes.
kernel-gates: $(TESTS) $(TRITON36)
	KERNEL_ARCHS="80 90 100" $(PYTEST) tests/backends/test_triton.py tests/backends/test_triton36.py \
		tests/backends/test_cuda.py $(wildcard tests/backends/test_*_cuda.py) tests/backends/test_token_loss_mutants.py \
		tests/backends/test_sass.py tests/project/test_build_cuda.py

# Packed rows of every family in every setting; `make test` has every family in one, and every setting on Qwen2.
packing-gates: $(TESTS)
	PACKING_GATES=1 $(PYTEST) tests/packing

# Several processes of a run stopped at 20 random points; `make test` has 2.
rank-gates: $(TESTS)
	STOP_POINTS=20 $(PYTEST) tests/training/test_rank_stops.py

# What the package costs, counted without a clock, and what is stored of it in tests/budgets.json: make budgets. New and
# lower numbers are stored by STORE=1, all of them by STORE=all; GROUP= counts some (tests/budgets).
STORE ?=
budgets: $(TESTS) $(TRITON36)
	$(VENV)/bin/python -m tests.budgets $(STORE:%=--store %) $(GROUP)

# On a CUDA machine, with the python3 that is there: make gpu-check OUT=DIR
OUT ?= gpu-check
gpu-check:
	$(PYTHON) -m tools.gpu_check $(OUT)

lint: $(TESTS)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/clang-format --dry-run -Werror csrc/*/* tests/*/*.cpp
	$(VENV)/bin/mypy
	$(VENV)/bin/check-jsonschema --builtin-schema vendor.github-workflows .github/workflows/*
	$(VENV)/bin/check-jsonschema --builtin-schema vendor.github-issue-forms .github/ISSUE_TEMPLATE/[!c]*
	$(VENV)/bin/check-jsonschema --builtin-schema vendor.github-issue-config .github/ISSUE_TEMPLATE/config.yml
	$(VENV)/bin/check-jsonschema --builtin-schema vendor.citation-file-format CITATION.cff
	$(VENV)/bin/pre-commit validate-config

# The site, in build/site. It reads the docstrings from the source: neither torch nor this package is needed.
docs: $(DOCS)
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/mkdocs build

# What is published for this platform, by the settings in pyproject.toml. On Linux cibuildwheel needs Docker.
wheels:
	$(PYTHON) -m venv .venv-wheels
	.venv-wheels/bin/pip install "cibuildwheel==4.3.5"
	.venv-wheels/bin/cibuildwheel --output-dir dist

# The tests of the C++ module, and where nvcc is of the host code of CUDA's, what it refuses and what launches it plans, on
# a second build of them, with the shipped flags and checks of every access and overflow. No kernel is interpreted.
# CXXFLAGS takes the place of Python's own flags, so without their -fwrapv. libasan must come first in the process, and
# libstdc++ with it: else it finds no __cxa_throw. Python itself leaks. Fifty repeats and float16, which is as wide as
# bfloat16, touch no further memory. The tests of Triton would load its LLVM, those of other trainers all of them; none of
# training's and packing's is asked for, and reading them was a quarter of the collection. This folder comes before
# site-packages, where verl has a package tests too.
HOST_OF_CUDA := cuda and (bindings or the_plan or the_grid_is or a_launch_has or product_does_not_take or by_name)
UNREAD := tests/integrations/% tests/packing/% tests/training/% tests/backends/test_triton%
CHECKS := -fsanitize=address,undefined -fno-sanitize-recover=all
$(SANITIZED): $(READY)
	rm -rf build/sanitize
	CXXFLAGS="$(CHECKS) -D_GLIBCXX_ASSERTIONS" LDFLAGS="$(CHECKS)" $(VENV)/bin/python setup.py -q build \
		--build-lib build/sanitize/lib --build-temp build/sanitize/temp
	touch $@

sanitize: $(TESTS) $(SANITIZED)
	PYTHONPATH=build/sanitize/lib:$(CURDIR) ASAN_OPTIONS=detect_leaks=0 \
	LD_PRELOAD="$(foreach name,asan stdc++,$(shell $(CXX) -print-file-name=lib$(name).so))" \
	OMP_WAIT_POLICY=passive $(VENV)/bin/pytest -x -n 2 --dist worksteal --import-mode=append --capture=sys \
		-k "(cpu or $(HOST_OF_CUDA)) and not fifty and not 151936 and not dtype2" tests/project/sanitize.py $(filter-out $(UNREAD),$(wildcard tests/*/test_*.py))

# Without a GPU the CUDA module is here for its host code: the other architectures would be 55 of 190 CPU seconds. Both
# builds share what nvcc compiles.
ifeq ($(NVIDIA),)
$(READY) $(SANITIZED) verl-extra: export TORCH_CUDA_ARCH_LIST ?= 9.0a
endif
PIP = $(VENV)/bin/pip install $(LOCK:%=-c %)
$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

# A torch that is already in .venv stays. Its CUDA build needs one certain release of Triton, which it brings: with
# another one locked, pip would put a newer torch in its place.
$(VENV)/lock.txt: tests/lock.txt | $(VENV)/bin/python
	$(VENV)/bin/python -c "import torch" 2>/dev/null || $(VENV)/bin/pip install $(TORCH)
	if $(VENV)/bin/pip show torch | grep -q "^Requires:.*triton"; then grep -v "^triton==" $<; else cat $<; fi > $@

$(READY): pyproject.toml setup.py $(VENV)/lock.txt $(wildcard csrc/*/*)
	$(PIP) "setuptools>=77" "pybind11>=2.12"
	$(PIP) --no-build-isolation -e ".[train]"
	touch $@

$(DOCS): docs/packages.txt tests/lock.txt | $(VENV)/bin/python
	$(VENV)/bin/pip install $(if $(LOCK),-c tests/lock.txt) -r docs/packages.txt
	touch $@

$(TESTS): $(READY) $(DOCS) tests/packages.txt
	$(PIP) -r tests/packages.txt
	$(PIP) --no-deps "verl; python_version < '3.13'" TransferQueue
	touch $@

# GPU machines have Triton 3.6, whose code differs. Here it has .venv's torch: folders of a .pth file come last.
SITE := -c "import sysconfig; print(sysconfig.get_path('purelib'))"
.venv-triton36/.ready: $(TESTS)
	$(VENV)/bin/python -m venv .venv-triton36
	.venv-triton36/bin/pip install "triton==3.6.0" "numpy==2.3.5"
	$(VENV)/bin/python $(SITE) > $$(.venv-triton36/bin/python $(SITE))/venv.pth
	touch $@
