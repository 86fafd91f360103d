"""The process behind the reward `math`: math-verify, and nothing of this package. `math_answer` starts this file.

A question is [gold, text, tagged] as JSON; `tagged` says that the text is what was between answer tags. The answer is
one of `ANSWERS`' keys in `math_answer`.
"""

from __future__ import annotations

import json
import re
import resource
import sys
import time
from multiprocessing.connection import Connection

MEMORY = 2 << 30  # bytes of address space; math-verify and sympy take 0.3 GB of it
CPU = 15  # seconds for a question, beyond the parent's deadline: should the parent be gone, this ends the process
# 1,234 and $18, which LaTeX would read as a list and as the end of a formula.
_AMOUNT = re.compile(r"([-+]?)\$?((?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)(?:\.[0-9]+)?)(\\?%)?")
_FORMULA = re.compile(r"\\boxed|\\\(|\\\[|\$")
_WORDS = re.compile(r"(?<![\\A-Za-z{])[A-Za-z]{3,}")  # a sentence, in which math-verify finds the answer


def verdict(gold: str, text: str, tagged: bool) -> bytes:
    from math_verify import parse, verify

    right = parse(as_formula(gold), parsing_timeout=None)
    if not right:
        return b"no gold"
    found = parse(as_formula(text) if tagged and not _WORDS.search(text) else text, parsing_timeout=None)
    return b"right" if verify(right, found, timeout_seconds=None) else b"wrong"


def as_formula(text: str) -> str:
    """Between dollar signs, unless it has formulas in it already."""
    text = text.strip()
    if amount := _AMOUNT.fullmatch(text):
        sign, number, percent = amount.groups("")
        return f"${sign}{number.replace(',', '')}{percent}$"
    return text if _FORMULA.search(text) else f"${text}$"


def _limit() -> None:
    """Of what the text of a completion may come to: memory, no core dumps, and neither files nor processes."""
    for kind, most in (("RLIMIT_AS", MEMORY), ("RLIMIT_CORE", 0), ("RLIMIT_FSIZE", 0), ("RLIMIT_NPROC", 0)):
        try:
            resource.setrlimit(getattr(resource, kind), (most, most))
        except (AttributeError, OSError, ValueError):  # of a platform that has none, such as macOS
            pass


def main() -> None:
    pipe = Connection(int(sys.argv[1]))
    try:
        verdict("1", "1", False)  # with all imports, some of which come with the first formula
    except ImportError as error:
        pipe.send_bytes(str(error).encode("utf-8", "replace"))
        return
    _limit()
    pipe.send_bytes(b"ready")
    while True:
        try:
            question = pipe.recv_bytes()
        except EOFError:  # the parent has ended
            return
        _, most = resource.getrlimit(resource.RLIMIT_CPU)
        resource.setrlimit(resource.RLIMIT_CPU, (int(time.process_time()) + CPU, most))
        pipe.send_bytes(verdict(*json.loads(question)))


if __name__ == "__main__":
    main()
