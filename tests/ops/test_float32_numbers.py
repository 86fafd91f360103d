"""Numbers that a float64 holds and the kernels' float32 does not: refused, or harmless."""

from fractions import Fraction

import pytest
import torch

import redit_fast as rf

LOGITS, TARGETS = torch.randn(2, 3, 7), torch.randint(7, (2, 3))
ADVANTAGES = torch.tensor([1.0, -1.0])


@pytest.mark.parametrize("name", ["temperature", "logit_scale", "softcap"])
@pytest.mark.parametrize("value", [1e-46, 1e-39, 1e39, Fraction(1, 10**400)])
def test_a_logit_transform_is_a_float32(name, value):
    for function in (lambda **transform: rf.token_logp(LOGITS, TARGETS, **transform), rf.LossConfig):
        with pytest.raises(ValueError, match=f"^{name} must be finite and above 0( in float32, which .*)?, got "):
            function(**{name: value})


@pytest.mark.parametrize(
    ("transform", "quotient"),
    [
        ({"logit_scale": 1e30, "temperature": 1e-30}, "logit_scale / temperature"),
        ({"logit_scale": 1e-30, "temperature": 1e30}, "logit_scale / temperature"),
        ({"logit_scale": 1e-20, "softcap": 1e20}, "logit_scale / softcap"),
        ({"softcap": 1e20, "temperature": 1e-20}, "softcap / temperature"),
    ],
)
def test_so_are_the_quotients_that_the_kernels_take(transform, quotient):
    for function in (lambda **transform: rf.token_logp(LOGITS, TARGETS, **transform), rf.LossConfig):
        with pytest.raises(ValueError, match=f"^{quotient} must be finite and above 0 in float32, which the kernels"):
            function(**transform)


@pytest.mark.parametrize(
    ("name", "loss_type"),
    [("delta", "dapo"), ("sapo_temperature_pos", "sapo"), ("vespo_lambda_neg", "vespo"), ("dro_beta", "dro")],
)
def test_a_factor_that_float32_takes_for_0_is_refused(name, loss_type):
    with pytest.raises(
        ValueError, match=f"^{name} must be finite and above 0 in float32, which the kernels .*got 1e-5"
    ):
        rf.LossConfig(loss_type=loss_type, **{name: 1e-50})


@pytest.mark.parametrize("name", ["beta", "entropy_coef", "epsilon_high", "off_policy_mask_threshold"])
def test_a_number_that_float32_takes_for_infinite_is_refused(name):
    with pytest.raises(ValueError, match=f"^{name} must be finite.* in float32, which the kernels compute in, got 1e"):
        rf.LossConfig(**{name: 1e200})


@pytest.mark.parametrize("name", ["epsilon", "max_norm", "perturb_max_norm"])
def test_so_is_a_setting_of_gr(name):
    params = [torch.zeros(2, requires_grad=True)]
    for optimizer, of in ((rf.RegularizedAdamW, params), (rf.GradientRegularizer, torch.optim.SGD(params, 0.1))):
        with pytest.raises(ValueError, match=f"^{name} must be finite and above 0 in float32"):
            optimizer(of, **{name: 1e-50})


@pytest.mark.parametrize(
    "normalizer", [10**400, 10**5000, Fraction(10**400), 1e-50, 1e300, 0, -1, float("nan")], ids=range(8)
)
@pytest.mark.parametrize("loss_type", ["dapo", "grpo", "gspo"])
def test_without_a_scored_token_the_loss_is_0_whatever_the_normalizer(normalizer, loss_type):
    mask, config = torch.zeros(2, 3), rf.LossConfig(loss_type=loss_type)
    for function, x in ((rf.grpo_loss, (LOGITS, TARGETS)), (rf.policy_loss, (LOGITS[..., 0],))):
        leaf = x[0].clone().requires_grad_()
        out = function(leaf, *x[1:], ADVANTAGES, mask=mask, config=config, normalizer=normalizer)
        out.loss.backward()
        assert out.loss.item() == 0 and not leaf.grad.any()
