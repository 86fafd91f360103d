"""TRL's GRPOTrainer with dithered rewards, GR and our LM head: two names and three fields change. Runs on the CPU with
a model made here: `python -m examples.trl_grpo`."""

import sys

from datasets import Dataset

from redit_fast.integrations.trl import ReditGRPOConfig, ReditGRPOTrainer
from redit_fast.training import builtin


def digits(completions, **_):
    """The share of digits among the completion's characters, in tenths: of few values, as rewards in RL are."""
    return [round(10 * sum(c.isdigit() for c in text) / max(1, len(text))) / 10 for text in completions]


def main(steps=30, out="runs/trl_example"):
    model, tokenizer = builtin.build(0)
    prompts = [{"prompt": record["prompt"]} for record in builtin.records(64, held_out=False, seed=0)]
    args = ReditGRPOConfig(
        out,
        dither_level=0.05,  # ReDit: noise on the rewards; the logs keep the clean ones
        gr_gamma=1e-3,  # GR: a second backward pass at theta + gr_epsilon g1
        gr_optimizer="regularized_adamw",  # float32 masters for bfloat16 weights
        learning_rate=2e-3,
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
    trainer = ReditGRPOTrainer(
        model, digits, args=args, train_dataset=Dataset.from_list(prompts), processing_class=tokenizer
    )
    trainer.train()
    rewards = [entry["reward"] for entry in trainer.state.log_history if "reward" in entry]
    print(f"reward {rewards[0]:.2f} in the first step, {rewards[-1]:.2f} in the last of {steps}")
    return trainer, rewards


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
