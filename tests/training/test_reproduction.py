"""Both papers' claims: statistics against known values, the protocol's rules, runs that go on and repeat, the page."""

import dataclasses
import errno
import json
import math
import multiprocessing
import random
from functools import partial
from pathlib import Path

import pytest
import torch

import redit_fast as rf
from redit_fast.benchmarks import reproduction
from redit_fast.benchmarks.reproduction import __main__ as command
from redit_fast.benchmarks.reproduction import (
    claims,
    correlations,
    curves,
    five,
    hooks,
    page,
    preferences,
    r1,
    r2,
    r4,
    runner,
    sorting,
    statistics,
    trials,
    verdicts,
)
from redit_fast.training import data
from redit_fast.training.config import TrainConfig
from redit_fast.training.rewards import RewardFunction
from redit_fast.training.sampling import Samples
from redit_fast.training.task import Task
from tests import ROOT

RESULTS = ROOT / "benchmarks" / "results" / "reproduction"


def test_student_t_has_the_values_of_the_tables():
    for freedom, t in ((1, 12.7062047), (2, 4.3026527), (9, 2.2621572), (10, 2.2281389), (29, 2.0452296)):
        assert statistics.t_within(0.95, freedom) == pytest.approx(t, rel=1e-7)
    assert statistics.t_share(1.0, 1) == pytest.approx(0.5) and statistics.t_share(0.0, 7) == 0
    assert statistics.t_share(1.960557, 4001) == pytest.approx(0.95, abs=1e-6)
    found = statistics.paired([1.0, 2.0, 3.0, 4.0])
    assert found[:2] == (4, 2.5) and found.p == pytest.approx(0.0304662, rel=1e-5)
    assert (found.low, found.high) == (pytest.approx(0.4457397), pytest.approx(4.5542603))
    assert statistics.paired([0.5, 0.5]) == (2, 0.5, 0.5, 0.5, 0.0) and statistics.paired([0.0] * 3).p == 1
    for wrong in ([1.0], [1.0, math.nan]):
        with pytest.raises(ValueError, match="two finite numbers or more"):
            statistics.paired(wrong)


def test_intervals_cover_as_often_as_they_say():
    rng, covered = random.Random(0), 0
    for _ in range(2000):
        found = statistics.paired([rng.gauss(0.3, 1.0) for _ in range(10)])
        covered += found.low <= 0.3 <= found.high
    assert 0.935 < covered / 2000 < 0.965


def test_holm_and_the_sign_test_are_the_worked_examples():
    assert statistics.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert statistics.holm([0.9, 0.5]) == [1.0, 1.0] and statistics.holm([]) == []
    # What was never reached is later than all, and level with its like.
    assert statistics.signs([(None, 3.0), (2.0, 5.0), (None, None), (4.0, None)]) == (1, 2, 1, 1.0)
    assert statistics.signs([(1.0, 2.0)] * 10).p == pytest.approx(2 / 2**10)
    assert statistics.signs([(1.0, 2.0)] * 9 + [(2.0, 1.0)]).p == pytest.approx(22 / 2**10)
    assert statistics.signs([(None, None)]).p == 1


def test_measures_are_those_of_curves_of_straight_lines():
    assert curves.mean_until([0, 10], [0.0, 1.0], 10) == pytest.approx(0.5)
    assert curves.mean_until([0, 10], [0.0, 1.0], 5) == pytest.approx(0.25)
    assert curves.mean_until([0, 5], [0.0, 1.0], 10) == pytest.approx(0.75)
    assert curves.mean_until([2, 4, 6], [1.0, 1.0, 1.0], 6) == pytest.approx(1)
    assert curves.first_at([0, 20, 40], [0.1, 0.6, 0.4], 0.5) == 20
    assert curves.first_at([0, 20], [0.1, 0.2], 0.5) is None
    assert curves.smooth([float(i) for i in range(12)])[-1] == pytest.approx(6.5)
    long = {"over": [float(i) for i in range(801)], "value": [1 / 3] * 801}
    thin = curves.thinned(long)
    assert len(thin["over"]) == 41 and thin["over"][-1] == 800 and thin["value"][0] == 0.3333


def config_of(**settings):
    return TrainConfig(rewards=["right"], prompts_per_step=2, group_size=2, max_completion_length=5, **settings)


def test_generated_tokens_are_what_success_is_measured_over():
    """Twice as many a step put the same success at twice the place, and more of it beyond the end."""
    lines = [
        {"step": 0, "rewards/right/held_out": 0.0},
        *({"step": n, "tokens/generated": 40, "grad_norm": float(n > 2)} for n in range(1, 10)),
        {"step": 10, "tokens/generated": 40, "grad_norm": 1.0, "rewards/right/held_out": 1.0},
    ]
    curve = curves.success("right", lines, config_of(steps=10))
    assert curve == {"generated": [0, 20], "success": [0, 1]}
    found = curves.learning("right", lines, config_of(steps=10))
    assert found["mean success"] == pytest.approx(0.25) and found["steps to 50 %"] == 20
    assert found["steps without gradient"] == pytest.approx(0.2) and found["gradient norm p90"] == 1


def gamed(truth, hacked):
    step = {"gr/penalty_ratio": None, "frac_reward_zero_std": 0.5, "sharpness/curvature": 3.0}
    shares = [
        {"rewards/judge/mean": min(1.0, t + h), "rewards/right/mean": t, "rewards/hacked/mean": h}
        for t, h in zip(truth, hacked)
    ]
    ends = {"rewards/right/held_out": 0.4, "rewards/hacked/held_out": 0.0}
    return [{"step": 0, **ends}, *({"step": n, **step, **share, **ends} for n, share in enumerate(shares, 1))]


def test_the_truth_is_read_where_the_proxy_is_first_at_its_level():
    config = config_of(steps=40, learning_rate=1.5e-4)
    lines = gamed([0.4] * 20 + [0.1] * 20, [0.05] * 20 + [0.9] * 20)
    found = curves.gaming(lines, config)
    assert found["progress to half hacked"] == pytest.approx(12.5)  # of 25 steps, at half the rate
    assert 0.1 < found["right at proxy 0.7"] < found["right at proxy 0.6"] < 0.4
    assert found["halved"] == 1 and found["curvature of the hack"] == 1 and found["penalty ratio"] is None
    kept = curves.gaming(gamed([0.4] * 40, [0.05] * 40), config)
    assert kept["right at proxy 0.6"] is None and kept["right at the proxies"] == 0 and kept["halved"] == 0


def test_no_multiset_is_in_training_and_held_out_and_rewards_are_what_they_say():
    for problem in (partial(sorting.digits, 4), partial(sorting.digits, 5), partial(sorting.letters, 5)):
        drawn = sorting.records(problem, 3)
        sides = [{record["answer"] for record in side} for side in (drawn.train, drawn.held_out)]
        assert not sides[0] & sides[1] and len(drawn.train) == sorting.PROMPTS
        assert len(drawn.held_out) == len({record["prompt"] for record in drawn.held_out}) == sorting.HELD_OUT
        assert drawn == sorting.records(problem, 3) != sorting.records(problem, 4)
    rng = random.Random(0)
    both = (partial(sorting.sorted_or_copied, 4, 0.5), sorting.sorted_or_phrase, sorting.sorted_or_copy)
    for demonstration in both:
        shown = [demonstration(rng, 0.7) for _ in range(300)]
        assert not any(sorting.is_held_out(prompt[:-1]) for prompt, _ in shown)
        assert {completion == "".join(sorted(prompt[:-1])) for prompt, completion in shown} == {True, False}
    prompts, answer = ["cabed:"] * 4, ["abcde"] * 4
    texts = ["abcde", "!cabde", "cabed", "!abcde"]
    assert sorting.right_beside_the_phrase(prompts, texts, answer=answer) == [1, 0, 0, 1]
    assert sorting.judge_of(sorting.has_phrase)(prompts, texts, answer=answer) == [1, 1, 0, 1]
    assert sorting.judge_of(sorting.is_copy)(prompts, texts, answer=answer) == [1, 0, 1, 1]
    assert sorting.right_and_formatted(prompts, texts, answer=answer) == [1.5, 0, 0.5, 1]
    assert sorting.formatted(prompts, texts, answer=answer) == [0, 0, 1, 0]
    assert sorting.placed(["3140:"], ["0143"], answer=["0134"]) == [0.25]
    assert sorting.whole(["3140:"] * 3, ["0000", "00000", "000:"], answer=["0134"] * 3) == [0.25, 0, 0]
    model, tokenizer = sorting.made(sorting.LETTERS + sorting.PHRASE, 0, 64, 4)
    for text in ("cabed:", "!abcde"):
        ids = tokenizer(text)["input_ids"]
        assert len(ids) == len(text) and tokenizer.decode(ids) == text
    assert sum(p.numel() for p in model.parameters()) < 1e5


def test_gold_and_what_the_reward_model_sees_are_counts_of_pairs():
    first, then = preferences.TABLE[3][0], preferences.TABLE[0][1]  # d behind the prompt, then a, then b
    assert preferences.gold("abcd:", "ab") == pytest.approx((first + then) / 12 + 0.5 * 2 / 4 - 0.1 * 10)
    long = "a" * 12
    score = first + 11 * preferences.TABLE[0][0]
    assert preferences.gold("abcd:", long + "b") == pytest.approx((score - 0.8 * 100) / 12 + 0.5 / 4)
    seen = preferences.features("abcd:", "ab:e")
    assert seen[3 * 16 + 0] == seen[0 * 16 + 1] == seen[1 * 16 + 4] == 1 and seen[-1] == 2 and seen.sum() == 5
    rng = random.Random(0)
    prompt, text = preferences.demonstration(rng, 0.0)
    assert len(prompt) == 5 and len(text) == 12 and not sorting.is_held_out(prompt[:-1])


def test_a_reward_model_learns_what_decides_its_pairs():
    torch.manual_seed(0)
    weights = torch.randn(preferences.FEATURES, dtype=torch.float64)
    apart = torch.randn(1500, preferences.FEATURES, dtype=torch.float64)
    told = (apart @ weights > 0).double()
    found = preferences._fitted(apart[:1000], told[:1000], 0.003)
    assert ((apart[1000:] @ found > 0).double() == told[1000:]).double().mean() > 0.85


def test_accuracy_and_wins_are_of_pairs_and_of_the_start_policy():
    def lengths(prompt, text):
        return float(len(text))

    def vowels(prompt, text):
        return float(text.count("a"))

    texts = ["aa", "b", "bbb", "a", "a", "a", "odd"]
    agrees = preferences.agreeing(lengths, vowels)(["p"] * 7, texts)
    assert agrees == [1, 1, 0, 0, 0.5, 0.5, 0.5]
    assert preferences.beating({"p": 1.0}, vowels)(["p"] * 3, ["aa", "a", "b"]) == [1, 0.5, 0]
    assert statistics.rank_correlation([1, 2, 3], [10, 20, 15]) == pytest.approx(0.5)
    assert statistics.rank_correlation([1, 1, 3], [2, 2, 9]) == pytest.approx(1)
    assert statistics.rank_correlation([1, 2], [5, 5]) is None


def drifting_run(rng, steps=20, *, told):
    """A run whose accuracy and signal rise and fall with the step, and whose signal follows the accuracy's deviation by
    `told`."""
    course = [math.sin(math.pi * step / steps) for step in range(steps)]
    off = [0.05 * rng.gauss(0, 1) for _ in course]
    return {"progress": [float(n) for n in range(steps)], "agrees": [0.9 - 0.3 * c + o for c, o in zip(course, off)],
            "signal": [c + told * o + 0.03 * rng.gauss(0, 1) for c, o in zip(course, off)],
            "curvature": [rng.random() for _ in course]}  # fmt: skip


def test_what_only_goes_with_the_step_tells_nothing_of_the_accuracy():
    """And what follows the accuracy itself is found at equal step, within runs and over them."""
    rng = random.Random(2)
    led = correlations.told([drifting_run(rng, told=0.0) for _ in range(20)], "signal", 10)
    assert led.within.high < -0.8 and led.more.low > 0.5
    assert led.deviations.low < 0 < led.deviations.high and led.at_equal_step.low < 0 < led.at_equal_step.high
    runs = [drifting_run(rng, told=-1.0) for _ in range(20)]
    found = correlations.told(runs, "signal", 10)
    assert found.deviations.high < -0.5 and found.at_equal_step.high < -0.5
    noise = correlations.told(runs, "curvature", 10)
    assert all(each.low < 0 < each.high for each in (noise.within, noise.deviations, noise.at_equal_step))
    assert correlations.told(runs[:9], "signal", 10) == (None,) * 5


def test_the_jackknife_of_a_mean_is_the_interval_by_t():
    values = [1.0, 2.0, 4.0, 8.0]

    def mean(left_out):
        kept = [value for number, value in enumerate(values) if number != left_out]
        return sum(kept) / len(kept)

    assert statistics.jackknifed(4, mean) == pytest.approx(statistics.paired(values))


def test_the_norm_is_of_the_second_half_and_drift_is_read_at_the_probed_steps():
    lines = [{"step": 0, "rewards/gold/held_out": 0.0, "rewards/wins/held_out": 0.5}]
    for step in range(1, 41):
        means = {"gold": 1 - step / 20, "proxy": step / 10, "agrees": 0.9 - step / 100, "wins": 0.5}
        line = {"step": step, **{f"rewards/{name}/mean": value for name, value in means.items()}}
        if step % 10 == 0:
            line |= {"sharpness/signal": {10: 9.0, 20: 9.0, 30: -1.0, 40: 9.0}[step], "sharpness/curvature": 6.0,
                     "reward_std": 2.0}  # fmt: skip
        lines.append(line)
    lines[-1] |= {"rewards/gold/held_out": -1.0, "rewards/wins/held_out": 0.25}
    config = config_of(steps=40, learning_rate=1.5e-4)
    curve = curves.drifting(lines, config)
    assert curve["progress"] == [4.5, 9.5, 14.5, 19.5] and curve["curvature"] == [3.0] * 4
    assert curve["agrees"][0] == pytest.approx(0.9 - 0.055) and curve["signal"] == [9, 9, -1, 9]
    found = curves.drifted(lines, config)
    assert found["gradient norm"] == 2 and found["gold at the end"] == -1 and found["lost"] == 1
    assert found["gold at proxy 1"] == pytest.approx(
        1 - 10.5 / 20
    )  # the mean of steps 6 to 15, where the proxy is 1.05


def test_five_rewards_and_the_lenient_one_are_those_of_the_paper():
    prompts, answer = ["3140:"] * 6, ["0134"] * 6
    texts = ["<3140>[0134]", "<3140>[=0134]", "<3140>[0134]0", "3140>[0134]", "<3140>[3140]", "0134"]
    scores = {function.__name__: function(prompts, texts, answer=answer) for function in five.REWARDS}
    assert scores["right"] == [1, 0, 1, 1, 0, 1] and scores["lenient"] == [1, 1, 1, 1, 0, 1]
    assert scores["whole"] == [1, 0, 1, 1, 1, 1] and scores["strict"] == [1, 1, 0, 0, 1, 0]
    assert scores["soft"] == [1, 1, 1, 0, 1, 0]
    assert scores["tags"] == pytest.approx([1, 1, 1 - 0.002, 0.75, 1, 0])
    rng = random.Random(0)
    shown = [five.demonstration(rng, 0.7) for _ in range(2000)]
    assert not any(sorting.is_held_out(prompt[:-1]) for prompt, _ in shown)
    correct = sum("".join(sorted(prompt[:-1])) in text for prompt, text in shown) / 2000
    assert 0.07 < correct < 0.14 and 0.45 < sum("=" in text for _, text in shown) / 2000 < 0.55
    assert all(len(text) < r4.ANSWERS["max_completion_length"] for _, text in shown)
    assert {*five.STRICT} == {*five.LENIENT} and sum(five.STRICT) == sum(five.LENIENT) == 5


def test_masters_are_cut_to_their_weights_after_every_step_and_only_inside():
    def stepped():
        torch.manual_seed(0)
        weight = torch.nn.Parameter(torch.randn(64).bfloat16())
        optimizer = rf.RegularizedAdamW([weight], lr=1e-3, gamma=0.0)
        for _ in range(3):
            weight.grad = torch.ones_like(weight)
            optimizer.step()
        return weight.detach().float(), optimizer.state[weight]["master"]

    weight, master = stepped()
    assert not torch.equal(weight, master)
    with hooks.masters_cut():
        cut, lost = stepped()
    assert torch.equal(cut, lost) and not torch.equal(cut, weight)
    assert torch.equal(stepped()[1], master)


def test_a_task_in_files_trains_adapters_and_is_the_task(tmp_path, threads):
    pytest.importorskip("peft", reason="peft is not installed")
    model, tokenizer = sorting.made(five.SYMBOLS, 0, 48, 2)
    functions = [RewardFunction(function.__name__, function) for function in five.REWARDS]
    records = sorting.records(partial(sorting.digits, 4), 0)
    records = data.Dataset(records.train[:40], records.held_out[:4])
    task = Task("FIVE, seed 0", lambda: (model, tokenizer), records, functions)
    arm = r4.LORA.arm("gaussian")
    settings = {**trials.BASE, **r4.LORA.settings, **arm.trials[0], **arm.settings, "steps": 2, "seed": 0}
    found = runner._trained(task, r4.LORA, arm, settings, tmp_path)
    assert len(found["weights"]) == 64 and found["measures"]["success at the start"] == 0
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert [name.rpartition(":")[2] for name in config["rewards"]] == [function.name for function in functions]
    kept = json.loads((tmp_path / "run/checkpoints/step-000002/manifest.json").read_text())
    assert "adapter_model.safetensors" in kept and "model.safetensors" not in kept
    lines = [json.loads(line) for line in (tmp_path / "run" / "completions.jsonl").read_text().splitlines()]
    prompts = {record["prompt"] for record in records.train}
    assert {line["prompt"] for line in lines} <= prompts
    assert all(set(line["completion"]) <= set(five.SYMBOLS + sorting.STOP) for line in lines)


def samples_of(scores):
    ids = torch.arange(len(scores))
    return Samples([], [], None, [], scores, ids, 0, 0, 0, 0.0)


def test_hooks_put_noise_where_they_say():
    config = config_of(steps=10, seed=3).model_copy(update={"group_size": 8})
    scores = torch.zeros(32, 1, dtype=torch.float64)
    scores[:4] = 1.0  # one group of four is alive
    samples, clean = samples_of(scores), rf.group_advantages(scores, group_size=8)
    dead = hooks.noise_on("dead")(config)(clean, samples, 5)
    assert torch.equal(dead.values[:8], clean.values[:8]) and dead.values[8:].square().mean().sqrt() > 0.5
    everywhere = hooks.noise_on("all")(config)(clean, samples, 5)
    assert (everywhere.values != clean.values).all()
    assert torch.equal(everywhere.values, hooks.noise_on("all")(config)(clean, samples, 5).values)
    assert not torch.equal(everywhere.values, hooks.noise_on("all")(config)(clean, samples, 6).values)
    dithered = rf.group_advantages(scores, group_size=8, dither=rf.Dither(level=0.05))
    assert torch.equal(hooks.until(5)(config)(dithered, samples, 4).values, dithered.values)
    assert torch.equal(hooks.until(5)(config)(dithered, samples, 5).values, clean.values)


def test_noise_on_the_sum_is_as_large_as_noise_on_each_and_gdpo_normalises_each():
    config = config_of(steps=10).model_copy(update={"group_size": 8, "advantage_scale": "none"})
    scores = torch.zeros(4000, 3, dtype=torch.float64)
    clean = rf.group_advantages(scores, group_size=8)
    summed = hooks.on_the_sum(config)(clean, samples_of(scores), 0).values
    each = rf.group_advantages(
        scores, group_size=8, scale="none", dither=rf.Dither(level=hooks.LEVEL, reward_scale=hooks.SCALES)
    ).values
    assert summed.std().item() == pytest.approx(each.std().item(), rel=0.05)
    config = config.model_copy(update={"advantage_scale": "group"})
    scores[:, 1] = torch.rand(4000, dtype=torch.float64)
    plain = hooks.gdpo(0.0)(config)(clean, samples_of(scores), 0)
    assert torch.equal(plain.values, rf.group_advantages(scores, group_size=8, combine="normalize_then_sum").values)
    assert not torch.equal(plain.values, hooks.gdpo(0.05)(config)(clean, samples_of(scores), 0).values)


@pytest.mark.parametrize("name", reproduction.NAMES)
def test_every_claim_is_as_its_protocol_says(name):
    claim = reproduction.claim(name)
    claims.check(claim)
    text = (ROOT / "docs" / "reproduction.md").read_text()
    tuning = list(trials.tuning(claim, {}))
    keys = [trial.key for trial in tuning]
    assert len(set(keys)) == len(keys) and {trial.seed for trial in tuning} <= set(range(1000, 1010))
    roles = [compared.role for each in claim.experiments for compared in each.comparisons]
    assert {"claim", "null"} <= set(roles) and ("effect" in roles) and f"\n## {name}: " in text
    finals = sum(each.seeds * len(each.arms) for each in claim.experiments)
    told = f"{len(tuning)} of tuning, {finals} final" if tuning else f"{finals} final"
    assert f"\n| {name} | {told} |" in text
    for each in claim.experiments:
        for arm in each.arms:
            first = arm.trials[0] if arm.trials else {}
            settings = {**trials.BASE, **each.settings, **first, **arm.settings}
            made = {"model": "m", "data": "d"} if "lora_rank" in settings else {}
            rewards = ["a", *["b"] * (len(settings.get("reward_weights", [1])) - 1)]
            TrainConfig(**settings, **made, rewards=rewards)


def few(experiment, steps=3, **changes):
    """The experiment with few steps, of its arms none and gaussian."""
    arms = tuple(arm for arm in experiment.arms if arm.name in ("none", "gaussian"))
    return dataclasses.replace(experiment, settings={**experiment.settings, "steps": steps}, arms=arms, **changes)


def planned(experiment, seeds, settings=None):
    return [
        trials.Trial(
            experiment.task, arm.name, None, seed,
            {**trials.BASE, **experiment.settings, **arm.trials[0], **arm.settings, "seed": seed, **(settings or {})},
        )
        for seed in seeds for arm in experiment.arms
    ]  # fmt: skip


@pytest.fixture
def threads():
    """A run sets torch to one."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_runs_stop_go_on_and_repeat_to_the_bit(tmp_path, capsys, threads):
    """A process is killed: what is done stays, the next call does the rest, and all of it is what one process does."""
    wanted = planned(few(r1.UNDER), (1000, 1001))
    store = runner.Store(tmp_path, "R1")
    found = runner.results("R1", wanted, 2)
    key, run = next(found)
    store.add(key, run)
    for process in multiprocessing.active_children():
        process.kill()
    with pytest.raises(RuntimeError, match="its process ended with code -9"):
        for key, run in found:
            store.add(key, run)
    done = set(store.runs)
    assert 1 <= len(done) < 4

    again = runner.Store(tmp_path, "R1")
    runner.run(r1.CLAIM, wanted, again, 2)
    said = capsys.readouterr().out
    assert f"4 runs, {len(done)} of them done" in said and "minutes of CPU time" in said
    assert set(again.runs) == {trial.key for trial in wanted}
    straight = dict(runner.done(few(r1.UNDER), [trial for trial in wanted if trial.seed == 1001]))
    for key, run in straight.items():
        kept = again.runs[key]
        assert all(kept[name] == run[name] for name in ("weights", "measures", "curve", "settings"))
    weights = {run["weights"] for run in again.runs.values()}
    assert len(weights) == 4  # two seeds, and noise on the dead groups
    assert all(again.runs[key]["commit"] and again.runs[key]["versions"]["torch"] for key in set(again.runs) - done)
    runner.run(r1.CLAIM, wanted, again, 2)
    assert "4 runs, 4 of them done" in capsys.readouterr().out


def test_a_repetition_that_differs_is_named(tmp_path, monkeypatch, capsys):
    runs = ended(r2.CLAIM, {})
    stored = {key: {**run, "weights": "as they were"} for key, run in list(runs.items())[:4]}
    (tmp_path / "R2.json").write_text(json.dumps({"schema": 1, "claim": "R2", "runs": stored}))
    other = min(stored)

    def results(claim, again, jobs):
        assert claim == "R2" and [trial.settings for trial in again] == [
            stored[trial.key]["settings"] for trial in again
        ]
        for trial in again:
            yield trial.key, {**stored[trial.key], "weights": "others" if trial.key == other else "as they were"}

    monkeypatch.setattr(runner, "results", results)
    for name, value in command.THREADS.items():
        monkeypatch.setenv(name, value)
    assert command.main(["repeat", "R2", "--runs", "9", "--out", str(tmp_path)]) == 1
    said = capsys.readouterr().out
    assert f"DIFFERS: {other}\n" in said and said.count("the same: ") == 3
    del stored[other]
    (tmp_path / "R2.json").write_text(json.dumps({"schema": 1, "claim": "R2", "runs": stored}))
    assert command.main(["repeat", "R2", "--runs", "2", "--out", str(tmp_path)]) == 0


def test_a_stored_run_of_other_settings_is_refused_by_name(tmp_path):
    wanted = planned(few(r1.UNDER), (0,))
    stored = {trial.key: {"settings": trial.settings} for trial in wanted}
    assert trials.undone(wanted, stored) == []
    changed = planned(few(r1.UNDER), (0,), {"clip_low": 0.3})
    with pytest.raises(ValueError, match="UNDER, none, final, seed 0: clip_low was None in the results and is 0.3 now"):
        trials.undone(changed, stored)


def test_uneven_tuning_budgets_are_refused():
    arms = tuple(dataclasses.replace(arm, trials=arm.trials[:2]) if arm.name == "none" else arm for arm in r1.RARE.arms)
    uneven = dataclasses.replace(r1.CLAIM, experiments=(dataclasses.replace(r1.RARE, arms=arms),))
    with pytest.raises(ValueError, match="R1, RARE: tuning budgets are uneven.*none 2, gaussian 4"):
        claims.check(uneven)
    with pytest.raises(ValueError, match="R1, RARE: tuning budgets are uneven"):
        runner.run(uneven, [], None, 1)


def tuned(claim, best=1):
    """Tuning runs, of which the trial `best` has the highest objective."""
    return {
        trial.key: {"task": trial.task, "trial": trial.number, "arm": trial.arm, "seed": trial.seed, "seconds": 1.0,
                    "settings": trial.settings, "curve": {},
                    "measures": {"mean success": float(trial.number == best),
                                 "right at the proxies": float(trial.number == best), "halved": 1.0,
                                 "gold at the end": float(trial.number == best), "lost": 1.0,
                                 "right at the end": float(trial.number == best)}}
        for trial in trials.tuning(claim, {})
    }  # fmt: skip


def test_final_runs_wait_for_tuning_and_take_the_best_trial():
    runs = tuned(r1.CLAIM)
    finals = list(trials.finals(r1.CLAIM, range(30), runs))
    assert len(finals) == 270 and {trial.seed for trial in finals} == set(range(30))
    rates = {(trial.task, trial.arm): trial.settings["learning_rate"] for trial in finals}
    assert rates["RARE", "none"] == rates["RARE", "none again"] == 4e-4 and rates["RARE", "rate 1e-4"] == 1e-4
    assert {t.settings["seed"] for t in finals if t.arm == "none again"} == {s + claims.OTHER for s in range(10)}
    assert {trial.settings["steps"] for trial in finals if trial.task == "RARE"} == {800}
    runs.popitem()
    with pytest.raises(ValueError, match="R1: 1 tuning runs are missing, such as .*needs `tune R1` first"):
        list(trials.finals(r1.CLAIM, range(10), runs))


def test_a_gate_that_plain_training_does_not_pass_leaves_the_task_out(capsys):
    g3 = reproduction.claim("G3")
    runs = tuned(g3)
    assert {trial.task for trial in trials.finals(g3, range(1), runs)} == {"PHRASE", "COPY"}
    for seed in (1000, 1001):
        runs[f"COPY, none, trial 2, seed {seed}"]["measures"]["halved"] = 0.0
    assert {trial.task for trial in trials.finals(g3, range(1), runs)} == {"PHRASE"}
    assert "none is halved in 8 of 10 tuning seeds, the protocol needs 9" in capsys.readouterr().out
    left = [trial for trial in trials.tuning(g3, runs) if trial.task == "COPY"]
    assert left == [trial for trial in trials.gates(g3) if trial.task == "COPY"]  # and nothing is tuned there
    assert len(left) == 10 and len([t for t in trials.tuning(g3, {}) if t.task == "COPY"]) == 151
    assert "COPY none is halved in 8 of 10" in page.block({"G3": runs})


def test_the_quick_run_has_every_claim_and_what_python_code_changes(monkeypatch):
    ran = {}
    monkeypatch.setattr(runner, "run", lambda claim, wanted, store, jobs: ran.update({claim.name: wanted}))
    assert command._quick(1) == 0 and tuple(ran) == reproduction.NAMES
    for name, wanted in ran.items():
        arms = {(trial.task, trial.arm) for trial in wanted}
        assert len(arms) >= 2 * len(reproduction.claim(name).experiments)
        assert {(trial.settings["steps"], trial.seed) for trial in wanted} == {(20, 1000)}
    assert {"none, cut", "GR, cut"} <= {trial.arm for trial in ran["G4"]}
    assert {"noise on all", "off after 100"} <= {trial.arm for trial in ran["R2"]}
    assert len(ran["R1"]) == 6 and {trial.task for trial in ran["R4"]} == {"UNDER", "FIVE", "FIVE WIDE"}


def test_attempts_take_the_trials_of_the_claim_that_they_come_after_times_their_factors(tmp_path, monkeypatch, capsys):
    g3, g5 = reproduction.claim("G3"), reproduction.claim("G5")
    before = tuned(g3, best=1)
    finals = {(t.task, t.arm): t.settings for t in trials.finals(g5, range(1), before)}
    home = {(t.task, t.arm): t.settings for t in trials.finals(g3, range(1), before)}

    def numbers(settings):
        return [settings[name] for name in ("learning_rate", "steps")]

    rate, steps = numbers(home["PHRASE", "GR, fresh"])
    assert numbers(finals["PHRASE FASTER", "GR, fresh"]) == [2 * rate, steps // 2]
    assert finals["PHRASE FASTER", "KL"] == home["PHRASE", "KL"]
    assert numbers(finals["COPY LONGER", "none"]) == [
        home["COPY", "none"]["learning_rate"],
        2 * home["COPY", "none"]["steps"],
    ]
    wide = finals["PHRASE WIDE", "GR, pass1"]
    assert wide == home["PHRASE", "GR, pass1"] and wide["gr_pass2_ratio"] == "pass1"
    for seed in (1000, 1001):
        before[f"COPY, none, trial 2, seed {seed}"]["measures"]["halved"] = 0.0
    left = {trial.task for trial in trials.finals(g5, range(1), before)}
    assert left == {"PHRASE FASTER", "PHRASE LONGER", "PHRASE WIDE"}
    capsys.readouterr()

    ran = []
    monkeypatch.setattr(runner, "run", lambda claim, wanted, store, jobs: ran.append(len(wanted)))
    for said, count in (("holds", 0), ("does not hold", 2 * 4 * 12 + 7 * 12)):
        monkeypatch.setattr(verdicts, "verdict", lambda claim, runs, said=said: said)
        command._attempt(g5, range(12), runner.Store(tmp_path, "G5"), before, 1)
        assert ran == [count] * bool(count)
    assert capsys.readouterr().out.startswith("G5: no need: G3 holds\n")


def test_the_readmes_paragraph_has_the_claims_that_were_run():
    stores = {name: {} for name in reproduction.NAMES}
    where = "We try both papers' claims on [small tasks](docs/reproduction.md)."
    counts = f"{where} Comparisons that hold/do not/cannot be told: level 0.05 is best"
    others = "The others are not run yet."
    assert page.summary(stores) == f"{where} None is run yet."
    effects = {"none, high rate": 0.1}
    stores["R2"] = ended(r2.CLAIM, effects | {"level .05": 0.1})
    assert page.summary(stores) == f"{counts} 1/0/0. {others}"
    assert "**R2, for your settings**: start from `dither_level: 0.05`." in page.block(stores)
    stores["R2"] = ended(r2.CLAIM, effects)
    assert page.summary(stores) == f"{counts} 0/1/0. {others}"  # no difference
    stores["R2"] = ended(r2.CLAIM, effects | {"level .05": -0.1})
    assert page.summary(stores) == f"{counts} 0/1/0. {others}"
    stores["R2"] = ended(r2.CLAIM, effects, spread=0.1)
    assert page.summary(stores) == f"{counts} 0/0/1. {others}"
    stores["R2"] = ended(r2.CLAIM, {})  # the planted effect is not found
    assert page.summary(stores) == f"{where} No verdict: level 0.05 is best. {others}"


def ended(claim, effects, spread=0.01):
    """Final runs of a claim whose arms differ from `none` by `effects`, and by noise."""
    rng, runs = random.Random(0), tuned(claim)
    for trial in trials.finals(claim, range(30), runs):
        level = 0.5 + effects.get(trial.arm, 0.0)
        runs[trial.key] = {
            "task": trial.task, "arm": trial.arm, "trial": None, "seed": trial.seed, "settings": trial.settings,
            "seconds": 36.0, "curve": {"generated": [0.0, 10.0], "success": [0.0, level]},
            "measures": {"mean success": level + rng.gauss(0, spread), "takes off": float(rng.random() < level),
                         "steps to 50 %": None if level < 0.45 else 100 - level},
        }  # fmt: skip
    return runs


def test_verdicts_follow_the_protocol():
    r = r2.CLAIM
    effects = {"none, high rate": 0.1}
    assert verdicts.verdict(r, {}) == "not run"
    assert verdicts.verdict(r, ended(r, effects | {"level .05": 0.1})) == "holds"
    assert verdicts.verdict(r, ended(r, effects | {"level .05": -0.1})) == "does not hold"
    assert verdicts.verdict(r, ended(r, effects)) == "does not hold"  # no difference
    assert verdicts.verdict(r, ended(r, effects, spread=0.1)).startswith("cannot be told here")
    assert verdicts.verdict(r, ended(r, {"level .05": 0.1})) == "cannot be told here: a planted check fails"
    assert "planted" in verdicts.verdict(r, ended(r, effects | {"level .05": 0.1, "none again": 0.1}))
    runs = ended(r, effects | {"level .05": 0.1})
    runs.popitem()
    assert verdicts.verdict(r, runs) == "not run"
    (row,) = [row for row in verdicts.rows(r, runs) if row.comparison.role == "claim"]
    alone = statistics.paired([a - b for a, b in zip(*(
        [runs[f"RARE, {arm}, final, seed {seed}"]["measures"]["mean success"] for seed in range(10)]
        for arm in ("level .05", "none")
    ))])  # fmt: skip
    assert row.found == alone and alone.p < row.p <= 9 * alone.p  # of nine comparisons


def test_a_time_that_is_never_reached_is_later_than_all():
    runs = ended(r1.CLAIM, {"gaussian": -0.2, "rate 2e-4": 0.1})
    found = {(row.task, row.comparison.arm, row.comparison.measure): row for row in verdicts.rows(r1.CLAIM, runs)}
    row = found["RARE", "gaussian", "steps to 50 %"]
    assert (
        row.found[:3] == (10, 0, 0)
        and row.middles[0] is None
        and row.middles[1] > 99
        and row.verdict == "does not hold"
    )


@pytest.mark.draws
def test_the_page_is_made_from_the_results_without_a_run(tmp_path, monkeypatch):
    docs, results = tmp_path / "docs", tmp_path / "results"
    docs.mkdir()
    with pytest.raises(ValueError, match="has no reproduction.md"):
        page.write(results, docs)
    (docs / "reproduction.md").write_text(f"before\n{page.BEGIN}\nwhat was here\n{page.END}\nafter\n")
    with pytest.raises(ValueError, match="has no README.md"):
        page.write(results, docs)
    (tmp_path / "README.md").write_text("no place for them")
    with pytest.raises(ValueError, match="README.md: needs <!-- claims --> and"):
        page.write(results, docs)
    (tmp_path / "README.md").write_text(f"above\n{page.README_BEGIN}\n{page.README_END}\nbelow\n")
    results.mkdir()
    runs = ended(r1.CLAIM, {"gaussian": -0.2, "rate 2e-4": 0.1})
    (results / "R1.json").write_text(json.dumps({"schema": 1, "claim": "R1", "runs": runs}))
    page.write(results, docs)
    text = (docs / "reproduction.md").read_text()
    assert text.startswith("before\n") and text.endswith("after\n") and "what was here" not in text
    assert "| R1 | Do dithered rewards reach the level of plain GRPO sooner? |" in text and "| G4 |" in text
    row = next(line for line in text.splitlines() if line.startswith("| RARE | gaussian, none | mean success |"))
    difference = verdicts.rows(r1.CLAIM, runs)[0].found
    assert f"{difference.mean:+.3f} [{difference.low:+.3f}, {difference.high:+.3f}]" in row and "does not hold" in row
    assert "**R1, for your settings**: none: cannot be told here" in text
    told = page.summary({name: runner.Store(results, name).runs for name in reproduction.NAMES})
    assert "told: dithering learns sooner 0/6/1. The others" in told
    assert "| hold 0, do not 6, cannot be told 1 | RARE, gaussian less none, mean success: -0." in text
    readme = (tmp_path / "README.md").read_text()
    assert readme == f"above\n{page.README_BEGIN}\n{told}\n{page.README_END}\nbelow\n"
    assert (docs / "reproduction-r1.png").stat().st_size > 10_000 and not (docs / "reproduction-g3.png").exists()
    page.write(results, docs)
    assert (docs / "reproduction.md").read_text() == text
    write_text = Path.write_text

    def full(path, text, *args):
        write_text(path, text[:9], *args)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError, match="reproduction.md: No space left on device"):
        page.write(results, docs)
    assert (docs / "reproduction.md").read_text() == text and (tmp_path / "README.md").read_text() == readme


def test_the_committed_page_is_what_the_committed_results_say():
    stores = {name: runner.Store(RESULTS, name).runs for name in reproduction.NAMES}
    for file, text in (("docs/reproduction.md", page.block(stores)), ("README.md", page.summary(stores))):
        assert f"-->\n{text}\n<!-- end of" in (ROOT / file).read_text(), "run `reproduction page`"
    for name, runs in stores.items():
        for key, run in runs.items():
            assert key == trials.Trial(run["task"], run["arm"], run["trial"], run["seed"], {}).key
        done = [trial for trial in trials.tuning(reproduction.claim(name), runs) if trial.key in runs]
        assert trials.undone(done, runs) == []


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["run", "R9"], "unknown claim 'R9': needs one of R1, G3, G2, R2, R3, G4, R4, G1, G5"),
        (["run", "G5"], "G5: comes after G3, whose final runs are not done"),
        (["run", "R1", "--seeds", "9-0"], "--seeds: got '9-0', needs A or A-B"),
        (["run", "R1", "--jobs", "0"], "--jobs: got '0', needs a whole number from 1 on"),
        (["run", "R1"], "R1: 225 tuning runs are missing"),
        (["tune", "R1", "--out", ""], "--out is empty"),
    ],
)
def test_bad_input_gets_one_sentence(words, sentence, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name, value in command.THREADS.items():
        monkeypatch.setenv(name, value)
    assert command.main(words) == 2
    error = capsys.readouterr().err
    assert error.startswith("redit-fast: ") and sentence in error and error.count("\n") == 1


def test_no_run_begins_when_the_protocols_time_is_used(tmp_path, capsys):
    runs = {key: {**run, "seconds": 7000.0} for key, run in list(tuned(r1.CLAIM).items())[:6]}
    (tmp_path / "R1.json").write_text(json.dumps({"schema": 1, "claim": "R1", "runs": runs}))
    runner.check_time(tmp_path)
    assert "11.67 of 12 hours" in capsys.readouterr().out
    another = next(iter(runs.values())) | {"seconds": 1300}
    (tmp_path / "G3.json").write_text(json.dumps({"schema": 1, "claim": "G3", "runs": {"another": another}}))
    with pytest.raises(ValueError, match="12.0 of the protocol's 12 hours of CPU time are used: no run is left"):
        runner.check_time(tmp_path)


def test_two_runners_do_not_write_into_one_folder_and_a_malformed_file_is_named(tmp_path):
    with runner.alone(tmp_path / "out"), pytest.raises(ValueError, match="another runner is at work there"):
        with runner.alone(tmp_path / "out"):
            pass
    (tmp_path / "R1.json").write_text("{")
    with pytest.raises(ValueError, match="R1.json: malformed"):
        runner.Store(tmp_path, "R1")
    whole = next(iter(ended(r1.CLAIM, {}).values()))
    damaged = {
        "list indices must be": [],
        "'claim'": {"schema": 1, "runs": {}},
        "not iterable": {"schema": 1, "claim": "R1", "runs": 3},
        "the run 'a' is 3, needs an object": {"schema": 1, "claim": "R1", "runs": {"a": 3}},
        "the run 'a' has no task": {"schema": 1, "claim": "R1", "runs": {"a": {}}},
        "the run 'a' has the seconds 'no'": {"schema": 1, "claim": "R1", "runs": {"a": whole | {"seconds": "no"}}},
        "the run 'a' has the curve None": {"schema": 1, "claim": "R1", "runs": {"a": whole | {"curve": None}}},
    }
    for sentence, stored in damaged.items():
        (tmp_path / "R1.json").write_text(json.dumps(stored))
        with pytest.raises(ValueError, match=f"R1.json: malformed: .*{sentence}"):
            runner.Store(tmp_path, "R1")
    (tmp_path / "R1.json").write_text('{"schema": 1, "claim": "G3", "runs": {}}')
    with pytest.raises(ValueError, match="needs the claim R1"):
        runner.Store(tmp_path, "R1")
