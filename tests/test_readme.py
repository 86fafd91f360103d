"""The README is true: its example runs and learns, its table is the measured one, its links lead somewhere."""

import re
from pathlib import Path

from benchmarks import cpu_table, demo_table
from examples import plain_loop
from tests.make_known_answers import table as known_answers

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def test_the_plain_loop_is_the_readmes_and_teaches_a_model():
    block = re.search(r"```python\n(.*?)```", README, re.DOTALL)[1]
    source = (ROOT / "examples" / "plain_loop.py").read_text()
    assert block.split("import redit_fast as rf\n")[1].strip() in source
    before, after = plain_loop.main()
    assert after > 2 * before


def test_the_tables_are_the_measured_ones():
    assert f"<!-- demo table -->\n{demo_table.table()}\n<!-- end of demo table -->" in README
    assert f"<!-- cpu table -->\n{cpu_table.table()}\n<!-- end of cpu table -->" in README
    assert known_answers() in (ROOT / "docs" / "noise.md").read_text()


def test_links_and_pictures_exist():
    links = [link for link in re.findall(r"\]\(([^)]+)\)", README) if not link.startswith("http")]
    assert links and all((ROOT / link).exists() for link in links)
