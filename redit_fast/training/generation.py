"""`redit-fast generate`: completions of a file of prompts by a checkpoint, with rewards, by any engine."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor
from transformers import PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from redit_fast import extras
from redit_fast.foreign import Foreign
from redit_fast.known_names import under_new_names
from redit_fast.training import (
    checkpoint,
    config,
    config_file,
    data,
    lora,
    policy,
    progress,
    rewards,
    runs,
    setup,
    trial,
)
from redit_fast.training.config import TrainConfig
from redit_fast.training.config_values import LOCAL
from redit_fast.training.distributed import Ranks, launched
from redit_fast.training.rollout import Rollout

# What a run's config.json gives where no flag does. Not its rollout: the server of a run that is still at work has that
# run's weights, and would get others.
OF_A_RUN = (
    "rewards", "reward_weights", "system_prompt", "max_completion_length", "max_prompt_length", "temperature", "top_p",
    "dtype", "device",
)  # fmt: skip
SETTINGS = (*OF_A_RUN, "data", "seed", "long_prompts", "rollout", "rollout_timeout", "rollout_retries")  # the flags
STEP = 2**32 - 3  # of the random numbers: no training step has it
TOGETHER = {LOCAL: 256}  # completions that are sampled in one call, and written when it is over
TOGETHER_ELSEWHERE = 1024


def generate(
    source: str, given: Mapping[str, object], *, samples: int = 1, greedy: bool = False, out: Path | None = None
) -> tuple[Path, str]:
    """Writes `samples` completions of each prompt of a data file, one JSON object a line; a stop leaves whole lines.

    Args:
        source: a checkpoint of a run, whose settings of OF_A_RUN are taken, or any model as `redit-fast train` takes.
        given: settings of SETTINGS, which win.
        greedy: the most likely tokens; one completion each.
        out: a new file; by default the folder's name with -completions.jsonl at its end, beside it.

    Returns:
        The file, and a line that tells how many completions it has and the mean of each reward.

    Raises:
        ValueError: one sentence, before anything is written, but RewardError and EngineError.
        OSError: the disk is full.
    """
    if launched():
        raise ValueError("redit-fast generate is one process: start it without torchrun")
    if samples < 1 or (greedy and samples != 1):
        raise ValueError(f"--samples is {samples}, needs at least 1" + (", and 1 with --greedy" if greedy else ""))
    folder = Path(source).expanduser()
    local = folder.is_dir()
    folder = Path(os.path.abspath(folder)) if local else folder  # `.` has a name too
    settings = _settings(str(folder) if local else source, given)
    if out is None:
        name = f"{folder.name}-completions.jsonl"
        out = folder.with_name(name) if local else Path(name)
    if os.path.lexists(out):
        raise ValueError(f"{out} is there already and stays as it is: give another --out")
    with ExitStack() as held:
        model, tokenizer = _loaded(folder, settings)
        parts = _parts(settings, model, tokenizer)
        engine = setup.engine(settings, parts, held, Ranks())
        file = held.enter_context(_new(out))
        shown: Any = held.enter_context(progress.shown(Console()))
        records, scores = parts.dataset.train, []
        bar = shown.add_task("prompts", total=len(records), numbers="")
        together = max(1, TOGETHER.get(settings.rollout, TOGETHER_ELSEWHERE) // samples)
        for start in range(0, len(records), together):
            chosen = records[start : start + together]
            rollout = engine.generate(
                [data.render(tokenizer, record, settings.system_prompt) for record in chosen],
                group_size=samples,
                max_new_tokens=settings.max_completion_length,
                temperature=0.0 if greedy else settings.temperature,
                top_p=settings.top_p,
                seed=settings.seed,
                step=STEP,
                sample_ids=torch.arange(len(chosen) * samples, device="cpu") + start * samples,
            )
            each = [record for record in chosen for _ in range(samples)]
            texts = tokenizer.batch_decode(rollout.completions, skip_special_tokens=True)
            scores.append(rewards.score_texts(parts.functions, each, texts))
            places = [place for place, _ in parts.dataset.numbered[start : start + together] for _ in range(samples)]
            lines = _lines(places, each, rollout, texts, parts.functions, scores[-1], samples)
            file.write("".join(json.dumps(runs.without_nan(line)) + "\n" for line in lines))
            file.flush()
            shown.update(bar, advance=len(chosen), numbers="")
    return out, _told(parts.functions, torch.cat(scores), samples)


def _settings(source: str, given: Mapping[str, object]) -> TrainConfig:
    folder, values = Path(source), {}
    own = folder.parent.parent / "config.json"
    if folder.parent.name == "checkpoints" and own.is_file():
        stored = under_new_names(config_file.read(own)[0])
        values = {name: stored[name] for name in OF_A_RUN if name in stored}
    elif "rewards" not in given:
        raise ValueError(f"rewards: {source} is no checkpoint of a run, whose rewards would be taken: give --rewards")
    if "data" not in given:
        raise ValueError("data: needs a JSONL file with the prompts: give --data")
    # Its log-probs are of no use here, so that top_p is free.
    return config.load(None, {**values, **given, "model": source, "eval_problems": 0, "correction": "none"})


def _loaded(folder: Path, settings: TrainConfig) -> tuple[PreTrainedModel, Tokenizer]:
    """The model; of a checkpoint with LoRA the base with its adapters merged, in the dtype that it is loaded in."""
    device: Any = setup.device_of(settings)
    if not (folder / lora.WEIGHTS).is_file():
        return policy.load(str(settings.model), device, settings.dtype)
    extras.need("lora", "redit-fast generate of a checkpoint with adapters")
    from peft import PeftModel

    name = lora.read_base(folder).model
    if damage := checkpoint.damage(folder):
        raise ValueError(f"checkpoint {folder} is damaged ({damage})")
    model, tokenizer = policy.load(name, device, settings.dtype)
    lora.check_base(folder, lora.base_of(name))
    with Foreign(f"checkpoint {folder} cannot be loaded"), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of transformers 5.24, about what peft 0.21 asks it
        merged: Any = PeftModel.from_pretrained(model, str(folder)).merge_and_unload()
    return merged, tokenizer


def _parts(settings: TrainConfig, model: PreTrainedModel, tokenizer: Tokenizer) -> setup.Parts:
    dataset = setup.dataset(settings, model, tokenizer)
    functions = rewards.resolve(settings.rewards, data.columns_of(dataset.train[:1]))
    trial.check_columns(dataset, functions)
    ends, loss = policy.end_tokens(model, tokenizer), setup.loss_config(settings, model)
    return setup.Parts(
        model.eval(), tokenizer, dataset, functions, loss, ends, why_padded=None, base=None, shape=None, peak=None
    )  # fmt: skip


def _new(out: Path) -> Any:
    try:
        return out.open("x", encoding="utf-8")
    except OSError as error:
        raise ValueError(f"{out}: {error.strerror}: needs a new file in a folder that is there") from None


def _lines(
    places: list[str], records: list[dict], rollout: Rollout, texts: list[str],
    functions: list[rewards.RewardFunction], scores: Tensor, samples: int,
) -> list[dict]:  # fmt: skip
    return [
        {
            "data": place,
            "sample": i % samples,
            "prompt": data.text_of(record["prompt"]),
            "completion": text,
            "tokens": len(rollout.completions[i]),
            "finished": rollout.finished[i],
            "rewards": {function.name: value for function, value in zip(functions, row, strict=True)},
        }
        for i, (place, record, text, row) in enumerate(zip(places, records, texts, scores.tolist(), strict=True))
    ]


def _told(functions: list[rewards.RewardFunction], scores: Tensor, samples: int) -> str:
    means = [f"{f.name} {column.nanmean().item():.3f}" for f, column in zip(functions, scores.T, strict=True)]
    if samples > 1:
        passed = (scores[:, 0] > 0).view(-1, samples).any(1).double().mean().item()
        means.append(f"{functions[0].name} above 0 in one of {samples} {passed:.1%}")
    return f"{len(scores)} completions: {', '.join(means)}"
