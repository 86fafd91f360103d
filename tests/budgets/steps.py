"""Whole steps on the CPU, by the baseline's C++: of decoding, of `redit-fast train` and of TRL with our trainer, on
tiny models and rows of frozen lengths."""

import tempfile
from unittest import mock

import redit_fast as rf
from redit_fast.backends import cpu
from redit_fast.integrations.trl import ReditGRPOConfig, ReditGRPOTrainer
from redit_fast.packing.plan import Budget
from redit_fast.training import builtin, config_file, policy, report
from redit_fast.training.batch import Batch
from redit_fast.training.rollout.local import CHECK_EVERY, generate
from redit_fast.training.trainer import train
from tests.budgets.measure import difference, measured, recorded
from tests.integrations.test_trl_packing import rows
from tests.integrations.trl_trainers import GROUP, new_trainer
from tests.packing.models import batch_of, model_of

GR = {"gr_gamma": 0.1, "gr_epsilon": 0.1}


def decoding():
    """Of CHECK_EVERY tokens of padded prompts, no sample of which ends."""
    model, prompts = model_of("qwen2"), [list(range(1, 4 + n)) for n in range(4)]

    def tokens(count):
        return recorded(lambda: generate(model, [], prompts, group_size=2, max_new_tokens=count))

    tokens(CHECK_EVERY)
    return difference(tokens(3 * CHECK_EVERY), tokens(2 * CHECK_EVERY))


def micro_batch():
    """One more of three samples that share a prompt."""
    model = model_of("qwen2")

    def groups(count):
        prompts = [[place + 1, *range(9)] for place in range(count) for _ in range(3)]
        completions = [[7] * length for _ in range(count) for length in (3, 5, 8)]
        advantages = rf.group_advantages(batch_of().advantages[: 3 * count], group_size=3).values
        batch = Batch(prompts, completions, advantages, rf.LossConfig(), Budget(samples=3), True, 0, 0)
        assert len(batch.micro_batches) == count
        return recorded(lambda: batch.backward(model))

    groups(2)
    return difference(groups(4), groups(2), by=2)


def training_step(gamma, packed):
    """Both passes over one micro-batch of 15 samples, and AdamW."""

    def make():
        model = model_of("qwen2")
        optimizer = rf.RegularizedAdamW(rf.parameter_groups(model, perturb="decoder_layers"), lr=1e-3, gamma=gamma)

        def run():
            batch = batch_of(packed=packed)
            first = batch.backward(model)
            if optimizer.perturb():
                batch.backward(model, masks_of=first)
            optimizer.step()
            optimizer.zero_grad()
            optimizer.metrics()

        run()  # which makes the optimizer's state
        return run

    return measured(make)


def run_of(steps, folder):
    """Of the demo's task without a warm start; every completion has all its tokens."""
    settings = {"steps": steps, "warm_start_steps": 0, "prompts_per_step": 2, "group_size": 4, "eval_problems": 2,
                "max_completion_length": 12, "out_dir": folder, "name": str(steps), "checkpoint_every": 100,
                "eval_every": 100, **GR}  # fmt: skip
    with mock.patch.object(policy, "end_tokens", lambda *_: []), mock.patch.object(report, "write"):
        return recorded(lambda: train(config_file.load(overrides=settings)))


class Ready(ReditGRPOTrainer):
    """Its rows come ready instead of being generated."""

    def _generate_and_score_completions(self, inputs):
        return {name: value for name, value in rows().items() if "per_token_logps" not in name}


def trl_run(folder, steps, **options):
    tokenizer = builtin.build(0)[1]
    ends = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
    model_of("qwen2", vocab_size=len(tokenizer), **ends).save_pretrained(folder)
    trainer = new_trainer(tokenizer, folder, folder, Ready, ReditGRPOConfig, steps=steps,
                          per_device_train_batch_size=GROUP, **options)  # fmt: skip
    return recorded(trainer.train)


def trl_step(folder, **options):
    return difference(trl_run(folder, 2, **options), trl_run(folder, 1, **options))


def count():
    with cpu.use_instruction_set("baseline"), tempfile.TemporaryDirectory() as folder:
        run_of(1, folder + "/first")  # which imports and builds what is kept
        trl_run(folder, 1)
        return {
            f"rollout, {CHECK_EVERY} tokens": decoding(),
            "a micro-batch more": micro_batch(),
            "passes and AdamW, packed": training_step(0.0, packed=True),
            "passes and AdamW, packed, GR": training_step(0.1, packed=True),
            "passes and AdamW, padded, GR": training_step(0.1, packed=False),
            "redit-fast train, a step": difference(run_of(2, folder), run_of(1, folder)),
            "TRL, a step": trl_step(folder),
            "TRL, a step, packed": trl_step(folder, packing=True),
            "TRL, a step, packed, GR": trl_step(folder, packing=True, **GR),
        }
