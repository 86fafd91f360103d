"""The embedded demo: its problems, their split, rewards, tokenizer and warm start."""

import functools
import re

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from redit_fast.training import builtin
from redit_fast.training.rollout.local import generate


def chain(steps):
    """(start, changes), read back from the lines."""
    numbers = [re.fullmatch(r"(\d+)([+-]\d+)=(\d+)", line) for line in steps]
    assert all(int(n[1]) + int(n[2]) == int(n[3]) for n in numbers)
    assert [n[3] for n in numbers[:-1]] == [n[1] for n in numbers[1:]]
    return int(numbers[0][1]), tuple(int(n[2]) for n in numbers)


def words_chain(prompt):
    """(start, changes), read from the words alone."""
    start, *changes = [
        -int(n) if re.search(r"loses|sells|gives away|friend takes", sentence) else int(n)
        for sentence in prompt.split(".")
        for n in re.findall(r"\d+", sentence)
    ]
    return start, tuple(changes)


@pytest.mark.parametrize("held_out", [False, True])
def test_records_are_right_and_distinct(held_out):
    found = builtin.records(1500, held_out=held_out, seed=0)
    assert len({record["prompt"] for record in found}) == 1500
    for record in found:
        start, changes = chain(record["steps"])
        assert words_chain(record["prompt"]) == (start, changes)
        assert record["answer"] == record["steps"][-1].partition("=")[2]
        assert len(changes) == builtin.CHANGES
        assert builtin.is_held_out(start, changes) == held_out
    assert len({chain(record["steps"]) for record in found}) > 1450
    assert {int(record["answer"]) for record in found} == set(range(builtin.LARGEST_TOTAL + 1))
    assert found == builtin.records(1500, held_out=held_out, seed=0)
    assert found != builtin.records(1500, held_out=held_out, seed=1)
    assert builtin.records(0, held_out=held_out, seed=0) == []


def test_held_out_problems_share_no_solution_with_any_training_text():
    held_out = {chain(record["steps"]) for seed in (0, 1) for record in builtin.records(2000, held_out=True, seed=seed)}
    trained = {chain(record["steps"]) for record in builtin.records(20000, held_out=False, seed=0)}
    shown = {words_chain(prompt) for prompt, _ in builtin.demonstrations(20000, short=0.5, seed=0)}
    assert min(map(len, (held_out, trained, shown))) > 3000
    assert not held_out & (trained | shown)


def test_the_space_of_solutions_is_as_large_as_the_docstring_says():
    @functools.cache
    def ways(total, changes):
        if changes == 0:
            return 1
        after = (total + c for c in range(-builtin.LARGEST_CHANGE, builtin.LARGEST_CHANGE + 1) if c)
        return sum(ways(t, changes - 1) for t in after if 0 <= t <= builtin.LARGEST_TOTAL)

    count = sum(ways(total, builtin.CHANGES) for total in range(builtin.LARGEST_TOTAL + 1))
    assert f"{count:,}" in builtin.__doc__
    sample = [
        builtin.is_held_out(a, (b, c, d, 1)) for a in range(21) for b in range(9) for c in range(9) for d in (2, 5)
    ]
    assert 0.08 < sum(sample) / len(sample) < 0.12


def test_demonstrations_have_full_reward_except_where_they_are_short():
    record_of = {record["prompt"]: record for record in builtin.records(10, held_out=False, seed=0)}
    assert record_of
    for short, expected in ((0.0, 1.0), (1.0, 0.0)):
        pairs = builtin.demonstrations(300, short=short, seed=1)
        prompts, completions = map(list, zip(*pairs, strict=True))
        start_changes = [words_chain(prompt) for prompt in prompts]
        answer = [str(start + sum(changes)) for start, changes in start_changes]
        steps = []
        for start, changes in start_changes:
            totals = [start + sum(changes[:i]) for i in range(len(changes) + 1)]
            steps.append([f"{a}{c:+d}={a + c}" for a, c in zip(totals, changes, strict=False)])
        assert builtin.correct_answer(prompts, completions, answer=answer, steps=steps) == [1.0] * 300
        assert builtin.right_steps(prompts, completions, answer=answer, steps=steps) == [0.5 * expected] * 300
        bare = sum(not completion.startswith("<think>") for completion in completions)
        assert sum(builtin.answer_format(prompts, completions)) == 0.25 * (300 - bare)
        assert (10 < bare < 60) if short else bare == 0


def test_rewards():
    steps = ["5+3=8", "8-2=6", "6+6=12", "12-1=11"]
    work = ";".join(steps)
    cases = [  # completion, correct, lines, format
        (f"<think>{work}</think><answer>11</answer>", 1.0, 0.5, 0.25),
        (f"<think>{work}</think><answer>12</answer>", 0.0, 0.5, 0.25),
        ("<think></think><answer>11</answer>", 1.0, 0.0, 0.25),
        ("<answer>11</answer>", 1.0, 0.0, 0.0),
        ("11", 0.0, 0.0, 0.0),
        ("", 0.0, 0.0, 0.0),
        ("<answer>011</answer>", 0.0, 0.0, 0.0),
        ("<think>5+3=8;8-2=6;6+6=13;13-1=12</think><answer>12</answer>", 0.0, 0.25, 0.25),
        ("<think>5+3=8;8-2=6</think><answer>11</answer>", 1.0, 0.25, 0.25),
        ("<think>8-2=6;5+3=8</think><answer>6</answer>", 0.0, 0.0, 0.25),  # right lines out of place
        (f"<think>{work};{work}</think><answer>11</answer>", 1.0, 0.25, 0.25),  # padding does not pay
        (f"{work}<answer>11</answer>", 1.0, 0.0, 0.0),
        (f"<think>{work}<answer>11</answer>", 1.0, 0.375, 0.0),  # never closed: the last line is not a line
        (f"<think>{work}</think><answer>11</answer>!", 1.0, 0.5, 0.0),
        ("<think><think></think></think><answer>11</answer>", 1.0, 0.0, 0.0),
    ]
    completions = [case[0] for case in cases]
    columns = {"answer": ["11"] * len(cases), "steps": [steps] * len(cases)}
    functions = (builtin.correct_answer, builtin.right_steps, builtin.answer_format)
    for place, function in enumerate(functions, start=1):
        scores = function([""] * len(cases), completions, **columns)
        assert dict(zip(completions, scores, strict=True)) == {case[0]: case[place] for case in cases}


def test_the_saved_tokenizer_reads_back_to_the_same_ids(tmp_path):
    model, tokenizer = builtin.build(0)
    tokenizer.save_pretrained(tmp_path)
    model.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    pairs = builtin.demonstrations(300, short=0.5, seed=3)
    texts = [text for pair in pairs for text in (*pair, pair[1] + tokenizer.eos_token)]
    texts += ["An unseen word: Zürich, 1+1=2\n", " <think> 12;</answer> <think"]
    ids = tokenizer(texts)["input_ids"]
    assert loaded(texts)["input_ids"] == ids
    assert loaded.eos_token_id == tokenizer.eos_token_id and len(loaded) == len(tokenizer)
    assert loaded.batch_decode(ids, skip_special_tokens=True) == tokenizer.batch_decode(ids, skip_special_tokens=True)
    assert tokenizer.batch_decode(ids) == texts
    # Every tag is one token, every digit too; and the tags survive skip_special_tokens, which the rewards rely on.
    assert len(tokenizer("<think>12</think><answer>12</answer>")["input_ids"]) == 8
    assert tokenizer.decode(ids[1], skip_special_tokens=True) == pairs[0][1]

    restored = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(restored) is type(model)
    assert all(torch.equal(a, b) for a, b in zip(restored.parameters(), model.parameters(), strict=True))


def test_build_is_deterministic_and_leaves_the_random_state():
    before = torch.get_rng_state()
    model, tokenizer = builtin.build(4)
    assert torch.equal(torch.get_rng_state(), before)
    torch.randn(3)
    again, tokenizer_again = builtin.build(4)
    other, _ = builtin.build(5)
    assert tokenizer.get_vocab() == tokenizer_again.get_vocab()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    assert not torch.equal(model.lm_head.weight, other.lm_head.weight)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(240_000, rel=0.05)  # as documented


def test_prompt_and_completion_fit_the_context():
    model, tokenizer = builtin.build(0)
    pairs = builtin.demonstrations(2000, short=0.0, seed=0)
    completions = [len(ids) + 1 for ids in tokenizer([completion for _, completion in pairs])["input_ids"]]
    prompts = [len(ids) for ids in tokenizer([prompt for prompt, _ in pairs])["input_ids"]]
    assert max(completions) <= 48  # the demo's max_completion_length
    assert max(prompts) + 48 <= model.config.max_position_embeddings


def test_warm_start_learns_the_format_and_repeats_bit_for_bit():
    def run():
        model, tokenizer = builtin.build(0)
        model.eval()
        losses = []
        builtin.warm_start(model, tokenizer, steps=16, seed=0, progress=lambda step, loss: losses.append((step, loss)))
        assert not model.training
        return model, tokenizer, losses

    model, tokenizer, losses = run()
    again, _, losses_again = run()
    assert losses == losses_again and [step for step, _ in losses] == list(range(16))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    assert losses[0][1] > 5 and losses[-1][1] < 4  # ln(413) = 6.0 at the start

    # The loss is on completions only: a prompt's own words are not learnt, so a model of 16 steps starts with a tag.
    record = builtin.records(1, held_out=True, seed=0)[0]
    rollout = generate(
        model, tokenizer.eos_token_id, [tokenizer(record["prompt"])["input_ids"]], max_new_tokens=1, temperature=0
    )
    assert tokenizer.decode(rollout.completions[0]) in builtin.TAGS


def test_no_problems_are_no_problem():
    assert builtin.records(0, held_out=True, seed=0) == []
