"""Every entry point of redit_fast._cpu believes nothing: with an argument left out, without an address, of another
type, length or stride it works or raises a ValueError that names the argument, and never faults. `make sanitize` runs
these calls on a build that checks every access."""

import pytest
import torch

from redit_fast.backends import cpu
from redit_fast.backends.addresses import table, view, views
from redit_fast.backends.args import AdamwOptions, AdvantageOptions, PerturbOptions
from redit_fast.backends.cpu.module import Processor, compiled
from redit_fast.losses.coefficients import PolicyConstants
from redit_fast.losses.config import LossConfig
from redit_fast.losses.transforms import LogitTransform, TransformConstants
from tests.bindings import NONE, damage, damage_lists, leave_out

refusal = cpu.why_not("token_loss", torch.device("cpu"))
pytestmark = pytest.mark.skipif(refusal is not None, reason=f"cpu: {refusal}")
ROWS, VOCABULARY, WIDTH = 5, 9, 4


def rows():
    return torch.rand(ROWS)


def sums():
    return torch.rand(3, ROWS) + 1


def logits():
    return torch.randn(ROWS, VOCABULARY)


def targets():
    return torch.arange(ROWS)


POLICY = PolicyConstants.of(LossConfig())
LOSS = PolicyConstants.of(LossConfig(beta=0.1, correction="token_mask"))
OPTIONS = AdvantageOptions("uniform", 5, 1, "apply", "mean", "group", "sum_then_normalize", 1e-4, 1)
PERTURB = PerturbOptions(0.5, "stochastic", 3, -1)
ADAMW = AdamwOptions(0.1, 0.9, 0.99, 1e-8, 0.1)
TRANSFORM = TransformConstants.of(LogitTransform())
PROCESSOR = Processor(threads=1, level=-1)
HOW = TRANSFORM, PROCESSOR


HELD = rows(), sums(), torch.randn(ROWS, WIDTH), torch.randn(VOCABULARY, WIDTH), targets()


def head_rows():
    chunk = compiled.HeadRows(view(HELD[4]), VOCABULARY)
    chunk.anchor_at_targets([view(HELD[2]), view(HELD[3]), NONE], *HOW)
    return chunk


def finished_rows():
    chunk = head_rows()
    chunk.finish([view(HELD[0]), NONE, view(HELD[1])], TRANSFORM)
    return chunk


def group_advantages(given, options=OPTIONS, group_size=0):
    tensors = list(given.values())
    compiled.group_advantages(tensors[:6], tensors[6:], options, group_size, PROCESSOR)


def token_loss(given, policy):
    tensors = list(given.values())
    compiled.token_loss(tensors[:4], tensors[4:6], tensors[6:11], policy, tensors[11], *HOW)


def token_logp_grad(grad_logits, logits, targets, **upstream):
    compiled.token_logp_grad(grad_logits, [logits, targets], list(upstream.values()), *HOW)


# name: the call, of descriptions by name; makers of right tensors; those that may be left out, each with the others
# that it then asks for; (name, axis) of sizes that nothing else tells.
ENTRIES = {
    "group_advantages": (
        lambda **given: group_advantages(given),
        {
            **dict.fromkeys(("values", "group_mean", "group_std"), rows),
            "dead": lambda: torch.empty(ROWS, dtype=torch.bool),
            **dict.fromkeys(("dithered_mean", "dithered_std"), rows),
            "rewards": lambda: torch.rand(ROWS, 2, dtype=torch.float64),
            "groups": lambda: torch.tensor([0, 1, 1, 2, 0]),
            "sample_ids": targets,
            "weights": lambda: torch.ones(2, dtype=torch.float64),
            "half_range": lambda: torch.ones(2, dtype=torch.float64),
        },
        {"sample_ids": (), "half_range": ()},
        (),
    ),
    "token_logp": (
        lambda logits, targets, **outputs: compiled.token_logp(list(outputs.values()), [logits, targets], *HOW),
        {"logp": rows, "entropy": rows, "sums": sums, "logits": logits, "targets": targets},
        {"entropy": ()},
        (("logits", 1),),
    ),
    "token_logp_grad": (
        token_logp_grad,
        {"grad_logits": logits, "logits": logits, "targets": targets, "sums": sums,
         **dict.fromkeys(("grad_logp", "grad_entropy", "entropy"), rows)},
        {"grad_entropy": (), "entropy": ("grad_entropy",)},
        (),
    ),
    "token_loss": (
        lambda **given: token_loss(given, POLICY),
        {"loss": lambda: torch.zeros(()), "logp": rows, "entropy": rows, "grad_logits": logits, "logits": logits,
         "targets": targets,
         **dict.fromkeys(("weights", "advantages", "old_logp", "ref_logp", "sampling_logp"), rows),
         "grad_scale": lambda: torch.ones(())},
        dict.fromkeys(("grad_logits", "old_logp", "ref_logp", "sampling_logp", "grad_scale"), ()),
        (),
    ),
    "token_loss with KL and correction": (
        lambda **given: token_loss(given, LOSS),
        {"loss": lambda: torch.zeros(()), "logp": rows, "entropy": rows, "grad_logits": logits, "logits": logits,
         "targets": targets,
         **dict.fromkeys(("weights", "advantages", "old_logp", "ref_logp", "sampling_logp"), rows),
         "grad_scale": lambda: torch.ones(())},
        dict.fromkeys(("grad_logits", "old_logp", "grad_scale"), ()),
        (),
    ),
    "scale_in_place": (
        lambda x: compiled.scale_in_place(x, 0.5, PROCESSOR),
        {"x": logits},
        {},
        (("x", 0), ("x", 1)),
    ),
    "HeadRows": (lambda targets: compiled.HeadRows(targets, VOCABULARY), {"targets": targets}, {}, (("targets", 1),)),
    "anchor_at_targets": (
        lambda **given: head_rows().anchor_at_targets(list(given.values()), *HOW),
        {"hidden": lambda: torch.randn(ROWS, WIDTH), "weight": lambda: torch.randn(VOCABULARY, WIDTH),
         "bias": lambda: torch.randn(VOCABULARY)},
        {"bias": ()},
        (),
    ),
    "add": (
        lambda e, tile: head_rows().add(e, tile, (1, 2), *HOW),
        {"e": logits, "tile": lambda: torch.randn(ROWS - 1, VOCABULARY - 2)},
        {"e": ()},
        (("tile", 0), ("tile", 1)),
    ),
    "finish": (
        lambda **given: head_rows().finish(list(given.values()), TRANSFORM),
        {"logp": rows, "entropy": rows, "sums": sums},
        {"entropy": ()},
        (),
    ),
    "resume": (
        lambda **given: head_rows().resume(list(given.values()), TRANSFORM),
        {"sums": sums, **dict.fromkeys(("grad_logp", "grad_entropy", "entropy"), rows)},
        {"grad_entropy": (), "entropy": ("grad_entropy",)},
        (),
    ),
    "store_targets": (lambda e: finished_rows().store_targets(e, *HOW), {"e": logits}, {}, ()),
    "squared_norm": (
        lambda out: compiled.squared_norm(out, table(HELD[0]), PROCESSOR),
        {"out": lambda: torch.zeros((), dtype=torch.float64)}, {}, (),
    ),
}  # fmt: skip
for products, tiles in (("avx512_bf16", False), ("amx_bf16", True)):
    if products not in cpu.instruction_sets():
        continue
    ENTRIES[f"product, {products}"] = (
        lambda c, a, b, tiles=tiles: compiled.product(c, False, a, b, tiles, PROCESSOR),
        {"c": lambda: torch.zeros(ROWS, VOCABULARY), "a": lambda: torch.randn(ROWS, WIDTH).bfloat16(),
         "b": lambda: torch.randn(WIDTH, VOCABULARY).bfloat16()},
        {},
        (),
    )  # fmt: skip
ANY_STRIDES = ("logits", "grad_logits", "x", "hidden", "weight", "a", "b")


@pytest.mark.parametrize("name", ENTRIES)
def test_every_combination_of_missing_arguments_works_or_is_refused_by_name(name):
    call, makers, optional, _ = ENTRIES[name]
    leave_out(call, makers, optional)


@pytest.mark.parametrize("name", ENTRIES)
def test_a_description_that_does_not_fit_is_refused_by_name(name):
    call, makers, _, unknown = ENTRIES[name]
    damage(call, makers, unknown, ANY_STRIDES)


def test_an_output_whose_elements_overlap_is_refused():
    x = torch.zeros(1).expand(ROWS, VOCABULARY)
    with pytest.raises(ValueError, match="x is written, so its elements must not overlap"):
        compiled.scale_in_place(view(x), 0.5, PROCESSOR)
    step, t = logits(), targets()
    with pytest.raises(ValueError, match="grad_logits must have the strides of the logits that it overwrites"):
        transposed = torch.as_strided(step, (ROWS, VOCABULARY), (1, ROWS))
        cpu.token_logp_grad(transposed, step, t, sums(), rows(), None, None, LogitTransform())


HALF, STEP, FINITE = torch.tensor(0.5).double(), torch.tensor(1), torch.tensor(True)
MOVE, ADVANCE = views(HALF, STEP), views(HALF, FINITE)  # a perturbation's numbers and those of an AdamW step


def parameter_passes():
    """name: the call, of lists by name; makers of lists; what may be None in them."""
    out = torch.zeros(4, dtype=torch.float64)
    four, three, one = (view(out[:n]) for n in (4, 3, 1))
    state = {"params": rows, "masters": rows, "grads": rows, "exp_avgs": rows, "exp_avg_sqs": rows,
             "steps": lambda: torch.zeros(())}  # fmt: skip
    return out, {
        "squared_norm": (lambda tensors: compiled.squared_norm(one, tensors, PROCESSOR), {"tensors": rows}, ()),
        "perturb": (
            lambda params, grads: compiled.perturb(four, params, grads, [0, 7], MOVE, PERTURB, PROCESSOR),
            {"params": rows, "grads": rows}, (),
        ),
        "combine": (lambda firsts, grads: compiled.combine(three, firsts, grads, 0.5, PROCESSOR),
                    {"firsts": rows, "grads": rows}, ()),
        "adamw": (
            lambda **given: compiled.adamw(list(given.values()), ADVANCE, ADAMW, PROCESSOR),
            state, ("masters",),
        ),
    }  # fmt: skip


@pytest.mark.parametrize("name", ["squared_norm", "perturb", "combine", "adamw"])
def test_lists_that_do_not_fit_are_refused_by_name(name):
    held, passes = parameter_passes()
    damage_lists(*passes[name])
    assert held.sum() != 0 or name == "adamw"


def test_numbers_that_do_not_fit_are_refused_by_name():
    p, g, v = rows(), rows(), torch.zeros(4, dtype=torch.float64)
    four, params, grads = view(v), table([p]), table([g])
    x, t, kept_sums = logits(), targets(), sums()

    def perturb(offsets=(0,), compute_dtype=-1, threads=1, level=-1):
        options = PERTURB._replace(compute_dtype=compute_dtype)
        compiled.perturb(four, params, grads, list(offsets), MOVE, options, Processor(threads, level))

    wide = [torch.zeros(ROWS, dtype=torch.float64) for _ in range(2)]

    def adamw(params=(p,), masters=(None,), state=(g,)):
        lists = [table(x) for x in (params, masters, (g,), state, state)]
        step = torch.zeros(())
        compiled.adamw([*lists, table([step])], ADVANCE, ADAMW, PROCESSOR)

    chunk = compiled.HeadRows(view(t), VOCABULARY)
    tile, anchored, done = view(x), head_rows(), finished_rows()
    results = [view(g), NONE, view(kept_sums)], TRANSFORM
    fields = {name: make() for name, make in ENTRIES["group_advantages"][1].items()}
    group = {name: view(field) for name, field in fields.items()}
    ids = torch.tensor([[0, 1, 1, 2, ROWS], [0, 1, -1, 2, 0]])

    refused = {
        "offsets": [lambda: perturb([-1]), lambda: perturb([2**63 - 2]), lambda: perturb([]), lambda: perturb([0, 1])],
        "compute_dtype": [lambda: perturb(compute_dtype=-2), lambda: perturb(compute_dtype=4)],
        "threads": [lambda: perturb(threads=0), lambda: compiled.scale_in_place(tile, 0.5, Processor(-3, -1))],
        "level": [lambda: perturb(level=-2), lambda: perturb(level=99),
                  lambda: compiled.scale_in_place(tile, 0.5, Processor(1, 3))],
        "masters": [lambda: adamw(params=(rows().bfloat16(),)), lambda: adamw(masters=(wide[0],))],
        "exp_avgs": [lambda: adamw(state=(wide[0],)), lambda: adamw(params=(wide[0],))],
        "firsts": [lambda: compiled.combine(view(v[:3]), table(wide[:1]), grads, 0.5, PROCESSOR)],
        "vocabulary": [lambda: compiled.HeadRows(view(t), 0), lambda: compiled.HeadRows(view(t), -5)],
        "add must": [lambda: chunk.add(NONE, tile, (0, 0), *HOW)],
        "repair must": [lambda: chunk.repair(16), lambda: done.repair(16)],
        "finish must": [lambda: chunk.finish(*results), lambda: done.finish(*results)],
        "resume must": [lambda: chunk.resume([NONE] * 4, TRANSFORM), lambda: done.resume([NONE] * 4, TRANSFORM)],
        "store_targets must": [
            lambda: chunk.store_targets(tile, *HOW), lambda: anchored.store_targets(tile, *HOW)
        ],
        "block": [lambda: anchored.repair(0), lambda: anchored.repair(-16)],
        "first_row": [lambda row=row: anchored.add(NONE, tile, (row, 0), *HOW) for row in (1, -1, 2**63 - 1)],
        "first_column": [lambda column=column: anchored.add(NONE, tile, (0, column), *HOW) for column in (1, -1)],
        "groups": [lambda i=i: group_advantages(group | {"groups": view(ids[i])}) for i in range(2)],
        "group_size": [
            lambda: group_advantages(group, group_size=ROWS), lambda: group_advantages(group, group_size=-1),
            *(lambda size=size: group_advantages(group | {"groups": NONE}, group_size=size) for size in (-5, 0, 2, 10)),
        ],
    }  # fmt: skip
    for name, calls in refused.items():
        for call in calls:
            with pytest.raises(ValueError, match=name):
                call()
    group_advantages(group | {"groups": NONE}, group_size=ROWS)
    adamw(masters=(None,))
    adamw(params=(wide[0],), state=(wide[1],))


def test_numbers_where_the_tensors_lie_are_refused_by_name():
    p, g, v = rows(), rows(), torch.zeros(4, dtype=torch.float64)
    held = rows(), rows(), torch.zeros(())
    lists = [table([x]) for x in (p, None, g, *held)]
    calls = {
        "scale": lambda scale: compiled.perturb(
            view(v), table([p]), table([g]), [0], [scale, MOVE[1]], PERTURB, PROCESSOR
        ),
        "step": lambda step: compiled.perturb(
            view(v), table([p]), table([g]), [0], [MOVE[0], step], PERTURB, PROCESSOR
        ),
        "factor": lambda factor: compiled.adamw(lists, [factor, ADVANCE[1]], ADAMW, PROCESSOR),
        "finite": lambda finite: compiled.adamw(lists, [ADVANCE[0], finite], ADAMW, PROCESSOR),
    }
    before, two = p.clone(), torch.zeros(2)
    for name, call in calls.items():
        for wrong in (NONE, view(HALF.float()), view(two.double()), view(two.long()), view(two.bool())):
            with pytest.raises(ValueError, match=f"^{name} must be"):
                call(wrong)
    for step in (-1, 2**32):
        beyond = torch.tensor(step)
        with pytest.raises(ValueError, match="^step must be in"):
            calls["step"](view(beyond))
    assert torch.equal(p, before)
    for name, right in zip(calls, MOVE + ADVANCE):
        calls[name](right)
    assert not torch.equal(p, before)


def named_tuples():
    """name: a right one, and the call that takes it."""
    kept = [{key: make() for key, make in ENTRIES[name][1].items()} for name in ("group_advantages", "token_loss")]
    advantages, loss = ({key: view(tensor) for key, tensor in tensors.items()} for tensors in kept)
    p, g, m, v = (rows() for _ in range(4))
    sums, steps, x = torch.zeros(4, dtype=torch.float64), torch.zeros(()), logits()
    return (*kept, p, g, m, v, sums, steps, x), {
        "options": (OPTIONS, lambda options: group_advantages(advantages, options)),
        "policy": (POLICY, lambda policy: token_loss(loss, policy)),
        "transform": (TRANSFORM, lambda transform: head_rows().finish([view(p), NONE, view(HELD[1])], transform)),
        "processor": (PROCESSOR, lambda processor: compiled.scale_in_place(view(x), 0.5, processor)),
        "options of perturb": (PERTURB, lambda options: compiled.perturb(view(sums), table([p]), table([g]), [0], MOVE,
                                                                         options, PROCESSOR)),
        "options of adamw": (ADAMW, lambda options: compiled.adamw(
            [table([x]) for x in (p, None, g, m, v, steps)], ADVANCE, options, PROCESSOR
        )),
    }  # fmt: skip


@pytest.mark.parametrize(
    "name", ["options", "policy", "transform", "processor", "options of perturb", "options of adamw"]
)
def test_a_named_tuple_with_a_wrong_field_or_number_of_them_is_refused_by_name(name):
    held, tuples = named_tuples()
    right, call = tuples[name]
    call(right)
    for short in (right[:-1], (*right, 0), (), list(right), None):
        with pytest.raises(ValueError, match=f"^{name.split()[0]} must be a named tuple of {len(right)} fields"):
            call(short)
    for field, value in right._asdict().items():
        wrong = {
            bool: (1, "True", None),
            str: ("novel", "", ", ", 0, None),
            int: (0.5, "1", None, True, 2**64, -(2**63) - 1),
            float: ("1", None, 1j, [1.0]),
        }[type(value)]
        for other in wrong:
            with pytest.raises(ValueError, match=f"^{field} must be"):
                call(right._replace(**{field: other}))
    assert held


def test_no_rows_and_no_tensors_are_fine():
    """Their addresses are 0."""
    none, vocabulary = torch.empty(0), torch.empty(0, VOCABULARY)
    ids = none.long()
    cpu.token_logp(none, none, torch.empty(3, 0), vocabulary, ids, LogitTransform())
    loss = torch.ones(())
    rows = none, none, None, None, None
    cpu.token_loss(loss, none, none, vocabulary.clone(), vocabulary, ids, *rows, LossConfig(), None)
    assert loss == 0
    cpu.scale_in_place(vocabulary, torch.tensor(2.0))
    head = torch.empty(0, WIDTH), torch.randn(VOCABULARY, WIDTH), None, ids, LogitTransform()
    cpu.exp_product(vocabulary, none, None, torch.empty(3, 0), *head)
    norm = torch.ones((), dtype=torch.float64)
    cpu.squared_norm(norm, [])
    assert norm == 0
    cpu.squared_norm(norm, [none, torch.ones(4)])
    assert norm == 4


def test_a_tensor_elsewhere_or_of_three_dimensions_is_refused():
    for x in (torch.empty(3, 4, device="meta"), torch.empty(2, 2, 2)):
        with pytest.raises(ValueError, match="at most two dimensions on cpu, got"):
            cpu.token_logp(rows(), None, sums(), x, targets(), LogitTransform())
