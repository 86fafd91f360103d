"""Which texts are one number, which number a completion ends with, and that neither is read in part."""

import json
import math
import time
from fractions import Fraction as F

import pytest

from redit_fast.training.data import read
from redit_fast.training.rewards.answers import last_number, the_number
from redit_fast.training.rewards.functions import numeric_answer
from tests import ROOT

LONG = "123456789012345678901234567890123456789012345678901234567890"  # 60 digits

# One number, alone or with a unit: as an answer and as a completion.
NUMBERS = [
    ("72", 72),
    ("-72", -72),
    ("+72", 72),
    ("\u221272", -72),
    ("007", 7),
    ("72.", 72),
    (" 72\n", 72),
    ("1,234", 1234),
    ("1,234,567", 1234567),
    ("1,234.50", F(2469, 2)),
    ("$1,234.50", F(2469, 2)),
    ("-$3.20", F(-16, 5)),
    ("$-3.20", F(-16, 5)),
    (r"\$5", 5),
    ("5 €", 5),
    ("£5", 5),
    (".5", F(1, 2)),
    ("7.50", F(15, 2)),
    ("1.000", 1),
    ("3/4", F(3, 4)),
    ("-1/2", F(-1, 2)),
    ("1,000/3", F(1000, 3)),
    ("7/2", F(7, 2)),
    ("2 1/2", F(5, 2)),
    ("-2 1/2", F(-5, 2)),
    (r"\frac{3}{2}", F(3, 2)),
    (r"\dfrac{3}{2}", F(3, 2)),
    (r"-\frac{1}{2}", F(-1, 2)),
    (r"\frac{-1}{2}", F(-1, 2)),
    (r"$\frac12$", F(1, 2)),
    (r"\frac 1 2", F(1, 2)),
    (r"2\frac{1}{2}", F(5, 2)),
    (r"2 \frac12", F(5, 2)),
    (r"\boxed{\frac{1}{2}}", F(1, 2)),
    (r"\boxed{72}", 72),
    (r"\(72\)", 72),
    (r"\[ 72 \]", 72),
    ("$72$", 72),
    ("**72**", 72),
    ("(72)", 72),
    ("`72`", 72),
    ('"72"', 72),
    ("1e5", 100000),
    ("1.5E-3", F(3, 2000)),
    ("2e+3", 2000),
    ("1e999", 10**999),
    (r"10,\!000", 10000),
    ("10{,}000", 10000),
    (LONG, int(LONG)),
    ("0." + LONG, F(int(LONG), 10**60)),
    ("72 apples", 72),
    ("5 km", 5),
    ("5km", 5),
    ("60 km/h", 60),
    ("9.8 m/s^2", F(49, 5)),
    ("72 cm^2", 72),
    ("72 cm²", 72),
    ("72 m2", 72),
    (r"72 \text{ cm}^2", 72),
    (r"72\ \mathrm{kg}", 72),
    (r"90^\circ", 90),
    ("45° C", 45),
    ("3 square feet", 3),
    ("6 o'clock", 6),
    ("72元", 72),
]


@pytest.mark.parametrize("end", ["", ".", ",", ";", ". Done", " apples."])
@pytest.mark.parametrize(
    "text",
    [r"$\boxed{7}$", r"$$\boxed{7}$$", r"$x = \boxed{7}$", r"(\boxed{7})", "$ 7 $", "$7 $", r"$\boxed{\frac{14}{2}}$"],
)
def test_a_full_stop_behind_a_formula_hides_no_number(text, end):
    """The commonest last sentence of models that were trained on mathematics."""
    assert last_number(f"The answer is {text}{end}") == (7, False)


@pytest.mark.parametrize(("text", "value"), NUMBERS)
def test_what_is_one_number_is_read_the_same_as_an_answer_and_as_a_completion(text, value):
    assert the_number(text) == last_number(text) == last_number(f"So it is\n{text}") == (value, False)
    assert the_number(f"3 + 4 = 7, so\n#### {text}") == (value, False)


# No number, and never one in part: neither as an answer nor at the end of a completion.
PARTS = [
    "3^7", "7^3", "x7", "1,23,4", "1.000.000", "1,5", "1,0000", "0,123", "3/0", "2 1/0", "--5", "+-5", "-$-5", "5-3",
    "5 -3", "5 - 3", "10^5", "1.5 x 10^5", "1.5 × 10^5", r"1.5 \times 10^{5}", "3 * 5", "3*5", "3 x 5", "3 + 5",
    "3 / 5", "5!", "2**3", "1 000", "1\u00a0000", "1\u202f000", "½", "2½", "5²", "5 ²", "٣", "5٣", "７", "inf", "NaN",
    "-Infinity", "none at all", "", "2 5/2", "1/2/3", "3/4/2024", "12:30", "3:4", "1.2.3", "(3,4)", "0.333...",
    "1e1000", "1e", "0x10", "1_000", "1'000", "5 million", "5million", "3 dozen", "5k", "3 halves", "2 and a half",
    "1st", "4th", "5x", "5 x", "5x/y", "5 x^2", "5 pi", r"5\pi", r"5 \pi", r"2\sqrt{3}", r"2 \sqrt{3}", r"\sqrt{5}",
    r"\pm 5", "± 5", "±5", "x <= 5", "x > 5", r"\frac{x}{2}", r"\frac{1}{2}3", r"\frac{1}{2}^2", r"\frac{1}{2 + 3}",
    r"\frac{1}{0}", r"3\frac{7}{2}", r"4^\frac12", r"3^\boxed{2}", r"\frac{\frac12}{3}", "5–6", "5—6", "- 5", "H2O",
    "GPT-4", "72万", "5<sup>3</sup>", "9" * 5000, "1/" + "9" * 5000,
]  # fmt: skip


TAILS = [
    "",
    "%",
    " %",
    r"\%",
    r" \%",
    " percent",
    " per cent",
    " apples",
    " km/h",
    " cm^2",
    " m2",
    r"\text{ kg}",
    "€",
    " €",
    " £",
]
TAILS += ["°", " °C", r"^\circ", " miles per hour", "px", " m²"]
AROUND = ["{}", "${}$", r"\boxed{{{}}}", r"\({}\)", "({})", "**{}**", "'{}'", "[{}]", " {} \n", "“{}”"]
SENTENCES = ["{}", "The answer is {}", "The answer is {}.", "= {}", "It is {}, I think.", "Thus x = {}", "\n{}\n"]


@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("number", ["7", "$7", "1,234.50", "-3/4", "2 1/2", r"\dfrac34", r"2\frac{1}{2}"])
def test_an_answer_in_a_completion_is_the_same_number(number, tail):
    for around in AROUND:
        text = around.format(number + tail)
        answer = the_number(text)
        if answer is None:  # a unit of "$7", say
            continue
        for sentence in SENTENCES:
            assert last_number(sentence.format(text)) == answer, sentence.format(text)
    assert the_number(number + tail) is not None or "$" in number


@pytest.mark.parametrize("text", ["17 % 5", "17 % n", "17 % (5)", "x = 17 % m", "5 € and 7 €", "5 €, 7 €"])
def test_a_remainder_is_no_percentage_and_a_list_no_number(text):
    assert last_number(text) is None


@pytest.mark.parametrize("text", PARTS, ids=lambda text: text[:20])
def test_what_is_no_number_is_not_read_in_part(text):
    assert the_number(text) is None and last_number(text) is None
    assert last_number(f"After 8 steps it is {text}") is None or not any(map(str.isnumeric, text))
    assert last_number(rf"\boxed{{{text}}}") is None and last_number(f"**{text}**") is None


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("so 3 + 4 = 7", 7),
        ("After 3 days, 7 are left", 7),
        ("In 3 boxes, 7 apples.", 7),
        ("Step 3: 7", 7),
        ("1) 7", 7),
        ("3+4=7.", 7),
        ("x=7", 7),
        ("x = -7", -7),
        ("The answer is 72, as shown.", 72),
        ("The answer is 72 - as shown.", 72),
        ("The answer: 72", 72),
        ("Answer:72", 72),
        ("first 3, then 18 dollars", 18),
        ("3/4 of it", F(3, 4)),
        ("He eats 5 a day", 5),
        ("She has 2 1/2 cups left.", F(5, 2)),
        ("He has <<3+4=7>>7 pears.", 7),
        ("#### 72", 72),
        ("1. add 3\n2. so 7 in all\n\nThat is all.", 7),
        (r"Hence $x = \frac{3}{2}$.", F(3, 2)),
        (r"the area is \boxed{72} \text{ cm}^2", 72),
        ("答案是72。", 72),
        ("5 -> 7", 7),
    ],
)
def test_the_last_number_of_a_completion(text, value):
    assert last_number(text) == (value, False)
    assert the_number(text) is None or text.startswith(("3/4 of", "####", "答案"))


# Its last digits are a 7 that is a part of something else.
SEVENS = [
    r"\frac {1} {7}", r"\frac{ 1 }{ 7 }", "\\frac{1}\n{7}", "\\frac\n1\n7", "\\frac 1\n{7}", "10^{ 7 }", "10^\n7",
    "1/\n7", "3 *\n7", "x = -\n7", "\\sqrt\n7", r"\sqrt { 7 }", r"{\sqrt 7}", r"$\sqrt 7$",
    "3 ⋅ 7", "3 • 7", "3 ∙ 7", "3 ∗ 7", "3 ⁄ 7", "3 ∕ 7", "3 – 7", "3 ‑ 7", "3 － 7", "3 : 7", "3 ＋ 7", "3 ✖ 7",
    "x | 7", "x % 7", "—7", "–7", "−\n7", "(3, 7)", "[3, 7]", "(x, 7)", "1, ..., 7", "1, …, 7", "C(10, 7)",
    "max(3, 7)", "gcd(14, 7)", "3, 7", "3,\n7", "3; 7", "3 or 7", "3 to 7", "minus 7", "minus\n7", "negative 7",
    "sqrt 7", "sqrt (7)", "square root of 7", "log 7", "exp 7", "f (7)", "1 over 7", "2 plus 7", "3 mod 7", "base 7",
    "half of 7", "50% of 7", "10 to the 7", "to the power of 7", "twice 7", "three hundred 7", "5 feet 7 inches",
    "1 hour 7 minutes",
    "1 hour, 7 minutes", "2 dollars and 7 cents", "5 square feet and 7 inches", "12 r 7", "3 million 7",
]  # fmt: skip

# Neither is what is behind a 7, in a completion or in an answer.
BEHIND = [
    "7 ⋅ x", "7 • x", "7 | x", "7 ✖ x", "7 !", "7 ‰", "(7) million", "( 7 ) million", "*7* million", "`7` million",
    "[7] million", "$7$ million", "7 $million$", "7\nmillion", "7\n/ x", "(7) / x", "(7) squared", "(7) !", "(7, x)",
    "[7, inf)", "(7) and a half", "7, and a half", "7 feet and a half", "7 and three quarters", "7 - one", "7 less one",
    "7 out of ten", "7 choose three", "7 modulo five", "7 remainder three", "7 degrees below zero", "7 per mille",
    "7 basis points", *(f"7 {word}" for word in "bn lakh crore score gross fold seventh seventy sevenths".split()),
    *(f"7 {word}" for word in "ninths twelfths sixteenths twentieths quarters thousandth dozen half".split()),
]  # fmt: skip


@pytest.mark.parametrize("text", SEVENS + BEHIND)
def test_a_number_beside_what_changes_it_is_not_read(text):
    for completion in (text, f"The answer is {text}", f"1. First this.\n2. Then {text}", f"So it is\n{text}."):
        assert numeric_answer(["q"], [completion], ["7"]) == [0.0]
    assert the_number(text) is None or the_number(text).value != 7


@pytest.mark.parametrize(
    "text",
    [
        "The answer is 7.", "so she has 7 apples left", "#### 7", "= 7", "x = 7", "first 3, then 7", "So, 7.",
        "She ate 3, leaving 7.", "So 3+4=7\n\n\\boxed{7}", "So 3 + 4\n7", "*Answer:* 7", "**Answer:** 7", "Answer : 7",
        "Answer:\n7", "a total of 7 apples", "a distance of 7 km", "7 apples in one day", "The answer is 7 ✅",
        "7\n\n---\n", "7\nI hope this helps!", "7\n- as shown", "7—that is it", "Remainder: 7", "2 + 5 is 7",
        "$$\n7\n$$", "\\[\n7\n\\]", "7 of them", "He pays $7 a day", "(3 + 4 = 7)", "It is 7 (as shown)",
        "\\begin{aligned} x &= 7 \\end{aligned}", "7 is one more than six", "7 (that is all)", "7 = x",
        "7 and that is it", "On day 3 she had 7", "10 minus 3 equals 7",
    ],
)  # fmt: skip
def test_a_number_in_a_plain_sentence_is_read(text):
    assert last_number(text) == (7, False)


@pytest.mark.parametrize(
    "answer", [True, None, [7], {"n": 7}, math.nan, math.inf, "7 or 8", "7 or eight", "5 and up", "#### 7 #### 8",
               "####", "x = 7", "about 7", "so 3 + 4 = 7", "7\n8", "#### 1,5"]
)  # fmt: skip
def test_what_else_is_no_answer(answer):
    assert the_number(answer) is None


def test_numbers_of_json_are_exact():
    for text, value in (("7", 7), ("0.1", F(1, 10)), ("1e-7", F(1, 10**7)), ("1e22", 10**22), (LONG, int(LONG))):
        assert the_number(json.loads(text)) == (value, False)


@pytest.mark.parametrize(
    ("answer", "completion", "reward"),
    [
        (r"\frac{1}{2}", r"\frac{3}{2}", 0.0),
        (r"\frac{1}{2}", "0.5", 1.0),
        ("3/2", r"\frac{3}{2}", 1.0),
        ("2", r"\frac{3}{2}", 0.0),
        ("1e5", "100000", 1.0),
        ("100000", "1e5", 1.0),
        ("2 1/2", "5/2", 1.0),
        ("5/2", "2 1/2", 1.0),
        ("1/2", "2 1/2", 0.0),
        ("3", "7^3", 0.0),
        ("7", "x7", 0.0),
        ("4", "1,23,4", 0.0),
        ("0", "1.000.000", 0.0),
        ("5", "1,5", 0.0),
        ("5", "5 million", 0.0),
        ("50%", "50%", 1.0),
        ("50%", "50 percent", 1.0),
        ("50%", "1/2", 1.0),
        ("50", "50%", 1.0),
        ("0.5", "50%", 1.0),
        ("50%", "5000%", 0.0),
        ("50", "0.5", 0.0),
        ("1%", "100", 0.0),
        ("72 apples", "72 pears", 1.0),
        ("$1,234.50", "1234.5 dollars", 1.0),
        ("#### 1,234", "1234", 1.0),
        (LONG, LONG, 1.0),
        (LONG, LONG[:-1] + "1", 0.0),
        (7, "7.0", 1.0),
        (7.5, "15/2", 1.0),
        ("-5", "\u22125", 1.0),
        ("5", "-5", 0.0),
    ],
)
def test_rewards(answer, completion, reward):
    for text in (completion, f"<think>9</think> <answer>{completion}</answer>"):
        assert numeric_answer(["q"], [text], [answer]) == [reward]


def test_no_completion_takes_long():
    start = time.process_time()
    for part in (
        "(",
        ")",
        "$",
        "1",
        "1,",
        "1 ",
        "a1 ",
        "1/",
        "\\frac{1}",
        "\\boxed{",
        "<<",
        "**",
        ".",
        "1e9",
        "-",
        "° ",
        "m2",
        "5 -",
        "\n",
        " ",
        " \n",
        "{ ",
        "—",
        "minus ",
        "of ",
        "5 x ",
        "^ ",
        "\\a",
    ):
        for text in (part * 10000, "5" + part * 10000 + "x", part * 10000 + "5"):
            last_number(text), the_number(text)
    assert time.process_time() - start < 5


def test_the_example_data_has_answers_that_are_numbers():
    for _, record in read(ROOT / "examples" / "word_problems.jsonl"):
        assert the_number(record["answer"]).value == F(record["answer"])
