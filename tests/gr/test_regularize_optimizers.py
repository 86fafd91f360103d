"""GradientRegularizer around the optimizers that people use, and both classes under a GradScaler."""

import copy
import math

import pytest
import torch
from torch import nn

import redit_fast as rf
from tests.gr.test_regularize import adamw, copies_of, loss_of, network, sgd

OPTIMIZERS = {
    "SGD": lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9, nesterov=True),
    "AdamW": lambda params: torch.optim.AdamW(params, lr=0.01),
    "AdamW, fused": lambda params: torch.optim.AdamW(params, lr=0.01, fused=True),
    "Muon": lambda params: torch.optim.Muon(params, lr=0.02),
    "Adafactor": lambda params: torch.optim.Adafactor(params, lr=0.01),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_any_optimizer_takes_the_combined_and_clipped_gradient(backend, name):
    if name == "Muon" and not hasattr(torch.optim, "Muon"):
        pytest.skip("torch.optim.Muon came with torch 2.9")
    model = nn.Sequential(nn.Linear(16, 8, bias=False), nn.Tanh(), nn.Linear(8, 4, bias=False))  # Muon takes matrices
    twin, gamma, epsilon = copy.deepcopy(model), 0.15, 0.1
    ours = rf.GradientRegularizer(OPTIMIZERS[name](model.parameters()), gamma=gamma, epsilon=epsilon, max_norm=0.02)
    theirs = OPTIMIZERS[name](twin.parameters())
    for _ in range(3):
        x = torch.randn(8, 16)
        loss_of(model, x).backward()
        assert ours.perturb()
        loss_of(model, x).backward()
        ours.step()
        ours.zero_grad()

        params = list(twin.parameters())
        start = [p.detach().clone() for p in params]
        g1 = torch.autograd.grad(loss_of(twin, x), params)
        with torch.no_grad():
            for p, g in zip(params, g1):
                p += epsilon * g
        g2 = torch.autograd.grad(loss_of(twin, x), params)
        with torch.no_grad():
            for p, old, a, b in zip(params, start, g1, g2):
                p.copy_(old)
                p.grad = a + gamma / epsilon * (b - a)
        assert nn.utils.clip_grad_norm_(params, 0.02) > 0.03
        theirs.step()
    assert not torch.equal(params[0], start[0])
    for p, q in zip(model.parameters(), params):
        torch.testing.assert_close(p, q, rtol=2e-4, atol=1e-5)


def test_an_eight_bit_optimizer_takes_the_regularised_gradient():
    bitsandbytes = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    model, x = nn.Linear(128, 64), torch.randn(8, 128)  # smaller tensors keep 32 bits
    twin = copy.deepcopy(model)
    opt = rf.GradientRegularizer(bitsandbytes.optim.AdamW8bit(model.parameters(), lr=1e-2), gamma=0.5, epsilon=0.5)
    theirs = bitsandbytes.optim.AdamW8bit(twin.parameters(), lr=1e-2)
    loss_of(model, x).backward()
    before = [p.detach().clone() for p in model.parameters()]
    assert opt.perturb()
    loss_of(model, x).backward()
    for p, q in zip(model.parameters(), twin.parameters()):
        q.grad = p.grad.clone()
    opt.max_norm = None
    opt.step()
    theirs.step()
    assert opt.state[model.weight]["state1"].dtype == torch.uint8
    for p, q, old in zip(model.parameters(), twin.parameters(), before):
        assert torch.equal(p, q) and not torch.equal(p, old)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("make", [sgd, adamw])
def test_between_steps_no_more_is_held_than_the_specification_says(backend, make, dtype):
    """AdamW: m, v and a float32 master, or in float32 one copy; around another optimizer one copy in its own dtype."""
    model = network(dtype)
    groups = rf.parameter_groups(model, "^2")
    opt = make(groups, gamma=0.3, epsilon=0.1)
    loss_of(model, torch.randn(8, 16)).backward()
    opt.perturb()
    loss_of(model, torch.randn(8, 16)).backward()
    opt.step()
    opt.zero_grad()
    inside = sum(p.numel() for p in groups[0]["params"])
    everything = sum(p.numel() for p in model.parameters())
    held = [t for holder in (copies_of(opt), *opt.state.values()) for t in holder.values() if t is not None]
    bytes_held = sum(t.numel() * t.element_size() for t in held)
    size = model[0].weight.element_size()
    steps = 4 * len(list(model.parameters()))
    if make is sgd:
        assert bytes_held == size * inside
    elif dtype == torch.bfloat16:
        assert bytes_held == 12 * everything + steps
    else:
        assert bytes_held == 8 * everything + steps + 4 * inside
    assert not any(p.grad is not None for p in model.parameters()) and opt._passes._first_pass is None


@pytest.mark.parametrize(
    ("dtype", "ratio", "kept"),
    [(torch.bfloat16, 4, True), (torch.bfloat16, 0.25, True), (torch.bfloat16, 2, False), (torch.bfloat16, 0.5, False),
     (torch.float32, 4, False), (torch.float32, 0.25, False)],
)  # fmt: skip
def test_the_first_gradient_is_kept_by_itself_where_folding_would_round_it(dtype, ratio, kept):
    """The penalty's ratio is a number where it is kept, and NaN where it is folded."""
    model, x = network(dtype), torch.randn(8, 16)
    opt = adamw(model.parameters(), gamma=0.25 * ratio, epsilon=0.25)
    opt.two_pass(lambda: loss_of(model, x).backward())
    assert math.isfinite(opt.metrics()["gr/penalty_ratio"]) == kept


def scaled_steps(device, make, dtype, scale, **gr):
    """Weights and metrics after three steps, the loss scaled by `scale`, or not at all."""
    torch.manual_seed(0)
    model = network(dtype)
    opt = make(model.parameters(), lr=1e-2, **{"gamma": 0.3, "epsilon": 0.1, "max_norm": 0.05, **gr})
    scaler = torch.amp.GradScaler(device, init_scale=scale or 1.0, enabled=scale is not None)
    for _ in range(3):
        x = torch.randn(8, 16)
        scaler.scale(loss_of(model, x)).backward()
        if opt.perturb(grad_scaler=scaler):
            scaler.scale(loss_of(model, x)).backward()
        scaler.step(opt)
        scaler.update()
        opt.zero_grad()
    return torch.cat([p.detach().float().flatten() for p in model.parameters()]), opt.metrics()


@pytest.mark.parametrize("make", [sgd, adamw])
@pytest.mark.parametrize(
    "gr",
    [{}, {"keep_first_grad": True}, {"gamma": 0.1}, {"gamma": 0.0}, {"normalized": True},
     {"epsilon": "auto", "gamma": 1e-3}],
)  # fmt: skip
def test_any_scale_of_the_loss_gives_the_same_step(backend, device, make, gr):
    plain, metrics = scaled_steps(device, make, torch.float32, None, **gr)
    for scale in (1.0, 2.0**8, 2.0**16, 1000.0):
        weights, scaled = scaled_steps(device, make, torch.float32, scale, **gr)
        torch.testing.assert_close(weights, plain, rtol=1e-5, atol=1e-6)
        assert scaled == pytest.approx(metrics, rel=1e-3, nan_ok=True)


@pytest.mark.parametrize("make", [sgd, adamw])
def test_in_float16_any_scale_gives_the_same_step_to_its_precision(backend, device, make):
    """The gradients here are normal float16 numbers at every one of these scales."""
    plain, metrics = scaled_steps(device, make, torch.float16, None, rounding="nearest")
    for scale in (2.0**2, 2.0**8, 2.0**12):
        weights, scaled = scaled_steps(device, make, torch.float16, scale, rounding="nearest")
        assert (weights - plain).norm() < 1e-3 * plain.norm()
        assert scaled["grad_norm"] == pytest.approx(metrics["grad_norm"], rel=2e-2)


def test_unscaling_and_clipping_round_a_float16_gradient_once(backend, device):
    """Together a factor of 2e-6, which as a float16 would have five bits."""
    p = nn.Parameter(torch.zeros(100, dtype=torch.float16))
    opt, scaler = sgd([p], gamma=0.0, max_norm=0.1), torch.amp.GradScaler(device, init_scale=2.0**12)
    (scaler.scale(p.float() @ torch.linspace(0.5, 1.5, 100))).backward()
    scaled = p.grad.double()
    scaler.step(opt)
    exact = scaled * 0.1 / scaled.norm()
    assert ((p.grad.double() - exact).abs() <= exact * 2**-11 * 1.01 + 1e-6 * exact).all()


@pytest.mark.parametrize("make", [sgd, adamw])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("gr", [{}, {"keep_first_grad": True}, {"gamma": 0.1}])
@pytest.mark.parametrize("bad", [1, 2])
def test_an_overflow_in_either_pass_skips_the_step_and_lowers_the_scale(backend, device, make, dtype, gr, bad):
    """GradScaler looks at .grad after both passes only: the first one's infinities must still be seen there."""
    model, x = network(dtype), torch.randn(8, 16)
    opt = make(model.parameters(), **{"gamma": 0.3, "epsilon": 0.1, **gr})
    scaler = torch.amp.GradScaler(device, init_scale=4.0)
    before = copy.deepcopy(model.state_dict())
    for i in (1, 2):
        scaler.scale(loss_of(model, x)).backward()
        if i == bad:
            model[0].weight.grad[0, 0] = torch.inf
        if i == 1:
            assert opt.perturb(grad_scaler=scaler)
    scaler.step(opt)
    scaler.update()
    opt.zero_grad()
    assert scaler.get_scale() == 2.0 and opt.metrics()["gr/skipped_steps"] == 1
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    scaler.scale(loss_of(model, x)).backward()
    assert opt.perturb(grad_scaler=scaler)
    scaler.scale(loss_of(model, x)).backward()
    scaler.step(opt)
    scaler.update()
    assert scaler.get_scale() == 2.0 and opt.metrics()["gr/skipped_steps"] == 1
    assert not all(torch.equal(before[name], value) for name, value in model.state_dict().items())


@pytest.mark.parametrize("make", [sgd, adamw])
def test_a_grad_scaler_used_the_wrong_way_names_the_right_one(make):
    model, x = network(), torch.randn(8, 16)
    opt, scaler = make(model.parameters(), gamma=0.1, epsilon=0.1), torch.amp.GradScaler("cpu", init_scale=4.0)

    def passes(given):
        opt.zero_grad()
        scaler.scale(loss_of(model, x)).backward()
        opt.perturb(grad_scaler=given)
        scaler.scale(loss_of(model, x)).backward()

    passes(scaler)
    with pytest.raises(RuntimeError, match=r"scaler.step\(optimizer\), without scaler.unscale_"):
        opt.step()
    scaler.unscale_(opt)
    with pytest.raises(RuntimeError, match=r"without scaler.unscale_"):
        scaler.step(opt)
    scaler.update()
    opt.restore()
    passes(None)
    with pytest.raises(RuntimeError, match=r"perturb\(grad_scaler=scaler\)"):
        scaler.step(opt)

    opt.restore()
    passes(scaler)
    scaler.step(opt)
    opt.zero_grad()
    opt.gamma = 0.0
    loss_of(model, x).backward()
    opt.step()  # the scaler was the last step's


@pytest.mark.parametrize("mark", ["ds_id", "_hp_mapping"])
def test_deepspeeds_parameters_are_refused_in_one_sentence(mark):
    """What ZeRO 3, and ZeRO 1 and 2, leave on the parameters of DeepSpeed 0.19.8; its engine, given one of our
    optimizers, then assigns param_groups."""
    p = nn.Parameter(torch.zeros(2))
    opt = adamw([p])
    with pytest.raises(NotImplementedError, match="param_groups cannot be replaced. DeepSpeed .* use DDP or FSDP2"):
        opt.param_groups = opt.param_groups
    setattr(p, mark, 0)
    with pytest.raises(NotImplementedError, match="DeepSpeed .* use DDP or FSDP2"):
        adamw([p])
