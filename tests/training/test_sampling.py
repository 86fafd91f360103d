"""Dynamic sampling: which prompts come in place of which, what counts on, and a run that goes on bit by bit."""

import json

import pytest
import torch

from redit_fast.training import checkpoint, config_file, data, policy, report
from redit_fast.training.rollout.local import generate
from redit_fast.training.trainer import train
from tests.training.jobs import lines_of
from tests.training.test_stops import assert_equal_checkpoints, timeless

GROUP, PROMPTS = 4, 3


def is_dead(prompt):
    return len(prompt) % 3 > 0


@pytest.fixture
def job(settings, tmp_path, monkeypatch):
    """Two prompts in three give every completion the same; one of the two rewards has a weight of 0."""
    (tmp_path / "some.py").write_text(
        "def judge(prompts, completions, **columns):\n"
        f"    return [0.5 if len(p) % 3 else float(i % {GROUP}) for i, p in enumerate(prompts)]\n"
        "def place(prompts, completions, **columns):\n    return [float(i) for i, p in enumerate(prompts)]\n"
    )
    monkeypatch.setattr(report, "write", lambda run: None)
    rewards = {"rewards": [f"{tmp_path}/some:judge", f"{tmp_path}/some:place"], "reward_weights": [1.0, 0.0]}
    return {**settings, **rewards, "dynamic_sampling": 2, "eval_problems": 0, "steps": 4}


def simulated(stream, rounds, steps):
    """For each step the prompts and first sample numbers of its groups, the prompts drawn and the rounds taken."""
    position = 0
    for _ in range(steps):
        found, places, drawn, taken = {}, list(range(PROMPTS)), 0, -1
        while places and taken < rounds:
            taken += 1
            for place in places:
                found[place] = (stream[position + drawn], drawn * GROUP)
                drawn += 1
            places = [place for place in places if is_dead(found[place][0])]
        position += drawn
        yield [found[place] for place in range(PROMPTS)], drawn, taken, position


@pytest.mark.parametrize("rounds", [0, 1, 2, 30])
def test_new_prompts_in_the_order_of_the_data_take_the_place_of_dead_groups(job, tmp_path, rounds):
    made = config_file.load(overrides={**job, "dynamic_sampling": rounds, "keep_checkpoints": None})
    train(made)
    records = [record for _, record in data.read(job["data"])]
    stream = [record["prompt"] for record in data.batch(records, made.seed, 0, 400)]
    samples, lines = lines_of(tmp_path / "run/completions.jsonl"), lines_of(tmp_path / "run/metrics.jsonl")[1:]
    dead, further = 0, 0
    for step, (groups, drawn, taken, position) in enumerate(simulated(stream, rounds, 4), 1):
        mine = [row for row in samples if row["step"] == step]
        assert [row["prompt"] for row in mine[::GROUP]] == [prompt for prompt, _ in groups]
        assert [row["sample"] for row in mine] == [first + i for _, first in groups for i in range(GROUP)]
        assert checkpoint.position_of(tmp_path / f"run/checkpoints/step-{step:06d}", 0) == position
        line = lines[step - 1]
        assert line["frac_reward_zero_std"] == pytest.approx(sum(is_dead(prompt) for prompt, _ in groups) / PROMPTS)
        if rounds:
            assert (line["sampling/prompts"], line["sampling/rounds"]) == (drawn, taken)
        else:
            assert "sampling/rounds" not in line
        kept = line["completions/mean_length"] * PROMPTS * GROUP
        assert (line["tokens/generated"] > kept + 1) == (drawn > PROMPTS)
        dead, further = dead + sum(is_dead(prompt) for prompt, _ in groups), further + taken
    assert (further > 0) == (rounds > 0) and (dead == 0) == (rounds == 30)


def test_samples_of_a_further_round_have_random_numbers_and_noise_of_their_own(job, tmp_path):
    """The completions are those of their numbers; equal rewards in a group that stays are dithered apart."""
    train(config_file.load(overrides={**job, "dynamic_sampling": 1, "steps": 1}))
    samples = lines_of(tmp_path / "run/completions.jsonl")
    model, tokenizer = policy.load(tmp_path / "run/checkpoints/step-000000")
    assert max(row["sample"] for row in samples) >= PROMPTS * GROUP
    for first in range(0, PROMPTS * GROUP, GROUP):
        mine = samples[first : first + GROUP]
        rollout = generate(
            model, policy.end_tokens(model, tokenizer), [tokenizer(mine[0]["prompt"])["input_ids"]], group_size=GROUP,
            max_new_tokens=12, sample_ids=torch.tensor([row["sample"] for row in mine]),
        )  # fmt: skip
        texts = tokenizer.batch_decode(rollout.completions, skip_special_tokens=True)
        assert texts == [row["completion"] for row in mine]
    dead = [row["advantage"] for row in samples if is_dead(row["prompt"])]
    assert len(dead) >= GROUP and len(set(dead)) == len(dead)


def test_a_run_with_further_rounds_goes_on_bit_by_bit(job, tmp_path):
    whole, halves = (config_file.load(overrides={**job, "name": name}) for name in ("whole", "halves"))
    train(whole)
    train(halves.model_copy(update={"steps": 2}))
    train(halves, resume=True)
    for name in ("metrics", "completions"):
        assert timeless(tmp_path / f"whole/{name}.jsonl") == timeless(tmp_path / f"halves/{name}.jsonl")
    assert_equal_checkpoints(tmp_path / "whole/checkpoints/step-000004", tmp_path / "halves/checkpoints/step-000004")


def test_a_checkpoint_of_before_goes_on_with_the_prompts_of_its_step(job, tmp_path):
    whole, halves = (
        config_file.load(overrides={**job, "dynamic_sampling": 0, "name": name}) for name in ("whole", "halves")
    )
    train(whole)
    train(halves.model_copy(update={"steps": 2}))
    last = tmp_path / "halves/checkpoints/step-000002"
    state = json.loads((last / "state.json").read_text())
    assert state.pop("position") == 2 * PROMPTS
    (last / "state.json").write_text(json.dumps(state))
    manifest = json.loads((last / "manifest.json").read_text())
    (last / "manifest.json").write_text(json.dumps({**manifest, "state.json": checkpoint._digest(last / "state.json")}))
    settings = json.loads((tmp_path / "halves/config.json").read_text())
    for new in ("dynamic_sampling", "updates_per_rollout", "eval_data", "eval_samples"):
        del settings[new]
    (tmp_path / "halves/config.json").write_text(json.dumps(settings))
    train(halves, resume=True)
    assert timeless(tmp_path / "whole/completions.jsonl") == timeless(tmp_path / "halves/completions.jsonl")
