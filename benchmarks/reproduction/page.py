"""The results in docs/reproduction.md and README.md, between their markers, and a picture a claim. Nothing is run."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from redit_fast.pictures import BLUE, COLOURS, STYLE
from redit_fast.training import runs as files

from . import NAMES, claim, correlations, statistics, verdicts
from .claims import Claim, Curve, Experiment
from .runner import Store
from .statistics import Paired
from .trials import Runs, Trial, chosen, closed, tuning
from .verdicts import Row

PAGE, README = "reproduction.md", "README.md"
BEGIN, END = "<!-- results -->", "<!-- end of results -->"
README_BEGIN, README_END = "<!-- claims -->", "<!-- end of claims -->"
HEAD = (
    "| claim | question | the paper | here | of its comparisons | the first of them | runs | CPU hours |\n"
    "|---|---|---|---|---|---|---|---|"
)
TOLD = (
    "| runs of | measured | within runs | the step alone | its size, less the step's | within runs, at equal step "
    "| over runs, at equal step |\n|---|---|---|---|---|---|---|"
)
DETAIL = (
    "| task | arm, against | measure | pairs | middles | difference [95 %], or above/below/level | p | verdict |\n"
    "|---|---|---|---|---|---|---|---|"
)
HUES = (BLUE, *(hue for hue in COLOURS.values() if hue != BLUE))
DASHES = ("-", "--", ":")


def write(results: Path, docs: Path) -> None:
    """Puts what the results say into the page and into the README beside its folder, and draws.

    Raises:
        ValueError: a file of results is malformed, a page is not there or has no place for them.
    """
    page, readme = docs / PAGE, docs.resolve().parent / README
    stores = {name: Store(results, name).runs for name in NAMES}
    texts = {
        page: _filled(page, BEGIN, END, block(stores)),
        readme: _filled(readme, README_BEGIN, README_END, summary(stores)),
    }
    for name, runs in stores.items():
        if _has_finals(runs):
            (docs / picture(name)).write_bytes(drawn(claim(name), runs))
    for file, text in texts.items():
        files.replace(file, text)


def _filled(file: Path, begin: str, end: str, text: str) -> str:
    if not file.is_file():
        raise ValueError(f"--docs {file.parent}: has no {file.name}: needs the folder docs of a checkout")
    before = file.read_text("utf-8")
    if before.count(begin) != 1 or before.count(end) != 1:
        raise ValueError(f"{file}: needs {begin} and {end} once")
    return f"{before.partition(begin)[0]}{begin}\n{text}\n{end}{before.partition(end)[2]}"


def picture(name: str) -> str:
    return f"reproduction-{name.lower()}.png"


def summary(stores: Mapping[str, Runs]) -> str:
    """Of the README: the claims that were run, in one paragraph."""
    counted, open_ended, left = [], [], 0
    for name in stores:
        runs = _known(name, stores)
        said, found = verdicts.verdict(claim(name), runs), verdicts.deciding(claim(name), runs)
        if said == "not run":
            left += 1
        elif found and ":" not in said:
            counted.append(f"{claim(name).statement} {'/'.join(map(str, _counts(found)))}")
        else:
            open_ended.append(claim(name).statement)
    sentences = ["We try both papers' claims on [small tasks](docs/reproduction.md)."]
    if counted:
        sentences.append(f"Comparisons that hold/do not/cannot be told: {', '.join(counted)}.")
    if open_ended:
        sentences.append(f"No verdict: {', '.join(open_ended)}.")
    if left:
        sentences.append("None is run yet." if left == len(stores) else "The others are not run yet.")
    return " ".join(sentences)


def _counts(rows: Sequence[Row]) -> tuple[int, int, int]:
    """How many hold; do not hold, or make no difference; cannot be told."""
    told = [row.verdict for row in rows]
    return told.count("holds"), told.count("does not hold") + told.count("no difference"), told.count("cannot be told")


def block(stores: Mapping[str, Runs]) -> str:
    """The table of all claims and, of those with final runs, what they mean and that of their comparisons."""
    lines = [HEAD, *(_summary(name, stores) for name in stores)]
    for name, runs in stores.items():
        if tuned := _tuned(claim(name), runs):
            lines += ["", f"**{name}, what tuning chose**: {tuned}"]
        if curvatures := _curvatures(claim(name), runs):
            lines += ["", f"**{name}, curvature where half of the samples hack, over that at the start**: {curvatures}"]
        if _has_finals(runs):
            lines += ["", f"![{name}: the curves of every seed, and their means]({picture(name)})", "", DETAIL]
            lines += map(_row, verdicts.rows(claim(name), _known(name, stores)))
            lines += ["", f"**{name}, for your settings**: {_advice(claim(name), _known(name, stores))}"]
            lines += _correlated(claim(name), runs)
    return "\n".join(lines)


def _known(name: str, stores: Mapping[str, Runs]) -> Runs:
    """The results of a claim, and of the one that it comes after."""
    after = claim(name).after
    return {**(stores.get(after, {}) if after else {}), **stores[name]}


def _advice(claim: Claim, runs: Runs) -> str:
    holds, fails = claim.advice
    said = verdicts.verdict(claim, runs)
    if said == "holds in part":
        return f"where its row says that it holds, {holds} Elsewhere {fails}"
    return {"holds": holds, "does not hold": fails}.get(said, f"none: {said}.")


def _correlated(claim: Claim, runs: Runs) -> list[str]:
    """Of the arms that were probed, what goes with the reward model's accuracy."""
    lines = []
    for experiment in claim.experiments:
        for arm, curves in _curves(experiment, runs).items():
            if correlations.MEASURED[0] not in curves[0]:
                continue
            for measured in correlations.MEASURED:
                told = correlations.told(curves, measured, verdicts.LEAST)
                cells = " | ".join("-" if each is None else _interval(each) for each in told)
                lines.append(f"| {arm} ({len(curves)}) | {measured} | {cells} |")
    title = f"**{claim.name}, rank correlation with the reward model's accuracy**, mean over runs [95 %]:"
    return ["", title, "", TOLD, *lines] if lines else []


def _interval(found: Paired) -> str:
    return f"{found.mean:+.2f} [{found.low:+.2f}, {found.high:+.2f}]"


def _has_finals(runs: Runs) -> bool:
    return any(run["trial"] is None for run in runs.values())


def _summary(name: str, stores: Mapping[str, Runs]) -> str:
    asked, runs = claim(name), stores[name]
    hours = sum(run["seconds"] for run in runs.values()) / 3600
    said = verdicts.verdict(asked, _known(name, stores))
    if asked.after and verdicts.verdict(claim(asked.after), stores.get(asked.after, {})) == "holds":
        said = f"no need: {asked.after} holds"
    counts = first = "-"
    if (found := verdicts.deciding(asked, _known(name, stores))) and said != "not run":
        counts = "hold {}, do not {}, cannot be told {}".format(*_counts(found))
        row, compared = found[0], found[0].comparison
        first = f"{row.task}, {compared.arm} less {compared.against}, {compared.measure}: {_difference(row)}"
    return f"| {name} | {asked.question} | {asked.paper} | {said} | {counts} | {first} | {len(runs)} | {hours:.2f} |"


def _tuned(claim: Claim, runs: Runs) -> str:
    """The settings of the final runs, once all tuning runs are there."""
    if not any(arm.trials for experiment in claim.experiments for arm in experiment.arms):
        return ""
    if any(trial.key not in runs for trial in tuning(claim, runs)):
        return ""
    told = []
    for experiment in claim.experiments:
        if shut := closed(experiment, runs):
            told.append(f"{experiment.task} {shut}")
            continue
        for arm in experiment.arms:
            if arm.trials:
                settings = ", ".join(f"{name} {value}" for name, value in chosen(experiment, arm, runs).items())
                told.append(f"{experiment.task} {arm.name}: {settings}")
    return "; ".join(told)


def _curvatures(claim: Claim, runs: Runs) -> str:
    """Which of two tasks is sharp, by the medians over the tuning runs of plain training."""
    told = []
    for experiment in claim.experiments:
        found = [run["measures"].get("curvature of the hack") for run in runs.values()
                 if run["task"] == experiment.task and run["arm"] == "none" and run["trial"] is not None]  # fmt: skip
        if known := [value for value in found if value is not None]:
            told.append(f"{experiment.task} {median(known):.2g} ({len(known)} of {len(found)} tuning runs of none)")
    return "; ".join(told)


def _row(row: Row) -> str:
    compared = row.comparison
    left_out = f", {row.left_out} left out" if row.left_out else ""
    nothing = "never" if compared.statistic == "sign" and row.pairs else "-"
    middles = " and ".join(nothing if middle is None else f"{middle:.3g}" for middle in row.middles)
    p = "-" if row.p is None else f"{row.p:.2g}"
    kind = "" if compared.role in ("claim", "other") else f" ({'no' if compared.role == 'null' else 'planted'} effect)"
    return (
        f"| {row.task} | {compared.arm}, {compared.against}{kind} | {compared.measure} | {row.pairs}{left_out} "
        f"| {middles} | {_difference(row)} | {p} | {row.verdict} |"
    )


def _difference(row: Row) -> str:
    found = row.found
    if found is None:
        return f"fewer than {verdicts.LEAST} pairs"
    if isinstance(found, Paired):
        return f"{found.mean:+.3f} [{found.low:+.3f}, {found.high:+.3f}]"
    return f"{found.above}/{found.below}/{found.level}"


def drawn(claim: Claim, runs: Runs) -> bytes:
    """A panel for each experiment: every seed of every compared arm, thin, and their mean with its 95 % interval. An
    arm looks the same in all panels."""
    panels = {each.task: curves for each in claim.experiments if (curves := _curves(each, runs))}
    names = dict.fromkeys(name for curves in panels.values() for name in curves)
    looks = {name: (HUES[i % len(HUES)], DASHES[i // len(HUES)]) for i, name in enumerate(names)}
    with rc_context(STYLE):
        figure = Figure(figsize=(7.2, 3.4 * len(panels)), layout="constrained")
        for (task, curves), axes in zip(panels.items(), figure.subplots(len(panels), squeeze=False)[:, 0], strict=True):
            _panel(axes, f"{claim.name}, {task}", curves, looks)
        found = io.BytesIO()
        figure.savefig(found, format="png", dpi=130)
    return found.getvalue()


def _curves(experiment: Experiment, runs: Runs) -> dict[str, list[Curve]]:
    """Of each arm that a claim's comparison has, its final runs."""
    named = {name for compared in experiment.comparisons if compared.role in ("claim", "other")
             for name in (compared.arm, compared.against)}  # fmt: skip
    found = {}
    for arm in experiment.arms:
        keys = [Trial(experiment.task, arm.name, None, seed, {}).key for seed in range(experiment.seeds)]
        if arm.name in named and (curves := [runs[key]["curve"] for key in keys if key in runs]):
            found[arm.name] = curves
    return found


def _panel(axes: Axes, title: str, arms: Mapping[str, Sequence[Curve]], looks: Mapping[str, tuple[str, str]]) -> None:
    over, value = list(next(iter(arms.values()))[0])[:2]
    for name, curves in arms.items():
        hue, dash = looks[name]
        for curve in curves:
            axes.plot(curve[over], curve[value], color=hue, linestyle=dash, linewidth=0.4, alpha=0.35)
        grid = [end * k / 40 for end in [min(curve[over][-1] for curve in curves)] for k in range(41)]
        columns = [[_at(curve[over], curve[value], x) for curve in curves] for x in grid]
        means = [sum(column) / len(column) for column in columns]
        axes.plot(grid, means, color=hue, linestyle=dash, label=f"{name} ({len(curves)})")
        if len(curves) >= verdicts.LEAST:
            bands = [statistics.paired(column) for column in columns]
            axes.fill_between(grid, [b.low for b in bands], [b.high for b in bands], color=hue, alpha=0.15, linewidth=0)
    axes.set_title(title)
    axes.set_xlabel("steps' worth of generated tokens" if over == "generated" else "steps times rate / 3e-4")
    axes.set_ylabel(value)
    axes.legend(fontsize=6.5, ncols=2)


def _at(over: Sequence[float], values: Sequence[float], x: float) -> float:
    """On the straight line between the two points around x."""
    points = list(zip(over, values, strict=True))
    for (a, left), (b, right) in zip(points, points[1:], strict=False):
        if x <= b:
            return left if b == a else left + (right - left) * (max(x, a) - a) / (b - a)
    return values[-1]
