"""The names that users import: none may go, each leads somewhere, and no default changes unseen."""

import inspect
import re
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

GR = """gamma=0.001, epsilon=0.001, normalized=False, perturb_max_norm=10.0, rounding='stochastic',
    keep_first_grad=None, gamma_warmup_steps=0, every_k_steps=1, compute_dtype=None"""
ROWS = "old_logp=None, ref_logp=None, sampling_logp=None, mask=None, cu_seqlens=None, normalizer=None, masks_of=None"
LOGITS = "temperature=1.0, logit_scale=1.0, softcap=None"
HEAD = f"{ROWS}, bias=None, chunk_rows=None, step=0, seed=0"
DEFAULTS = {
    "Dither": """distribution='gaussian', level=0.05, reward_scale=1.0, schedule='constant', total_steps=None,
        dead_groups='apply', seed=0""",
    "GR": f"{GR}, pass2_ratio='fresh'",
    "GradientRegularizer": f"{GR}, max_norm=1.0, seed=0",
    "LossConfig": f"""loss_type='dapo', importance='token', epsilon_low=0.2, epsilon_high=None, delta=None,
        dual_clip=None, cispo_bound='absolute', beta=0.0, kl='k3', kl_ratio_correction=False, entropy_coef=0.0,
        correction='none', correction_cap=3.0, correction_floor=None, off_policy_mask_threshold=None,
        top_entropy_quantile=1.0, sapo_temperature_pos=1.0, sapo_temperature_neg=1.05, vespo_k_pos=2.0,
        vespo_lambda_pos=3.0, vespo_k_neg=3.0, vespo_lambda_neg=2.0, clip_cov_ratio=0.0002, clip_cov_lb=1.0,
        clip_cov_ub=5.0, kl_cov_ratio=0.0002, kl_cov_coef=1.0, dro_beta=None, max_completion_length=None,
        _correction_optional=False, {LOGITS}""",
    "RegularizedAdamW": f"lr=0.001, betas=(0.9, 0.999), eps=1e-08, weight_decay=0.0, {GR}, max_norm=1.0, seed=0",
    "advantage_options": "version=None",
    "apply_to": "eval_logits=True",
    "estimate_memory": "chunk_rows=None",
    "group_advantages": """group_size=None, group_ids=None, reward_weights=None, dither=None, step=0, sample_ids=None,
        baseline='mean', scale='group', combine='sum_then_normalize', eps=0.0001, ddof=1""",
    "grpo_loss": f"{ROWS}, inplace=False, grad_scale=None, step=0, seed=0",
    "linear_grpo_loss": HEAD,
    "linear_grpo_loss_and_grad_": f"{HEAD}, bias_grad=None",
    "linear_logp": f"{LOGITS}, bias=None, mask=None, entropy='none', chunk_rows=None, validate=False",
    "parameter_groups": "perturb='decoder_layers'",
    "policy_loss": f"{ROWS}, entropy=None, step=0, seed=0",
    "token_logp": f"{LOGITS}, mask=None, entropy='none', inplace_backward=False, validate=False",
}


def test_the_package_has_its_names():
    assert sorted(rf.__all__) == sorted(NAMES)
    assert all(getattr(rf, name) is not None for name in NAMES)


@pytest.mark.parametrize("name", sorted(set(NAMES) - {"Advantages", "LogpEntropy", "LossOutput"}))
def test_every_default_is_the_documented_one(name):
    parameters = inspect.signature(getattr(rf, name)).parameters.values()
    found = {f"{each.name}={each.default!r}" for each in parameters if each.default is not each.empty}
    expected = re.split(r", (?=\w+=)", " ".join(DEFAULTS[name].split())) if name in DEFAULTS else []
    assert sorted(found ^ set(expected)) == [], f"a default of {name}: if it should change, then here and in CHANGELOG"


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
