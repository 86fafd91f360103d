"""TRL's own code beside ours: the same rollouts, log-probs and options give the same loss, gradient and metrics.

What runs is TRL's `_generate_and_score_completions` (advantages, sampler's correction) and `_compute_loss`, on a
trainer made without its `__init__`: generation, the model's forward pass and the reward functions are stubs that hand
out tensors.
"""

from collections import defaultdict
from dataclasses import MISSING, fields
from types import SimpleNamespace

import pytest
import torch

import redit_fast as rf
from redit_fast.losses.config import LossConfig
from redit_fast.losses.peers import PRESETS

pytest.importorskip("trl", reason="TRL is not installed: its parity tests need it")

import trl  # noqa: E402
from accelerate import Accelerator  # noqa: E402
from trl import GRPOConfig, RLOOConfig  # noqa: E402
from trl.experimental.gmpo import GMPOConfig, GMPOTrainer  # noqa: E402
from trl.trainer.grpo_trainer import GRPOTrainer  # noqa: E402
from trl.trainer.rloo_trainer import RLOOTrainer  # noqa: E402
from trl.trainer.utils import entropy_from_logits, selective_log_softmax  # noqa: E402

if trl.__version__ != PRESETS["trl"].version:
    pytest.skip(f"TRL {trl.__version__} is not the {PRESETS['trl'].version} of the preset", allow_module_level=True)

pytestmark = pytest.mark.filterwarnings("ignore:`gradient_checkpointing`:FutureWarning")  # TRL's own call
GROUP, ROWS, LENGTH = 4, 8, 7
NAMES = {  # TRL's options -> ours
    "beta": "beta",
    "delta": "delta",
    "entropy_coef": "entropy_coef",
    "epsilon": "epsilon_low",
    "epsilon_high": "epsilon_high",
    "importance_sampling_level": "importance",
    "max_completion_length": "max_completion_length",
    "off_policy_mask_threshold": "off_policy_mask_threshold",
    "sapo_temperature_neg": "sapo_temperature_neg",
    "sapo_temperature_pos": "sapo_temperature_pos",
    "top_entropy_quantile": "top_entropy_quantile",
    "use_bias_correction_kl": "kl_ratio_correction",
    "vespo_k_neg": "vespo_k_neg",
    "vespo_k_pos": "vespo_k_pos",
    "vespo_lambda_neg": "vespo_lambda_neg",
    "vespo_lambda_pos": "vespo_lambda_pos",
    "vllm_importance_sampling_clip_max": "correction_cap",
    "vllm_importance_sampling_clip_min": "correction_floor",
    "vllm_importance_sampling_mode": "correction",
}
OURS_ALONE = {"ratio/mean", "ratio/max_abs_dev", "ratio/overflow_frac", "policy/on_policy"}
REWARDS = {"reward", "reward_std", "frac_reward_zero_std", "rewards/r0/mean", "rewards/r0/std", "rewards/r1/mean",
           "rewards/r1/std"}  # fmt: skip  # the trainer's, not the loss's
TRAINERS = {"gmpo": (GMPOTrainer, GMPOConfig), "rloo": (RLOOTrainer, RLOOConfig)}
TRAINING = {"output_dir": "unused", "report_to": "none", "bf16": False, "use_cpu": True,
            "per_device_train_batch_size": ROWS, "num_generations": GROUP}  # fmt: skip
ON_POLICY = {"num_iterations": 1}  # TRL then computes no old log-probs


def rollouts(seed=0):
    """Eight completions of two prompts; some are shorter, one has holes (tool results), one has no scored token."""
    torch.manual_seed(seed)
    logp = -torch.rand(ROWS, LENGTH) * 2 - 0.1
    completion_mask = (torch.arange(LENGTH) < torch.tensor([7, 5, 7, 3, 6, 7, 4, 7])[:, None]).long()
    mask = completion_mask.clone()
    mask[2, 1:4] = 0
    mask[6] = 0
    sampling = logp + 0.25 * torch.randn(ROWS, LENGTH)
    sampling[4, 2] = torch.nan  # vLLM has no log-prob for this token
    return SimpleNamespace(
        logp=logp,
        old=logp + 0.3 * torch.randn(ROWS, LENGTH),
        ref=logp + 0.4 * torch.randn(ROWS, LENGTH),
        sampling=sampling,
        entropy=torch.rand(ROWS, LENGTH) * 3,
        rewards=torch.randn(ROWS, 2).double().float(),
        completion_mask=completion_mask,
        mask=mask,
    )


def trl_trainer(kind, config, batch, logp, entropy):
    """A trainer that has what `_generate_and_score_completions` and `_compute_loss` read, from TRL's own config."""
    trainer = object.__new__(kind)
    vars(trainer).update(vars(config))
    policy, reference = (SimpleNamespace(training=True, is_gradient_checkpointing=False) for _ in range(2))

    def forward(model, *args, **kwargs):
        if model is reference:
            return batch.ref, None, None
        return (logp, entropy, None) if torch.is_grad_enabled() else (batch.old, None, None)

    lengths = batch.completion_mask.sum(1).tolist()
    tokens = [list(range(1, length + 1)) for length in lengths]
    prompts = [[1, 2]] * ROWS
    if kind is RLOOTrainer:
        generated = prompts, tokens, ["..."] * ROWS
    else:
        tools = [row[:length].tolist() for row, length in zip(batch.mask, lengths)]
        sampled = [row[:length].tolist() for row, length in zip(batch.sampling, lengths)]
        sampled = [[None if x != x else x for x in row] for row in sampled] if config.use_vllm else None
        generated = prompts, tokens, tools, ["..."] * ROWS, sampled, {}, None, None
    vars(trainer).update(
        args=config,
        accelerator=Accelerator(cpu=True),
        model=policy,
        ref_model=reference,
        _get_per_token_logps_and_entropies=forward,
        _generate=lambda prompts: generated,
        _calculate_rewards=lambda *args: batch.rewards,
        reward_funcs=[None, None],
        reward_func_names=["r0", "r1"],
        reward_weights=torch.ones(2),
        epsilon_low=config.epsilon,
        epsilon_high=config.epsilon if config.epsilon_high is None else config.epsilon_high,
        current_gradient_accumulation_steps=config.gradient_accumulation_steps,
        aux_loss_enabled=False,
        environment_factories=None,
        environments=None,
        tools=None,
        _tokenizer=SimpleNamespace(pad_token_id=0),
        pad_to_multiple_of=None,
        _metrics={"train": defaultdict(list)},
        _logs={"prompt": [], "completion": [], "rewards": defaultdict(list), "advantages": []},
        _pending_extra_logs={},
        _pending_metrics={},
    )
    if kind is not RLOOTrainer:
        trainer._entropy_bonus_enabled = config.entropy_coef != 0 or config.use_adaptive_entropy
    return trainer


def trl_loss(loss_type, options, batch, logits=None, targets=None):
    """TRL's loss, its gradients by the log-probs and the entropies, its metrics and what the loss was computed from.
    With `logits` the log-probs are those that TRL computes from them."""
    kind, config_class = TRAINERS.get(loss_type, (GRPOTrainer, GRPOConfig))
    if kind is GRPOTrainer:
        gspo = {"loss_type": "grpo", "importance_sampling_level": "sequence"}
        options = {**(gspo if loss_type == "gspo" else {"loss_type": loss_type}), **options}
    config = config_class(**TRAINING, **{"num_iterations": 2, **options})
    logp, entropy = batch.logp.clone().requires_grad_(), batch.entropy.clone().requires_grad_()
    if logits is not None:
        logp, entropy = selective_log_softmax(logits, targets), entropy_from_logits(logits)
    trainer = trl_trainer(kind, config, batch, logp, entropy)
    inputs = trainer._generate_and_score_completions([{"prompt": "..."} for _ in range(ROWS)])
    loss = trainer._compute_loss(trainer.model, inputs)
    loss.backward()
    metrics = {key: values[-1] for key, values in trainer._metrics["train"].items()}
    out = SimpleNamespace(loss=loss, metrics=metrics, inputs=inputs)
    if logits is None:
        out.grad, out.entropy_grad = logp.grad, entropy.grad
    return out


def our_config(loss_type, options):
    overrides = {NAMES[key]: value for key, value in options.items() if key in NAMES}
    return LossConfig.like("trl", loss_type=loss_type, **overrides)


def our_loss(config, batch, on_policy=False, sampling=False, normalizer=None, advantages=None):
    logp, entropy = batch.logp.clone().requires_grad_(), batch.entropy.clone().requires_grad_()
    if advantages is None:
        advantages = rf.group_advantages(batch.rewards, group_size=GROUP, **rf.advantage_options("trl")).values
    out = rf.policy_loss(
        logp,
        advantages,
        old_logp=None if on_policy else batch.old,
        ref_logp=batch.ref if config.beta else None,
        sampling_logp=batch.sampling if sampling else None,
        entropy=entropy,
        mask=batch.completion_mask if config.loss_type == "rloo" else batch.mask,  # RLOOTrainer has no tool mask
        normalizer=normalizer,
        config=config,
    )
    out.loss.backward()
    return SimpleNamespace(loss=out.loss, grad=logp.grad, entropy_grad=entropy.grad, metrics=out.metrics)


def assert_same(ours, theirs, what):
    """float32, 1e-5 of the value and of the largest entry, on a quantity that is not small."""
    ours, theirs = torch.as_tensor(ours).detach(), torch.as_tensor(theirs).detach()
    scale = theirs.abs().max()
    assert scale > 1e-4, f"{what} is {scale:.1e} in TRL: nothing is compared"
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=2e-6 * scale.item(), msg=lambda text: f"{what}: {text}")


def assert_parity(loss_type, options, on_policy=False, normalizer=None, batch=None):
    batch = batch or rollouts()
    options = {**options, **(ON_POLICY if on_policy else {})}
    theirs = trl_loss(loss_type, options, batch)
    config = our_config(loss_type, options)
    advantages = theirs.inputs["advantages"] if loss_type == "rloo" else None  # its KL penalty is in the reward
    ours = our_loss(config, batch, on_policy, options.get("use_vllm", False), normalizer, advantages)
    loss = theirs.loss
    if loss_type == "gmpo":  # TRL adds -A, without gradient, for a sequence that has no scored token; here it adds 0
        empty = theirs.inputs["advantages"][batch.mask.sum(1) == 0].sum()
        assert empty.abs() > 1e-2
        loss = loss + empty / (normalizer or ROWS)
    assert_same(ours.loss, loss, "loss")
    assert_same(ours.grad, theirs.grad, "gradient")
    if config.entropy_coef:
        assert_same(ours.entropy_grad, theirs.entropy_grad, "gradient by the entropies")
    return ours, theirs


def assert_parity_of_an_option(loss_type, options, without, on_policy=False, normalizer=None):
    """Parity, and TRL's own result says that the options do something on this batch."""
    ours, theirs = assert_parity(loss_type, options, on_policy, normalizer)
    base = trl_loss(loss_type, {**without, **(ON_POLICY if on_policy else {})}, rollouts())
    assert not torch.equal(theirs.grad, base.grad) or not torch.equal(theirs.loss, base.loss)
    return ours, theirs


GRPO_LOSSES = ("grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "luspo", "vespo", "gspo")
ALL = (*GRPO_LOSSES, "gmpo", "rloo")
CLIPPED = ("grpo", "bnpo", "dr_grpo", "dapo", "luspo", "gspo")
NEEDS = {"dr_grpo": {"max_completion_length": 16}}


def test_every_trl_loss_is_here():
    assert set(ALL) == set(PRESETS["trl"].losses)


@pytest.mark.parametrize("on_policy", [False, True], ids=["off policy", "on policy"])
@pytest.mark.parametrize("loss_type", ALL)
def test_the_defaults(loss_type, on_policy):
    if loss_type == "rloo" and on_policy:
        pytest.skip("RLOOTrainer always computes the old log-probs")
    assert_parity(loss_type, NEEDS.get(loss_type, {}), on_policy)


@pytest.mark.parametrize("loss_type", [each for each in GRPO_LOSSES if each not in ("gspo", "vespo")])
@pytest.mark.parametrize(
    "options",
    [{}, {"beta": 0.3}, {"beta": 0.3, "use_bias_correction_kl": False}, {"off_policy_mask_threshold": 0.05},
     {"top_entropy_quantile": 0.4}],
    ids=str,
)  # fmt: skip
def test_sequence_importance(loss_type, options):
    base = {"epsilon_high": 1.1} if loss_type == "cispo" else NEEDS.get(loss_type, {})
    assert_parity_of_an_option(loss_type, {**base, **options, "importance_sampling_level": "sequence"}, base)


@pytest.mark.parametrize("loss_type", [*CLIPPED, "cispo", "gmpo", "rloo"])
@pytest.mark.parametrize("options", [{"epsilon": 0.05}, {"epsilon": 0.1, "epsilon_high": 0.28}], ids=str)
def test_epsilon(loss_type, options):
    if loss_type == "cispo":  # its epsilon_high is the bound itself
        options = {"epsilon_high": 1.3} if "epsilon_high" in options else {"epsilon": 0.9}
    if loss_type == "gmpo":  # its epsilons limit the log-ratio
        options = {key: value + 0.1 for key, value in options.items()}
    base = NEEDS.get(loss_type, {})
    assert_parity_of_an_option(loss_type, {**base, **options}, base)


@pytest.mark.parametrize("loss_type", CLIPPED)
def test_delta(loss_type):
    base = NEEDS.get(loss_type, {})
    delta = 1.05 if loss_type == "gspo" else 1.3
    assert_parity_of_an_option(loss_type, {**base, "delta": delta}, base)


@pytest.mark.parametrize("loss_type", [*GRPO_LOSSES, "gmpo"])
@pytest.mark.parametrize("on_policy", [False, True], ids=["off policy", "on policy"])
@pytest.mark.parametrize("corrected", [True, False], ids=["ratio-corrected", "plain"])
def test_kl(loss_type, corrected, on_policy):
    base = NEEDS.get(loss_type, {})
    options = {"beta": 0.3, "use_bias_correction_kl": corrected}
    if loss_type == "gmpo":  # which ignores use_bias_correction_kl
        if corrected:
            with pytest.raises(NotImplementedError, match="kl_ratio_correction"):
                our_config(loss_type, options)
        options = {"beta": 0.3}
    assert_parity_of_an_option(loss_type, {**base, **options}, base, on_policy)


CORRECTIONS = [
    {},
    {"vllm_importance_sampling_clip_max": 1.1},
    {"vllm_importance_sampling_clip_max": 1.8, "vllm_importance_sampling_clip_min": 0.8},
]
MODES = ["token_truncate", "token_mask", "sequence_truncate", "sequence_mask"]


@pytest.mark.parametrize("loss_type", GRPO_LOSSES)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("bounds", CORRECTIONS, ids=["default bounds", "cap", "cap and floor"])
def test_the_samplers_correction(loss_type, mode, bounds):
    base = NEEDS.get(loss_type, {})
    options = {**base, **bounds, "use_vllm": True, "vllm_importance_sampling_mode": mode, "beta": 0.1}
    if loss_type == "vespo" and mode.startswith("sequence"):
        with pytest.raises(NotImplementedError, match="correction='sequence"):
            our_config(loss_type, options)  # as GRPOTrainer.__init__ does
        return
    assert_parity_of_an_option(loss_type, options, {**base, "beta": 0.1})


@pytest.mark.parametrize("loss_type", [each for each in GRPO_LOSSES if each != "vespo"])
def test_a_preset_corrects_by_default_once_there_are_sampling_log_probs(loss_type):
    base = NEEDS.get(loss_type, {})
    batch = rollouts()
    batch.sampling += 0.3 * (torch.arange(ROWS)[:, None] - 3)
    theirs = trl_loss(loss_type, {**base, "use_vllm": True}, batch)
    assert 0 < (theirs.inputs["importance_sampling_ratio"] == 0).sum() < ROWS
    assert_parity(loss_type, {**base, "use_vllm": True}, batch=batch)


def test_a_correction_that_the_caller_sets_needs_sampling_log_probs():
    batch = rollouts()
    assert our_loss(our_config("dapo", {}), batch).loss.isfinite()
    with pytest.raises(ValueError, match="sampling_logp"):
        our_loss(our_config("dapo", {"vllm_importance_sampling_mode": "sequence_mask"}), batch)


@pytest.mark.parametrize("loss_type", GRPO_LOSSES)
@pytest.mark.parametrize("use_vllm", [False, True], ids=["old", "sampler"])
def test_off_policy_mask(loss_type, use_vllm):
    base = {**NEEDS.get(loss_type, {}), "use_vllm": use_vllm}
    if loss_type == "vespo":
        base["vllm_importance_sampling_mode"] = "token_truncate"
    without = base if use_vllm or loss_type != "vespo" else {}
    if not use_vllm and loss_type == "vespo":
        base = {"use_vllm": False}
    assert_parity_of_an_option(loss_type, {**base, "off_policy_mask_threshold": 0.02}, without)


def test_off_policy_mask_keeps_what_trls_own_function_keeps():
    batch = rollouts(3)
    advantages = torch.tensor([1.0, -1, -1, -1, -1, 0, -1, -1])
    kept = GRPOTrainer.get_off_policy_mask(advantages[:, None], batch.logp, batch.sampling, batch.mask, 0.02)[:, 0]
    assert 0 < (kept == 0).sum() < 6
    logp = batch.logp.clone().requires_grad_()
    config = LossConfig(loss_type="gpg", off_policy_mask_threshold=0.02)
    rf.policy_loss(logp, advantages, sampling_logp=batch.sampling, mask=batch.mask, config=config).loss.backward()
    assert torch.equal(logp.grad != 0, (kept[:, None] * batch.mask * advantages[:, None]) != 0)


@pytest.mark.parametrize("loss_type", [*GRPO_LOSSES, "gmpo"])
@pytest.mark.parametrize("quantile", [0.2, 0.65])
def test_top_entropy_quantile(loss_type, quantile):
    base = NEEDS.get(loss_type, {})
    assert_parity_of_an_option(loss_type, {**base, "top_entropy_quantile": quantile}, base)


@pytest.mark.parametrize("loss_type", GRPO_LOSSES)
@pytest.mark.parametrize("quantile", [1.0, 0.4])
def test_entropy_bonus(loss_type, quantile):
    base = {**NEEDS.get(loss_type, {}), "top_entropy_quantile": quantile}
    assert_parity_of_an_option(loss_type, {**base, "entropy_coef": 0.05}, base)


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_sapo_temperatures(level):
    options = {"sapo_temperature_pos": 2.0, "sapo_temperature_neg": 0.4, "importance_sampling_level": level}
    assert_parity_of_an_option("sapo", options, {"importance_sampling_level": level})


@pytest.mark.parametrize("name", ["vespo_k_pos", "vespo_lambda_pos", "vespo_k_neg", "vespo_lambda_neg"])
def test_vespo_parameters(name):
    assert_parity_of_an_option("vespo", {name: 1.3}, {})


def test_vespo_weights_are_those_of_trls_own_function():
    batch = rollouts()
    advantages = torch.tensor([1.0, -1, 0.5, -0.5, 2, -2, 1, -1])
    phi = GRPOTrainer.get_gamma_weights(advantages[:, None], batch.logp - batch.old, batch.mask, None)
    assert phi.min() < 0.7 and phi.max() > 0.9
    logp = batch.logp.clone().requires_grad_()
    config = LossConfig(loss_type="vespo")
    rf.policy_loss(logp, advantages, old_logp=batch.old, mask=batch.mask, config=config).loss.backward()
    assert_same(logp.grad, -phi * advantages[:, None] * batch.mask / batch.mask.sum(), "gradient")


@pytest.mark.parametrize("loss_type", [*GRPO_LOSSES, "gmpo"])
@pytest.mark.parametrize(("accumulation", "micro_batches"), [(4, 2), (2, 6)])
def test_normalizers_under_gradient_accumulation(loss_type, accumulation, micro_batches):
    """TRL divides by its accumulation steps; here the caller passes the whole window's denominator. micro_batches are
    those of a generation, of which each optimizer step takes `accumulation`."""
    options = {**NEEDS.get(loss_type, {}), "gradient_accumulation_steps": accumulation}
    tokens = rollouts().mask.sum()
    normalizer = {
        "bnpo": tokens * accumulation,  # the mean of the micro-batches' means: only right where they are alike
        "dr_grpo": ROWS * 16 * accumulation,
        **dict.fromkeys(("dapo", "cispo", "vespo"), tokens * accumulation / micro_batches),
    }.get(loss_type, ROWS * accumulation)
    options |= {"steps_per_generation": micro_batches, "num_iterations": 3}
    assert_parity_of_an_option(loss_type, options, NEEDS.get(loss_type, {}), normalizer=normalizer)


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
@pytest.mark.parametrize("combine", ["sum_then_normalize", "normalize_then_sum"])
def test_advantages(scale, combine):
    batch = rollouts()
    batch.rewards[1, 0] = torch.nan  # one of two rewards is missing
    batch.rewards[5] = torch.nan  # unscorable
    theirs = trl_loss("dapo", {"scale_rewards": scale, "multi_objective_aggregation": combine}, batch)
    options = {**rf.advantage_options("trl"), "combine": combine}
    if combine == "sum_then_normalize":  # TRL ignores scale_rewards otherwise, group_advantages refuses it
        options["scale"] = scale
    ours = rf.group_advantages(batch.rewards, group_size=GROUP, **options)
    assert_same(ours.values, theirs.inputs["advantages"], "advantages")


def test_advantages_of_rloo():
    batch = rollouts()
    batch.rewards[5] = torch.nan
    theirs = trl_loss("rloo", {"beta": 0.0}, batch)
    options = {**rf.advantage_options("trl"), "baseline": "leave_one_out", "scale": "none"}
    ours = rf.group_advantages(batch.rewards, group_size=GROUP, **options)
    assert_same(ours.values, theirs.inputs["advantages"], "advantages")


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_selective_log_softmax(temperature):
    torch.manual_seed(0)
    logits, targets = 3 * torch.randn(3, 5, 97), torch.randint(97, (3, 5))
    ours, theirs = (logits.clone().requires_grad_() for _ in range(2))
    a = rf.token_logp(ours, targets, temperature=temperature)
    b = selective_log_softmax(theirs, targets, temperature=temperature)
    assert_same(a, b, "log-probs")
    weights = torch.randn(3, 5)
    (a * weights).sum().backward()
    (b * weights).sum().backward()
    assert_same(ours.grad, theirs.grad, "gradient")
    entropy = rf.token_logp(logits, targets, temperature=temperature, entropy="metric").entropy
    assert_same(entropy, entropy_from_logits(logits / temperature), "entropy")


@pytest.mark.parametrize("loss_type", GRPO_LOSSES)
@pytest.mark.parametrize("options", [{}, {"beta": 0.3}, {"use_vllm": True}, {"entropy_coef": 0.05}], ids=str)
def test_from_logits(loss_type, options):
    """`rf.grpo_loss` beside TRL's log-softmax, gather and loss: the same gradient by the logits."""
    options = {**NEEDS.get(loss_type, {}), **options}
    if loss_type == "vespo" and options.get("use_vllm"):
        options["vllm_importance_sampling_mode"] = "token_truncate"
    torch.manual_seed(1)
    theirs_at = (2 * torch.randn(ROWS, LENGTH, 61)).requires_grad_()
    ours_at, targets = theirs_at.detach().clone().requires_grad_(), torch.randint(61, (ROWS, LENGTH))
    batch = rollouts()
    shift = selective_log_softmax(theirs_at.detach(), targets) - batch.logp
    batch.old, batch.ref, batch.sampling = batch.old + shift, batch.ref + shift, batch.sampling + shift
    theirs = trl_loss(loss_type, options, batch, theirs_at, targets)
    ours = rf.grpo_loss(
        ours_at,
        targets,
        theirs.inputs["advantages"],
        old_logp=batch.old,
        ref_logp=batch.ref if "beta" in options else None,
        sampling_logp=batch.sampling if "use_vllm" in options else None,
        mask=batch.mask,
        config=our_config(loss_type, options),
    )
    ours.loss.backward()
    assert_same(ours.loss, theirs.loss, "loss")
    assert_same(ours_at.grad, theirs_at.grad, "gradient")


METRIC_CASES = [
    *[(each, {"epsilon": 0.05} if each in CLIPPED else {}) for each in GRPO_LOSSES],
    *[(each, {"beta": 0.2, "entropy_coef": 0.01}) for each in GRPO_LOSSES],
    *[("dapo", {"use_vllm": True, "vllm_importance_sampling_mode": mode, "beta": 0.2}) for mode in MODES],
    *[(each, {"importance_sampling_level": "sequence", "beta": 0.2}) for each in ("dapo", "cispo", "sapo")],
    ("vespo", {"use_vllm": True, "vllm_importance_sampling_mode": "token_mask"}),
    ("grpo", {"delta": 1.1, "epsilon": 0.1, "epsilon_high": 0.15}),
    ("gmpo", {"beta": 0.2, "epsilon": 0.1}),
    ("rloo", {"beta": 0.0}),
]


@pytest.mark.parametrize(("loss_type", "options"), METRIC_CASES, ids=str)
def test_metrics_under_trls_key_names(loss_type, options):
    batch = rollouts()
    if loss_type == "cispo" and "importance_sampling_level" in options:
        batch.mask[6, 0] = 1  # else TRL counts the sequence without tokens, of ratio 1 > epsilon_high, as clipped
    ours, theirs = assert_parity(loss_type, {**NEEDS.get(loss_type, {}), **options}, batch=batch)
    logged = set(theirs.metrics) - REWARDS
    assert logged - set(ours.metrics) <= {"entropy_coef"}  # an option, not a measurement
    assert set(ours.metrics) - logged == OURS_ALONE
    for key in logged & set(ours.metrics):
        assert ours.metrics[key].item() == pytest.approx(theirs.metrics[key], rel=1e-5, abs=1e-6), key
    moving = [key for key in logged & set(ours.metrics) if abs(theirs.metrics[key]) > 1e-3]
    assert len(moving) >= 2 or loss_type == "sapo", "nothing is compared"


def test_the_presets_defaults_are_those_of_trls_configs():
    classes = {"gmpo": GMPOConfig, "rloo": RLOOConfig}
    ours = {value: key for key, value in NAMES.items()}
    compared = 0
    for loss_type, row in PRESETS["trl"].losses.items():
        theirs = {each.name: each.default for each in fields(classes.get(loss_type, GRPOConfig))}
        for name, value in row.options.items():
            assert theirs[ours[name]] is not MISSING
            if (loss_type, name) == ("vespo", "correction"):
                assert theirs[ours[name]] == "sequence_mask"  # which GRPOTrainer.__init__ refuses with vespo
                continue
            assert value == theirs[ours[name]], (loss_type, name)
            compared += 1
    assert compared > 80
    grpo = {each.name: each.default for each in fields(GRPOConfig)}
    assert grpo["loss_type"] == PRESETS["trl"].loss_type and grpo["vllm_importance_sampling_correction"] is True
    options = rf.advantage_options("trl")
    assert (grpo["scale_rewards"], grpo["multi_objective_aggregation"]) == (options["scale"], options["combine"])
