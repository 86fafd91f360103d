"""The claims of the ReDit and the GR paper on small tasks, by a protocol: docs/reproduction.md.

r1.py ... r4.py g1.py ... g5.py   a claim each: its arms, measures and comparisons
methods.py hooks.py               what the arms of GR's and of ReDit's claims are
claims.py     what a claim is made of, and what is wrong with one
tasks.py      the tasks: sorting.py, five.py and preferences.py, with their models, prompts, rewards and warm starts
curves.py     measures of a run, from its metrics
trials.py     which runs there are to do, with which settings
runner.py     doing them, in processes, into one JSON file a claim
saved.py      a task in files, for LoRA
statistics.py paired differences, sign tests, Holm
verdicts.py   what the runs of a claim come to
correlations.py  G2's: what a gradient's norm tells of a reward model's accuracy
page.py       the table and the pictures of docs/reproduction.md
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # --help imports no torch
    from .claims import Claim

NAMES = ("R1", "G3", "G2", "R2", "R3", "G4", "R4", "G1", "G5")  # in the order in which they are run


def claim(name: str) -> Claim:
    """Raises a ValueError where there is none of that name."""
    if name not in NAMES:
        raise ValueError(f"unknown claim {name!r}: needs one of {', '.join(NAMES)}")
    return import_module(f".{name.lower()}", __package__).CLAIM
