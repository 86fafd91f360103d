r"""Answers that are numbers: read from text whole, as exact fractions, or not at all.

    number    [sign] [currency] (mixed | fraction | decimal) [percent] [unit]; the sign may be behind the currency, too
    decimal   72, 1,234.50, .5, 1e5: a comma is between groups of three digits, a point before decimals; e to the 999
    fraction  3/4 of integers, \frac{3}{4}, \frac34 (also \dfrac, \tfrac)
    mixed     2 1/2, 2\frac{1}{2}: an integer and a proper fraction
    percent   50%, 50 percent: equal to 50 and to 1/2
    unit      words: apples, km/h, cm^2, m2, \text{kg}; none that changes the number, as million, three, half, x, pi
    around    \boxed{}, $ $, \( \), ( ), ** **, quotes and one full stop are no part of it

An expression (3^7, 5-3, 2 * 3, 5!), a list, a range, a date, 1,5, 1.000.000, 1 000, ½ and 0.333... are no number.
In a completion the last number is none, too, beside a symbol other than = (3 • 7, 7 | x), behind a word that makes
it something else (minus 7, log 7, half of 7), before one (7 squared, 7 and a half), and as the second of two without a
verb between them (3, 7; 5 feet 7 inches; 3 to 7), but for a number (Step 3: 7, 1) 7) or a clause (After 3 days, 7 are
left) ahead of it. Neither line breaks nor closing brackets hide such a symbol or word.
"""

from __future__ import annotations

import re
import unicodedata
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
_TENS = "twenty thirty forty fifty sixty seventy eighty ninety".split()
_ONES = (
    "one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen"
).split()
_POWERS = "hundred thousand million billion trillion quadrillion lakh crore dozen myriad".split()
_PARTS = ["third", "quarter", "fifth", "eighth", "ninth", "twelfth"]
_PARTS += [word + "th" for word in _ONES + _POWERS] + [word[:-1] + "ieth" for word in _TENS]
_NUMBER_WORDS = {"zero", "half", "halves", "mille", "bn", "mn", "tn", "mio", "mrd"}.union(
    _ONES, _TENS, _POWERS, _PARTS, (word + "s" for word in _POWERS + _PARTS)
)
_FUNCTIONS = set(  # of what is behind them
    "minus negative neg plus times over by divided multiplied sqrt cbrt root roots square cube log ln lg lb logarithm "
    "exp exponential sin cos tan cot sec csc sine cosine tangent arcsin arccos arctan sinh cosh tanh abs floor ceil "
    "round max min gcd lcm mod modulo modulus rem remainder base power exponent factorial choose twice double triple "
    "thrice point per than less below under inverse reciprocal opposite".split()
)
_CHANGES = _NUMBER_WORDS.union(
    "st nd rd th ths pi sqrt squared cubed factorial plus minus times over divided multiplied less below choose mod "
    "modulo modulus remainder rem out fold score scores gross permille basis bp bps point base xor".split(),
    set("abcdefghijklmnopqrstuvwxyzBDEGHIKMOPQRSTUXYZ") - set("mgshlL"),
)
_LINKS = set(  # between two numbers: the second is one of its own
    "is are was were be equal equals make makes made give gives gave leave leaves left become becomes then so thus "
    "hence therefore get gets got have has had yield yields total totals only still now which remain remains means "
    "that".split()
)
_OPENS = {"after", "at", "for", "from", "if", "in", "on", "since", "when"}  # a sentence whose comma ends a clause
_LABELS = {"step", "part", "case", "question", "problem", "answer", "option", "example", "line", "day", "week"}
_JOINS = {"and", "or", "to", "of", "the", "by", "through", "until", "square", "cubic"}
_MARKUP = [
    (r"<<[^<>]*>>", ""),  # GSM8K's calculator
    ("\u2212", "-"),
    (r"\\[()\[\],;: ]|\\q?quad(?![a-z])|\\(?:begin|end)\{[a-z*]*\}|[~\u00a0\u2009\u202f]", " "),
    ("\u2014", " \u2014 "),
    (r"[^\S\n]+", " "),
    (r" ?\n[ \n]*", "\n"),
    (r"(?<=[({\[])\s|\s(?=[)}\]])|(?<=})\s(?={)|(?<=[\^_])\s(?={)", ""),
    (r"(\\[A-Za-z]{1,9})\s(?={)", r"\1"),
    (r"\\!|\\left(?![a-z])|\\right(?![a-z])|(?<![0-9)])\*\*|\*\*(?![0-9(])", ""),
    (r"\{,\}", ","),
    (r"\\([%$])", r"\1"),
    (r"\^\{?\\circ\}?", "°"),
    (r"\\(?:text|mathrm|textbf|mathbf|mbox)\{([^{}]*)\}", r" \1"),
    (r"\\[dt]?frac\s?([0-9])\s?([0-9])(?![0-9]|[.,][0-9])", r"\\frac{\1}{\2}"),
    (r"(?<=[0-9]) *\\[dt]?frac\{([0-9,]+)\}\{([0-9,]+)\}(?![0-9])", r" \1/\2"),
    (r"\\[dt]?frac\{(-?[0-9,]+)\}\{([0-9,]+)\}(?![0-9])", r"\1/\2"),
    (r"\\(?:boxed|fbox)\{([^{}]*)\}", r" \1 "),
    (r"(?<=[(\[]) +| +(?=[)\]])|(?<=[0-9%)]) +(?=\$+[.,;:?]?(?:\s|$))", ""),
    (rf"(?<=[0-9]) per cent(?![{_LETTER}])", " percent"),
    (r"(?<=[0-9]) (?=[°€£¥₹]|%(?:\s*$| ?[\n.,;:!?)\]}$*'\"”’]))", ""),  # 17 % n is a remainder
    (r"[<>!]=", "≤"),
    (r"=>|->|[=≈→⇒]|\\(?:approx|to|implies|therefore|Rightarrow)(?![a-z])", " = "),
    (rf"(?<=[{_LETTER}]):(?![*_]\s)", ": "),
]
_REPLACED = [(re.compile(pattern), by) for pattern, by in _MARKUP]
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
    lines = _plain(text).splitlines()
    last = max((i for i, line in enumerate(lines) if _has_digits(line)), default=None)
    if last is None:
        return None
    words = lines[last].split()
    i = max(i for i, word in enumerate(words) if _has_digits(word))
    bare = [_bare(word) for word in words]
    if i and _UNIT.fullmatch(bare[i]):  # 72 cm^2
        i -= 1
    first = i - 1 if i and re.search(r"[0-9]$", words[i - 1]) else i  # 2 1/2
    number = " ".join(bare[first : i + 1])
    opened, closed = words[first].startswith(("(", "[", "{")), re.search(r"[)\]}]", words[i][-4:])
    before = " ".join(lines[max(0, last - 2) : last]).split()[-2:] + words[:first]
    if _needs_it(before[-2:]) or _is_second(words[:first]):
        return None
    if before and before[-1][-1] in ",;" and closed and not opened or opened and not closed and words[i][-1] in ",;":
        return None  # (x, 7), (7, x)
    if re.search(r"[.;?]", words[i][-3:].rpartition(number[-1])[2]):  # a full stop ends it
        return _read(number)
    after = words[i + 1 :]
    new_line = not after
    if new_line:
        after = " ".join(lines[last + 1 : last + 3]).split()
    if not after or after[0] in (".", ";", "?"):
        return _read(number)
    if _goes_on(after[1:] if after[0] == "," else after, new_line):
        return None
    with_unit = f"{number} {_bare(after[0])}"
    unit = not new_line and words[i].endswith(bare[i]) and after[0] not in ("a", "I") and _NUMBER.fullmatch(with_unit)
    return _read(with_unit if unit else number)


def _needs_it(before: list[str]) -> bool:
    """Whether what ends with these words, an operator or "log", goes on with the number behind them."""
    if not before:
        return False
    word = before[-1]
    if "\\" in word or _is_symbol(word) or re.search(r"\\[dtc]?(?:frac|binom)", before[0]):
        return True
    if word[-1] in ":.,;!?":
        return re.search(r"\.\.$|[0-9][,;]$", word) is not None
    parts = _parts(word)
    if any(map(str.isalnum, word)) and (_is_symbol(word[-1]) and word[-2:-1] != ":" or word[-1] == "_" != word[0]):
        return True
    if parts == ["of"] or parts == ["to"]:
        word = before[-2] if len(before) > 1 else ""
        return _has_digits(word) or not _NUMBER_WORDS.union(_FUNCTIONS, ["raised", "multiple"]).isdisjoint(_parts(word))
    single = len(parts) == 1 and len(parts[0]) == 1 and parts[0] not in "ai"
    return single or not _NUMBER_WORDS.union(_FUNCTIONS).isdisjoint(parts)


def _is_second(before: list[str]) -> bool:
    """Whether the number behind these words is the second of a list or of 5 feet 7 inches."""
    between: list[str] = []
    if re.fullmatch(r"[0-9]{1,2}\)", " ".join(before[-1:])) and len(before) == 1:
        return False  # 1) 7
    for i, word in reversed(list(enumerate(before))[-4:]):
        name = _bare(word).lower()
        if word[-1] in ".?!" or "=" in word or name in _LINKS or name.endswith("ing") or set(word) <= set("#"):
            return False
        if _has_digits(word):
            label = not between and word[-1] == ":" and i and before[i - 1].lower() in _LABELS
            clause = between and before[-1][-1] == "," and _bare(before[0]).lower() in _OPENS
            if label or clause:  # Step 3: 7; After 3 days, 7 are left
                return False
            return len(between) < 2 or not _JOINS.isdisjoint(between)
        between.append(name)
    return False


def _goes_on(after: list[str], new_line: bool) -> bool:
    """Whether these words are a part of the number before them: 7 squared, 7 / x, 7 and a half, 7 out of ten."""
    if not after:
        return False
    word, names = after[0], [_parts(word) for word in after[:4]] + [[]] * 3
    many = [not _NUMBER_WORDS.isdisjoint(name) for name in names]
    if word[0] in "-–—" + "*•" * new_line:  # 5 - that is all
        return set(word) < set("-–—*•") and len(after) > 1 and ("\\" in after[1] or many[1] or len(_bare(after[1])) < 2)
    if "\\" in word or _is_symbol(word) or _is_symbol(word[0]) and word[0] not in "*_":
        an_emoji = all(unicodedata.category(c) in ("So", "Mn", "Cf") for c in word)
        return not an_emoji or len(after) > 1
    if _bare(word).lower() in _LINKS:
        return False
    if many[1] or names[0] == ["and"] and names[1] in (["a"], ["an"]):
        return True
    if names[1][:1] in (["minus"], ["plus"], ["times"], ["less"], ["below"], ["squared"], ["cubed"]):
        return True
    if names[1] and names[1][0] in _JOINS and (many[2] or names[1:3] == [["and"], ["a"]]):
        return True
    return word not in ("a", "I") and _changes_the_number(word) and not (new_line and len(_bare(word)) == 1)


def _plain(text: str) -> str:
    """Without markup; of Chinese, Japanese and Korean, which have no blanks, numerals alone stay."""
    for pattern, by in _REPLACED:
        text = pattern.sub(by, text)
    return _CJK.sub(lambda found: found[0] if found[0].isnumeric() else " ", text)


def _bare(text: str) -> str:
    text = text.strip().lstrip("([{*_\"'“‘`#").rstrip(_CLOSING)
    return text.removesuffix(".").rstrip(_CLOSING)


def _has_digits(text: str) -> bool:
    return any(map(str.isnumeric, text))


def _is_symbol(word: str) -> bool:
    """Whether it is an operator, or may be one: without letters and more than brackets, quotes, currencies and =#&:."""
    if any(map(str.isalnum, word)):
        return False
    return any(c not in "=#&:\"'`" and unicodedata.category(c) not in ("Ps", "Pe", "Pi", "Pf", "Sc") for c in word)


def _parts(word: str) -> list[str]:
    return re.findall(rf"[{_LETTER}']+", word.lower())


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
    parts = re.findall(rf"[{_LETTER}'’]+", re.sub(r"[\^{}23²³]", "", word))
    return any(part in _CHANGES or len(part) > 1 and part.lower() in _CHANGES for part in parts)
