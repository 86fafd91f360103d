"""A run in numbers: its closing table, the time of its phases, what it was made with."""

from __future__ import annotations

import platform
import subprocess
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from redit_fast import __version__


def totals(metrics: Sequence[dict]) -> dict:
    """What a run's lines come to, under the names of its summary; None is what they do not tell."""
    accuracy = [row["accuracy/held_out"] for row in metrics if "accuracy/held_out" in row]
    passed = [row[key] for row in metrics if (key := "accuracy/held_out_pass_at_k") in row]
    times = _times(metrics)
    tokens = sum(row.get("tokens/generated") or 0 for row in metrics)
    return {
        "pass_at_k_before": passed[0] if passed else None,
        "pass_at_k_after": passed[-1] if passed else None,
        "accuracy_before": accuracy[0] if accuracy else None,
        "accuracy_after": accuracy[-1] if accuracy else None,
        "tokens_generated": tokens,
        "tokens_per_second": tokens / times["rollout"] if times.get("rollout") else None,
        "seconds": sum(times.values()) or None,
        "time": times,
    }


def closing_rows(summary: dict, then: str = "after RL") -> list[tuple[str, str]]:
    """The closing table of a run, (what, value), from its summary; what the summary lacks is left out."""

    def known(*names: str) -> bool:
        return all(summary.get(name) is not None for name in names)

    table = []
    if known("accuracy_before"):
        table.append(("Held-out accuracy before RL", f"{summary['accuracy_before']:.1%}"))
    if known("accuracy_after"):
        table.append((f"Held-out accuracy {then}", f"{summary['accuracy_after']:.1%}"))
    if known("accuracy_before", "accuracy_after"):
        table.append(("Gain", f"{100 * (summary['accuracy_after'] - summary['accuracy_before']):+.1f} points"))
    samples = summary.get("eval_samples") or 1
    if known("pass_at_k_before", "pass_at_k_after"):
        before, after = summary["pass_at_k_before"], summary["pass_at_k_after"]
        table.append((f"Held-out pass@{samples} before and {then}", f"{before:.1%}, {after:.1%}"))
    if known("eval_problems"):
        answered = "answered greedily" if samples == 1 else f"{samples} sampled answers each"
        table.append((f"Held-out problems, {answered}", f"{summary['eval_problems']:,}"))
    if known("steps"):
        table.append(("RL steps", f"{summary['steps']:,}"))
    if known("tokens_generated", "tokens_per_second"):
        tokens, rate = summary["tokens_generated"], summary["tokens_per_second"]
        table.append(("Tokens generated", f"{tokens:,.0f} ({rate:,.0f}/s of rollout)"))
    if known("seconds"):
        table.append(("Time", duration(summary["seconds"])))
    return table


def _times(metrics: Sequence[dict]) -> dict[str, float]:
    """Seconds of each phase over all lines, the longest first."""
    names = dict.fromkeys(key for row in metrics for key in row if key.startswith("time/"))
    times = {name.removeprefix("time/"): sum(row.get(name) or 0.0 for row in metrics) for name in names}
    return dict(sorted(times.items(), key=lambda phase: -phase[1]))


def environment() -> dict:
    """{"commit": of the checkout that this package runs from or None, "versions": {package: version}}."""
    here, commit = Path(__file__).resolve().parents[3], None
    if (here / ".git").exists():
        git = ["git", "-C", str(here), "describe", "--always", "--dirty", "--abbrev=40"]
        try:
            commit = subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
        except (OSError, subprocess.CalledProcessError):  # no git, or a repository without a commit
            pass
    versions = {"redit-fast": __version__, "python": platform.python_version()}
    for package in ("torch", "transformers", "triton"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            pass
    return {"commit": commit, "versions": versions}


def duration(seconds: float) -> str:
    minutes, seconds = divmod(seconds, 60)
    hours, minutes = divmod(int(minutes), 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {seconds:.0f} s" if minutes else f"{seconds:.1f} s"
