"""One test body, every (backend, device) of this machine: `place` is each pair in turn, `backend` forces its backend
and puts what the test makes on its device; a skip prints the refusal. For the tests of the trainer: a model and data as
a user would bring them, and the settings of a small run.
"""

import atexit
import contextlib
import gc
import json
import signal
import sys

import pytest
import torch

import redit_fast as rf
from redit_fast import backends
from redit_fast.backends import cpu
from redit_fast.backends.cuda import linear_loss as cuda_head
from redit_fast.backends.cuda import module
from tests import cuda as cuda_without_a_gpu
from tests.grid import CUDA_INTERPRETED, DEVICES, INTERPRETED, MadeOn, pairs

# As in a terminal, here and in the processes that tests start: nohup's children ignore SIGHUP, and SIGINT those that a
# script runs in the background.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)

REWARDS = [f"redit_fast.training.builtin:{name}" for name in ("correct_answer", "right_steps", "answer_format")]

if INTERPRETED:
    import tests.quick_interpreter  # noqa: F401
if CUDA_INTERPRETED:
    module.run_launches = cuda_without_a_gpu.interpret


def pytest_collection_modifyitems(items):
    """One process of `make test` takes the first half; who is done first steals the other's last tests. By then the
    tests of test_install.py are over, for which both would build."""
    items.sort(key=lambda item: item.path.stem != "test_install")


@pytest.hookimpl(wrapper=True)
def pytest_collection():
    """A full garbage collection looks at all objects: 0.3 s beside 13,000 tests and what they import. From here on it
    leaves those out, and takes 0.01 s: trainers make several a run, and Python one whenever much is new."""
    gc.disable()  # of those many objects none is garbage
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()
        atexit.register(gc.unfreeze)  # else nobody frees them at the end, where libraries warn of it


@pytest.fixture
def large_tiles(monkeypatch):
    """Tiles for Triton's interpreter, which takes 5 ms a tile of any size: the bits do not depend on it."""
    if INTERPRETED:
        monkeypatch.setattr("redit_fast.kernels.params.ROWS", 2048)
        monkeypatch.setattr("redit_fast.kernels.advantages.GROUPS", 512)


@pytest.fixture(params=pairs(DEVICES))
def place(request):
    """(backend, device)"""
    return request.param


@pytest.fixture
def device(place):
    return place[1]


@pytest.fixture
def backend(request, place, large_tiles):
    """A forced backend's name, and tensors made on its device; the test skips where the backend refuses an op that the
    test's module names in `OPS`, or the test in its mark `ops`."""
    name, device = place
    marked = [op for mark in request.node.iter_markers("ops") for op in mark.args]
    for op in (*getattr(request.module, "OPS", ()), *marked):
        if refusal := backends.refusal(op, name, torch.device(device)):
            pytest.skip(f"{name}: {refusal}")
    with rf.use_backend(name), contextlib.nullcontext() if device == "cpu" else MadeOn(device):
        yield name


@pytest.fixture
def cuda(monkeypatch):
    """The CUDA backend, forced, its kernels interpreted."""
    if cuda_without_a_gpu.NVCC is None:
        pytest.skip("nvcc is not installed")
    monkeypatch.setenv("REDIT_FAST_CUDA_INTERPRET", "1")
    monkeypatch.setattr(module, "run_launches", cuda_without_a_gpu.interpret)
    with rf.use_backend("cuda"):
        yield


@pytest.fixture
def countable(monkeypatch):
    """Products that torch sees."""
    device_of = cuda_head.device_of
    monkeypatch.setattr(cuda_head, "device_of", lambda tensor: device_of(tensor)._replace(architecture=80))
    widest = next((name for name in reversed(cpu.instruction_sets()) if not name.endswith("bf16")), None)
    with contextlib.nullcontext() if widest is None else cpu.use_instruction_set(widest):
        yield


@pytest.fixture(autouse=True)
def without_pictures(request, monkeypatch):
    """A run of two steps takes 1 CPU second, and its curves and page 3: only tests marked draws have them."""
    report = sys.modules.get("redit_fast.training.report")
    if report is not None and "draws" not in request.keywords:
        monkeypatch.setattr(report, "write", lambda run: None)


@pytest.fixture(autouse=True)
def seeded():
    """As torch.manual_seed, which without a GPU keeps the caller's stack as text, for a GPU to come: 1 ms a test."""
    torch.default_generator.manual_seed(0)
    if torch.cuda.is_available():
        torch.cuda.manual_seed_all(0)


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory):
    """A tiny model and its own tokenizer, as a user would bring them."""
    from redit_fast.training import builtin

    folder = tmp_path_factory.mktemp("model")
    model, tokenizer = builtin.build(0)
    builtin.warm_start(model, tokenizer, steps=4, seed=0)
    model.config.max_position_embeddings = 1024
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def problems(tmp_path_factory):
    from redit_fast.training import builtin

    path = tmp_path_factory.mktemp("data") / "problems.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in builtin.records(60, held_out=False, seed=0)))
    return path


@pytest.fixture
def settings(model_folder, problems, tmp_path):
    return {
        "model": str(model_folder), "data": str(problems), "rewards": REWARDS, "out_dir": str(tmp_path), "name": "run",
        "steps": 2, "prompts_per_step": 3, "group_size": 4, "max_completion_length": 12, "eval_problems": 5,
        "learning_rate": 1e-3, "checkpoint_every": 1, "eval_every": 2, "gr_gamma": 0.1, "gr_epsilon": 0.1,
    }  # fmt: skip


def few(backend, rows, most=16):
    """Of rows, as many as an interpreter has the time for: Triton's takes 5 ms a row and pass."""
    slow = INTERPRETED and backend == "triton" or CUDA_INTERPRETED and backend == "cuda"
    return min(rows, most) if slow else rows


def skip_float64(backend, dtype=torch.float64):
    if backend in ("cuda", "triton") and dtype == torch.float64:
        pytest.skip(f"{backend}: refuses float64 parameters")
