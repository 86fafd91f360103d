"""What a judge asks: a causal LM in this process, or a server. Each takes distinct questions and gives texts."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from pydantic import Field, ValidationError

from redit_fast.training import data, policy
from redit_fast.training.config import TrainConfig
from redit_fast.training.config_values import JUDGE_KEY
from redit_fast.training.rewards.user_code import RewardError
from redit_fast.training.rollout import EngineError
from redit_fast.training.rollout.completions import Part, words_of
from redit_fast.training.rollout.connection import Connection, Request
from redit_fast.training.rollout.local import generate

PATH = "/v1/chat/completions"
STEP = 2**32 - 4  # of the random numbers: no training step has it, nor an evaluation
TOGETHER = 64  # questions that a local judge answers in one batch
KNOWN = 100_000  # answers of a server that are kept
A_TOKEN = 64  # bytes of a token in a server's answer


class Local:
    """A model in this process. Its random numbers are of the seed and the question, whatever the step, and no answer is
    kept for the next call: a run that is resumed asks the same in the same batches.

    Raises:
        RewardError: the model cannot be loaded.
    """

    def __init__(self, place: str, config: TrainConfig) -> None:
        demo = config.model is None and config.device == "auto"  # which is on the CPU
        device: Any = policy.device_of("cpu" if demo else config.device)
        try:
            self.model, self.tokenizer = policy.load(place, device, config.dtype)
        except ValueError as error:
            raise RewardError(f"rewards: {f'judge:{place}'!r}: {error}") from None
        self.ends, self.config = policy.end_tokens(self.model, self.tokenizer), config

    def __call__(self, questions: Sequence[str]) -> list[str | None]:
        """None where a question and its answer are longer than the model's context."""
        config, rendered = self.config, [self._rendered(question) for question in questions]
        context = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        fit = [i for i, ids in enumerate(rendered) if context is None or len(ids) <= context - config.judge_max_tokens]
        fit.sort(key=lambda i: len(rendered[i]))
        answers: list[str | None] = [None] * len(questions)
        for start in range(0, len(fit), TOGETHER):
            batch = fit[start : start + TOGETHER]
            rollout = generate(
                self.model,
                self.ends,
                [rendered[i] for i in batch],
                max_new_tokens=config.judge_max_tokens,
                temperature=config.judge_temperature,
                top_p=config.judge_top_p,
                seed=config.seed,
                step=STEP,
                sample_ids=torch.tensor([_number(questions[i]) for i in batch], device="cpu"),
            )
            texts = self.tokenizer.batch_decode(rollout.completions, skip_special_tokens=True)
            for i, text in zip(batch, texts, strict=True):
                answers[i] = text
        return answers

    def _rendered(self, question: str) -> list[int]:
        """A user's message, which no special token in a completion ends: each gets a space."""
        for token in self.tokenizer.all_special_tokens:
            question = question.replace(token, f"{token[0]} {token[1:]}")
        return data.render(self.tokenizer, {"prompt": [{"role": "user", "content": question}]})


class _Message(Part):
    content: str | None = None


class _Choice(Part):
    message: _Message


class _Answer(Part):
    choices: list[_Choice] = Field(min_length=1)


class _Model(Part):
    id: str = Field(min_length=1)


class _Models(Part):
    data: list[_Model] = Field(min_length=1)


class Served:
    """A server with OpenAI's chat completions; its answers are kept by their questions.

    Raises:
        RewardError: the key is none.
    """

    def __init__(self, url: str, config: TrainConfig) -> None:
        url = url.rstrip("/").removesuffix("/v1")
        try:
            self.connection = Connection(
                url, config.rollout_timeout, config.rollout_retries, what="judge", key_in=JUDGE_KEY
            )
        except ValueError as error:
            raise RewardError(f"rewards: {error}") from None
        self.config, self.model = config, config.judge_model
        self.known: dict[bytes, str] = {}
        self.failed, self.why = 0, ""  # questions in a row without an answer, and why the last of them
        self.answered = self.warned = False

    def __call__(self, questions: Sequence[str]) -> list[str | None]:
        """None where an answer does not come, or is not what OpenAI's API has.

        Raises:
            RewardError: there was no answer yet, or none to the last `judge_failures` questions.
        """
        model = self.model = self.model or self._first()
        keys = [_digest(question) for question in questions]
        new = [i for i, key in enumerate(keys) if key not in self.known]
        requests = [self._request(model, questions[i]) for i in new]
        for i, outcome in zip(new, self.connection.each(requests) if new else [], strict=True):
            try:
                self.known[keys[i]] = self._read(outcome)
            except EngineError as error:
                self.failed, self.why = self.failed + 1, str(error)
            else:
                self.failed, self.answered = 0, True
        self._check_failures()
        answers = [self.known.get(key) for key in keys]
        for key in list(self.known)[: max(0, len(self.known) - KNOWN)]:
            del self.known[key]
        return answers

    def _check_failures(self) -> None:
        if self.why and not self.answered:
            raise RewardError(f"rewards: {self.why}")
        if self.failed >= self.config.judge_failures:
            raise RewardError(
                f"rewards: {self.why}; the last {self.failed} questions to the judge had no answer (judge_failures)"
            )
        if self.why and not self.warned:
            self.warned = True
            warnings.warn(f"{self.why}; what the judge does not answer is unscored", stacklevel=3)

    def _first(self) -> str:
        path = "/v1/models"
        try:
            return _Models.model_validate_json(self.connection.answer(Request(path))).data[0].id
        except EngineError as error:
            raise RewardError(f"rewards: {error}") from None
        except ValidationError as wrong:
            raise RewardError(
                f"rewards: judge {self.connection.url}{path}: no list of models, needs a judge_model: {words_of(wrong)}"
            ) from None

    def _request(self, model: str, question: str) -> Request:
        config = self.config
        body = {
            "model": model,
            "messages": [{"role": "user", "content": question}],
            "max_tokens": config.judge_max_tokens,
            "temperature": config.judge_temperature,
            "top_p": config.judge_top_p,
            "seed": _number(f"{config.seed} {question}"),
        }
        return Request(PATH, body, config.judge_max_tokens * A_TOKEN)

    def _read(self, outcome: bytes | EngineError) -> str:
        if isinstance(outcome, EngineError):
            raise outcome
        try:
            content = _Answer.model_validate_json(outcome).choices[0].message.content or ""
        except ValidationError as wrong:
            raise EngineError(
                f"judge {self.connection.url}{PATH}: no answer of a chat's shape: {words_of(wrong)}"
            ) from None
        return self.connection.without_key(content)  # a warning may show its end


def _digest(question: str) -> bytes:
    return hashlib.sha256(question.encode()).digest()


def _number(question: str) -> int:
    """Of the random numbers of its answer: in [0, 2**31), which every server's seed has."""
    return int.from_bytes(_digest(question)[:4]) >> 1
