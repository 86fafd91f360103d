"""The route /v1/completions of a vLLM server, tokens in and tokens out: nothing is decoded and encoded again."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from pydantic import BaseModel, ConfigDict, ValidationError

from redit_fast.training.rollout import EngineError
from redit_fast.training.rollout.connection import Request

PATH = "/v1/completions"
A_TOKEN = 1024  # bytes of a token in an answer: its number, its text, its log-prob and those of others; vLLM takes 200
ABOVE = 1e-4  # a log-prob of a certain token may be above 0 by rounding


class Completion(NamedTuple):
    tokens: list[int]
    logp: list[float] | None
    best: list[float]  # the log-probs of the most likely first tokens, falling, where they were asked for


@dataclass(frozen=True)
class Limits:
    """What tokens a completion may have.

    Attributes:
        ends: the tokens that end one.
        vocabulary: all are below it.
    """

    ends: Sequence[int]
    vocabulary: int


class Part(BaseModel):
    """Of an answer: its values have the types that JSON gives them, and what is not asked for may be there."""

    model_config = ConfigDict(strict=True, extra="ignore")


class _Logprobs(Part):
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]] | None = None


class _Choice(Part):
    index: int
    token_ids: list[int]
    prompt_token_ids: list[int] | None = None
    finish_reason: str | None = None
    logprobs: _Logprobs | None = None


class _Answer(Part):
    model: str
    choices: list[_Choice]


def request(
    model: str,
    prompt: Sequence[int],
    ends: Sequence[int],
    *,
    samples: int,
    max_new_tokens: int,
    temperature: float,
    top_p: float,
    seed: int,
    logprobs: int | None,
) -> Request:
    """For `samples` completions of one prompt, to be tried again as it is.

    Args:
        seed: in [0, 2**62); vLLM adds a sample's number to it.
        logprobs: how many of the most likely tokens have their log-probs in the answer, beside each token that was
            drawn; None: there are no log-probs.
    """
    body = {
        "model": model,
        "prompt": list(prompt),
        "n": samples,
        "max_tokens": max_new_tokens,
        "temperature": temperature,
        "top_p": top_p,
        "seed": seed,
        "stop_token_ids": list(ends),
        "ignore_eos": True,  # else the model's own end tokens would end it too, which `ends` may lack
        "return_token_ids": True,
        "return_tokens_as_token_ids": True,  # keys of log-probs are then one for each token
        "skip_special_tokens": False,
        # vLLM takes what is not given from the model's generation_config.json, where Qwen2.5 has top_k 20 and a
        # repetition_penalty of 1.05: log-probs would be of another distribution than the loss.
        "top_k": 0,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
    }
    if logprobs is not None:
        body["logprobs"] = logprobs
    return Request(PATH, body, samples * (max_new_tokens * A_TOKEN + len(prompt) * 32))


def read(answer: bytes, asked: Request, limits: Limits, url: str) -> list[Completion]:
    """The samples of an answer, in their order.

    Raises:
        EngineError: it is not what was asked for.
    """
    body = asked.body or {}

    def error(why: str) -> EngineError:
        return EngineError(f"rollout {url}{asked.path}: {why}")

    try:
        found = _Answer.model_validate_json(answer)
    except ValidationError as wrong:
        raise error(f"no answer of vLLM's shape: {words_of(wrong)}") from None
    if found.model != body["model"]:
        raise error(f"the answer is of model {found.model[:100]!r}, not of {body['model'][:100]!r}")
    choices = {choice.index: choice for choice in found.choices}
    if sorted(choices) != list(range(body["n"])) or len(choices) != len(found.choices):
        raise error(f"{len(found.choices)} samples of numbers {sorted(choices)[:20]}, needs {body['n']} from 0 on")
    return [_checked(choices[i], body, limits, lambda why, i=i: error(f"sample {i}: {why}")) for i in sorted(choices)]


def words_of(wrong: ValidationError) -> str:
    """The first place that is wrong in an answer, and why."""
    first = wrong.errors(include_url=False, include_input=False)[0]
    return f"{'.'.join(map(str, first['loc'])) or 'the whole'}: {first['msg']}"


def _checked(choice: _Choice, body: dict, limits: Limits, error) -> Completion:
    tokens, most = choice.token_ids, body["max_tokens"]
    if not 1 <= len(tokens) <= most:
        raise error(f"{len(tokens)} tokens, needs 1 to {most}")
    if wrong := [token for token in tokens if not 0 <= token < limits.vocabulary]:
        raise error(f"token {wrong[0]} is none of the model's, which has {limits.vocabulary}")
    if choice.prompt_token_ids is not None and choice.prompt_token_ids != body["prompt"]:
        raise error("it is of another prompt than the one that was sent")
    ended = [t for t, token in enumerate(tokens) if token in limits.ends]
    if ended and ended[0] != len(tokens) - 1:
        raise error(f"it goes on after the end token {tokens[ended[0]]}")
    if not ended and len(tokens) < most:
        # Not one of ours: its length limit, or a stop token of its own generation_config.json.
        raise error(
            f"it ended after {len(tokens)} of {most} tokens ({choice.finish_reason}) on token {tokens[-1]}, which is "
            "no end token of the model: start the server with --generation-config vllm and a --max-model-len of prompt "
            "and completion"
        )
    if "logprobs" not in body:
        return Completion(tokens, None, [])
    if choice.logprobs is None:
        raise error("it has no log-probs")
    logp = choice.logprobs.token_logprobs
    if len(logp) != len(tokens):
        raise error(f"{len(logp)} log-probs for {len(tokens)} tokens")
    if high := [value for value in logp if not (math.isfinite(value) and value <= ABOVE)]:
        raise error(
            f"a log-prob is {high[0]}, needs a finite number of at most 0: the server needs --logprobs-mode "
            "processed_logprobs"
        )
    # The token that was drawn is among them too, however unlikely it is.
    best = sorted((choice.logprobs.top_logprobs or [{}])[0].values(), reverse=True)[: body["logprobs"]]
    return Completion(tokens, [min(value, 0.0) for value in logp], best)
