"""The embedded demo: word problems with four changes, a small Qwen2 model and tokenizer made here, a warm start.

    Mia has 14 cards. She buys 5 more. She loses 8. A friend gives Mia 9. She sells 2. How many cards are left?
    <think>14+5=19;19-8=11;11+9=20;20-2=18</think><answer>18</answer>

What RL shows here is *elicitation*. The warm start demonstrates worked solutions first and then mostly answers without
steps, so that the model can work but seldom does: asked greedily it answers at once, and wrongly. RL, paid for right
answers, right lines and the format, makes it write the steps. It learns no arithmetic that the warm start did not show.

A problem's solution is its chain of start and changes, one of 849,330. A tenth of the chains, chosen by a hash, is held
out: no demonstration and no training problem has one of those, in whatever words.
"""

from __future__ import annotations

import itertools
import random
import re
import zlib
from collections.abc import Callable, Iterator

import torch
from torch.nn import functional as F
from transformers import PreTrainedTokenizerBase as Tokenizer
from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen2Tokenizer

from redit_fast.training.rewards.functions import full_scale

CHANGES = 4
LARGEST_CHANGE = 9
LARGEST_TOTAL = 20
NAMES = [
    ("Ada", "She"), ("Ben", "He"), ("Cleo", "She"), ("Dan", "He"), ("Eva", "She"), ("Finn", "He"),
    ("Gus", "He"), ("Hana", "She"), ("Ivo", "He"), ("Mia", "She"), ("Noor", "She"), ("Tom", "He"),
]  # fmt: skip
THINGS = ["cards", "coins", "shells", "stamps", "marbles", "pears", "beads", "books", "stones", "eggs"]
STARTS = ["{name} has {n} {things}.", "There are {n} {things} in {name}'s box.", "{name} starts with {n} {things}."]
GAINS = ["{who} buys {n} more.", "{who} finds {n}.", "{who} wins {n}.", "A friend gives {name} {n}."]
LOSSES = ["{who} loses {n}.", "{who} sells {n}.", "{who} gives away {n}.", "A friend takes {n}."]
QUESTIONS = ["How many {things} does {name} have now?", "How many {things} are left?"]
TAGS = ["<think>", "</think>", "<answer>", "</answer>"]

WORKED = 2 / 3  # of the warm start shows worked solutions only; mixed from the start, they take twice as long to learn
SHORT = 0.70  # of the demonstrations after that answer without steps,
BARE = 0.10  # and of those some leave out <think></think> too, so that the format reward has something to teach
WARM_BATCH, WARM_LEARNING_RATE = 64, 3e-3

ANSWER = re.compile(r"<answer>(\d+)</answer>")
FORMAT = re.compile(r"<think>[^<]*</think><answer>\d+</answer>")


def records(count: int, *, held_out: bool, seed: int) -> list[dict]:
    """`count` problems with distinct prompts: {"prompt": text, "answer": "18", "steps": ["14+5=19", ...]}."""
    problems = _problems(random.Random(f"{seed} {held_out}"), held_out)
    found: dict[str, dict] = {}
    while len(found) < count:
        record = next(problems)
        found.setdefault(record["prompt"], record)
    return list(found.values())


def demonstrations(count: int, *, short: float, seed: int) -> list[tuple[str, str]]:
    """`count` (prompt, completion) pairs from training chains; a share of `short` of them answers without steps."""
    rng = random.Random(f"{seed} demonstrations {short}")
    pairs = []
    for record in itertools.islice(_problems(rng, held_out=False), count):
        style, answer = rng.random(), f"<answer>{record['answer']}</answer>"
        steps = "" if style < short else ";".join(record["steps"])
        pairs.append((record["prompt"], answer if style < short * BARE else f"<think>{steps}</think>{answer}"))
    return pairs


def is_held_out(start: int, changes: tuple[int, ...]) -> bool:
    return zlib.crc32(repr((start, *changes)).encode()) % 10 == 0


def _problems(rng: random.Random, held_out: bool) -> Iterator[dict]:
    while True:
        totals = [rng.randint(0, LARGEST_TOTAL)]
        changes: list[int] = []
        while len(changes) < CHANGES:
            change = rng.choice([-1, 1]) * rng.randint(1, LARGEST_CHANGE)
            if 0 <= totals[-1] + change <= LARGEST_TOTAL:
                changes.append(change)
                totals.append(totals[-1] + change)
        if is_held_out(totals[0], tuple(changes)) != held_out:
            continue
        name, who = rng.choice(NAMES)
        words = {"name": name, "things": rng.choice(THINGS)}
        parts = [rng.choice(STARTS).format(n=totals[0], **words)]
        for change in changes:
            sentence = rng.choice(GAINS if change > 0 else LOSSES)
            parts.append(sentence.format(n=abs(change), who=who, **words))
        parts.append(rng.choice(QUESTIONS).format(**words))
        steps = [f"{a}{change:+d}={b}" for a, change, b in zip(totals, changes, totals[1:], strict=False)]
        yield {"prompt": " ".join(parts) + "\n", "answer": str(totals[-1]), "steps": steps}


def correct_answer(prompts, completions, *, answer, **columns) -> list[float]:
    """1.0 where the number between the answer tags is right."""
    found = [ANSWER.search(text) for text in completions]
    return [1.0 if match and match[1] == right else 0.0 for match, right in zip(found, answer, strict=True)]


@full_scale(0.5)
def right_steps(prompts, completions, *, steps, **columns) -> list[float]:
    """0.5 times the share of lines that are right and in their place; lines too many count as wrong."""
    scores = []
    for text, right in zip(completions, steps, strict=True):
        lines = text.partition("<think>")[2].partition("</think>")[0].split(";")
        hits = sum(a == b for a, b in zip(lines, right, strict=False))
        scores.append(0.5 * hits / max(len(lines), len(right)))
    return scores


@full_scale(0.25)
def answer_format(prompts, completions, **columns) -> list[float]:
    """0.25 where the completion is <think>...</think> followed by <answer>N</answer> and nothing else."""
    return [0.25 if FORMAT.fullmatch(text) else 0.0 for text in completions]


def build(seed: int) -> tuple[Qwen2ForCausalLM, Tokenizer]:
    """A Qwen2 model of 0.24 M float32 parameters, initialised by `seed`, and its byte-level BPE tokenizer.

    The tokenizer is the same for every seed. Nothing is downloaded, and the caller's random state stays as it was.
    """
    texts = [record["prompt"] for record in records(2000, held_out=False, seed=0)]
    tokenizer = Qwen2Tokenizer().train_new_from_iterator(texts, vocab_size=512, show_progress=False)
    tokenizer.add_tokens(TAGS)
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=96,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        initializer_range=0.04,  # the usual 0.02 is for wide models: at width 96 it delays learning by 200 steps
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Qwen2ForCausalLM(config), tokenizer


def warm_start(
    model: Qwen2ForCausalLM,
    tokenizer: Tokenizer,
    *,
    steps: int,
    seed: int,
    progress: Callable[[int, float], None] | None = None,
) -> None:
    """`steps` AdamW steps, in place, of next-token cross-entropy on the completions of fresh demonstrations.

    The learning rate rises over 20 steps and falls linearly to 0. `progress(step, loss)` is called after every step.
    """
    worked = int(steps * WORKED) * WARM_BATCH
    pairs = demonstrations(worked, short=0.0, seed=seed)
    pairs += demonstrations(steps * WARM_BATCH - worked, short=SHORT, seed=seed)
    prompts = tokenizer([prompt for prompt, _ in pairs])["input_ids"]
    completions = tokenizer([completion + tokenizer.eos_token for _, completion in pairs])["input_ids"]
    rows = [(prompt + completion, len(prompt)) for prompt, completion in zip(prompts, completions, strict=True)]

    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.0)
    was_training = model.training
    model.train()
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = WARM_LEARNING_RATE * min((step + 1) / 20, 1 - step / steps)
        batch = sorted(rows[step * WARM_BATCH : (step + 1) * WARM_BATCH], key=lambda row: len(row[0]))
        tokens = sum(len(ids) - start for ids, start in batch)
        total = 0.0
        for half in batch[: WARM_BATCH // 2], batch[WARM_BATCH // 2 :]:  # like lengths together: a quarter less time
            loss = completion_loss(model, half) / tokens
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if progress is not None:
            progress(step, total)
    model.train(was_training)


def completion_loss(model: Qwen2ForCausalLM, rows: list[tuple[list[int], int]]) -> torch.Tensor:
    """Summed cross-entropy of ids[start:] over the rows (ids, start)."""
    # The padding is on the right, behind all that is scored: causal attention never sees it, and no mask is needed.
    ids = torch.zeros(len(rows), max(len(row) for row, _ in rows), dtype=torch.int64, device="cpu")
    scored = torch.zeros_like(ids, dtype=torch.bool)
    for i, (row, start) in enumerate(rows):
        ids[i, : len(row)] = torch.tensor(row, device="cpu")
        scored[i, start : len(row)] = True
    ids, scored = ids.to(model.device), scored.to(model.device)
    hidden = model.model(ids[:, :-1], use_cache=False).last_hidden_state[scored[:, 1:]]
    return F.cross_entropy(model.lm_head(hidden), ids[scored], reduction="sum")
