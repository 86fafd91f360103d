"""Passes over 5 million parameters: pytest benchmarks/bench_params.py --benchmark-only -s

One step's norm, clip and AdamW, and one step's perturbation, in float32 and in bfloat16 with float32 masters. Every
timed state is checked against float64 or the reference after the clock stops. GB/s counts the bytes that the pass has
to move, so that a baseline which moves more shows a lower number.
"""

import pytest
import torch

from redit_fast import backends

COUNT = 5_000_000
LR, BETAS, EPS, DECAY, MAX_NORM = 1e-3, (0.9, 0.999), 1e-8, 0.1, 1.0
DTYPES = [torch.float32, torch.bfloat16]
BYTES = {torch.float32: {"step": 32, "perturb": 12}, torch.bfloat16: {"step": 30, "perturb": 6}}


def inputs(dtype):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(COUNT, generator=generator).to(dtype) for _ in range(2)]


def show(benchmark, name, dtype):
    seconds = benchmark.stats.stats.median
    benchmark.extra_info["GB/s"] = rate = COUNT * BYTES[dtype][name] / seconds / 1e9
    print(f"\n{benchmark.name}: {seconds * 1e3:.2f} ms, {rate:.1f} GB/s of {BYTES[dtype][name]} bytes a weight")


def module_of(backend):
    module = backends._backend(backend)
    refusal = module.why_not("adamw", torch.device("cpu"))
    if refusal:
        pytest.skip(f"{backend}: {refusal}")
    return module


def exact_weights(dtype, steps):
    """The same steps in float64."""
    weight, grad = (x.double() for x in inputs(dtype))
    grad = grad * min(1.0, MAX_NORM / (grad.norm().item() + 1e-6))
    weight.grad = grad
    opt = torch.optim.AdamW([weight], lr=LR, betas=BETAS, eps=EPS, weight_decay=DECAY, foreach=True)
    for _ in range(steps):
        opt.step()
    return weight


def check_step(dtype, weight, steps):
    expected = exact_weights(dtype, steps)
    assert (expected - inputs(dtype)[0].double()).abs().max() > 0.5 * LR * steps
    # ten roundings of the weight, and 1e-4 of the step where the gradient is near eps
    torch.testing.assert_close(weight.double(), expected, rtol=3e-6, atol=1e-4 * LR * steps)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", backends.NAMES)
def test_clipped_adamw(benchmark, backend, dtype):
    module, (p, g) = module_of(backend), inputs(dtype)
    master = p.float() if dtype != torch.float32 else None
    m, v, step = torch.zeros(COUNT), torch.zeros(COUNT), torch.zeros(())
    square = torch.zeros((), dtype=torch.float64)

    def run():
        module.squared_norm(square, [g])
        norm = square.sqrt()
        factor = (MAX_NORM / (norm + 1e-6)).clamp(max=1)
        module.adamw([p], [master], [g], [m], [v], [step], factor, torch.isfinite(norm), LR, *BETAS, EPS, DECAY)

    benchmark.pedantic(run, rounds=9, warmup_rounds=1)
    weight = p if master is None else master
    check_step(dtype, weight, int(step))
    assert torch.equal(p, weight.to(dtype))
    show(benchmark, "step", dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["fused", "foreach"])
def test_torch_clip_and_adamw(benchmark, kind, dtype):
    p, g = inputs(dtype)
    master = p.float()  # float32: the parameter itself
    opt = torch.optim.AdamW([master], lr=LR, betas=BETAS, eps=EPS, weight_decay=DECAY, **{kind: True})

    def run():
        master.grad = g.float() if dtype != torch.float32 else g.clone()  # clipping overwrites the gradient
        torch.nn.utils.clip_grad_norm_([master], MAX_NORM)
        opt.step()
        if dtype != torch.float32:
            p.copy_(master)

    benchmark.pedantic(run, rounds=9, warmup_rounds=1)
    check_step(dtype, master, 10)
    show(benchmark, "step", dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", backends.NAMES)
def test_perturb(benchmark, backend, dtype):
    module, (p, g) = module_of(backend), inputs(dtype)
    start, sums = p.clone(), torch.zeros(4, dtype=torch.float64)
    scale, step = torch.tensor(1e-3, dtype=torch.float64), torch.zeros((), dtype=torch.int64)

    def run():
        module.perturb(sums, [p], [g], [0], scale, "stochastic", 0, step, None)

    def restore():
        p.copy_(start)

    benchmark.pedantic(run, setup=restore, rounds=5, warmup_rounds=1)
    expected = start.clone()
    backends._backend("reference").perturb(
        torch.zeros(4, dtype=torch.float64), [expected], [g], [0], scale, "stochastic", 0, step, None
    )
    assert torch.equal(p, expected) and sums[3] > 0
    show(benchmark, "perturb", dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_torch_foreach_perturb(benchmark, dtype):
    """Nearest rounding and none of the four sums: less work."""
    p, g = inputs(dtype)
    start = p.clone()

    def restore():
        p.copy_(start)

    benchmark.pedantic(lambda: torch._foreach_add_([p], [g], alpha=1e-3), setup=restore, rounds=9)
    torch.testing.assert_close(p, start + 1e-3 * g)
    show(benchmark, "perturb", dtype)
