"""What a run of `redit-fast reward-model` is made of, and what it goes on from."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from redit_fast import extras
from redit_fast.foreign import Foreign
from redit_fast.training import checkpoint, config_file, policy, runs, setup
from redit_fast.training.reward_model import data as reward_model_data
from redit_fast.training.reward_model.batch import PairBatch
from redit_fast.training.reward_model.config import RewardModelConfig
from redit_fast.training.reward_model.data import Pairs
from redit_fast.training.rewards import model as reward_models


@dataclass(frozen=True)
class Parts:
    model: PreTrainedModel
    tokenizer: Tokenizer
    pairs: Pairs
    why_padded: str | None  # None: rows are packed


def parts(config: RewardModelConfig, saved: Path | None) -> Parts:
    """Loaded, from the checkpoint `saved` where there is one, checked, and tried on a pair.

    Raises:
        ValueError, MissingExtra: one sentence that names what does not fit.
    """
    for tracker in config.track or ():
        extras.need(tracker, f"track {tracker}")
    source, seed = (config.model, config.seed) if saved is None else (str(saved), None)
    model, tokenizer = reward_models.load(source, config.device, config.dtype, seed=seed)
    pairs = reward_model_data.load(config, model, tokenizer)
    if config.checkpoint_activations:
        policy.checkpoint_activations(model)
    why_padded = reward_models.check(model, config.packing)
    what = f"model {model.name_or_path} ({model.config.model_type})"
    if why_padded is not None and config.packing == "on":
        raise ValueError(f"packing is on and {what} needs padded rows: {why_padded}")
    with Foreign(f"{what} cannot be trained"):
        PairBatch.of(pairs.train[:1], config, 0, packed=why_padded is None).backward(model)
    model.zero_grad()
    return Parts(model, tokenizer, pairs, why_padded)


def resumed(config: RewardModelConfig, held: ExitStack) -> tuple[RewardModelConfig, Path | None, Callable[[], None]]:
    """The settings of a run that goes on, its newest checkpoint, None where it stopped before its first, and the check
    that its folder is still held.

    Raises:
        ValueError: there is no such run, or it has other settings.
    """
    run = setup.folder_of(config)
    if not (run / "config.json").is_file():
        raise ValueError(f"{run} holds no run to resume")
    check_folder = held.enter_context(runs.claimed(run, new=False))
    before = config_file.load_as(RewardModelConfig, run / "config.json")
    for name, value in config:
        setup.check_same(name, getattr(before, name), value, run)
    setup.check_schedule(config, before.steps, run)
    folder = run / "checkpoints"
    return config, checkpoint.newest(folder) if checkpoint.in_order(folder) else None, check_folder
