"""A concept's named tuple, its struct in csrc/ and its numbers in kernels/ have the same fields in the same order."""

import re
from typing import Literal, get_args, get_origin, get_type_hints

import pytest
import torch

from redit_fast.backends import args
from redit_fast.backends.cpu.module import Processor
from redit_fast.backends.cuda.module import Device
from redit_fast.losses.coefficients import PolicyConstants
from redit_fast.losses.transforms import TransformConstants
from tests import ROOT

HEADERS = "".join(
    (ROOT / "csrc" / name).read_text() for name in ("shared/dtype.h", "shared/args.h", "cpu/rows.h", "cuda/launch.h")
)
PACKED = (
    args.AdvantageOptions,
    args.PerturbOptions,
    args.AdamwOptions,
    PolicyConstants,
    TransformConstants,
    Processor,
    Device,
)
NUMBERS = {"bool": bool, "float": float, "double": float, "int": int, "uint32_t": int, "uint64_t": int}


def choices(source):
    """{enum: its names} of every REDIT_CHOICE."""
    return {name: tuple(names.split(", ")) for name, names in re.findall(r"REDIT_CHOICE\((\w+), (.*)\)", source)}


def struct(source, name):
    """[(field, type)] of a struct: a Python type, or the names of an enum, which travels by name."""
    (body,) = re.findall(rf"struct {name} {{(.*?)^}};", source, re.S | re.M)
    enums = choices(source)
    return [
        (field, NUMBERS[kind] if kind in NUMBERS else set(enums[kind]))
        for kind, names in re.findall(r"^  (\w+) ([\w, ]+);", body, re.M)
        for field in names.split(", ")
    ]


def fields(packed):
    kinds = get_type_hints(packed).items()
    return [(name, set(get_args(kind)) if get_origin(kind) is Literal else kind) for name, kind in kinds]


@pytest.mark.parametrize("packed", PACKED, ids=lambda packed: packed.__name__)
def test_a_struct_has_the_fields_of_its_named_tuple(packed):
    assert struct(HEADERS, packed.__name__) == fields(packed)


@pytest.mark.parametrize(
    ("name", "right", "wrong"),
    [
        ("AdamwOptions", "beta1, beta2", "beta2, beta1"),
        ("PolicyConstants", "float low, high", "float high, low"),
        ("PolicyConstants", "  bool kl_ratio_correction;\n", ""),
        ("PerturbOptions", "double grad_factor", "int grad_factor"),
        ("AdvantageOptions", "REDIT_CHOICE(Scale, group, batch", "REDIT_CHOICE(Scale, group, rows"),
    ],
)
def test_the_comparison_finds_a_difference(name, right, wrong):
    assert HEADERS.count(right) == 1
    (packed,) = (packed for packed in PACKED if packed.__name__ == name)
    assert struct(HEADERS.replace(right, wrong), name) != fields(packed)


def test_a_dtype_has_the_number_that_its_enum_has():
    names = [str(dtype).removeprefix("torch.") for dtype in args.DTYPES]
    assert [name.replace("boolean", "bool") for name in choices(HEADERS)["Dtype"]] == names


def test_the_tables_of_the_kernels_have_the_numbers_of_the_named_tuples_in_their_order():
    policy_loss = pytest.importorskip("redit_fast.kernels.policy_loss")
    from redit_fast.kernels import params, row_math

    def places(module, names):
        return [getattr(module, name.upper()).value for name in names]

    policy = [name for name, kind in fields(PolicyConstants) if kind is float]
    transform = [name for name, kind in fields(TransformConstants) if kind is float]
    assert places(row_math, transform) == list(range(len(transform)))
    assert places(policy_loss, policy) == list(range(len(transform), len(transform) + len(policy)))
    assert places(params, args.AdamwOptions._fields) == list(range(5))
    values = PolicyConstants("clipped", "k3", True, "none", *map(float, range(10)))
    assert policy_loss.policy_numbers(values) == tuple(map(float, range(10)))


def test_the_reference_writes_each_statistic_into_its_own_output():
    """The outputs go by position from the reference's statistics on: each has another value here."""
    from redit_fast.backends import reference

    out = args.Advantages(*(torch.empty(4, dtype=torch.bool if name == "dead" else torch.float32)
                            for name in args.Advantages._fields))  # fmt: skip
    rewards, one = torch.tensor([[1.0], [2.0], [4.0], [9.0]]).double(), torch.ones(1).double()
    options = args.AdvantageOptions("uniform", 5, 1, "apply", "mean", "group", "sum_then_normalize", 1e-4, 1)
    reference.group_advantages(out, args.AdvantageInputs(rewards, None, 4, None, one, one), options)
    assert (out.group_mean == 4).all() and out.group_std[0] == pytest.approx(3.559, abs=1e-3) and not out.dead.any()
    assert out.dithered_mean[0] != 4 and abs(out.dithered_mean[0] - 4) < 1 and out.dithered_std[0] != out.group_std[0]
