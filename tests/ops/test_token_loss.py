"""Log-probs and losses from logits, against float64 on the rounded inputs, on every backend."""

import math

import pytest
import torch

import redit_fast as rf
from tests.conftest import few
from tests.tolerance import assert_no_worse, relative, sliced

OPS = ("token_logp", "token_logp_grad", "token_loss", "scale_in_place")
# Vocabulary: degenerate, below / at / above a SIMD width, a prime, a real one with odd rows; rows: none, one, below a
# block, several blocks (a block holds at most 2**22 logits).
SHAPES = [(7, 1), (7, 2), (7, 3), (1, 31), (0, 31), (1000, 31), (7, 127), (1000, 127), (7, 1000), (1000, 1000),
          (1, 50257), (100, 50257), (3, 151936)]  # fmt: skip
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def transformed(logits, temperature=1.0, logit_scale=1.0, softcap=None):
    z = logits * logit_scale
    return (z if softcap is None else softcap * torch.tanh(z / softcap)) / temperature


def oracle(logits, targets, **transform):
    """logp and entropy in the dtype of `logits`, by log_softmax."""
    all_logp = torch.log_softmax(transformed(logits, **transform), -1)
    p = all_logp.exp()
    entropy = -(p * torch.where(p == 0, 0.0, all_logp)).sum(-1)
    return all_logp.gather(-1, targets[..., None]).squeeze(-1), entropy


def check_values(logits, targets, **transform):
    logp, entropy = rf.token_logp(logits, targets, entropy="metric", **transform)
    exact = oracle(logits.double(), targets, **transform)
    low = oracle(logits.float(), targets, **transform)
    if exact[0].numel() and exact[0].abs().max() > 1e-3:
        assert_no_worse(logp, low[0], exact[0], floor=1e-5)
    else:
        torch.testing.assert_close(logp.double(), exact[0], rtol=0, atol=1e-5)
    torch.testing.assert_close(entropy.double(), exact[1], rtol=0, atol=2e-5)
    assert (logp <= 0).all() and (entropy >= -2e-5).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "vocabulary"), SHAPES)
def test_logp_and_entropy_are_float32_exact(backend, rows, vocabulary, dtype):
    rows = few(backend, rows)
    check_values(sliced(rows, vocabulary, dtype=dtype, scale=4.0), torch.randint(vocabulary, (rows,)))


@pytest.mark.parametrize(
    "transform", [{"temperature": 0.6}, {"logit_scale": 0.25}, {"softcap": 5.0, "temperature": 1.7}]
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_scale_softcap_and_temperature_apply_in_this_order(backend, transform, dtype):
    rows = few(backend, 50)
    check_values(sliced(rows, 127, dtype=dtype, scale=6.0), torch.randint(127, (rows,)), **transform)


@pytest.mark.parametrize("shift", [-1e4, -80.0, 80.0, 1e4])
def test_a_common_shift_changes_nothing(backend, shift):
    rows = few(backend, 50)
    logits = (
        torch.randn(rows, 127) * 4 * 64
    ).round() / 64  # multiples of 2**-6 up to 2**14: exact in float32 when shifted
    targets = torch.randint(127, (rows,))
    for mode in ("metric", "grad"):
        plain, moved = (rf.token_logp(x, targets, entropy=mode) for x in (logits, logits + shift))
        assert torch.equal(plain.logp, moved.logp) and torch.equal(plain.entropy, moved.entropy)


@pytest.mark.parametrize("std", [0.1, 1.0, 10.0, 30.0, 100.0])
def test_peaked_rows_and_improbable_targets(backend, std):
    """At std 30 and more most rows have s_o > e^40 and take the repair."""
    quarter = few(backend, 50, 10)
    logits = torch.randn(4 * quarter, 1000) * std
    targets = torch.randint(1000, (4 * quarter,))
    targets[:quarter], targets[quarter : 2 * quarter] = (
        logits[:quarter].argmax(1),
        logits[quarter : 2 * quarter].argmin(1),
    )
    check_values(logits, targets)
    check_gradient(logits, targets)


def check_gradient(logits, targets, entropy_weight=0.3, **transform):
    upstream = torch.randn(targets.shape), entropy_weight * torch.randn(targets.shape)

    def gradient(logits, function):
        leaf = logits.detach().clone().requires_grad_()
        logp, entropy = function(leaf)
        (logp * upstream[0].to(logp.dtype) + entropy * upstream[1].to(logp.dtype)).sum().backward()
        return leaf.grad

    ours = gradient(logits, lambda x: rf.token_logp(x, targets, entropy="grad", **transform))
    low = gradient(logits, lambda x: oracle(x.float(), targets, **transform))
    exact = gradient(logits.double(), lambda x: oracle(x, targets, **transform))
    assert ours.dtype == logits.dtype
    # z_j - z_t of up to 40 carries two half-ulps of 2e-6, so a row short of the repair has p to 1e-5 relative.
    assert_no_worse(ours, low, exact, floor=1e-6 + 1e-5 * exact.abs().max().item())
    return ours


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(7, 2), (1, 31), (1000, 127), (40, 1000), (3, 50257)])
@pytest.mark.parametrize("transform", [{}, {"temperature": 0.6, "softcap": 10.0, "logit_scale": 0.5}])
def test_gradients_of_logp_and_entropy(backend, shape, dtype, transform):
    rows, vocabulary = few(backend, shape[0]), shape[1]
    check_gradient(sliced(rows, vocabulary, dtype=dtype, scale=3.0), torch.randint(vocabulary, (rows,)), **transform)


def test_confident_rows_keep_their_gradient(backend):
    """p_t = 1 - 1e-7: 1 - p_t cancels in float32, the anchored form keeps it to a percent."""
    logits = torch.zeros(8, 1000)
    logits[:, 3] = torch.linspace(10, 23, 8)
    leaf = logits.requires_grad_()
    rf.token_logp(leaf, torch.full((8,), 3)).sum().backward()
    exact = torch.autograd.functional.vjp(
        lambda x: oracle(x, torch.full((8,), 3))[0].sum(), logits.detach().double(), torch.ones(()).double()
    )[1]
    for row in range(8):
        assert relative(leaf.grad[row], exact[row]) < 0.01


@pytest.mark.parametrize("dtype", DTYPES)
def test_minus_infinity_logits_add_nothing(backend, dtype):
    rows = few(backend, 60)
    logits = torch.randn(rows, 31).to(dtype)
    blocked = torch.rand(rows, 31) < torch.linspace(0, 1, rows)[:, None]
    targets = torch.randint(31, (rows,))
    blocked[torch.arange(rows), targets] = False
    logits[blocked] = -math.inf
    check_values(logits, targets)
    assert torch.isfinite(check_gradient(logits, targets)).all()
    if dtype == torch.float16:
        check_values(torch.where(logits.isinf(), -65504.0, logits.sign() * 65504.0).to(dtype), targets)


def test_a_target_of_probability_zero_is_minus_infinity(backend):
    logits = torch.randn(3, 5)
    logits[1, 2] = -math.inf
    logp, entropy = rf.token_logp(logits, torch.tensor([2, 2, 2]), entropy="metric")
    assert logp[1] == -math.inf and torch.isfinite(logp[[0, 2]]).all() and torch.isfinite(entropy).all()


@pytest.mark.parametrize("vocabulary", [31, 50257])
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("at_target", [True, False])
def test_a_poisoned_row_is_nan_alone(backend, value, at_target, vocabulary):
    logits, targets = torch.randn(5, vocabulary), torch.randint(1, vocabulary, (5,))
    logits[2, targets[2] if at_target else 0] = value
    leaf = logits.requires_grad_()
    logp, entropy = rf.token_logp(leaf, targets, entropy="grad")
    (logp.sum() + entropy.sum()).backward()
    clean = torch.arange(5) != 2
    assert logp[2].isnan() and entropy[2].isnan() and leaf.grad[2].isnan().any()
    assert torch.isfinite(logp[clean]).all() and torch.isfinite(leaf.grad[clean]).all()


def test_ties_and_equal_logits(backend):
    logits = torch.full((4, 127), 2.5, requires_grad=True)
    logp, entropy = rf.token_logp(logits, torch.tensor([0, 5, 126, 126]), entropy="grad")
    torch.testing.assert_close(logp, torch.full((4,), -math.log(127)))
    torch.testing.assert_close(entropy, torch.full((4,), math.log(127)))
    entropy.sum().backward()
    assert logits.grad.abs().max() < 1e-6


def test_ignored_and_stray_targets(backend):
    logits = torch.randn(6, 31, requires_grad=True)
    targets = torch.tensor([3, -100, 31, -1, 2**40, 30])
    logp = rf.token_logp(logits, targets)
    logp.sum().backward()
    assert logp[1] == 0 and (logits.grad[1] == 0).all()
    assert logp[[2, 3, 4]].isnan().all() and logits.grad[[2, 3, 4]].isnan().any(1).all()
    assert torch.isfinite(logp[[0, 5]]).all() and torch.isfinite(logits.grad[[0, 5]]).all()
    with pytest.raises(ValueError, match=r"31 at position \(2,\)"):
        rf.token_logp(logits, targets, validate=True)
    with pytest.raises(ValueError, match=r"position \(1, 0\)"):
        rf.token_logp(torch.randn(2, 1, 31), torch.tensor([[1], [99]]), validate=True)


def test_masked_rows_are_never_read(backend):
    logits, targets = torch.randn(4, 9, 31), torch.randint(31, (4, 9))
    mask = torch.rand(4, 9) > 0.4
    clean = logits.clone().requires_grad_()
    expected = rf.token_logp(clean, targets, mask=mask, entropy="grad")
    (expected.logp.sum() + expected.entropy.sum()).backward()
    dirty = torch.where(mask[..., None], logits, math.nan).requires_grad_()
    wild = torch.where(mask, targets, torch.randint(-(2**60), 2**60, (4, 9)))
    out = rf.token_logp(dirty, wild, mask=mask, entropy="grad")
    (out.logp.sum() + out.entropy.sum()).backward()
    assert torch.equal(out.logp, expected.logp) and torch.equal(dirty.grad, clean.grad)
    assert (out.logp[~mask] == 0).all() and (dirty.grad[~mask] == 0).all() and (out.logp[mask] < 0).all()


@pytest.mark.parametrize("threads", [1, 2])
def test_a_row_has_the_same_bits_wherever_it_stands(backend, device, threads):
    """On a GPU a few rows' tiles are programs of their own, and among 300 a row is one program."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        count = 300 if device == "cuda" else few(backend, 70)
        for vocabulary in (31, 1000, 50257):
            logits = (torch.randn(count, vocabulary) * 4).requires_grad_()
            targets = torch.randint(vocabulary, (count,))
            logp, entropy = rf.token_logp(logits, targets, entropy="grad")
            (grad,) = torch.autograd.grad(logp.sum() + entropy.sum(), logits)
            for rows in (torch.tensor([0]), torch.tensor([count - 1]), torch.tensor([5, 4, 3]), torch.randperm(count)):
                part = logits[rows].detach().requires_grad_()
                some = rf.token_logp(part, targets[rows], entropy="grad")
                (some.logp.sum() + some.entropy.sum()).backward()
                assert torch.equal(some.logp, logp[rows]) and torch.equal(some.entropy, entropy[rows])
                assert torch.equal(part.grad, grad[rows])
    finally:
        torch.set_num_threads(before)


def views(scale=1):
    base = scale * torch.randn(2, 4, 80)
    yield "shifted", base[:, :-1]
    yield "every other column", base[..., ::2]
    yield "transposed", base[..., :16].transpose(0, 2)
    yield "expanded", base[:1].expand(2, -1, -1)
    yield "one batch row", base[1:2]
    wide = (scale * torch.randn(33, 2 * 1003)).to(torch.bfloat16)
    yield "every other of a prime", wide[:, 1::2]
    yield "column by column", wide[:, :1003].t().contiguous().t()


@pytest.mark.parametrize("loss", ["logp", "entropy", "grpo"])
@pytest.mark.parametrize("name", [name for name, _ in views()])
def test_any_strides(backend, name, loss):
    """With a cap and an entropy gradient the target's own logit is read again in the backward pass; every other target
    is so improbable that its row is repaired."""
    logits = dict(views(1 if loss == "logp" else 30))[name].detach()
    logits = logits[: few(backend, len(logits), 4)]
    targets = torch.randint(logits.shape[-1], logits.shape[:-1])
    targets.view(-1)[::2] = logits.detach().argmin(-1).reshape(-1)[::2]
    upstream = torch.randn(2, *targets.shape).transpose(-1, -2).contiguous().transpose(-1, -2)
    advantages = torch.randn(targets.shape)
    transform = {"softcap": 25.0, "temperature": 0.5}

    def run(x):
        leaf = x.detach().requires_grad_()
        if loss == "logp":
            rf.token_logp(leaf, targets).backward(upstream[0])
        elif loss == "entropy":
            found = rf.token_logp(leaf, targets, entropy="grad", **transform)
            torch.autograd.backward(tuple(found), tuple(upstream))
        else:
            rf.grpo_loss(leaf, targets, advantages, config=rf.LossConfig("dapo", **transform)).loss.backward()
        return leaf.grad

    expected = run(logits.clone(memory_format=torch.contiguous_format))
    assert expected.isfinite().all() and (expected != 0).flatten(0, -2).any(-1).all()
    torch.testing.assert_close(run(logits), expected, rtol=0, atol=0)


def test_70_000_rows(backend):
    """More than the blocks that any axis of a GPU's grid but the first takes."""
    rows = few(backend, 70_000, 70)
    logits, targets = sliced(rows, 64, dtype=torch.bfloat16, scale=3.0), torch.randint(64, (rows,))
    check_values(logits, targets)
    check_gradient(logits, targets)


@pytest.mark.parametrize("vocabulary", [50257, 151936])
def test_repeats_give_the_same_bits(backend, device, vocabulary):
    rows, repeats = (300, 49) if device == "cuda" else (3, 2)
    logits, targets = sliced(rows, vocabulary, dtype=torch.bfloat16, scale=3.0), torch.randint(vocabulary, (rows,))
    advantages = torch.randn(rows)

    def run():
        leaf = logits.detach().requires_grad_()
        out = rf.grpo_loss(leaf, targets, advantages, config=rf.LossConfig(), normalizer=1.0)
        out.loss.backward()
        return out.loss.detach(), out.logp, out.entropy, leaf.grad

    first = run()
    assert all((x != 0).any() for x in first)
    for _ in range(repeats):
        assert all(map(torch.equal, run(), first))


def test_upstream_gradients_of_every_kind(backend):
    logits, targets = torch.randn(12, 31, requires_grad=True), torch.randint(31, (12,))
    one_hot = torch.zeros(12)
    one_hot[4] = 1.0
    for upstream in (torch.randn(12), one_hot, torch.zeros(12), torch.ones(1).expand(12), torch.randn(24)[::2]):
        (ours,) = torch.autograd.grad(rf.token_logp(logits, targets), logits, upstream)
        (exact,) = torch.autograd.grad(oracle(logits.double(), targets)[0], logits, upstream.double())
        torch.testing.assert_close(ours, exact, rtol=1e-5, atol=1e-6)
    joined = torch.cat([rf.token_logp(logits, targets), torch.zeros(3)])
    torch.autograd.grad((joined * torch.arange(15)).sum(), logits)


def test_inputs_and_saved_tensors_stay_untouched_and_a_second_backward_is_right(backend):
    leaf = torch.randn(9, 31, requires_grad=True)
    logits, targets = leaf * 1.0, torch.randint(31, (9,))
    before = logits.detach().clone()
    logp = rf.token_logp(logits, targets)
    (first,) = torch.autograd.grad(logp.sum(), leaf, retain_graph=True)
    (second,) = torch.autograd.grad(logp.sum() * 2, leaf)
    assert torch.equal(logits, before) and torch.equal(second, 2 * first)


def test_inplace_backward_writes_the_gradient_over_the_logits_and_a_second_backward_raises(backend):
    leaf = torch.randn(9, 31, requires_grad=True)
    logits, targets = leaf * 1.0, torch.randint(31, (9,))
    expected = torch.autograd.grad(rf.token_logp(logits, targets).sum(), logits, retain_graph=True)[0]
    logp = rf.token_logp(logits, targets, inplace_backward=True)
    torch.autograd.grad(logp.sum(), leaf, retain_graph=True)
    assert torch.equal(logits, expected)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(logp.sum(), leaf)


def test_create_graph_raises_naming_gradient_regularisation():
    logits = torch.randn(3, 5, requires_grad=True)
    targets, config = torch.tensor([0, 1, 2]), rf.LossConfig()
    for loss in (
        rf.token_logp(logits, targets).sum(),
        rf.grpo_loss(logits, targets, torch.ones(3), config=config).loss,
        rf.linear_logp(logits, torch.randn(7, 5), targets).sum(),
        rf.linear_grpo_loss(logits, torch.randn(7, 5), targets, torch.ones(3), config=config).loss,
    ):
        with pytest.raises(RuntimeError, match=r"\(GR\)"):
            torch.autograd.grad(loss, logits, create_graph=True)


LOSSES = {
    "dapo": rf.LossConfig("dapo", epsilon_high=0.28, temperature=0.8),
    "dapo-delta": rf.LossConfig("dapo", delta=1.3, epsilon_low=0.1),
    "bnpo-dual-clip": rf.LossConfig("bnpo", dual_clip=1.2, epsilon_high=0.1),
    "grpo-kl": rf.LossConfig("grpo", beta=0.1, kl_ratio_correction=True, softcap=8.0),
    "grpo-k1": rf.LossConfig("grpo", beta=0.1, kl="k1"),
    "dr_grpo-k2": rf.LossConfig("dr_grpo", max_completion_length=50, beta=0.1, kl="k2"),
    "luspo-abs": rf.LossConfig("luspo", beta=0.1, kl="abs", kl_ratio_correction=True),
    "cispo": rf.LossConfig("cispo", epsilon_high=1.1),
    "sapo-mask": rf.LossConfig(
        "sapo", sapo_temperature_pos=2.0, correction="token_mask", correction_floor=0.7, correction_cap=1.3
    ),
    "reinforce-truncate": rf.LossConfig("reinforce", correction="token_truncate", correction_cap=1.1, beta=0.1),
    "dppo_tv": rf.LossConfig("dppo_tv", epsilon_low=0.01),
    "dppo_kl": rf.LossConfig("dppo_kl", epsilon_low=0.003),
    "dro": rf.LossConfig("dro", dro_beta=0.5, correction="token_truncate", correction_cap=1.2, correction_floor=0.9),
    "gspo": rf.LossConfig("gspo", epsilon_low=0.05, epsilon_high=0.05),
    "entropy": rf.LossConfig("bnpo", entropy_coef=0.1),
}


def loss_batch(config, rows, vocabulary, dtype):
    logits = sliced(4, rows, vocabulary, dtype=dtype, scale=3.0)
    targets, mask = torch.randint(vocabulary, (4, rows)), torch.rand(4, rows) > 0.2
    logp = oracle(logits.double(), targets, **config.transform._asdict())[0]
    old, ref, sampling = (
        (logp + 0.2 * torch.randn(4, rows).double()).float(),
        (logp - 0.1).float(),
        (logp + 0.1).float(),
    )
    sampling[:, 0] = math.nan  # unknown to the sampler
    kwargs = dict(old_logp=old, ref_logp=ref, sampling_logp=sampling, mask=mask, config=config)
    return logits, targets, torch.randn(4), kwargs


def exact_loss(logits, targets, advantages, dtype, **kwargs):
    leaf = logits.detach().to(dtype).requires_grad_()
    logp, entropy = oracle(leaf, targets, **kwargs["config"].transform._asdict())
    out = rf.policy_loss(logp, advantages, entropy=entropy, **kwargs)
    out.loss.backward()
    return out, leaf.grad


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocabulary", [31, 1000])
@pytest.mark.parametrize("name", LOSSES)
def test_grpo_loss_is_policy_loss_of_the_log_probs(backend, name, vocabulary, dtype):
    config = LOSSES[name]
    logits, targets, advantages, kwargs = loss_batch(config, few(backend, 60, 8), vocabulary, dtype)
    exact, exact_grad = exact_loss(logits, targets, advantages, torch.float64, **kwargs)
    _, low_grad = exact_loss(logits, targets, advantages, torch.float32, **kwargs)
    leaf = logits.clone().requires_grad_()
    out = rf.grpo_loss(leaf, targets, advantages, **kwargs)
    out.loss.backward()
    assert out.route == ("logp" if name in ("gspo", "entropy") else "fused")
    assert out.loss.item() == pytest.approx(exact.loss.item(), rel=1e-4, abs=1e-6)
    assert_no_worse(leaf.grad, low_grad.to(dtype), exact_grad, floor=1e-4 * exact_grad.abs().max().item())
    assert not out.logp.requires_grad and not out.entropy.requires_grad
    torch.testing.assert_close(out.logp[kwargs["mask"]], exact.logp.detach().float()[kwargs["mask"]], rtol=0, atol=2e-5)
    for key in exact.metrics:
        torch.testing.assert_close(out.metrics[key], exact.metrics[key], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("config", "advantage", "share"),  # share of -A, the gradient of an unclipped token
    [
        (rf.LossConfig(epsilon_low=0.0), -1.0, 1.0),  # r = 1 is the lower edge: the limit passes at its bounds
        (rf.LossConfig(epsilon_low=0.2, epsilon_high=0.0), 1.0, 1.0),
        (rf.LossConfig(epsilon_low=0.0, epsilon_high=0.0), 1.0, 1.0),
        (rf.LossConfig(delta=1.0, epsilon_low=0.5, epsilon_high=0.0), -1.0, 1.0),
        (rf.LossConfig(delta=0.9), -1.0, 1.0),  # the unclipped branch is bounded, the clipped one is larger
        (rf.LossConfig(delta=0.9), 1.0, 0.0),
        (rf.LossConfig("cispo", cispo_bound="relative", epsilon_low=0.0), -1.0, 1.0),
        (rf.LossConfig("dppo_tv", epsilon_low=0.0), -1.0, 1.0),
        (rf.LossConfig("dppo_kl", epsilon_low=0.0, epsilon_high=0.0), 1.0, 1.0),
        (rf.LossConfig("sapo"), 1.0, 1.0),
        (rf.LossConfig("dro", dro_beta=1.0), 1.0, 1.0),
        (rf.LossConfig("gpg"), -1.0, 1.0),
        (rf.LossConfig(beta=0.5, kl="abs"), 1.0, 1.0),  # |d| has slope 0 at d = 0
        (rf.LossConfig(correction="token_mask", correction_floor=1.0), 1.0, 1.0),  # both bounds of a mask are inside
        (rf.LossConfig(correction="token_mask", correction_cap=1.0), 1.0, 1.0),
        (rf.LossConfig(correction="token_mask", correction_floor=1.1), 1.0, 0.0),
        (rf.LossConfig(correction="token_truncate", correction_cap=0.5), 1.0, 0.5),
    ],
)
@pytest.mark.parametrize("old", ["none", "equal"])
def test_ties_follow_the_documented_subgradient_exactly(backend, config, advantage, share, old):
    """Two equal logits: log-probs of exactly -log 2, so that the policies can be equal to the last bit."""
    logits, targets = torch.zeros(1, 2, requires_grad=True), torch.tensor([0])
    logp = rf.token_logp(logits, targets).detach()
    out = rf.grpo_loss(
        logits, targets, torch.tensor([advantage]), config=config, ref_logp=logp, sampling_logp=logp,
        old_logp=logp if old == "equal" else None,
    )  # fmt: skip
    out.loss.backward()
    assert out.route == "fused" and torch.equal(logits.grad, -advantage * share * torch.tensor([[0.5, -0.5]]))


@pytest.mark.parametrize(("nearby", "share"), [(1 - 1e-6, 0.0), (1.0, 0.5), (1 + 1e-6, 1.0)])
def test_at_the_dual_clip_half_of_the_gradient_passes(backend, nearby, share):
    """The loss is r for A = -1, its bound dual_clip. In float32 -log 2 - 0.25 is exact, and so r = exp(0.25)."""
    logits, targets = torch.zeros(1, 2, requires_grad=True), torch.tensor([0])
    ratio = torch.tensor(0.25).exp().item()
    old = rf.token_logp(logits, targets).detach() - 0.25
    config = rf.LossConfig(dual_clip=ratio * nearby)
    rf.grpo_loss(logits, targets, -torch.ones(1), old_logp=old, config=config).loss.backward()
    torch.testing.assert_close(logits.grad, share * ratio * torch.tensor([[0.5, -0.5]]))


@pytest.mark.parametrize("name", [name for name in LOSSES if not LOSSES[name].entropy_coef])
def test_micro_batches_of_the_fused_loss_add_up(backend, name):
    config = LOSSES[name]
    logits, targets, advantages, kwargs = loss_batch(config, few(backend, 16, 6), 31, torch.float32)
    normalizer = {"tokens": kwargs["mask"].sum(), "sequences": 4, "length": 4 * 50}[config.denominator]

    def gradient(parts):
        leaf = logits.clone().requires_grad_()
        for rows in parts:
            mine = {key: value if key == "config" else value[rows] for key, value in kwargs.items()}
            rf.grpo_loss(leaf[rows], targets[rows], advantages[rows], normalizer=normalizer, **mine).loss.backward()
        return leaf.grad

    whole = gradient([torch.arange(4)])
    assert whole.abs().max() > 1e-3
    for parts in (torch.arange(4).split(1), torch.tensor([2, 0, 3, 1]).split(2)):
        torch.testing.assert_close(gradient(parts), whole, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("name", LOSSES)
def test_grpo_loss_in_place_and_with_a_known_upstream_gradient(backend, name):
    config = LOSSES[name]
    logits, targets, advantages, kwargs = loss_batch(config, few(backend, 20, 6), 127, torch.float32)
    leaf = logits.clone().requires_grad_()
    plain = rf.grpo_loss(leaf, targets, advantages, **kwargs)
    (plain.loss * 1024).backward()
    scaled = logits.clone().requires_grad_()
    inner = scaled * 1.0
    scale = torch.tensor(1024.0)
    out = rf.grpo_loss(inner, targets, advantages, inplace=True, grad_scale=scale, **kwargs)
    assert torch.equal(out.loss, plain.loss)
    (out.loss * scale).backward()
    torch.testing.assert_close(scaled.grad, leaf.grad)
    assert not torch.equal(inner, scaled)  # overwritten, as asked


def test_a_second_backward_through_the_fused_loss_raises(backend):
    logits = torch.randn(5, 31, requires_grad=True)
    out = rf.grpo_loss(logits, torch.randint(31, (5,)), torch.ones(1), config=rf.LossConfig())
    out.loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="compute the loss again"):
        out.loss.backward()


@pytest.mark.parametrize("name", LOSSES)
def test_a_fully_masked_batch_gives_zero_loss_and_zero_gradients(backend, name):
    logits, targets, advantages, kwargs = loss_batch(LOSSES[name], 5, 31, torch.float32)
    kwargs["mask"] = torch.zeros_like(kwargs["mask"])
    for normalizer in (None, kwargs["mask"].sum(), math.nan):
        leaf = torch.full_like(logits, math.nan).requires_grad_()
        out = rf.grpo_loss(leaf, targets, advantages, normalizer=normalizer, **kwargs)
        out.loss.backward()
        assert out.loss == 0 and (leaf.grad == 0).all() and all(torch.isfinite(v) for v in out.metrics.values())


def test_no_grad_computes_no_gradient(backend):
    logits = torch.randn(5, 31, requires_grad=True)
    with torch.no_grad():
        out = rf.grpo_loss(logits, torch.randint(31, (5,)), torch.ones(1), config=rf.LossConfig())
    assert not out.loss.requires_grad and torch.isfinite(out.loss)


def test_bad_arguments_name_themselves():
    logits, targets = torch.randn(4, 31), torch.randint(31, (4,))
    for args, kwargs, name in [
        ((logits.double(), targets), {}, "logits"),
        ((logits, targets.float()), {}, "targets"),
        ((logits, targets[:3]), {}, "targets"),
        ((logits, targets), {"mask": torch.ones(3)}, "mask"),
        ((logits, targets), {"temperature": 0.0}, "temperature"),
        ((logits, targets), {"softcap": -1.0}, "softcap"),
        ((logits, targets), {"entropy": "yes"}, "entropy"),
    ]:
        with pytest.raises((ValueError, TypeError), match=name) as caught:
            rf.token_logp(*args, **kwargs)
        assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="grad_scale"):
        rf.grpo_loss(logits, targets, torch.ones(1), config=rf.LossConfig(), grad_scale=torch.ones(2))


def test_the_tolerance_rejects_an_all_zero_output():
    exact = torch.randn(100).double()
    with pytest.raises(AssertionError, match="largest error"):
        assert_no_worse(torch.zeros(100), exact.float(), exact, floor=1e-6)
    with pytest.raises(AssertionError, match="zeros would pass"):
        assert_no_worse(exact, exact, exact, floor=10.0)
