"""Calls of a compiled module with descriptions of tensors that are missing or wrong: for test_bindings_cpu.py and
test_bindings_cuda.py. `makers` make the right tensors, by argument; `call` takes their descriptions by name."""

from itertools import combinations

import pytest

from redit_fast.backends.addresses import table, view

NONE = (0, 0, 0, 0, 0, 0)
DTYPES = 6


def leave_out(call, makers, optional, most=None):
    """Every combination, or those of at most so many. `optional`: those that may be left out, each with the others that
    it then asks for."""
    worked = 0
    for count in range((len(makers) if most is None else most) + 1):
        for missing in combinations(makers, count):
            kept = {key: make() for key, make in makers.items()}
            given = {key: NONE if key in missing else view(kept[key]) for key in makers}
            wrong = [key for key in missing if key not in optional]
            wrong += [key for key in missing for other in optional.get(key, ()) if other not in missing]
            if wrong:
                with pytest.raises(ValueError, match="|".join(wrong)):
                    call(**given)
            else:
                call(**given)
                worked += 1
    pairs = sum(map(bool, optional.values()))  # of four combinations three work
    assert worked == 2 ** len(optional) * 3**pairs // 4**pairs


def damages(name, given, unknown, any_strides):
    """What is wrong, and a description that is."""
    address, dtype, *sizes = given
    yield "no address", (0, dtype, *sizes)
    if (name, 0) not in unknown:
        yield "no shape", (address, dtype, 0, 0, 1, 1)
    for other in (-1, *range(DTYPES + 1)):
        if other != dtype:
            yield f"dtype {other}", (address, other, *sizes)
    for axis in (0, 1):
        for change in (-1, 1):
            if (name, axis) not in unknown:
                yield (
                    f"axis {axis} by {change}",
                    (address, dtype, *(s + change * (i == axis) for i, s in enumerate(sizes))),
                )
        yield "a negative size", (address, dtype, *(-s if i == axis else s for i, s in enumerate(sizes)))
    if sizes[1] > 1:
        yield "a negative stride", (address, dtype, *sizes[:3], -1)
        if not any_strides:
            yield "columns apart", (address, dtype, *sizes[:3], 2)
    if sizes[0] > 1:
        yield "a negative row stride", (address, dtype, *sizes[:2], -1, 1)


def damage(call, makers, unknown, any_strides):
    """Each argument in turn. `unknown`: (name, axis) of sizes that nothing else tells."""
    kept = {key: make() for key, make in makers.items()}
    given = {key: view(tensor) for key, tensor in kept.items()}
    call(**given)
    for key in makers:
        for what, description in damages(key, given[key], unknown, key in any_strides):
            if what.startswith("dtype") and key in ("logits", "x", "e", "hidden") and description[1] in (0, 1, 2):
                continue  # the one that says which type
            try:
                call(**{**given, key: description})
            except ValueError as error:
                assert "\n" not in str(error) and any(argument in str(error) for argument in makers), error
            else:
                raise AssertionError(f"{key} was taken with {what}")


def damage_lists(call, makers, optional):
    """A missing tensor, its address, its size, another dtype, an entry too few, too many or beside its parameter.
    `optional`: the lists with entries that may be None."""
    kept = {key: [make(), make()] for key, make in makers.items()}
    given = {key: table(tensors) for key, tensors in kept.items()}
    call(**given)
    for key in makers:
        (address, dtype, numel), second = given[key]
        wrong = {
            "None": [(0, 0, 0), second],
            "no address": [(0, dtype, numel), second],
            "too long": [(address, dtype, numel + 1), second],
            "too short": [(address, dtype, numel - 1), second],
            "negative": [(address, dtype, -numel), second],
            "of integers": [(address, 4, numel), second],
            "dtype -1": [(address, -1, numel), second],
            "dtype 99": [(address, 99, numel), second],
            "one": [second],
            "three": [second] * 3,
            "none": [],
        }
        if len(makers) == 1:  # of sizes nothing else tells
            wrong = {
                what: wrong[what]
                for what in wrong
                if what not in ("None", "too long", "too short", "one", "three", "none")
            }
        for what, entries in wrong.items():
            if what == "None" and key in optional:
                call(**{**given, key: entries})
                continue
            with pytest.raises(ValueError, match=f"^({'|'.join(makers)})"):
                call(**{**given, key: entries})
                pytest.fail(f"{key} was taken with {what}")
