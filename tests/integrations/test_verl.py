"""verl 0.9.1 with our plugin: redit_grpo through verl's own callers on DataProto and TensorDict, its configuration, and
the registering. No ray is started: what needs its workers is not run here.
"""

import copy
import functools
import inspect
import logging
import os
import subprocess
import sys
import tomllib
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from tests import ROOT

pytest.importorskip("verl", reason="verl 0.9.1 is not installed")
import hydra
import numpy as np
import verl
import verl.models.transformers.monkey_patch as monkey_patch
from omegaconf import OmegaConf
from tensordict import TensorDict
from transfer_queue import KVBatchMeta
from transformers import HfArgumentParser
from verl import DataProto
from verl.trainer.ppo import core_algos, ray_trainer
from verl.trainer.ppo.core_algos import ADV_ESTIMATOR_REGISTRY, POLICY_LOSS_REGISTRY
from verl.trainer.ppo.ray_trainer import RayPPOTrainer, compute_advantage
from verl.trainer.ppo.v1 import PPOTrainer, trainer_base
from verl.utils import config as verl_config
from verl.utils.skip import SkipManager
from verl.utils.tensordict_utils import list_of_dict_to_tensordict
from verl.workers.engine import EngineRegistry
from verl.workers.engine.fsdp.transformer_impl import FSDPEngineWithLMHead

import redit_fast as rf
import redit_fast.integrations.verl as plugin
from redit_fast.integrations.options import DitherOptions
from redit_fast.integrations.verl import advantages as verl_advantages

WEAK = {"dither_level": 0.05}


@pytest.fixture(scope="module")
def command_line():
    """A run's configuration: verl's own yaml and what stands on the command line."""
    overrides = ["algorithm.adv_estimator=redit_grpo", "+algorithm.redit.dither_level=0.05",
                 "actor_rollout_ref.actor.policy_loss.loss_mode=redit_vanilla", "actor_rollout_ref.model.path=/m",
                 "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=4",
                 "actor_rollout_ref.rollout.log_prob_micro_batch_size_per_gpu=4"]  # fmt: skip
    with hydra.initialize_config_dir(str(Path(verl.__file__).parent / "trainer/config"), version_base=None):
        return hydra.compose("ppo_trainer", overrides)


def section(**redit):
    return OmegaConf.create({"norm_adv_by_std_in_grpo": True, "redit": redit})


@pytest.fixture(autouse=True)
def fresh_process(monkeypatch):
    monkeypatch.setattr(verl_advantages, "_noise_counter", verl_advantages._NoiseCounter())
    monkeypatch.setattr(SkipManager, "step", 1)


def batch(uids="aabbabcc", seed=0):
    """Responses of unequal length, groups interleaved, the reward on some token of the response."""
    torch.manual_seed(seed)
    mask = (torch.arange(5) < torch.randint(1, 6, (len(uids), 1))).long()
    rewards = torch.zeros(len(uids), 5)
    rewards[:, 0] = torch.rand(len(uids)) + 0.1 * torch.arange(len(uids))
    rewards[:, 1] = 0.25 * mask[:, 1]
    return DataProto.from_dict(
        {"token_level_rewards": rewards, "response_mask": mask},
        {"uid": np.array([f"uid-{u}" for u in uids], dtype=object)},
    )


def estimate(data, estimator="redit_grpo", config=None):
    """(B, T) by verl's own caller, as RayPPOTrainer calls it."""
    data = DataProto(TensorDict(dict(data.batch), data.batch.batch_size), dict(data.non_tensor_batch))
    by_deviation = True if config is None else config.norm_adv_by_std_in_grpo
    found = compute_advantage(data, estimator, norm_adv_by_std_in_grpo=by_deviation, config=config).batch
    assert torch.equal(found["advantages"], found["returns"])
    return found["advantages"]


def estimate_v1(monkeypatch, data, keys, estimator="redit_grpo", **redit):
    """(B, T), metrics by the V1 trainer's own method. Its queue, whose processes are ray's, is the one TensorDict that
    it gets and the one that it puts."""
    lengths = data.batch["response_mask"].sum(1).clamp(min=1).tolist()
    stored = list_of_dict_to_tensordict(
        [{"uid": uid, "response_mask": mask[:n], "rm_scores": rewards[:n]}
         for uid, mask, rewards, n in zip(data.non_tensor_batch["uid"], data.batch["response_mask"],
                                          data.batch["token_level_rewards"], lengths)]
    )  # fmt: skip
    put = {}
    queue = SimpleNamespace(kv_batch_get=lambda **_: stored, kv_batch_put=lambda **given: put.update(given["fields"]))
    monkeypatch.setattr(trainer_base, "tq", queue)
    config = {"adv_estimator": estimator, "use_kl_in_reward": False, "gamma": 1.0, "lam": 1.0, "redit": redit}
    config = {"algorithm": config, "actor_rollout_ref": {"rollout": {"n": 2}}}
    metrics = {}
    meta = KVBatchMeta(keys=keys, tags=[{} for _ in keys], partition_id="train")
    PPOTrainer._compute_advantage(SimpleNamespace(config=OmegaConf.create(config)), meta, metrics)
    assert torch.equal(put["advantages"].values(), put["returns"].values())
    return put["advantages"].to_padded_tensor(0.0), metrics


@pytest.mark.parametrize("by_deviation", [True, False])
def test_without_dithering_redit_grpo_has_the_bits_of_verls_grpo_groups_of_one_included(by_deviation):
    config = OmegaConf.create({"norm_adv_by_std_in_grpo": by_deviation, "redit": {"dither_level": 0.0}})
    data = batch("aabbabcd")
    ours, theirs = estimate(data, config=config), estimate(data, "grpo", config)
    assert torch.equal(ours, theirs) and theirs[-1, 0] != 0
    assert torch.equal(estimate(data), estimate(data, "grpo"))  # with config=None, as compute_advantage has it


@pytest.mark.parametrize("by_deviation", [True, False])
def test_dithered_advantages_are_those_of_group_advantages_with_verls_numbers(by_deviation):
    data = batch()
    config = section(dither_level=0.1, dither_distribution="uniform", dither_reward_scale=2.0, dither_seed=7,
                     dither_schedule="cosine_reverse", dither_total_steps=50, dither_dead_groups="skip")  # fmt: skip
    config.norm_adv_by_std_in_grpo = by_deviation
    SkipManager.set_step(12)
    expected = rf.group_advantages(
        data.batch["token_level_rewards"].sum(-1),
        group_ids=torch.tensor([5, 5, 3, 3, 5, 3, 9, 9]),
        dither=rf.Dither("uniform", 0.1, 2.0, "cosine_reverse", 50, "skip", 7),
        step=12,
        scale="group" if by_deviation else "none",
        eps=1e-6,
    ).values
    assert torch.equal(estimate(data, config=config), expected[:, None] * data.batch["response_mask"])


def test_the_command_line_turns_dithering_on(command_line):
    verl_config.validate_config(command_line, use_reference_policy=False, use_critic=False)
    data, config = batch(), command_line.algorithm
    dithered, clean = estimate(data, config=config), estimate(data, "grpo")
    assert not torch.equal(dithered, estimate(data, config=config))  # further noise of the same step
    assert 0 < (dithered - clean).abs().max() < 1 and not dithered[data.batch["response_mask"] == 0].any()


@pytest.mark.parametrize(
    ("option", "value", "error", "message"),
    [
        ("algorithm.redit.dither_lvel", 0.05, ValueError, r"algorithm\.redit\.dither_lvel is not an option"),
        ("algorithm.adv_estimator", "grpo", ValueError, r"level=0\.05 needs algorithm\.adv_estimator=redit_grpo, got"),
        ("optim.override_optimizer_config", {"gr_gama": 0.1}, ValueError, "gr_gama is not an option; did you mean"),
        ("policy_loss.loss_mode", "redit_ppo", ValueError, "Unsupported loss mode: redit_ppo"),
        ("policy_loss.loss_mode", "redit_dppo_kl", NotImplementedError, r"needs actor\.clip_ratio_c=20, got 3\.0"),
    ],
)
def test_verls_check_of_its_configuration_before_a_run_checks_ours(command_line, option, value, error, message):
    config = copy.deepcopy(command_line)
    option = option if option.startswith("algorithm") else f"actor_rollout_ref.actor.{option}"
    OmegaConf.update(config, option, value, force_add=True)
    with pytest.raises(error, match=message):
        verl_config.validate_config(config, use_reference_policy=False, use_critic=False)


def checkpoint_of_step(step, folder):
    (folder / f"global_step_{step}/actor").mkdir(parents=True)
    (folder / "latest_checkpointed_iteration.txt").write_text(str(step))


@pytest.mark.parametrize("trainer_class", [RayPPOTrainer, PPOTrainer])
def test_a_resumed_run_draws_the_noise_of_the_uninterrupted_one(trainer_class, tmp_path, monkeypatch):
    def run(steps):
        drawn = {}
        for step in steps:
            SkipManager.set_step(step)
            drawn[step] = [estimate(batch(seed=10 * step + i), config=section(**WEAK)) for i in range(2)]
        return drawn

    whole = run(range(1, 5))
    checkpoint_of_step(2, tmp_path)
    # In the new process: verl's own _load_checkpoint; what its workers load is left out.
    monkeypatch.setattr(verl_advantages, "_noise_counter", verl_advantages._NoiseCounter())
    SkipManager.set_step(-1)
    trainer = SimpleNamespace(
        config=OmegaConf.create({"trainer": {"resume_mode": "auto", "default_local_dir": str(tmp_path),
                                             "default_hdfs_dir": None, "del_local_ckpt_after_load": False}}),
        actor_rollout_wg=SimpleNamespace(load_checkpoint=lambda *args, **kwargs: None),
        use_critic=False,
        trainer_mode="sync",
    )  # fmt: skip
    trainer_class._load_checkpoint(trainer)
    resumed = run(range(trainer.global_steps + 1, 5))
    assert list(resumed) == [3, 4]
    for step, (first, second) in resumed.items():
        assert torch.equal(first, whole[step][0]) and torch.equal(second, whole[step][1])


@pytest.mark.parametrize("trainer_class", [RayPPOTrainer, PPOTrainer])
def test_verls_trainers_publish_every_step_before_they_train_it_and_validation_moves_nothing(trainer_class):
    lines = [line.strip() for line in inspect.getsource(trainer_class.fit).splitlines()]
    advances = [i for i, line in enumerate(lines) if line == "self.global_steps += 1"]
    assert len(advances) == 2
    for i in advances:
        assert "SkipManager.set_step(self.global_steps)" in [line for line in lines[i + 1 : i + 6] if line]
    validation = inspect.getsource(trainer_class._validate)
    assert "advantage" not in validation and "set_step" not in validation


def test_noise_changes_with_the_step_and_with_every_call_within_a_step():
    data, config = batch("aaaaaaaa"), section(**WEAK)
    one_step = [estimate(data, config=config) for _ in range(2)]
    SkipManager.set_step(2)
    other_step = estimate(data, config=config)
    assert not torch.equal(*one_step) and not torch.equal(other_step, one_step[0])
    rewards = data.batch["token_level_rewards"].sum(-1)
    second = rf.group_advantages(rewards, group_size=8, dither=rf.Dither(), step=1, eps=1e-6,
                                 sample_ids=torch.arange(8, 16)).values  # fmt: skip
    assert torch.equal(one_step[1], second[:, None] * data.batch["response_mask"])


def test_a_trainer_that_publishes_no_step_is_refused_only_with_dithering(monkeypatch):
    monkeypatch.setattr(SkipManager, "step", -1)
    estimate(batch(), config=section())
    with pytest.raises(RuntimeError, match="redit_grpo with dither_level above 0 needs the training step"):
        estimate(batch(), config=section(**WEAK))


def sessions():
    """Prompt a with two sessions, of three outputs and one; prompt b_1 with two sessions of one; the outputs of a
    session carry other rewards than its last, and rows are not in order."""
    data = batch(["a", "b_1", "a", "a", "a", "b_1"])
    return data, ["a_0_1", "b_1_0_0", "a_0_2", "a_1_0", "a_0_0", "b_1_1_0"]


def test_v1_counts_the_outputs_of_a_session_once_as_verls_grpo_does(monkeypatch):
    data, keys = sessions()
    (ours, metrics), (theirs, _) = (estimate_v1(monkeypatch, data, keys, name) for name in ("redit_grpo", "grpo"))
    assert torch.equal(ours, theirs) and metrics == {}
    assert not torch.equal(ours, estimate(data)[:, : ours.shape[1]])  # without keys every row counts
    assert torch.equal(estimate(data), estimate(data, "grpo"))  # and V1's keys are gone


def test_v1_gives_the_outputs_of_a_session_one_dithered_advantage(monkeypatch):
    data, keys = sessions()
    by_row = estimate_v1(monkeypatch, data, keys, **WEAK)[0][:, 0]
    rewards = data.batch["token_level_rewards"].sum(-1)[[2, 1, 3, 5]]  # the last outputs
    expected = rf.group_advantages(rewards, group_ids=torch.tensor([0, 1, 0, 1]), dither=rf.Dither(), step=1, eps=1e-6)
    assert torch.equal(by_row, expected.values[[0, 1, 0, 2, 0, 3]])


def test_v1_logs_how_much_of_the_advantages_is_noise_and_leaves_its_padding_out(monkeypatch):
    data = batch(["a", "a", "b", "b", "pad", "pad"])
    data.batch["token_level_rewards"][2:] = 0
    data.batch["response_mask"][4:] = 0
    keys = ["a_0_0", "a_1_0", "b_0_0", "b_1_0", "pad_0_0", "pad_1_0"]
    advantages, metrics = estimate_v1(monkeypatch, data, keys, **WEAK)
    by_row = advantages[:4, 0]
    assert metrics == {
        "dither/advantage_std": pytest.approx(by_row.std().item()),
        "adv/rms_dead_groups": pytest.approx(by_row[2:].square().mean().sqrt().item()),
    }
    assert metrics["adv/rms_dead_groups"] > 0.6
    assert estimate_v1(monkeypatch, data, keys, **WEAK, dither_dead_groups="skip")[1]["adv/rms_dead_groups"] == 0


@pytest.mark.parametrize(
    ("name", "value", "error", "message"),
    [
        ("dither_lvel", 0.1, ValueError, "is not an option; did you mean dither_level"),
        ("noise", 0.1, ValueError, "is not an option; the options are dither_level, "),
        ("dither_level", -0.1, ValueError, r"must be finite and at least 0, got -0\.1"),
        ("dither_level", "high", TypeError, "must be a number, got 'high'"),
        ("dither_distribution", "normal", ValueError, "must be one of 'gaussian', 'uniform'; got 'normal'"),
        ("dither_reward_scale", [1, 2], TypeError, "must be a number, got"),
        ("dither_schedule", "linear", ValueError, "must be one of 'constant', "),
        ("dither_total_steps", 1.5, TypeError, r"must be an int, got 1\.5"),
        ("dither_dead_groups", "drop", ValueError, "must be one of 'apply', "),
        ("dither_seed", -1, ValueError, r"must be in \[0, 2\*\*64\), got -1"),
    ],
)
def test_a_bad_option_stops_the_run_by_its_name(name, value, error, message):
    with pytest.raises(error, match=rf"^algorithm\.redit\.{name} {message}"):
        estimate(batch(), config=section(**{name: value}))


def test_options_are_checked_also_where_transformers_has_parsed_them_for_trl():
    HfArgumentParser(DitherOptions)  # writes other types into the fields
    with pytest.raises(TypeError, match=r"algorithm\.redit\.dither_level must be a number, got 'high'"):
        estimate(batch(), config=section(dither_level="high"))


def test_what_is_no_section_is_refused():
    with pytest.raises(TypeError, match=r"algorithm\.redit must be a section of options, got 0\.05"):
        estimate(batch(), config=OmegaConf.create({"norm_adv_by_std_in_grpo": True, "redit": 0.05}))


# The plugin


def test_an_installed_entry_point_registers_at_import_verl_and_import_redit_fast_does_not_import_verl(tmp_path):
    entry_points = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]
    assert entry_points == {"verl.plugins": {"redit_fast": "redit_fast.integrations.verl"}}
    info = tmp_path / "redit_fast_under_test-0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: redit-fast-under-test\nVersion: 0\n")
    (info / "entry_points.txt").write_text("[verl.plugins]\nredit_fast = redit_fast.integrations.verl\n")
    script = (
        "import sys, redit_fast\n"
        "assert not {'verl', 'ray'} & set(sys.modules)\n"
        "import verl\n"
        "from verl.trainer.ppo.core_algos import get_adv_estimator_fn, get_policy_loss_fn\n"
        "print(get_adv_estimator_fn('redit_grpo').__module__, get_policy_loss_fn('redit_vanilla').func.__module__)\n"
    )
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}", "CUDA_VISIBLE_DEVICES": ""}
    environment.pop("VERL_USE_EXTERNAL_PLUGINS", None)
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["redit_fast.integrations.verl.advantages", "redit_fast.integrations.verl.loss"]


def test_registering_twice_wraps_nothing_twice():
    before = PPOTrainer._compute_advantage, verl_config.validate_config, ADV_ESTIMATOR_REGISTRY["redit_grpo"]
    plugin.register()
    assert before == (PPOTrainer._compute_advantage, verl_config.validate_config, ADV_ESTIMATOR_REGISTRY["redit_grpo"])


def state_of_verl():
    """Everything that the plugin changes, by identity: its registries, and the four things of verl's own."""
    engines = {kind: {name: dict(devices) for name, devices in names.items()}
               for kind, names in EngineRegistry._engines.items()}  # fmt: skip
    functions = (PPOTrainer._compute_advantage, verl_config.validate_config, verl.utils.validate_config,
                 monkey_patch.patch_forward_with_backends)  # fmt: skip
    return dict(ADV_ESTIMATOR_REGISTRY), set(POLICY_LOSS_REGISTRY), engines, functions


def test_unregister_takes_everything_back_and_register_works_again(command_line):
    registered = state_of_verl()
    held = verl_config.validate_config  # as verl.trainer.main_ppo holds it, which imports the name
    try:
        plugin.unregister()
        plugin.unregister()
        estimators, losses, engines, functions = state_of_verl()
        assert "redit_grpo" not in estimators and not any(name.startswith("redit_") for name in losses)
        assert engines["language_model"]["fsdp2"]["cuda"] is FSDPEngineWithLMHead
        assert [f.__module__ for f in functions] == [trainer_base.__name__, *2 * [verl_config.__name__],
                                                     monkey_patch.__name__]  # fmt: skip
        unknown = copy.deepcopy(command_line)
        OmegaConf.update(unknown, "algorithm.redit.dither_lvel", 0.1, force_add=True)
        for check in (held, verl_config.validate_config):
            check(unknown, use_reference_policy=False, use_critic=False)
        with pytest.raises(ValueError, match="redit_grpo"):
            estimate(batch())
    finally:
        plugin.register()
    again = state_of_verl()
    assert again[:3] == registered[:3] and all(f.__module__.startswith("redit_fast.") for f in again[3])
    with pytest.raises(ValueError, match="dither_lvel is not an option"):
        verl_config.validate_config(unknown, use_reference_policy=False, use_critic=False)
    assert torch.equal(estimate(batch()), estimate(batch(), "grpo"))


def test_in_a_process_of_its_own_unregister_leaves_what_a_verl_without_plugins_has():
    """The same list as `state_of_verl`, by name, of verl with VERL_USE_EXTERNAL_PLUGINS=none."""
    script = (
        "import verl, verl.utils.config as c, verl.models.transformers.monkey_patch as m\n"
        "from verl.trainer.ppo import core_algos as a\n"
        "from verl.trainer.ppo.v1 import PPOTrainer\n"
        "from verl.workers.engine import EngineRegistry\n"
        "import verl.workers.engine.fsdp.transformer_impl\n"
        "if UNREGISTER:\n"
        "    import redit_fast.integrations.verl as plugin\n"
        "    assert 'redit_grpo' in a.ADV_ESTIMATOR_REGISTRY\n"
        "    plugin.unregister()\n"
        "functions = [PPOTrainer._compute_advantage, c.validate_config, verl.utils.validate_config,\n"
        "             m.patch_forward_with_backends]\n"
        "print('STATE', sorted(a.ADV_ESTIMATOR_REGISTRY), sorted(a.POLICY_LOSS_REGISTRY), EngineRegistry._engines,\n"
        "      [(f.__module__, f.__qualname__) for f in functions])\n"
    )

    def state(unregister):
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "VERL_USE_EXTERNAL_PLUGINS": "none"}
        done = subprocess.run([sys.executable, "-c", f"UNREGISTER = {unregister}\n{script}"], env=environment,
                              capture_output=True, text=True)  # fmt: skip
        assert done.returncode == 0, done.stderr
        return next(line for line in done.stdout.splitlines() if line.startswith("STATE"))

    assert state(True) == state(False)


@pytest.mark.parametrize(
    ("owner", "name"),
    [(core_algos, "agg_loss"), (ray_trainer, "compute_advantage"), (SkipManager, "set_step"),
     (PPOTrainer, "_compute_advantage"), (FSDPEngineWithLMHead, "optimizer_step"),
     (monkey_patch, "patch_forward_with_backends"), (verl_config, "validate_config")],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_a_verl_with_other_hooks_is_refused_by_version_with_one_warning(owner, name, caplog):
    """And is left as it was."""
    plugin.unregister()
    try:
        with pytest.MonkeyPatch.context() as other:
            other.setattr(owner, name, lambda data: None)
            before = state_of_verl()
            message = rf"redit_fast.integrations.verl got verl {verl.__version__}, whose .*{name} .*; supported: 0.9.1"
            with caplog.at_level(logging.WARNING), pytest.raises(RuntimeError, match=message):
                plugin.__spec__.loader.exec_module(plugin)  # as verl's `import` of the entry point
            assert state_of_verl() == before
    finally:
        plugin.register()
    assert [(record.levelname, name in record.message) for record in caplog.records] == [("WARNING", True)]


@pytest.mark.parametrize(
    ("owner", "name"),
    [(monkey_patch, "patch_forward_with_backends"), (verl_config, "validate_config"), (verl.utils, "validate_config"),
     (PPOTrainer, "_compute_advantage")],
    ids=lambda value: value if isinstance(value, str) else value.__name__,
)  # fmt: skip
def test_what_another_plugin_puts_around_ours_stays(owner, name, monkeypatch):
    """functools.wraps gives it all attributes that ours has."""
    ours = getattr(owner, name)

    @functools.wraps(ours)
    def around(*args, **kwargs):
        return ours(*args, **kwargs)

    monkeypatch.setattr(owner, name, around)
    plugin.register()
    assert getattr(owner, name) is around  # twice is once
    try:
        plugin.unregister()
        assert getattr(owner, name) is around
    finally:
        plugin.register()
    assert getattr(owner, name) is around


def test_a_verl_without_a_module_that_is_hooked_is_refused_by_version(monkeypatch):
    monkeypatch.delattr("redit_fast.integrations.verl.advantages")
    monkeypatch.delitem(sys.modules, "redit_fast.integrations.verl.advantages")
    monkeypatch.setitem(sys.modules, "verl.utils.skip", None)
    with pytest.raises(RuntimeError, match=r"got verl .*, in which it does not find its hooks \(.*verl\.utils\.skip"):
        plugin.register()
