"""A whole step of TRL's GRPOTrainer, its own and with our swap-in: `trainer.train()`, one step at a time."""

from __future__ import annotations

import os
import threading
from importlib import import_module
from importlib.util import find_spec
from queue import SimpleQueue
from typing import Any

import torch
from torch import Tensor

from .measure import FAILURES, Absent, Wrong
from .step_cases import EPSILON, GROUP, MAX_NORM, Pass2, batches
from .step_hosts import LR, Ends, Phases, Settings, check_rollout, start_of


class TRL:
    """The trainer runs in a thread and stops before each step. Prompts and completions are put in the place of those
    that it has tokenized and sampled."""

    swap_in = False
    pass2: Pass2 = "fresh"
    phases: Phases  # of the step under way

    @staticmethod
    def load() -> None:
        if not find_spec("trl"):
            raise Absent("trl is not installed: pip install 'redit-fast[bench]'")
        for name in ("transformers.models.qwen2.modeling_qwen2", "datasets", "trl.trainer.grpo_trainer",
                     "redit_fast.integrations.trl", "redit_fast.training.builtin"):  # fmt: skip
            import_module(name)

    def __init__(self, settings: Settings):
        os.environ["CI"] = "1"  # TRL sends telemetry otherwise
        from datasets import Dataset
        from transformers import PrinterCallback, ProgressCallback, TrainerCallback
        from trl import GRPOConfig, GRPOTrainer

        from redit_fast.training import builtin

        self.settings, self.case = settings, settings.case
        self.batches, self.turn, self.samples = batches(self.case), 0, False
        samples, on_gpu = len(self.case.lengths), settings.device == "cuda"
        options: dict[str, Any] = {
            "output_dir": os.path.join(self.case.folder, "trl"), "learning_rate": LR, "lr_scheduler_type": "constant",
            "max_steps": 10**6, "num_generations": GROUP, "max_completion_length": max(self.case.lengths),
            "per_device_train_batch_size": self.case.micro_batch, "beta": self.case.beta, "max_grad_norm": MAX_NORM,
            "gradient_accumulation_steps": samples // self.case.micro_batch, "shuffle_dataset": False,
            "use_bias_correction_kl": False,  # else its KL term has another gradient than ours
            "save_strategy": "no", "logging_strategy": "no", "report_to": "none", "use_cpu": not on_gpu,
        }  # fmt: skip
        if not on_gpu:  # both of which its defaults have
            options |= {"bf16": False, "gradient_checkpointing": False}
        trainer_class, config_class = GRPOTrainer, GRPOConfig
        if self.swap_in:
            from redit_fast.integrations.trl import ReditGRPOConfig, ReditGRPOTrainer

            trainer_class, config_class = ReditGRPOTrainer, ReditGRPOConfig
            options["packing"] = settings.packing
            if settings.gr:
                options |= {"gr_gamma": EPSILON, "gr_epsilon": EPSILON}
        model = start_of(self.case, "reference" if self.case.beta else "start")  # where it loads its reference from
        self.trainer: Any = trainer_class(
            model.float() if on_gpu else model, self._reward, args=config_class(**options),
            train_dataset=Dataset.from_list([{"prompt": str(i)} for i in range(len(self.case.prompts))]),
            processing_class=builtin.build(0)[1],
        )  # fmt: skip
        trainer, host = self.trainer, self
        self.model = trainer.model
        trainer.remove_callback(PrinterCallback)
        trainer.remove_callback(ProgressCallback)
        self.ends = Ends(self.model, self.case.lengths, drops=False)
        self.found: list[tuple[Tensor, Tensor]] = []
        self.sampled: list[list[int]] | None = None
        self.asked: SimpleQueue[tuple[int, Phases, bool]] = SimpleQueue()
        self.stopped: SimpleQueue[Exception | None] = SimpleQueue()  # before a step, or by an error
        self._wrap()

        class Steps(TrainerCallback):
            def on_step_begin(self, *args: Any, **options: Any) -> None:
                host.stopped.put(None)
                host.turn, host.phases, host.samples = host.asked.get()
                host.phases.enter("update")

            def on_step_end(self, *args: Any, **options: Any) -> None:
                host.phases.leave()

        trainer.add_callback(Steps())
        threading.Thread(target=self._train, daemon=True).start()
        self._wait()

    @property
    def optimizer(self) -> Any:
        return self.trainer.optimizer

    def _train(self) -> None:
        try:
            self.trainer.train()
        except (*FAILURES, Wrong) as error:
            self.stopped.put(error)

    def _wait(self) -> None:
        error = self.stopped.get()
        if error is not None:
            raise error

    def _reward(self, completion_ids: list[list[int]], **_: Any) -> list[float]:
        return self.batches[self.turn % 2].rewards.tolist()

    def _wrap(self) -> None:
        trainer = self.trainer
        scored, sampled = trainer._generate_and_score_completions, trainer._generate_single_turn
        log_probs = trainer._get_per_token_logps_and_entropies

        def score(inputs: Any) -> Any:
            with self.phases("scoring"):
                return scored(inputs)

        def tokenize(prompts: list[str]) -> Any:
            return [self.batches[self.turn % 2].prompts[int(prompt)] for prompt in prompts], None, {}

        def sample(*args: Any) -> Any:
            if self.samples:
                with self.phases("rollout"), self.ends:
                    self.sampled, _ = sampled(*args)
            return self.batches[self.turn % 2].completions, None

        def of_tokens(model: Any, ids: Tensor, mask: Tensor, length: int, *args: Any, **options: Any) -> Any:
            found = log_probs(model, ids, mask, length, *args, **options)
            if torch.is_grad_enabled():
                self.found.append((ids[:, -length:], found[0].detach()))
            return found

        trainer._generate_and_score_completions, trainer._tokenize_prompts = score, tokenize
        trainer._generate_single_turn, trainer._get_per_token_logps_and_entropies = sample, of_tokens

    def step(self, turn: int, phases: Phases, rollout: bool) -> None:
        self.found.clear()
        self.asked.put((turn, phases, rollout))
        self._wait()
        if rollout:
            check_rollout(self.case, self.sampled or [])

    def logp(self) -> dict[tuple[int, ...], Tensor]:
        lengths = {tuple(completion): len(completion) for completion in self.batches[self.turn % 2].completions}
        longest, found = max(self.case.lengths), {}
        for ids, logp in self.found[: len(self.case.lengths) // self.case.micro_batch]:  # those of the first pass
            for row, values in zip(ids.tolist(), logp, strict=True):
                ended = tuple(row[: row.index(0) + 1]) if 0 in row else tuple(row[:longest])
                if ended in lengths:
                    found[ended] = values[: len(ended)]
        return found


class SwapIn(TRL):
    swap_in = True
