"""The calls to flash-attn 2, 3 and 4 and to torch's varlen_attn, by stubs of their signatures, and which one runs."""

import inspect
import sys
from types import ModuleType

import pytest
import torch
from torch.nn.attention import varlen as of_torch

from redit_fast.packing import attention, varlen
from redit_fast.packing.attention import Segments
from redit_fast.packing.plan import Segment
from tests.packing import stubs
from tests.packing.models import batch_of, gradient, model_of

PLACES = {
    "flash-attn 2": ("flash_attn", stubs.flash_attn_2),
    "flash-attn 3": ("flash_attn_interface", stubs.flash_attn_3),
    "flash-attn 4": ("flash_attn.cute", stubs.flash_attn_4),
}
NAMES = [*PLACES, "torch varlen_attn"]


def install(monkeypatch, *names):
    """These kernels alone, as packages; torch's own by its stub."""
    monkeypatch.setattr(of_torch, "varlen_attn", stubs.varlen_attn)
    for module in ("flash_attn", "flash_attn.cute", "flash_attn_interface"):
        monkeypatch.setitem(sys.modules, module, None)
    if "flash-attn 4" in names:
        monkeypatch.setitem(sys.modules, "flash_attn", ModuleType("flash_attn"))
    for name in names:
        if name in PLACES:
            place, stub = PLACES[name]
            module = ModuleType(place)
            module.flash_attn_varlen_func = stub
            monkeypatch.setitem(sys.modules, place, module)
    varlen._missing.cache_clear()


@pytest.fixture(autouse=True)
def pretended(monkeypatch):
    """Float32 on the CPU, so that values compare, and a GPU of some capability."""
    monkeypatch.setattr(attention, "by_segment", attention.by_kernel)
    monkeypatch.setattr(varlen, "DTYPES", (torch.float32,))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    yield
    varlen._missing.cache_clear()


def passed(kind):
    model = model_of(kind)
    done = batch_of(model=model).backward(model)
    return done.logp, gradient(model)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", ["qwen2", "mistral", "granite", "gemma2"])
def test_each_kernel_gives_the_values_and_gradients_of_sdpa_a_segment(name, kind, monkeypatch):
    """Two heads of keys for four of queries, a window, a scale of the model's own, a softcap."""
    own = attention.by_kernel
    install(monkeypatch, name)
    if kind == "gemma2" and name in ("flash-attn 4", "torch varlen_attn"):
        with pytest.raises(attention.UnpackableError, match=f"{name}: has no softcap"):
            passed(kind)
        return
    calls = []
    monkeypatch.setattr(attention, "by_segment", lambda *args: calls.append(1) or own(*args))
    logp, grad = passed(kind)
    assert calls and varlen.found((9, 0), kind == "gemma2").name == name
    monkeypatch.undo()
    expected_logp, expected = passed(kind)
    assert (logp - expected_logp).abs().max() < 1e-5
    assert (grad - expected).norm() < 1e-5 * expected.norm()


def test_rows_that_share_nothing_are_not_gathered(monkeypatch):
    install(monkeypatch)
    monkeypatch.setattr(attention.Segments, "index", None)
    model = model_of("qwen2")
    batch_of(samples=[1], model=model).backward(model)  # a completion of one token: its prompt alone
    batch = batch_of(samples=[0, 1], model=model)
    with pytest.raises(TypeError, match="not callable"):
        batch.backward(model)


@pytest.mark.parametrize(
    ("capability", "installed", "softcap", "runs"),
    [
        ((9, 0), NAMES, False, "flash-attn 3"),
        ((9, 0), ["flash-attn 2", "flash-attn 4"], False, "flash-attn 4"),
        ((9, 0), ["flash-attn 2", "flash-attn 4"], True, "flash-attn 2"),
        ((10, 0), NAMES, False, "flash-attn 4"),
        ((10, 0), NAMES, True, "flash-attn 2"),
        ((8, 0), NAMES, False, "flash-attn 2"),
        ((8, 6), [], False, "torch varlen_attn"),
        ((9, 0), [], True, "flash-attn 2: cannot be imported.*torch varlen_attn: has no softcap"),
        ((7, 5), NAMES, False, "torch varlen_attn: needs a GPU of capability 8.0, this has 7.5"),
    ],
)
def test_which_kernel_runs_or_why_none(capability, installed, softcap, runs, monkeypatch):
    install(monkeypatch, *installed)
    if ": " in runs:
        with pytest.raises(NotImplementedError, match=runs):
            varlen.found(capability, softcap)
    else:
        assert varlen.found(capability, softcap).name == runs


def test_a_release_whose_signature_lacks_an_option_is_refused_by_name(monkeypatch):
    install(monkeypatch, "flash-attn 2")

    def old(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale=None, causal=False):
        raise AssertionError

    monkeypatch.setattr(sys.modules["flash_attn"], "flash_attn_varlen_func", old)
    assert "has no softcap and no window_size" in varlen.refusal("flash-attn 2", (8, 0))


def test_under_autocast_the_kernel_is_given_its_dtype(monkeypatch):
    """Where rotary embeddings have made float32 of queries and keys, and of values not."""
    monkeypatch.setattr(varlen, "DTYPES", (torch.bfloat16,))
    install(monkeypatch, "flash-attn 2")
    segments = Segments([Segment(0, 0, 4, None), Segment(0, 4, 2, 0), Segment(1, 4, 3, 0)], torch.device("cpu"))
    q, k, v = torch.randn(3, 1, 2, 9, 8)
    layer = torch.nn.Module()
    with torch.autocast("cpu", torch.bfloat16):
        found, _ = attention.attention(layer, q, k, v.bfloat16(), segments=segments)
    expected, _ = attention.attention(layer, q.bfloat16(), k.bfloat16(), v.bfloat16(), segments=segments)
    assert found.dtype == torch.bfloat16 and torch.equal(found, expected)
    with pytest.raises(attention.UnpackableError, match="is for float16 and bfloat16, got torch.float32"):
        attention.attention(layer, q, k, v, segments=segments)


def test_another_dtype_is_refused_by_name(monkeypatch):
    install(monkeypatch, "flash-attn 2")
    monkeypatch.setattr(varlen, "DTYPES", (torch.float16, torch.bfloat16))
    with pytest.raises(attention.UnpackableError, match="flash-attn 2 is for float16 and bfloat16, got torch.float32"):
        passed("qwen2")


def test_the_stub_of_torch_has_the_signature_of_the_one_that_is_here():
    real = of_torch.varlen_attn
    ours, theirs = (inspect.signature(call).parameters for call in (stubs.varlen_attn, real))
    assert [(p.name, p.kind, p.default) for p in ours.values()] == [
        (p.name, p.kind, p.default) for p in theirs.values()
    ]
