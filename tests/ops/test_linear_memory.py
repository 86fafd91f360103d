"""What the head's ops take above their inputs: by the allocator's own record, and by the process's peak."""

import subprocess
import sys

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

import redit_fast as rf
from redit_fast.backends import cpu
from redit_fast.ops import linear_loss
from redit_fast.ops.chunks import rows_per_chunk
from tests import ROOT

refusal = cpu.why_not("exp_product", torch.device("cpu"))
pytestmark = pytest.mark.skipif(refusal is not None, reason=f"cpu: {refusal}")
MB = 1e6
no_pairs = pytest.mark.skipif(
    "avx512_bf16" not in cpu.instruction_sets(), reason="without AVX512_BF16 the products widen a tile of each side"
)
BFLOAT16 = pytest.param(torch.bfloat16, marks=no_pairs, id="bfloat16")


def allocated(run, *leaves):
    """The bytes that `run` holds at its peak above what it found, after a first run; the leaves' gradients are new."""
    run()
    for leaf in leaves:
        leaf.grad = None
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        run()
    held = peak = 0
    for event in record.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    assert peak > 0
    return peak


def loss(rows, width, vocabulary, dtype, trainable, chunk_rows, padded=False):
    """A function that runs the loss and its backward pass, and the tensors that it fills with gradients."""
    wide = torch.randn(rows // 64, 65, width).to(dtype) if padded else torch.randn(rows, width).to(dtype)
    hidden, weight = wide.requires_grad_(), torch.randn(vocabulary, width).to(dtype).requires_grad_(trainable)
    x = hidden[:, :-1].detach().requires_grad_() if padded else hidden  # a leaf that is not contiguous
    targets = torch.randint(vocabulary, x.shape[:-1])
    advantages, config = torch.randn(x.shape[:-1]), rf.LossConfig()

    def run():
        rf.linear_grpo_loss(x, weight, targets, advantages, config=config, chunk_rows=chunk_rows).loss.backward()

    return run, x, weight


CASES = [(512, 64, 8000, 128), (500, 512, 8000, 128), (512, 512, 8000, 512), (4096, 64, 3000, 64)]


@pytest.mark.parametrize("trainable", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, BFLOAT16, torch.float16])
@pytest.mark.parametrize("sizes", CASES, ids=str)
def test_the_estimate_is_what_is_allocated(sizes, dtype, trainable):
    estimate = rf.estimate_memory(*sizes[:3], dtype, trainable, sizes[3])
    assert allocated(*loss(*sizes[:3], dtype, trainable, sizes[3])) == pytest.approx(estimate, rel=0.1)


@pytest.mark.parametrize("trainable", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_four_times_the_rows_take_no_more_than_their_own_gradient(dtype, trainable):
    """And 64 bytes a row; of hidden states as a model leaves them, `hidden[:, :-1]`, no copy is made."""
    peaks = []
    for rows in (512, 2048):
        run, hidden, weight = loss(rows, 256, 3000, dtype, trainable, 64, padded=True)
        peaks.append(allocated(run, hidden, weight) - rows * (hidden.element_size() * 256 + 80))
    assert peaks[1] <= peaks[0] + 1000


def test_the_extra_memory_is_the_chunk_whatever_the_rows():
    for rows in (512, 4096):
        run, hidden, weight = loss(rows, 32, 6000, torch.float32, True, 64)
        extra = allocated(run, hidden, weight) - hidden.grad.nbytes - weight.grad.nbytes - 80 * rows
        assert 64 * 6000 * 4 < extra < 1.5 * 64 * 6000 * 4


def test_the_gradients_are_handed_over_and_not_copied(monkeypatch):
    """Autograd copies a gradient that somebody else still holds."""
    given, outgoing = [], linear_loss.outgoing

    def recorded(*args):
        grads = outgoing(*args)
        given.extend(grad.data_ptr() for grad in grads if grad is not None)
        return grads

    monkeypatch.setattr(linear_loss, "outgoing", recorded)
    run, hidden, weight = loss(64, 16, 300, torch.float32, True, None)
    run()
    assert {hidden.grad.data_ptr(), weight.grad.data_ptr()} <= set(given)


PROCESS = """
import sys, torch
import redit_fast as rf
from redit_fast.benchmarks.clock import Peak
from tests.ops.test_linear_memory import loss

torch.set_num_threads(1)
dtype, trainable = getattr(torch, sys.argv[1]), sys.argv[2] == "True"
for sizes in ((64, 256, 32000), (2048, 256, 32000)):  # the first call loads libraries and starts threads
    run, hidden, weight = loss(*sizes, dtype, trainable, None)
    with Peak() as peak:
        run()
    del run, hidden, weight
print(peak.bytes)
"""


@pytest.mark.parametrize("trainable", [True, False])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_estimate_is_what_the_process_grows_by(dtype, trainable):
    done = subprocess.run([sys.executable, "-c", PROCESS, dtype, str(trainable)], capture_output=True, text=True,
                          cwd=ROOT)  # fmt: skip
    assert done.returncode == 0, done.stderr
    peak = float(done.stdout)
    if peak != peak:
        pytest.skip("Linux does not count this process's peak here")
    assert peak == pytest.approx(rf.estimate_memory(2048, 256, 32000, getattr(torch, dtype), trainable), rel=0.1)
    assert peak > 100 * MB


def test_estimate_memory_names_a_bad_argument():
    good = dict(R=16, D=8, V=31, dtype=torch.float32, trainable=True)
    for change, name in [({"R": 0}, "R"), ({"D": -1}, "D"), ({"V": 2.5}, "V"), ({"chunk_rows": 0}, "chunk_rows"),
                         ({"dtype": torch.float64}, "dtype")]:  # fmt: skip
        with pytest.raises((ValueError, TypeError), match=f"^{name} must be"):
            rf.estimate_memory(**{**good, **change})


@pytest.mark.parametrize(("dtype", "width"), [(torch.float32, 4), (torch.bfloat16, 2), (torch.float16, 4)])
def test_the_default_chunk_is_256_mib_of_e(dtype, width):
    """float16 keeps E in float32. One step of 16 rows of the vocabulary is 5 to 10 MB."""
    bytes_of_e = rows_per_chunk(151936, dtype, None) * 151936 * width
    assert 0.95 * 2**28 < bytes_of_e <= 2**28
