"""Inside torch.compile(fullgraph=True) the ops give the bits that they give outside, and raise no graph break."""

import pytest
import torch
from torch._dynamo.utils import counters

import redit_fast as rf
from redit_fast.losses.transforms import LogitTransform
from redit_fast.ops.token_loss import token_logp_
from tests.grid import pairs
from tests.ops.test_linear_loss import leaves
from tests.tolerance import relative

WIDTH, VOCABULARY = 16, 300
OPTIONS = rf.LossConfig(beta=0.1, kl_ratio_correction=True, correction="token_truncate", softcap=9.0, temperature=0.7)


@pytest.fixture(params=pairs(["cpu"]))
def place(request):
    """On the CPU: torch.compile would trace into what puts a test's tensors on another device."""
    return request.param


def logits(x, w):
    return torch.tanh(x) @ w.t()


def rows_of(x):
    """Of every loss: advantages, and old, reference and sampler's log-probs."""
    value = x.detach()[..., 0]
    return {"advantages": value, "old_logp": value - 5, "ref_logp": value - 5.1, "sampling_logp": value - 4.9}


def logp_and_entropy(x, w, t):
    out = rf.token_logp(logits(x, w), t, mask=t > 9, entropy="grad", temperature=0.7, softcap=9.0)
    return (out.logp * x.detach()[:, 0]).sum() + out.entropy.sum()


def loss(x, w, t):
    return 3 * rf.grpo_loss(logits(x, w), t, **rows_of(x), config=OPTIONS).loss


def scaled_loss(x, w, t):
    scale = torch.full((), 1024.0)
    return scale * rf.grpo_loss(logits(x, w), t, **rows_of(x), config=rf.LossConfig(), grad_scale=scale).loss


def head_logp_and_entropy(x, w, t):
    out = rf.linear_logp(torch.tanh(x), w, t, mask=t > 9, bias=w[:, 0], entropy="grad", softcap=9.0)
    return (out.logp * x.detach()[:, 0]).sum() + out.entropy.sum()


def frozen_head(x, w, t):
    return rf.linear_logp(torch.tanh(x), w.detach(), t, entropy="metric").logp.square().sum()


def head_loss(x, w, t):
    return 3 * rf.linear_grpo_loss(torch.tanh(x), w, t, **rows_of(x), bias=w[:, 0], config=OPTIONS).loss


def packed_head_loss(x, w, t):
    rows = rows_of(x) | {"advantages": x.detach()[:3, 0], "old_logp": None}
    ends = torch.tensor([0, 2, 2, 1]).cumsum(0)
    ends[-1] = len(t)
    return rf.linear_grpo_loss(torch.tanh(x), w, t, **rows, cu_seqlens=ends, config=rf.LossConfig("bnpo")).loss


def padded_head_loss_in_16_bits(x, w, t):
    with torch.autocast("cpu", torch.bfloat16):
        x = torch.tanh(x).view(2, -1, WIDTH)
        return rf.linear_grpo_loss(x, w, t.view(2, -1), x.detach()[:, 0, 0], config=rf.LossConfig("grpo")).loss


FUNCTIONS = (logp_and_entropy, loss, scaled_loss, head_logp_and_entropy, frozen_head, head_loss, packed_head_loss,
             padded_head_loss_in_16_bits)  # fmt: skip


def batch(rows):
    return torch.randn(rows, WIDTH), torch.randn(VOCABULARY, WIDTH), torch.randint(VOCABULARY, (rows,))


def results(function, x, w, t):
    x, w = leaves(x, w)
    value = function(x, w, t)
    value.backward()
    return [tensor for tensor in (value.detach(), x.grad, w.grad) if tensor is not None]


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda function: function.__name__)
def test_the_whole_graph_gives_the_same_bits_in_two_compilations_for_20_lengths(function):
    torch._dynamo.reset()
    counters.clear()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for rows in range(4, 44, 2):
        inputs = batch(rows)
        plain = results(function, *inputs)
        assert len(plain) == (2 if function is frozen_head else 3) and all((value != 0).any() for value in plain)
        assert all(map(torch.equal, results(compiled, *inputs), plain)), rows
    assert counters["stats"]["unique_graphs"] <= 2


@pytest.mark.parametrize("loss_type", ["gspo", "vespo", "clip_cov"])
def test_losses_of_a_sequence_compile_too(loss_type):
    config, inputs = rf.LossConfig(loss_type), batch(24)

    def sequences(x, w, t):
        x = torch.tanh(x).view(4, 6, WIDTH)
        return rf.linear_grpo_loss(x, w, t.view(4, 6), x.detach()[:, 0, 0], config=config).loss

    compiled = torch.compile(sequences, fullgraph=True, backend="aot_eager")
    for found, expected in zip(results(compiled, *inputs), results(sequences, *inputs), strict=True):
        assert (expected != 0).any() and relative(found, expected) < 1e-6


LOGP_ROUTE = {
    **{name: rf.LossConfig(name) for name in ("gspo", "gspo_token", "gmpo", "vespo", "rloo", "clip_cov", "kl_cov")},
    "sequence importance": rf.LossConfig("grpo", importance="sequence"),
    "sequence_truncate": rf.LossConfig("grpo", correction="sequence_truncate"),
    "sequence_mask": rf.LossConfig("grpo", correction="sequence_mask"),
    "top_entropy_quantile": rf.LossConfig("grpo", top_entropy_quantile=0.5),
    "off_policy_mask_threshold": rf.LossConfig("grpo", off_policy_mask_threshold=0.5),
    "entropy bonus": rf.LossConfig("grpo", entropy_coef=0.1),
}


def of_a_loss(config):
    def function(x, w, t):
        rows = {name: value.view(4, 6) for name, value in rows_of(x).items()}
        return rf.grpo_loss(logits(x, w).view(4, 6, -1), t.view(4, 6), config=config, **rows).loss

    return function


def of_logp(op, entropy, used):
    """The upstream gradient of what is not used is None, or zeros inside a compiled graph."""

    def function(x, w, t):
        out = rf.token_logp(logits(x, w), t, entropy=entropy) if op == "token_logp" else rf.linear_logp(
            torch.tanh(x), w, t, entropy=entropy
        )  # fmt: skip
        assert out.entropy.requires_grad == (entropy == "grad")
        return getattr(out, used).square().sum() + 0 * out.entropy.detach().sum()

    return function


KEPT_OR_NOT = {f"{op} {mode} {used}": of_logp(op, mode, used)
               for op in ("token_logp", "linear_logp")
               for mode, used in (("metric", "logp"), ("grad", "logp"), ("grad", "entropy"))}  # fmt: skip
CASES = {name: of_a_loss(config) for name, config in LOGP_ROUTE.items()} | KEPT_OR_NOT


@pytest.mark.parametrize("name", CASES)
def test_an_entropy_without_graph_gets_no_gradient_in_a_compiled_graph(backend, name):
    """The compiled backward pass hands in zeros where eager hands in None: once read beside entropies never kept."""
    torch._dynamo.reset()
    function, inputs = CASES[name], batch(24)
    found = results(torch.compile(function, fullgraph=True, backend="aot_eager"), *inputs)
    for value, expected in zip(found, results(function, *inputs), strict=True):
        assert (expected != 0).any() and relative(value, expected) < 1e-6


@pytest.mark.parametrize("loss_type", ["dapo", "gmpo", "kl_cov"])
def test_policy_loss_compiles_too(loss_type):
    config, old = rf.LossConfig(loss_type, beta=0.1), torch.randn(4, 6)
    logp, advantages = old + 0.1 * torch.randn(4, 6), torch.randn(4)

    def loss(x):
        return rf.policy_loss(x, advantages, old_logp=old, ref_logp=old - 0.1, config=config).loss

    (plain,), (compiled,) = leaves(logp), leaves(logp)
    loss(plain).backward()
    torch.compile(loss, fullgraph=True, backend="aot_eager")(compiled).backward()
    assert (plain.grad != 0).any() and relative(compiled.grad, plain.grad) < 1e-6


@pytest.mark.parametrize("schedule", ["constant", "square_root", "cosine_reverse"])
def test_advantages_of_every_step_come_from_two_compilations(schedule):
    dither = rf.Dither(level=0.05, schedule=schedule, total_steps=200, seed=2**64 - 3)

    def advantages(rewards, step):
        ids = torch.arange(len(rewards)) % 3
        by_size = rf.group_advantages(rewards, group_size=4, dither=dither, step=step, reward_weights=[1.0, 0.5])
        return by_size + rf.group_advantages(rewards, group_ids=ids, dither=dither, step=step, scale="batch")

    torch._dynamo.reset()
    counters.clear()
    compiled = torch.compile(advantages, fullgraph=True, backend="aot_eager")
    for groups in range(3, 23):
        rewards = torch.rand(4 * groups, 2)
        found, expected = compiled(rewards, 7 * groups), advantages(rewards, 7 * groups)
        assert all(map(torch.equal, found, expected)) and (expected[0] != 0).all()
    assert counters["stats"]["unique_graphs"] <= 2


def test_the_default_backend_of_torch_compile_gives_the_same_gradients():
    """Inductor fuses what lies around the ops."""
    inputs = batch(24)
    for function in (loss, head_loss):
        try:
            found = results(torch.compile(function, fullgraph=True), *inputs)
        except torch._inductor.exc.InvalidCxxCompiler as error:
            pytest.skip(f"Inductor needs a C++ compiler: {error}")
        for value, expected in zip(found, results(function, *inputs), strict=True):
            assert relative(value, expected) < 1e-6


def test_numbers_may_be_arguments_of_the_graph():
    def calls(x, w, t, count, number):
        logp = rf.linear_logp(x, w, t, temperature=number, chunk_rows=count)
        advantages = rf.group_advantages(x.detach()[:, 0], group_size=count, step=count, eps=number)
        return rf.policy_loss(logp, advantages.values, config=rf_config, normalizer=number).loss + number

    rf_config = rf.LossConfig()
    torch._dynamo.reset()
    compiled = torch.compile(calls, fullgraph=True, backend="aot_eager")
    for count, number in ((2, 0.5), (4, 0.7), (8, 0.9), (16, 1.1)):
        inputs = batch(16)
        assert torch.equal(compiled(*inputs, count, number), calls(*inputs, count, number))


def test_in_place_is_refused():
    for name, op in {
        "inplace_backward": lambda x, t: rf.token_logp(x, t, inplace_backward=True),
        "inplace": lambda x, t: rf.grpo_loss(x, t, torch.ones(4), config=rf.LossConfig(), inplace=True).loss,
    }.items():
        with pytest.raises(Exception, match=f"{name}=True does not work under torch.compile"):
            torch.compile(op, fullgraph=True, backend="eager")(torch.randn(4, 9), torch.zeros(4, dtype=torch.int64))


def test_operators_pass_torchs_own_checks():
    assert rf.group_advantages and rf.linear_logp  # operators are registered by the modules that call them
    x, w, t = batch(20)
    z, scale, rows = x @ w.t(), torch.tensor(2.0), torch.zeros(7, 20)
    sums, softcap, factors = torch.zeros(3, 20), 9.0, torch.randn(4, 20)
    transform, config = LogitTransform(0.7, 1.0, softcap), rf.LossConfig(beta=0.1).text
    token_logp_(rows[0], rows[1], sums, z, t, transform)
    grads = torch.zeros_like(x), torch.zeros_like(w), torch.zeros(len(w))
    fields, dead = torch.zeros(5, 20), torch.zeros(20, dtype=torch.bool)
    samples, names = torch.arange(20), ("uniform", 5, 1, "apply", "mean", "group", "sum_then_normalize", 1e-4, 1)
    calls = {
        "group_advantages": (*fields[:3], dead, *fields[3:], factors[:2].t().double().contiguous(), samples // 4,
                             None, samples, torch.ones(2).double(), torch.ones(2).double(), *names),
        "token_logp": (rows[0], rows[1], sums, z, t, *transform),
        "token_logp_grad": (z.clone(), z, t, sums, factors[0], factors[1], rows[1], *transform),
        "token_loss": (scale * 0, rows[2], rows[3], z.clone(), z, t, *factors, None, config, scale),
        "scale_in_place": (z, scale),
        "linear_logp": (rows[4], None, sums, grads[0], x, w, None, t, *transform, 16),
        "linear_logp_grad": (*grads, factors[0], factors[1], sums, rows[1], x, w, w[:, 0].clone(), t, *transform, None),
        "linear_loss": (
            scale * 0, rows[5], rows[6], scale * 0, *grads, x, w, w[:, 0].clone(), t, *factors, None, config, None
        ),
    }  # fmt: skip
    for name, arguments in calls.items():
        torch.library.opcheck(getattr(torch.ops.redit_fast, name), arguments)
