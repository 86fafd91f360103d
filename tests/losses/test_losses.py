"""`policy_loss` is its formulas, written out a second time in `loss_oracle`, whatever the layout and the batching."""

import math
import os
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace
from typing import get_args

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import redit_fast as rf
from redit_fast.losses.coefficients import token_coefficients
from redit_fast.losses.config import LossType
from redit_fast.losses.rows import Rows
from tests import ROOT
from tests.losses.loss_oracle import loss_by_hand
from tests.ranks import meet_and_end

CONFIGS = {
    "grpo": rf.LossConfig("grpo"),
    "bnpo": rf.LossConfig("bnpo", epsilon_high=0.3),
    "dr_grpo": rf.LossConfig("dr_grpo", max_completion_length=9),
    "dapo": rf.LossConfig("dapo", epsilon_low=0.1, epsilon_high=0.28),
    "dapo-delta": rf.LossConfig("dapo", delta=1.5),
    "dapo-small-delta": rf.LossConfig("dapo", delta=1.05),
    "dapo-dual-clip": rf.LossConfig("dapo", dual_clip=1.3),
    "dapo-small-dual-clip": rf.LossConfig("dapo", dual_clip=1.1),
    "dapo-k1": rf.LossConfig("dapo", beta=0.2, kl="k1"),
    "dapo-k2-corrected": rf.LossConfig("dapo", beta=0.2, kl="k2", kl_ratio_correction=True),
    "dapo-k3": rf.LossConfig("dapo", beta=0.2),
    "grpo-k3-corrected": rf.LossConfig("grpo", beta=0.2, kl_ratio_correction=True),
    "dapo-abs": rf.LossConfig("dapo", beta=0.2, kl="abs"),
    "dapo-token-truncate": rf.LossConfig(
        "dapo", correction="token_truncate", correction_cap=1.2, correction_floor=0.8, beta=0.2
    ),
    "grpo-token-mask": rf.LossConfig("grpo", correction="token_mask", correction_cap=1.5, correction_floor=0.7),
    "cispo": rf.LossConfig("cispo", epsilon_high=1.2),
    "cispo-relative": rf.LossConfig("cispo", cispo_bound="relative", epsilon_low=0.1, beta=0.1),
    "sapo": rf.LossConfig("sapo", sapo_temperature_pos=2.0, sapo_temperature_neg=3.0),
    "luspo": rf.LossConfig("luspo"),
    "gpg": rf.LossConfig("gpg"),
    "reinforce-truncate": rf.LossConfig("reinforce", correction="token_truncate", correction_cap=1.1),
    "dppo_tv": rf.LossConfig("dppo_tv", epsilon_low=0.03, epsilon_high=0.05),
    "dppo_kl": rf.LossConfig("dppo_kl", epsilon_low=0.01, epsilon_high=0.02),
    "dro": rf.LossConfig("dro", dro_beta=0.7),
    "dro-mask": rf.LossConfig("dro", dro_beta=0.7, correction="token_mask", correction_cap=1.3),
    "gspo": rf.LossConfig("gspo", epsilon_low=0.02, epsilon_high=0.03),
    "gspo-dual-clip": rf.LossConfig("gspo", epsilon_low=0.02, epsilon_high=0.03, dual_clip=1.1),
    "gspo-k3-corrected": rf.LossConfig("gspo", epsilon_low=0.02, beta=0.2, kl_ratio_correction=True),
    "gspo_token": rf.LossConfig("gspo_token", epsilon_low=0.02, epsilon_high=0.03),
    "bnpo-sequence-kl": rf.LossConfig("bnpo", "sequence", 0.02, beta=0.2, kl_ratio_correction=True),
    "luspo-sequence": rf.LossConfig("luspo", "sequence", 0.02),
    "cispo-sequence": rf.LossConfig("cispo", "sequence", epsilon_high=1.03),
    "sapo-sequence": rf.LossConfig("sapo", "sequence"),
    "gmpo": rf.LossConfig("gmpo", epsilon_low=0.2, epsilon_high=0.3, beta=0.1),
    "rloo": rf.LossConfig("rloo"),
    "vespo": rf.LossConfig("vespo"),
    "vespo-truncate": rf.LossConfig("vespo", correction="token_truncate", correction_cap=1.2),
    "vespo-mask": rf.LossConfig("vespo", vespo_k_pos=0.1, vespo_k_neg=0.1, correction="token_mask", correction_cap=1.6),
    "dapo-sequence-truncate": rf.LossConfig("dapo", correction="sequence_truncate", correction_cap=1.1),
    "rloo-sequence-mask": rf.LossConfig("rloo", correction="sequence_mask", correction_cap=1.5, correction_floor=0.5),
    "dapo-off-policy": rf.LossConfig("dapo", off_policy_mask_threshold=0.05),
    "clip_cov": rf.LossConfig("clip_cov", clip_cov_ratio=0.2, clip_cov_lb=0.1, clip_cov_ub=2.0),
    "kl_cov": rf.LossConfig("kl_cov", kl_cov_ratio=0.2, kl_cov_coef=0.5),
    "grpo-top-entropy": rf.LossConfig("grpo", top_entropy_quantile=0.3),
    "gmpo-top-entropy": rf.LossConfig("gmpo", top_entropy_quantile=0.6),
    "dapo-entropy": rf.LossConfig("dapo", entropy_coef=0.05),
    "dapo-entropy-of-the-top": rf.LossConfig("dapo", entropy_coef=0.05, top_entropy_quantile=0.3),
}
TOKEN_LEVEL = [name for name, config in CONFIGS.items() if config.route == "fused"]
ADDITIVE = [  # all but those of batch statistics
    name
    for name, config in CONFIGS.items()
    if not (config.loss_type.endswith("_cov") or config.entropy_coef or config.top_entropy_quantile < 1)
]


def new_batch(B=8, T=9, spread=0.3):
    logp = -torch.rand(B, T) * 4
    mask = torch.rand(B, T) > 0.3
    if B > 2:
        mask[2] = False  # a sequence without scored tokens
    old, ref, sampling = ((logp + spread * torch.randn(B, T)).clamp(max=-1e-3) for _ in range(3))
    sampling[0, :2] = math.nan  # unknown to the sampler
    mask[0, :2] = True
    return SimpleNamespace(
        logp=logp, advantages=torch.randn(B), old=old, ref=ref, sampling=sampling, mask=mask,
        entropy=torch.rand(B, T) * 3,
    )  # fmt: skip


def arguments(batch, at=slice(None)):
    named = dict(old_logp=batch.old, ref_logp=batch.ref, sampling_logp=batch.sampling, mask=batch.mask,
                 entropy=batch.entropy)  # fmt: skip
    return {name: None if tensor is None else tensor[at] for name, tensor in named.items()}


def loss_and_grad(config, batch, **changed):
    leaf = batch.logp.clone().requires_grad_()
    out = rf.policy_loss(leaf, batch.advantages, **{**arguments(batch), "config": config, **changed})
    out.loss.backward()
    return out, leaf.grad


@pytest.mark.parametrize("name", CONFIGS)
def test_every_loss_and_its_gradient_is_its_formula(name):
    config, batch = CONFIGS[name], new_batch()
    out, grad = loss_and_grad(config, batch, step=3, seed=5)
    hand = loss_by_hand(config, batch.logp.double(), batch.logp.double(), batch, step=3, seed=5)
    assert out.loss.item() == pytest.approx(hand.loss, rel=2e-6, abs=2e-7) and abs(hand.loss) > 1e-3
    checked = 0
    for at in [token for mine in hand.of.values() for token in mine]:
        step = torch.zeros(8, 9).double()
        step[at] = 1e-6
        up, down = (
            loss_by_hand(config, batch.logp.double() + s * step, batch.logp.double(), batch, step=3, seed=5).loss
            for s in (1, -1)
        )
        assert grad[at].item() == pytest.approx((up - down) / 2e-6, rel=1e-4, abs=1e-6)
        checked += abs(up - down) / 2e-6 > 1e-4
    assert checked >= 6 and (grad[~batch.mask] == 0).all()


def acts(config, hand):
    """Whether each option of the config takes something away in this batch, and leaves something."""
    tokens = sum(map(len, hand.of.values()))
    if config.correction != "none":
        yield 0 < sum(hand.q[i] in (0.0, config.correction_cap) for i in hand.q) < tokens
    if config.off_policy_mask_threshold is not None:
        yield 0 < len(hand.on_policy) < tokens
    if config.top_entropy_quantile < 1:
        yield 0 < len(hand.kept) < tokens
    if config.loss_type.endswith("_cov"):
        yield 1 < len(hand.chosen) < tokens / 2
    if config.loss_type == "vespo":
        yield max(hand.phi.values()) > 2 * min(hand.phi.values())
    elif config.loss_type == "cispo":
        yield 0 < len(hand.above) < tokens
    elif config.loss_type not in ("sapo", "gpg", "reinforce", "dro", "kl_cov"):
        yield hand.below and (hand.above or config.delta == 1.05) and len(hand.below | hand.above) < tokens


@pytest.mark.parametrize("name", CONFIGS)
def test_metrics_are_trl_keys_and_their_definitions(name):
    config, batch = CONFIGS[name], new_batch()
    batch.advantages[4] = 0.0
    out, _ = loss_and_grad(config, batch)
    hand = loss_by_hand(config, batch.logp.double(), batch.logp.double(), batch)
    assert all(acts(config, hand)), "an option that does nothing here: the case tests nothing"
    whole = config.importance == "sequence" or config.loss_type in ("gspo", "rloo")

    def share(chosen, mine):
        return sum(i in chosen for i in mine) / len(mine) if mine else 0.0

    def mean(chosen):
        tokens = sum(hand.of.values(), [])
        return sum(share(chosen, mine) for mine in hand.of.values()) / 8 if whole else share(chosen, tokens)

    expected = {"entropy": batch.entropy[batch.mask].mean().item(), "policy/on_policy": 0.0}
    if config.loss_type == "cispo":
        expected["cispo_clip_ratio"] = mean(hand.above)
    elif config.loss_type == "vespo":
        expected["vespo/phi_seq_mean"] = sum(hand.phi[mine[0]] if mine else 1.0 for mine in hand.of.values()) / 8
    elif config.loss_type not in ("sapo", "gpg", "reinforce", "dro", "kl_cov"):
        expected["clip_ratio/low_mean"], expected["clip_ratio/high_mean"] = mean(hand.below), mean(hand.above)
        expected["clip_ratio/region_mean"] = mean(hand.below | hand.above)
        expected["clip_ratio/low_min"] = min(share(hand.below, mine) for mine in hand.of.values() if mine or whole)
        expected["clip_ratio/high_max"] = max(share(hand.above, mine) for mine in hand.of.values())
    if config.beta:
        expected["kl"] = hand.kl
    if config.entropy_coef:
        expected["policy_loss"] = loss_by_hand(
            replace(config, entropy_coef=0.0), batch.logp.double(), batch.logp.double(), batch
        ).loss
    ratios = [math.exp(min(max(x, -20), 20)) for x in hand.exponents.values()]
    expected["ratio/mean"] = sum(ratios) / len(ratios)
    expected["ratio/max_abs_dev"] = max(abs(r - 1) for r in ratios)
    expected["ratio/overflow_frac"] = mean({i for i in hand.exponents if abs(hand.exponents[i]) > 20})
    if config.correction != "none":
        gap = (batch.old - batch.sampling)[batch.mask].abs()
        expected["sampling/sampling_logp_difference/mean"] = gap.nanmean().item()
        expected["sampling/sampling_logp_difference/max"] = gap.nan_to_num().max().item()
        q = [hand.q[mine[0]] if mine else 1.0 for mine in hand.of.values()]
        q = q if "sequence" in config.correction else list(hand.q.values())
        expected["sampling/importance_sampling_ratio/mean"] = sum(q) / len(q)
        expected["sampling/importance_sampling_ratio/min"] = min(hand.q.values())
        expected["sampling/importance_sampling_ratio/max"] = max(hand.q.values())
    assert {key: value.item() for key, value in out.metrics.items()} == pytest.approx(expected, rel=1e-5, abs=1e-6)
    assert not any(value.requires_grad or value.ndim for value in out.metrics.values())


@pytest.mark.parametrize(
    ("options", "least"), [({}, 0.5), ({"importance": "sequence"}, 0.0), ({"loss_type": "rloo"}, 0.0)]
)
def test_the_least_share_of_clipped_tokens_with_a_sequence_without_tokens(options, least):
    """As in TRL: it has no share of clipped tokens; where the ratio is the sequence's, its own is not clipped."""
    logp, old, mask = torch.full((3, 2), -2.0), torch.tensor([[-1.0, -2.0]] * 3), torch.tensor([[1, 1], [0, 0], [1, 1]])
    out = rf.policy_loss(logp, -torch.ones(3), old_logp=old, mask=mask, config=rf.LossConfig(**options))
    assert out.metrics["clip_ratio/low_min"] == least and out.metrics["clip_ratio/low_mean"] > 0


@pytest.mark.parametrize("name", TOKEN_LEVEL)
@pytest.mark.parametrize("spread", [0.0, 0.3, 30.0])
@pytest.mark.parametrize("on_policy", [False, True])
def test_the_fused_coefficient_is_the_derivative_of_policy_loss(name, spread, on_policy):
    config, batch = CONFIGS[name], new_batch(8, 50, spread)
    batch.advantages = torch.randn(8, 50)  # both signs at each edge
    for row, edge in zip((0, 1, 3), (*config.clip_range, config.delta or config.dual_clip or 1.3)):
        if math.isfinite(edge) and edge > 0:  # at the clip edges too, where the tie rules act
            batch.old[row] = batch.logp[row] - torch.tensor(edge).log()
    batch.advantages[4] = 0.0
    batch.old = None if on_policy else batch.old
    out, expected = loss_and_grad(config, batch)
    rows = Rows.check(batch.logp, batch.advantages, batch.old, batch.ref, batch.sampling, batch.mask, None, config,
                      None, 0, 0)  # fmt: skip
    values, slopes = token_coefficients(
        config, batch.logp.flatten(), rows.advantages, rows.old_logp, rows.ref_logp, rows.sampling_logp
    )
    weights = rows.weights(None)
    loss, grad = torch.where(rows.mask, weights * values, 0).sum(), torch.where(rows.mask, weights * slopes, 0)
    torch.testing.assert_close(loss, out.loss.detach(), rtol=1e-5, atol=1e-6)
    # At a spread of 30 the corrected KL's two terms of size e^40 cancel in float32, in either form.
    floor = 1e-6 * expected.abs().max().item() if spread == 30 else 1e-9
    torch.testing.assert_close(grad.view_as(expected), expected, rtol=1e-5, atol=floor)
    assert expected.abs().max() > 1e-4


def exactly(r, **options):
    """A config whose upper bound is the float32 number exp(0.25), or whose lower one is exp(-0.25)."""
    edge = torch.tensor(r).exp().item()
    return rf.LossConfig(epsilon_high=edge - 1, **options) if r > 0 else rf.LossConfig(epsilon_low=1 - edge, **options)


@pytest.mark.parametrize(
    ("config", "log_ratio", "advantage", "share"),  # of -A r, the unclipped gradient: at the edge, and an ulp past it
    [
        (exactly(0.25), 0.25, 1.0, (1.0, 0.0)),
        (exactly(0.25), 0.25, -1.0, (1.0, 1.0)),
        (exactly(-0.25), -0.25, -1.0, (1.0, 0.0)),
        (exactly(-0.25), -0.25, 1.0, (1.0, 1.0)),
        (exactly(0.25, loss_type="gspo"), 0.25, 1.0, (1.0, 0.0)),
        (exactly(-0.25, loss_type="gspo_token"), -0.25, -1.0, (1.0, 0.0)),
        (exactly(0.25, loss_type="rloo"), 0.25, 1.0, (1.0, 0.0)),
        (rf.LossConfig("gmpo", epsilon_high=0.25), 0.25, 1.0, (1.0, 0.0)),
        (rf.LossConfig("gmpo", epsilon_low=0.25), -0.25, -1.0, (1.0, 0.0)),
        (rf.LossConfig(delta=torch.tensor(0.25).exp().item()), 0.25, -1.0, (1.0, 0.0)),
        (rf.LossConfig(dual_clip=torch.tensor(0.25).exp().item()), 0.25, -1.0, (0.5, 0.0)),
        (rf.LossConfig("kl_cov"), 20.0, 1.0, (1.0, 0.0)),  # the clamp of what is exponentiated
        (rf.LossConfig("kl_cov"), -20.0, 1.0, (1.0, 0.0)),
    ],
)
def test_ties_follow_the_documented_subgradient(config, log_ratio, advantage, share):
    for past, expected in zip((False, True), share):
        old = torch.tensor([-log_ratio])
        if past:
            old = torch.nextafter(old, old.sign() * torch.inf)
            old = torch.nextafter(old, old.sign() * torch.inf) if abs(log_ratio) < 1 else old  # exp rounds one away
        logp = torch.zeros(1, requires_grad=True)
        out = rf.policy_loss(logp, torch.tensor([advantage]), old_logp=old, config=config)
        out.loss.backward()
        slope = -advantage * torch.exp(-old) * expected
        torch.testing.assert_close(logp.grad, slope + (config.loss_type == "kl_cov") * math.copysign(1, log_ratio))


@pytest.mark.parametrize("loss_type", ["dppo_tv", "dppo_kl"])
@pytest.mark.parametrize("advantage", [1.0, -1.0])
def test_dppo_keeps_a_token_at_its_bound(loss_type, advantage):
    """epsilon 0 and on policy: a divergence of exactly 0 is kept, anything towards the advantage is not."""
    config = rf.LossConfig(loss_type, epsilon_low=0.0)
    for shift, expected in ((0.0, -advantage), (-0.01 * advantage, 0.0), (0.01 * advantage, None)):
        logp = torch.tensor([-0.5], requires_grad=True)
        rf.policy_loss(logp, torch.tensor([advantage]), old_logp=logp.detach() + shift, config=config).loss.backward()
        expected = -advantage * math.exp(-shift) if expected is None else expected
        assert logp.grad.item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("name", CONFIGS)
def test_on_policy_the_ratio_is_exactly_one(name):
    config, batch = CONFIGS[name], new_batch()
    config = replace(config, beta=0.0, entropy_coef=0.0, correction="none", top_entropy_quantile=1.0,
                     off_policy_mask_threshold=None)  # fmt: skip
    batch.old = None
    out, grad = loss_and_grad(config, batch)
    if config.loss_type == "vespo":
        assert out.metrics["vespo/phi_seq_mean"] == 1
    assert out.metrics["ratio/max_abs_dev"] == 0 and out.metrics["policy/on_policy"] == 1
    if config.loss_type == "clip_cov":
        return
    rows = Rows.check(batch.logp, batch.advantages, None, None, None, batch.mask, None, config, None, 0, 0)
    per_token = rows.layout.spread(rows.layout.sum(rows.mask.float())).view_as(grad)
    scale = per_token if config.loss_type == "rloo" else 1.0  # d exp(sum) / dlogp is 1, not 1 / |o|
    expected = -batch.advantages[:, None] * rows.weights(None).view_as(grad) * scale
    torch.testing.assert_close(grad, expected, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("name", CONFIGS)
def test_packed_equals_padded_and_masked_positions_are_never_read(name):
    config, batch = CONFIGS[name], new_batch()
    out, grad = loss_and_grad(config, batch)
    at = batch.mask
    packed = batch.logp[at].requires_grad_()
    same = rf.policy_loss(
        packed, batch.advantages, **{**arguments(batch, at), "mask": None}, config=config,
        cu_seqlens=torch.nn.functional.pad(at.sum(1).cumsum(0), (1, 0)),
    )  # fmt: skip
    same.loss.backward()
    torch.testing.assert_close(same.loss, out.loss)
    torch.testing.assert_close(packed.grad, grad[at])
    assert same.metrics.keys() == out.metrics.keys()
    for key in out.metrics:
        torch.testing.assert_close(same.metrics[key], out.metrics[key])

    poison = torch.tensor([math.nan, math.inf, -math.inf])[torch.randint(3, at.shape)]
    dirty = SimpleNamespace(**vars(batch))
    for field in ("logp", "old", "ref", "sampling", "entropy"):
        setattr(dirty, field, torch.where(at, getattr(batch, field), poison))
    dirty.advantages = torch.where(at, batch.advantages[:, None], poison)
    again, dirty_grad = loss_and_grad(config, dirty)
    assert torch.equal(again.loss, out.loss) and torch.equal(dirty_grad, grad)
    for key in out.metrics:
        assert torch.equal(again.metrics[key], out.metrics[key])


NORMALIZERS = (None, 0, 0.0, -1.0, math.nan, math.inf, 5.0, torch.tensor(0), torch.tensor(math.nan), torch.tensor(5.0))


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("empty", [False, True])
def test_a_fully_masked_batch_is_exactly_zero_with_a_graph_whatever_the_normalizer(name, empty):
    batch = new_batch(8, 0) if empty else new_batch()
    batch.mask = torch.zeros_like(batch.mask)
    for normalizer in (*NORMALIZERS, batch.mask.sum()):
        out, grad = loss_and_grad(CONFIGS[name], batch, normalizer=normalizer)
        assert out.loss == 0 and grad is not None and (grad == 0).all(), normalizer
        assert all(torch.isfinite(value) for value in out.metrics.values())
        assert out.metrics.get("clip_ratio/low_min", 0) == 0


def test_a_normalizer_that_is_not_above_0_is_refused_beside_scored_tokens(monkeypatch):
    batch = new_batch()
    for normalizer in (0, -1, math.nan, math.inf, torch.tensor(0), torch.tensor(-1.0), torch.tensor(math.nan)):
        with pytest.raises(ValueError, match="^normalizer must be finite and above 0 where tokens are scored, got "):
            loss_and_grad(rf.LossConfig(), batch, normalizer=normalizer)
    monkeypatch.setattr("redit_fast.losses.rows._readable", lambda tensor: False)  # as on a GPU
    for normalizer in (0, torch.tensor(0.0)):
        assert not loss_and_grad(rf.LossConfig(), batch, normalizer=normalizer)[0].loss.isfinite()
    assert loss_and_grad(rf.LossConfig(), batch, normalizer=-1)[0].loss != 0


def test_only_batch_statistics_keep_a_loss_type_from_adding_up():
    assert {CONFIGS[name].loss_type for name in ADDITIVE} == {*get_args(LossType)} - {"clip_cov", "kl_cov"}


def denominator(config, batch, rows=slice(None)):
    mask = batch.mask[rows]
    return {"sequences": len(mask), "tokens": mask.sum(), "length": 9 * len(mask)}[config.denominator]


@pytest.mark.parametrize("name", ADDITIVE)
def test_micro_batches_add_up_whatever_their_size_and_order(name):
    config, batch = CONFIGS[name], new_batch(16, 9)

    def summed(order, size):
        leaf, total = batch.logp.clone().requires_grad_(), 0.0
        for rows in order.split(size):
            out = rf.policy_loss(
                leaf[rows], batch.advantages[rows], **arguments(batch, rows), config=config,
                normalizer=denominator(config, batch),
            )  # fmt: skip
            out.loss.backward()
            total += out.loss.item()
        return total, leaf.grad

    loss, grad = summed(torch.arange(16), 16)
    whole, whole_grad = loss_and_grad(config, batch)
    assert loss == pytest.approx(whole.loss.item(), rel=1e-5) and grad.abs().max() > 1e-3
    torch.testing.assert_close(grad, whole_grad, rtol=1e-5, atol=1e-9)
    for order, size in ((torch.arange(16), 4), (torch.arange(16), 1), (torch.randperm(16), 4)):
        other_loss, other_grad = summed(order, size)
        assert other_loss == pytest.approx(loss, rel=1e-5, abs=1e-6)
        torch.testing.assert_close(other_grad, grad, rtol=1e-5, atol=1e-9)


def two_ranks(store):
    """Half of every loss on each; run by the test below."""
    other = os.fork()  # after the imports, which take seconds, and before any thread
    rank = 0 if other else 1
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    mine = slice(8 * rank, 8 * rank + 8)
    for name in ADDITIVE:
        config, batch = CONFIGS[name], new_batch(16, 9)
        normalizer = torch.as_tensor(denominator(config, batch, mine))
        torch.distributed.all_reduce(normalizer)
        theta, whole = (torch.ones(9, requires_grad=True) for _ in range(2))  # parameters that every sequence shares
        losses = [
            rf.policy_loss(
                leaf * batch.logp[rows], batch.advantages[rows], **arguments(batch, rows), config=config, normalizer=n
            ).loss
            for leaf, rows, n in ((theta, mine, normalizer), (whole, slice(None), None))
        ]
        sum(losses).backward()
        for part, total in ((losses[0].detach(), losses[1].detach()), (theta.grad, whole.grad)):
            torch.distributed.all_reduce(part)
            assert total.abs().max() > 1e-3
            torch.testing.assert_close(part, total, rtol=1e-5, atol=1e-6 * total.abs().max().item())
    meet_and_end(other)


def test_two_ranks_sum_to_the_single_process_gradient(tmp_path):
    script = "import sys; from tests.losses.test_losses import two_ranks; two_ranks(sys.argv[1])"
    command = [sys.executable, "-c", "import torch; torch.manual_seed(0); " + script, tmp_path / "store"]
    done = subprocess.run(command, cwd=ROOT, stderr=subprocess.PIPE, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", CONFIGS)
def test_huge_log_ratios_are_finite(name):
    batch = new_batch()
    batch.logp[0] -= 1e4
    batch.old[1] -= 1e4
    batch.ref[3, ::2] -= 1e4
    batch.sampling[4] -= 1e4
    batch.sampling[5, 0] = -math.inf
    batch.sampling[7] = batch.old[7]
    out, grad = loss_and_grad(CONFIGS[name], batch)
    assert torch.isfinite(out.loss) and torch.isfinite(grad).all() and grad.abs().max() > 1e-6
    assert all(torch.isfinite(value) for value in out.metrics.values())
    assert out.metrics["ratio/overflow_frac"] > 0


def test_outside_the_clamp_nothing_passes_and_at_its_bound_all():
    logp = torch.tensor([[-1.0, -1e4, -3.0, -25.0]], requires_grad=True)
    old, ref = torch.tensor([[-1e4, -1.0, -3.0, -5.0]]), torch.tensor([[-1.0, 0.0, -1e4, -5.0]])
    out = rf.policy_loss(logp, torch.tensor([-1.0]), old_logp=old, ref_logp=ref, config=rf.LossConfig(beta=0.1))
    out.loss.backward()
    assert out.metrics["ratio/overflow_frac"] == 0.5
    assert logp.grad[0, 0] == 0 and logp.grad[0, 3] != 0


@pytest.mark.parametrize(
    ("log_ratios", "gaps", "log_w"), [((25.0, -18.0), (0.0, 0.0), 2.0), ((2.0, 19.5), (0.0, 9.0), 1.5)]
)
def test_vespo_limits_each_log_weight_before_the_sum(log_ratios, gaps, log_w):
    """A masked token is e^-20 in the weight, not 0."""
    config = rf.LossConfig("vespo", correction="token_mask", vespo_k_pos=0.5, vespo_lambda_pos=0.1)
    logp, old = torch.tensor([-30.0, -30.0]), torch.tensor([-30.0, -30.0]) - torch.tensor(log_ratios)
    out = rf.policy_loss(logp, torch.ones(1), old_logp=old, sampling_logp=old - torch.tensor(gaps), config=config)
    phi = math.exp(0.1 + 0.5 * log_w - 0.1 * math.exp(log_w))
    assert out.metrics["vespo/phi_seq_mean"].item() == pytest.approx(phi, rel=1e-5)


@pytest.mark.parametrize("correction", ["token_truncate", "sequence_truncate"])
def test_a_correction_without_a_cap_is_limited_by_the_clamp(correction):
    config, logp = rf.LossConfig("gpg", correction=correction, correction_cap=math.inf), -torch.ones(1)
    out = rf.policy_loss(logp, torch.ones(1), old_logp=logp, sampling_logp=logp - 100, config=config)
    assert out.loss.item() == pytest.approx(math.exp(20), rel=1e-5)


def test_low_precision_logp_is_computed_in_float32_with_one_rounding():
    batch = new_batch()
    low = batch.logp.bfloat16().requires_grad_()
    wide = low.detach().float().requires_grad_()
    for leaf in (low, wide):
        rf.policy_loss(leaf, batch.advantages, **arguments(batch), config=rf.LossConfig()).loss.backward()
    assert torch.equal(low.grad, wide.grad.bfloat16())


class NoSynchronisation(TorchDispatchMode):
    """Refuses what would make the host wait for a device, or draw from torch's generator."""

    FORBIDDEN = ("_local_scalar_dense", "nonzero", "masked_select", "index", "equal", "rand", "randperm", "unique")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func.overloadpacket.__name__ not in self.FORBIDDEN, func
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", CONFIGS)
def test_nothing_waits_for_the_device(name, monkeypatch):
    monkeypatch.setattr("redit_fast.losses.rows._readable", lambda tensor: False)  # as on a GPU
    batch = new_batch()
    with NoSynchronisation():
        loss_and_grad(CONFIGS[name], batch, normalizer=torch.tensor(5.0))
        with pytest.raises(AssertionError, match="_local_scalar_dense"):
            batch.logp.sum().item()


def test_clip_cov_draws_by_seed_and_step():
    batch = new_batch()
    losses = [
        loss_and_grad(CONFIGS["clip_cov"], batch, seed=seed, step=step)[0].loss.item()
        for seed, step in [(0, 0), (0, 0), (1, 0), (0, 1)]
    ]
    assert losses[0] == losses[1] and len(set(losses)) == 3
    for name, value in (("seed", -1), ("step", 2**32), ("step", 1.0)):
        with pytest.raises((ValueError, TypeError), match=name):
            loss_and_grad(CONFIGS["clip_cov"], batch, **{name: value})


def test_clip_cov_drops_only_tokens_between_its_bounds():
    """Two tokens with a covariance of exactly 1."""
    logp, advantages = torch.tensor([[-1.0], [-3.0]]), torch.tensor([1.0, -1.0])
    kept = [
        rf.policy_loss(logp, advantages, config=rf.LossConfig("clip_cov", clip_cov_lb=lb, clip_cov_ub=ub)).loss == 0
        for lb, ub in [(0.9, 1.1), (1.0, 1.1), (0.9, 1.0)]
    ]
    assert kept == [False, True, True]  # the kept losses are -1 and 1


def test_the_entropy_quantile_is_torch_quantile_and_keeps_ties():
    batch, every = new_batch(4, 25), torch.arange(1, 100) / 100
    batch.mask = torch.ones_like(batch.mask)
    batch.entropy = torch.randint(30, (4, 25)).float()
    for share in every.tolist():
        config = rf.LossConfig("reinforce", top_entropy_quantile=share)
        kept = loss_and_grad(config, batch)[1] != 0
        assert torch.equal(kept, batch.entropy >= torch.quantile(batch.entropy, 1 - share))


def test_the_off_policy_mask_falls_back_to_the_old_policy_and_to_none():
    config, batch = CONFIGS["dapo-off-policy"], new_batch()
    batch.sampling = batch.old
    with_old, _ = loss_and_grad(config, batch)
    batch.sampling = None
    assert torch.equal(loss_and_grad(config, batch)[0].loss, with_old.loss)
    assert with_old.loss != loss_and_grad(rf.LossConfig(), batch)[0].loss
    batch.old = None
    for threshold in (0.05, 0.0):  # a drift of exactly the threshold is kept
        config = rf.LossConfig("dapo", off_policy_mask_threshold=threshold)
        assert torch.equal(loss_and_grad(config, batch)[0].loss, loss_and_grad(rf.LossConfig(), batch)[0].loss)


def test_a_correction_that_may_be_missing_is_off_without_sampling_logp():
    batch = new_batch()
    optional = rf.LossConfig("dapo", correction="sequence_mask", _correction_optional=True)
    with_it, _ = loss_and_grad(optional, batch)
    plain, _ = loss_and_grad(rf.LossConfig("dapo"), batch)
    assert with_it.loss != plain.loss and "sampling/importance_sampling_ratio/mean" in with_it.metrics
    batch.sampling = None
    without, _ = loss_and_grad(optional, batch)
    assert torch.equal(without.loss, plain.loss) and without.metrics.keys() == plain.metrics.keys()


def test_bad_arguments_get_one_sentence_that_names_them():
    batch = new_batch()
    good = dict(arguments(batch), config=rf.LossConfig())
    for change, name in [
        ({"old_logp": batch.old[:, 1:]}, "old_logp"),
        ({"sampling_logp": batch.old[:, 1:]}, "sampling_logp"),
        ({"mask": batch.mask[0]}, "mask"),
        ({"entropy": batch.entropy[0]}, "entropy"),
        ({"config": rf.LossConfig(beta=0.1), "ref_logp": None}, "ref_logp"),
        ({"config": rf.LossConfig(entropy_coef=0.1), "entropy": None}, "entropy"),
        ({"config": rf.LossConfig(top_entropy_quantile=0.1), "entropy": None}, "entropy"),
        ({"config": rf.LossConfig(correction="token_mask"), "sampling_logp": None}, "sampling_logp"),
        ({"config": rf.LossConfig("dr_grpo")}, "max_completion_length"),
        ({"config": "dapo"}, "config"),
        ({"normalizer": torch.ones(2)}, "normalizer"),
        ({"cu_seqlens": torch.tensor([0, 6])}, "cu_seqlens"),
    ]:
        with pytest.raises((ValueError, TypeError), match=name) as caught:
            rf.policy_loss(batch.logp, batch.advantages, **{**good, **change})
        assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="advantages"):
        rf.policy_loss(batch.logp, batch.advantages[:-1], **good)
    for dtype in (torch.int64, torch.int32, torch.uint8, torch.uint16, torch.uint32, torch.uint64):
        logp = batch.logp.detach().flatten()

        def packed(ends, logp=logp, dtype=dtype):
            cu_seqlens = torch.tensor(ends).to(dtype)
            return rf.policy_loss(logp, torch.ones(len(ends) - 1), cu_seqlens=cu_seqlens, config=rf.LossConfig()).loss

        assert packed([0, 5, 30, 72]) == pytest.approx(-1)
        for ends in ([0, 5, 3, 72], [1, 72], [0, 50]):
            with pytest.raises(ValueError, match="cu_seqlens"):
                packed(ends)
