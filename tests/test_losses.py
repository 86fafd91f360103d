"""`policy_loss` is TRL's formulas, written out here a second time token by token, and its closed forms are its
derivatives."""

import math
import subprocess
import sys
from dataclasses import fields

import pytest
import torch

import redit_fast as rf
from redit_fast.losses import Rows, token_coefficients

CONFIGS = {
    "grpo": rf.LossConfig("grpo"),
    "bnpo": rf.LossConfig("bnpo", epsilon_high=0.3),
    "dr_grpo": rf.LossConfig("dr_grpo", max_completion_length=9),
    "dapo": rf.LossConfig("dapo", epsilon_low=0.1, epsilon_high=0.28),
    "dapo-delta": rf.LossConfig("dapo", delta=1.5),
    "dapo-small-delta": rf.LossConfig("dapo", delta=1.05),
    "dapo-kl": rf.LossConfig("dapo", beta=0.2),
    "grpo-kl-corrected": rf.LossConfig("grpo", beta=0.2, kl_ratio_correction=True),
    "cispo": rf.LossConfig("cispo", epsilon_high=1.2),
    "cispo-relative": rf.LossConfig("cispo", cispo_bound="relative", epsilon_low=0.1, beta=0.1),
    "gspo": rf.LossConfig("gspo", epsilon_low=0.02, epsilon_high=0.03),
    "bnpo-sequence-kl": rf.LossConfig("bnpo", "sequence", 0.02, beta=0.2, kl_ratio_correction=True),
    "dapo-entropy": rf.LossConfig("dapo", entropy_coef=0.05),
}
TOKEN_LEVEL = [name for name, config in CONFIGS.items() if config.route == "fused"]


def batch(B=6, T=9, spread=0.3):
    logp = -torch.rand(B, T) * 4
    mask = torch.rand(B, T) > 0.3
    mask[2] = False  # a sequence without scored tokens
    old, ref = logp + spread * torch.randn(B, T), logp + spread * torch.randn(B, T)
    return logp, torch.randn(B), old, ref, mask, torch.rand(B, T) * 3


def by_hand(config, logp, advantages, old, ref, mask, entropy):
    """One sequence and one token at a time, in Python floats: (loss, clipped low, clipped high)."""
    B, T = logp.shape
    total, tokens, sequence_mean, low_count, high_count = 0.0, 0, 0.0, 0, 0
    low, high = 1 - config.epsilon_low, 1 + (config.epsilon_low if config.epsilon_high is None else config.epsilon_high)
    for b in range(B):
        positions = [t for t in range(T) if mask[b, t]]
        A, losses = advantages[b].item(), []
        ratios = {t: math.exp(logp[b, t] - old[b, t]) for t in positions}
        if config.sequence_level and positions:
            mean = sum((logp[b, t] - old[b, t]).item() for t in positions) / len(positions)
            ratios = dict.fromkeys(positions, math.exp(mean))
        for t in positions:
            r = ratios[t]
            if config.loss_type == "cispo":
                top = config.epsilon_high if config.cispo_bound == "absolute" else high
                weight = min(r, top) if config.cispo_bound == "absolute" else min(max(r, low), top)
                value = -weight * A * logp[b, t].item()
                high_count += r > top and A > 0
            else:
                value = -min(min(r, config.delta or math.inf) * A, min(max(r, low), high) * A)
                low_count, high_count = low_count + (r < low and A < 0), high_count + (r > high and A > 0)
            if config.beta:
                d = (ref[b, t] - logp[b, t]).item()
                value += config.beta * (math.exp(d) - d - 1) * (r if config.kl_ratio_correction else 1)
            losses.append(value)
        total, tokens = total + sum(losses), tokens + len(positions)
        sequence_mean += sum(losses) / max(len(positions), 1)
    loss = {"grpo": sequence_mean / B, "gspo": sequence_mean / B, "dr_grpo": total / (B * 9)}.get(
        config.loss_type, total / tokens
    )
    return loss - config.entropy_coef * entropy[mask].mean().item(), low_count, high_count


@pytest.mark.parametrize("name", CONFIGS)
def test_every_loss_is_its_formula(name):
    config = CONFIGS[name]
    logp, advantages, old, ref, mask, entropy = batch()
    out = rf.policy_loss(
        logp, advantages, old_logp=old, ref_logp=ref, mask=mask, entropy=entropy, config=config, normalizer=None
    )
    expected, low, high = by_hand(config, logp.double(), advantages, old.double(), ref.double(), mask, entropy)
    assert out.loss.item() == pytest.approx(expected, rel=2e-6, abs=1e-7) and abs(expected) > 1e-3
    assert low + high > 0, "no clipped token: the case tests nothing"
    if not config.sequence_level:
        key = "cispo_clip_ratio" if config.loss_type == "cispo" else "clip_ratio/high_mean"
        assert out.metrics[key].item() == pytest.approx(high / mask.sum().item())


@pytest.mark.parametrize("name", CONFIGS)
def test_gradients_are_those_of_float64_finite_differences(name):
    config = CONFIGS[name]
    logp, advantages, old, ref, mask, entropy = batch(3, 5)
    mask[2, 0] = True
    logp.requires_grad_()
    kwargs = dict(old_logp=old, ref_logp=ref, mask=mask, entropy=entropy, config=config)
    rf.policy_loss(logp, advantages, **kwargs).loss.backward()
    if config.loss_type == "cispo":
        return  # its weight is behind a stop-gradient: the closed form below covers it
    step = 1e-3
    for b, t in [(0, 0), (0, 3), (1, 1), (2, 0)]:
        change = torch.zeros_like(logp)
        change[b, t] = step
        with torch.no_grad():
            up, down = (
                by_hand(config, (logp + s * change).double(), advantages, old.double(), ref.double(), mask, entropy)
                for s in (1, -1)
            )
        assert logp.grad[b, t].item() == pytest.approx((up[0] - down[0]) / (2 * step), rel=2e-2, abs=2e-4)


@pytest.mark.parametrize("name", TOKEN_LEVEL)
@pytest.mark.parametrize("spread", [0.0, 0.3, 30.0])
def test_the_fused_coefficient_is_the_derivative_of_policy_loss(name, spread):
    config = CONFIGS[name]
    logp, advantages, old, ref, mask, _ = batch(8, 50, spread)
    low, high = config.clip_range
    for row, edge in enumerate(
        (low, high, config.delta or 1.3)
    ):  # exactly at the clip edges too, where the tie rules act
        if math.isfinite(edge):
            old[row] = logp[row] - torch.tensor(edge).log()
    logp.requires_grad_()
    out = rf.policy_loss(logp, advantages, old_logp=old, ref_logp=ref, mask=mask, config=config)
    out.loss.backward()
    rows = Rows.check(logp, advantages, old, ref, mask, None, config, None)
    values, slopes = token_coefficients(config, logp.detach().flatten(), rows.advantages, rows.old_logp, rows.ref_logp)
    weights = rows.weights(config, None)
    loss, grad = torch.where(rows.mask, weights * values, 0).sum(), torch.where(rows.mask, weights * slopes, 0)
    torch.testing.assert_close(loss, out.loss.detach(), rtol=1e-5, atol=1e-6)
    # At a spread of 30 the corrected KL's two terms of size e^40 cancel in float32, in either form.
    floor = 1e-6 * logp.grad.abs().max().item() if spread == 30 else 1e-9
    torch.testing.assert_close(grad.view_as(logp), logp.grad, rtol=1e-5, atol=floor)
    assert logp.grad.abs().max() > 1e-4


@pytest.mark.parametrize("name", CONFIGS)
def test_on_policy_the_ratio_is_one_and_the_gradient_minus_the_advantage(name):
    config = CONFIGS[name]
    logp, advantages, _, ref, mask, entropy = batch()
    logp.requires_grad_()
    if config.beta or config.entropy_coef or config.delta == 1.05:
        return
    out = rf.policy_loss(logp, advantages, ref_logp=ref, mask=mask, entropy=entropy, config=config)
    out.loss.backward()
    assert out.metrics["ratio/max_abs_dev"] == 0 and out.metrics["policy/on_policy"] == 1
    weights = Rows.check(logp, advantages, None, ref, mask, None, config, None).weights(config, None).view_as(logp)
    torch.testing.assert_close(logp.grad, -advantages[:, None] * weights)


@pytest.mark.parametrize("name", CONFIGS)
def test_packed_equals_padded_and_masked_positions_are_never_read(name):
    config = CONFIGS[name]
    logp, advantages, old, ref, mask, entropy = batch()
    padded = logp.clone().requires_grad_()
    out = rf.policy_loss(padded, advantages, old_logp=old, ref_logp=ref, mask=mask, entropy=entropy, config=config)
    out.loss.backward()
    lengths = mask.sum(1)
    packed = logp[mask].requires_grad_()
    same = rf.policy_loss(
        packed, advantages, old_logp=old[mask], ref_logp=ref[mask], entropy=entropy[mask], config=config,
        cu_seqlens=torch.nn.functional.pad(lengths.cumsum(0), (1, 0)),
    )  # fmt: skip
    same.loss.backward()
    torch.testing.assert_close(same.loss, out.loss)
    torch.testing.assert_close(packed.grad, padded.grad[mask])
    assert same.metrics.keys() == out.metrics.keys()
    for key in out.metrics:
        torch.testing.assert_close(same.metrics[key], out.metrics[key])

    poison = torch.tensor([math.nan, math.inf, -math.inf])[torch.randint(3, mask.shape)]
    dirty = [torch.where(mask, x, poison) for x in (logp, old, ref, entropy)]
    dirty[0].requires_grad_()
    again = rf.policy_loss(
        dirty[0], advantages, old_logp=dirty[1], ref_logp=dirty[2], entropy=dirty[3], mask=mask, config=config
    )
    again.loss.backward()
    assert torch.equal(again.loss, out.loss) and torch.equal(dirty[0].grad, padded.grad)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_fully_masked_batch_is_exactly_zero_with_a_graph(name):
    logp, advantages, old, ref, mask, entropy = batch()
    logp.requires_grad_()
    out = rf.policy_loss(
        logp, advantages, old_logp=old, ref_logp=ref, mask=torch.zeros_like(mask), entropy=entropy, config=CONFIGS[name]
    )
    out.loss.backward()
    assert out.loss == 0 and logp.grad is not None and (logp.grad == 0).all()
    assert all(torch.isfinite(value) for value in out.metrics.values())


@pytest.mark.parametrize("name", [name for name in CONFIGS if not CONFIGS[name].entropy_coef])
def test_micro_batches_add_up_whatever_their_size_and_order(name):
    config = CONFIGS[name]
    logp, advantages, old, ref, mask, _ = batch(16, 9)
    by_sequence = config.loss_type in ("grpo", "gspo", "dr_grpo")
    normalizer = (16 * (9 if config.loss_type == "dr_grpo" else 1)) if by_sequence else mask.sum()

    def summed(order, size):
        leaf, total = logp.clone().requires_grad_(), 0.0
        for rows in order.split(size):
            out = rf.policy_loss(
                leaf[rows], advantages[rows], old_logp=old[rows], ref_logp=ref[rows], mask=mask[rows], config=config,
                normalizer=normalizer,
            )  # fmt: skip
            out.loss.backward()
            total += out.loss.item()
        return total, leaf.grad

    loss, grad = summed(torch.arange(16), 16)
    whole = rf.policy_loss(logp, advantages, old_logp=old, ref_logp=ref, mask=mask, config=config).loss.item()
    assert loss == pytest.approx(whole, rel=1e-5)
    for order, size in ((torch.arange(16), 4), (torch.arange(16), 1), (torch.randperm(16), 4)):
        other_loss, other_grad = summed(order, size)
        assert other_loss == pytest.approx(loss, rel=1e-5, abs=1e-6)
        torch.testing.assert_close(other_grad, grad, rtol=1e-5, atol=1e-9)


def test_two_ranks_sum_to_the_single_process_gradient(tmp_path):
    script = f"""
import sys, torch, redit_fast as rf
import torch.distributed as dist
rank = int(sys.argv[1])
dist.init_process_group("gloo", init_method="file://{tmp_path}/store", rank=rank, world_size=2)
torch.manual_seed(0)
logp, advantages, mask = -torch.rand(8, 5), torch.randn(8), torch.rand(8, 5) > 0.3
old = logp + 0.3 * torch.randn(8, 5)
theta = torch.ones((), requires_grad=True)
mine, tokens = slice(4 * rank, 4 * rank + 4), mask[4 * rank : 4 * rank + 4].sum()
dist.all_reduce(tokens)
config = rf.LossConfig("dapo")
rf.policy_loss(theta * logp[mine], advantages[mine], old_logp=old[mine], mask=mask[mine], config=config,
               normalizer=tokens).loss.backward()
dist.all_reduce(theta.grad)
whole = torch.ones((), requires_grad=True)
rf.policy_loss(whole * logp, advantages, old_logp=old, mask=mask, config=config).loss.backward()
torch.testing.assert_close(theta.grad, whole.grad, rtol=1e-5, atol=0.0)
"""
    ranks = [subprocess.Popen([sys.executable, "-c", script, str(rank)]) for rank in (0, 1)]
    assert [rank.wait(timeout=300) for rank in ranks] == [0, 0]


def test_huge_log_ratios_are_finite_and_counted():
    logp = torch.tensor([[-1.0, -1e4, -3.0, -25.0]], requires_grad=True)
    old, ref = torch.tensor([[-1e4, -1.0, -3.0, -5.0]]), torch.tensor([[-1.0, 0.0, -1e4, -5.0]])
    out = rf.policy_loss(logp, torch.tensor([-1.0]), old_logp=old, ref_logp=ref, config=rf.LossConfig(beta=0.1))
    out.loss.backward()
    assert torch.isfinite(out.loss) and torch.isfinite(logp.grad).all()
    assert out.metrics["ratio/overflow_frac"] == 0.5
    assert logp.grad[0, 0] == 0 and logp.grad[0, 3] != 0  # outside the clamp nothing passes, at the bound all


def test_low_precision_logp_is_computed_in_float32_with_one_rounding():
    logp, advantages, old, ref, mask, _ = batch()
    low = logp.bfloat16().requires_grad_()
    wide = low.detach().float().requires_grad_()
    for leaf in (low, wide):
        rf.policy_loss(leaf, advantages, old_logp=old, mask=mask, config=rf.LossConfig()).loss.backward()
    assert torch.equal(low.grad, wide.grad.bfloat16())


CHANGES = {
    "loss_type": "grpo", "importance": "sequence", "epsilon_low": 0.05, "epsilon_high": 0.01, "delta": 1.01,
    "dual_clip": 1.5, "cispo_bound": "relative", "beta": 0.5, "kl": "k1", "kl_ratio_correction": True,
    "entropy_coef": 0.5, "correction": "token_mask", "correction_cap": 2.0, "correction_floor": 0.5,
    "off_policy_mask_threshold": 0.1, "top_entropy_quantile": 0.5, "sapo_temperature_pos": 2.0,
    "sapo_temperature_neg": 2.0, "vespo_k_pos": 1.0, "vespo_lambda_pos": 1.0, "vespo_k_neg": 1.0,
    "vespo_lambda_neg": 1.0, "clip_cov_ratio": 0.5, "clip_cov_lb": 0.0, "clip_cov_ub": 9.0, "kl_cov_ratio": 0.5,
    "kl_cov_coef": 2.0, "dro_beta": 0.1, "max_completion_length": 5, "temperature": 2.0, "logit_scale": 2.0,
    "softcap": 3.0,
}  # fmt: skip


@pytest.mark.parametrize("base", ["grpo", "bnpo", "dr_grpo", "dapo", "cispo", "gspo"])
@pytest.mark.parametrize("field", [field.name for field in fields(rf.LossConfig)])
@pytest.mark.parametrize("route", ["logits", "hidden"])
def test_flipping_any_field_changes_the_result_or_raises_naming_it(base, field, route):
    """max_completion_length alone is accepted everywhere; children are judged with their parent on."""
    parents = {"kl": {"beta": 0.1}, "kl_ratio_correction": {"beta": 0.1}}.get(field, {})
    if base == "dr_grpo":
        parents["max_completion_length"] = 9
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(24, 8, generator=generator)
    weight = torch.randn(11, 8, generator=generator)
    targets, advantages = torch.randint(11, (24,), generator=generator), torch.randn(4, generator=generator)
    old, ref = -torch.rand(24, generator=generator) * 5, -torch.rand(24, generator=generator) * 5

    def run(**changed):
        config = rf.LossConfig(**{"loss_type": base, **parents, **changed})
        h = hidden.clone().requires_grad_()
        kwargs = dict(old_logp=old, ref_logp=ref, cu_seqlens=torch.tensor([0, 5, 9, 17, 24]), config=config)
        if route == "logits":
            out = rf.grpo_loss(h @ weight.t(), targets, advantages, **kwargs)
        else:
            out = rf.linear_grpo_loss(h, weight, targets, advantages, **kwargs)
        out.loss.backward()
        return torch.cat([out.loss.detach()[None], h.grad.flatten()])

    before = run()
    if field == "loss_type" and base == "grpo":
        after = run(loss_type="bnpo")
    else:
        try:
            after = run(**{field: CHANGES[field]})
        except (ValueError, NotImplementedError) as error:
            assert field in str(error)
            return
    accepted_everywhere = field == "max_completion_length" and base != "dr_grpo"
    implied = (base, field) in {("gspo", "importance"), ("cispo", "epsilon_high")}
    assert accepted_everywhere or implied or not torch.allclose(before, after, rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize(
    ("fields_", "error", "name"),
    [
        ({"loss_type": "ppo"}, ValueError, "loss_type"),
        ({"loss_type": "sapo"}, NotImplementedError, "loss_type"),
        ({"epsilon_low": -1.0}, ValueError, "epsilon_low"),
        ({"temperature": 0.0}, ValueError, "temperature"),
        ({"softcap": -3.0}, ValueError, "softcap"),
        ({"beta": math.nan}, ValueError, "beta"),
        ({"loss_type": "cispo", "delta": 2.0}, ValueError, "delta"),
        ({"loss_type": "cispo", "epsilon_low": 0.1, "epsilon_high": 2.0}, ValueError, "epsilon_low"),
        ({"max_completion_length": 0}, ValueError, "max_completion_length"),
    ],
)
def test_a_bad_config_names_the_field_when_it_is_built(fields_, error, name):
    with pytest.raises(error, match=name):
        rf.LossConfig(**fields_)


def test_bad_arguments_get_one_sentence_that_names_them():
    logp, advantages, old, ref, mask, entropy = batch()
    good = dict(old_logp=old, ref_logp=ref, mask=mask, entropy=entropy, config=rf.LossConfig())
    for change, name in [
        ({"old_logp": old[:, 1:]}, "old_logp"),
        ({"mask": mask[0]}, "mask"),
        ({"entropy": entropy[0]}, "entropy"),
        ({"config": rf.LossConfig(beta=0.1), "ref_logp": None}, "ref_logp"),
        ({"config": rf.LossConfig(entropy_coef=0.1), "entropy": None}, "entropy"),
        ({"config": rf.LossConfig("dr_grpo")}, "max_completion_length"),
        ({"config": "dapo"}, "config"),
        ({"normalizer": torch.ones(2)}, "normalizer"),
        ({"cu_seqlens": torch.tensor([0, 6])}, "cu_seqlens"),
    ]:
        with pytest.raises((ValueError, TypeError), match=name) as caught:
            rf.policy_loss(logp, advantages, **{**good, **change})
        assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="advantages"):
        rf.policy_loss(logp, advantages[:-1], **good)
    for cu_seqlens in ([0, 5, 3, 54], [1, 54], [0, 50]):
        with pytest.raises(ValueError, match="cu_seqlens"):
            rf.policy_loss(
                logp.flatten(), torch.zeros(len(cu_seqlens) - 1), cu_seqlens=torch.tensor(cu_seqlens),
                config=rf.LossConfig(),
            )  # fmt: skip
