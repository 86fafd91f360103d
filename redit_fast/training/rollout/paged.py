"""Completions by transformers' continuous batching: requests of all lengths share one batch and a paged cache, and on a
GPU it has flash attention and CUDA graphs. It is found in transformers 5.8 and newer.

Its sampling draws from torch's generators, which are seeded for a call and put back after it.
"""

from __future__ import annotations

import gc
import inspect
import logging
import math
import random
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import fields
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel
from transformers.generation import configuration_utils

from redit_fast.foreign import Foreign
from redit_fast.training.rollout import EngineError, Rollout

# On the CPU: its default sizes are made after the free memory, and its mask has a row for each token of a batch and a
# column for each of the cache, 134 MB with these.
PAGE, PAGES, BATCH = 32, 1024, 1024
LOOK_EVERY = 0.5  # seconds between two looks at whether its thread still runs


class PagedEngine:
    """Samples of the model that is trained, whose weights it always has.

    Raises:
        EngineError: this transformers, or this model, does not have it; one sentence.
    """

    def __init__(self, model: PreTrainedModel, ends: Sequence[int]) -> None:
        config_of: Any = getattr(configuration_utils, "ContinuousBatchingConfig", None)
        known = {f.name for f in fields(config_of)} if config_of is not None else set()
        if "return_logprobs" not in known or not hasattr(model, "init_continuous_batching"):
            raise EngineError(
                f"rollout paged needs transformers 5.8 or newer, which is {transformers.__version__} here, and a model "
                f"of its own, not a {type(model).__name__}"
            )
        self.model, self.ends = model, list(ends)
        self.config_of, self.known = config_of, known

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
        """As `Engine`. The random numbers are of (seed, step, the first of sample_ids): a call repeats, but a sample
        depends on the others of the call. It has log-probs of what it draws from, so that they are none at top_p < 1.
        """
        samples = [list(prompt) for prompt in prompts for _ in range(group_size)]
        sampled = {"temperature": temperature, "top_p": top_p, "top_k": 0} if temperature else {}
        generation = GenerationConfig(
            do_sample=temperature > 0, max_new_tokens=max_new_tokens, eos_token_id=self.ends or -1, **sampled
        )
        number = random.Random(f"{seed} {step} {sample_ids[0].item()}").getrandbits(62)
        settings = self._settings(max(map(len, samples)) + max_new_tokens, len(samples), number)
        name = f"model {self.model.name_or_path} ({self.model.config.model_type})"
        what = f"rollout paged cannot sample from {name}"
        with ExitStack() as held:
            held.enter_context(_as_before(self.model))
            held.enter_context(_silent())
            held.enter_context(_collecting_little())
            cuda = [self.model.device] if self.model.device.type == "cuda" else []
            held.enter_context(torch.random.fork_rng(devices=cuda))
            torch.manual_seed(number)
            with Foreign(what, plain=(ValueError, NotImplementedError), error=EngineError):
                _switch_attention(self.model, "auto_switch_to_flash" in self.known)
                manager: Any = self.model.init_continuous_batching(
                    generation_config=generation, continuous_batching_config=self.config_of(**settings)
                )
                found = _collected(manager, samples, max_new_tokens, self.ends)
        completions = [list(output.generated_tokens) for output in found]
        for completion, output in zip(completions, found, strict=True):
            if not 0 < len(completion) <= max_new_tokens or len(output.logprobs) != len(completion):
                raise EngineError(
                    f"{what}: it gave {len(completion)} tokens and {len(output.logprobs)} log-probs, needs as many of "
                    f"both and at most {max_new_tokens}"
                )
        return Rollout(
            completions,
            [completion[-1] in self.ends for completion in completions],
            [list(output.logprobs) for output in found] if temperature and top_p == 1 else None,
        )

    def sync(self, model: PreTrainedModel) -> None:
        """Nothing is kept of a call: the next one has the model's weights."""
        self.model = model

    def close(self) -> None:
        pass

    def _settings(self, longest: int, samples: int, seed: int) -> dict[str, Any]:
        """Of a ContinuousBatchingConfig, whose fields change between releases."""
        wanted: dict[str, Any] = {"return_logprobs": True, "seed": seed, "auto_switch_to_flash": False}
        if self.model.device.type == "cpu":
            each = math.ceil(longest / PAGE) + 1
            wanted |= {
                "page_size": PAGE,
                "num_blocks": max(each, min(each * samples, PAGES)),
                "max_batch_tokens": BATCH,
            }
            if "page_size" not in self.known:
                wanted["block_size"] = PAGE
        return {name: value for name, value in wanted.items() if name in self.known}


def _collected(manager: Any, samples: list[list[int]], max_new_tokens: int, ends: list[int]) -> list[Any]:
    """What the manager gives for each sample, in their order. All requests are there before its thread starts, so that
    a call repeats. Its thread has ended afterwards, also after an error and a stop."""
    found: dict[str, Any] = {}
    names = [str(i) for i in range(len(samples))]
    try:
        for name, sample in zip(names, samples, strict=True):
            manager.add_request(sample, request_id=name, max_new_tokens=max_new_tokens, eos_token_id=ends)
        manager.start()
        while len(found) < len(names):
            result = manager.get_result(timeout=LOOK_EVERY)
            if result is not None and result.error is not None:
                raise EngineError(str(result.error))
            if result is not None and result.is_finished():
                found[result.request_id] = result
            if result is None and not manager.is_running():
                raise EngineError("its thread ended before all completions were there")
    finally:
        for name in names:
            if name not in found:
                manager.cancel_request(name)
        hard = {"hard_stop": True} if "hard_stop" in inspect.signature(manager.stop).parameters else {}
        manager.stop(block=True, **hard)
    return [found[name] for name in names]


def _switch_attention(model: PreTrainedModel, has_switch: bool) -> None:
    """To a package of flash attention where one is installed: by itself it would also take one from the hub.

    Args:
        has_switch: of a release that leaves the attention alone when told to, and adds no "paged|" to its name.
    """
    from transformers.utils import is_flash_attn_2_available, is_flash_attn_3_available

    name = model.config._attn_implementation
    flash = model.device.type == "cuda" and model.dtype in (torch.float16, torch.bfloat16)
    if flash and getattr(model, "_supports_flash_attn", False) and not name.startswith("flash"):
        if is_flash_attn_3_available():
            name = "flash_attention_3"
        elif is_flash_attn_2_available():
            name = "flash_attention_2"
    if not has_switch:
        name = f"paged|{name}"
    if name != model.config._attn_implementation:
        model.set_attn_implementation(name)


@contextmanager
def _as_before(model: PreTrainedModel) -> Iterator[None]:
    """The attention and the modes of a model, which it changes, are put back."""
    attention, modes = model.config._attn_implementation, [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        if model.config._attn_implementation != attention:
            model.set_attn_implementation(attention)
        for module, training in modes:
            module.training = training


@contextmanager
def _collecting_little() -> Iterator[None]:
    """It has Python collect its garbage twice a call, which takes 0.3 s where transformers and torch are imported, and
    the demo's completions 0.1 s: objects of before are left out."""
    ours = gc.get_freeze_count() == 0  # else somebody has frozen some, who alone may take that back
    if ours:
        gc.freeze()
    try:
        yield
    finally:
        if ours:
            gc.unfreeze()


@contextmanager
def _silent() -> Iterator[None]:
    """It logs tracebacks of what it raises, and advice about attention."""
    logger = logging.getLogger("ContinuousBatchingLogger")
    level, verbosity = logger.level, transformers.logging.get_verbosity()
    logger.setLevel(logging.CRITICAL)
    transformers.logging.set_verbosity(transformers.logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)
        transformers.logging.set_verbosity(verbosity)
