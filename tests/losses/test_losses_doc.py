"""docs/losses.md and docs/losses.png are what the code gives today."""

import functools
import io
import json
import re
from typing import get_args

import matplotlib
import numpy as np
import pytest
import torch
from PIL import Image

import redit_fast as rf
from redit_fast.losses.config import LossType
from tests.losses import loss_curves
from tests.losses.loss_curves import PANELS, SIGNS, point
from tools.losses_doc import FIELDS, PAGE, PICTURE, REQUIRED, docstring, render, switches

TYPES = get_args(LossType)
AGAIN = "run python -m tools.losses_doc"
curves = functools.cache(loss_curves.curves)


def test_the_page_is_what_the_generator_gives():
    assert PAGE.read_text() == render(), AGAIN


def test_every_loss_type_is_on_the_page_and_in_the_picture():
    page = PAGE.read_text()
    assert re.findall(r"^\| `(\w+)` \| .* \| (?:fused|logp) \|", page, re.M) == [
        name for entry in docstring().entries for name in entry.sources
    ]
    assert sorted(name for entry in docstring().entries for name in entry.sources) == sorted(TYPES)
    assert set(docstring().averages) == set(TYPES)
    assert {name for panel in PANELS for name in panel.loss_types} == set(TYPES)
    for name in TYPES:
        assert re.search(rf"^- .*\*\*{name}\*\*.*: ", page, re.M), name


def test_every_field_is_on_the_page():
    page = PAGE.read_text()
    assert [name for name in FIELDS if f"`{name}=" not in page and f"`{name}` (required)" not in page] == ["loss_type"]


AVERAGES = {  # the weight of three tokens of equal loss in a sequence, and what two sequences of 1 + 3 are divided by
    "per sequence, then over the sequences, empty ones included": (1, 2),
    "summed per sequence, averaged over the sequences": (3, 2),
    "over the scored tokens": (3, 4),
    "summed, over sequences x max_completion_length": (3, 2 * 5),
}


@pytest.mark.parametrize("loss_type", TYPES)
def test_the_docstring_averages_as_the_code_does(loss_type):
    config = rf.LossConfig(loss_type, max_completion_length=5, **REQUIRED.get(loss_type, {}))
    mask = torch.tensor([[1, 0, 0], [1, 1, 1]])

    def loss(*advantages, normalizer=None):
        advantages = torch.tensor(advantages)
        logp = torch.full((2, 3), -2.0)  # on policy, so that every token of an advantage has the same loss
        return rf.policy_loss(logp, advantages, mask=mask, config=config, normalizer=normalizer).loss.item()

    one, three = loss(1.0, 0.0, normalizer=1), loss(0.0, 1.0, normalizer=1)
    found = three / one, three / loss(0.0, 1.0)
    assert one != 0 and found == pytest.approx(AVERAGES[docstring().averages[loss_type]])


def test_the_routes_on_the_page_are_those_of_the_calls():
    """`switches` tries every field; here two of its answers, by hand."""
    assert switches("gpg") == [s for s in switches("dapo") if "importance" not in s] and switches("kl_cov") == []
    assert len(switches("dapo")) == 6


def test_the_picture_shows_the_curves_of_today():
    """Its data, not its bytes: those change with matplotlib, its fonts and the processor's exp."""
    shown, wanted = json.loads(Image.open(PICTURE).text["Description"]), loss_curves.rounded(curves())
    for panel, ours, theirs in zip(PANELS, shown, wanted):
        for sign in SIGNS:
            assert np.allclose(ours[sign], theirs[sign], atol=2e-3), f"{panel.name}, {sign}: {AGAIN}"
    assert len(shown) == len(wanted) == len(PANELS)


def test_the_picture_is_drawn_as_it_would_be_today():
    """Where matplotlib is that of the picture: nearly all pixels are equal."""
    picture = Image.open(PICTURE)
    if matplotlib.__version__ not in picture.text["Software"]:
        pytest.skip(f"drawn with {picture.text['Software']}, here is {matplotlib.__version__}")
    today = Image.open(io.BytesIO(loss_curves.png(curves())))
    assert today.size == picture.size
    differ = np.asarray(today).astype(int) - np.asarray(picture).astype(int)
    assert (abs(differ).max(-1) > 32).mean() < 1e-4, AGAIN


@pytest.mark.parametrize("panel", PANELS, ids=lambda panel: panel.name)
def test_loss_types_of_one_panel_are_one_curve(panel):
    for advantage in SIGNS.values():
        for ratio in (0.3, 0.7, 1.0, 1.1, 1.7, 3.0):
            first, *others = (point(panel, loss_type, advantage, ratio) for loss_type in panel.loss_types)
            assert all(other == pytest.approx(first, abs=1e-6) for other in others)


@pytest.mark.parametrize("panel", PANELS, ids=lambda panel: panel.name)
def test_a_panel_shades_where_the_gradient_is_not_cut(panel):
    """Both signs have a gradient just inside the shade, and outside, if it ends there, one of them has none. cispo and
    clip_cov cut otherwise."""
    shade = loss_curves.band(panel)
    name = panel.loss_types[0]
    assert (shade is None) == (name in ("sapo", "vespo", "gpg", "kl_cov", "dro"))
    if shade is None or name in ("cispo", "clip_cov"):
        return
    for edge, outwards in zip(shade, (1 / 1.03, 1.03)):
        inside, outside = (
            [point(panel, name, a, edge * outwards**side)[1] for a in SIGNS.values()] for side in (-1, 1)
        )
        assert all(inside)
        assert 0 in outside or edge == loss_curves.RATIOS[0]


def test_the_caption_of_clip_cov_and_kl_cov():
    panels = {panel.loss_types[0]: panel for panel in PANELS}
    for ratio in (0.3, 0.94, 0.96, 1.1):
        cut = point(panels["clip_cov"], "clip_cov", 1.0, ratio)[1] == 0
        assert cut == (ratio > 0.95)
        assert point(panels["clip_cov"], "clip_cov", -1.0, ratio) == point(PANELS[0], "grpo", -1.0, ratio)
        penalty = 1 if ratio > 1 else -1
        assert point(panels["kl_cov"], "kl_cov", 1.0, ratio)[1] == pytest.approx(penalty - ratio, abs=1e-5)
        assert point(panels["kl_cov"], "kl_cov", -1.0, ratio)[1] == pytest.approx(ratio, abs=1e-5)
