"""The names that users import: none may go, and each leads somewhere."""

import tomllib
from importlib import import_module

import pytest

import redit_fast as rf
from tests import ROOT

NAMES = """
Advantages Dither GR GradientRegularizer LogpEntropy LossConfig LossOutput RegularizedAdamW advantage_options apply_to
estimate_memory group_advantages grpo_loss linear_grpo_loss linear_grpo_loss_and_grad_ linear_logp logit_transforms
parameter_groups policy_loss reset_reference token_logp unwrap use_backend
""".split()
OF_HOSTS = {
    "trl": ("ReditGRPOConfig", "ReditGRPOTrainer", "patch"),
    "verl": ("register", "unregister"),
    "transformers": ("GRTrainerMixin",),
    "openrlhf": ("PolicyLoss",),
}


def test_the_package_has_its_names():
    assert sorted(rf.__all__) == sorted(NAMES)
    assert all(getattr(rf, name) is not None for name in NAMES)


@pytest.mark.parametrize(("host", "names"), OF_HOSTS.items())
def test_the_integrations_have_theirs(host, names):
    if host != "openrlhf":  # whose class needs nothing of it
        pytest.importorskip(host)
    module = import_module(f"redit_fast.integrations.{host}")
    assert all(callable(getattr(module, name)) for name in names)


def test_the_console_script_and_verls_plugin_lead_somewhere():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    module, _, function = project["scripts"]["redit-fast"].partition(":")
    assert callable(getattr(import_module(module), function))
    assert project["entry-points"]["verl.plugins"] == {"redit_fast": "redit_fast.integrations.verl"}
