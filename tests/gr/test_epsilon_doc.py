"""docs/epsilon.md and docs/epsilon.png are what tools/gr_epsilon.py measured, and what the page says is so."""

import json
import re

import pytest
import torch
from PIL import Image

import redit_fast as rf
from redit_fast.training.presets import PRESETS
from tests import ROOT
from tools import gr_epsilon

PAGE = (ROOT / "docs" / "epsilon.md").read_text()
RESULTS = json.loads(gr_epsilon.RESULTS.read_text())
CURVES = RESULTS["curves"]


def test_the_pages_numbers_are_the_measured_ones():
    blocks = gr_epsilon.blocks()
    assert re.findall(r"<!-- (\w+) -->", PAGE) == list(blocks)
    for name, text in blocks.items():
        block = f"<!-- {name} -->\n{text}\n<!-- end of {name} -->"
        assert block in PAGE, f"{name}: run python -m tools.gr_epsilon --print"


def test_the_picture_shows_the_measured_curves():
    assert json.loads(Image.open(gr_epsilon.PICTURE).text["Description"]) == CURVES
    cosine, gain, error = gr_epsilon.figure(RESULTS).axes
    assert [len(axes.lines) for axes in (cosine, gain, error)] == [4, 3, 4]
    for axes in (cosine, gain, error):
        assert axes.get_title() and axes.get_xlabel() and axes.get_ylabel()


def test_links_and_pictures_exist():
    links = re.findall(r"\]\(([^)#]+)\)", PAGE)
    assert links and all((ROOT / "docs" / link).exists() for link in links)


def test_what_the_page_says_in_words():
    nearest, stochastic = (CURVES[f"bfloat16, {rounding}"] for rounding in ("nearest", "stochastic"))
    assert all(p["gain"] == pytest.approx(1, abs=0.01) for p in stochastic) and nearest[0]["gain"] < 0.1
    for a, b in zip(nearest, stochastic):
        assert (b["cosine"] >= 0.95) == (b["ratio"] >= 1)
        assert b["cosine"] < a["cosine"]
        assert (a["rounding_error"] < 1.3 * b["rounding_error"]) == (a["ratio"] >= 1)
        if a["ratio"] <= 1 / 4:
            assert b["rounding_error"] < a["rounding_error"] / 3
        assert (b["error"] < a["error"] / 3) == (a["ratio"] <= 1 / 16)
    assert RESULTS["batches"] == 1024 and PAGE.count("1024 batches") == 1


def test_a_cast_of_float32_weights_keeps_the_gain_as_stochastic_rounding_does():
    theta, g = torch.nn.Parameter(0.02 * torch.randn(200_000)), torch.randn(200_000)
    ulp = gr_epsilon.units_in_the_last_place([theta]).norm().item()
    assert 128 < theta.norm().item() / ulp < 256
    optimizer = rf.RegularizedAdamW(
        [theta], epsilon=ulp / 16 / g.norm().item(), perturb_max_norm=1e9, compute_dtype=torch.bfloat16
    )
    theta.grad = g.clone()
    optimizer.perturb()
    with pytest.warns(UserWarning, match="cosine"):
        seen = optimizer.metrics()
    assert seen["gr/step_gain"] == pytest.approx(1, abs=0.05) and seen["gr/step_cos"] < 0.4


def test_the_presets_are_those_of_the_page():
    for name, preset in PRESETS.items():
        row = next(line for line in PAGE.splitlines() if f"`--preset {name}`" in line)
        assert re.search(rf"learning rate {preset['learning_rate']:.0e}".replace("-0", "-"), row)
        if "beta" in preset and preset["beta"]:
            assert f"beta {preset['beta']:g}" in row
        if "reference_reset_every" in preset:
            assert f"every {preset['reference_reset_every']} steps" in row


def test_the_error_of_the_length_falls_with_epsilon_and_halves_with_it_at_the_left_end():
    errors = [p["error"] for p in CURVES["float64"]]
    assert errors == sorted(errors) and [p["ratio"] for p in CURVES["float64"][:2]] == [1 / 512, 1 / 256]
    assert errors[1] / errors[0] == pytest.approx(2, rel=0.05)


def test_the_benchmark_measures_what_it_says(monkeypatch, capsys):
    """One batch and two steps: in float64 no rounding and an error that halves with epsilon, in bfloat16 nearest
    rounding moves less than what was meant, and stochastic all of it."""
    for name, value in {"WARM_STEPS": 1, "BATCHES": 1, "ROWS": 2, "RATIOS": [2.0**-9, 2.0**-8]}.items():
        monkeypatch.setattr(gr_epsilon, name, value)
    curves = gr_epsilon.measure()["curves"]
    small, twice = curves["float64"]
    assert small["rounding_error"] == 0 and small["cosine"] == pytest.approx(1, abs=1e-9)
    assert twice["error"] / small["error"] == pytest.approx(2, rel=0.1) and twice["error"] < 0.2
    assert curves["float32"][0]["rounding_error"] < 0.02 and curves["float32"][0]["gain"] == pytest.approx(1, abs=1e-3)
    assert curves["bfloat16, nearest"][0]["gain"] < 0.2 < 0.8 < curves["bfloat16, stochastic"][0]["gain"] < 1.2
    assert "oracle" in capsys.readouterr().out
