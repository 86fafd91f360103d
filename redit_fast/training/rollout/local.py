"""Completions from any Hugging Face causal LM: one prefill per prompt, its cache repeated for the group, rows that have
ended dropped every eight tokens. On the demo's model and completions that takes a half to a quarter of the CPU time of
`model.generate`.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from contextlib import nullcontext
from numbers import Integral
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from redit_fast.checks import check_dense, check_module, check_seed, check_step, described, real_number, whole_number
from redit_fast.noise import STREAM_SAMPLING, counter_uniform
from redit_fast.packing.attention import DECODING, attending
from redit_fast.training.rollout import Rollout
from redit_fast.training.rollout.head import in_blocks

CHECK_EVERY = 8  # tokens between two looks at which rows have ended, for each of which the host waits for the device
BLOCK = 256  # tokens whose probabilities have a common sum


class LocalEngine:
    """`generate` of the model that is trained: what it is synchronised with is what it samples."""

    def __init__(self, model: nn.Module, ends: Sequence[int]) -> None:
        self.model, self.ends = model, ends

    def generate(self, prompts: Sequence[Sequence[int]], **sampling: Any) -> Rollout:
        return generate(self.model, self.ends, prompts, **sampling)

    def sync(self, model: nn.Module) -> None:
        self.model = model

    def close(self) -> None:
        pass


@torch.no_grad()
def generate(
    model: nn.Module,
    eos_token_ids: int | Sequence[int],
    prompts: Sequence[Sequence[int]],
    *,
    group_size: int = 1,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_p: float = 1.0,
    seed: int = 0,
    step: int = 0,
    sample_ids: Tensor | None = None,
) -> Rollout:
    """Sample `group_size` completions for each prompt.

    Token t of sample i inverts the float64 cumulative sum of softmax(logits / temperature), which is float32, at the
    counter-based uniform u(seed, step, sample_ids[i], t): the random numbers do not depend on what else is in the
    batch. u has 24 bits, so a token's share is off by at most 2**-24.

    Args:
        model: a causal LM whose `forward` takes attention_mask, position_ids, logits_to_keep and cache, or
            past_key_values as that was called before transformers 5.24. It is put into evaluation mode for the call and
            back.
        eos_token_ids: the end tokens; without any every completion has max_new_tokens.
        prompts: P non-empty token lists, of any lengths.
        temperature: divides the logits; 0 takes the most likely token.
        top_p: only the most likely tokens are drawn, the fewest whose probabilities reach it; 1 draws all. `logp` is of
            all tokens in either case.
        sample_ids: (P * group_size,) int64 in [0, 2**32), default arange; ranks that share a seed need distinct ones.

    Raises:
        ValueError, TypeError: an argument that does not fit, naming it.
        FloatingPointError: the model returned NaN or infinite logits.
        NotImplementedError: it returned no cache, as RWKV does.
    """
    check_module("model", model)
    group_size = whole_number("group_size", group_size, 1)
    max_new_tokens = whole_number("max_new_tokens", max_new_tokens, 1)
    temperature = real_number("temperature", temperature, least=0)
    top_p = real_number("top_p", top_p, above=0, most=1)
    seed, step = check_seed(seed), check_step(step)
    end_tokens = _tokens("eos_token_ids", [eos_token_ids] if isinstance(eos_token_ids, Integral) else eos_token_ids)
    ids = _checked_ids(prompts, group_size, sample_ids)
    device = cast(Any, model).get_input_embeddings().weight.device
    ends = torch.tensor(end_tokens, dtype=torch.int64, device=device)
    # All random numbers of the call at once: one per token costs as much as a small model's forward pass.
    u = counter_uniform(
        seed, ids[:, None] + (torch.arange(max_new_tokens, device="cpu") << 32), STREAM_SAMPLING, step
    ).to(device)
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        masks = attending(model, DECODING) if _makes_masks(model, prompts) else nullcontext()
        with masks, in_blocks(model, len(u), max_new_tokens):
            tokens, logp, length = _decode(model, ends, prompts, group_size, temperature, top_p, u)
    finally:
        for module, training in modes:
            module.training = training
    lengths = length.tolist()
    completions, logps = ([row[:n] for row, n in zip(x.tolist(), lengths, strict=True)] for x in (tokens, logp))
    last = tokens.gather(1, (length - 1)[:, None])
    return Rollout(completions, torch.isin(last[:, 0], ends).tolist(), logps if temperature else None)


def _makes_masks(model: nn.Module, prompts: Sequence[Sequence[int]]) -> bool:
    """Whether transformers would look at the mask of prompts of several lengths before every token, to leave it away
    where it hides nothing."""
    padded = len({len(prompt) for prompt in prompts}) > 1
    return padded and isinstance(model, PreTrainedModel) and model.config._attn_implementation == "sdpa"


def _decode(
    model, ends: Tensor, prompts, group_size: int, temperature: float, top_p: float, u: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens and their log-probs (N, max_new_tokens), for random numbers u of that shape, and how many of each row are
    valid (N,)."""
    device, (samples, max_new_tokens) = u.device, u.shape
    input_ids, mask = _left_pad(prompts, device)
    # Padded positions repeat position 0: they are masked, and no position is negative.
    position = (mask.cumsum(1) - 1).clamp(min=0)
    padded = len({len(prompt) for prompt in prompts}) > 1  # a mask that hides nothing is asked whether it does
    seen = mask if padded else None
    out = model(input_ids, attention_mask=seen, position_ids=position, use_cache=True, logits_to_keep=1)
    cached = "cache" if "cache" in out.keys() else "past_key_values"
    cache, logits = out.get(cached), out.logits[:, -1].repeat_interleave(group_size, 0)
    if "past_key_values" in inspect.signature(model.forward).parameters:  # a model of the user's may keep the old name
        cached = "past_key_values"
    if cache is None:
        raise NotImplementedError(f"{type(model).__name__} returns no cache, which rollouts continue from")
    # Rows are moved by `reorder_cache`, beam search's: the batch_ methods leave out recurrent states.
    cache.reorder_cache(torch.arange(len(prompts), device=device).repeat_interleave(group_size))
    # Mamba has no attention to hide the padding from behind the prompt, and takes its mask for more tokens.
    hides = padded and not all(getattr(cache, "is_linear", [False]))
    mask = mask.repeat_interleave(group_size, 0)
    position = mask.sum(1, keepdim=True)

    tokens = torch.zeros(samples, max_new_tokens, dtype=torch.int64, device=device)
    logp = torch.zeros(samples, max_new_tokens, dtype=torch.float32, device=device)
    length = torch.full((samples,), max_new_tokens, dtype=torch.int64, device=device)
    rows = torch.arange(samples, device=device)  # the samples still in the batch
    going, finite = torch.ones(2, samples, dtype=torch.bool, device=device)  # of them
    for t in range(1, max_new_tokens + 1):
        chosen, logp[rows, t - 1] = _choose(logits, temperature, top_p, u[rows, t - 1])
        finite = finite & (logits.amax(-1).isfinite() | ~going)
        tokens[rows, t - 1] = chosen
        ended = going & torch.isin(chosen, ends)
        length[rows] = torch.where(ended, t, length[rows])
        going = going & ~ended
        if t == max_new_tokens or t % CHECK_EVERY == 0:
            left, right = torch.stack([going, finite]).tolist()  # here the host waits for the device
            if not all(right):
                raise FloatingPointError(
                    "the model returned NaN or infinite logits; a learning rate too high is the usual cause"
                )
            if t == max_new_tokens or not any(left):
                break
            if not all(left):
                kept = torch.tensor([row for row, goes in enumerate(left) if goes], device="cpu").to(device)
                cache.reorder_cache(kept)
                rows, mask, position, chosen = rows[kept], mask[kept], position[kept], chosen[kept]
                going, finite = going[kept], finite[kept]
        mask = torch.cat([mask, mask.new_ones(len(rows), 1)], 1)
        seen = mask if hides else None
        out = model(chosen[:, None], attention_mask=seen, position_ids=position, use_cache=True, **{cached: cache})
        logits, position = out.logits[:, -1], position + 1
    return tokens, logp, length


def _choose(logits: Tensor, temperature: float, top_p: float, u: Tensor) -> tuple[Tensor, Tensor]:
    """(rows,) int64: the arg-max at temperature 0, else the first token whose cumulative probability exceeds u. And
    (rows,) float32: its log-prob among all tokens, at temperature 0 nothing of use.

    In two levels: float64 sums of blocks of float32 probabilities, then float64 sums inside the block that u falls in.
    In float64 all through, at a vocabulary of 50257, this is a quarter of a small model's rollout. Any token where
    logits are not finite.
    """
    if temperature == 0:
        return logits.argmax(-1), logits.new_zeros(len(logits), dtype=torch.float32)
    logits = logits.float() if temperature == 1 else logits.float() / temperature
    probabilities = of_all = torch.softmax(logits, -1)
    if top_p < 1:
        falling, order = probabilities.sort(descending=True, stable=True)
        reached = falling.cumsum(-1) - falling >= top_p  # by more likely ones
        probabilities = probabilities.masked_fill(torch.empty_like(reached).scatter_(1, order, reached), 0.0)
    whole = probabilities.shape[1] // BLOCK * BLOCK
    blocks = [probabilities[:, :whole].unflatten(1, (-1, BLOCK)).sum(-1, dtype=torch.float64)] if whole else []
    if whole < probabilities.shape[1]:
        blocks.append(probabilities[:, whole:].sum(-1, dtype=torch.float64, keepdim=True))
    ends = torch.cat(blocks, 1).cumsum(-1)
    at = u[:, None] * ends[:, -1:]  # the last sum is 1 up to rounding, or less under top_p
    block = torch.searchsorted(ends, at, right=True).clamp(max=ends.shape[1] - 1)
    start = torch.where(block > 0, ends.gather(1, (block - 1).clamp(min=0)), 0.0)
    place = block * BLOCK + torch.arange(BLOCK, device=u.device)
    there = place < probabilities.shape[1]
    inside = torch.where(there, probabilities.gather(1, place.clamp(max=probabilities.shape[1] - 1)), 0.0)
    inside = inside.cumsum(-1, dtype=torch.float64)
    # Rounding may put it at the block's own sum, beyond all of its tokens.
    at = torch.minimum(at - start, torch.nextafter(inside[:, -1:], torch.zeros_like(at)))
    token = block * BLOCK + torch.searchsorted(inside, at, right=True)
    token = token.clamp(max=probabilities.shape[1] - 1)
    return token[:, 0], of_all.gather(1, token)[:, 0].log()


def _left_pad(prompts: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """input_ids and attention mask, (P, longest); the pad is token 0, which the mask hides."""
    longest = max(map(len, prompts))
    input_ids = torch.tensor([[0] * (longest - len(p)) + list(p) for p in prompts], device=device)
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=device)
    return input_ids, mask


def _tokens(name: str, tokens: object) -> list[int]:
    if isinstance(tokens, str | bytes) or not isinstance(tokens, Sequence):
        raise TypeError(f"{name} must be a list of tokens, got {described(tokens)}")
    return [whole_number(f"{name}[{i}]", token) for i, token in enumerate(tokens)]


def _checked_ids(prompts: object, group_size: int, sample_ids: object) -> Tensor:
    if isinstance(prompts, str | bytes) or not isinstance(prompts, Sequence):
        raise TypeError(f"prompts must be token lists, got {described(prompts)}")
    if not len(prompts):
        raise ValueError("prompts must be non-empty token lists, got none")
    for i, prompt in enumerate(prompts):
        if not len(_tokens(f"prompts[{i}]", prompt)):
            raise ValueError(f"prompts must be non-empty token lists: prompt {i} has no tokens")
    samples = len(prompts) * group_size
    if sample_ids is None:
        return torch.arange(samples, device="cpu")
    if not isinstance(sample_ids, Tensor) or sample_ids.device.type == "meta":
        raise TypeError(f"sample_ids must be an int64 tensor, got {described(sample_ids)}")
    check_dense("sample_ids", sample_ids)
    ids = sample_ids.cpu()
    if ids.shape != (samples,) or ids.dtype != torch.int64 or ids.min() < 0 or ids.max() >= 2**32:
        raise ValueError(f"sample_ids must be {samples} int64 numbers in [0, 2**32), got {described(sample_ids)}")
    return ids
