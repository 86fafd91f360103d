"""Every public op on the CPU, by the baseline's C++, which every x86-64 processor has: what one call costs, and, where
there is one, its backward pass with it."""

import torch

import redit_fast as rf
from redit_fast.backends import cpu
from tests.budgets.measure import measured
from tests.gr.test_regularize import network
from tests.ops.test_linear_loss import head, leaves
from tests.ops.test_token_loss import LOSSES

ROWS, VOCABULARY, WIDTH = 32, 300, 32
CONFIG = rf.LossConfig(beta=0.1, kl_ratio_correction=True, correction="token_truncate")


def advantages(**options):
    def make():
        rewards = torch.rand(64, 3)
        return lambda: rf.group_advantages(rewards, group_size=8, **options)

    return make


def rows():
    values = torch.linspace(-1, 1, ROWS)
    return {"advantages": values, "old_logp": values - 5, "ref_logp": values - 5.1, "sampling_logp": values - 4.9}


def on_logits(op, dtype=torch.float32):
    """`op` of logits and targets, backward from the scalar that it gives."""

    def make():
        logits = torch.randn(ROWS, VOCABULARY).to(dtype).requires_grad_()
        targets = torch.randint(VOCABULARY, (ROWS,))
        return lambda: op(logits, targets).backward()

    return make


def on_hidden(op, trainable=True):
    def make():
        hidden, weight, _, targets = head(ROWS, VOCABULARY, WIDTH, torch.float32, 0.1)
        x, w = leaves(hidden, weight)
        return lambda: op(x, w.requires_grad_(trainable), targets).backward()

    return make


def in_place():
    hidden, weight, _, targets = head(ROWS, VOCABULARY, WIDTH, torch.float32, 0.1)
    grad = torch.zeros_like(weight)
    return lambda: rf.linear_grpo_loss_and_grad_(hidden, weight, targets, **rows(), config=CONFIG, weight_grad=grad)


def definition(config):
    def make():
        logp = (-5 * torch.rand(ROWS)).requires_grad_()
        return lambda: rf.policy_loss(logp, **rows(), entropy=-logp, config=config).loss.backward()

    return make


def gr_step(optimizer, dtype=torch.float32, **gr):
    """perturb and step, between gradients that are there."""

    def make():
        model = network(dtype)
        opt = optimizer(model.parameters(), gamma=0.05, epsilon=0.05, max_norm=1.0, **gr)

        def run():
            for p in model.parameters():
                p.grad = torch.ones_like(p)
            opt.perturb()
            for p in model.parameters():
                p.grad = torch.ones_like(p)
            opt.step()

        run()  # which makes its state
        return run

    return make


def with_sgd(params, **gr):
    return rf.GradientRegularizer(torch.optim.SGD(params, lr=0.1), **gr)


def with_adamw(params, **gr):
    return rf.RegularizedAdamW(params, lr=0.1, **gr)


def entropic(logp_and_entropy):
    return logp_and_entropy.logp.sum() + logp_and_entropy.entropy.sum()


RUNS = {
    "group_advantages": advantages(),
    "group_advantages, dithered": advantages(dither=rf.Dither()),
    "token_logp": on_logits(lambda x, t: rf.token_logp(x, t).sum()),
    "token_logp, entropy": on_logits(lambda x, t: entropic(rf.token_logp(x, t, entropy="grad"))),
    "grpo_loss": on_logits(lambda x, t: rf.grpo_loss(x, t, **rows(), config=CONFIG).loss),
    "grpo_loss, bfloat16": on_logits(lambda x, t: rf.grpo_loss(x, t, **rows(), config=CONFIG).loss, torch.bfloat16),
    "grpo_loss, gspo": on_logits(lambda x, t: rf.grpo_loss(x, t, **rows(), config=LOSSES["gspo"]).loss),
    "linear_logp": on_hidden(lambda x, w, t: rf.linear_logp(x, w, t).sum()),
    "linear_logp, frozen": on_hidden(lambda x, w, t: rf.linear_logp(x, w, t).sum(), trainable=False),
    "linear_grpo_loss": on_hidden(lambda x, w, t: rf.linear_grpo_loss(x, w, t, **rows(), config=CONFIG).loss),
    "linear_grpo_loss, 2 chunks": on_hidden(
        lambda x, w, t: rf.linear_grpo_loss(x, w, t, **rows(), config=CONFIG, chunk_rows=16).loss
    ),
    "linear_grpo_loss_and_grad_": in_place,
    **{f"policy_loss, {name}": definition(config) for name, config in LOSSES.items()},
    "RegularizedAdamW": gr_step(with_adamw),
    "RegularizedAdamW, bfloat16": gr_step(with_adamw, torch.bfloat16),
    "RegularizedAdamW, g1 kept": gr_step(with_adamw, keep_first_grad=True),
    "GradientRegularizer": gr_step(with_sgd),
}


def count():
    with cpu.use_instruction_set("baseline"):
        return {name: measured(make) for name, make in RUNS.items()}
