"""TRL's GRPOTrainer with dithered rewards, GR and our LM head: two names and three fields change. Runs on the CPU with
a model made here: `python -m examples.trl_grpo`."""

import sys

from datasets import Dataset
from transformers import ByT5Tokenizer

from examples.plain_loop import a_model
from redit_fast.integrations.trl import ReditGRPOConfig, ReditGRPOTrainer


def digits(completions, **_):
    """The share of digits among the completion's characters, in tenths: of few values, as rewards in RL are."""
    return [round(10 * sum(c.isdigit() for c in text) / max(1, len(text))) / 10 for text in completions]


def main(steps=30, out="runs/trl_example"):
    tokenizer = ByT5Tokenizer()  # of bytes, without files
    model = a_model(len(tokenizer))
    prompts = [{"prompt": f"{a} + 7 ="} for a in range(64)]
    args = ReditGRPOConfig(
        out,
        dither_level=0.05,  # ReDit: noise on the rewards; the logs keep the clean ones
        gr_gamma=1e-3,  # GR: a second backward pass at theta + gr_epsilon g1
        gr_optimizer="regularized_adamw",  # float32 masters for bfloat16 weights
        learning_rate=1e-2,
        per_device_train_batch_size=32,
        num_generations=8,
        max_completion_length=8,
        max_steps=steps,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        bf16=False,
    )
    data = Dataset.from_list(prompts)
    trainer = ReditGRPOTrainer(model, digits, args=args, train_dataset=data, processing_class=tokenizer)
    trainer.train()
    rewards = [entry["reward"] for entry in trainer.state.log_history if "reward" in entry]
    print(f"reward {rewards[0]:.2f} in the first step, {rewards[-1]:.2f} in the last of {steps}")
    return trainer, rewards


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
