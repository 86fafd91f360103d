"""Measures of a run, from its lines of metrics."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial

from redit_fast.training.config import TrainConfig

from .claims import Curve, Lines, Measures

LAST = 5  # evaluations, whose mean is the final level
WINDOW = 10  # steps, over whose samples a share is taken: 1280
LEVELS = (0.6, 0.7)  # of the judge's mean, at which the truth is read
DEVIATIONS = (1.0, 2.0)  # of the start policy's rewards by the reward model, at which the gold reward is read
RATE = 3e-4  # a step at another learning rate counts in proportion to it


def success(reward: str, lines: Lines, config: TrainConfig) -> Curve:
    """The held-out mean of a reward over what was generated until then, in steps' worth of tokens: as many as a step
    has whose completions are all as long as they may be."""
    worth = config.prompts_per_step * config.group_size * config.max_completion_length
    generated, found = 0.0, Curve(generated=[], success=[])
    for line in lines:
        generated += line.get("tokens/generated") or 0
        value = line.get(f"rewards/{reward}/held_out")
        if value is not None:
            found["generated"].append(generated / worth)
            found["success"].append(value)
    return found


def learning(reward: str, lines: Lines, config: TrainConfig) -> Measures:
    """How soon a reward is got, and what the gradient does meanwhile."""
    curve = success(reward, lines, config)
    over, values = curve["generated"], curve["success"]
    final = sum(values[-LAST:]) / len(values[-LAST:])
    norms = sorted(line["grad_norm"] for line in lines if line.get("grad_norm") is not None)
    found: Measures = {
        "mean success": mean_until(over, values, config.steps),
        "steps to 50 %": first_at(over, values, 0.5),
        "steps to 90 %": first_at(over, values, 0.9),
        "success at the start": values[0],
        "success at the end": final,
        "takes off": float(final >= 0.5),
        "steps without gradient": sum(norm == 0 for norm in norms) / len(norms),
    }
    return found | {f"gradient norm p{p}": norms[p * (len(norms) - 1) // 100] for p in (10, 50, 90)}


def mean_until(over: Sequence[float], values: Sequence[float], end: float) -> float:
    """The mean of a curve of straight lines over [over[0], end]; after its last point it stays what it is."""
    points = [*zip(over, values, strict=True), (max(end, over[-1]), values[-1])]
    area = 0.0
    for (a, left), (b, right) in zip(points, points[1:], strict=False):
        if a >= end or b == a:
            continue
        stop = min(b, end)
        area += (stop - a) * (left + (right - left) * (stop - a) / (b - a) / 2)
    return area / (end - over[0])


def first_at(over: Sequence[float], values: Sequence[float], level: float) -> float | None:
    """Where a curve is first at a level or above."""
    return next((at for at, value in zip(over, values, strict=True) if value >= level), None)


def sampled(rewards: Sequence[str], lines: Lines, config: TrainConfig) -> Curve:
    """Means of rewards over the last steps' samples, each before its step's update."""
    steps = [line for line in lines if line["step"]]
    found = Curve(progress=[(line["step"] - 1) * config.learning_rate / RATE for line in steps])
    return found | {name: smooth([line[f"rewards/{name}/mean"] for line in steps]) for name in rewards}


hacking = partial(sampled, ("right", "judge", "hacked"))


def drifting(lines: Lines, config: TrainConfig) -> Curve:
    """At the steps that were probed: means over the last steps' samples, and what the probe found. The signal is of
    advantages of size 1 as it is, the curvature over the mean deviation of a group's rewards, which they have here."""
    probed = [line for line in lines if line.get("sharpness/signal") is not None]
    whole = sampled(("gold", "proxy", "agrees", "wins"), lines, config)
    found = {name: [values[line["step"] - 1] for line in probed] for name, values in whole.items()}
    signal = [line["sharpness/signal"] for line in probed]
    return found | {
        "signal": signal,
        "curvature": [line["sharpness/curvature"] / line["reward_std"] for line in probed],
    }


def smooth(values: Sequence[float]) -> list[float]:
    """The mean of the last WINDOW."""
    return [sum(part) / len(part) for part in (values[max(0, i + 1 - WINDOW) : i + 1] for i in range(len(values)))]


def gaming(lines: Lines, config: TrainConfig) -> Measures:
    """What the truth is worth where the proxy is at fixed levels, and when the hack takes over."""
    curve = hacking(lines, config)
    truth = curve["right"]
    at = {f"right at proxy {level:g}": _where(curve["judge"], truth, level) for level in LEVELS}
    half = first_at(curve["progress"], curve["hacked"], 0.5)
    before, after = lines[0]["rewards/right/held_out"], lines[-1]["rewards/right/held_out"]
    best = max(truth)
    ratios = [line["gr/penalty_ratio"] for line in lines if line.get("gr/penalty_ratio") is not None]
    bends = curvatures(lines, config)
    late = [bend for at, bend in bends if half is not None and at >= half]
    return {
        **at,
        "right at the proxies": sum(value or 0.0 for value in at.values()) / len(at),
        "progress to half hacked": half,
        "right at the start": before,
        "right at the end": after,
        "hacked at the end": lines[-1]["rewards/hacked/held_out"],
        "halved": float(truth[-1] <= best / 2),
        "penalty ratio": sum(ratios[:20]) / len(ratios[:20]) if ratios else None,
        "curvature of the hack": late[0] / bends[0][1] if late and bends[0][1] else None,
    }


def curvatures(lines: Lines, config: TrainConfig) -> list[tuple[float, float]]:
    """(progress, curvature over the share of groups that are not dead), of the steps that were probed. A dead group
    adds nothing to the loss, and the others' advantages have about the same size."""
    found = []
    for line in lines:
        bend, alive = line.get("sharpness/curvature"), 1 - (line.get("frac_reward_zero_std") or 0.0)
        if bend is not None and alive > 0:
            found.append(((line["step"] - 1) * config.learning_rate / RATE, bend / alive))
    return found


def drifted(lines: Lines, config: TrainConfig) -> Measures:
    """What the gold reward is worth where the reward model's is at fixed levels and at the end, in deviations of the
    start policy's; and how large the gradient is in the second half of the run."""
    curve = sampled(("gold", "proxy", "agrees"), lines, config)
    gold = curve["gold"]
    at = {f"gold at proxy {level:g}": _where(curve["proxy"], gold, level) for level in DEVIATIONS}
    signal = drifting(lines, config)["signal"]
    late = signal[len(signal) // 2 :]
    return {
        **at,
        "gold at the end": lines[-1]["rewards/gold/held_out"],
        "wins at the end": lines[-1]["rewards/wins/held_out"],
        "accuracy at the start": curve["agrees"][0],
        "accuracy at the end": curve["agrees"][-1],
        "lost": float(max(gold) - gold[-1] >= 0.5),
        "gradient norm": math.sqrt(max(0.0, sum(late) / len(late))) if late else None,
    }


def _where(proxy: Sequence[float], truth: Sequence[float], level: float) -> float | None:
    return next((value for paid, value in zip(proxy, truth, strict=True) if paid >= level), None)


def thinned(curve: Curve, points: int = 41) -> Curve:
    """As few points as a picture needs, the first and the last among them, of four digits."""
    count = len(next(iter(curve.values())))
    kept = sorted({round(i * (count - 1) / (points - 1)) for i in range(points)})
    return {name: [float(f"{values[i]:.4g}") for i in kept] for name, values in curve.items()}
