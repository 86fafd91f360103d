"""Budgets: what an op or a step costs is not above what is stored, and the comparison finds what is."""

import re

import pytest

from tests import ROOT
from tests.budgets import (
    GROUPS,
    IN_MAKE_TEST,
    UNITS,
    Change,
    assert_within,
    changes,
    counted,
    kept,
    read,
    total,
    why_not,
)


@pytest.mark.parametrize("group", IN_MAKE_TEST)
def test_no_number_is_above_its_budget(group):
    stored = read()[group]
    if reason := why_not(group, stored):
        pytest.skip(reason)
    assert_within(stored, counted(group))


def test_every_group_is_stored_under_the_lock():
    lock = dict(line.split("==") for line in (ROOT / "tests" / "lock.txt").read_text().split())
    lock["torch"] = re.search(r"torch==([\d.]+)", (ROOT / "Makefile").read_text())[1]
    budgets = read()
    assert list(budgets) == list(GROUPS)
    for group, tools in GROUPS.items():
        assert set(budgets[group]["with"]) == set(tools)
        for tool, version in budgets[group]["with"].items():
            assert lock.get(tool, version) == version, (
                f"make budgets STORE=all: {group} was stored with {tool} {version}"
            )
        units = {unit for name, of in budgets[group].items() if name != "with" for unit in of}
        assert units and units <= set(UNITS)


@pytest.mark.parametrize("group", GROUPS)
def test_a_twentieth_more_is_found(group):
    """In every number that is stored: the least that is too much, and one less."""
    stored = read()[group]
    for name, units in stored.items():
        for unit, value in () if name == "with" else units.items():
            limit = total(value) * 21 // 20
            for new, verdict in ((limit + 1, "higher"), (limit, ""), (-(-total(value) * 19 // 20) - 1, "lower")):
                assert Change(name, unit, value, new).verdict == verdict, (name, unit, new)


def test_what_is_stored_no_more_or_not_yet_is_found():
    old, new = {"with": {}, "a": {"waits": 1}, "b": {"waits": 2}}, {"b": {"waits": 2, "operators": {"add": 1}}}
    assert [change.verdict for change in changes(old, new)] == ["gone", "", "new"]


def test_the_check_fails_above_and_warns_below():
    assert_within({"with": {}, "a": {"waits": 100}}, {"a": {"waits": 105}})
    for wrong in ({"a": {"waits": 106}}, {}, {"a": {"waits": 100}, "b": {"waits": 0}}):
        with pytest.raises(AssertionError, match="higher|new|gone"):
            assert_within({"with": {}, "a": {"waits": 100}}, wrong)
    with pytest.warns(UserWarning, match="lower number"):
        assert_within({"with": {}, "a": {"waits": 100}}, {"a": {"waits": 94}})


def test_the_parts_say_why():
    change = Change("a step", "operators", {"add": 40, "mul": 3}, {"add": 45, "cat": 1, "mul": 1})
    assert change.verdict == "higher" and change.parts == "+5 add, -2 mul, +1 cat"
    assert str(change).split() == "a step: operators 43 47 +9.3% higher +5 add, -2 mul, +1 cat".split()


def test_storing_keeps_the_lower_number_unless_all_are_stored():
    old, new = {"with": {}, "a": {"x": 5, "y": 5, "z": 5}, "b": {"x": 1}}, {"a": {"x": 6, "y": 4, "w": 7}}
    assert kept(old, new, "1") == {"a": {"x": 5, "y": 4, "w": 7}}
    assert kept(old, new, "all") == {"a": {"x": 6, "y": 4, "w": 7}}


def test_other_versions_are_not_compared():
    tool, *_ = GROUPS["ops"]
    assert why_not("ops", {"with": {tool: "0.1"}}).startswith(f"the budgets were stored with {tool} 0.1, here is ")
