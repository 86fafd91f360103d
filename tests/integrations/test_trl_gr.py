"""Dithered rewards and GR in TRL's real trainers: what comes out is our advantages, and a hand-written double pass."""

import copy
import functools

import pytest
import torch

import redit_fast as rf

pytest.importorskip("trl", reason="TRL is not installed: its integration needs it")
pytest.register_assert_rewrite("tests.integrations.trl_trainers")  # imported below, and a plugin: its fixtures

from datasets import Dataset  # noqa: E402
from transformers import Qwen2ForCausalLM  # noqa: E402
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer, SFTConfig, SFTTrainer  # noqa: E402
from trl.trainer.utils import nanstd  # noqa: E402

from redit_fast.integrations.transformers import GRTrainerMixin  # noqa: E402
from redit_fast.integrations.trl import ReditGRPOConfig, ReditGRPOTrainer, patch  # noqa: E402
from redit_fast.noise import noise as counter_noise  # noqa: E402
from redit_fast.training import builtin  # noqa: E402
from tests.integrations.trl_trainers import GROUP, even_ids, logs  # noqa: E402
from tests.tolerance import relative  # noqa: E402

pytest_plugins = ("tests.integrations.trl_trainers",)
pytestmark = pytest.mark.filterwarnings("ignore:.*pin_memory", "ignore:.*gradient_checkpointing")
N = 2 * GROUP
GR = {"gr_gamma": 0.03, "gr_epsilon": 0.05}
OURS = {"dither/reward_std", "dither/advantage_std", "adv/rms_dead_groups"}


def long_or_none(completion_ids, **_):
    return [None if ids[0] % 3 == 0 else float(len(set(ids))) for ids in completion_ids]


def watching(cls):
    """The trainer, keeping every generation's clean rewards and advantages, and every call of its loss."""

    class Watching(cls):
        def _calculate_rewards(self, *args):
            rewards = super()._calculate_rewards(*args)
            self.__dict__.setdefault("rewards", []).append(rewards)
            return rewards

        def _generate_and_score_completions(self, inputs):
            output = super()._generate_and_score_completions(inputs)
            kept = (self.state.global_step, output["advantages"].clone(), list(self._logs["advantages"])[-N:])
            self.__dict__.setdefault("generations", []).append(kept)
            return output

        def _compute_loss(self, model, inputs):
            state = (self.__dict__.get("entropy_coef"), self.__dict__.get("_last_world_entropy"))
            loss = super()._compute_loss(model, inputs)
            call = (copy.copy(inputs), loss.detach(), state, torch.get_rng_state())
            self.__dict__.setdefault("calls", []).append(call)
            return loss

    return Watching


def test_the_advantages_are_those_of_group_advantages_and_the_logs_keep_the_clean_rewards(a_trainer):
    options = {"gradient_accumulation_steps": 2, "steps_per_generation": 1, "steps": 2, "reward_weights": [1.0, 0.5]}
    fields = {"dither_level": 0.2, "dither_distribution": "uniform", "dither_reward_scale": [1.0, 6.0],
              "dither_schedule": "square_root", "dither_seed": 7}  # fmt: skip
    rewards = [even_ids, long_or_none]
    stock = a_trainer(watching(GRPOTrainer), GRPOConfig, rewards=rewards, **options)
    stock.train()
    ours = a_trainer(watching(ReditGRPOTrainer), ReditGRPOConfig, rewards=rewards, **options, **fields)
    ours.train()
    dither = rf.Dither("uniform", 0.2, [1.0, 6.0], "square_root", seed=7)
    assert [step for step, _, _ in ours.generations] == [0, 0, 1, 1]
    assert any(clean.isnan().any() for clean in ours.rewards)
    for i, ((step, advantages, logged), clean) in enumerate(zip(ours.generations, ours.rewards)):
        ids = torch.arange(N) + N * (i % 2)  # the second generation of an optimizer step draws its own noise
        expected = rf.group_advantages(clean, group_size=GROUP, reward_weights=[1.0, 0.5], dither=dither, step=step,
                                       sample_ids=ids)  # fmt: skip
        assert torch.equal(advantages, expected.values) and logged == expected.values.tolist()
        plain = rf.group_advantages(clean, group_size=GROUP, reward_weights=[1.0, 0.5])
        assert not torch.allclose(advantages, plain.values, atol=1e-2)
    first, theirs = logs(ours)[0], logs(stock)[0]
    assert set(first) - set(theirs) == OURS and not set(theirs) - set(first)
    for name in theirs:
        if name.startswith(("reward", "frac_reward", "completions", "entropy")):
            assert first[name] == pytest.approx(theirs[name], rel=1e-5), name


def test_the_metrics_describe_the_dithered_rewards(a_trainer):
    fields = {"dither_level": 0.3, "dither_dead_groups": "apply"}
    trainer = a_trainer(watching(ReditGRPOTrainer), ReditGRPOConfig, steps=1, rewards=long_or_none, **fields)
    trainer.train()
    dither, clean = rf.Dither(level=0.3, seed=trainer.args.seed), trainer.rewards[0]
    noise = counter_noise("gaussian", 0.3, dither.seed, torch.arange(N), 0, 0)[:, None]
    assert clean.isnan().any()
    log, (_, advantages, _) = logs(trainer)[0], trainer.generations[0]
    assert log["dither/reward_std"] == pytest.approx(nanstd(clean.double() + noise).item(), rel=1e-5)
    assert log["dither/advantage_std"] == pytest.approx(advantages.std().item(), rel=1e-6)

    def constant(completion_ids, **_):
        return [1.0] * len(completion_ids)

    for policy, rms in (("apply", pytest.approx(0.75**0.5, rel=1e-2)), ("skip", 0)):
        trainer = a_trainer(ReditGRPOTrainer, ReditGRPOConfig, steps=1, rewards=constant, dither_level=0.1,
                            dither_dead_groups=policy)  # fmt: skip
        trainer.train()
        assert logs(trainer)[0]["frac_reward_zero_std"] == 1 and logs(trainer)[0]["adv/rms_dead_groups"] == rms


def test_evaluation_is_neither_dithered_nor_regularised(a_trainer):
    fields = {"eval_strategy": "steps", "eval_steps": 1, "gradient_accumulation_steps": 2, "steps": 1}
    stock = a_trainer(watching(GRPOTrainer), GRPOConfig, learning_rate=0.0, **fields)
    stock.train()
    ours = a_trainer(watching(ReditGRPOTrainer), ReditGRPOConfig, learning_rate=0.0, dither_level=0.5, **fields, **GR)
    ours.train()
    assert len(stock.calls) == 2 + 1 and len(ours.calls) == 2 * 2 + 1
    evaluations = [[entry for entry in trainer.state.log_history if "eval_loss" in entry] for trainer in (ours, stock)]
    for mine, theirs in zip(*evaluations):
        assert mine.keys() == theirs.keys() and any(name.startswith("eval_reward") for name in mine)
        for name in set(mine) - {"eval_runtime", "eval_samples_per_second", "eval_steps_per_second"}:
            assert mine[name] == pytest.approx(theirs[name], rel=1e-5, abs=1e-6, nan_ok=True), name
    assert torch.allclose(ours.generations[1][1], stock.generations[1][1])  # advantages of the evaluation
    assert not torch.allclose(ours.generations[0][1], stock.generations[0][1], atol=1e-2)


@pytest.mark.parametrize("dead_groups", ["apply", "skip", "only"])
def test_rloo_gets_the_noise_from_its_reward_hook_and_logs_the_clean_rewards(a_trainer, dead_groups):
    def rewards(prompts, completion_ids, **_):
        return [1.0 if prompt == prompts[0] else value for prompt, value in zip(prompts, even_ids(completion_ids))]

    stock = a_trainer(watching(RLOOTrainer), RLOOConfig, rewards=rewards, steps=1)
    stock.train()
    trainer = a_trainer(watching(RLOOTrainer), RLOOConfig, rewards=rewards, steps=1)
    with patch(trainer, dither_level=0.2, dither_dead_groups=dead_groups):
        trainer.train()
    clean = stock.rewards[0][:, 0]
    assert torch.equal(trainer.rewards[0][:, 0], clean)
    noise = counter_noise("gaussian", 0.2, trainer.args.seed, torch.arange(N), 0, 0)
    dead = torch.arange(N) < GROUP
    kept = {"apply": dead | ~dead, "skip": ~dead, "only": dead}[dead_groups]
    expected = rf.group_advantages(clean + torch.where(kept, noise, 0), group_size=GROUP, baseline="leave_one_out",
                                   scale="none").values  # fmt: skip
    assert torch.allclose(trainer.generations[0][1], expected, atol=1e-6)
    assert not torch.allclose(expected, stock.generations[0][1], atol=1e-2)
    mine, theirs = logs(trainer)[0], logs(stock)[0]
    assert set(mine) - set(theirs) == OURS
    for name in theirs:
        if name.startswith(("reward", "frac_reward")):
            assert mine[name] == pytest.approx(theirs[name], rel=1e-6), name


def by_hand(trainer, calls, accumulation):
    """Plain torch around TRL's own loss: the gradient at theta, the one at theta + epsilon g1, SGD."""
    gamma, epsilon = GR.values()
    model = trainer.model.train()
    trainer.current_gradient_accumulation_steps = accumulation
    params, moved = list(model.parameters()), list(model.model.layers.parameters())
    norms = []

    def gradient(batches):
        model.zero_grad()
        for inputs, *_ in batches:
            trainer._compute_loss(model, inputs).backward()
        return [p.grad.clone() for p in params]

    for start in range(0, len(calls), accumulation):
        batches = calls[start : start + accumulation]
        first = gradient(batches)
        direction = [p.grad.clone() for p in moved]
        length = torch.stack([g.norm() for g in direction]).norm()
        with torch.no_grad():
            theta = [p.clone() for p in moved]
            for p, g in zip(moved, direction):
                p += epsilon * min(1, 10 / length) * g
        second = gradient(batches)
        with torch.no_grad():
            for p, before in zip(moved, theta):
                p.copy_(before)
            combined = [(1 - gamma / epsilon) * g1 + gamma / epsilon * g2 for g1, g2 in zip(first, second)]
            norms.append(torch.stack([g.norm() for g in combined]).norm().item())
            for p, g in zip(params, combined):
                p -= 0.1 * min(1, 0.5 / norms[-1]) * g
    return norms


def passes(calls, accumulation):
    starts = range(0, len(calls), 2 * accumulation)
    return ([call for start in starts for call in calls[start : start + accumulation]],
            [call for start in starts for call in calls[start + accumulation : start + 2 * accumulation]])  # fmt: skip


@pytest.mark.parametrize(
    "options",
    [
        {"gradient_accumulation_steps": 2, "beta": 0.1, "entropy_coef": 0.05},
        {"loss_type": "grpo", "num_iterations": 2},
    ],
    ids=["accumulation", "iterations"],
)
def test_gr_is_a_hand_written_double_pass_over_the_same_rollouts(a_trainer, options):
    generations = []

    @functools.wraps(even_ids)  # the name is a key of the logs
    def rewards(completion_ids, **_):
        generations.append(len(completion_ids))
        return even_ids(completion_ids)

    accumulation = options.get("gradient_accumulation_steps", 1)
    trainer = a_trainer(watching(ReditGRPOTrainer), ReditGRPOConfig, rewards=rewards, **options, **GR)
    start = [p.detach().clone() for p in trainer.model.parameters()]
    trainer.train()
    assert generations == [accumulation * N] * (3 if accumulation == 2 else 2)  # none for the second passes
    first, second = passes(trainer.calls, accumulation)
    assert len(first) == len(second) == 3 * accumulation
    for one, two in zip(first, second):
        assert one[0].keys() == two[0].keys() and one[1] != two[1]
        assert all(torch.equal(one[0][name], two[0][name]) for name in one[0])
        assert ("old_per_token_logps" in one[0]) == ("num_iterations" in options)
    stock = a_trainer(GRPOTrainer, GRPOConfig, **options)
    norms = by_hand(stock, first, accumulation)
    for p, q, before in zip(trainer.model.parameters(), stock.model.parameters(), start):
        assert relative(p.detach() - before, q.detach() - before) < 2e-3 and torch.allclose(p, q, rtol=0, atol=1e-5)
    assert [entry["grad_norm"] for entry in logs(trainer)] == pytest.approx(norms, rel=1e-4)
    plain = a_trainer(GRPOTrainer, GRPOConfig, **options)
    plain.train()
    one, theirs = logs(trainer)[0], logs(plain)[0]
    assert {name for name in one if name not in theirs and not name.startswith("gr/")} == {"time/gr_pass2"}
    for name in set(theirs) - {"grad_norm", "step_time"}:  # the logs are the first pass's
        assert one[name] == pytest.approx(theirs[name], rel=1e-5, abs=1e-6, nan_ok=True), name
    assert trainer._step == plain._step


@pytest.mark.parametrize("ratio", ["fresh", "pass1"])
def test_the_second_passes_ratio_is_its_own_or_the_first_passes(a_trainer, ratio):
    trainer = a_trainer(watching(ReditGRPOTrainer), ReditGRPOConfig, steps=1, gr_pass2_ratio=ratio, **GR)
    trainer.train()
    (one, two) = trainer.calls
    assert "old_per_token_logps" not in one[0]
    if ratio == "fresh":
        assert "old_per_token_logps" not in two[0]
        assert two[1].item() == pytest.approx(one[1].item(), abs=1e-6)  # of ratio 1 in both, as on policy
    else:
        stock = a_trainer(GRPOTrainer, GRPOConfig, steps=1)
        inputs = one[0]
        ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
        mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1)
        length = inputs["completion_ids"].size(1)
        logp, *_ = stock._get_per_token_logps_and_entropies(stock.model, ids, mask, length)
        assert torch.allclose(two[0]["old_per_token_logps"], logp, atol=1e-5) and two[1] != one[1]


def test_adaptive_entropy_and_its_mask_are_the_first_passes_in_the_second_and_advance_once(a_trainer):
    options = {"use_adaptive_entropy": True, "entropy_target": 9.0, "entropy_coef_delta": 0.125, "entropy_coef": 0.25,
               "gradient_accumulation_steps": 2, "top_entropy_quantile": 0.4}  # fmt: skip
    masks = []

    class Masks(watching(ReditGRPOTrainer)):
        def get_high_entropy_mask(self, *args):
            masks.append(super().get_high_entropy_mask(*args))
            return masks[-1]

    trainer = a_trainer(Masks, ReditGRPOConfig, **options, **GR)
    trainer.train()
    first, second = passes(trainer.calls, 2)
    assert [call[2] for call in first] == [call[2] for call in second]
    assert [call[2][0] for call in first] == [0.25, 0.25, 0.375, 0.375, 0.5, 0.5] and trainer.entropy_coef == 0.625
    assert [entry["entropy_coef"] for entry in logs(trainer)] == [0.375, 0.5, 0.625]
    assert masks[2] is masks[0] and masks[3] is masks[1] and masks[4] is not masks[0]


def test_a_resumed_run_is_the_uninterrupted_one(a_trainer, tmp_path):
    options = {"save_strategy": "steps", "save_steps": 2, "optim": "adamw_torch", "learning_rate": 1e-3,
               "dither_level": 0.1, "num_iterations": 2, **GR}  # fmt: skip
    whole = a_trainer(watching(ReditGRPOTrainer), ReditGRPOConfig, steps=4, **options)
    whole.train()
    half = a_trainer(ReditGRPOTrainer, ReditGRPOConfig, steps=4, **options)
    half.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert [step for step, *_ in whole.generations] == [0, 2]
    assert all(torch.equal(p, q) for p, q in zip(whole.model.parameters(), half.model.parameters()))


def test_a_batch_that_the_host_skips_is_in_neither_pass_and_its_generation_draws_its_noise_once(a_trainer):
    """Out of memory in the loss, and in a generation whose rewards are there already: TRL's next call does it again."""
    failures = ["generation", "loss"]

    class Skipping(watching(ReditGRPOTrainer)):
        def training_step(self, *args):
            try:
                return super().training_step(*args)
            except torch.OutOfMemoryError:
                return torch.zeros(())

        def _calculate_rewards(self, *args):
            found = super()._calculate_rewards(*args)
            self._fail("generation")
            return found

        def _compute_loss(self, model, inputs):
            self._fail("loss")
            return super()._compute_loss(model, inputs)

        def _fail(self, where):
            if where in failures:
                failures.remove(where)
                raise torch.OutOfMemoryError("CUDA out of memory.")

    trainer = a_trainer(Skipping, ReditGRPOConfig, steps=2, gradient_accumulation_steps=3, dither_level=0.2, **GR)
    trainer.train()
    assert failures == [] and len(trainer.calls) == 2 * (1 + 3)
    for i, j in ((0, 1), (2, 5), (3, 6), (4, 7)):
        one, two = trainer.calls[i][0], trainer.calls[j][0]
        assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)
    step, advantages, _ = trainer.generations[0]
    dither = rf.Dither(level=0.2, seed=trainer.args.seed)
    expected = rf.group_advantages(trainer.rewards[1], group_size=GROUP, dither=dither, step=0).values
    assert step == 0 and torch.equal(advantages, expected)


def test_trls_sft_trainer_with_the_mixin_logs_the_first_pass_alone(folders, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setenv("CI", "1")

    class GRSFTTrainer(GRTrainerMixin, SFTTrainer):
        pass

    rows = Dataset.from_list([{"prompt": p, "completion": c} for p, c in builtin.demonstrations(8, short=0.0, seed=0)])
    found = []
    for cls, fields in ((SFTTrainer, {}), (GRSFTTrainer, GR)):
        args = SFTConfig(str(tmp_path), per_device_train_batch_size=2, max_steps=2, logging_steps=1, optim="sgd",
                         save_strategy="no", report_to="none", use_cpu=True, bf16=False, disable_tqdm=True)  # fmt: skip
        model = Qwen2ForCausalLM.from_pretrained(folders["qwen2"])
        trainer = cls(model, args, train_dataset=rows, processing_class=tokenizer, **fields)
        trainer.train()
        found.append(logs(trainer))
    stock, ours = found
    assert {"gr/g1_norm", "time/gr_pass2"} <= set(ours[0]) - set(stock[0])
    for name in set(stock[0]) - {"grad_norm"}:
        assert ours[0][name] == pytest.approx(stock[0][name], rel=1e-6), name
    assert ours[1]["num_tokens"] == stock[1]["num_tokens"] and ours[0]["grad_norm"] != stock[0]["grad_norm"]


def test_lora_adapters_train_as_trls_and_alone_are_perturbed(a_trainer):
    peft = pytest.importorskip("peft", reason="PEFT is not installed: LoRA needs it")
    lora = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    stock = a_trainer(GRPOTrainer, GRPOConfig, peft=lora, beta=0.1, steps=10)
    stock.train()
    ours = a_trainer(ReditGRPOTrainer, ReditGRPOConfig, peft=lora, beta=0.1, steps=10)
    ours.train()
    assert all(
        torch.allclose(p, q, rtol=0, atol=1e-5) for p, q in zip(ours.model.parameters(), stock.model.parameters())
    )
    trainer = a_trainer(watching(ReditGRPOTrainer), ReditGRPOConfig, peft=lora, beta=0.1, **GR)
    start = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    trainer.train()
    moved = {name for name, p in trainer.model.named_parameters() if not torch.equal(p, start[name])}
    assert moved == {name for name, p in trainer.model.named_parameters() if p.requires_grad} and len(moved) == 8
    first, second = passes(trainer.calls, 1)
    assert len(first) == len(second) == 3 and all(torch.equal(one[0]["ref_per_token_logps"],
                                                              two[0]["ref_per_token_logps"])
                                                  for one, two in zip(first, second))  # fmt: skip
