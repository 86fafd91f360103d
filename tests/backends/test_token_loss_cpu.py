"""What only the compiled token loss can get wrong: instruction sets, threads, strides, version counters."""

import pytest
import torch

import redit_fast as rf
from redit_fast.backends import cpu
from redit_fast.losses.coefficients import token_coefficients
from redit_fast.losses.transforms import LogitTransform

refusal = cpu.why_not("token_loss", torch.device("cpu"))
pytestmark = pytest.mark.skipif(refusal is not None, reason=f"cpu: {refusal}")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
TRANSFORMS = [LogitTransform(), LogitTransform(0.7, 0.5, 9.0)]


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def hostile(rows, vocabulary, dtype):
    """Rows that repair, -inf, NaN and infinite logits, ignored and stray targets beside ordinary ones."""
    logits, targets = (torch.randn(rows, vocabulary) * 4).to(dtype), torch.randint(vocabulary, (rows,))
    logits[0] *= 20
    logits[1, ::2] = -torch.inf
    logits[2, -1], logits[3, 0] = torch.nan, torch.inf
    targets[4], targets[5], targets[6] = -100, vocabulary, -1
    return logits, targets


def run(logits, targets, transform):
    """logp, entropy, sums and the gradient of logp and entropy."""
    rows = len(targets)
    logp, entropy, sums = torch.empty(rows), torch.empty(rows), torch.empty(3, rows)
    cpu.token_logp(logp, entropy, sums, logits, targets, transform)
    generator = torch.Generator().manual_seed(1)
    upstream = [torch.randn(rows, generator=generator) for _ in range(2)]
    grad = torch.empty_like(logits)
    cpu.token_logp_grad(grad, logits, targets, sums, *upstream, entropy, transform)
    return logp, entropy, sums, grad


def assert_same_bits(first, second, denormal=0.0):
    for a, b in zip(first, second, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=denormal, equal_nan=True)


def assert_near_bits(baseline, fused, rtol=1e-5):
    """SSE2 has no fused multiply-add: float32 rounding apart on the scale of a row, or one rounding of 16 bits."""
    for a, b in zip(baseline, fused, strict=True):
        coarse = {torch.bfloat16: 2**-7, torch.float16: 2**-10}.get(a.dtype, rtol)
        assert torch.equal(a.isfinite(), b.isfinite())
        a, b = a.nan_to_num().double(), b.nan_to_num().double()
        assert ((a - b).abs() <= coarse * b.abs().amax(-1, keepdim=True).clamp(min=1)).all()


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocabulary", [7, 31, 32, 33, 127, 4096, 5003])  # below, at and above 32 lanes; two chunks
def test_the_instruction_sets_agree_and_those_that_fuse_to_the_bit(vocabulary, dtype, transform):
    logits, targets = hostile(40, vocabulary, dtype)
    results = []
    for name in cpu.instruction_sets():
        with cpu.use_instruction_set(name):
            results.append(run(logits, targets, transform))
    assert results[0][0].isfinite().sum() >= 35 and results[0][0][7:].abs().max() > 1
    assert_near_bits(results[0], results[-1])
    assert_same_bits(results[min(1, len(results) - 1)], results[-1], denormal=2**-120)  # which AVX-512 keeps


def test_an_instruction_set_that_the_processor_lacks_is_refused():
    with pytest.raises(ValueError, match="name must be an instruction set of this processor, one of baseline"):
        with cpu.use_instruction_set("sve"):
            pass


@pytest.mark.parametrize("dtype", DTYPES[:2])
def test_fifty_repeats_on_every_number_of_threads_give_the_same_bits(threads, dtype):
    logits, targets = hostile(107, 1009, dtype)
    rows = [x[7:] for x in (logits, targets, torch.rand(107), torch.randn(107))]  # a NaN would hide the other losses
    transform, config = TRANSFORMS[1], rf.LossConfig(**TRANSFORMS[1]._asdict())

    def everything():
        loss, logp, entropy, grad = torch.empty(()), torch.empty(100), torch.empty(100), torch.empty_like(rows[0])
        cpu.token_loss(loss, logp, entropy, grad, *rows, None, None, None, config, None)
        return *run(logits, targets, transform), loss, logp, entropy, grad

    expected = everything()
    assert expected[4].isfinite() and expected[4] != 0
    for count in (1, 2, 3, 4):
        threads(count)
        for _ in range(50):
            assert_same_bits(everything(), expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_column_strides_and_alignment_do_not_change_the_bits(dtype):
    logits, targets = hostile(20, 127, dtype)
    expected = run(logits, targets, LogitTransform())
    wide = torch.empty(20, 3 * 127 + 1, dtype=dtype)
    for view in (wide[:, 1::3], torch.empty(127, 20, dtype=dtype).t(), wide[:, 1:128]):
        view.copy_(logits)
        assert_same_bits(run(view, targets, LogitTransform()), expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_in_place_gives_the_bits_of_a_fresh_gradient_and_writes_nothing_else(dtype):
    logits, targets = hostile(20, 127, dtype)
    logp, entropy, sums, expected = run(logits, targets, LogitTransform())
    generator = torch.Generator().manual_seed(1)
    upstream = [torch.randn(20, generator=generator) for _ in range(2)]
    wide = torch.full((20, 260), 7.0, dtype=dtype)
    for view in (wide[:, 2:129], wide[:, 2:256:2]):
        wide.fill_(7.0)
        view.copy_(logits)
        cpu.token_logp_grad(view, view, targets, sums, *upstream, entropy, LogitTransform())
        torch.testing.assert_close(view, expected, rtol=0, atol=0, equal_nan=True)
        view.fill_(7.0)
        assert (wide == 7.0).all()


CONFIGS = [
    rf.LossConfig("grpo", delta=1.3),
    rf.LossConfig("bnpo", delta=1.05),
    rf.LossConfig("bnpo", dual_clip=1.3),
    rf.LossConfig("dr_grpo", max_completion_length=9, beta=0.2),
    rf.LossConfig("dapo", epsilon_high=0.28, beta=0.1, kl_ratio_correction=True),
    rf.LossConfig("cispo", epsilon_high=1.1),
    rf.LossConfig("cispo", cispo_bound="relative", epsilon_low=0.1, beta=0.1),
    rf.LossConfig("sapo", beta=0.1, kl="k1", kl_ratio_correction=True),
    rf.LossConfig("luspo", beta=0.1, kl="k2", kl_ratio_correction=True),
    rf.LossConfig("gpg", beta=0.1, kl="abs", kl_ratio_correction=True),
    rf.LossConfig("reinforce", correction="token_truncate", correction_cap=1.2, correction_floor=0.9),
    rf.LossConfig("dppo_tv", epsilon_low=0.1, epsilon_high=0.05),
    rf.LossConfig("dppo_kl", epsilon_low=0.1, epsilon_high=0.05),
    rf.LossConfig("dro", dro_beta=0.5, correction="token_mask", correction_cap=1.2, correction_floor=0.9),
]


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.loss_type)
def test_token_coefficients_are_those_of_the_loss_file_ties_included(config):
    """V = 2, logits (0, 0): logp = -log 2 for every row, and the gradient at the target is half the slope."""
    logits, targets = torch.zeros(4000, 2), torch.zeros(4000, dtype=torch.long)
    logp, entropy, loss = torch.empty(4000), torch.empty(4000), torch.zeros(())
    cpu.token_logp(logp, entropy, torch.empty(3, 4000), logits, targets, LogitTransform())
    old, ref, sampling = (logp + 0.4 * torch.randn(4000) for _ in range(3))
    old[:1000] = logp[:1000]  # ratio exactly 1: min(r A, clip(r) A) is a tie
    old[1000:1020], ref[1020:1040] = -25.0, 25.0  # beyond the clamp
    ref[1040:1060], sampling[1060:1080], sampling[1080:1100] = logp[0], torch.nan, -torch.inf
    advantages, weights = torch.randn(4000), torch.rand(4000)
    advantages[::7] = 0.0
    ref, sampling = ref if config.beta else None, None if config.correction == "none" else sampling
    for old_logp in (old, None):
        row_loss, slope = token_coefficients(config, logp, advantages, old_logp, ref, sampling)
        grad = torch.empty_like(logits)
        cpu.token_loss(
            loss, logp, entropy, grad, logits, targets, weights, advantages, old_logp, ref, sampling, config,
            torch.tensor(4.0),
        )  # fmt: skip
        assert slope.abs().max() > 0.5
        torch.testing.assert_close(grad[:, 0], 4 * weights * slope / 2, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(loss, (weights * row_loss).double().sum().float(), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bit_numbers_are_read_exactly_and_rounded_to_nearest_even(dtype):
    every = torch.arange(2**16, dtype=torch.int32).to(torch.uint16).view(dtype)
    for name in cpu.instruction_sets():
        with cpu.use_instruction_set(name):
            for factor in (0.5, 3.0, 1.0 + 2.0**-9, 2.0**-12):  # halves and 2^-12: subnormals; 3: overflow
                x = every.clone()
                cpu.scale_in_place(x, torch.tensor(factor))
                torch.testing.assert_close(x, (every.float() * factor).to(dtype), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("shape", [(0,), (5,), (7, 40000), (40, 33)])
def test_scale_in_place_of_any_strides(shape):
    x = torch.randn(*shape)
    for view in (x.clone(), torch.stack([x, x], -1)[..., 0], x.t().clone(memory_format=torch.contiguous_format).t()):
        cpu.scale_in_place(view, torch.tensor(0.3))
        assert torch.equal(view, x * torch.tensor(0.3))


def test_every_output_is_known_to_autograd_as_written():
    logits, targets, rows = torch.randn(4, 9), torch.randint(9, (4,)), torch.randn(4)
    logp, entropy, sums, loss, grad = torch.empty(4), torch.empty(4), torch.empty(3, 4), torch.zeros(()), logits.clone()

    def written(call, *outputs):
        before = [out._version for out in outputs]
        call()
        return [out._version for out in outputs] == [version + 1 for version in before]

    transform = LogitTransform()
    assert written(lambda: cpu.token_logp(logp, entropy, sums, logits, targets, transform), logp, entropy, sums)
    assert written(lambda: cpu.token_logp_grad(grad, grad, targets, sums, rows, rows, entropy, transform), grad)
    arguments = (loss, logp, entropy, grad, grad, targets, rows, rows, None, None, None, rf.LossConfig(), None)
    assert written(lambda: cpu.token_loss(*arguments), loss, logp, entropy, grad)
    assert written(lambda: cpu.scale_in_place(grad, torch.tensor(2.0)), grad)
