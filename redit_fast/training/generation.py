"""`redit-fast generate`: completions of a file of prompts by a checkpoint, with rewards, by any engine."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from io import FileIO
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
SETTINGS = (  # the flags
    *OF_A_RUN, "data", "columns", "data_format", "seed", "long_prompts", "rollout", "rollout_timeout",
    "rollout_retries",
)  # fmt: skip
STEP = 2**32 - 3  # of the random numbers: no training step has it
TOGETHER = {LOCAL: 256}  # completions that are sampled in one call, and written when it is over
TOGETHER_ELSEWHERE = 1024
MOST = 2**32  # completions: as many numbers of samples there are


def generate(
    source: str, given: Mapping[str, object], *, samples: int = 1, greedy: bool = False, out: Path | None = None
) -> tuple[Path, str]:
    """Writes `samples` completions of each prompt of a data file, one JSON object a line; a stop and a full disk leave
    whole lines, or no file where there are none.

    Args:
        source: a checkpoint of a run, whose settings of OF_A_RUN are taken, or any model as `redit-fast train` takes.
        given: settings of SETTINGS, which win.
        greedy: the most likely tokens; one completion each.
        out: a new file; by default the folder's name with -completions.jsonl at its end, beside it.

    Returns:
        The file, and a line that tells how many completions it has and the mean of each reward.

    Raises:
        ValueError: one sentence, before anything is written, but RewardError and EngineError.
        OSError: the disk is full; it names the file.
    """
    if launched():
        raise ValueError("redit-fast generate is one process: start it without torchrun")
    if not 1 <= samples <= (1 if greedy else MOST):
        needs = "1 with --greedy" if greedy else f"a whole number from 1 to {MOST}"
        raise ValueError(f"--samples is {samples}, needs {needs}")
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
        records, scores = parts.dataset.train, []
        if len(records) * samples > MOST:
            raise ValueError(f"--samples is {samples}, needs at most {MOST // len(records)} for {len(records)} prompts")
        engine = setup.engine(settings, parts, held, Ranks())
        file = held.enter_context(_new(out))
        shown: Any = held.enter_context(progress.shown(Console()))
        bar = shown.add_task("samples", total=len(records) * samples, numbers="")
        together = TOGETHER.get(settings.rollout, TOGETHER_ELSEWHERE)
        for prompts, numbers in _calls(len(records), samples, together):
            rollout = engine.generate(
                [data.render(tokenizer, records[prompt], settings.system_prompt) for prompt in prompts],
                group_size=len(numbers),
                max_new_tokens=settings.max_completion_length,
                temperature=0.0 if greedy else settings.temperature,
                top_p=settings.top_p,
                seed=settings.seed,
                step=STEP,
                sample_ids=torch.tensor([prompt * samples + j for prompt in prompts for j in numbers], device="cpu"),
            )
            each = [records[prompt] for prompt in prompts for _ in numbers]
            texts = tokenizer.batch_decode(rollout.completions, skip_special_tokens=True)
            scores.append(rewards.score_texts(parts.functions, each, texts))
            places = [(parts.dataset.numbered[prompt][0], j) for prompt in prompts for j in numbers]
            lines = _lines(places, each, rollout, texts, parts.functions, scores[-1])
            with runs.naming(out), runs.uninterrupted():
                _append(file, "".join(json.dumps(runs.without_nan(line)) + "\n" for line in lines))
            shown.update(bar, advance=len(lines), numbers="")
    return out, _told(parts.functions, torch.cat(scores), samples)


def _calls(prompts: int, samples: int, together: int) -> Iterator[tuple[range, range]]:
    """The prompts, and the numbers of their samples, of each call: at most `together` samples."""
    many = max(1, together // samples)
    for start in range(0, prompts, many):
        for first in range(0, samples, together):
            yield range(start, min(start + many, prompts)), range(first, min(first + together, samples))


def _settings(source: str, given: Mapping[str, object]) -> TrainConfig:
    values = {}
    if own := checkpoint.run_config(Path(source)):
        stored = under_new_names(config_file.read(own)[0])
        values = {name: stored[name] for name in OF_A_RUN if name in stored}
    elif "rewards" not in given:
        raise ValueError(f"rewards: {source} is no checkpoint of a run, whose rewards would be taken: give --rewards")
    if "data" not in given:
        raise ValueError("data: needs a JSONL or Parquet file, or hub:OWNER/NAME, with the prompts: give --data")
    # Its log-probs are of no use here, so that top_p is free.
    return config_file.load(None, {**values, **given, "model": source, "eval_problems": 0, "correction": "none"})


def _loaded(folder: Path, settings: TrainConfig) -> tuple[PreTrainedModel, Tokenizer]:
    """The model; of a checkpoint with LoRA the base with its adapters merged, in the dtype that it is loaded in."""
    device: Any = setup.device_of(settings)
    checkpoint.check(folder)
    if not (folder / lora.WEIGHTS).is_file():
        return policy.load(str(settings.model), device, settings.dtype)
    extras.need("lora", "redit-fast generate of a checkpoint with adapters")
    from peft import PeftModel

    name = lora.read_base(folder).model
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


@contextmanager
def _new(out: Path) -> Iterator[FileIO]:
    """Made at once, so that a folder that cannot be written to is known before the work; gone if it stays empty."""
    try:
        file = FileIO(out, "x")
    except OSError as error:
        raise ValueError(f"{out}: {error.strerror}: needs a new file in a folder that is there") from None
    try:
        yield file
    finally:
        if out.is_file() and not out.stat().st_size:
            out.unlink()
        with runs.naming(out):
            file.close()


def _append(file: FileIO, text: str) -> None:
    """Where not all of it can be written, the whole lines that can."""
    content, done, start = text.encode(), 0, file.tell()
    try:
        while done < len(content):
            done += file.write(content[done:])
    except OSError:
        file.truncate(start + content.rfind(b"\n", 0, done) + 1)
        raise


def _lines(
    places: list[tuple[str, int]], records: list[dict], rollout: Rollout, texts: list[str],
    functions: list[rewards.RewardFunction], scores: Tensor,
) -> list[dict]:  # fmt: skip
    return [
        {
            "data": place,
            "sample": sample,
            "prompt": data.text_of(record["prompt"]),
            "completion": text,
            "tokens": len(rollout.completions[i]),
            "finished": rollout.finished[i],
            "rewards": {function.name: value for function, value in zip(functions, row, strict=True)},
        }
        for i, ((place, sample), record, text, row) in enumerate(
            zip(places, records, texts, scores.tolist(), strict=True)
        )
    ]


def _told(functions: list[rewards.RewardFunction], scores: Tensor, samples: int) -> str:
    means = [f"{f.name} {column.nanmean().item():.3f}" for f, column in zip(functions, scores.T, strict=True)]
    if samples > 1:
        passed = (scores[:, 0] > 0).view(-1, samples).any(1).double().mean().item()
        means.append(f"{functions[0].name} above 0 in one of {samples} {passed:.1%}")
    return f"{len(scores)} completions: {', '.join(means)}"
