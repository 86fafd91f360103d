"""Completions by a vLLM server, which has an environment of its own: docs/integrations/vllm.md starts it.

It gets the weights as files: all of them through `examples/vllm_weights.py`, which it loads as its worker extension, or
with LoRA as an adapter. Nothing of vLLM is imported here.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from pydantic import Field, ValidationError
from safetensors import SafetensorError
from torch import Tensor
from transformers import PreTrainedModel

from redit_fast.noise import STREAM_SAMPLING, philox4x32
from redit_fast.training import lora
from redit_fast.training.distributed import Ranks
from redit_fast.training.rollout import EngineError, Rollout, completions, connection
from redit_fast.training.rollout.connection import Connection, Request

MEMORY = Path("/dev/shm")  # noqa: S108 a file system in memory, where a folder of ours is made that nobody else reads
LOAD = "redit_fast_load"  # of examples/vllm_weights.py
PROBE = 8  # tokens of a prompt that the log-probs are looked at with
RESETS = 20  # attempts to empty the prefix cache
NAME = 1000  # characters of a model's
HALF = 0.75  # of the spread of log-probs at temperature 1 there is 0.5 at temperature 2, or else all of it


class _Model(completions.Part):
    id: str = Field(min_length=1, max_length=NAME)
    max_model_len: int | None = Field(None, gt=0)  # tokens of prompt and completion


class _Models(completions.Part):
    data: list[_Model] = Field(min_length=1)


class Server:
    """An engine, `rollout.Engine`. Ranks share one server: each sends its prompts, and the first the weights.

    A request has a prompt and its `group_size` samples. Its seed comes from (seed, step, number of its first sample),
    so that it may be sent again. Same seeds do not give the same tokens where the server batches them differently.

    Args:
        url: http://HOST:PORT or https://HOST:PORT.
        ends: the tokens that end a completion.
        vocabulary: how many tokens the model has.
        timeout, retries: of `Connection`.
        folder: for the weights where memory has no room for two copies of them.
        base: what adapters belong to; None: all weights are sent.
        sleeps: the server gives its GPU's memory back between rollouts.

    Raises:
        ValueError: `sleeps` with several ranks, or a key that is none.
    """

    def __init__(
        self,
        url: str,
        ends: Sequence[int],
        vocabulary: int,
        *,
        timeout: float,
        retries: int,
        folder: Path,
        ranks: Ranks | None = None,
        base: lora.Base | None = None,
        sleeps: bool = False,
    ) -> None:
        self.connection = Connection(url, timeout, retries)
        self.limits = completions.Limits(ends, vocabulary)
        self.folder, self.ranks, self.base, self.sleeps = folder, ranks or Ranks(), base, sleeps
        if sleeps and self.ranks.size > 1:
            raise ValueError("rollout_sleep: several ranks share the server, and one would put it to sleep for all")
        self.served: _Model | None = None  # the first that it has
        self.adapter: tuple[str, tempfile.TemporaryDirectory] | None = None  # on the first rank, its name and its files
        self.name: str | None = None  # of the adapter
        self.checked = self.asleep = False
        self.sent = 0  # times

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        group_size: int,
        max_new_tokens: int,
        temperature: float,
        top_p: float,
        seed: int,
        step: int,
        sample_ids: Tensor,
    ) -> Rollout:
        """As `rollout.Engine`. Without log-probs too where top_p is below 1: the server's are of the tokens that top_p
        leaves.

        Raises:
            EngineError: the server is away or slow, or answers what was not asked for; one sentence.
        """
        served = self._serving()
        for prompt in prompts:
            if served.max_model_len is not None and len(prompt) + max_new_tokens > served.max_model_len:
                raise EngineError(
                    f"rollout {self.connection.url}: a prompt of {len(prompt)} tokens and a completion of "
                    f"{max_new_tokens} are more than its --max-model-len, {served.max_model_len}"
                )
        self._wake()
        requests = [
            completions.request(
                self.name or served.id,
                prompt,
                self.limits.ends,
                samples=group_size,
                max_new_tokens=max_new_tokens,
                temperature=temperature,
                top_p=top_p,
                seed=of_request,
                logprobs=0 if temperature and top_p == 1 else None,
            )
            for prompt, of_request in zip(prompts, seeds_of(seed, step, sample_ids[::group_size]), strict=True)
        ]
        samples = [
            sample
            for asked, answer in zip(requests, self.connection.answers(requests), strict=True)
            for sample in completions.read(answer, asked, self.limits, self.connection.url)
        ]
        if self.sleeps:
            self._post("/sleep?level=1", {})
            self.asleep = True
        ends, logps = set(self.limits.ends), [sample.logp for sample in samples]
        return Rollout(
            [sample.tokens for sample in samples],
            [sample.tokens[-1] in ends for sample in samples],
            None if None in logps else logps,  # type: ignore[arg-type]
        )

    def sync(self, model: PreTrainedModel) -> None:
        """As `rollout.Engine`. The first time the server's log-probs are looked at too.

        Raises:
            EngineError: the server cannot load the weights, or gives other log-probs than its sampler's.
        """
        weights = self.ranks.state_of(model, trained=self.base is not None)
        self.name = self.ranks.by_first(lambda: self._send(model, weights), stoppable=True)
        if not self.checked:
            self.ranks.by_first(self._check_mode, stoppable=True)
            self.checked = True

    def close(self) -> None:
        self.connection.close()
        if self.adapter is not None:
            self.adapter[1].cleanup()
            self.adapter = None

    def _post(self, path: str, body: dict, fine: tuple[int, ...] = (200,)) -> bytes:
        needs = "VLLM_ALLOW_RUNTIME_LORA_UPDATING=1 and --enable-lora" if "lora" in path else "VLLM_SERVER_DEV_MODE=1"
        return self.connection.answer(Request(path, body, fine=fine, needs=needs))

    def _serving(self) -> _Model:
        if self.served is None:
            path = "/v1/models"
            answer = self.connection.answer(Request(path))
            try:
                self.served = _Models.model_validate_json(answer).data[0]
            except ValidationError as wrong:
                raise EngineError(
                    f"rollout {self.connection.url}{path}: no list of models as vLLM has it: "
                    f"{completions.words_of(wrong)}"
                ) from None
        return self.served

    def _wake(self) -> None:
        if self.asleep:
            self._post("/wake_up", {})
            self.asleep = False

    def _send(self, model: PreTrainedModel, weights: dict[str, Tensor] | None) -> str | None:
        """Makes the server load the model's weights, and gives the name of the adapter if that is what they are."""
        self._wake()
        self.sent += 1
        named = dict(model.named_parameters()) if weights is None else weights
        size = sum(p.numel() * p.element_size() for p in {id(p): p for p in named.values()}.values())
        place = MEMORY if MEMORY.is_dir() and shutil.disk_usage(MEMORY).free >= 2 * size else self.folder
        try:
            place.mkdir(parents=True, exist_ok=True)
            files = tempfile.TemporaryDirectory(prefix="redit-fast-", dir=place, ignore_cleanup_errors=True)
            ready = self._written(Path(files.name), model, weights)
        except (OSError, SafetensorError) as error:
            raise EngineError(f"rollout: the weights could not be written for the server: {error}") from None
        if self.base is None:
            with files:
                self._load(ready)
            return None
        name = f"redit-fast-{os.getpid()}-{Path(files.name).name[-8:]}-{self.sent}"
        # In place, so that an attempt may follow one that had come through. The name is new: keys and values of prompts
        # are kept by it.
        self._post("/v1/load_lora_adapter", {"lora_name": name, "lora_path": str(ready), "load_inplace": True})
        before, self.adapter = self.adapter, (name, files)  # whose files vLLM may read again
        if before is not None:
            self._post("/v1/unload_lora_adapter", {"lora_name": before[0]}, fine=(200, 404))
            before[1].cleanup()
        return name

    def _written(self, folder: Path, model: PreTrainedModel, weights: dict[str, Tensor] | None) -> Path:
        """A folder of files that are whole."""
        draft, ready = folder / ".weights", folder / "weights"
        draft.mkdir()
        if self.base is None:
            model.save_pretrained(draft, state_dict=weights)
        else:
            lora.save(draft, model, weights, self.base)
        os.replace(draft, ready)
        return ready

    def _load(self, ready: Path) -> None:
        self._post("/collective_rpc", {"method": LOAD, "args": [str(ready)]})
        for attempt in range(RESETS):  # keys and values of the old weights: kept while a request of before is at work
            if attempt:
                time.sleep(connection.PAUSE)
            if b'"success":false' not in self._post("/reset_prefix_cache", {}).replace(b" ", b""):
                return
        raise EngineError(
            f"rollout {self.connection.url}/reset_prefix_cache: the server keeps what it has computed with the old "
            "weights, since another request is at work in it"
        )

    def _check_mode(self) -> None:
        """That the server's log-probs are those of its sampler: at temperature 2 those of two tokens are half as far
        apart as at 1, unless they are of before the temperature."""
        ends = set(self.limits.ends)
        prompt = [token for token in range(self.limits.vocabulary) if token not in ends][:PROBE]
        spreads = []
        for temperature in (1.0, 2.0):
            asked = completions.request(
                self.name or self._serving().id,
                prompt,
                self.limits.ends,
                samples=1,
                max_new_tokens=1,
                temperature=temperature,
                top_p=1.0,
                seed=0,
                logprobs=5,
            )
            answer = self.connection.answer(asked)
            ((_, _, best),) = completions.read(answer, asked, self.limits, self.connection.url)
            if len(best) < 2:
                raise EngineError(
                    f"rollout {self.connection.url}{completions.PATH}: it gives no log-probs of other tokens"
                )
            spreads.append(best[0] - best[-1])
        if spreads[1] > HALF * spreads[0]:
            raise EngineError(
                f"rollout {self.connection.url}: its log-probs are those of before the temperature, where the loss "
                "needs the sampler's: start it with --logprobs-mode processed_logprobs"
            )


def seeds_of(seed: int, step: int, ids: Tensor) -> list[int]:
    """Of requests by their first samples, in [0, 2**62), out of the noise that (seed, step, id) begins with."""
    low, high, _, _ = philox4x32(seed, ids.cpu(), STREAM_SAMPLING, step)
    return [(x + (y << 32)) % 2**62 for x, y in zip(low.tolist(), high.tolist(), strict=True)]
