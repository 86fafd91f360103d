"""OpenRLHF's actor in small, with our PolicyLoss, dithered advantages and GR around the optimizer step. Runs on the CPU
with a model made here: `python -m examples.openrlhf_loop`.

OpenRLHF's own actors are processes of ray, and each needs the class before it builds its loss:

    def use_our_loss():
        import openrlhf.trainer.ray.ppo_actor

        openrlhf.trainer.ray.ppo_actor.PolicyLoss = PolicyLoss

    ray.init(runtime_env={"worker_process_setup_hook": use_our_loss})
    openrlhf.cli.train_ppo_ray.train(args)
"""

import torch

import redit_fast as rf
from examples.plain_loop import a_model, batches
from redit_fast.integrations.openrlhf import PolicyLoss


def action_log_probs(model, sequences):
    return rf.token_logp(model(sequences).logits[:, :-1], sequences[:, 1:])


def ppo_train(model, optimizer, policy_loss, sequences, action_mask, rewards, step, epochs=2):
    """An actor's epochs over one batch of rollouts."""
    advantages = rf.group_advantages(rewards, group_size=8, dither=rf.Dither(), step=step).values[:, None]
    with torch.no_grad():
        old_log_probs = action_log_probs(model, sequences)

    def backward():
        log_probs = action_log_probs(model, sequences)
        loss, clip_ratio, ppo_kl, _, _ = policy_loss(log_probs, old_log_probs, advantages, action_mask=action_mask)
        loss.backward()
        return clip_ratio, ppo_kl

    for _ in range(epochs):
        clip_ratio, ppo_kl = backward()
        if optimizer.perturb():  # theta + epsilon g1
            backward()
        optimizer.step()
        optimizer.zero_grad()
    return clip_ratio.item(), ppo_kl.item()


def main(steps=20):
    torch.manual_seed(0)
    model, policy_loss = a_model(), PolicyLoss(clip_eps_low=0.2, clip_eps_high=0.28)
    optimizer = rf.RegularizedAdamW(rf.parameter_groups(model), lr=1e-2)
    probe = torch.randint(64, (64, 24))

    def sevens():
        with torch.no_grad():
            return torch.softmax(model(probe).logits.float(), -1)[..., 7].mean().item()

    before = sevens()
    for step, (sequences, mask, rewards) in enumerate(batches(steps)):
        clip_ratio, ppo_kl = ppo_train(model, optimizer, policy_loss, sequences, mask[:, 1:], rewards, step)
        print(f"step {step}: clip_ratio {clip_ratio:.3f}, ppo_kl {ppo_kl:+.4f}")
    print(f"probability of token 7: {before:.3f} before, {sevens():.3f} after")
    return before, sevens()


if __name__ == "__main__":
    main()
