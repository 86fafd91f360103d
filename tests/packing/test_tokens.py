"""Counted: tokens on four tables of lengths, and what a hook on the decoder sees of a run."""

import json

import pytest
import torch
from transformers import Qwen2Model

from redit_fast.packing.plan import Budget, packed, padded, useful_tokens
from redit_fast.training import config_file
from redit_fast.training.batch import Batch
from redit_fast.training.trainer import train
from tests import ROOT
from tests.training.jobs import lines_of

TABLES = json.loads((ROOT / "benchmarks" / "lengths.json").read_text())
# Of the useful tokens: packed with prompts of their own, and one padded batch, which the trainer computed before.
RATIOS = {"gsm8k": (0.607, 1.597), "math": (0.863, 3.007), "reasoning": (0.963, 3.464), "few_shot": (0.225, 1.105)}


def step_of(table, shared):
    """Prompts and lengths, one a sample. Tokens are numbers that prompts share in the first `shared` places only."""
    prompts = [
        [(0 if place < shared else number + 1) for place in range(length)]
        for number, length in enumerate(table["prompts"])
    ]
    pairs = [(prompt, n) for prompt, of in zip(prompts, table["completions"], strict=True) for n in of]
    return [prompt for prompt, _ in pairs], [n for _, n in pairs]


@pytest.mark.parametrize("name", TABLES)
@pytest.mark.parametrize("tokens", [10**9, 65536, 16384])
def test_packed_rows_compute_the_formula_exactly(name, tokens):
    """Every prompt once a micro-batch and every completion once; a shared beginning once a micro-batch."""
    table = TABLES[name]
    for shared in (0, table["shared_prompt"]):
        prompts, lengths = step_of(table, shared)
        (micros,) = packed(prompts, lengths, Budget(tokens=tokens))
        expected = sum(lengths) - len(lengths)
        for micro in micros:
            there = {tuple(prompts[i]) for i in micro.samples}
            expected += shared + sum(len(prompt) - shared for prompt in there)
            assert micro.tokens <= tokens or len(micro.samples) == 1
        computed = sum(micro.tokens for micro in micros)
        assert computed == expected
        if tokens == 10**9:
            own = sum(lengths) - len(lengths) + sum(table["prompts"])
            assert computed == own - (len(table["prompts"]) - 1) * shared
        if not shared:
            without, useful = computed, useful_tokens(prompts, lengths)
    assert computed < without
    assert without / useful == pytest.approx(RATIOS[name][0], abs=5e-4 if tokens == 10**9 else 0.02)


@pytest.mark.parametrize("name", TABLES)
def test_padded_rows_waste_a_twentieth_where_one_batch_wasted_up_to_three_times_as_much(name):
    prompts, lengths = step_of(TABLES[name], 0)
    useful = useful_tokens(prompts, lengths)
    for tokens in (8192, 16384, 65536):
        assert sum(micro.tokens for micro in padded(prompts, lengths, Budget(tokens=tokens))[0]) <= 1.06 * useful
    ((whole,),) = padded(prompts, lengths, Budget())
    assert whole.tokens / useful == pytest.approx(RATIOS[name][1], abs=5e-4)


@pytest.mark.parametrize("ranks", [2, 3, 4, 8])
@pytest.mark.parametrize("name", TABLES)
def test_ranks_have_like_loads_where_they_would_wait_for_the_longest(name, ranks):
    """Whole groups, the longest first: the most over the mean."""
    prompts, lengths = step_of(TABLES[name], TABLES[name]["shared_prompt"])
    hands = packed(prompts, lengths, Budget(tokens=16384), ranks=ranks)
    loads = [sum(micro.tokens for micro in micros) for micros in hands]
    assert max(loads) <= 1.10 * sum(loads) / ranks


def test_a_hook_on_the_decoder_counts_what_the_metrics_tell(settings, tmp_path, monkeypatch):
    counts, forward, backward = [], Qwen2Model.forward, Batch.backward

    def counted(self, input_ids=None, **options):
        if "segments" in options:
            counts[-1].append(input_ids.numel())
        return forward(self, input_ids, **options)

    def separated(*args, **options):
        counts.append([])
        return backward(*args, **options)

    monkeypatch.setattr(Qwen2Model, "forward", counted)
    monkeypatch.setattr(Batch, "backward", separated)
    train(config_file.load(overrides={**settings, "tokens_per_micro_batch": 200, "steps": 2}))
    lines = lines_of(tmp_path / "run" / "metrics.jsonl")[1:]
    _, *passes = [sum(of) for of in counts if of]  # the trial's
    assert [line["tokens/computed"] for line in lines] == passes[::2] == passes[1::2]  # every pass has all samples
    assert max(map(len, counts)) > 1
    for line in lines:
        assert line["tokens/generated"] < line["tokens/computed"] < 0.6 * line["tokens/useful"]


def test_pass_2_with_half_of_the_samples_silent_computes_half():
    from tests.packing.models import batch_of, model_of

    model, batch = model_of("qwen2"), batch_of(samples=[0, 1, 2, 9, 10, 11])
    batch.advantages = torch.tensor([1.0, -1.0, 0.5, 0.0, 0.0, 0.0])
    first = batch.backward(model)
    second = batch.backward(model, masks_of=first)
    own = sum(batch.lengths[:3]) - 3
    assert second.tokens == len(batch.prompts[0]) + own
    assert first.tokens == second.tokens + len(batch.prompts[3]) + sum(batch.lengths[3:]) - 3
