"""A process may have set a default device, or a default dtype, for the tensors that it makes: what ops make for
themselves names both."""

import ast
import contextlib
import warnings

import pytest
import torch
from torch import nn

import redit_fast as rf
from tests.grid import MAKERS, MadeOn
from tests.ops.test_token_loss import LOSSES, loss_batch
from tests.project.test_floors import entry, package_sources

R, D, V = 6, 16, 37


@contextlib.contextmanager
def default_dtype(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def everything(device, wrap):
    """Outputs and gradients of each op, computed inside `wrap`; its inputs are made outside."""
    torch.manual_seed(0)
    with MadeOn(device):
        rewards, sample_ids, ids = torch.rand(8), torch.arange(8), torch.arange(8) // 4
        hidden, weight, targets = torch.randn(2, 3, D), torch.randn(V, D), torch.randint(V, (2, 3))
        advantages, old, mask = torch.randn(2), torch.randn(2, 3) - 4, torch.ones(2, 3, dtype=torch.bool)
        layers, x = nn.Linear(D, D), torch.randn(4, D)
        layers.low = nn.Linear(D, D).bfloat16()
        logits = torch.randn(2, 3, V)
    for leaf in (logits, hidden, weight):
        leaf.requires_grad_()

    def loss():
        return layers(x).square().mean() + layers.low(x.bfloat16()).float().square().mean()

    def step(optimizer):
        loss().backward()
        if optimizer.perturb():
            loss().backward()
        optimizer.step()
        optimizer.zero_grad()
        metrics = torch.tensor(
            [value for _, value in sorted(optimizer.metrics().items())], dtype=torch.float64, device="cpu"
        )
        return [metrics.nan_to_num(), *(p.detach().clone() for p in layers.parameters())]

    found = []
    with wrap():
        for dither in (
            None,
            rf.Dither(reward_scale=[2.0]),
            rf.Dither("uniform", schedule="factor", dead_groups="skip"),
        ):
            for options in ({"group_size": 4}, {"group_ids": ids}, {"group_size": 4, "sample_ids": sample_ids}):
                found += rf.group_advantages(rewards, dither=dither, reward_weights=[0.5], **options)
        found.append(rf.group_advantages(rewards, group_size=4, scale="batch", baseline="leave_one_out").values)
        for config in (rf.LossConfig("dapo"), rf.LossConfig("gspo"), rf.LossConfig("grpo", beta=0.1, entropy_coef=0.1)):
            given = {"config": config, "old_logp": old, "ref_logp": old if config.beta else None, "mask": mask}
            for output in (
                rf.grpo_loss(logits, targets, advantages, **given),
                rf.linear_grpo_loss(hidden, weight, targets, advantages, **given),
            ):
                gradients = torch.autograd.grad(output.loss, [logits, hidden, weight], allow_unused=True)
                found += [output.loss, *(gradient for gradient in gradients if gradient is not None)]
        found += rf.token_logp(logits, targets, entropy="metric")
        found.append(rf.linear_logp(hidden, weight, targets))
        for gr in ({}, {"gamma": 0.1, "keep_first_grad": True}, {"epsilon": "auto"}):
            found += step(rf.RegularizedAdamW(layers.parameters(), **gr))
            found += step(rf.GradientRegularizer(torch.optim.SGD(layers.parameters(), 0.1), **gr))
        adamw = rf.RegularizedAdamW(layers.parameters())
        step(adamw)
        loaded = rf.RegularizedAdamW(layers.parameters())
        loaded.load_state_dict(adamw.state_dict())
        found += step(loaded)
    return [x.detach() for x in found if isinstance(x, torch.Tensor)]


@pytest.mark.parametrize(
    "wrap",
    [
        pytest.param(lambda: torch.device("meta"), id="meta"),
        pytest.param(lambda: default_dtype(torch.float64), id="float64"),
        pytest.param(lambda: default_dtype(torch.bfloat16), id="bfloat16"),
    ],
)
def test_a_default_of_the_process_changes_nothing(backend, device, wrap):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # GR warns about the short step of bfloat16
        expected, found = everything(device, contextlib.nullcontext), everything(device, wrap)
    assert len(found) > 100
    assert all(x.dtype == y.dtype and torch.equal(x, y) for x, y in zip(expected, found, strict=True))


MORE = {
    **{name: rf.LossConfig(name) for name in ("sapo", "vespo", "gmpo", "gspo_token", "rloo", "gpg")},
    "clip_cov": rf.LossConfig("clip_cov", clip_cov_ratio=0.2, clip_cov_lb=-1.0),
    "kl_cov": rf.LossConfig("kl_cov", kl_cov_ratio=0.2),
    "off-policy": rf.LossConfig("grpo", off_policy_mask_threshold=0.1),
    "top entropy": rf.LossConfig("grpo", top_entropy_quantile=0.5),
    "sequence": rf.LossConfig("grpo", correction="sequence_truncate"),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("name", [*LOSSES, *MORE])
def test_a_default_dtype_changes_no_loss(name, dtype):
    config = (LOSSES | MORE)[name]
    logits, targets, advantages, given = loss_batch(config, 9, 50, torch.float32)
    logp, entropy = given["old_logp"] - 0.1, given["old_logp"].abs()

    def losses():
        leaf, leaf_logp = logits.clone().requires_grad_(), logp.clone().requires_grad_()
        with rf.use_backend("reference"):
            outputs = [rf.grpo_loss(leaf, targets, advantages, **given)]
        outputs.append(rf.policy_loss(leaf_logp, advantages, entropy=entropy, **given))
        sum(output.loss for output in outputs).backward()
        metrics = [value for output in outputs for _, value in sorted(output.metrics.items())]
        return [*(output.loss.detach() for output in outputs), leaf.grad, leaf_logp.grad, *metrics]

    expected = losses()
    with default_dtype(dtype):
        found = losses()
    assert len(found) > 10 and all(x.dtype == torch.float32 for x in found)
    assert all(torch.equal(x, y) for x, y in zip(expected, found, strict=True))


def without_a_device(source):
    """Lines with a call that makes a tensor and does not name its device, or its dtype where that may be the default
    one."""
    makers = {f"torch.{maker.__name__}" for maker in MAKERS}
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call) and ast.unparse(node.func) in makers:
            of_integers = ast.unparse(node.func) in ("torch.arange", "torch.randint", "torch.randperm", "torch.tensor")
            if not {"device"} | ({"dtype"} - {"dtype" * of_integers}) <= {keyword.arg for keyword in node.keywords}:
                yield f"{node.lineno}: {ast.unparse(node)}"


def test_what_the_package_makes_names_a_device():
    """The paths that no machine without a GPU runs too: a pinned table, TRL's RLOO. Benchmarks are processes of their
    own, in which nobody has changed the defaults."""
    assert list(without_a_device("x = torch.zeros(3)")) == ["1: torch.zeros(3)"]
    assert list(without_a_device("torch.zeros(3, device=d) + torch.arange(3, device=d)")) == [
        "1: torch.zeros(3, device=d)"
    ]
    assert not list(without_a_device("torch.zeros(3, dtype=p.dtype, device=p.device) + torch.zeros_like(p)"))
    found = {module: list(without_a_device(source)) for module, (source, _) in package_sources().items()}
    assert "redit_fast.gr.two_pass" in found
    assert [module for module, lines in found.items() if lines and entry(module) != "redit_fast.benchmarks"] == []
