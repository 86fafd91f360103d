"""What a step is measured on: frozen prompts, lengths, completions and rewards, and the same gradient in float64."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from .place import Kind

END = 0  # ends a completion, and pads, in the demo's tokenizer, which every provider has
MAX_NORM = 100.0  # at which every provider clips: none of these gradients is as long, so that a wrong length shows
GROUP = 8
LENGTHS = json.loads((Path(__file__).parent / "lengths.json").read_text())
EPSILON = 0.02  # of GR, and its gamma: the paper's ratio, with a step that changes these gradients by a hundredth
AT_ONCE = 4096  # tokens, in float64
LOGP = "log-probs"  # beside the gradients' names
CLIP = 0.2  # the default of all providers
Pass2 = Literal["none", "fresh", "pass1"]  # no GR; whose log-probs the ratios of its second pass are taken to
TURNS = 2  # two batches take turns, so that what is left of the step before is a wrong result
SMALL = {"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 4,
         "num_key_value_heads": 2}  # fmt: skip
TINY = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
        "num_key_value_heads": 1}  # fmt: skip
QWEN = {"hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24, "num_attention_heads": 14,
        "num_key_value_heads": 2}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """A step of `len(prompts)` groups. It is sent to the processes of the providers."""

    name: str
    prompts: tuple[int, ...]  # lengths
    completions: tuple[tuple[int, ...], ...]  # of each prompt's samples, at least 2
    model: dict[str, int]  # fields of Qwen2Config
    vocabulary: int
    micro_batch: int  # samples, in TRL and verl
    folder: str = ""  # where start/, reference/ and the results in float64 are
    beta: float = 0.0  # of a KL term to a reference

    @cached_property
    def lengths(self) -> list[int]:
        return [length for group in self.completions for length in group]

    @property
    def scored(self) -> int:
        return sum(self.lengths)

    @property
    def useful(self) -> int:
        """Tokens that the decoder needs when it computes sample after sample."""
        return sum(len(group) * prompt for prompt, group in zip(self.prompts, self.completions, strict=True)) + (
            self.scored - len(self.lengths)
        )

    @property
    def least(self) -> int:
        """Tokens that it needs when it computes each prompt once."""
        return sum(self.prompts) + self.scored - len(self.lengths)


def few(size: str) -> Case:
    """The case of equal lengths: 4 prompts of 32 to 44 tokens, 8 completions of 64, GPT-2's vocabulary."""
    prompts, length, vocabulary = ((32, 36, 40, 44), 64, 50_257) if size != "dry" else ((3, 5), 4, 60)
    model = SMALL if size != "dry" else TINY
    return Case("equal", prompts, ((length,) * GROUP,) * len(prompts), model, vocabulary, len(prompts) * GROUP)


def of_table(name: str, kind: Kind, size: str) -> Case:
    """The committed lengths of `name`: all on a GPU, under Qwen2.5-0.5B's shape. On a CPU the first groups, with all
    lengths divided by a common number, and a vocabulary in which the head is as large a part as it is in that model."""
    table = LENGTHS[name]
    if kind == "cuda" and size != "dry":
        divisor = 4 if name == "reasoning" else 1  # 16384 tokens a sample would be minutes in float64
        completions = [[max(2, n // divisor) for n in of] for of in table["completions"]]
        return _of_lengths(name, table["prompts"], completions, QWEN, 151_936)
    groups = {"cpu": 8, "quick": 4, "dry": 2}[size]
    prompts, completions = table["prompts"][:groups], table["completions"][:groups]
    per_sample = {"cpu": 64, "quick": 24, "dry": 8}[size]  # useful tokens, on average
    total = sum(GROUP * p + sum(of) for p, of in zip(prompts, completions, strict=True))
    divisor = total / (per_sample * GROUP * groups)
    prompts = [max(2, round(p / divisor)) for p in prompts]
    completions = [[max(2, round(n / divisor)) for n in of] for of in completions]
    return _of_lengths(name, prompts, completions, SMALL if size != "dry" else TINY, 4096 if size != "dry" else 60)


def _of_lengths(name: str, prompts: list[int], completions: list[list[int]], model: dict[str, int], v: int) -> Case:
    return Case(name, tuple(prompts), tuple(map(tuple, completions)), model, v, GROUP)


class Batch(NamedTuple):
    """Of one turn: token lists, one a prompt and one a sample, and a reward a sample."""

    prompts: list[list[int]]
    completions: list[list[int]]
    rewards: Tensor


def batches(case: Case) -> list[Batch]:
    found = []
    for turn in range(TURNS):
        draw = torch.Generator().manual_seed(1 + turn)

        def tokens(count: int, draw: torch.Generator = draw) -> list[int]:
            return torch.randint(END + 1, case.vocabulary, (count,), generator=draw).tolist()

        prompts = [tokens(length) for length in case.prompts]
        completions: list[list[int]] = []  # no two the same: by its tokens a completion's log-probs are found
        for length in case.lengths:
            while (completion := [*tokens(length - 1), END]) in completions:
                pass
            completions.append(completion)
        found.append(Batch(prompts, completions, torch.rand(len(case.lengths), generator=draw)))
    return found


def advantages(rewards: Tensor) -> Tensor:
    """(N,) in float64: GRPO's, with the deviation of a sample and TRL's 1e-4."""
    groups = rewards.double().view(-1, GROUP)
    return ((groups - groups.mean(1, keepdim=True)) / (groups.std(1, keepdim=True) + 1e-4)).flatten()


def new_model(case: Case, seed: int = 0) -> Any:
    """Random weights with a spread at which log-probs are of the size that a trained model's have."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(seed)
    config = Qwen2Config(
        **case.model, vocab_size=case.vocabulary, tie_word_embeddings=True, bos_token_id=None, pad_token_id=END,
        eos_token_id=END, initializer_range=0.02 * (896 / case.model["hidden_size"]) ** 0.5,
        max_position_embeddings=32_768,
    )  # fmt: skip
    return Qwen2ForCausalLM(config)


class Expected(NamedTuple):
    """Of one turn and kind of second pass: what the optimizer is to be given, and the first pass's log-probs (R,)."""

    gradient: dict[str, Tensor]
    logp: Tensor


def prepare(case: Case, device: torch.device, dtype: torch.dtype) -> None:
    """Writes the start, the reference and what is expected of each turn to the case's folder."""
    folder = Path(case.folder)
    model, reference = new_model(case).to(dtype), new_model(case, seed=1).to(dtype)
    _save(model, folder / "start")
    with torch.no_grad():  # near the start, as a reference is
        for p, start in zip(reference.parameters(), model.parameters(), strict=True):
            p.copy_(start + 0.3 * (p - start))
    _save(reference, folder / "reference")
    model, reference = model.double().to(device), reference.double().to(device)
    for turn, batch in enumerate(batches(case)):
        with torch.no_grad():
            ref_logp = [_logp(reference, *part) for part in _parts(case, batch)] if case.beta else None
        logp = _backward(model, case, batch, ref_logp)
        first = {name: p.grad.clone() for name, p in model.named_parameters()}
        for pass2 in get_args(Pass2):
            if pass2 != "none":
                for name, p in model.named_parameters():
                    p.grad.copy_(first[name])
                _second_pass(model, case, batch, ref_logp, logp if pass2 == "pass1" else None)
            gradient = {name: p.grad.float().cpu() for name, p in model.named_parameters()}
            norm = torch.nn.utils.get_total_norm(gradient.values()).item()
            if norm >= MAX_NORM:
                raise ValueError(f"case {case.name}: the gradient's norm is {norm:.2g}, must be below {MAX_NORM:g}")
            save_file(gradient | {LOGP: logp}, folder / f"expected-{turn}-{pass2}.safetensors")


def _save(model: Any, folder: Path) -> None:
    """As `save_pretrained` does, which shows a progress bar."""
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)
    save_file(dict(model.named_parameters()), folder / "model.safetensors", metadata={"format": "pt"})


def weights(case: Case) -> dict[str, Tensor]:
    """The start's, by name."""
    return load_file(Path(case.folder) / "start" / "model.safetensors")


def expected(case: Case, turn: int, pass2: Pass2 = "none") -> Expected:
    found = load_file(Path(case.folder) / f"expected-{turn % TURNS}-{pass2}.safetensors")
    return Expected(found, found.pop(LOGP))


def _parts(case: Case, batch: Batch) -> Iterator[tuple[list[int], list[list[int]]]]:
    """A prompt and some of its completions, in order: at most AT_ONCE padded tokens, or one completion."""
    for group, prompt in enumerate(batch.prompts):
        own = batch.completions[group * GROUP : (group + 1) * GROUP]
        many = max(1, AT_ONCE // (len(prompt) + max(map(len, own))))
        for start in range(0, GROUP, many):
            yield prompt, own[start : start + many]


def _logp(model: Any, prompt: list[int], completions: list[list[int]]) -> Tensor:
    """(R,), from logits; what is padded is on the right, where it changes nothing."""
    longest = max(map(len, completions))
    rows = [prompt + completion + [END] * (longest - len(completion)) for completion in completions]
    ids = torch.tensor(rows, device=model.device)
    logits = model(ids[:, :-1], use_cache=False, logits_to_keep=longest).logits
    logp = torch.log_softmax(logits, -1).gather(2, ids[:, -longest:, None])[..., 0]
    return torch.cat([row[: len(completion)] for row, completion in zip(logp, completions, strict=True)])


def _backward(
    model: Any, case: Case, batch: Batch, ref_logp: list[Tensor] | None, old_logp: Tensor | None = None
) -> Tensor:
    """The gradient of DAPO's loss, part by part; the log-probs (R,). Without old ones the ratio is 1."""
    model.zero_grad()
    found: list[Tensor] = []
    values, done, scored = advantages(batch.rewards).to(model.device), 0, 0
    for place, (prompt, completions) in enumerate(_parts(case, batch)):
        logp = _logp(model, prompt, completions)
        lengths = torch.tensor([len(completion) for completion in completions], device=model.device)
        old = logp.detach() if old_logp is None else old_logp[scored : scored + len(logp)].to(model.device)
        ratio, weight = (logp - old).exp(), values[done : done + len(lengths)].repeat_interleave(lengths)
        loss = -torch.minimum(weight * ratio, weight * ratio.clamp(1 - CLIP, 1 + CLIP))
        if ref_logp is not None:
            off = ref_logp[place] - logp
            loss = loss + case.beta * (off.exp() - off - 1)
        (loss.sum() / case.scored).backward()
        found.append(logp.detach().cpu())
        done, scored = done + len(lengths), scored + len(logp)
    return torch.cat(found)


@torch.no_grad()
def _second_pass(model: Any, case: Case, batch: Batch, ref_logp: list[Tensor] | None, old_logp: Tensor | None) -> None:
    """From g1 in .grad to the gradient at theta + epsilon g1, of the decoder layers' theta alone."""
    moved = [p for name, p in model.named_parameters() if ".layers." in name]
    start = [p.clone() for p in moved]
    for p in moved:
        p.add_(p.grad, alpha=EPSILON)
    with torch.enable_grad():
        _backward(model, case, batch, ref_logp, old_logp)
    for p, before in zip(moved, start, strict=True):
        p.copy_(before)
