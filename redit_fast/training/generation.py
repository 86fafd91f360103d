"""`redit-fast generate`: completions of a file of prompts by a checkpoint, with rewards, by any engine. And what it has
in common with `eval` and `sample`: a checkpoint's settings, model and engine, and its completions, call by call."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any, NamedTuple

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
from redit_fast.training.rollout import Engine, Rollout

OF_A_JUDGE = (
    "judge_template", "judge_model", "judge_temperature", "judge_top_p", "judge_max_tokens", "judge_failures",
)  # fmt: skip
# What a run's config.json gives where no flag does. Not its rollout: the server of a run that is still at work has that
# run's weights, and would get others.
OF_A_RUN = (
    "rewards", "reward_weights", *OF_A_JUDGE, "system_prompt", "max_completion_length", "max_prompt_length",
    "temperature", "top_p", "dtype", "device", "columns", "data_format",
)  # fmt: skip
SETTINGS = (  # the flags
    *OF_A_RUN, "data", "seed", "long_prompts", "rollout", "rollout_timeout",
    "rollout_retries",
)  # fmt: skip
STEP = 2**32 - 3  # of the random numbers: no training step has it
TOGETHER = {LOCAL: 256}  # completions that are sampled in one call, and written when it is over
TOGETHER_ELSEWHERE = 1024
MOST = 2**32  # completions: as many numbers of samples there are
UNSET = "-"  # data or rewards that are not given and not needed


class Sampled(NamedTuple):
    """The completions of one call, prompt after prompt."""

    places: list[tuple[int, int]]  # of each its prompt's place in the data, and its number among those of the prompt
    rollout: Rollout
    texts: list[str]
    scores: Tensor  # (N, K)


@dataclass(frozen=True)
class Job:
    """A checkpoint with its prompts, rewards and engine, ready to sample."""

    settings: TrainConfig
    parts: setup.Parts
    engine: Engine
    shown: Any  # the progress

    def sampled(self, samples: int, *, greedy: bool) -> Iterator[Sampled]:
        """`samples` completions of each prompt, in calls of bounded size.

        Raises:
            RewardError, EngineError: one sentence.
        """
        settings, tokenizer, records = self.settings, self.parts.tokenizer, self.parts.dataset.train
        bar = self.shown.add_task("samples", total=len(records) * samples, numbers="")
        together = TOGETHER.get(settings.rollout, TOGETHER_ELSEWHERE)
        for prompts, numbers in _calls(len(records), samples, together):
            places = [(prompt, j) for prompt in prompts for j in numbers]
            rollout = self.engine.generate(
                [data.render(tokenizer, records[prompt], settings.system_prompt) for prompt in prompts],
                group_size=len(numbers),
                max_new_tokens=settings.max_completion_length,
                temperature=0.0 if greedy else settings.temperature,
                top_p=settings.top_p,
                seed=settings.seed,
                step=STEP,
                sample_ids=torch.tensor([prompt * samples + j for prompt, j in places], device="cpu"),
            )
            texts = tokenizer.batch_decode(rollout.completions, skip_special_tokens=True)
            each = [records[prompt] for prompt, _ in places]
            yield Sampled(places, rollout, texts, rewards.score_texts(self.parts.functions, each, texts))
            self.shown.update(bar, advance=len(places), numbers="")


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
    folder, settings = settings_of("generate", source, given, samples=samples, greedy=greedy)
    if out is None:
        name = f"{folder.name}-completions.jsonl"
        out = folder.with_name(name) if folder.is_dir() else Path(name)
    refuse_taken(out)
    with ExitStack() as held:
        job = opened("generate", folder, settings, samples, held)
        file, scores = held.enter_context(new_file(out)), []
        for call in job.sampled(samples, greedy=greedy):
            lines = _lines(job.parts, call)
            scores.append(call.scores)
            with runs.naming(out), runs.uninterrupted():
                append(file, "".join(json.dumps(runs.without_nan(line)) + "\n" for line in lines))
    return out, _told(job.parts.functions, torch.cat(scores), samples)


def settings_of(
    command: str,
    source: str,
    given: Mapping[str, object],
    *,
    samples: int,
    greedy: bool,
    needs: Sequence[str] = ("data", "rewards"),
) -> tuple[Path, TrainConfig]:
    """The folder of a checkpoint, or the name of a model that is none, and the settings for its completions.

    Args:
        needs: of data and rewards what must be known; the other is UNSET where it is not.

    Raises:
        ValueError: one sentence.
    """
    if launched():
        raise ValueError(f"redit-fast {command} is one process: start it without torchrun")
    if not 1 <= samples <= (1 if greedy else MOST):
        wanted = "1 with --greedy" if greedy else f"a whole number from 1 to {MOST}"
        raise ValueError(f"--samples is {samples}, needs {wanted}")
    folder = Path(source).expanduser()
    if folder.is_dir():
        folder = Path(os.path.abspath(folder))  # `.` has a name too
        source = str(folder)
    values: dict[str, object] = {}
    if own := checkpoint.run_config(folder):
        stored = under_new_names(config_file.read(own)[0])
        left = list(OF_A_JUDGE) if "rewards" in given else []  # other rewards may have no judge
        left += ["columns", "data_format"] if {"columns", "data_format"} & given.keys() else []  # one stands for both
        values = {name: stored[name] for name in OF_A_RUN if name in stored and name not in left}
    values |= given
    if "rewards" in needs and "rewards" not in values:
        raise ValueError(f"rewards: {source} is no checkpoint of a run, whose rewards would be taken: give --rewards")
    if "data" in needs and "data" not in values:
        raise ValueError("data: needs a JSONL or Parquet file, or hub:OWNER/NAME, with the prompts: give --data")
    # Its log-probs are of no use here, so that top_p is free.
    values |= {"model": source, "eval_problems": 0, "correction": "none"}
    return folder, config_file.load(None, {"data": UNSET, "rewards": [UNSET], **values})


def opened(command: str, folder: Path, settings: TrainConfig, samples: int, held: ExitStack) -> Job:
    """Everything that `samples` completions of each prompt of the data take, until `held` ends.

    Raises:
        ValueError: one sentence that names what cannot be loaded or does not fit.
    """
    model, tokenizer = loaded(command, folder, settings)
    dataset = setup.dataset(settings, model, tokenizer)
    functions = rewards.resolve(settings.rewards, data.columns_of(dataset.train[:1]), settings)
    if len(dataset.train) * samples > MOST:
        most = MOST // len(dataset.train)
        raise ValueError(f"--samples is {samples}, needs at most {most} for {len(dataset.train)} prompts")
    return ready(settings, model, tokenizer, dataset, functions, held, Console())


def ready(
    settings: TrainConfig, model: PreTrainedModel, tokenizer: Tokenizer, dataset: data.Dataset,
    functions: list[rewards.RewardFunction], held: ExitStack, console: Console,
) -> Job:  # fmt: skip
    """The job of what is loaded, its columns checked and its engine tried; a quiet `console` has no progress."""
    trial.check_columns(dataset, functions)
    ends, loss = policy.end_tokens(model, tokenizer), setup.loss_config(settings, model)
    parts = setup.Parts(
        model.eval(), tokenizer, dataset, functions, loss, ends, why_padded=None, base=None, shape=None, peak=None
    )
    engine = setup.engine(settings, parts, held, Ranks())
    return Job(settings, parts, engine, held.enter_context(progress.shown(console)))


def loaded(command: str, folder: Path, settings: TrainConfig) -> tuple[PreTrainedModel, Tokenizer]:
    """The model; of a checkpoint with LoRA the base with its adapters merged, in the dtype that it is loaded in."""
    device: Any = setup.device_of(settings)
    checkpoint.check(folder)
    if not (folder / lora.WEIGHTS).is_file():
        return policy.load(str(settings.model), device, settings.dtype)
    extras.need("lora", f"redit-fast {command} of a checkpoint with adapters")
    from peft import PeftModel

    name = lora.read_base(folder).model
    model, tokenizer = policy.load(name, device, settings.dtype)
    lora.check_base(folder, lora.base_of(name))
    with Foreign(f"checkpoint {folder} cannot be loaded"), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of transformers 5.24, about what peft 0.21 asks it
        merged: Any = PeftModel.from_pretrained(model, str(folder)).merge_and_unload()
    return merged, tokenizer


def _calls(prompts: int, samples: int, together: int) -> Iterator[tuple[range, range]]:
    """The prompts, and the numbers of their samples, of each call: at most `together` samples."""
    many = max(1, together // samples)
    for start in range(0, prompts, many):
        for first in range(0, samples, together):
            yield range(start, min(start + many, prompts)), range(first, min(first + together, samples))


def refuse_taken(out: Path) -> None:
    if os.path.lexists(out):
        raise ValueError(f"{out} is there already and stays as it is: give another --out")


@contextmanager
def new_file(out: Path) -> Iterator[FileIO]:
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


def append(file: FileIO, text: str) -> None:
    """Where not all of it can be written, the whole lines that can."""
    content, done, start = text.encode(), 0, file.tell()
    try:
        while done < len(content):
            done += file.write(content[done:])
    except OSError:
        file.truncate(start + content.rfind(b"\n", 0, done) + 1)
        raise


def _lines(parts: setup.Parts, call: Sampled) -> list[dict]:
    """The objects of a call's completions."""
    found = []
    for i, (prompt, number) in enumerate(call.places):
        place, record = parts.dataset.numbered[prompt]
        found.append(
            {
                "data": place,
                "sample": number,
                "prompt": data.text_of(record["prompt"]),
                "completion": call.texts[i],
                "tokens": len(call.rollout.completions[i]),
                "finished": call.rollout.finished[i],
                "rewards": {f.name: v for f, v in zip(parts.functions, call.scores[i].tolist(), strict=True)},
            }
        )
    return found


def _told(functions: list[rewards.RewardFunction], scores: Tensor, samples: int) -> str:
    means = [f"{f.name} {column.nanmean().item():.3f}" for f, column in zip(functions, scores.T, strict=True)]
    told = f"{len(scores)} completions: {', '.join(means)}"
    if samples > 1:
        passed = (scores[:, 0] > 0).view(-1, samples).any(1).double().mean().item()
        told += f"; {passed:.1%} of the prompts have a completion with {functions[0].name} above 0"
    return told
