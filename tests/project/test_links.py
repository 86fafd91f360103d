"""Every page leads on: its links and pictures exist, and each page is found from the README."""

import re

import pytest

from tests import ROOT
from tests.project.pages import PAGES, README, linked


@pytest.mark.parametrize("page", PAGES)
def test_links_and_pictures_exist(page):
    for file, anchor in linked(page):
        target = ROOT / file
        assert target.exists(), file
        if anchor:
            headings = re.findall(r"^#+ (.*)$", target.read_text(), re.M)
            assert anchor in {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}, anchor


@pytest.mark.parametrize("page", [page for page in PAGES if page.startswith("docs/")])
def test_a_page_links_onward(page):
    others = {file for file, _ in linked(page)} & set(PAGES) - {page, "README.md"}
    assert others, "a reader who has read it is told where to go on"


def test_every_page_is_in_the_readmes_index():
    index = README.split("## Documentation")[1]
    assert [page for page in PAGES if page != "README.md" and f"]({page})" not in index] == []
