r"""Answers that are numbers: read from text whole, as exact fractions, or not at all.

    number    [sign] [currency] (mixed | fraction | decimal) [percent] [unit]; the sign may be behind the currency, too
    decimal   72, 1,234.50, .5, 1e5: a comma is between groups of three digits, a point before decimals; e to the 999
    fraction  3/4 of integers, \frac{3}{4}, \frac34 (also \dfrac, \tfrac)
    mixed     2 1/2, 2\frac{1}{2}: an integer and a proper fraction
    percent   50%, 50 percent: equal to 50 and to 1/2
    unit      words: apples, km/h, cm^2, m2, \text{kg}; none that changes the number, as million, dozen, half, th, x, pi
    around    \boxed{}, $ $, \( \), ( ), ** **, quotes and one full stop are no part of it

An expression (3^7, 5-3, 2 * 3, 5!), a list, a range, a date, 1,5, 1.000.000, 1 000, ½ and 0.333... are no number.
"""

from __future__ import annotations

import re
from fractions import Fraction
from numbers import Real
from typing import NamedTuple

LONGEST = 500  # characters; a model can write a number whose exact arithmetic takes minutes

_INTEGER = r"(?:[1-9][0-9]{0,2}(?:,[0-9]{3})+|[0-9]+)"
_LETTER = "A-Za-zÀ-ÖØ-öø-ɏΩμµА-я°"
_WORD = rf"[{_LETTER}][{_LETTER}.'/-]*(?:\^\{{?[23]\}}?|[²³]|(?:(?<=m)|(?<=ft)|(?<=in))[23])?"
_UNIT = re.compile(_WORD)
_NUMBER = re.compile(
    rf"(?P<sign>[-+])?[$€£¥₹]{{0,2}}(?(sign)|(?P<inner>[-+])?)"
    rf"(?:(?:(?P<whole>{_INTEGER}) )?(?P<top>{_INTEGER})/(?P<below>{_INTEGER})"
    rf"|(?P<decimal>(?:{_INTEGER}(?:\.[0-9]+)?|\.[0-9]+)(?:[eE][-+]?[0-9]{{1,3}})?))"
    rf"(?P<percent> ?(?:%|per ?cent(?![{_LETTER}])))?(?: ?[$€£¥₹]{{1,2}})?(?P<unit>(?: ?{_WORD})(?: {_WORD})*)?"
)
_OPERATORS = "-+*/^<>≤≥≠±×·÷"
_CHANGES = set(
    "st nd rd th ths pi sqrt squared cubed factorial plus minus times over divided hundred thousand million billion "
    "trillion hundreds thousands millions billions trillions dozen dozens half halves third thirds quarter quarters "
    "fourth fourths fifth fifths sixth sixths eighth eighths tenth tenths hundredth hundredths".split()
) | (set("abcdefghijklmnopqrstuvwxyzBDEGHIKMOPQRSTUXYZ") - set("mgshlL"))
_MARKUP = [
    (r"<<[^<>]*>>", ""),  # GSM8K's calculator
    ("\u2212", "-"),
    (r"\\[()\[\],;: ]|\\q?quad(?![a-z])|[~\u00a0\u2009\u202f\u2014]", " "),
    (r"\\!|\\left(?![a-z])|\\right(?![a-z])|(?<![0-9)])\*\*|\*\*(?![0-9(])", ""),
    (r"\{,\}", ","),
    (r"\\([%$])", r"\1"),
    (r"\^\{?\\circ\}?", "°"),
    (r"\\(?:text|mathrm|textbf|mathbf|mbox)\{([^{}]*)\}", r" \1"),
    (r"\\[dt]?frac ?([0-9]) ?([0-9])(?![0-9.,])", r"\\frac{\1}{\2}"),
    (r"(?<=[0-9]) *\\[dt]?frac\{([0-9,]+)\}\{([0-9,]+)\}(?![0-9])", r" \1/\2"),
    (r"\\[dt]?frac\{(-?[0-9,]+)\}\{([0-9,]+)\}(?![0-9])", r"\1/\2"),
    (r"\\(?:boxed|fbox)\{([^{}]*)\}", r" \1 "),
    (r"[<>!]=", "≤"),
    (r"=>|->|[=≈→⇒]|\\(?:approx|to|implies|therefore|Rightarrow)(?![a-z])", " = "),
    (rf"(?<=[{_LETTER}]):", ": "),
]
_MARKUP = [(re.compile(pattern), by) for pattern, by in _MARKUP]
_CJK = re.compile("[\u3001-\u3003\u300a-\u3011\u3040-\u30ff\u4e00-\u9fff\uac00-\ud7af，：；！？（）]")
_CLOSING = ")]}*_\"'”’`,;:?"


class Number(NamedTuple):
    value: Fraction
    percent: bool = False

    def equals(self, other: Number | None) -> bool:
        if other is None or self.percent == other.percent:
            return other is not None and self.value == other.value
        percent, plain = (self, other) if self.percent else (other, self)
        return plain.value in (percent.value, percent.value / 100)


def the_number(answer: object) -> Number | None:
    """The number that an answer is, of its text the part behind "####" where there is one; None where it is none."""
    if isinstance(answer, Real) and not isinstance(answer, bool):
        answer = str(answer)
    if not isinstance(answer, str):
        return None
    words = _bare(_plain(answer.partition("####")[2] or answer)).split()
    return None if {"and", "or", "to"} & set(words) else _read(" ".join(words))


def last_number(text: str) -> Number | None:
    """The last number in a text. None where there is none, and where the last digits are a part of something else."""
    lines = [line for line in _plain(text).splitlines() if _has_digits(line)]
    if not lines:
        return None
    words = lines[-1].split()
    i = max(i for i, word in enumerate(words) if _has_digits(word))
    bare = [_bare(word) for word in words]
    if i and _UNIT.fullmatch(bare[i]):  # 72 cm^2
        i -= 1
    first = i - 1 if i and re.search(r"[0-9]$", words[i - 1]) else i  # 2 1/2
    before, after = words[first - 1] if first else "", words[i + 1 :]
    if re.search(r"[0-9]$", before) or _is_operator(before):
        return None
    number = " ".join(bare[first : i + 1])
    if not after or not words[i].endswith(bare[i]):  # punctuation ends it
        return _read(number)
    with_unit = f"{number} {bare[i + 1]}"
    if _NUMBER.fullmatch(with_unit) and after[0] not in ("a", "I"):
        return None if after[0] == "and" and after[1:2] in (["a"], ["an"], ["one"]) else _read(with_unit)
    dash = after[0] == "-" and (len(after) == 1 or len(bare[i + 2]) > 1 and after[1][0] != "\\")  # 5 - that is all
    return None if after[0][0] in _OPERATORS + "\\" and not dash else _read(number)


def _plain(text: str) -> str:
    """Without markup; of Chinese, Japanese and Korean, which have no blanks, numerals alone stay."""
    for pattern, by in _MARKUP:
        text = pattern.sub(by, text)
    return _CJK.sub(lambda found: found[0] if found[0].isnumeric() else " ", text)


def _bare(text: str) -> str:
    text = text.strip().lstrip("([{*_\"'“‘`#").rstrip(_CLOSING)
    return text.removesuffix(".").rstrip(_CLOSING)


def _has_digits(text: str) -> bool:
    return any(map(str.isnumeric, text))


def _is_operator(word: str) -> bool:
    """Whether what comes behind it is a part of an expression."""
    if word in ("x", "X") or word.startswith("\\"):
        return True
    return word[-1:] in _OPERATORS if any(map(str.isalnum, word)) else bool(set(word) & set(_OPERATORS))


def _read(text: str) -> Number | None:
    match = _NUMBER.fullmatch(text) if len(text) <= LONGEST else None
    if match is None or any(_changes_the_number(word) for word in (match["unit"] or "").split()):
        return None
    sign, inner, whole, top, below, decimal = match.group("sign", "inner", "whole", "top", "below", "decimal")
    if decimal is not None:
        value = Fraction(decimal.replace(",", ""))
    else:
        whole, top, below = (int((digits or "0").replace(",", "")) for digits in (whole, top, below))
        if below == 0 or match["whole"] is not None and top >= below:
            return None
        value = whole + Fraction(top, below)
    return Number(-value if "-" in (sign, inner) else value, match["percent"] is not None)


def _changes_the_number(word: str) -> bool:
    parts = re.split("[-/.]", re.sub(r"[\^{}23²³]", "", word))
    return any(part in _CHANGES or len(part) > 1 and part.lower() in _CHANGES for part in parts)
