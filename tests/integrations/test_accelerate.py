"""accelerate's own loop around our optimizers, as docs/epsilon.md has it: the weights of the plain loop."""

import re
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.state import AcceleratorState, GradientState
from torch import nn

import redit_fast as rf
from tests import ROOT
from tests.tolerance import relative

PAGE = (ROOT / "docs" / "epsilon.md").read_text()
LOOP = re.search(r"## Accelerate\n.*?```python\n(.*?)```", PAGE, re.S)[1]
GR = {"gamma": 0.03, "epsilon": 0.05, "max_norm": 0.5}
MAKE = {
    "RegularizedAdamW": lambda groups: rf.RegularizedAdamW(groups, lr=0.01, **GR),
    "GradientRegularizer": lambda groups: rf.GradientRegularizer(torch.optim.SGD(groups, lr=0.1, momentum=0.9), **GR),
}


@pytest.fixture
def accelerator():
    """Builds one; accelerate keeps one state a process."""

    def build(scaler=None, **options):
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
        built = Accelerator(cpu=True, gradient_accumulation_steps=2, **options)
        built.scaler = scaler  # its own is for GPUs alone
        return built

    yield build
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def a_model():
    torch.manual_seed(0)
    return nn.Sequential(nn.ModuleList([nn.Linear(6, 8)])[0], nn.Tanh(), nn.Linear(8, 3))


def loss_of(model, batch):
    x, y = batch
    return nn.functional.cross_entropy(model(x).float(), y)


def batches(count=8):
    draw = torch.Generator().manual_seed(1)
    return [(torch.randn(5, 6, generator=draw), torch.randint(3, (5,), generator=draw)) for _ in range(count)]


def plain(make, autocast=False):
    model = a_model()
    opt, data = make([{"params": list(model.parameters())}]), batches()
    for i in range(0, len(data), 2):

        def backward(pair=data[i : i + 2]):
            for batch in pair:
                with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                    loss = loss_of(model, batch)
                (loss / 2).backward()

        backward()
        if opt.perturb():
            backward()
        opt.step()
        opt.zero_grad()
    return model


def accelerated(accelerator, make, data=None):
    model = a_model()
    optimizer = make([{"params": list(model.parameters())}])
    own = optimizer
    model, optimizer, loader = accelerator.prepare(model, optimizer, batches() if data is None else data)
    assert isinstance(optimizer, AcceleratedOptimizer) and not hasattr(optimizer, "perturb")
    assert rf.unwrap(optimizer) is own
    exec(LOOP.partition("\n")[2], {"rf": rf, "loss_of": loss_of, "accelerator": accelerator, "model": model,
                                   "optimizer": optimizer, "loader": loader})  # fmt: skip
    return accelerator.unwrap_model(model), own


def moved_alike(found, expected, tolerance):
    for p, q, start in zip(found.parameters(), expected.parameters(), a_model().parameters()):
        assert (q - start).norm() > 1e-3 and relative(p.detach() - start, q.detach() - start) < tolerance


@pytest.mark.parametrize("make", MAKE.values(), ids=MAKE)
@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_the_documented_loop_takes_the_steps_of_the_plain_one(accelerator, make, precision):
    model, own = accelerated(accelerator(mixed_precision=precision), make)
    assert own.metrics()["gr/g1_norm"] > 0 and own.metrics()["gr/skipped_steps"] == 0
    moved_alike(model, plain(make, precision == "bf16"), 1e-5)


@pytest.mark.parametrize("make", MAKE.values(), ids=MAKE)
def test_under_a_grad_scaler_too_and_what_overflows_is_skipped(accelerator, make):
    model, _ = accelerated(accelerator(torch.amp.GradScaler("cpu", init_scale=2.0**10)), make)
    moved_alike(model, plain(make), 1e-4)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    model, own = accelerated(accelerator(scaler), make, [(x.masked_fill(x == x.max(), torch.inf), y)
                                                         for x, y in batches(2)])  # fmt: skip
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), a_model().parameters()))
    assert own.metrics()["gr/skipped_steps"] == 1 and scaler.get_scale() == 2.0**9


def test_unwrap_follows_every_wrapper_and_refuses_what_holds_none_of_ours(accelerator):
    own = MAKE["GradientRegularizer"](list(a_model().parameters()))
    assert rf.unwrap(own) is own
    assert rf.unwrap(SimpleNamespace(optimizer=SimpleNamespace(optimizer=own))) is own
    endless = SimpleNamespace()
    endless.optimizer = endless
    stock = torch.optim.SGD(a_model().parameters())
    for other, words in [
        (accelerator().prepare(stock), "AcceleratedOptimizer, which holds SGD"),
        (stock, "SGD"),
        (endless, "SimpleNamespace"),
        (None, "NoneType"),
        ([own], "list"),
    ]:
        needs = "optimizer must be a RegularizedAdamW or GradientRegularizer, or hold one as .optimizer, got"
        with pytest.raises(TypeError, match=f"^{needs} {words}$"):
            rf.unwrap(other)
