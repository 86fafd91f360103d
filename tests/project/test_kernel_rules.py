"""What every Triton kernel keeps to, read with `ast`."""

import ast

import pytest

from tests import ROOT

VARYING = ("rows", "n", "reward_count", "group_size", "spans", "column", "count", "tile", "parts", "sums_stride",
           "state_stride")  # from call to call  # fmt: skip
LENGTHS = ("vocabulary", "width", *VARYING)
TABLES = ("numbers_ptr", "factor_ptr", "scale_ptr")  # where hyper-parameters are


def is_jit(decorator):
    return ast.unparse(decorator).startswith("triton.jit")


def kernels_of(tree):
    """(function, whether the host launches it) of every function that Triton compiles."""
    functions = [node for node in tree.body if isinstance(node, ast.FunctionDef)]
    launched = {
        call.func.value.id
        for call in ast.walk(tree)
        if isinstance(call, ast.Call) and isinstance(call.func, ast.Subscript) and isinstance(call.func.value, ast.Name)
    }
    return [(f, f.name in launched) for f in functions if any(map(is_jit, f.decorator_list))]


def argument_rules(function, launched):
    untouched = ast.unparse(function.decorator_list[0])
    for argument in function.args.args:
        name, constant = argument.arg, argument.annotation is not None
        if constant != name.isupper():
            yield f"{name}: constants are in capitals, and nothing else"
        if constant and name.lower() in LENGTHS and name != "ROWS":  # that is how many a tile has
            yield f"{name}: a length is no constant"
        if not launched or constant or name.endswith("_ptr"):
            continue
        if name not in LENGTHS and not name.endswith(("stride", "_row")):
            yield f"{name}: an argument is a pointer, a length or a stride; hyper-parameters travel in a table"
        if name in VARYING and f"'{name}'" not in untouched:
            yield f"{name}: a length is not specialised"


def program_rules(function):
    parents = {child: node for node in ast.walk(function) for child in ast.iter_child_nodes(node)}
    for call in ast.walk(function):
        if not isinstance(call, ast.Call):
            continue
        name = ast.unparse(call.func)
        if name in ("tl.program_id", "tl.num_programs") and ast.unparse(call.args[0]) != "0":
            yield f"{ast.unparse(call)}: data lie on axis 0 of the grid"
        if name == "tl.program_id":
            parent = parents[call]
            widened = isinstance(parent, ast.Attribute) and ast.unparse(parents[parent]).endswith(".to(tl.int64)")
            added = isinstance(parent, ast.BinOp) and isinstance(parent.op, ast.Add)
            if not widened and not added:
                yield f"{ast.unparse(parent)}: program ids are widened before they are multiplied"
        if name.startswith("tl.atomic"):
            yield f"{name}: no atomics"


def pointers(node):
    return {name.id for name in ast.walk(node) if isinstance(name, ast.Name) and name.id.endswith("_ptr")}


def barrier_rules(function):
    """What was stored is read, by another function too, after a barrier only."""
    stored = set()
    calls = [node for node in ast.walk(function) if isinstance(node, ast.Call)]
    for call in sorted(calls, key=lambda call: (call.end_lineno, call.end_col_offset)):
        name = ast.unparse(call.func)
        if name == "tl.debug_barrier":
            stored = set()
        elif name == "tl.store":
            stored |= pointers(call.args[0])
        elif name == "tl.load" or not name.startswith("tl."):
            for pointer in stored & set().union(*map(pointers, call.args)):
                if pointer not in TABLES:
                    yield f"{ast.unparse(call)}: {pointer} was stored to and no barrier follows"


def broken_rules(source):
    for function, launched in kernels_of(ast.parse(source)):
        for rule in (argument_rules(function, launched), program_rules(function), barrier_rules(function)):
            for sentence in rule:
                yield f"{function.name}: {sentence}"


def test_the_kernels_keep_to_the_rules():
    files = sorted((ROOT / "kernels").glob("*.py"))
    found = [f"{file.name}: {sentence}" for file in files for sentence in broken_rules(file.read_text())]
    assert found == []
    launched = [f.name for file in files for f, launch in kernels_of(ast.parse(file.read_text())) if launch]
    assert {"_loss_kernel", "_tile_kernel", "_adamw_kernel", "_normalize_kernel"} <= set(launched)


KERNEL = """
@triton.jit(do_not_specialize=["rows"])
def _kernel(x_ptr, rows, vocabulary, row_stride, scale_ptr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    x_ptr += row * row_stride
    x = tl.load(x_ptr + tl.arange(0, BLOCK))
    tl.store(x_ptr + tl.arange(0, BLOCK), x * tl.load(scale_ptr))
    tl.debug_barrier()
    tl.store(x_ptr, tl.load(x_ptr + 1))

def launch(x):
    _kernel[(8,)](x, 8, 9, 1, x, 256)
"""


@pytest.mark.parametrize(
    ("right", "wrong", "message"),
    [
        ("tl.program_id(0).to(tl.int64)", "tl.program_id(0) * 8", "widened"),
        ("tl.program_id(0)", "tl.program_id(1)", "axis 0"),
        ("vocabulary, row", "vocabulary: tl.constexpr, row", "a length is no constant"),
        ("BLOCK: tl.constexpr", "block: tl.constexpr", "in capitals"),
        ("scale_ptr, BLOCK", "temperature, BLOCK", "hyper-parameters travel in a table"),
        ('(do_not_specialize=["rows"])', "", "not specialised"),
        ("    tl.debug_barrier()\n", "", "no barrier"),
        ("tl.store(x_ptr, ", "tl.atomic_add(x_ptr, ", "no atomics"),
    ],
)
def test_the_rules_find_each_breach(right, wrong, message):
    assert list(broken_rules(KERNEL)) == [] and right in KERNEL
    found = list(broken_rules(KERNEL.replace(right, wrong, 1)))
    assert any(message in sentence for sentence in found), found
