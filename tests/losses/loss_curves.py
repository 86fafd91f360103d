"""The curves of docs/losses.png: every loss over a token's ratio, by `policy_loss` and autograd."""

from __future__ import annotations

import io
import json
import math
from typing import NamedTuple

import torch
from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.ticker import FixedFormatter, FixedLocator, NullLocator

import redit_fast as rf
from redit_fast.losses.terms import dppo_trusts
from redit_fast.pictures import BLUE, ORANGE, STYLE

OLD_P = 0.2
OTHER_P = 0.02
TOKENS = 4
RATIOS = [4 ** (i / 79) for i in range(-79, 80)]  # 1/4 to 4, with 1 itself and no other bound of a loss
SIGNS = {"A > 0": 1.0, "A < 0": -1.0}
COLOURS = {"A > 0": BLUE, "A < 0": ORANGE}  # told apart with any colour vision
BAND, AXIS = "#e6e9ec", "#9aa1a8"
LOCAL = {"font.size": 9, "axes.titlepad": 5, "axes.grid": False, "axes.spines.left": False, "axes.spines.bottom": False,
         "xtick.major.size": 2, "ytick.major.size": 2}  # fmt: skip


class Panel(NamedTuple):
    """Loss types that are one curve, and the surroundings of the token whose ratio moves."""

    loss_types: tuple[str, ...]
    others: str = "none"  # "sequence": TOKENS - 1 of its own, at ratio 1; "batch": two of OTHER_P, with A = 0
    options: dict = {}
    note: str = ""

    def config(self, loss_type: str) -> rf.LossConfig:
        return rf.LossConfig(loss_type, **self.options)

    @property
    def name(self) -> str:
        return ", ".join(self.loss_types) + (f" ({self.note})" if self.note else "")


PANELS = [
    Panel(("grpo", "bnpo", "dr_grpo", "dapo", "luspo")),
    Panel(("dapo",), options={"dual_clip": 2.0}, note="dual_clip 2"),
    Panel(("gspo", "gspo_token"), "sequence"),
    Panel(("gmpo",), "sequence"),
    Panel(("rloo",)),
    Panel(("cispo",)),
    Panel(("cispo",), options={"cispo_bound": "relative"}, note="relative"),
    Panel(("sapo",)),
    Panel(("vespo",)),
    Panel(("gpg", "reinforce")),
    Panel(("dppo_tv",)),
    Panel(("dppo_kl",)),
    Panel(("clip_cov",), "batch"),
    Panel(("kl_cov",), "batch"),
    Panel(("dro",), options={"dro_beta": 1.0}, note="dro_beta 1"),
]


def point(panel: Panel, loss_type: str, advantage: float, ratio: float) -> tuple[float, float]:
    """The token's loss l, and its derivative by the token's log-prob; in a sequence times TOKENS, against the mean."""
    old = torch.full((1, 1), math.log(OLD_P))
    moved = old + math.log(ratio)
    advantages = torch.full((1,), advantage)
    if panel.others == "sequence":
        old = old.expand(1, TOKENS)
        moved = torch.cat([moved, old[:, 1:]], 1)
    elif panel.others == "batch":  # at ratio 1 with A = 0: they add nothing of their own
        beside = torch.full((2, 1), math.log(OTHER_P))
        old, moved = torch.cat([old, beside]), torch.cat([moved, beside])
        advantages = torch.tensor([advantage, 0.0, 0.0])
    logp = moved.requires_grad_()
    loss = rf.policy_loss(logp, advantages, old_logp=old, config=panel.config(loss_type), normalizer=1.0).loss
    loss.backward()
    return loss.item(), logp.grad[0, 0].item() * logp.shape[1]


def curves() -> list[dict[str, list[tuple[float, float]]]]:
    """For each panel and sign of A: (l, dl/dlogp) at each of RATIOS."""
    return [
        {sign: [point(panel, panel.loss_types[0], a, r) for r in RATIOS] for sign, a in SIGNS.items()}
        for panel in PANELS
    ]


def band(panel: Panel) -> tuple[float, float] | None:
    """The token's ratios between the bounds, for both signs of A."""
    config = panel.config(panel.loss_types[0])
    low, high = config.clip_range
    if config.loss_type == "gmpo":
        return math.exp(low), math.exp(high)
    if config.loss_type.startswith("dppo"):
        old = torch.full((len(RATIOS),), math.log(OLD_P))
        logp = old + torch.tensor(RATIOS).log()
        trusted = [dppo_trusts(config, logp, old, torch.full_like(old, a)) for a in SIGNS.values()]
        inside = [ratio for ratio, *flags in zip(RATIOS, *trusted) if all(flags)]
        return inside[0], inside[-1]
    if config.loss_type in ("sapo", "vespo", "gpg", "kl_cov", "dro"):
        return None
    if panel.others == "sequence":
        return low**TOKENS, high**TOKENS
    return max(low, 0.0), high


def figure(found) -> Figure:
    """Five panels a row, l above its derivative."""
    drawn, columns = Figure(figsize=(10, 11), layout="constrained"), 5
    drawn.get_layout_engine().set(w_pad=0.03, h_pad=0.03, hspace=0.0, wspace=0.04)
    for row, strip in enumerate(drawn.subfigures(len(PANELS) // columns, 1, height_ratios=[1.045, 1, 1])):
        grid = strip.subplots(2, columns, sharex=True, sharey="row", height_ratios=[7, 5.2])
        for column, pair in enumerate(grid.T):
            number = row * columns + column
            panel, shade = PANELS[number], band(PANELS[number])
            pair[0].set_title(title(panel))
            for which, axes in enumerate(pair):
                axes.axhline(0, color=AXIS, linewidth=0.7)
                axes.axvline(1, color=AXIS, linewidth=0.7)
                if shade and shade[1] > RATIOS[0]:
                    axes.axvspan(max(shade[0], RATIOS[0]), min(shade[1], RATIOS[-1]), color=BAND, linewidth=0)
                for sign, points in found[number].items():
                    axes.plot(RATIOS, [p[which] for p in points], color=COLOURS[sign])
        loss, slope = grid[:, 0]
        loss.set_ylabel("loss l")
        slope.set_ylabel("dl / dlogp")
        loss.set_xscale("log", base=2)
        loss.set_xlim(RATIOS[0], RATIOS[-1])
        loss.set_ylim(-3.5, 3.5)
        loss.set_yticks([-2, 0, 2])
        slope.set_ylim(-2.6, 2.6)
        slope.set_yticks([-2, -1, 0, 1, 2])
        slope.xaxis.set_major_locator(FixedLocator([0.5, 1, 2, 4]))
        slope.xaxis.set_major_formatter(FixedFormatter(["1/2", "1", "2", "4"]))
        slope.xaxis.set_minor_locator(NullLocator())
        strip.align_ylabels(grid[:, 0])
        for axes in grid[1]:
            axes.set_xlabel("r", labelpad=0)
        for axes in grid[:, 1:].flat:
            axes.tick_params(axis="y", length=0)
        for axes in grid[0]:
            axes.tick_params(axis="x", length=0)
        if row == 0:
            loss.text(0.27, 1.0, "A < 0", color=COLOURS["A < 0"], weight="bold")
            loss.text(1.3, -1.75, "A > 0", color=COLOURS["A > 0"], weight="bold")
            loss.text(1.3, -3.2, "clip range", color="#6b737b")
    return drawn


def title(panel: Panel) -> str:
    """In at most two lines."""
    if len(panel.loss_types) > 2:
        half = len(panel.loss_types) // 2 + 1
        return ", ".join(panel.loss_types[:half]) + ",\n" + ", ".join(panel.loss_types[half:])
    return panel.name


def png(found) -> bytes:
    """The picture, with the curves that it shows as its description (its bytes are matplotlib's and freetype's)."""
    with rc_context({**STYLE, **LOCAL}):
        picture = io.BytesIO()
        figure(found).savefig(picture, format="png", dpi=150, metadata={"Description": json.dumps(rounded(found))})
    return picture.getvalue()


def rounded(found) -> list:
    return [{sign: [[round(v, 4) for v in p] for p in points[::4]] for sign, points in each.items()} for each in found]
