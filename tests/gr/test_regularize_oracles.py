"""The regularised gradient against closed forms: exact Hessians and double backward in float64, and the traps of the
published description.
"""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import redit_fast as rf
from tests.conftest import skip_float64
from tests.gr.test_regularize import Quadratic, one_step, sgd


class LogisticRegression(nn.Module):
    def __init__(self, dtype=torch.float64):
        super().__init__()
        self.features = torch.randn(40, 6, dtype=torch.float64).to(dtype)
        self.labels = (torch.rand(40) < 0.5).to(dtype)
        self.weight = nn.Parameter(torch.randn(6, dtype=torch.float64).to(dtype))

    def forward(self):
        return F.binary_cross_entropy_with_logits(self.features @ self.weight, self.labels)


class Transformer(nn.Module):
    """Two layers, of which the embedding and the head are not perturbed; the loss is a policy gradient's surrogate."""

    def __init__(self, dtype=torch.float64):
        super().__init__()
        self.tokens, self.targets = torch.randint(0, 11, (2, 3, 5))
        self.advantages = torch.randn(3, 1, dtype=torch.float64).to(dtype)
        self.embedding = nn.Embedding(11, 8)
        self.query_key_value = nn.ParameterList(torch.randn(8, 24) / 3 for _ in range(2))
        self.up = nn.ParameterList(torch.randn(8, 16) / 3 for _ in range(2))
        self.down = nn.ParameterList(torch.randn(16, 8) / 4 for _ in range(2))
        self.head = nn.Linear(8, 11)
        self.to(dtype)

    def forward(self):
        x = self.embedding(self.tokens)
        mask = torch.full((5, 5), -math.inf, dtype=x.dtype).triu(1)
        for qkv, up, down in zip(self.query_key_value, self.up, self.down):
            q, k, v = (F.layer_norm(x, (8,)) @ qkv).chunk(3, -1)
            x = x + (q @ k.mT / 8**0.5 + mask).softmax(-1) @ v
            x = x + F.gelu(F.layer_norm(x, (8,)) @ up) @ down
        logp = self.head(x).log_softmax(-1).gather(-1, self.targets[..., None])[..., 0]
        return -(logp * self.advantages).mean()

    def groups(self):
        outside = [*self.embedding.parameters(), *self.head.parameters()]
        inside = [*self.query_key_value, *self.up, *self.down]
        return [{"params": inside}, {"params": outside, "perturb": False}]


def groups_of(model):
    return model.groups() if isinstance(model, Transformer) else [{"params": list(model.parameters())}]


def flat(tensors):
    return torch.cat([tensor.detach().double().flatten() for tensor in tensors])


def double_backward(model, normalized=False):
    """g1 on all parameters, and the gradient there of |grad_P L|^2 / 2, or of |grad_P L|."""
    groups = groups_of(model)
    params = [p for group in groups for p in group["params"]]
    grads = torch.autograd.grad(model(), params, create_graph=True)
    inside = groups[0]["params"]
    square = sum(g.square().sum() for g in grads[: len(inside)])
    penalty = torch.autograd.grad(square.sqrt() if normalized else square / 2, params)
    return flat(grads), flat(penalty)


def applied_gradient(model, **options):
    """What SGD at a learning rate of 1 moves by."""
    groups = groups_of(model)
    params = [p for group in groups for p in group["params"]]
    before = [p.detach().clone() for p in params]
    one_step(sgd(groups, perturb_max_norm=1e9, **options), model)
    after = flat(params)
    with torch.no_grad():
        for p, old in zip(params, before):
            p.copy_(old)
    return flat(before) - after


def test_the_penaltys_gradient_is_the_hessian_of_logistic_regression_times_its_gradient(backend):
    skip_float64(backend)
    model = LogisticRegression()
    theta = model.weight.detach()

    def loss(w):
        return F.binary_cross_entropy_with_logits(model.features @ w, model.labels)

    hessian = torch.autograd.functional.hessian(loss, theta)
    gradient = torch.autograd.functional.jacobian(loss, theta)
    for keep in (False, True):
        ours = applied_gradient(model, gamma=10.0, epsilon=1e-7, keep_first_grad=keep)
        expected = gradient + 10 * hessian @ gradient
        assert (10 * hessian @ gradient).norm() > 0.2 * gradient.norm()
        assert (ours - expected).norm() < 1e-6 * expected.norm()


@pytest.mark.parametrize("normalized", [False, True])
def test_the_penaltys_gradient_is_double_backward_through_a_transformer(backend, normalized):
    """On all parameters, embedding and head too, though they are not perturbed: that norm depends on them."""
    skip_float64(backend)
    model = Transformer()
    first, penalty = double_backward(model, normalized)
    gamma = (first.norm() / penalty.norm()).item()  # as large as the gradient itself
    outside = sum(p.numel() for p in groups_of(model)[1]["params"])
    assert penalty[-outside:].norm() > 0.05 * penalty.norm()
    for keep in (False, True):
        ours = applied_gradient(model, gamma=gamma, epsilon=1e-7, normalized=normalized, keep_first_grad=keep)
        expected = first + gamma * penalty
        assert (ours - expected).norm() < 1e-6 * expected.norm()
        assert (ours - expected)[-outside:].norm() < 1e-6 * expected[-outside:].norm()


def test_the_finite_difference_error_falls_linearly_in_epsilon(backend):
    skip_float64(backend)
    model = Transformer()
    first, penalty = double_backward(model)
    epsilons = [1e-2, 3e-3, 1e-3, 3e-4, 1e-4]
    errors = []
    for epsilon in epsilons:
        measured = (applied_gradient(model, gamma=1.0, epsilon=epsilon, keep_first_grad=True) - first) - penalty
        errors.append((measured.norm() / penalty.norm()).item())
    x, y = torch.tensor(epsilons).log(), torch.tensor(errors).log()
    slope = ((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum()
    assert 0.97 < slope < 1.03 and 1e-6 < errors[-1] < errors[0] < 1


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("kind", [LogisticRegression, Transformer])
def test_in_float32_the_error_is_that_of_the_same_formula_in_plain_float32(backend, kind, keep):
    """Against double backward in float64 on the same weights: at most 1.25 times torch's, written by hand."""
    model = kind(torch.float32)
    gamma, epsilon = 0.3, 1e-2
    groups = groups_of(model)
    params = [p for group in groups for p in group["params"]]
    start = [p.detach().clone() for p in params]
    ours = applied_gradient(model, gamma=gamma, epsilon=epsilon, keep_first_grad=keep)
    first = torch.autograd.grad(model(), params)
    with torch.no_grad():
        for p, g in zip(groups[0]["params"], first):
            p += epsilon * g
    second = torch.autograd.grad(model(), params)
    with torch.no_grad():
        for p, old in zip(params, start):
            p.copy_(old)
    by_hand = flat(b + (1 - gamma / epsilon) * (a - b) for a, b in zip(first, second))
    model = model.double()
    for name, value in vars(model).items():
        if torch.is_tensor(value) and value.is_floating_point():
            setattr(model, name, value.double())
    g1, penalty = double_backward(model)
    expected = g1 + gamma * penalty
    floor = 3e-6 * gamma / epsilon * g1.norm()  # half an ulp of g1 and g2, gamma / epsilon times, and of theta - g
    assert (ours - expected).norm() < 1.25 * (by_hand - expected).norm() + floor < 0.1 * (gamma * penalty).norm()


def test_the_perturbation_climbs_the_loss_and_the_step_flattens_it(backend):
    """Gradients are of the loss: written for the reward, the published formula would raise the norm."""
    skip_float64(backend)
    model = Quadratic()
    start, before = model.x.detach().clone(), model().item()
    norms = []
    for gamma in (0.0, 0.5):
        with torch.no_grad():
            model.x.copy_(start)
        opt = sgd([model.x], lr=0.01, gamma=gamma, epsilon=0.1, perturb_max_norm=1e9)
        model().backward()
        if opt.perturb():
            assert model().item() > before
            model().backward()
        opt.step()
        opt.zero_grad()
        norms.append((model.H @ model.x).norm().item())
    assert norms[1] < norms[0]


def test_the_weight_of_the_squared_norm_is_gamma_over_two(backend):
    """L + (gamma / 2) |grad L|^2: not gamma, as the goal is written, nor gamma / 4, as its formulas together say."""
    skip_float64(backend)
    model = Quadratic()
    g = model.H @ model.x.detach()
    ours = applied_gradient(model, gamma=0.2, epsilon=0.01)
    weight = ((ours - g) @ (model.H @ g) / (model.H @ g).square().sum()).item()
    assert weight == pytest.approx(0.2, rel=1e-8)


def test_the_first_clip_shortens_the_perturbation_and_the_last_one_clips_the_combined_gradient(backend):
    """Published: g1 clipped, then g2 clipped, then combined and clipped, which is no finite difference any more."""
    skip_float64(backend)
    model = Quadratic()
    x = model.x.detach().clone()
    opt = sgd([model.x], gamma=0.3, epsilon=0.1, perturb_max_norm=0.2, max_norm=0.05)
    one_step(opt, model)
    g = model.H @ x
    combined = g + 0.3 * 0.2 / g.norm() * model.H @ g
    assert g.norm() > 0.2
    expected = 0.05 * combined / combined.norm()
    torch.testing.assert_close(x - model.x.detach(), expected, rtol=1e-4, atol=0)  # max_norm / (norm + 1e-6)
    torch.testing.assert_close(opt.metrics()["grad_norm"], combined.norm().item(), rtol=1e-10, atol=0)


def test_sam_and_zhao_are_settings_of_the_same_step(backend):
    skip_float64(backend)
    model = LogisticRegression()

    def gradient(w):
        return torch.autograd.functional.jacobian(
            lambda v: F.binary_cross_entropy_with_logits(model.features @ v, model.labels), w
        )

    theta, radius, penalty = model.weight.detach().clone(), 0.05, 0.04
    g1 = gradient(theta)
    g2 = gradient(theta + radius * g1 / g1.norm())
    sam = applied_gradient(model, normalized=True, gamma=radius, epsilon=radius)
    torch.testing.assert_close(sam, g2, rtol=1e-12, atol=1e-14)
    alpha = penalty / radius
    zhao = applied_gradient(model, normalized=True, gamma=penalty, epsilon=radius)
    torch.testing.assert_close(zhao, (1 - alpha) * g1 + alpha * g2, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("replay", ["fresh", "pass1"])
def test_a_replay_has_ratio_one_or_that_of_the_first_pass(backend, replay):
    """With "fresh" the second pass is on policy at theta + delta; with "pass1" its importance ratio is
    pi(theta + delta) / pi(theta)."""
    logits = nn.Parameter(torch.randn(6, 9))
    targets, advantages = torch.randint(0, 9, (6,)), torch.tensor([2.0, -2.0, 2.0, -2.0, 2.0, -2.0])
    config = rf.LossConfig("grpo", epsilon_low=0.02, epsilon_high=0.02)
    start, first = logits.detach().clone(), []
    opt = sgd([logits], gamma=0.5, epsilon=0.5, perturb_max_norm=1e9)

    def backward(old):
        out = rf.grpo_loss(
            logits[None], targets[None], advantages[None], old_logp=old, config=config, normalizer=1.0
        )  # fmt: skip
        out.loss.backward()
        first.append(out.logp.detach())

    backward(None)
    assert opt.perturb()
    backward(first[0] if replay == "pass1" else None)
    opt.step()
    logp = start.log_softmax(-1)[range(6), targets]
    g1 = -advantages[:, None] * (F.one_hot(targets, 9) - start.softmax(-1))
    moved = start + 0.5 * g1 / 6  # grpo's mean over a sequence's tokens
    ratio = (moved.log_softmax(-1)[range(6), targets] - logp).exp()
    weight = torch.ones(6)
    if replay == "pass1":  # climbing the loss lowers the probability of what is to be rewarded: nothing is clipped
        weight = ratio
        assert (ratio < 1).tolist() == (advantages > 0).tolist() and (ratio - 1).abs().min() > 0.02
    g2 = -(weight * advantages)[:, None] * (F.one_hot(targets, 9) - moved.softmax(-1)) / 6
    torch.testing.assert_close(start - logits.detach(), g2, rtol=1e-4, atol=1e-6)
