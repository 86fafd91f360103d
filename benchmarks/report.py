"""Pictures, tables as text and one page that needs nothing else, from stored results."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from . import plots, table

CAPTIONS = {
    "time.png": "Time over the number of scored rows R, with the floor that bytes and operations set",
    "memory.png": "Memory that one call adds over R",
    "growth.png": "Time over the other sizes",
    "steps.png": "Whole steps of training: rollout, scoring (rewards, advantages, reference) and update",
    "roofline.png": "Share of the roofline: the least time that bytes and operations take here, over the time measured",
}


def write(results: Mapping[str, Any], folder: Path) -> None:
    """tables.txt, the PNG files and report.html."""
    pictures = plots.draw(results)
    for name, content in pictures.items():
        (folder / name).write_bytes(content)
    (folder / "tables.txt").write_text(text(results))
    (folder / "report.html").write_text(page(results, pictures))


def text(results: Mapping[str, Any]) -> str:
    parts = [table.machine(results["machine"], results["speeds"]), table.legend()]
    parts += [table.of(stored) for stored in results["tables"] if not stored["axis"]]
    ranks = [stored for stored in results["tables"] if stored["suite"] == "ranks"]
    if ranks:
        parts.append(table.dealt(ranks))
    if results["growth"]:
        parts.append(table.growth(results["growth"]))
    return "\n\n".join(parts) + "\n"


def page(results: Mapping[str, Any], pictures: Mapping[str, bytes]) -> str:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    environment.filters |= {"number": table.number, "power": table.power, "shares": table.shares}
    images = [
        (CAPTIONS[name], f"data:image/png;base64,{base64.b64encode(content).decode()}")
        for name, content in pictures.items()
    ]
    return environment.get_template("report.html.j2").render(
        results=results,
        card=table.machine(results["machine"], results["speeds"]),
        legend=table.legend(),
        tables=[stored for stored in results["tables"] if not stored["axis"]],
        ranks=[stored for stored in results["tables"] if stored["suite"] == "ranks"],
        about_ranks=table.DEALT,
        images=images,
        warnings=[said for stored in results["tables"] for said in table.warnings(stored)],
    )
