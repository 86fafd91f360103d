"""The GR step really happens, is restored bit by bit, and is the finite-difference gradient it claims to be."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import redit_fast as rf
from redit_fast import noise
from tests.conftest import skip_float64

OPS = ("squared_norm", "perturb", "combine", "adamw")
LOW = [torch.bfloat16, torch.float16]


def sgd(params, lr=1.0, **gr):
    return rf.GradientRegularizer(torch.optim.SGD(params, lr=lr), **{"max_norm": None, **gr})


def adamw(params, lr=1e-2, **gr):
    return rf.RegularizedAdamW(params, lr=lr, **{"max_norm": None, **gr})


def copies_of(opt):
    """What is held of parameters that have no master."""
    store = opt._passes.store
    return store.copies if hasattr(store, "copies") else store.without_master.copies


class Quadratic(nn.Module):
    """L = x'Hx / 2: the gradient is Hx and the GR gradient H x + gamma H H x, exactly, at any epsilon."""

    def __init__(self, n=12, dtype=torch.float64):
        super().__init__()
        a = torch.randn(n, n, dtype=torch.float64)
        self.H = a @ a.t() / n
        self.x = nn.Parameter(torch.randn(n, dtype=torch.float64).to(dtype))

    def forward(self):
        x = self.x.to(self.H.dtype)
        return 0.5 * (x @ self.H @ x)


def network(dtype=torch.float32):
    return nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 4)).to(dtype)


def loss_of(model, x):
    return model(x.to(next(model.parameters()).dtype)).float().square().mean()


def one_step(opt, closure):
    closure().backward()
    if opt.perturb():
        closure().backward()
    opt.step()
    opt.zero_grad()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("keep", [None, True, False])
@pytest.mark.parametrize(("gamma", "epsilon"), [(1e-2, 1e-2), (3e-2, 1e-2), (0.2, 0.05), (1e-3, 1e-1)])
def test_a_quadratic_gives_the_closed_form(backend, dtype, keep, gamma, epsilon):
    skip_float64(backend, dtype)
    model = Quadratic(dtype=dtype)
    x = model.x.detach().double().clone()
    opt = sgd([model.x], gamma=gamma, epsilon=epsilon, keep_first_grad=keep, perturb_max_norm=1e9)
    one_step(opt, model)
    g = model.H @ x
    expected = g + gamma * model.H @ g
    # the difference g2 - g1 is of size epsilon |Hg| and multiplied by gamma / epsilon
    tolerance = 1e-12 if dtype == torch.float64 else 3e-6 * max(1, gamma / epsilon)
    moved = x - model.x.detach().double()
    assert (moved - expected).norm() < tolerance * expected.norm() + (3e-7 * x.norm() if dtype == torch.float32 else 0)
    assert (moved - g).norm() > 5e-4 * g.norm()  # the penalty is there
    metrics = opt.metrics()
    assert metrics["grad_norm"] == pytest.approx(expected.norm().item(), rel=1e-4)
    assert metrics["gr/step_cos"] > 0.999 and metrics["gr/frac_moved"] == 1.0
    if keep:
        assert metrics["gr/penalty_ratio"] == pytest.approx((gamma * (model.H @ g).norm() / g.norm()).item(), rel=2e-2)
        g2 = model.H @ (x + epsilon * g)
        assert metrics["gr/g2_norm"] == pytest.approx(g2.norm().item(), rel=1e-5)
    else:
        assert math.isnan(metrics["gr/penalty_ratio"])


def test_a_gradient_of_zero_has_a_penalty_of_zero(backend):
    """Of a step all of whose groups are dead."""
    model = Quadratic(dtype=torch.float32)
    with torch.no_grad():
        model.x.zero_()
    opt = sgd([model.x], gamma=0.1, epsilon=0.01, keep_first_grad=True)
    one_step(opt, model)
    assert opt.metrics()["gr/penalty_ratio"] == 0 and not model.x.any()


def test_normalized_is_the_unsquared_norm(backend):
    skip_float64(backend)
    model = Quadratic()
    x = model.x.detach().clone()
    one_step(sgd([model.x], gamma=0.1, epsilon=0.02, normalized=True), model)
    g = model.H @ x
    torch.testing.assert_close(x - model.x.detach(), g + 0.1 * model.H @ g / g.norm(), rtol=1e-10, atol=1e-10)


def test_a_large_first_gradient_shortens_the_step_and_stays_a_finite_difference(backend):
    skip_float64(backend)
    model = Quadratic()
    x = model.x.detach().clone()
    one_step(sgd([model.x], gamma=0.05, epsilon=0.05, perturb_max_norm=0.1), model)
    g = model.H @ x
    torch.testing.assert_close(x - model.x.detach(), g + 0.05 * 0.1 / g.norm() * model.H @ g, rtol=1e-10, atol=1e-10)


def test_gamma_equal_to_epsilon_is_the_second_gradient_bit_by_bit(backend):
    model, x = network(), torch.randn(8, 16)
    ours, by_hand = copy.deepcopy(model), copy.deepcopy(model)
    one_step(sgd(ours.parameters(), gamma=0.1, epsilon=0.1), lambda: loss_of(ours, x))
    loss_of(by_hand, x).backward()
    start = [p.detach().clone() for p in by_hand.parameters()]
    with torch.no_grad():
        for p in by_hand.parameters():
            p += torch.tensor(0.1) * p.grad
            p.grad = None
    loss_of(by_hand, x).backward()
    for p, q, theta in zip(ours.parameters(), by_hand.parameters(), start):
        assert torch.equal(p, theta - q.grad)


def assert_equal_adamw(backend, ours, theirs, steps, lr):
    """Bits on the reference, which calls the same kernels. C++ rounds every operation by IEEE, while torch's lerp fuses
    its multiply-add and its float32 sqrt (MKL) misses the last bit of 5 % of values: a step then differs by some 3 ulp
    of itself, and the weight by half an ulp of its own."""
    if backend == "reference":
        assert torch.equal(ours, theirs)
    else:
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=3e-7 * steps * lr)


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_with_gamma_zero_the_step_is_torch_adamw_bit_by_bit(backend, weight_decay):
    ours, theirs = network(), None
    theirs = copy.deepcopy(ours)
    opt = adamw(ours.parameters(), gamma=0.0, weight_decay=weight_decay)
    reference = torch.optim.AdamW(theirs.parameters(), lr=1e-2, weight_decay=weight_decay, foreach=False)
    for _ in range(10):
        x = torch.randn(8, 16)
        one_step(opt, lambda: loss_of(ours, x))  # noqa: B023
        loss_of(theirs, x).backward()
        reference.step()
        reference.zero_grad()
    for p, q in zip(ours.parameters(), theirs.parameters()):
        assert_equal_adamw(backend, p, q, steps=10, lr=1e-2)


def test_clipping_is_by_the_global_norm_of_the_combined_gradient(backend):
    ours, theirs = network(), None
    theirs = copy.deepcopy(ours)
    x = torch.randn(8, 16) * 30
    opt = adamw(ours.parameters(), gamma=0.0, max_norm=0.1)
    one_step(opt, lambda: loss_of(ours, x))
    loss_of(theirs, x).backward()
    norm = nn.utils.clip_grad_norm_(theirs.parameters(), 0.1)
    torch.optim.AdamW(theirs.parameters(), lr=1e-2, weight_decay=0.0).step()
    assert norm > 1 and opt.metrics()["grad_norm"] == pytest.approx(norm.item(), rel=1e-6)
    for p, q in zip(ours.parameters(), theirs.parameters()):
        torch.testing.assert_close(p, q)


@pytest.mark.parametrize("dtype", LOW)
def test_masters_follow_float32_training_and_parameters_are_their_rounding(backend, dtype):
    low = network(dtype)
    wide = copy.deepcopy(low).float()
    opt, reference = adamw(low.parameters(), gamma=0.0, lr=1e-4), torch.optim.AdamW(
        wide.parameters(), lr=1e-4, weight_decay=0.0, foreach=False
    )  # fmt: skip
    for _ in range(20):
        for p, q in zip(low.parameters(), wide.parameters()):
            q.grad = torch.randn_like(q).to(dtype).float()
            p.grad = q.grad.to(dtype)
        opt.step()
        reference.step()
    for p, q in zip(low.parameters(), wide.parameters()):
        assert_equal_adamw(backend, opt.state[p]["master"], q.detach(), steps=20, lr=1e-4)
        assert torch.equal(p, opt.state[p]["master"].to(dtype))


@pytest.mark.parametrize("make", [sgd, adamw])
@pytest.mark.parametrize("dtype", [torch.float32, *LOW])
@pytest.mark.parametrize("way", ["step", "restore", "exception", "zero_grad", "nan in pass 1", "nan in pass 2"])
def test_parameters_come_back_bit_by_bit(backend, make, dtype, way):
    model, x = network(dtype), torch.randn(8, 16)
    opt = make(model.parameters(), lr=0.0, gamma=0.5, epsilon=0.5)
    loss_of(model, x).backward()
    if way == "nan in pass 1":
        next(model.parameters()).grad[0, 0] = math.nan
    before = [p.detach().clone() for p in model.parameters()]
    if way == "exception":
        with pytest.raises(KeyboardInterrupt):
            with opt.perturb():
                assert not all(map(torch.equal, model.parameters(), before))
                raise KeyboardInterrupt
    else:
        assert opt.perturb()
        assert all(map(torch.equal, model.parameters(), before)) == (way == "nan in pass 1")
        loss_of(model, x).backward()
        if way == "nan in pass 2":
            next(model.parameters()).grad[0, 0] = math.inf
        if way == "zero_grad":
            with pytest.warns(UserWarning, match="after step"):
                opt.zero_grad()
        elif way == "restore":
            opt.restore()
        else:
            opt.step()
    assert all(map(torch.equal, model.parameters(), before))
    assert opt.metrics()["gr/skipped_steps"] == way.startswith("nan")


class OutOfMemoryAt(TorchDispatchMode):
    """Raises once, at the n-th write into a tensor."""

    def __init__(self, n):
        super().__init__()
        self.left = n

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.left -= func is torch.ops.aten.copy_.default
        if self.left == 0:
            self.left = -1
            raise MemoryError
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("make", [sgd, adamw])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_perturbation_that_fails_half_way_leaves_the_parameters_as_they_were(make, dtype):
    params = [nn.Parameter(torch.randn(5).to(dtype)) for _ in range(3)]
    before = [p.detach().clone() for p in params]
    opt = make(params, gamma=0.5, epsilon=0.5)
    for p in params:
        p.grad = torch.ones_like(p)
    with (
        rf.use_backend("reference"),
        pytest.raises(MemoryError),
        OutOfMemoryAt(3 if make is adamw and dtype != torch.float32 else 2),
    ):
        opt.perturb()
    assert all(map(torch.equal, params, before)) and opt.state_dict()


@pytest.mark.parametrize("dtype", [torch.float32, *LOW])
@pytest.mark.parametrize("passes", [1, 2])
def test_a_step_that_is_not_finite_leaves_everything_as_it_was(backend, dtype, passes):
    model, x = network(dtype), torch.randn(8, 16)
    opt = adamw(model.parameters(), gamma=0.1, epsilon=0.1)
    one_step(opt, lambda: loss_of(model, x))
    before, state = copy.deepcopy(model.state_dict()), copy.deepcopy(opt.state_dict()["state"])
    loss_of(model, x if passes == 2 else x * math.inf).backward()
    opt.perturb()
    loss_of(model, x * math.nan if passes == 2 else x).backward()
    opt.step()
    opt.zero_grad()
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    for i, values in opt.state_dict()["state"].items():
        assert all(torch.equal(values[name], state[i][name]) for name in values)
    assert opt.metrics()["gr/skipped_steps"] == 1
    one_step(opt, lambda: loss_of(model, x))
    assert not all(torch.equal(before[name], value) for name, value in model.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.float32, *LOW])
def test_two_identical_runs_are_bitwise_equal_and_the_seed_matters(backend, dtype):
    def run(seed):
        torch.manual_seed(0)
        model = network(dtype)
        opt = adamw(model.parameters(), gamma=0.3, epsilon=0.1, seed=seed)
        for _ in range(5):
            x = torch.randn(8, 16)
            one_step(opt, lambda: loss_of(model, x))  # noqa: B023
        return torch.cat([p.detach().flatten() for p in model.parameters()])

    assert torch.equal(run(0), run(0))
    assert torch.equal(run(0), run(1)) == (dtype == torch.float32)


@pytest.mark.parametrize("dtype", LOW)
def test_stochastic_rounding_keeps_a_small_step_that_nearest_rounding_loses(backend, dtype):
    cosines, gains = {}, {}
    for rounding in ("stochastic", "nearest"):
        p = nn.Parameter((torch.randn(400_000) * 0.02).to(dtype))
        opt = adamw([p], gamma=1.0, epsilon=1.0, rounding=rounding, perturb_max_norm=1e9)
        p.grad = (torch.randn_like(p.float()) * (2e-6 if dtype == torch.bfloat16 else 2e-7)).to(dtype)
        opt.perturb()
        opt.restore()
        with pytest.warns(UserWarning, match="larger epsilon"):
            metrics = opt.metrics()
        cosines[rounding], gains[rounding] = metrics["gr/step_cos"], metrics["gr/step_gain"]
    assert gains["stochastic"] == pytest.approx(1, abs=0.1) and gains["nearest"] < 0.35
    assert cosines["stochastic"] > 0.05


@pytest.mark.parametrize("dtype", LOW)
def test_stochastic_rounding_uses_the_documented_counter(backend, dtype):
    """The weight at element offset o takes half o % 2 of word (o % 8) // 2 of Philox(o // 8), stream 0x10000."""
    first, second = (nn.Parameter(torch.randn(n).to(dtype)) for n in (13, 21))
    frozen = nn.Parameter(torch.randn(5).to(dtype), requires_grad=False)
    opt = adamw([first, frozen, second], gamma=1.0, epsilon=1.0, seed=77, perturb_max_norm=1e9)
    start = second.detach().float()
    first.grad, grad = torch.randn(13).to(dtype), torch.randn(21).to(dtype)
    second.grad = grad
    opt.perturb()
    bits = 16 if dtype == torch.bfloat16 else 13
    for i in range(21):
        offset = 13 + i
        words = noise.philox4x32(77, torch.tensor([offset // 8]), noise.STREAM_ROUNDING, 0)
        half = int(words[offset % 8 // 2]) >> (16 * (offset % 2)) & 0xFFFF
        exact = (start[i] + grad[i].float()).view(torch.int32).item()
        rounded = (exact + (half & ((1 << bits) - 1))) & -(1 << bits)
        assert second[i].float().view(torch.int32).item() == rounded


def test_a_warning_names_the_cures_and_float32_is_silent(backend, recwarn):
    p = nn.Parameter(torch.randn(1000) * 0.02)
    opt = adamw([p], gamma=1e-3, epsilon=1e-3)
    p.grad = torch.randn(1000)
    opt.perturb()
    opt.restore()
    assert opt.metrics()["gr/step_cos"] > 0.99 and not recwarn.list
    assert opt.metrics().keys() >= {"gr/step_gain", "gr/step_norm_ratio", "gr/frac_moved", "gr/g1_norm", "gr/epsilon"}


def test_step_metrics_are_measured_in_the_compute_dtype(backend):
    p = nn.Parameter(torch.randn(10_000) * 0.02)
    opt = adamw([p], gamma=1e-3, epsilon=1e-3, compute_dtype=torch.bfloat16)
    p.grad = torch.randn(10_000) * 1e-2
    opt.perturb()
    opt.restore()
    with pytest.warns(UserWarning, match="cosine"):
        assert opt.metrics()["gr/step_cos"] < 0.9


def test_only_groups_marked_perturb_move(backend):
    model, x = network(), torch.randn(8, 16)
    groups = rf.parameter_groups(model, perturb=r"^0\.weight$")
    opt = adamw(groups, gamma=0.1, epsilon=0.1)
    before = copy.deepcopy(model.state_dict())
    loss_of(model, x).backward()
    opt.perturb()
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {"0.weight"}


def test_parameter_groups_default_to_the_decoder_layers():
    from transformers import Qwen2Config, Qwen2ForCausalLM

    model = Qwen2ForCausalLM(
        Qwen2Config(vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
                    num_key_value_heads=2, tie_word_embeddings=False)
    )  # fmt: skip
    model.model.layers[0].mlp.up_proj.weight.requires_grad_(False)
    names = {p: name for name, p in model.named_parameters()}
    perturbed, others = rf.parameter_groups(model)
    assert all(".layers." in names[p] for p in perturbed["params"]) and perturbed["perturb"]
    assert {names[p] for p in others["params"]} == {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"}
    assert len(perturbed["params"]) + len(others["params"]) == len(names) - 1
    with pytest.raises(ValueError, match="matches none"):
        rf.parameter_groups(model, perturb="adapter")


def test_a_gradient_of_pass_1_that_is_not_finite_outside_the_perturbed_set_skips_the_step(backend):
    """At gamma = epsilon g1 itself is thrown away, so only this check can see it."""
    inside, outside = nn.Parameter(torch.randn(4)), nn.Parameter(torch.randn(4))
    opt = adamw([{"params": [inside]}, {"params": [outside], "perturb": False}], gamma=0.1, epsilon=0.1)
    before = inside.detach().clone(), outside.detach().clone()
    inside.grad, outside.grad = torch.ones(4), torch.tensor([1.0, math.nan, 1.0, 1.0])
    assert opt.perturb()
    inside.grad, outside.grad = torch.ones(4), torch.ones(4)
    opt.step()
    assert torch.equal(inside, before[0]) and torch.equal(outside, before[1])
    assert opt.metrics()["gr/skipped_steps"] == 1


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("gamma", [0.1, 0.3])
def test_parameters_outside_the_perturbed_set_take_the_combined_gradient_too(backend, keep, gamma):
    inside, outside = (nn.Parameter(torch.randn(4)) for _ in range(2))
    groups = [{"params": [inside]}, {"params": [outside], "perturb": False}]
    opt = sgd(groups, gamma=gamma, epsilon=0.1, keep_first_grad=keep)
    before = [p.detach().clone() for p in (inside, outside)]
    first, second = [torch.randn(2, 4) for _ in range(2)]
    for grads in (first, second):
        for p, g in zip((inside, outside), grads):
            p.grad = g.clone() if p.grad is None else p.grad + g
        if grads is first:
            assert opt.perturb() and torch.equal(outside, before[1])
    opt.step()
    for p, old, g1, g2 in zip((inside, outside), before, first, second):
        torch.testing.assert_close(old - p, (1 - gamma / 0.1) * g1 + gamma / 0.1 * g2)


@pytest.mark.parametrize("make", [sgd, adamw])
@pytest.mark.parametrize("dtype", [torch.float32, *LOW])
def test_a_parameter_without_a_gradient_in_pass_2_comes_back_too(backend, make, dtype):
    used, once = (nn.Parameter(torch.randn(64).to(dtype)) for _ in range(2))
    opt = make([used, once], gamma=0.5, epsilon=0.5)
    before = once.detach().clone()
    used.grad, once.grad = torch.ones_like(used), torch.ones_like(once)
    assert opt.perturb() and not torch.equal(once, before)
    used.grad = torch.ones_like(used)
    opt.step()
    assert torch.equal(once, before)


# Not (sgd, "freeze"): torch.optim.SGD steps a frozen parameter that has a .grad.
@pytest.mark.parametrize(("make", "leave"), [(sgd, "remove"), (adamw, "remove"), (adamw, "freeze")])
@pytest.mark.parametrize("dtype", [torch.float32, *LOW])
def test_a_parameter_that_leaves_the_optimizer_between_the_passes_comes_back_too(backend, make, dtype, leave):
    stays, leaves = (nn.Parameter(torch.randn(64).to(dtype)) for _ in range(2))
    opt = make([leaves, stays], gamma=0.5, epsilon=0.25, keep_first_grad=False)
    before = leaves.detach().clone()
    stays.grad, leaves.grad = torch.ones_like(stays), torch.ones_like(leaves)
    assert opt.perturb() and not torch.equal(leaves, before)
    assert leaves.grad is not None  # folded: it stays, and none comes from the second pass
    if leave == "freeze":
        leaves.requires_grad_(False)
    else:
        del opt.param_groups[0]["params"][0]
    stays.grad = stays.grad + 1
    opt.step()
    assert torch.equal(leaves, before)


@pytest.mark.parametrize("keep", [None, True])
def test_micro_batches_equal_one_batch(backend, keep):
    skip_float64(backend)
    x = torch.randn(8, 16)
    results = []
    for size in (8, 2):
        torch.manual_seed(1)
        model = network().double()
        opt = adamw(model.parameters(), gamma=0.3, epsilon=0.1, keep_first_grad=keep)

        def backward(model=model, size=size):
            for part in x.split(size):
                (loss_of(model, part) * size / 8).backward()

        backward()
        assert opt.perturb()
        backward()
        opt.step()
        results.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    torch.testing.assert_close(*results, rtol=1e-10, atol=1e-12)


def test_two_pass_repeats_dropout_and_keeps_the_first_passs_buffers(backend):
    def build():
        torch.manual_seed(3)
        return nn.Sequential(nn.Linear(16, 32), nn.BatchNorm1d(32), nn.Dropout(0.5), nn.Linear(32, 4))

    x, masks = torch.randn(8, 16), []
    model = build()
    model[2].register_forward_hook(lambda module, inputs, output: masks.append(output == 0))
    opt = adamw(model.parameters(), gamma=0.2, epsilon=0.2)

    def closure():
        loss = loss_of(model, x)
        loss.backward()
        return loss

    torch.manual_seed(9)
    loss = opt.two_pass(closure, model)
    after = torch.rand(3)
    assert len(masks) == 2 and torch.equal(*masks)

    single = build()
    torch.manual_seed(9)
    first = loss_of(single, x)
    assert torch.equal(first, loss)  # the first pass's
    assert torch.equal(torch.rand(3), after)  # the generator stands where one pass leaves it
    assert torch.equal(single[1].running_mean, model[1].running_mean) and model[1].num_batches_tracked == 1


def test_two_pass_restores_when_the_second_pass_fails(backend):
    model, calls = network(), []
    before = copy.deepcopy(model.state_dict())
    opt = adamw(model.parameters(), gamma=0.2, epsilon=0.2)

    def closure():
        calls.append(1)
        if len(calls) == 2:
            raise OSError("disk")
        loss = loss_of(model, torch.ones(2, 16))
        loss.backward()
        return loss

    with pytest.raises(OSError, match="disk"):
        opt.two_pass(closure)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_gamma_warms_up_and_every_k_steps_skips(backend):
    p = nn.Parameter(torch.randn(5))
    for options, expected in (
        ({"gamma_warmup_steps": 4}, [False, True, True, True]),
        ({"every_k_steps": 3}, [True, False, False, True]),
    ):
        opt = adamw([p], gamma=0.1, epsilon=0.1, **options)
        wanted = []
        for _ in expected:
            p.square().sum().backward()
            wanted.append(bool(opt.perturb()))
            if wanted[-1]:
                p.square().sum().backward()
            opt.step()
            opt.zero_grad()
        assert wanted == expected


def test_tied_unused_and_frozen_parameters(backend):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.unused = nn.Linear(4, 4, bias=False), nn.Linear(4, 4)
            self.frozen = nn.Linear(4, 4)
            self.b = nn.Linear(4, 4, bias=False)
            self.b.weight = self.a.weight
            self.frozen.requires_grad_(False)

    model = Model()
    opt = adamw(model.parameters(), gamma=0.2, epsilon=0.1)
    before = copy.deepcopy(model.state_dict())
    one_step(opt, lambda: model.b(model.frozen(model.a(torch.ones(2, 4)))).square().sum())
    moved = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert moved == {"a.weight", "b.weight"}


def test_loading_weights_after_a_step_refreshes_the_masters(backend):
    model, x = network(torch.bfloat16), torch.randn(8, 16)
    opt = adamw(model.parameters(), lr=1e-5, gamma=0.0)
    one_step(opt, lambda: loss_of(model, x))
    loaded = network(torch.bfloat16).state_dict()
    model.load_state_dict(loaded)
    one_step(opt, lambda: loss_of(model, x))
    for name, value in model.state_dict().items():
        assert (value.float() - loaded[name].float()).abs().max() < 0.01


@pytest.mark.parametrize("dtype", [torch.float32, *LOW])
def test_state_dict_round_trip_continues_bitwise(backend, dtype):
    def run(reload_at):
        torch.manual_seed(5)
        model = network(dtype)
        opt = adamw(model.parameters(), gamma=0.3, epsilon=0.1)
        for step in range(6):
            if step == reload_at:
                state = copy.deepcopy(opt.state_dict())
                opt = adamw(model.parameters(), gamma=0.3, epsilon=0.1)
                opt.load_state_dict(state)
                for p in model.parameters():
                    assert all(value.dtype == torch.float32 for value in opt.state[p].values())
            x = torch.randn(8, 16)
            one_step(opt, lambda: loss_of(model, x))  # noqa: B023
        return torch.cat([p.detach().flatten() for p in model.parameters()])

    assert torch.equal(run(None), run(3))


def test_states_are_exchanged_with_torch_adamw(backend):
    model, x = network(), torch.randn(8, 16)
    theirs = torch.optim.AdamW(model.parameters(), lr=1e-2)
    loss_of(model, x).backward()
    theirs.step()
    ours = adamw(model.parameters(), gamma=0.0)
    ours.load_state_dict(theirs.state_dict())
    p = next(model.parameters())
    assert torch.equal(ours.state[p]["exp_avg"], theirs.state[p]["exp_avg"]) and ours.state[p]["step"] == 1
    one_step(ours, lambda: loss_of(model, x))
    back = torch.optim.AdamW(model.parameters(), lr=1e-2)
    state = ours.state_dict()
    back.load_state_dict({key: state[key] for key in ("state", "param_groups")})
    assert torch.equal(back.state[p]["exp_avg_sq"], ours.state[p]["exp_avg_sq"]) and back.state[p]["step"] == 2
    wrong = ours.state_dict()
    wrong["state"][0]["exp_avg"] = torch.zeros(3)
    with pytest.raises(ValueError, match="exp_avg of parameter 0"):
        ours.load_state_dict(wrong)


def test_a_learning_rate_scheduler_drives_it(backend):
    p = nn.Parameter(torch.ones(3))
    opt = adamw([p], lr=0.1, gamma=0.0)
    scheduler = torch.optim.lr_scheduler.LambdaLR(opt, lambda step: 1 / (step + 1))
    one_step(opt, lambda: p.sum())
    scheduler.step()
    assert opt.param_groups[0]["lr"] == 0.05 and opt.optimizer.param_groups[0]["lr"] == 0.05


def test_misuse_names_the_verb_to_call(backend):
    p = nn.Parameter(torch.randn(4))

    def fresh(**options):
        p.grad = None
        opt = adamw([p], gamma=0.1, epsilon=0.1, **options)
        p.square().sum().backward()
        return opt

    opt = fresh()
    with pytest.raises(RuntimeError, match=r"perturb\(\)"):
        opt.step()
    opt.perturb()
    with pytest.raises(RuntimeError, match=r"step\(\) or restore\(\)"):
        opt.perturb()
    with pytest.raises(RuntimeError, match=r"backward\(\)"):
        opt.step()
    for verb in (opt.state_dict, lambda: opt.load_state_dict({}), lambda: opt.add_param_group({"params": [p]})):
        with pytest.raises(RuntimeError, match=r"step\(\) or restore\(\)"):
            verb()
    opt.restore()
    with pytest.raises(RuntimeError, match=r"backward\(\)"):
        opt.perturb()
    opt = fresh(keep_first_grad=False)
    opt.gamma = 0.2  # folding: .grad is not None, so the missing pass shows in its version only
    opt.perturb()
    with pytest.raises(RuntimeError, match="second pass"):
        opt.step()
    embedding = nn.Embedding(4, 2, sparse=True)
    opt = adamw(embedding.parameters())
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(ValueError, match="sparse"):
        opt.perturb()
    p.grad = None
    unperturbed = adamw([{"params": [p], "perturb": False}])
    p.square().sum().backward()
    with pytest.raises(RuntimeError, match="parameter_groups"):
        unperturbed.perturb()


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"gamma": -1.0}, "gamma"),
        ({"epsilon": 0.0}, "epsilon"),
        ({"epsilon": "large"}, "'auto', got 'large'"),
        ({"max_norm": 0.0}, "max_norm"),
        ({"perturb_max_norm": math.inf}, "perturb_max_norm"),
        ({"rounding": "up"}, "rounding"),
        ({"every_k_steps": 0}, "every_k_steps"),
        ({"gamma_warmup_steps": -1}, "gamma_warmup_steps"),
        ({"seed": -1}, "seed"),
        ({"lr": -1.0}, "lr"),
        ({"betas": (1.0, 0.9)}, "betas"),
    ],
)
def test_bad_settings_name_the_argument(options, name):
    with pytest.raises(ValueError, match=name):
        rf.RegularizedAdamW([nn.Parameter(torch.zeros(2))], **options)
    with pytest.raises(TypeError, match="optimizer"):
        rf.GradientRegularizer([nn.Parameter(torch.zeros(2))])


@pytest.mark.parametrize("make", [sgd, adamw])
@pytest.mark.parametrize(
    ("name", "value"),
    [("gamma", -1.0), ("epsilon", 0.0), ("max_norm", -1.0), ("max_norm", math.nan), ("rounding", "up")],
)
def test_an_option_set_between_steps_is_checked_as_in_the_constructor(make, name, value):
    opt = make([nn.Parameter(torch.zeros(2))])
    before = getattr(opt, name)
    with pytest.raises(ValueError, match=name):
        setattr(opt, name, value)
    assert getattr(opt, name) == before


@pytest.mark.parametrize(
    ("inner", "sentence"), [(adamw, "RegularizedAdamW, which makes the two passes"), (torch.optim.LBFGS, "LBFGS.step")]
)
def test_an_optimizer_that_makes_its_own_passes_is_refused(inner, sentence):
    with pytest.raises(TypeError, match=sentence):
        rf.GradientRegularizer(inner([nn.Parameter(torch.zeros(2))]))
