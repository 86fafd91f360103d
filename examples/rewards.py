"""Reward functions of your own, for `rewards:` in a config: rewards:shows_work, rewards:brevity.

    redit-fast train --config examples/word_problems.yaml --rewards numeric_answer rewards:shows_work

The columns of the data come as lists under their names, one entry for each completion; `**columns` takes those that a
function does not use. None leaves a sample unscored.
"""

from redit_fast.training.data import text_of


def shows_work(prompts, completions, solution, **columns):
    """The share of the solution's intermediate results that the completion mentions; one-step problems are unscored."""
    rewards = []
    for completion, steps in zip(completions, solution, strict=True):
        results = [step.rpartition("= ")[2] for step in steps.split("\n")[:-1]]
        text = text_of(completion)
        rewards.append(sum(result in text for result in results) / len(results) if results else None)
    return rewards


def brevity(prompts, completions, **columns):
    """0 up to 100 words, then falling to -0.5 at 200 words."""
    words = [len(text_of(completion).split()) for completion in completions]
    return [-0.5 * min(1.0, max(0.0, (count - 100) / 100)) for count in words]


brevity.reward_scale = 0.5  # dithering is relative to a reward's full scale, 1.0 where this is not set
