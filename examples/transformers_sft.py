"""Supervised fine-tuning by transformers' own Trainer with GR, and with a loss head that never holds the logits. Runs
on the CPU with a model made here: `python -m examples.transformers_sft`."""

import random
import sys

from transformers import ByT5Tokenizer, DataCollatorForLanguageModeling, Trainer, TrainingArguments

import redit_fast as rf
from examples.plain_loop import a_model
from redit_fast.integrations.transformers import GRTrainerMixin


class GRTrainer(GRTrainerMixin, Trainer):
    pass


def main(steps=60, out="runs/sft_example"):
    tokenizer = ByT5Tokenizer()  # of bytes, without files
    model = a_model(len(tokenizer))
    sums = [(random.randrange(100), random.randrange(100)) for _ in range(256)]
    rows = [tokenizer(f"{a} + {b} = {a + b}") for a, b in sums]
    args = TrainingArguments(
        out,
        learning_rate=1e-2,
        per_device_train_batch_size=16,
        max_steps=steps,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        bf16=False,
    )
    trainer = GRTrainer(
        model,
        args,
        train_dataset=rows,
        data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
        gr_gamma=1e-3,  # a second backward pass at theta + gr_epsilon g1; 0 is the plain Trainer
    )
    with rf.apply_to(model):  # this instance's loss without logits, inside the block
        trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    print(f"loss {losses[0]:.2f} in the first step, {losses[-1]:.2f} in the last of {steps}")
    return trainer, losses


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
