"""redit-fast's ops in a plain PyTorch loop; `loss_of` and `train` are the README's example, a test runs it.

python examples/plain_loop.py
"""

import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

import redit_fast as rf


def loss_of(model, tokens, mask, advantages):
    hidden = model.model(tokens).last_hidden_state[:, :-1]  # the (N, T, V) logits never exist
    head, targets, scored = model.lm_head.weight, tokens[:, 1:], mask[:, 1:]
    return rf.linear_grpo_loss(hidden, head, targets, advantages, mask=scored, config=rf.LossConfig("dapo")).loss


def train(model, batches):
    optimizer = rf.RegularizedAdamW(rf.parameter_groups(model), lr=1e-3)  # perturbs the decoder layers
    for step, (tokens, mask, rewards) in enumerate(batches):  # your rollouts: (N, T), (N, T) bool, (N,)
        advantages = rf.group_advantages(rewards, group_size=8, dither=rf.Dither(), step=step).values
        loss_of(model, tokens, mask, advantages).backward()
        if optimizer.perturb():  # theta + epsilon g1
            loss_of(model, tokens, mask, advantages).backward()
        optimizer.step()  # theta restored bit by bit, gradients combined and clipped to max_norm (1), AdamW
        optimizer.zero_grad()


def batches(count, vocabulary=64, prompts=4, group_size=8, length=24):
    """Random sequences; a completion earns 1 for every token 7 that it holds, so the policy learns to write sevens."""
    for _ in range(count):
        tokens = torch.randint(vocabulary, (prompts * group_size, length))
        mask = torch.arange(length).expand_as(tokens) >= 8
        yield tokens, mask, ((tokens == 7) & mask).sum(1).float()


def a_model(vocabulary=64):
    return Qwen2ForCausalLM(
        Qwen2Config(vocab_size=vocabulary, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                    num_attention_heads=2, num_key_value_heads=2)
    )  # fmt: skip


def main():
    torch.manual_seed(0)
    model = a_model()
    probe = torch.randint(64, (64, 24))

    def sevens():
        with torch.no_grad():
            return torch.softmax(model(probe).logits.float(), -1)[..., 7].mean().item()

    before = sevens()
    train(model, batches(40))
    print(f"probability of token 7: {before:.3f} before, {sevens():.3f} after 40 off-policy steps")
    return before, sevens()


if __name__ == "__main__":
    main()
