"""A step of verl's TrainingWorker (FSDP2, one rank) on given completions: forward and backward pass, clipping, AdamW.

Its batches carry old log-probs, to which the ratios of GR's second pass are taken: its gradient is compared with that
one. They are given; in verl's own loop they are another forward pass. It samples by vLLM or SGLang, and takes the
reference's log-probs from a worker of its own, so that it has neither rollout nor KL term here. verl has no CPU: there
it runs on a platform that is described here.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from types import MethodType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from .measure import Absent
from .step_cases import EPSILON, GROUP, MAX_NORM, Pass2, advantages, batches, expected
from .step_hosts import LR, Phases, Settings

NOTHING = ("memory_allocated", "memory_reserved", "max_memory_allocated", "max_memory_reserved")


def on_the_cpu(replace: Callable[[object, str, Any], object] = setattr) -> None:
    """verl's platform for this process. VERL_ENGINE_DEVICE has to be cuda, under which it registers its FSDP engine."""
    import verl.models.transformers.monkey_patch as monkey_patch
    import verl.plugin.platform.platform_manager as platform_manager
    from verl.plugin.platform.platform_cuda import PlatformCUDA

    class PlatformCPU(PlatformCUDA):
        device_name = "cpu"
        device_module = SimpleNamespace(
            **dict.fromkeys(NOTHING, lambda *_: 0), mem_get_info=lambda: (0, 1), empty_cache=lambda: None,
            get_device_name=lambda: "CPU", get_rng_state=torch.get_rng_state, set_rng_state=torch.set_rng_state,
        )  # fmt: skip

        def is_available(self) -> bool:
            return True

        def current_device(self) -> str:
            return "cpu"

    replace(platform_manager, "_current_platform", PlatformCPU())
    replace(monkey_patch, "is_trl_available", lambda: False)  # it imports a class that TRL 1.16 has not


class Logits:
    """verl's worker with the model's own head."""

    backend: str | None = None
    pass2: Pass2 = "pass1"

    @staticmethod
    def load() -> None:
        if not find_spec("verl"):
            raise Absent("verl is not installed: pip install verl")
        ranks = {"WORLD_SIZE": "1", "RANK": "0", "LOCAL_WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_PORT": "1"}
        os.environ.update(ranks, MASTER_ADDR="127.0.0.1", VERL_ENGINE_DEVICE="cuda")
        if not torch.cuda.is_available():
            on_the_cpu()

        from redit_fast.integrations.verl import engine, head

        head.register()
        engine.register()

    def __init__(self, settings: Settings):
        self.case = settings.case
        if not torch.distributed.is_initialized():
            kind, store = "nccl" if settings.device == "cuda" else "gloo", torch.distributed.HashStore()
            torch.distributed.init_process_group(kind, store=store, rank=0, world_size=1)
        self.worker = self._worker(settings)
        self.model, self.optimizer = self.worker.engine.module, self.worker.engine.optimizer
        old = [expected(self.case, turn).logp.float() for turn in range(2)]
        self.batches = [
            (batch.prompts, batch.completions, old[turn].split(self.case.lengths), advantages(batch.rewards).float())
            for turn, batch in enumerate(batches(self.case))
        ]
        self.found: list[tuple[Tensor, Tensor]] = []

    def _worker(self, settings: Settings) -> Any:
        from transformers import Qwen2ForCausalLM
        from verl.trainer.config import CheckpointConfig
        from verl.workers.config import (
            ActorConfig,
            FSDPEngineConfig,
            FSDPOptimizerConfig,
            HFModelConfig,
            TrainingWorkerConfig,
        )
        from verl.workers.engine_workers import TrainingWorker
        from verl.workers.utils.losses import ppo_loss
        from verl.workers.utils.padding import no_padding_2_padding

        on_gpu = settings.device == "cuda"
        flash = on_gpu and find_spec("flash_attn") is not None
        model = HFModelConfig(
            path=f"{self.case.folder}/start", load_tokenizer=False, use_remove_padding=True,
            enable_gradient_checkpointing=on_gpu, use_fused_kernels=self.backend is not None,
            fused_kernel_options={"impl_backend": self.backend},
            override_config={"attn_implementation": "flash_attention_2" if flash else "eager"},
        )  # fmt: skip
        engine = FSDPEngineConfig(
            strategy="fsdp2", mixed_precision={"param_dtype": "bf16" if on_gpu else "fp32"}, use_torch_compile=on_gpu,
            use_dynamic_bsz=False, micro_batch_size_per_gpu=self.case.micro_batch,
            infer_micro_batch_size_per_gpu=self.case.micro_batch,
        )  # fmt: skip
        gr = {"gr_gamma": EPSILON, "gr_epsilon": EPSILON} if settings.gr else None
        optim = FSDPOptimizerConfig(lr=LR, weight_decay=0.0, total_training_steps=10**6, clip_grad=MAX_NORM,
                                    override_optimizer_config=gr)  # fmt: skip
        own = Qwen2ForCausalLM.forward
        worker = TrainingWorker(
            TrainingWorkerConfig(
                model_type="language_model",
                model_config=model,
                engine_config=engine,
                optimizer_config=optim,
                checkpoint_config=CheckpointConfig(),
            )  # fmt: skip
        )
        worker.reset()
        if self.backend == "torch":  # which verl puts on the class
            worker.engine.module.forward = MethodType(Qwen2ForCausalLM.forward, worker.engine.module)
            Qwen2ForCausalLM.forward = own
        actor = ActorConfig(strategy="fsdp2", rollout_n=GROUP, ppo_micro_batch_size_per_gpu=self.case.micro_batch,
                            engine=engine, optim=optim)  # fmt: skip

        def loss(model_output: Any, data: Any, dp_group: Any = None) -> Any:
            self.found.append((data["responses"], no_padding_2_padding(model_output["log_probs"].detach(), data)))
            return ppo_loss(actor, model_output, data, dp_group)

        worker.set_loss_fn(partial(loss))
        return worker

    def step(self, turn: int, phases: Phases, rollout: bool) -> None:
        from verl.utils import tensordict_utils as tu

        self.turn = turn
        self.found.clear()
        with phases("update"):
            data = tu.get_tensordict(*_batch(*self.batches[turn % 2]))
            tu.assign_non_tensor(data, mini_batch_size=len(data))
            self.worker.train_mini_batch(data)

    def logp(self) -> dict[tuple[int, ...], Tensor]:
        found: dict[tuple[int, ...], Tensor] = {}
        for responses, logp in self.found:
            for tokens, values in zip(responses.unbind(), logp, strict=True):
                found.setdefault(tuple(tokens.tolist()), values[: len(tokens)])  # the first pass's come first
        return found


class TorchHead(Logits):
    """verl's worker with its own fused head in torch."""

    backend = "torch"


class OurHead(Logits):
    """verl's worker with this package's head."""

    backend = "redit"


def _batch(prompts: Any, completions: Any, old: Any, weights: Tensor) -> tuple[dict[str, Any], dict[str, Any]]:
    """verl's nested tensors, one row a sample, and its options."""
    samples = [(torch.tensor(prompts[i // GROUP]), torch.tensor(c)) for i, c in enumerate(completions)]
    rows = {
        "input_ids": [torch.cat(pair) for pair in samples],
        "position_ids": [torch.arange(len(prompt) + len(response)) for prompt, response in samples],
        "prompts": [prompt for prompt, _ in samples],
        "responses": [response for _, response in samples],
        "loss_mask": [torch.cat([torch.zeros(len(prompt)), torch.ones(len(response))]) for prompt, response in samples],
        "response_mask": [torch.ones(len(response)) for _, response in samples],
        "old_log_probs": list(old),
        "advantages": [weight.expand(len(c)).clone() for weight, c in zip(weights, completions, strict=True)],
    }
    nested = {name: torch.nested.as_nested_tensor(of, layout=torch.jagged) for name, of in rows.items()}
    return nested, {"temperature": 1.0, "global_batch_size": len(samples), "calculate_entropy": False}
