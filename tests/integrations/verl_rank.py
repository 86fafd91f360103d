"""verl's real TrainingWorker on the CPU: the platform that verl does not have, tiny models, batches in verl's format.

Two ranks: python -m tests.integrations.verl_rank MODEL_FOLDER OUT."""

import functools
import os
import sys

import pytest
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM
from verl.trainer.config import CheckpointConfig
from verl.utils import tensordict_utils as tu
from verl.workers.config import (
    ActorConfig,
    FSDPEngineConfig,
    FSDPOptimizerConfig,
    HFModelConfig,
    PolicyLossConfig,
    TrainingWorkerConfig,
)
from verl.workers.engine_workers import TrainingWorker
from verl.workers.utils.losses import ppo_loss

from redit_fast.benchmarks import step_verl
from redit_fast.integrations.verl import engine as verl_engine
from redit_fast.integrations.verl import head as verl_head
from tests.ranks import meet_and_end

V = 64
PROMPTS, RESPONSES = (3, 4, 5, 3), (4, 6, 2, 5)
SIZES = {"vocab_size": V, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
         "num_key_value_heads": 1, "max_position_embeddings": 64, "initializer_range": 0.1,
         "tie_word_embeddings": False}  # fmt: skip
LR, CLIP, ENTROPY = 0.5, 0.3, 0.01
GR = {"gr_gamma": 0.03, "gr_epsilon": 0.05, "gr_perturb_max_norm": 0.5}
# With advantages LARGE times as large, "auto" stops where the step is 0.02 |theta|: what multiplied g1 would show.
AUTO, LARGE = {"gr_gamma": 1e-3, "gr_epsilon": "auto", "gr_perturb_max_norm": 1e9}, 1000.0


def on_the_cpu(patch):
    """`patch`: a pytest.MonkeyPatch, which takes all of it back."""
    step_verl.on_the_cpu(patch.setattr)
    patch.setenv("VERL_ENGINE_DEVICE", "cuda")  # under which verl registers its FSDP engine


def new_worker(
    folder, *, optim=None, fused=None, loss=ppo_loss, policy_loss=None, hf_config=None, model=None, **options
):
    """`options`: of FSDPEngineConfig; `optim`: override_optimizer_config; `fused`: the impl_backend; `policy_loss`: of
    PolicyLossConfig; `hf_config`: changes of the folder's; `model`: of HFModelConfig."""
    engine = {"strategy": "fsdp2", "mixed_precision": {"param_dtype": "fp32"}, "use_torch_compile": False,
              "use_dynamic_bsz": False, "micro_batch_size_per_gpu": 2, "infer_micro_batch_size_per_gpu": 4,
              **options}  # fmt: skip
    model = {"use_remove_padding": False, "enable_gradient_checkpointing": False, **(model or {}),
             "override_config": {"attn_implementation": "eager", **(hf_config or {})}}  # fmt: skip
    model = HFModelConfig(path=str(folder), load_tokenizer=False, use_fused_kernels=fused is not None,
                          fused_kernel_options={"impl_backend": fused}, **model)  # fmt: skip
    engine = FSDPEngineConfig(**engine)
    optim = FSDPOptimizerConfig(lr=LR, optimizer="SGD", weight_decay=0.0, total_training_steps=10, clip_grad=CLIP,
                                override_optimizer_config=optim)  # fmt: skip
    config = TrainingWorkerConfig(model_type="language_model", model_config=model, engine_config=engine,
                                  optimizer_config=optim, checkpoint_config=CheckpointConfig())  # fmt: skip
    worker = TrainingWorker(config)
    worker.reset()
    actor = ActorConfig(strategy="fsdp2", rollout_n=2, ppo_micro_batch_size_per_gpu=2, engine=engine, optim=optim,
                        entropy_coeff=ENTROPY, policy_loss=PolicyLossConfig(**(policy_loss or {})))  # fmt: skip
    worker.set_loss_fn(functools.partial(loss, config=actor))
    return worker


def rows(seed=1):
    """Of every sample: prompt, response, old log-probs and advantages."""
    draw = torch.Generator().manual_seed(seed)
    return [
        (torch.randint(0, V, (p,), generator=draw), torch.randint(0, V, (r,), generator=draw),
         -4 + torch.randn(r, generator=draw), torch.randn(1, generator=draw).expand(r).clone())
        for p, r in zip(PROMPTS, RESPONSES)
    ]  # fmt: skip


def enlarged(samples):
    return [(prompt, response, old, LARGE * advantages) for prompt, response, old, advantages in samples]


def batch_of(samples, temperature=1.0):
    prompts, responses, old, advantages = zip(*samples)

    def nested(tensors):
        return torch.nested.as_nested_tensor(list(tensors), layout=torch.jagged)

    tensors = {
        "input_ids": [torch.cat(pair) for pair in zip(prompts, responses)],
        "position_ids": [torch.arange(len(p) + len(r)) for p, r in zip(prompts, responses)],
        "prompts": prompts,
        "responses": responses,
        "loss_mask": [torch.cat([torch.zeros(len(p)), torch.ones(len(r))]) for p, r in zip(prompts, responses)],
        "response_mask": [torch.ones(len(r)) for r in responses],
        "old_log_probs": old,
        "advantages": advantages,
    }
    options = {"temperature": temperature, "global_batch_size": len(PROMPTS), "calculate_entropy": True}
    return tu.get_tensordict({name: nested(values) for name, values in tensors.items()}, options)


def train(worker, data):
    """One optimizer step of the data that this rank holds; verl's metrics."""
    size = len(data) * torch.distributed.get_world_size()
    tu.assign_non_tensor(data, mini_batch_size=size)
    return tu.get(worker.train_mini_batch(data), "metrics")


def weights(worker):
    return {name: p.detach().full_tensor().clone() for name, p in worker.engine.module.named_parameters()}


def same(found, expected):
    return all(torch.equal(found[name], expected[name]) for name in expected)


def close(found, expected, tolerance=1e-6):
    return all((found[name] - expected[name]).abs().max() <= tolerance for name in expected)


@pytest.fixture(scope="module")
def verl_process():
    """One rank of one, with both parts registered."""
    with pytest.MonkeyPatch.context() as patch:
        on_the_cpu(patch)
        ranks = {"WORLD_SIZE": "1", "RANK": "0", "LOCAL_WORLD_SIZE": "1", "LOCAL_RANK": "0"}
        for name, value in {**ranks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}.items():
            patch.setenv(name, value)  # which verl's Worker reads, or writes; the process group is there already
        torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
        verl_engine.register()
        verl_head.register()
        yield
        torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("qwen2")
    Qwen2ForCausalLM(Qwen2Config(**SIZES)).save_pretrained(path)
    return path


def run_rank(rank, folder, out):
    os.environ.update(RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT="1")  # for verl's Worker
    torch.distributed.init_process_group("gloo", init_method=f"file://{out}/meeting", rank=rank, world_size=2)
    worker = new_worker(folder, optim=GR, fused="redit", micro_batch_size_per_gpu=1)
    metrics = [train(worker, batch_of(rows(seed)[2 * rank : 2 * rank + 2])) for seed in (1, 2)]
    found = {"norms": [m["grad_norm"][0] for m in metrics], "g1_norm": metrics[-1]["gr/g1_norm"]}
    found["weights"] = weights(worker)
    worker = new_worker(folder, optim=AUTO, fused="redit", micro_batch_size_per_gpu=1)
    found["epsilons"] = [train(worker, batch_of(enlarged(rows(seed))[2 * rank : 2 * rank + 2]))["gr/epsilon"][0]
                         for seed in (1, 2)]  # fmt: skip
    found["weights with auto"] = weights(worker)
    torch.save(found, f"{out}/{rank}.pt")


if __name__ == "__main__":
    on_the_cpu(pytest.MonkeyPatch())
    verl_engine.register()
    verl_head.register()
    other = os.fork()  # after the import, which takes seconds, and before any thread
    run_rank(0 if other else 1, *sys.argv[1:])
    meet_and_end(other)
