"""docs/metrics.md describes the lines that runs write: every key, no other one, under the schema that they carry."""

import re

from redit_fast.training import config_file, runs
from redit_fast.training.trainer import train
from tests import ROOT
from tests.training.jobs import lines_of

PAGE = (ROOT / "docs" / "metrics.md").read_text()
TABLE = [row.split(" | ")[0] for row in PAGE.splitlines() if row.startswith("| `")]
DOCUMENTED = {key for cell in TABLE for key in re.findall(r"`([^`]+)`", cell)}


def keys_of(lines):
    return {re.sub(r"^rewards/.*/", "rewards/NAME/", key) for line in lines for key in line}


def test_every_key_that_is_written_is_on_the_page_and_the_other_way_round(settings, tmp_path):
    seen = set()
    own = (
        {"sharpness_every": 1, "gr_gamma": 0.0, "beta": 0.1},
        {"eval_samples": 2},
        {"dynamic_sampling": 1, "correction": "token_mask"},
    )
    for loss_type, more in zip(("dapo", "cispo", "vespo"), own):  # dapo has the keys of every loss that clips
        train(config_file.load(overrides={**settings, "loss_type": loss_type, "name": loss_type, "steps": 1, **more}))
        start, first = lines_of(tmp_path / loss_type / "metrics.jsonl")
        seen |= keys_of([start, first])
        assert all(
            key in ("schema", "step", "step_time") or key.startswith("time/") or "held_out" in key for key in start
        )
        assert start["schema"] == first["schema"] == runs.SCHEMA
    # Of a GPU, of several ranks (test_ranks.py), of a server (test_engines.py).
    not_here = {"flops/share_of_peak", "tokens/rank_max_over_mean", "time/sync", "sampling/steps_behind"}
    assert seen | not_here == DOCUMENTED


def test_what_gamma_above_0_brings_is_marked(settings, tmp_path):
    train(config_file.load(overrides={**settings, "gr_gamma": 0.0, "steps": 1}))
    seen = keys_of(lines_of(tmp_path / "run" / "metrics.jsonl"))
    rows = [row for row in PAGE.splitlines() if "with `gr_gamma` above 0" in row]
    marked = {key for row in rows for key in re.findall(r"`([^`]+)`", row.split(" | ")[0])}
    assert marked == {key for key in DOCUMENTED - seen if key.startswith("gr/")}


def test_the_page_tells_the_schema():
    assert f"This is schema {runs.SCHEMA}:" in PAGE and f"| `schema` | {runs.SCHEMA} |" in PAGE
