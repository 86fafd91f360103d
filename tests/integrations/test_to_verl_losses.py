"""What `redit-fast to-verl` writes for each loss, correction and schedule, in verl 0.9.1's own functions."""

import copy
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("verl", reason="verl 0.9.1 is not installed")

from omegaconf import OmegaConf  # noqa: E402
from transformers import Qwen2Config  # noqa: E402
from verl.trainer.ppo.rollout_corr_helper import compute_rollout_correction_and_rejection_mask  # noqa: E402
from verl.utils import tensordict_utils as tu  # noqa: E402
from verl.utils.config import omega_conf_to_dataclass  # noqa: E402
from verl.workers.engine.fsdp.transformer_impl import FSDPEngineWithLMHead  # noqa: E402
from verl.workers.utils.losses import ppo_loss  # noqa: E402

import redit_fast as rf  # noqa: E402
from redit_fast.losses.config import denominator_of  # noqa: E402
from redit_fast.training import config_file, setup  # noqa: E402
from redit_fast.training.config import TrainConfig  # noqa: E402
from redit_fast.training.to_verl import to_verl  # noqa: E402
from redit_fast.training.verl_options import LOSSES, SCHEDULES, Facts, options, refusals  # noqa: E402
from tests.integrations.test_to_verl import PASS1, composed  # noqa: E402
from tests.integrations.test_verl_loss import micro_batch  # noqa: E402
from tests.losses.test_parity_peers import assert_same, rollouts  # noqa: E402

FACTS = Facts(Path("/verl"), "run", "/model", "float32", 50, 5, 40, None, [1.0])
OF_LOSS = {
    "dro": {"dro_beta": 0.3},
    "clip_cov": {"clip_low": 0.3},
    "dppo_kl": {"clip_low": 0.02, "clip_high": 0.01},
    "dppo_tv": {"clip_low": 0.05, "clip_high": 0.03},
}


@pytest.fixture(scope="module")
def written(model_folder, problems, tmp_path_factory):
    """The parts of verl's configuration of a run that the options of a loss are in, with what they refer to."""
    settings = {"model": str(model_folder), "data": str(problems), "rewards": ["numeric_answer"], **PASS1}
    found = composed(to_verl(config_file.load(overrides=settings), tmp_path_factory.mktemp("of") / "verl", "run"))
    whole = OmegaConf.to_container(found, resolve=True, throw_on_missing=False)
    parts = {"actor_rollout_ref": {"actor": whole["actor_rollout_ref"]["actor"]},
             "algorithm": {"rollout_correction": whole["algorithm"]["rollout_correction"]}}  # fmt: skip
    return OmegaConf.create(parts)


def parts_of(made, written):
    """The actor and the correction with the options of `made`."""
    found = copy.deepcopy(written)
    for name, value in options(made, FACTS).items():
        if name.startswith(("actor_rollout_ref.actor.", "algorithm.rollout_correction.")):
            OmegaConf.update(found, name, value)
    return omega_conf_to_dataclass(found.actor_rollout_ref.actor), found.algorithm.rollout_correction


def both_losses(made, written):
    """(value, gradient) of one optimizer step's loss, ours as in the trainer, and verl's by its own ppo_loss."""
    batch, lengths = rollouts(), [8, 5, 8, 3, 7, 6]
    batch.old[3, 1] = batch.logp[3, 1] - 2  # a ratio of 7.4 at a negative advantage: verl's default would limit it to 3
    batch.mask = torch.arange(8) < torch.tensor(lengths)[:, None]  # every completion has tokens, without holes
    at = batch.logp.clone().requires_grad_()
    kind, seed = made.sampler_correction, int(torch.randint(2**62, (), generator=torch.Generator().manual_seed(1)))
    losses = setup.loss_config(made, SimpleNamespace(config=Qwen2Config()))
    ours = rf.policy_loss(
        at, batch.advantages, old_logp=batch.old, ref_logp=batch.ref if made.beta else None, mask=batch.mask,
        sampling_logp=None if kind == "none" else batch.sampling,
        normalizer=denominator_of(losses, len(lengths), float(sum(lengths))), config=losses, seed=seed,
    ).loss  # fmt: skip
    ours.backward()
    actor, correction = parts_of(made, written)
    weights, mask, _ = compute_rollout_correction_and_rejection_mask(
        batch.old, batch.sampling, batch.mask, rollout_is=correction.rollout_is,
        rollout_is_threshold=correction.rollout_is_threshold, rollout_rs=correction.rollout_rs,
    )  # fmt: skip
    assert torch.equal(mask, batch.mask)
    data, log_probs = micro_batch(batch)
    tu.assign_non_tensor(data, dp_size=1, batch_num_tokens=sum(lengths), global_batch_size=len(lengths))
    if weights is not None:
        rows = [row[:n] for row, n in zip(weights.batch["rollout_is_weights"], lengths)]
        data["rollout_is_weights"] = torch.nested.as_nested_tensor(rows, layout=torch.jagged)
    values = log_probs.values().detach().requires_grad_()
    nested = torch.nested.nested_tensor_from_jagged(values, log_probs.offsets())
    torch.manual_seed(1)  # from whose generator clip_cov takes its seed
    theirs, _ = ppo_loss(actor, {"log_probs": nested}, data)
    theirs.backward()
    rows = values.grad.split([n + 3 for n in lengths])  # two positions before a completion's, one behind
    return (ours, at.grad[batch.mask]), (theirs, torch.cat([row[2:-1] for row in rows]))


CORRECTIONS = [
    {"correction": "none"},
    {"correction": "token_truncate", "correction_cap": 1.2},
    {"correction": "token_mask", "correction_cap": 1.5},
    {"correction": "token_mask", "correction_floor": 0.8},
    {"correction": "sequence_truncate", "correction_cap": 1.1},
    {"correction": "sequence_mask", "correction_cap": 3.0, "correction_floor": 0.2},
]


@pytest.mark.parametrize("loss_type", LOSSES)
def test_every_loss_has_the_value_and_gradient_of_verl_s_by_its_options(written, loss_type):
    """Alone, with a KL term, and with each correction of the sampler's log-probs that is not refused."""
    base = {
        "model": "m",
        "data": "d",
        "rewards": ["r"],
        "loss_type": loss_type,
        "gr_gamma": 0,
        "max_completion_length": 20,
    }
    compared = 0
    for more in [*CORRECTIONS, {"beta": 0.2}]:
        made = TrainConfig(**base, **OF_LOSS.get(loss_type, {}), **more)
        if refusals(made):
            assert loss_type in ("gspo", "gmpo") and more["correction"].startswith("token")
            continue
        (ours, our_gradient), (theirs, their_gradient) = both_losses(made, written)
        assert_same(ours, theirs, f"{loss_type} {more}")
        assert_same(our_gradient, their_gradient, f"gradient of {loss_type} {more}")
        compared += 1
    assert compared == (4 if loss_type in ("gspo", "gmpo") else 7)


@pytest.mark.parametrize("kind", SCHEDULES)
def test_the_learning_rate_of_every_step_is_ours(written, kind):
    made = TrainConfig(model="m", data="d", rewards=["r"], gr_gamma=0, lr_scheduler_type=kind, steps=9,
                       warmup_steps=0 if kind == "constant" else 3, learning_rate=2e-3)  # fmt: skip
    optim = parts_of(made, written)[0].optim
    optim.total_training_steps = made.steps  # as verl's trainer does
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=optim.lr)
    schedule = FSDPEngineWithLMHead._build_lr_scheduler(SimpleNamespace(optimizer_config=optim, rank=0), optimizer)
    expected, found = setup.learning_rate(made), []
    for _ in range(made.steps):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert found == pytest.approx([expected(step) for step in range(made.steps)], rel=1e-12)
    assert len(set(found)) == {"constant": 1, "constant_with_warmup": 4, "cosine": 9}[kind]
