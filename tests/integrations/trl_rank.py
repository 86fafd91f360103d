"""One rank of two: python -m tests.integrations.trl_rank MODEL_FOLDER OUT, under accelerate's environment variables."""

import sys

import torch
import trl.trainer.utils as utils
from transformers import AutoTokenizer
from trl import GRPOTrainer

from redit_fast.integrations.trl import ReditGRPOConfig, ReditGRPOTrainer
from tests.integrations.trl_trainers import GROUP, clipped_inputs, logged, new_trainer
from tests.ranks import meet_and_end

OPTIONS = {"gradient_accumulation_steps": 2, "steps": 2, "dither_level": 0.1, "beta": 0.05,
           "gr_gamma": 0.03, "gr_epsilon": 0.05}  # fmt: skip


class Trainer(ReditGRPOTrainer):
    """Samples by the place in the global batch, not by a rank's random state: TRL's own differ with the ranks."""

    def _generate_single_turn(self, prompt_ids, *_):
        first = self.accelerator.process_index * len(prompt_ids)
        places = range(first, first + len(prompt_ids))
        return [[5 + (7 * place + 3 * i * self.state.global_step + i * i) % 60 for i in range(3 + place % 4)]
                for place in places], None  # fmt: skip


def parameters(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


if __name__ == "__main__":
    folder, out = sys.argv[1:]
    tokenizer, found = AutoTokenizer.from_pretrained(f"{out}/tokenizer"), []
    for packing in (False, True):
        trainer = new_trainer(tokenizer, folder, out, Trainer, ReditGRPOConfig, ddp_backend="gloo",
                              per_device_train_batch_size=GROUP, packing=packing, **OPTIONS)  # fmt: skip
        assert trainer.accelerator.num_processes == 2
        rank, use_triton = trainer.accelerator.process_index, getattr(utils, "_use_triton", None)
        trainer.train()
        torch.save(parameters(trainer.model), f"{out}/rank{rank}-{packing}.pt")
        for compact in (False, True):  # as TRL on a GPU: the second rank then has no rows
            utils._use_triton = lambda device, compact=compact: compact
            inputs = clipped_inputs(3, [[1 - rank] * 3] * 2, trainer.beta)
            found.append([logged(trainer, cls, inputs) for cls in (GRPOTrainer, ReditGRPOTrainer)])
        utils._use_triton = use_triton
    torch.save(found, f"{out}/logged{rank}.pt")
    meet_and_end()
