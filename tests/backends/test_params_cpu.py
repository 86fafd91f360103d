"""What only the compiled parameter passes can get wrong: threads and instruction sets."""

import math

import pytest
import torch

import redit_fast as rf
from redit_fast.backends import cpu, reference
from tests.backends.test_params import (
    DTYPES,
    SUM_ROUNDING,
    adamw_state,
    combined,
    perturbed,
    run_adamw,
    scalar,
    tensors,
)

refusal = cpu.why_not("perturb", torch.device("cpu"))
pytestmark = pytest.mark.skipif(refusal is not None, reason=f"cpu: {refusal}")


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def every_pass(params, grads, state, **options):
    """Everything that the passes write."""
    norm = scalar(0.0)
    cpu.squared_norm(norm, params)
    moved, sums = perturbed(cpu, params, grads, factor=0.3, **options)
    both, gaps = combined(cpu, params, grads)
    return [norm, sums, *moved, gaps, *both, *(x for row in run_adamw(cpu, state) for x in row if x is not None)]


@pytest.mark.parametrize("dtype", DTYPES)
def test_fifty_repeats_on_one_to_four_threads_give_the_same_bits(threads, dtype):
    sizes = [1025, 65_537, 140_003]  # 1, 2 and 3 chunks: as many as there are threads, and more
    inputs = tensors(dtype, sizes=sizes), tensors(dtype, 1e-2, sizes), adamw_state(dtype, sizes)
    first = every_pass(*inputs, offsets=[3, 2**33, 8])
    assert not any(map(torch.equal, first[2:5], inputs[0])) and first[1].min() > 0
    for count in (1, 2, 3, 4):
        threads(count)
        for _ in range(50):
            assert all(map(torch.equal, every_pass(*inputs, offsets=[3, 2**33, 8]), first))


@pytest.mark.parametrize("compute_dtype", [None, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rounding", ["stochastic", "nearest"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_instruction_set_gives_the_same_bits(dtype, rounding, compute_dtype):
    params, grads, state = tensors(dtype), tensors(dtype, 1e-2), adamw_state(dtype)
    for p, value in zip(params[3:], (math.nan, math.inf, -math.inf, 1e-7, 1e-40)):  # 1e-7: subnormal in float16
        p[::5] = value
    results = []
    for name in cpu.instruction_sets():
        with cpu.use_instruction_set(name):
            results.append(every_pass(params, grads, state, rounding=rounding, compute_dtype=compute_dtype))
            # without infinities, for sums that are numbers
            results[-1] += perturbed(cpu, params[6:], grads[6:], offsets=[5, 3], rounding=rounding)[1]
    assert results[0][-4:] and all(x.isfinite() and x > 0 for x in results[0][-4:])
    for other in results[1:]:
        for x, y in zip(other, results[0]):
            torch.testing.assert_close(x, y, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [1e-37, 1e-24, 1e22, 1e30])
def test_sums_of_squares_outside_of_float32s_range_are_right(dtype, size):
    """Blocks of 1024 with ordinary numbers beside blocks whose squares float32 has not."""
    params = tensors(dtype, size, [3000])
    grads = [g * torch.where(torch.arange(3000) < 1024, 1, size).to(dtype) for g in tensors(dtype, 1e-2, [3000])]
    for firsts, seconds in ((params, grads), ([grads[0][1024:]], [params[0][1024:]])):
        norm = scalar(0.0)
        cpu.squared_norm(norm, firsts)
        assert norm == pytest.approx(firsts[0].double().square().sum().item(), rel=SUM_ROUNDING) and norm > 0
        moved, expected_moved = (perturbed(module, firsts, seconds, offsets=[0])[1] for module in (cpu, reference))
        both, expected_both = (combined(module, firsts, seconds)[1] for module in (cpu, reference))
        for ours, theirs in ((moved, expected_moved), (both, expected_both)):
            assert theirs.min() > 0
            torch.testing.assert_close(ours, theirs, rtol=SUM_ROUNDING, atol=0)


def test_an_instruction_set_that_the_processor_lacks_is_refused():
    with pytest.raises(ValueError, match="name must be an instruction set of this processor, one of baseline"):
        with cpu.use_instruction_set("sve"):
            pass


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_adamw_writes_the_copy_so_that_only_a_parameter_changed_by_others_is_copied_again(monkeypatch, dtype):
    changed, left = (torch.nn.Parameter(torch.randn(50, dtype=dtype)) for _ in range(2))
    opt = rf.RegularizedAdamW([changed, left], gamma=0.5, epsilon=0.5)
    copied, copy = [], torch._foreach_copy_
    monkeypatch.setattr(torch, "_foreach_copy_", lambda to, of: copied.append(list(of)) or copy(to, of))

    def step(gamma=0.5):
        opt.gamma = gamma
        for p in (changed, left):
            p.grad = torch.ones_like(p)
        before = [p.detach().clone() for p in (changed, left)]
        if opt.perturb():
            assert not torch.equal(changed, before[0]) and not torch.equal(left, before[1])
            for p in (changed, left):
                p.grad = torch.ones_like(p)
        opt.step()
        for p, old in zip((changed, left), before):
            assert 0 < (p - old).abs().max() < 0.01  # a step of lr 1e-3 from where it was, the perturbation undone
        return [[id(p) for p in params] for params in copied]

    first = step()
    assert first == step() == [[id(changed), id(left)]]
    with torch.no_grad():
        changed.add_(1)
    assert step() == [*first, [id(changed)]]
    step(gamma=0.0)
    assert step()[2:] == first  # a step without perturbation moved both
