"""What `redit-fast to-verl` writes, in verl 0.9.1: its dataset, its reward manager, its configuration, a step of its
worker. No ray is started, and there is no vLLM.
"""

import json
import shlex
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("verl", reason="verl 0.9.1 is not installed")
pytest.register_assert_rewrite("tests.integrations.verl_rank")  # imported below, and a plugin: its fixtures

import datasets  # noqa: E402
import hydra  # noqa: E402
import verl  # noqa: E402
from torch.distributed.tensor import DTensor  # noqa: E402
from verl import DataProto  # noqa: E402
from verl.trainer.ppo.reward import load_reward_manager  # noqa: E402
from verl.trainer.ppo.utils import create_rl_dataset, need_critic, need_reference_policy  # noqa: E402
from verl.trainer.ppo.v1 import PPOTrainer  # noqa: E402
from verl.utils import config as verl_config  # noqa: E402
from verl.utils import tensordict_utils as tu  # noqa: E402
from verl.utils.config import omega_conf_to_dataclass  # noqa: E402
from verl.utils.dataset.rl_dataset import collate_fn  # noqa: E402
from verl.utils.tokenizer.continuous_token_wiring import create_continuous_token_builder  # noqa: E402
from verl.workers import engine_workers  # noqa: E402
from verl.workers.engine_workers import ActorRolloutRefWorker  # noqa: E402

import redit_fast as rf  # noqa: E402
from redit_fast.training import config_file, data, lora, policy, rewards, setup  # noqa: E402
from redit_fast.training.batch import Batch  # noqa: E402
from redit_fast.training.rollout import Rollout  # noqa: E402
from redit_fast.training.to_verl import to_verl  # noqa: E402

pytest_plugins = ("tests.integrations.verl_rank",)
pytestmark = pytest.mark.usefixtures("verl_process")
PASS1 = {"gr_pass2_ratio": "pass1"}


@pytest.fixture(autouse=True)
def no_device(monkeypatch, tmp_path):
    monkeypatch.setattr(engine_workers, "aggressive_empty_cache", lambda **_: None)  # of a GPU
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def write(settings, tmp_path):
    """The settings, and the folder that is written of them."""

    def write(**more):
        made = config_file.load(overrides={**settings, **PASS1, **more})
        return made, to_verl(made, tmp_path / "verl", "run")

    return write


def overrides_of(folder):
    """The words of run.sh as the shell reads them."""
    words = shlex.split((folder / "run.sh").read_text(), comments=True)
    return words[words.index("options=(") + 1 : words.index(")")]


def composed(folder, *more):
    with hydra.initialize_config_dir(str(Path(verl.__file__).parent / "trainer/config"), version_base=None):
        return hydra.compose("ppo_trainer", [*overrides_of(folder), *more])


def validated(folder, *more):
    found = composed(folder, *more)
    verl_config.validate_config(found, need_reference_policy(found), need_critic(found))
    return found


def chat(path, problems):
    lines = [json.loads(line) for line in problems.read_text().splitlines()]
    for line in lines:
        line["prompt"] = [{"role": "user", "content": line["prompt"]}]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}<|a|>{% endif %}"
)


@pytest.mark.parametrize("kind", ["text", "chat", "chat without a template"])
def test_verl_s_dataset_has_the_prompts_and_its_agent_loop_their_tokens(write, settings, problems, tmp_path, kind):
    home = settings["model"]
    if kind != "text":
        settings |= {"data": str(chat(tmp_path / "chat.jsonl", problems)), "system_prompt": "Be 'brief'."}
    if kind == "chat":
        model, tokenizer = policy.load(home, "cpu")
        tokenizer.chat_template = TEMPLATE
        for part in (model, tokenizer):
            part.save_pretrained(tmp_path / "model")
        settings["model"] = str(tmp_path / "model")
    made, folder = write()
    found = validated(folder)
    model = omega_conf_to_dataclass(found.actor_rollout_ref.model)
    records = data.load(made, model.tokenizer)
    builder = create_continuous_token_builder(model.tokenizer, hf_model_type="qwen2")
    tokenizer = policy.tokenizer_of(settings["model"])[1]
    for files, chosen in ((found.data.train_files, records.train), (found.data.val_files, records.held_out)):
        dataset = create_rl_dataset(files, found.data, model.tokenizer, model.processor)
        assert len(dataset) == len(chosen) > 0
        rows = collate_fn(list(dataset))
        for record, messages, reward_model in zip(chosen, rows["raw_prompt"], rows["reward_model"]):
            expected = data.render(tokenizer, record, made.system_prompt)
            assert builder.build_initial_tokens(messages) == expected
            assert len(expected) <= found.data.max_prompt_length
            assert json.loads(reward_model["ground_truth"]) == record


REWARD_CODE = """
def length(prompts, completions, answer, **columns):
    assert isinstance(prompts[0], str) and len(prompts) == 1
    return [len(completions[0]) if completions[0] else None]
length.reward_scale = 20.0
"""


def test_verl_s_reward_manager_calls_the_reward_functions_with_weights(write, tmp_path, monkeypatch):
    (tmp_path / "module").mkdir()
    (tmp_path / "module/mine.py").write_text(REWARD_CODE)
    monkeypatch.chdir(tmp_path)
    names = ["redit_fast.training.builtin:right_steps", "module/mine:length"]
    made, folder = write(rewards=names, reward_weights=[2.0, -0.5])
    monkeypatch.chdir("/")
    found = validated(folder)
    assert found.algorithm.redit.dither_reward_scale == pytest.approx(((2.0 * 0.5) ** 2 + (0.5 * 20.0) ** 2) ** 0.5)
    model = omega_conf_to_dataclass(found.actor_rollout_ref.model)
    dataset = create_rl_dataset(found.data.train_files, found.data, model.tokenizer, model.processor)
    manager = load_reward_manager(found, model.tokenizer)
    monkeypatch.chdir(tmp_path)
    record = data.load(made, model.tokenizer).train[0]
    functions = rewards.resolve(names, ["answer", "steps"])

    def scored(text):
        ids = torch.tensor([model.tokenizer(text)["input_ids"] + [model.tokenizer.eos_token_id] * 2])
        rows = collate_fn([dataset[0]])
        one = DataProto.from_dict(
            {"prompts": ids[:, :1], "responses": ids, "attention_mask": ids.new_ones(1, 1 + ids.shape[1])},
            {name: rows[name] for name in ("data_source", "reward_model", "extra_info")},
        )
        return manager.loop.run_until_complete(manager.run_single(one))

    for text in (record["steps"][0] + "\n<answer>1</answer>", "nothing"):
        steps, length = rewards.score_texts(functions, [record], [text])[0].tolist()
        result = scored(text)
        assert result["reward_score"] == pytest.approx(2 * steps - 0.5 * length) and length == len(text)
        assert result["reward_extra_info"]["rewards/length"] == length
        assert result["reward_extra_info"]["acc"] == (steps > 0)
    with pytest.raises(ValueError, match="reward function 'length' left a completion unscored"):
        scored("")


def samples_of(made, tokenizer):
    """Prompts, and completions of several lengths with an advantage and a drift of the policy that sampled them."""
    draw = torch.Generator().manual_seed(5)
    records = data.load(made, tokenizer).train[: made.prompts_per_step]
    prompts = [data.render(tokenizer, record) for record in records]
    count = made.prompts_per_step * made.group_size
    completions = [torch.randint(0, 400, (3 + i % 5,), generator=draw).tolist() for i in range(count)]
    advantages = torch.randn(count, generator=draw)
    return prompts, completions, advantages


def our_step(made, drift):
    """Of the trainer: the rollouts, the gradients that AdamW gets, and the weights after the step."""
    model, tokenizer = policy.load(made.model, "cpu")
    if made.lora_rank is not None:
        lora.attach(model, made, lora.base_of(made.model))
    start = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    prompts, completions, advantages = samples_of(made, tokenizer)
    rollout = Rollout(completions, [True] * len(completions))
    losses = setup.loss_config(made, model)
    batch = Batch.of(prompts, rollout, advantages, losses, made, 0, packed=made.packing != "off")
    old = batch.logp(model) + drift * torch.randn(
        sum(map(len, completions)), generator=torch.Generator().manual_seed(7)
    )
    if made.beta:
        batch.ref_logp = old - 0.3
    optimizer, learning_rate, gradients = setup.optimizer(made, model), setup.learning_rate(made), []

    def recorded(self, combined, factor):
        names = {p: name for name, p in model.named_parameters()}
        gradients.append({names[p]: (p.grad * factor).clone() for p in combined.params})
        return take_step(self, combined, factor)

    with pytest.MonkeyPatch.context() as patch:
        take_step = rf.RegularizedAdamW._take_step
        patch.setattr(rf.RegularizedAdamW, "_take_step", recorded)
        for number in range(made.updates_per_rollout):
            one = batch.backward(model, old)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(number)
            with optimizer.perturb() as perturbation:
                if perturbation:
                    batch.backward(model, old, masks_of=one)
            optimizer.step()
            optimizer.zero_grad()
    each = (batch.prompts, completions, old.split(batch.lengths), advantages)
    ref = batch.ref_logp.split(batch.lengths) if made.beta else None
    return each, ref, start, gradients, {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}


def batch_for(each, ref):
    rows = {name: [] for name in ("input_ids", "position_ids", "prompts", "responses", "loss_mask", "response_mask",
                                  "old_log_probs", "advantages")}  # fmt: skip
    for prompt, completion, old, advantage in zip(*each):
        p, r = len(prompt), len(completion)
        values = (torch.tensor([*prompt, *completion]), torch.arange(p + r), torch.tensor(prompt),
                  torch.tensor(completion), torch.cat([torch.zeros(p), torch.ones(r)]), torch.ones(r), old,
                  advantage.expand(r).clone())  # fmt: skip
        for row, value in zip(rows.values(), values):
            row.append(value)
    if ref is not None:
        rows["ref_log_prob"] = list(ref)
    return tu.get_tensordict(
        {name: torch.nested.as_nested_tensor(values, layout=torch.jagged) for name, values in rows.items()}, {}
    )


def whole(tensor):
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def their_step(found, batch):
    """Of verl's worker, by its trainer's own method: the gradients that AdamW gets, the weights, the metrics."""
    found.actor_rollout_ref.actor.optim.total_training_steps = found.trainer.total_training_steps  # as its trainer does
    torch.manual_seed(found.actor_rollout_ref.actor.fsdp_config.seed)  # adapters start at random
    worker = ActorRolloutRefWorker(found.actor_rollout_ref, "actor")
    worker.init_model()
    engine, gradients = worker.actor.engine, []
    name_of = {p: name.replace("base_model.model.", "") for name, p in engine.module.named_parameters()}

    def recorded(*args, **kwargs):
        gradients.append({name: whole(p.grad) for p, name in name_of.items() if p.grad is not None})
        return take_step(*args, **kwargs)

    take_step, engine.optimizer.step = engine.optimizer.step, recorded

    def update_actor(meta):
        tu.assign_non_tensor(batch, **meta.extra_info)
        return {"metrics": tu.get(worker.update_actor(batch), "metrics")}

    trainer = SimpleNamespace(config=found, actor_rollout_wg=SimpleNamespace(update_actor=update_actor))
    metrics = {}

    class Output(dict):
        def get(self):
            return self

    inner = trainer.actor_rollout_wg.update_actor
    trainer.actor_rollout_wg.update_actor = lambda meta: Output(inner(meta))
    PPOTrainer._update_actor(trainer, SimpleNamespace(extra_info={}), metrics)
    return gradients, {name: whole(p) for p, name in name_of.items()}, metrics


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"loss_type": "grpo", "beta": 0.1, "updates_per_rollout": 2, "micro_batch_size": 2, "packing": "off",
         "clip_low": 0.1, "clip_high": 0.3, "max_grad_norm": None, "temperature": 0.7, "weight_decay": 0.1,
         "gr_normalized": True},
        {"lora_rank": 4, "lora_targets": ["q_proj", "mlp.up_proj"], "checkpoint_activations": True},
    ],
    ids=["dapo", "grpo", "lora"],
)  # fmt: skip
@pytest.mark.filterwarnings("ignore:beta is")
def test_a_step_of_verl_s_worker_is_ours(write, more):
    """The gradients that AdamW gets to 1e-5 of their norm, and the weights after the step to 1e-5, where a gradient is
    not so near 0 that AdamW divides rounding by rounding: that of a key's bias is 0."""
    sizes = {"prompts_per_step": 2, "group_size": 2, "learning_rate": 5e-4, "max_grad_norm": 0.5}
    made, folder = write(**{**sizes, **more})
    each, ref, start, gradients, weights = our_step(made, drift=0.2)
    # Of vLLM, which is not here, verl's check asks for the highest rank of adapters.
    found = composed(folder) if made.lora_rank else validated(folder)
    theirs, after, metrics = their_step(found, batch_for(each, ref))
    assert len(theirs) == len(gradients) == made.updates_per_rollout
    sure = {name: torch.ones_like(value, dtype=torch.bool) for name, value in weights.items()}
    for ours, other in zip(gradients, theirs):
        assert ours.keys() == other.keys()
        norm = torch.stack([g.norm() for g in ours.values()]).norm()
        assert max((ours[name] - other[name]).norm() for name in ours) < 1e-5 * norm
        for name in ours:
            sure[name] &= ours[name].abs() > 1e-5 * norm
    for name, value in weights.items():
        assert ((value - after[name]).abs() * sure[name]).max() < 1e-5, name
    assert torch.cat([value.flatten() for value in sure.values()]).float().mean() > 0.8
    assert max((weights[name] - start[name]).abs().max() for name in start) > 4e-4
    assert "actor/gr/g1_norm" in metrics
    if made.beta:
        assert metrics["actor/kl_coef"] == pytest.approx(made.beta) and metrics["actor/kl_loss"] > 1e-3
        assert found.actor_rollout_ref.ref.fsdp_config.mixed_precision == {"param_dtype": "fp32"}


def test_verl_s_trainer_reads_the_numbers_of_a_run(write, tmp_path, monkeypatch):
    """What has no other test here; and words behind the command win."""
    home = tmp_path / 'it\'s \\ a "path", {a: b} [c] #d\\'
    made, folder = write(eval_samples=4, top_p=0.9, temperature=0.7, seed=3, keep_checkpoints=None, steps=40)
    moved = to_verl(made, home / "verl", "run")
    found = validated(moved, "trainer.nnodes=2", "trainer.n_gpus_per_node=4")
    assert found.data.train_files == str(home / "verl/train.parquet") and Path(found.data.train_files).is_file()
    assert found.trainer.nnodes * found.trainer.n_gpus_per_node == 8
    rollout = omega_conf_to_dataclass(found.actor_rollout_ref.rollout)  # which asks for its ranges
    assert (rollout.name, rollout.n, rollout.temperature, rollout.top_p) == ("vllm", 4, 0.7, 0.9)
    validation = rollout.val_kwargs
    assert (validation.n, validation.do_sample, validation.temperature, validation.top_p) == (4, True, 0.7, 0.9)
    assert found.trainer.total_training_steps == 40 and found.trainer.max_actor_ckpt_to_keep is None
    # V1 ends with the epochs too: 55 prompts are 18 steps of 3.
    assert found.trainer.total_epochs * (55 // 3) >= 40 and found.trainer.total_epochs == 3
    assert found.algorithm.redit.dither_seed == 3 == found.data.seed
