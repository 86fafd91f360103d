"""docs/losses.md and docs/losses.png, from LossConfig's docstring and tables, `policy_loss` and
tests/losses/kl_estimators.py. Run `python -m tools.losses_doc` after changing one of them."""

import inspect
import re
from dataclasses import fields
from pathlib import Path
from typing import Literal, NamedTuple, get_args, get_origin, get_type_hints

import redit_fast as rf
from redit_fast.losses.config import _DEFAULTS, _SPECIAL, _USED, LossType
from tests.losses import loss_curves
from tests.losses.kl_estimators import ESTIMATORS, REFERENCES, REVERSE, exact, spread
from tests.losses.loss_curves import OLD_P, OTHER_P, PANELS, SIGNS, TOKENS, point
from tools.peers_doc import table

PAGE = Path(__file__).parent.parent / "docs" / "losses.md"
PICTURE = PAGE.with_suffix(".png")
FIELDS = [each.name for each in fields(rf.LossConfig) if not each.name.startswith("_")]
REQUIRED = {"dro": {"dro_beta": 1.0}}
SHOWN_RATIOS = (0.5, 0.9, 1.0, 1.1, 3.0)

TOP = """<!-- written by python -m tools.losses_doc -->
# The losses

What `rf.LossConfig` can say, formula by formula. `rf.policy_loss` is the definition of them all, and every fused path
equals it. What other libraries mean by the same names: [peers.md](peers.md).

```python
import torch

import redit_fast as rf

logp = torch.randn(4, 6).sub(3).requires_grad_()  # of 4 completions with 6 tokens
config = rf.LossConfig("cispo", epsilon_high=0.3, beta=0.04)
found = rf.policy_loss(logp, torch.tensor([1.0, -1.0, 0.5, -0.5]), ref_logp=logp.detach() + 0.1, config=config)
found.loss.backward()
```"""

CAPTION = f"""![loss and gradient of every loss type over the ratio](losses.png)

One token's loss and its derivative, by `policy_loss` and autograd, over the token's ratio r; the old probability is
{OLD_P}, A is 1 or -1, options are in brackets, the rest are defaults. Curves that leave a panel go on. Where sg hides a
factor, the height of l says nothing; the gradient is what trains.

- gspo, gspo_token, gmpo: the token is one of {TOKENS} in its sequence, the others stay at ratio 1, and the derivative
  is times {TOKENS}, against the mean. rloo and vespo: r is the sequence's own ratio.
- clip_cov, kl_cov: beside two tokens of probability {OTHER_P} with A = 0 and ratio 1. With A > 0 the token's covariance
  is the largest, and from r = 0.95 above clip_cov_lb; with A < 0 it is neither.
- dppo_tv, dppo_kl: shaded is where both signs are trusted. cispo: every ratio here is above its bound of 0.2."""

ROUTES = """## Routes

{} It then needs three products with the head instead of four (`linear_grpo_loss`); `LossOutput.route` says which it
was. Options that turn fused into logp:"""

KL = """## KL estimators

The KL term sees one sampled token, with d = logp - ref. Value and gradient are two questions: autograd differentiates
the sample's own estimate and not the policy that drew the sample, unless the ratio r brings it in. All of it is per
token, given its prefix: what a token does to those after it is in no row. The rows with r are for the token's ratio.

- **Right in both: k1 and k3 with the ratio.** On policy the gradient of k3 with the ratio is that of k2 alone, sample
  by sample; k1 with the ratio adds grad logp to it, which has mean 0 and is noise.
- k1 alone has a gradient of mean 0: no penalty at all. k3 alone has that of the forward KL. k2 alone has, on policy,
  the right gradient and another value.
- With the ratio the gradient is that of the estimator's own mean, whatever the estimator.
- A small spread is no property of k3: near the reference its value is quieter than k1's, far away it is not."""

KL_CAPTION = """Means are over samples of pi itself; "off policy": whether both stay where an older policy drew them.
Spread: the standard deviation of one sample, divided by KL (value) and by the length of KL's gradient (gradient),
exact, for a policy of five tokens and a reference near it / far from it (KL {}).
`tests/losses/test_kl_estimators.py` proves every entry with a million samples to 3 standard errors, and that
what is called biased is."""


class Entry(NamedTuple):
    sources: dict[str, str]  # by loss type
    formula: str


class Docstring(NamedTuple):
    """LossConfig's, in its parts; every paragraph one line."""

    notation: str
    averages: dict[str, str]  # loss type -> how the losses of the tokens are averaged
    entries: list[Entry]
    ties: str
    args: dict[str, str]  # "name, name" -> meaning
    raises: dict[str, str]


def docstring() -> Docstring:
    _, notation, averages, entries, ties, args, raises = inspect.getdoc(rf.LossConfig).split("\n\n")
    by_loss = {}
    for line in re.split(r"^- ", averages, flags=re.M)[1:]:
        how, names = flat(line).rstrip(".;").rsplit(": ", 1)
        by_loss.update(dict.fromkeys(names.split(", "), how))
    source = r"(\w+) \(([^)]*)\)"
    types = [re.fullmatch(rf"((?:{source}(?:, )?)+): (.*)", line) for line in items(entries)]
    return Docstring(
        flat(notation),
        by_loss,
        [Entry(dict(re.findall(source, found[1])), found[4]) for found in types],
        flat(ties),
        dict(line.split(": ", 1) for line in items(args)),
        dict(line.split(": ", 1) for line in items(raises)),
    )


def items(block: str) -> list[str]:
    """The entries of a section "Title:\\n    entry\\n        its second line\\n"."""
    return [flat(each) for each in re.split(r"\n    (?=\S)", block)[1:]]


def flat(text: str) -> str:
    return " ".join(text.split())


def markdown(text: str) -> str:
    """Signs that Markdown would read, escaped; papers as links."""
    text = re.sub(r"[*|]|(?<!\w)_", lambda found: "\\" + found[0], text)
    return re.sub(r"(?:arXiv )?(\d{4}\.\d{5})", r"[\1](https://arxiv.org/abs/\1)", text)


def code(name: str, value: object) -> str:
    return f"`{name}={value!r}`".replace("'", '"')


def config(loss_type: str, **options) -> rf.LossConfig:
    return rf.LossConfig(loss_type, **{**REQUIRED.get(loss_type, {}), **options})


def own_fields(loss_type: str) -> str:
    required = REQUIRED.get(loss_type, {})
    names = [name for name in FIELDS if name in _USED[loss_type]]
    return ", ".join(f"`{name}` (required)" if name in required else code(name, _DEFAULTS[name]) for name in names)


def switches(loss_type: str) -> list[str]:
    """The options that take the loss to another route, found by trying."""
    found = []
    for name, hint in get_type_hints(rf.LossConfig).items():
        choice = get_origin(hint) is Literal
        for value in get_args(hint) if choice else (True, 0.5, 7, 7.0):
            try:
                switched = config(loss_type, **{name: value}).route != config(loss_type).route
            except (TypeError, ValueError, NotImplementedError):
                continue
            text = code(name, value) if choice else f"`{name}`"
            if switched and name != "loss_type" and text not in found:
                found.append(text)
    return found


def formulas(text: Docstring) -> list[str]:
    names = (", ".join(f"**{name}**" for name in entry.sources) for entry in text.entries)
    return [f"- {name}: {markdown(entry.formula)}" for name, entry in zip(names, text.entries, strict=True)]


def loss_types(text: Docstring) -> list[str]:
    sources = {name: source for entry in text.entries for name, source in entry.sources.items()}
    rows = [
        [f"`{name}`", markdown(source), text.averages[name], config(name).route, own_fields(name)]
        for name, source in sources.items()
    ]
    return table(["loss_type", "paper", "averaged", "route", "fields of its own, with defaults"], rows)


def routes() -> list[str]:
    fused = {name: switches(name) for name in get_args(LossType) if config(name).route == "fused"}
    options = [option for option in next(iter(fused.values())) if all(option in each for each in fused.values())]
    lines = [f"- of all: {', '.join(options)}"]
    for option in dict.fromkeys(option for each in fused.values() for option in each if option not in options):
        lines.append(f"- of {', '.join(name for name, each in fused.items() if option in each)}: {option}")
    return lines


def options(text: Docstring) -> list[str]:
    rows = []
    for names, meaning in text.args.items():
        names = names.split(", ")
        if meaning.startswith("above"):
            continue
        of = [name for name in get_args(LossType) if names[0] in _USED[name]] if names[0] in _SPECIAL else ["all"]
        defaults = ", ".join(code(name, _DEFAULTS[name]) for name in names)
        rows.append([defaults, markdown(meaning), ", ".join(of)])
    return table(["field and default", "meaning", "loss types"], rows)


def slopes() -> list[str]:
    rows = []
    for panel in PANELS:
        values = [point(panel, panel.loss_types[0], a, r)[1] for a in SIGNS.values() for r in SHOWN_RATIOS]
        rows.append([panel.name, *(f"{value:.2f}".replace("-0.00", "0.00") for value in values)])
    return table(["dl/dlogp at r =", *(f"{sign}: {r:g}" for sign in SIGNS for r in SHOWN_RATIOS)], rows)


def estimators() -> list[str]:
    def yes(flag: bool) -> str:
        return "yes" if flag else "no"

    def noise(row, which: int) -> str:
        scales = ((abs(value), gradient.norm()) for value, gradient in (exact(REVERSE, name) for name in REFERENCES))
        return " / ".join(
            f"{spread(row, name)[which] / scale[which]:.2g}" for name, scale in zip(REFERENCES, scales, strict=True)
        )

    rows = [
        [f"`{row.kl}`", yes(row.ratio), row.value, yes(row.unbiased_value), yes(row.at_least_0), row.gradient,
         yes(row.unbiased_gradient), "both stay" if row.off_policy else "neither stays", noise(row, 0), noise(row, 1)]
        for row in ESTIMATORS
    ]  # fmt: skip
    header = ["kl", "x r", "mean of the value", f"unbiased for {REVERSE}", "≥ 0", "mean of the gradient: that of",
              "unbiased for its gradient", "off policy", "spread of the value", "of the gradient"]  # fmt: skip
    return table(header, rows)


def render() -> str:
    text = docstring()
    distances = " / ".join(f"{exact(REVERSE, name)[0]:.2g}" for name in REFERENCES)
    lines = [TOP, "", markdown(text.notation.removesuffix(" It is averaged")), "", *formulas(text), ""]
    lines += [markdown(text.ties), "", CAPTION, "", *slopes(), "## Loss types", "", *loss_types(text)]
    lines += [ROUTES.format(rf.LossConfig.route.__doc__.strip()), "", *routes(), "", "## Fields", "", *options(text)]
    lines += [f"- {name}: {markdown(why)}" for name, why in text.raises.items()]
    lines += ["", KL, "", *estimators(), KL_CAPTION.format(distances)]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    PAGE.write_text(render())
    PICTURE.write_bytes(loss_curves.png(loss_curves.curves()))
