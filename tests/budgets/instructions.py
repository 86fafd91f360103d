"""How many instructions each op of csrc/cpu takes, by callgrind: instructions.cpp, compiled with the flags of setup.py
but for OpenMP, so on one thread."""

import re
import tempfile
from pathlib import Path

from tests.backends.test_compilers import OPS, names_of_setup
from tests.budgets import said
from tests.project.test_install import ROOT


def count():
    with tempfile.TemporaryDirectory() as folder:
        program, out = Path(folder, "program"), Path(folder, "out")
        sources = Path(__file__).with_suffix(".cpp"), *sorted(OPS)
        said("g++", *names_of_setup()["FLAGS"], f"-I{ROOT / 'csrc'}", *sources, "-o", program)
        said("valgrind", "--tool=callgrind", "--collect-atstart=no", f"--callgrind-out-file={out}", program)
        texts = [path.read_text() for path in sorted(Path(folder).glob("out.*"), key=lambda path: int(path.suffix[1:]))]
    found = [(re.search(r"Client Request: (.*)", text), re.search(r"totals: (\d+)", text)) for text in texts]
    return {name[1]: {"instructions": int(number[1])} for name, number in found}
