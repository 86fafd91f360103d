"""What only the Triton kernels can get wrong, in Triton's interpreter: shipped tiles, tables, alignment, mixed dtypes.

Runs where TRITON_INTERPRET is set before pytest starts; tests/backends/test_triton.py does that.
"""

import math

import pytest
import torch

import redit_fast as rf
from redit_fast.backends import reference, triton
from tests.backends.test_params import adamw_state, combined, perturbed, run_adamw, scalar, tensors

tokens = pytest.importorskip("redit_fast.kernels.token_loss")
launch = pytest.importorskip("redit_fast.kernels.launch")
refusal = triton.why_not("perturb", torch.device("cpu"))
pytestmark = pytest.mark.skipif(refusal is not None, reason=f"triton: {refusal}")

SIZES = [1023, 2056, 5]  # a tile is 1024 weights: less than one, two and a row, less than a row


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_shipped_tiles_have_the_bits_of_the_reference(dtype):
    params, grads = tensors(dtype, sizes=SIZES), tensors(dtype, 1e-2, SIZES)
    for offsets in ([0, 1024, 8], [3, 2**40 + 7, 2**33 - 1]):  # one Philox call a row, and two
        ours, sums = perturbed(triton, params, grads, offsets=offsets, factor=0.3)
        theirs, expected = perturbed(reference, params, grads, offsets=offsets, factor=0.3)
        assert all(map(torch.equal, ours, theirs)) and not torch.equal(ours[0], params[0])
        torch.testing.assert_close(sums, expected, rtol=2.4e-7, atol=0)
    ours, sums = combined(triton, params, grads)
    theirs, expected = combined(reference, params, grads)
    assert all(map(torch.equal, ours, theirs))
    torch.testing.assert_close(sums, expected, rtol=2.4e-7, atol=0)
    state = adamw_state(dtype, SIZES)
    assert_equal_states(run_adamw(triton, state), run_adamw(large_tile, state))


class large_tile:
    @staticmethod
    def adamw(*args):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("redit_fast.kernels.params.ROWS", 1024)
            triton.adamw(*args)


def assert_equal_states(ours, theirs):
    for x, y in zip(ours, theirs):
        assert all(a is b is None or torch.equal(a, b) for a, b in zip(x, y))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_adamw_step_has_the_bits_of_the_cpp_backend(dtype):
    """Both round every operation as IEEE says; torch does not."""
    cpu = pytest.importorskip("redit_fast.backends.cpu")
    if cpu.why_not("adamw", torch.device("cpu")):
        pytest.skip(f"cpu: {cpu.why_not('adamw', torch.device('cpu'))}")
    *state, _ = adamw_state(dtype, SIZES)
    state.append([torch.tensor(float(step)) for step in (0, 999, 100_000)])
    for beta1 in (0.9, 0.3, 0.0):
        assert_equal_states(run_adamw(triton, state, beta1=beta1), run_adamw(cpu, state, beta1=beta1))


def test_tensors_of_several_dtypes_and_alignments_are_one_pass():
    dtypes = [torch.float32, torch.bfloat16, torch.float16, torch.bfloat16]
    aside = [torch.cat([x.new_zeros(1), x])[1:] for x in tensors(torch.bfloat16, sizes=[1025])]
    params = [x.to(dtype) for x, dtype in zip(tensors(torch.float32, sizes=[9, 700, 1025, 8]), dtypes)] + aside
    grads = [(torch.randn(x.shape) * 1e-2).to(dtype) for x, dtype in zip(params, [*dtypes[1:], *dtypes[:2]])]
    assert any(x.data_ptr() % 16 for x in params)
    offsets = [0, 9, 709, 1734, 1742]
    ours, sums = [x.clone() for x in params[:4]] + [aside[0]], torch.zeros(4, dtype=torch.float64)
    theirs, expected = perturbed(reference, params, grads, offsets=offsets)
    triton.perturb(sums, ours, grads, offsets, scalar(0.37), 1, "stochastic", 2**64 - 9, torch.tensor(5), None)
    assert all(map(torch.equal, ours, theirs))
    torch.testing.assert_close(sums, expected, rtol=2.4e-7, atol=0)
    norm, exact = scalar(math.nan), scalar(math.nan)
    triton.squared_norm(norm, theirs)
    reference.squared_norm(exact, theirs)
    torch.testing.assert_close(norm, exact, rtol=2.4e-7, atol=0)


def test_repeats_have_the_same_bits_and_changed_numbers_are_seen():
    state = adamw_state(torch.bfloat16, SIZES)
    first, again = run_adamw(triton, state), run_adamw(triton, state)
    assert_equal_states(first, again)
    other = run_adamw(triton, state, beta1=0.5)
    assert not torch.equal(other[3][0], first[3][0])
    params, grads = tensors(torch.bfloat16, sizes=SIZES), tensors(torch.bfloat16, 1e-2, SIZES)
    runs = [perturbed(triton, params, grads, offsets=[0, 5, 9], factor=factor) for factor in (0.5, 0.5, 0.25)]
    assert all(map(torch.equal, runs[0][0], runs[1][0])) and torch.equal(runs[0][1], runs[1][1])
    assert not torch.equal(runs[0][0][3], runs[2][0][3])


def test_float64_is_refused_by_name():
    x = torch.ones(4, dtype=torch.float64)
    with pytest.raises(NotImplementedError, match="tensors of torch.float64: the triton backend has float32"):
        triton.squared_norm(scalar(0.0), [x])
    with pytest.raises(NotImplementedError, match="params of torch.float64"):
        triton.perturb(
            torch.zeros(4, dtype=torch.float64), [x], [x], [0], scalar(1.0), 1, "nearest", 0, scalar(0), None
        )
    assert torch.equal(x, torch.ones(4, dtype=torch.float64))


def both(rewards, **options):
    results = []
    for backend in ("triton", "reference"):
        with rf.use_backend(backend):
            results.append(rf.group_advantages(rewards, **options))
    return results


@pytest.mark.parametrize(
    ("scale", "combine"),
    [("group", "sum_then_normalize"), ("batch", "sum_then_normalize"), ("group", "normalize_then_sum")],
)
def test_groups_of_several_tiles_and_samples_of_several_lanes_have_the_bits_of_the_reference(scale, combine):
    """A tile is 32 groups and 64 samples at a time: 70 groups, one of them of 200 samples, at the counter's edges."""
    ids = torch.cat([torch.arange(70).repeat(3), torch.full((200,), 5)])[torch.randperm(410)]
    options = dict(group_ids=ids, scale=scale, combine=combine, step=2**32 - 1, reward_weights=[1, 0.3])
    options["sample_ids"] = torch.randint(-(2**63), 2**63 - 1, (410,))
    rewards = torch.randn(410, 2, dtype=torch.float64)
    for distribution in ("gaussian", "uniform"):
        ours, theirs = both(rewards, dither=rf.Dither(distribution, seed=2**64 - 3), **options)
        assert all(map(torch.equal, ours, theirs)) and ours.values.abs().max() > 1


@pytest.mark.parametrize("scale", ["group", "batch"])
def test_the_rounding_of_every_sum_is_the_references(scale):
    """Rewards of 0.1 with noise of 1e-14: the rounding of every sum reaches the advantages."""
    rewards = torch.full((300,), 0.1, dtype=torch.float64)
    ours, theirs = both(rewards, group_size=5, dither=rf.Dither(level=1e-14, seed=4), scale=scale, eps=0.0)
    assert all(map(torch.equal, ours, theirs)) and ours.values.abs().max() > 1


@pytest.mark.parametrize("combine", ["sum_then_normalize", "normalize_then_sum"])
def test_rewards_that_overflow_float64_give_what_the_reference_gives(combine):
    rewards = torch.tensor([[1e308, 1e308], [-1e308, -1e308], [1e308, -1e308], [1.0, 2.0]] * 2, dtype=torch.float64)
    rewards = torch.cat([rewards, torch.ones(4, 2, dtype=torch.float64)])
    rewards[8] = rewards[0]
    for settings in (None, rf.Dither(dead_groups="skip")):
        for weight in (1.0, 10.0):  # weight 10: inf - inf, NaN
            options = dict(dither=settings, combine=combine, reward_weights=weight)
            torch.testing.assert_close(*both(rewards, group_size=4, **options), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("softcap", [None, 20.0])
def test_a_row_has_the_same_bits_where_its_tiles_are_programs(dtype, softcap, monkeypatch):
    """Tiles of 256 logits, 4 a row; rows: plain, masked, without coefficient, repaired, of NaN, of a stray target."""
    monkeypatch.setattr("redit_fast.kernels.token_loss.TILE_BYTES", (256 * dtype.itemsize,))
    torch.manual_seed(1)
    logits, targets = 3 * torch.randn(8, 1000), torch.tensor([3, 255, 256, -100, 999, 7, 8, 1000])
    logits[4, 100], logits[5, 2] = 300.0, math.nan
    advantages, others = torch.randn(8).where(torch.arange(8) != 2, 0.0), torch.randn(3, 8) * 0.1 - 5
    config = rf.LossConfig(beta=0.1, correction="token_mask", softcap=softcap, temperature=0.7)

    def results(processors):
        monkeypatch.setattr("redit_fast.kernels.token_loss.processors", lambda device: processors)
        found = []
        for in_place in (False, True):
            x = logits.to(dtype).requires_grad_()
            y = x.clone()
            logp, entropy = rf.token_logp(y, targets, entropy="grad", softcap=softcap, inplace_backward=in_place)
            (logp * advantages + entropy * others[0]).sum().backward()
            found += [logp.detach(), entropy.detach(), x.grad]
            x = logits.to(dtype).requires_grad_()
            rows = dict(zip(("old_logp", "ref_logp", "sampling_logp"), others)) | {"config": config}
            out = rf.grpo_loss(x.clone(), targets, advantages, **rows, inplace=in_place, grad_scale=torch.tensor(8.0))
            (8 * out.loss).backward()
            found += [out.loss.detach(), out.logp, out.entropy, x.grad]
            found.append(rf.token_logp(logits.to(dtype), targets, softcap=softcap))
        return found

    with rf.use_backend("triton"):
        whole, split = results(3), results(100)
    for ours, theirs in zip(split, whole, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)
        assert tokens.parts_of(logits, 256) == 4
    assert (split[2][0] != 0).sum() > 900 and (split[6][0] != 0).sum() > 500 and split[2][5].isnan().all()


def test_a_cuda_graph_takes_a_table_from_before_it_or_writes_its_own(monkeypatch):
    cpu, numbers = torch.device("cpu"), (2**63 - 1, -7, 3)
    monkeypatch.setattr(launch, "_tables", {})
    own = launch._captured_table(numbers, cpu)
    assert own.tolist() == list(numbers) and own.dtype == torch.int64 and not launch._tables
    kept = launch.table(numbers, cpu)
    assert launch._captured_table(numbers, cpu) is kept and launch._in_graphs[-1] is kept
    assert launch._captured_table((1, 2), cpu) is not kept


def trained(backend):
    """Weights, advantages and losses after 3 steps with dithering and gradient regularisation of a toy model."""
    torch.manual_seed(3)
    model = torch.nn.Sequential(torch.nn.Embedding(130, 16), torch.nn.Linear(16, 16), torch.nn.Tanh())
    head = torch.nn.Parameter(torch.randn(130, 16) * 0.3)
    tokens, mask = torch.randint(130, (8, 5)), torch.rand(8, 4) > 0.2
    rewards = (torch.rand(3, 8) > 0.5).float()
    config = rf.LossConfig("dapo", beta=0.05, temperature=0.9)
    with rf.use_backend(backend):
        optimizer = rf.RegularizedAdamW([*model.parameters(), head], lr=1e-2, gamma=0.05, epsilon=0.05, max_norm=1.0)
        old = rf.linear_logp(model(tokens)[:, :-1], head, tokens[:, 1:], mask=mask, temperature=0.9).detach()
        losses = []
        for step in range(3):
            options = dict(group_size=4, dither=rf.Dither(seed=1), step=step)
            advantages = rf.group_advantages(rewards[step], **options).values

            def loss(advantages=advantages, old=old):
                hidden, targets = model(tokens)[:, :-1], tokens[:, 1:]
                kwargs = dict(old_logp=old, ref_logp=old, mask=mask, config=config)
                fused = rf.linear_grpo_loss(hidden, head, targets, advantages, **kwargs).loss
                return fused + rf.grpo_loss(hidden @ head.t(), targets, advantages, **kwargs).loss

            first = loss()
            first.backward()
            if optimizer.perturb():
                loss().backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(first.detach())
    return torch.cat([p.detach().flatten() for p in (*model.parameters(), head)]), torch.stack(losses)


def test_three_steps_of_training_end_where_the_reference_ends():
    (ours, losses), (theirs, expected) = trained("triton"), trained("reference")
    torch.testing.assert_close(losses, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)
    assert (losses[0] - losses[2]).abs() > 100 * (losses - expected).abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_product_is_added_in_float32(dtype):
    a, b, out = torch.randn(70, 33).to(dtype).t(), torch.randn(70, 50).to(dtype)[:, ::2], torch.randn(33, 25)
    expected = out.double() + a.double() @ b.double()
    triton.addmm(out, a, b)
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-4)
