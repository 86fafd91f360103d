"""What every step of a run does, tried on a few tokens before the run writes anything."""

from __future__ import annotations

import dataclasses
import random
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

import redit_fast as rf
from redit_fast.checks import given
from redit_fast.foreign import Foreign
from redit_fast.packing.attention import UnpackableError, refusal
from redit_fast.packing.rows import difference
from redit_fast.training import data, policy, rewards
from redit_fast.training.batch import Batch
from redit_fast.training.config import TrainConfig
from redit_fast.training.config_values import LOCAL, PAGED
from redit_fast.training.distributed import launched
from redit_fast.training.rewards.functions import SHIPPED
from redit_fast.training.rewards.model import RewardModel
from redit_fast.training.rollout import Engine, EngineError
from redit_fast.training.rollout.local import CHECK_EVERY, generate

PROMPT, COMPLETION, GROUP = 16, CHECK_EVERY + 4, 2  # tokens, tokens so that a row leaves the batch, samples
TRIAL_STEP = 2**32 - 2  # of an engine's random numbers: no training step has it, nor an evaluation
# Mean distance of an engine's log-probs, in nats: float32 engines had 1e-6 to 1e-4, bfloat16 rounding made 0.04.
FLOAT32, ROUNDED = 1e-3, 0.3
ALIKE = 1e4  # a temperature at which all tokens are as likely, so that the samples of a prompt differ


def check(
    model: PreTrainedModel,
    tokenizer: Tokenizer,
    dataset: data.Dataset,
    functions: list[rewards.RewardFunction],
    settings: rf.LossConfig,
    config: TrainConfig,
) -> str | None:
    """A rollout in which a row ends early, one score of each reward, a forward and backward pass, the data's answers.

    The hidden states of the rollout, with padding on the left and a cache, must be those of the training pass. Weights,
    modes and random states are left as they were, gradients are None.

    Returns:
        Why the training pass needs padded rows; None: its rows are packed, with the log-probs of padded ones.

    Raises:
        ValueError: one sentence that names the model, or the data file and its line; packing is on and cannot be.
        RewardError: one sentence that names the reward function.
    """
    check_columns(dataset, functions)
    name, training, state = f"model {model.name_or_path} ({model.config.model_type})", model.training, random.getstate()
    with torch.random.fork_rng(devices=[model.device] if model.device.type == "cuda" else []):
        texts, why_padded = _check_passes(name, model, tokenizer, dataset.train[0], settings, config)
        trial = [dataclasses.replace(function, warned=True) for function in functions]  # unscored samples: not yet
        rewards.score_texts(trial, [dataset.train[0]] * GROUP, texts[:GROUP])
    model.train(training)
    random.setstate(state)
    if why_padded is not None and config.packing == "on":
        raise ValueError(f"packing is on and {name} needs padded rows: {why_padded}")
    return why_padded


def check_engine(
    engine: Engine,
    model: PreTrainedModel,
    tokenizer: Tokenizer,
    dataset: data.Dataset,
    settings: rf.LossConfig,
    config: TrainConfig,
) -> None:
    """A few tokens of another engine than the local one, whose log-probs must be those of the training pass.

    Warns of a server that is further off than one in float32, where the model is in float32.

    Raises:
        EngineError: what the engine raises; its log-probs are others.
    """
    if config.rollout == LOCAL:  # which `check` has tried
        return
    name, training = f"model {model.name_or_path} ({model.config.model_type})", model.training
    ids = data.render(tokenizer, dataset.train[0], config.system_prompt)[-PROMPT:]
    prompts = [ids, ids[: (len(ids) + 1) // 2]]
    rollout = engine.generate(
        prompts,
        group_size=GROUP,
        max_new_tokens=min(COMPLETION, config.max_completion_length),
        temperature=config.temperature,
        top_p=config.top_p,
        seed=config.seed,
        step=TRIAL_STEP,
        sample_ids=torch.arange(GROUP * len(prompts), device="cpu"),
    )
    if rollout.logp is None:
        return
    config = config.model_copy(update={"group_size": GROUP, "micro_batch_size": GROUP * len(prompts)})
    zeros = torch.zeros(GROUP * len(prompts), dtype=torch.float32, device="cpu")
    batch = Batch.of(prompts, rollout, zeros, settings, config, 0, packed=False)
    model.eval()
    found = batch.logp(model).cpu()
    model.train(training)
    off = (found - given(batch.sampling_logp)).abs().mean().item()
    limit = FLOAT32 if model.dtype == torch.float32 else ROUNDED
    # No answer of a server tells its dtype, and bfloat16 at a server beside float32 here is allowed.
    if not off < (limit if config.rollout == PAGED else ROUNDED):
        raise EngineError(
            f"rollout {config.rollout} cannot be used with {name}: its log-probs of the same weights are {off:.2g} off "
            "those of the training pass, so that the loss would not be that of the samples"
        )
    if off >= limit:
        warnings.warn(
            f"rollout {config.rollout}: its log-probs of the same weights are {off:.2g} off those of the training pass "
            f"here, where a server in float32, like this model, is less than {FLOAT32:g} off: it computes in another "
            "dtype, or has other weights",
            stacklevel=2,
        )


def check_columns(dataset: data.Dataset, functions: list[rewards.RewardFunction]) -> None:
    """Every record, by the functions that can tell before a run what they could not score: `_check_of`."""
    for function in functions:
        if (check := _check_of(function)) is None:
            continue
        for place, record in dataset.numbered:
            try:
                check(record)
            except ValueError as error:
                raise ValueError(f"{place}: {error}") from None


def _check_of(function: rewards.RewardFunction) -> Callable[[dict], object] | None:
    """What raises a ValueError of the reason: of a shipped function its `check_column` of the column `answer`, of a
    reward model its `check_prompt`."""
    fn: Any = function.fn
    if isinstance(fn, RewardModel):
        return lambda record: fn.check_prompt(record["prompt"])
    if fn in SHIPPED.values() and hasattr(fn, "check_column"):
        return lambda record: fn.check_column(record["answer"])
    return None


def _check_passes(
    name: str, model, tokenizer, record: dict, settings: rf.LossConfig, config: TrainConfig
) -> tuple[list[str], str | None]:
    """The texts of a rollout that the training pass agrees with, and why that needs padded rows."""
    ids = data.render(tokenizer, record, config.system_prompt)[-PROMPT:]
    prompts = [ids, ids[: (len(ids) + 1) // 2]]  # of two lengths
    sampling: dict[str, Any] = {"group_size": GROUP, "max_new_tokens": min(COMPLETION, config.max_completion_length)}
    sampling |= {"temperature": ALIKE, "seed": config.seed}
    with Foreign(f"{name} cannot be rolled out", plain=(NotImplementedError, FloatingPointError)):
        end = generate(model, [], prompts, **sampling).completions[0][0]
        with _inputs_of(policy.head_of(model)) as steps:
            rollout = generate(model, [end], prompts, **sampling)  # the first sample ends at once
    config = config.model_copy(
        update={"group_size": GROUP, "micro_batch_size": GROUP * len(prompts), "overlong": "keep"}
    )
    advantages = torch.tensor([1.0, -1.0] * len(prompts), dtype=torch.float32, device="cpu")
    batch = Batch.of(prompts, rollout, advantages, settings, config, 0, packed=False)
    ((rows, _),) = batch.micro_batches
    model.eval()
    with Foreign(f"{name} cannot be trained"):
        with torch.no_grad():
            hidden, _, counts = batch.hidden(model, rows)
        by_sample = dict(zip(rows.samples, hidden.split(counts), strict=True))
        expected = torch.cat([by_sample[sample] for sample in range(len(batch.lengths))])
        if settings.beta:
            batch.score_reference(model)  # the reference is a copy of it
        with _dropping_gradients(model) as reached:
            batch.backward(model)
        unreached = [of for of, p in model.named_parameters() if p.requires_grad and p not in reached]
        why_padded = _why_padded(model, batch) if config.packing != "off" else "packing is off"
    if unreached and launched():  # DDP and FSDP2 would wait for them
        raise ValueError(
            f"{name} cannot be trained by several processes: {len(unreached)} of its parameters, such as "
            f"{unreached[0]}, get no gradient from a pass"
        )

    lengths = torch.tensor(batch.lengths, device="cpu")
    found = expected.new_zeros(len(lengths), max(batch.lengths), expected.shape[-1])
    for t, step in enumerate(steps[: found.shape[1]]):
        there = lengths > t // CHECK_EVERY * CHECK_EVERY  # rows of the rollout's batch, some of which have ended
        states = step[:, -1].repeat_interleave(GROUP if t == 0 else 1, 0)
        found[lengths > t, t] = states[(lengths > t)[there]].to(found.dtype)
    found = found[torch.arange(found.shape[1], device="cpu") < lengths[:, None]]
    off = ((found - expected).norm(dim=-1) / expected.norm(dim=-1)).mean().item()
    if not off < (1e-3 if model.dtype == torch.float32 else 0.2):  # bfloat16 rounds twice, router choices included
        raise ValueError(
            f"{name} cannot be rolled out: with padding and a cache its hidden states are {off:.2g} of their norm off "
            "those of the training pass, so that the loss would not be that of the samples"
        )
    return tokenizer.batch_decode(rollout.completions, skip_special_tokens=True), why_padded


def _why_padded(model: PreTrainedModel, padded: Batch) -> str | None:
    """Why the model's rows cannot be packed, by what it is and by the log-probs of a few, in training mode."""
    if (why := refusal(model)) is not None:
        return why
    packed = dataclasses.replace(padded, packed=True)
    try:
        found = packed.logp(model)
    except UnpackableError as error:
        return str(error)
    return difference(found, padded.logp(model), model.dtype != torch.float32)


@contextmanager
def _dropping_gradients(model: PreTrainedModel) -> Iterator[set[torch.Tensor]]:
    """Inside, a gradient is gone as soon as it is there: all of them take as much memory as the model. Gives the
    parameters that had one."""
    reached: set[torch.Tensor] = set()

    def drop(p: torch.Tensor) -> None:
        reached.add(p)
        p.grad = None

    hooks = [p.register_post_accumulate_grad_hook(drop) for p in model.parameters() if p.requires_grad]
    try:
        yield reached
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def _inputs_of(module: torch.nn.Module) -> Iterator[list[torch.Tensor]]:
    """The inputs of its calls."""
    calls = []
    hook = module.register_forward_pre_hook(lambda _, inputs: calls.append(inputs[0]))
    try:
        yield calls
    finally:
        hook.remove()
