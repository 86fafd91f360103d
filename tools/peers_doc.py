"""The tables of docs/peers.md, from redit_fast/losses/peers.py. Run `python -m tools.peers_doc` after changes."""

from dataclasses import fields
from pathlib import Path

from redit_fast.losses.config import LossConfig
from redit_fast.losses.peers import NOTES, PRESETS

PAGE = Path(__file__).parent.parent / "docs" / "peers.md"
MARKER = "<!-- presets -->\n"
DEFAULTS = {each.name: each.default for each in fields(LossConfig) if not each.name.startswith("_")}
KNOBS = {
    "epsilon_low": "clip below (epsilon_low)",
    "epsilon_high": "clip above (epsilon_high)",
    "dual_clip": "dual clip, A < 0",
    "delta": "two-sided clip (delta)",
    "cispo_bound": "CISPO's bounds",
    "importance": "ratio",
    "beta": "weight of KL in the loss",
    "kl": "KL form",
    "kl_ratio_correction": "KL x ratio",
    "correction": "sampler's correction",
    "correction_cap": "its upper bound",
    "correction_floor": "its lower bound",
    "entropy_coef": "weight of the entropy bonus",
    "kl_cov_coef": "kl_cov's coefficient",
}


def row(cells) -> str:
    return "| " + " | ".join(cells) + " |"


def table(header, rows) -> list[str]:
    return [row(header), "|" + "---|" * len(header), *map(row, rows), ""]


def shown(value) -> str:
    return f"`{value!r}`"


def knob(preset, name) -> str:
    """The default of a field; by loss where they differ; in brackets what the caller cannot change."""
    by_value = {}
    for loss_type, loss in preset.losses.items():
        for source, text in ((loss.options, "{}"), (loss.fixed, "[{}]")):
            if name in source:
                by_value.setdefault(text.format(shown(source[name])), []).append(loss_type)
    if not by_value:
        return "–"
    common = max(by_value, key=lambda text: len(by_value[text]))
    others = [f"{', '.join(losses)}: {text}" for text, losses in by_value.items() if text != common]
    return "; ".join([common, *others])


def differences() -> list[str]:
    presets = PRESETS.values()
    rows = [["version", "", *(preset.version for preset in presets)]]
    rows.append(["default loss", shown(DEFAULTS["loss_type"]), *(shown(preset.loss_type) for preset in presets)])
    for name, label in KNOBS.items():
        rows.append([label, shown(DEFAULTS[name]), *(knob(preset, name) for preset in presets)])
    for name, label in (("eps", "advantages: added to the deviation"), ("ddof", "advantages: ddof")):
        rows.append([label, shown({"eps": 1e-4, "ddof": 1}[name]), *(shown(p.advantages[name]) for p in presets)])
    for name, here in NOTES.items():
        rows.append([name, here, *(preset.notes[name] for preset in presets)])
    return table(["", "LossConfig()", *PRESETS], rows)


def losses(peer) -> list[str]:
    preset, alike = PRESETS[peer], {}
    for loss_type, loss in preset.losses.items():
        differs = {k: v for k, v in {**loss.options, **loss.fixed}.items() if v != DEFAULTS[k]}
        fewer = [f"{k} only {', '.join(v)}" for k, v in loss.choices.items()]
        cells = (", ".join(f"{k}={v!r}" for k, v in differs.items()), "; ".join(fewer), f"`{loss.source}`")
        alike.setdefault(cells, []).append(f"`{loss_type}`" + ("" if loss.name == loss_type else f" ({loss.name})"))
    rows = [[", ".join(names), *cells] for cells, names in alike.items()]
    sources = f"Defaults: `{preset.defaults}`. Advantages: `{preset.advantages_source}`."
    lines = [f"## {peer} {preset.version}", "", sources, ""]
    lines += table(["loss_type (there)", "differs from LossConfig() in", "restricted", "defined in"], rows)
    known = {name for each in PRESETS.values() for name in (*each.losses, *each.refused)}
    absent = sorted(known - {*preset.losses, *preset.refused, *preset.names})
    has = {name for loss in preset.losses.values() for name in (*loss.options, *loss.fixed)}
    options = (*KNOBS, "off_policy_mask_threshold", "top_entropy_quantile")
    lacks = [name for name in options if name not in has and name != "kl_cov_coef"]
    lines += ["Refused:", "", *(f"- `{loss_type}`: {why}" for loss_type, why in preset.refused.items())]
    return [*lines, f"- losses not there: {', '.join(absent)}", f"- options in no loss: {', '.join(lacks)}", ""]


def render() -> str:
    lines = [*differences(), *(line for peer in PRESETS for line in losses(peer))]
    return "\n".join(lines).rstrip() + "\n"


if __name__ == "__main__":
    text = PAGE.read_text()
    PAGE.write_text(text[: text.index(MARKER)] + MARKER + "\n" + render())
