"""What Python code may give a run beside its settings: a task in the place of the embedded demo, and a hook."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from transformers import PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

import redit_fast as rf
from redit_fast.checks import described
from redit_fast.training import data, rewards
from redit_fast.training.config import TrainConfig
from redit_fast.training.rewards.user_code import RewardError, UserCode
from redit_fast.training.sampling import Samples

# Gets the advantages of a step, its samples and its number, changes none of them, and returns what is trained on.
AdvantagesHook = Callable[[rf.Advantages, Samples, int], rf.Advantages]


@dataclass(frozen=True)
class Task:
    """What a run trains where its config has no `model`. Its folder gets no report; `redit-fast report RUN` draws one.

    Args:
        name: what a run that goes on is asked for again.
        build: a model, which the run trains in place, and its tokenizer. A run that goes on loads its checkpoint.
        dataset: its records have a `prompt` and the columns that the functions take.
        functions: those that `rewards` of the config names, in its order.
    """

    name: str
    build: Callable[[], tuple[PreTrainedModel, Tokenizer]]
    dataset: data.Dataset
    functions: list[rewards.RewardFunction]

    def check(self, config: TrainConfig) -> None:
        """Raises a ValueError where a config does not fit, with its setting's name first."""
        names = [function.name for function in self.functions]
        if config.model is not None:
            raise ValueError(f"model: got {config.model} with the task {self.name}, which brings its own: needs none")
        if config.warm_start_steps:
            raise ValueError(
                f"warm_start_steps: got {config.warm_start_steps} with the task {self.name}, whose `build` has its own"
            )
        if config.rewards != names:
            raise ValueError(f"rewards: got {config.rewards}, the task {self.name} has {names}")
        if not self.dataset.train:
            raise ValueError(f"task {self.name}: its dataset has no records to train on")


def hooked(hook: AdvantagesHook, advantages: rf.Advantages, samples: Samples, step: int) -> rf.Advantages:
    """What a hook makes of the advantages.

    Raises:
        RewardError: it raised, or returned something else than as many finite advantages.
    """
    with UserCode("advantages_hook"):
        found = hook(advantages, samples, step)
    if not isinstance(found, rf.Advantages):
        raise RewardError(f"advantages_hook returned {described(found)}, needs an Advantages")
    values, before = found.values, advantages.values
    if values.shape != before.shape or values.dtype != before.dtype or not values.isfinite().all():
        raise RewardError(
            f"advantages_hook returned values that are {described(values)}, needs {len(before)} finite ones in float32"
        )
    return found
