"""The head from hidden states: log-probs and GRPO losses against float64 on the rounded inputs, on every backend."""

from itertools import product
from typing import get_args

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import redit_fast as rf
from redit_fast.losses.config import LossType
from tests.conftest import few
from tests.losses.test_loss_config import REQUIRED
from tests.ops.test_token_loss import LOSSES, oracle
from tests.tolerance import assert_gradient_no_worse, assert_no_worse, relative, sliced

OPS = ("exp_product", "scale_in_place")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# rows: none, one, below / at / above the padding of 16, several chunks; vocabulary: one, below / above a tile of 4096.
SHAPES = [
    (0, 31, 8),
    (1, 1, 8),
    (7, 2, 8),
    (15, 127, 24),
    (16, 1000, 24),
    (17, 4095, 16),
    (40, 4097, 16),
    (5, 50257, 8),
]


def head(rows, vocabulary, width, dtype, scale=1.0):
    hidden = sliced(rows, width, dtype=dtype)
    weight = sliced(vocabulary, width, dtype=dtype, scale=scale)
    bias = sliced(vocabulary, dtype=dtype)
    return hidden, weight, bias, torch.randint(vocabulary, (rows,))


def sequences(rows):
    """Four, the second empty."""
    return torch.tensor([0, rows // 3, rows // 3, 2 * rows // 3 + 1, rows])


def head_oracle(hidden, weight, bias, targets, **transform):
    """logp and entropy in the dtype of the inputs."""
    z = hidden @ weight.t() + (0 if bias is None else bias)
    return oracle(z, targets, **transform)


def exact_logp(hidden, weight, bias, targets, **transform):
    bias = None if bias is None else bias.double()
    return head_oracle(hidden.double(), weight.double(), bias, targets, **transform)


def leaves(*tensors):
    """With the strides of `tensors`: a clone of a slice is none."""
    return [tensor.detach().requires_grad_() for tensor in tensors]


def oracle_gradients(loss, *inputs):
    """For each of `inputs` its gradient of `loss(*inputs)` in float64 and in float32, on the rounded inputs."""
    found = []
    for dtype in (torch.float64, torch.float32):
        wide = leaves(*(x.to(dtype) for x in inputs))
        loss(*wide).backward()
        found.append([x.grad for x in wide])
    return list(zip(*found, strict=True))


# Relative Frobenius limits of spec section 3 for bfloat16's gradients of hidden, weight and bias as they are stored. It
# keeps E in bfloat16, so that against float32 PyTorch, rounded once, these err 1.9, 2.2 and 1.5 times as much: 3.2e-3,
# 3.6e-3 and 2.7e-3, to 1.8e-3 each. PyTorch with its logits in bfloat16 has 6e-3. Other dtypes hold the rule.
BFLOAT16_LIMITS = (3e-3, 4e-3, 4e-3)


def assert_right(grad, exact_and_low, kind):
    """The rule for a stored gradient of hidden, weight or bias, `kind` 0, 1 or 2."""
    exact, low = exact_and_low
    if grad.dtype == torch.bfloat16:
        assert relative(grad, exact) < BFLOAT16_LIMITS[kind]
    else:
        assert_gradient_no_worse(grad, low, exact)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "vocabulary", "width"), SHAPES)
@pytest.mark.parametrize("transform", [{}, {"temperature": 0.7, "logit_scale": 0.5, "softcap": 9.0}])
def test_linear_logp_is_float32_exact(backend, rows, vocabulary, width, dtype, transform):
    hidden, weight, bias, targets = head(rows, vocabulary, width, dtype)
    logp, entropy = rf.linear_logp(hidden, weight, targets, bias=bias, entropy="metric", chunk_rows=16, **transform)
    exact, exact_entropy = exact_logp(hidden, weight, bias, targets, **transform)
    low, low_entropy = head_oracle(hidden.float(), weight.float(), bias.float(), targets, **transform)
    if vocabulary == 1 or rows == 0:
        assert (logp == 0).all() and (entropy == 0).all()
        return
    assert_no_worse(logp, low, exact, floor=1e-5)
    assert_no_worse(entropy, low_entropy, exact_entropy, floor=2e-5)


@pytest.mark.parametrize("scale", [0.1, 3.0, 30.0])
def test_improbable_targets_take_the_repair(backend, scale):
    hidden, weight, bias, targets = head(64, 500, 16, torch.float32, scale)
    z = hidden @ weight.t() + bias
    targets[:20], targets[20:40] = z[:20].argmin(1), z[20:40].argmax(1)
    logp = rf.linear_logp(hidden, weight, targets, bias=bias)
    exact, _ = exact_logp(hidden, weight, bias, targets)
    assert_no_worse(logp, oracle(z, targets)[0], exact, floor=1e-5)
    if scale == 30:
        assert (exact < -40).any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("needs", [n for n in product([True, False], repeat=3) if any(n)])
@pytest.mark.parametrize("entropy", ["none", "grad"])
def test_gradients_of_linear_logp_for_every_subset_of_inputs(backend, dtype, needs, entropy):
    rows = few(backend, 50, 20)
    inputs = head(rows, few(backend, 4200, 1100), 24, dtype, 0.3)
    targets, g, h = inputs[3], torch.randn(rows), torch.randn(rows)
    ours = [x.clone().requires_grad_(need) for x, need in zip(inputs[:3], needs)]
    transform = {"temperature": 0.8, "softcap": 12.0}
    out = rf.linear_logp(ours[0], ours[1], targets, bias=ours[2], entropy=entropy, chunk_rows=32, **transform)
    loss = (out * g).sum() if entropy == "none" else (out.logp * g + out.entropy * h).sum()
    loss.backward()

    def oracle_loss(*inputs):
        true = head_oracle(*inputs, targets, **transform)
        return (true[0] * g).sum() + (0 if entropy == "none" else (true[1] * h).sum())

    for kind, (x, right, need) in enumerate(zip(ours, oracle_gradients(oracle_loss, *inputs[:3]), needs)):
        assert (x.grad is not None) == need
        if need:
            assert x.grad.dtype == dtype
            assert_right(x.grad, right, kind)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", LOSSES)
def test_linear_grpo_loss_is_policy_loss_of_the_log_probs(backend, name, dtype):
    config = LOSSES[name]
    rows = few(backend, 90, 36)
    hidden, weight, bias, targets = head(rows, few(backend, 4200, 1100), 24, dtype, 0.3)
    mask, advantages = torch.rand(rows) > 0.2, torch.randn(4)
    logp, entropy = exact_logp(hidden, weight, bias, targets, **config.transform._asdict())
    old, ref, sampling = (logp + 0.2 * torch.randn(rows).double()).float(), (logp - 0.1).float(), (logp + 0.1).float()
    kwargs = dict(old_logp=old, ref_logp=ref, sampling_logp=sampling, mask=mask,
                  cu_seqlens=sequences(rows), config=config)  # fmt: skip

    def oracle_loss(*inputs):
        logp, entropy = head_oracle(*inputs, targets, **config.transform._asdict())
        return rf.policy_loss(logp, advantages, entropy=entropy, **kwargs)

    true = oracle_loss(hidden.double(), weight.double(), bias.double())
    low = oracle_loss(hidden.float(), weight.float(), bias.float())
    right = oracle_gradients(lambda *inputs: oracle_loss(*inputs).loss, hidden, weight, bias)
    ours = leaves(hidden, weight, bias)
    out = rf.linear_grpo_loss(ours[0], ours[1], targets, advantages, bias=ours[2], chunk_rows=32, **kwargs)
    out.loss.backward()
    assert out.route == ("logp" if name in ("gspo", "entropy") else "fused")
    assert abs(out.loss - true.loss) <= 1.25 * abs(low.loss - true.loss) + 1e-6 + 1e-5 * abs(true.loss)
    assert_no_worse(out.logp[mask], low.logp[mask], true.logp[mask], floor=1e-5)
    for kind, x in enumerate(ours):
        assert x.grad.dtype == dtype
        assert_right(x.grad, right[kind], kind)

    weight_grad, bias_grad = torch.full_like(weight, 2**-6, dtype=torch.float32), torch.zeros(len(bias))
    direct, hidden_grad = rf.linear_grpo_loss_and_grad_(
        hidden,
        weight,
        targets,
        advantages,
        bias=bias,
        weight_grad=weight_grad,
        bias_grad=bias_grad,
        chunk_rows=32,
        **kwargs,
    )
    assert direct.route == out.route and torch.equal(direct.loss, out.loss.detach()) and not direct.loss.requires_grad
    assert torch.equal(hidden_grad, ours[0].grad)
    # added to what was there, in float32
    for grad, (exact, low), added in ((weight_grad - 2**-6, right[1], 1e-5), (bias_grad, right[2], 1e-6)):
        if dtype == torch.bfloat16:  # E in bfloat16, see BFLOAT16_LIMITS
            assert relative(grad, exact) < 3e-3 + added
        else:
            assert_gradient_no_worse(grad, low, exact, floor=added)


# Parts of the norm. A sequence's coefficient is a function of its sum of log-ratios, and the sum's float32 rounding is
# chance: errors of up to 8e-6 and 2e-5 here, and of up to 6e-6 and 1e-5 in PyTorch.
FLOORS = {"rloo": 1e-5, "vespo": 3e-5}


@pytest.mark.parametrize("loss_type", get_args(LossType))
def test_every_loss_type_has_the_gradients_of_materialised_logits(backend, loss_type):
    """Off policy, with KL, and the entropy bonus on and off; a masked row, an empty sequence, several chunks."""
    rows = few(backend, 90, 36)
    hidden, weight, bias, targets = head(rows, 300, 24, torch.float32, 0.3)
    for extra in ({"beta": 0.1}, {"beta": 0.1, "entropy_coef": 0.2}):
        config = rf.LossConfig(loss_type, temperature=0.9, **REQUIRED.get(loss_type, {}), **extra)
        logp, _ = oracle(hidden @ weight.t() + bias, targets, temperature=0.9)
        kwargs = dict(old_logp=logp + 0.3 * torch.randn(rows), ref_logp=logp + 0.3 * torch.randn(rows), config=config,
                      mask=torch.rand(rows) > 0.1, cu_seqlens=sequences(rows))  # fmt: skip
        advantages = torch.randn(4)
        ours = leaves(hidden, weight, bias)

        def oracle_loss(*inputs, advantages=advantages, kwargs=kwargs):
            logp, entropy = head_oracle(*inputs, targets, temperature=0.9)
            return rf.policy_loss(logp, advantages, entropy=entropy, **kwargs).loss

        rf.linear_grpo_loss(
            ours[0], ours[1], targets, advantages, bias=ours[2], chunk_rows=32, **kwargs
        ).loss.backward()
        for x, (exact, low) in zip(ours, oracle_gradients(oracle_loss, hidden, weight, bias)):
            assert_gradient_no_worse(x.grad, low, exact, floor=FLOORS.get(loss_type, 1e-6))


@pytest.mark.parametrize("dtype", DTYPES)
def test_confident_rows_keep_their_gradient(backend, dtype):
    hidden, weight, _, _ = head(32, 1000, 24, dtype, 0.1)
    targets = torch.arange(32)
    weight[:32] = hidden * 0.6
    ours, fused, exact = *leaves(hidden, hidden), hidden.double().requires_grad_()
    scale = 2.0**14 if dtype == torch.float16 else 1.0  # a GradScaler's: these gradients are below a float16
    (scale * rf.linear_logp(ours, weight, targets).sum()).backward()
    config = rf.LossConfig("reinforce")
    out = rf.linear_grpo_loss(fused, weight, targets, torch.ones(32), config=config, normalizer=1)
    (-scale * out.loss).backward()  # the loss is minus the log-prob
    logp, _ = exact_logp(exact, weight, None, targets)
    (scale * logp.sum()).backward()
    confident = logp.detach().exp() > 0.999
    assert confident.sum() >= 3
    for row in torch.nonzero(confident).flatten():
        assert relative(ours.grad[row], exact.grad[row]) < 0.01
        assert relative(fused.grad[row], exact.grad[row]) < 0.01


@pytest.mark.parametrize("dtype", DTYPES)
def test_targets_200_nats_below_the_maximum_are_exact(backend, dtype):
    hidden, weight, bias, targets = head(40, 500, 16, dtype, 0.3)
    far = torch.arange(0, 40, 5)
    bias[7] = -200
    bias[8] = 2
    targets[far] = 7
    ours = leaves(hidden, weight, bias)
    logp = rf.linear_logp(ours[0], ours[1], targets, bias=ours[2])
    true, _ = exact_logp(hidden, weight, bias, targets)
    assert (true[far] < -200).all()
    low, _ = head_oracle(hidden.float(), weight.float(), bias.float(), targets)
    assert_no_worse(logp, low, true, floor=1e-5)
    logp[far].sum().backward()
    right = oracle_gradients(lambda *inputs: head_oracle(*inputs, targets)[0][far].sum(), hidden, weight, bias)
    for kind, x in enumerate(ours):
        assert_right(x.grad, right[kind], kind)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("loss_type", ["dapo", "gspo"])
def test_equal_weights_give_a_ratio_of_exactly_1(backend, loss_type, dtype):
    """Old log-probs without a graph, of the rows padded and in another order; the loss on packed rows."""
    hidden, weight, bias, targets = head(60, 1000, 24, dtype)
    order = torch.randperm(60)
    with torch.no_grad():
        padded = torch.cat([hidden[order], torch.randn(12, 24).to(dtype)]).view(6, 12, 24)
        ids = torch.cat([targets[order], torch.full((12,), -100)]).view(6, 12)
        old = torch.empty(60)
        old[order] = rf.linear_logp(padded, weight, ids, bias=bias).flatten()[:60]
    out = rf.linear_grpo_loss(
        *leaves(hidden, weight), targets, torch.randn(2), bias=bias, old_logp=old, config=rf.LossConfig(loss_type),
        cu_seqlens=torch.tensor([0, 25, 60]),
    )  # fmt: skip
    assert torch.equal(out.logp, old) and out.metrics["policy/on_policy"] == 0
    assert out.metrics["ratio/max_abs_dev"] == 0 and out.metrics["ratio/mean"] == 1


UPSTREAM = {
    "random": lambda: torch.randn(40),
    "one-hot": lambda: torch.nn.functional.one_hot(torch.tensor(7), 40).float(),
    "zeros": lambda: torch.zeros(40),
    "expanded": lambda: torch.tensor(0.3).expand(40),
    "strided": lambda: torch.randn(40, 3)[:, 1],
    "from cat": lambda: torch.cat([torch.randn(13), torch.zeros(27)]),
}


@pytest.mark.parametrize("kind", UPSTREAM)
@pytest.mark.parametrize("entropy", [False, True])
def test_any_upstream_gradient_is_right(backend, kind, entropy):
    inputs = head(40, 300, 16, torch.float32, 0.3)
    targets, g, h = inputs[3], UPSTREAM[kind](), UPSTREAM[kind]()
    for count in (1, 3):  # a frozen head has a backward pass of its own
        ours = leaves(*inputs[:3])
        out = rf.linear_logp(ours[0], *(x if count == 3 else x.detach() for x in ours[1:2]), targets,
                             bias=ours[2] if count == 3 else ours[2].detach(), entropy="grad")  # fmt: skip
        torch.autograd.backward(out if entropy else out[:1], (g, h) if entropy else (g,))

        def oracle_loss(*inputs):
            logp, entropies = head_oracle(*inputs, targets)
            return (logp * g).sum() + ((entropies * h).sum() if entropy else 0)

        for x, (exact, low) in zip(ours[:count], oracle_gradients(oracle_loss, *inputs[:3])):
            if kind == "zeros":
                assert (x.grad == 0).all()
            else:
                assert_gradient_no_worse(x.grad, low, exact)


def test_activation_checkpointing_around_it_changes_nothing(backend):
    hidden, weight, _, targets = head(40, 300, 16, torch.float32, 0.3)
    weight = weight.contiguous()

    def logp(x, w):
        return rf.linear_logp(torch.tanh(x), w, targets)

    def loss(x, w):
        return rf.linear_grpo_loss(torch.tanh(x), w, targets, torch.ones(40), config=rf.LossConfig()).loss

    for function in (logp, loss):
        plain, again = leaves(hidden, weight), leaves(hidden, weight)
        function(*plain).sum().backward()
        checkpoint(function, *again, use_reentrant=False).sum().backward()
        assert all(torch.equal(x.grad, y.grad) and (x.grad != 0).any() for x, y in zip(plain, again))


def test_a_second_backward_is_right_for_logp_and_raises_for_the_fused_loss(backend):
    hidden, weight, _, targets = head(20, 31, 8, torch.float32)
    x, w = leaves(hidden, weight)
    logp = rf.linear_logp(x, w, targets)
    first = torch.autograd.grad(logp.sum(), (x, w), retain_graph=True)
    second = torch.autograd.grad(2 * logp.sum(), (x, w))
    assert all(torch.equal(b, 2 * a) for a, b in zip(first, second))
    out = rf.linear_grpo_loss(x, w, targets, torch.ones(20), config=rf.LossConfig())
    out.loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="compute the loss again"):
        out.loss.backward()


def test_upstream_gradients_scale(backend):
    hidden, weight, _, targets = head(20, 31, 8, torch.float32)
    grads = []
    for factor in (1.0, 256.0):
        x, w = leaves(hidden, weight)
        (factor * rf.linear_grpo_loss(x, w, targets, torch.ones(20), config=rf.LossConfig()).loss).backward()
        grads.append((x.grad, w.grad))
    assert all(torch.equal(256 * a, b) for a, b in zip(*grads))


@pytest.mark.parametrize("dtypes", [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)])
def test_autocast_casts_like_a_linear_layer(backend, device, dtypes):
    hidden, weight, bias, targets = head(20, 300, 16, torch.float32, 0.3)
    x, w = leaves(hidden.to(dtypes[0]), weight.to(dtypes[1]))
    with torch.autocast(device, dtype=torch.bfloat16):
        out = rf.linear_grpo_loss(x, w, targets, torch.ones(20), bias=bias, config=rf.LossConfig())
        logp = rf.linear_logp(x, w, targets, bias=bias)
        out.loss.backward()
    exact, _ = exact_logp(hidden.bfloat16(), weight.bfloat16(), bias.bfloat16(), targets)
    assert (out.logp - exact).abs().max() < 1e-5 and torch.equal(out.logp, logp)
    assert x.grad.dtype == dtypes[0] and w.grad.dtype == dtypes[1]
    with pytest.raises(TypeError, match="weight must be"):
        rf.linear_logp(x, w, targets)


def test_bad_arguments_name_themselves():
    hidden, weight, bias, targets = head(8, 31, 16, torch.float32)
    for kwargs, name in [
        ({"weight": weight[:, 1:]}, "weight"),
        ({"weight": weight[0]}, "weight"),
        ({"weight": weight.bfloat16()}, "weight"),
        ({"bias": bias[1:]}, "bias"),
        ({"targets": targets[1:]}, "targets"),
        ({"hidden": hidden.double()}, "hidden"),
        ({"chunk_rows": 0}, "chunk_rows"),
        ({"mask": torch.ones(3)}, "mask"),
    ]:
        with pytest.raises((ValueError, TypeError), match=name) as caught:
            rf.linear_logp(**{"hidden": hidden, "weight": weight, "targets": targets, **kwargs})
        assert "\n" not in str(caught.value)
    for kwargs in ({"weight_grad": torch.zeros(31, 16).bfloat16()}, {"weight_grad": torch.zeros(30, 16)},
                   {"weight_grad": None, "bias_grad": torch.zeros(31)}):  # fmt: skip
        with pytest.raises(ValueError, match="_grad must match"):
            rf.linear_grpo_loss_and_grad_(hidden, weight, targets, torch.ones(1), config=rf.LossConfig(), **kwargs)
