"""The noise is a pinned function of (seed, step, sample, stream) with the promised distribution."""

import json
import math

import pytest
import torch

from redit_fast import Dither, noise
from tests import ROOT
from tools.known_answers import answers

KNOWN = json.loads((ROOT / "tests" / "known_answers.json").read_text())


def test_known_answers_are_what_the_independent_philox_and_the_library_give():
    assert list(answers()) == KNOWN
    for case in KNOWN:
        counter = case["seed"], torch.tensor([case["sample_id"]]), case["stream"], case["step"]
        assert [f"{int(word):08x}" for word in noise.philox4x32(*counter)] == case["words"]
        assert noise.counter_uniform(*counter).item().hex() == case["uniform"]
        assert float(noise.counter_normal(*counter)).hex() == case["normal_float32"]


def test_random123_known_answer():
    words = noise.philox4x32(0, torch.zeros(1, dtype=torch.int64), 0, 0)
    assert [f"{int(word):08x}" for word in words] == ["6627e8d5", "e169c58d", "bc57ac4c", "9b00dbd8"]


def test_box_muller_follows_libm_to_1e_12_on_extreme_words():
    words = torch.tensor([0, 1, 2, 0x3FFFFFFF, 0x40000000, 0x7FFFFFFF, 0x80000000, 0xBFFFFFFF, 0xC0000000, 0xFFFFFFFF])
    x0, x1 = torch.meshgrid(words, words, indexing="ij")
    expected = torch.sqrt(-2 * torch.log((2 * x0 + 1).double() / 2**33)) * torch.cos(
        2 * math.pi * (x1.double() + 0.5) / 2**32
    )
    assert (noise.box_muller(x0, x1) - expected).abs().max() < 1e-12


def test_square_roots_are_correctly_rounded():
    """torch.sqrt is not: it errs in the last bit of about one in a hundred float64 values on the CPU."""
    x = torch.cat(
        [torch.rand(100_000).double() * 70, torch.rand(100_000).double() * 1e-9, torch.tensor([0.0, 4.0]).double()]
    )
    assert noise.exact_sqrt(x).tolist() == [math.sqrt(value) for value in x.tolist()]
    assert noise.exact_sqrt(torch.tensor([math.inf, math.nan]).double())[0] == math.inf


@pytest.mark.parametrize("distribution", ["gaussian", "uniform"])
def test_noise_has_zero_mean_the_uniform_variance_and_its_own_kurtosis(distribution):
    n, a = 1_000_000, 0.3
    xi = noise.noise(distribution, a, 7, torch.arange(n), 2, 5)
    sigma = a / math.sqrt(3)
    assert abs(xi.mean()) < 4 * sigma / math.sqrt(n)
    assert abs(xi.var() / sigma**2 - 1) < 4 * math.sqrt(2 / n)
    kurtosis = ((xi / sigma) ** 4).mean().item()
    assert abs(kurtosis - (3.0 if distribution == "gaussian" else 1.8)) < 4 * math.sqrt(96 / n)
    if distribution == "uniform":
        assert xi.abs().max() < a


def test_noise_is_uncorrelated_between_samples_rewards_steps_and_seeds():
    n = 200_000
    ids = torch.arange(n)
    base = noise.counter_normal(0, ids, 0, 0).double()
    others = {
        "sample": noise.counter_normal(0, ids + n, 0, 0),
        "high word": noise.counter_normal(0, ids + (1 << 32), 0, 0),
        "reward": noise.counter_normal(0, ids, 1, 0),
        "step": noise.counter_normal(0, ids, 0, 1),
        "seed low": noise.counter_normal(1, ids, 0, 0),
        "seed high": noise.counter_normal(1 << 32, ids, 0, 0),
    }
    for name, other in others.items():
        assert abs(torch.corrcoef(torch.stack([base, other.double()]))[0, 1]) < 3 / math.sqrt(n), name


SCHEDULES = {
    "constant": {0: 0.1, 9000: 0.1},
    "square_root": {0: 0.1, 300: 0.1 / math.sqrt(2), 900: 0.05},
    "factor": {0: 0.1, 1: 0.099, 1000: 1e-3},
    "multi_factor": {0: 0.1, 1999: 0.1, 2000: 0.05, 4000: 0.025, 6000: 0.0125, 8000: 0.00625},
    "cosine": {0: 0.0, 500: 0.05, 1000: 0.1, 4500: 0.0505, 8000: 1e-3, 9000: 1e-3},
    "square_root_reverse": {9000: 0.1, 8700: 0.1 / math.sqrt(2), 9500: 0.1},
    "factor_reverse": {9000: 0.1, 8999: 0.099, 0: 1e-3},
    "multi_factor_reverse": {9000: 0.1, 7000: 0.05, 0: 0.00625},
    "cosine_reverse": {9000: 0.1, 5000: 0.0505, 0: 1e-3, 9001: 0.1},
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedules_follow_the_table(name):
    settings = Dither(level=0.1, schedule=name, total_steps=9000 if name.endswith("_reverse") else None)
    for step, level in SCHEDULES[name].items():
        assert settings.level_at(step) == pytest.approx(level, rel=1e-12), step


def test_a_callable_schedule_and_level_zero():
    assert Dither(schedule=lambda step: 0.5 / (step + 1)).level_at(4) == 0.1
    assert all(Dither(level=0, schedule=name, total_steps=10).level_at(5) == 0 for name in SCHEDULES)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"distribution": "normal"}, "distribution"),
        ({"level": -0.1}, "level"),
        ({"level": math.nan}, "level"),
        ({"reward_scale": [1.0, math.inf]}, "reward_scale"),
        ({"schedule": "constant_reverse", "total_steps": 5}, "schedule"),
        ({"schedule": "cosine_reverse"}, "total_steps"),
        ({"dead_groups": "drop"}, "dead_groups"),
        ({"seed": -1}, "seed"),
        ({"seed": 2**64}, "seed"),
    ],
)
def test_bad_settings_name_the_field(fields, message):
    with pytest.raises(ValueError, match=message):
        Dither(**fields)
