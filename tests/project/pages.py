"""The pages: README.md, what else a newcomer reads at the root, and docs/."""

import os
import re

from tests import ROOT

NAMES = ["README.md", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md"]
PATHS = [*(ROOT / name for name in NAMES), *sorted((ROOT / "docs").rglob("*.md"))]
PAGES = {str(path.relative_to(ROOT)): path.read_text() for path in PATHS}  # path from the root -> text
README = PAGES["README.md"]


def fenced(language, text):
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


def linked(page):
    """(file or folder of the repository, anchor) of each of the page's links that stay in it."""
    for link in re.findall(r"\]\(([^)]+)\)", PAGES[page]):
        if not link.startswith("http"):
            file, _, anchor = link.partition("#")
            yield os.path.normpath(os.path.join(os.path.dirname(page), file)) if file else page, anchor
