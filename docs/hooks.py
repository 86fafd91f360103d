"""What `mkdocs build` does beside mkdocs.yml.

README.md is the site's first page, and files outside docs/ that a page links to are in the site. Pages link as they
do in the repository, by paths between its files.
"""

import re
from pathlib import Path
from posixpath import dirname, join, normpath, relpath

from griffe import Attribute, ExprCall, Extension
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parent.parent
OUTSIDE = {"README.md": "index.md"} | {name: name for name in ("CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md")}
LINK = re.compile(r"\[([^\]]*)\]\((?!http)([^)#]+)((?:#[^)]*)?)\)")


def place(path: str) -> str | None:
    """Where a file of the repository is in the site; None: it is no file."""
    if path in OUTSIDE:
        return OUTSIDE[path]
    if path.startswith("docs/"):
        return path.removeprefix("docs/")
    return f"files/{path}" if (ROOT / path).is_file() else None


def target(source: str, link: str) -> str:
    """The file of the repository that `source` links to."""
    return normpath(join(dirname(source), link))


def on_files(files: Files, config: MkDocsConfig) -> Files:
    texts = {f"docs/{file.src_uri}": file.content_string for file in files.documentation_pages()}
    texts |= {source: (ROOT / source).read_text() for source in OUTSIDE}
    linked = {target(source, link) for source, text in texts.items() for _, link, _ in LINK.findall(text)}
    for path in sorted(linked | set(OUTSIDE)):
        where = place(path)
        if where is not None and not path.startswith("docs/"):
            files.append(File.generated(config, where, abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    here = page.file.src_uri
    source = next((source for source, where in OUTSIDE.items() if where == here), f"docs/{here}")

    def moved(match: re.Match[str]) -> str:
        text, link, anchor = match.groups()
        path = target(source, link)
        if (ROOT / path).is_dir():  # a site has no listings
            return text
        return f"[{text}]({relpath(place(path) or path, dirname(here) or '.')}{anchor})"

    return LINK.sub(moved, markdown)


class Defaults(Extension):
    """Dataclass fields that functions of ours make, with a help text: the default alone is shown, or none."""

    def on_attribute_instance(self, *, attr: Attribute, **_: object) -> None:
        maker = attr.value.canonical_path.rpartition(".")[2] if isinstance(attr.value, ExprCall) else None
        if maker in ("_option", "described"):
            attr.value = attr.value.arguments[0]
        elif maker == "of_gr":  # the field of GR has it
            attr.value = None
