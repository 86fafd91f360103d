"""Every entry point of redit_fast._cuda believes nothing, as of redit_fast._cpu: test_bindings_cpu.py. It plans the
launches of what it is given, for each kind of device, and runs none. `make sanitize` runs these calls on a build whose
host code checks every access."""

import pytest
import torch

from redit_fast.backends.addresses import table, view, views
from redit_fast.backends.args import AdvantageOptions
from redit_fast.backends.cuda.module import compiled, described, missing
from tests.backends import test_bindings_cpu as cpu
from tests.backends.test_bindings_cpu import ADAMW, LOSS, PERTURB, POLICY, ROWS, TRANSFORM, VOCABULARY, rows, sums
from tests.bindings import NONE, damage, damage_lists, leave_out

pytestmark = pytest.mark.skipif(missing is not None, reason=f"cuda: {missing}")
DEVICES = {
    "H200": described,
    "sm_80": described._replace(architecture=80, clusters=0),
    "no cluster fits": described._replace(clusters=0),
}
OPTIONS = AdvantageOptions("uniform", 5, 1, "apply", "mean", "batch", "sum_then_normalize", 1e-4, 1)
WIDTH = 8


def floats(*shape):
    return lambda: torch.zeros(shape)


def group_advantages(device, **given):
    tensors = list(given.values())
    return compiled.group_advantages(tensors[:6], tensors[6:11], OPTIONS, tensors[11:], 0, device)


def token_loss(policy):
    def call(device, **given):
        x = list(given.values())
        return compiled.token_loss(x[:4], x[4:6], x[6:11], policy, x[11], TRANSFORM, x[12], device)

    return call


def token_logp(device, logits, targets, **outputs):
    return compiled.token_logp(list(outputs.values()), [logits, targets], TRANSFORM, device)


def token_logp_grad(device, grad_logits, logits, targets, **upstream):
    return compiled.token_logp_grad(grad_logits, [logits, targets], list(upstream.values()), TRANSFORM, device)


def exp_product(device, e, tile=NONE, **given):
    x = list(given.values())
    return compiled.exp_product(e, x[:3], x[3:7], TRANSFORM, [*x[7:], tile], device)


def exp_product_grad(device, e, tile=NONE, **given):
    x = list(given.values())
    return compiled.exp_product_grad(e, x[:4], x[4:8], TRANSFORM, [x[8], NONE, tile], device)


def entries():
    """As in test_bindings_cpu.py; what a call has of scratch comes last."""
    _, advantages, free, _ = cpu.ENTRIES["group_advantages"]
    room = {"order": lambda: torch.arange(ROWS), "starts": lambda: torch.arange(ROWS + 1),
            "room": lambda: torch.zeros(ROWS * (3 * 2 + 2) + 3, dtype=torch.float64)}  # fmt: skip
    yield "group_advantages", group_advantages, advantages | room, free, ()
    for name, call in (("token_logp", token_logp), ("token_logp_grad", token_logp_grad)):
        yield name, call, *cpu.ENTRIES[name][1:]
    for name, policy in (("token_loss", POLICY), ("token_loss with KL and correction", LOSS)):
        _, makers, optional, unknown = cpu.ENTRIES[name]
        yield name, token_loss(policy), makers | {"row_losses": rows}, optional, unknown
    yield (
        "scale_in_place", lambda device, x, factor: compiled.scale_in_place(x, factor, device),
        {"x": cpu.logits, "factor": floats()}, {}, (("x", 0), ("x", 1)),
    )  # fmt: skip
    upstream = {"sums": sums, **dict.fromkeys(("grad_logp", "grad_entropy", "entropy"), rows)}
    for kind, dtype in (("tiles", torch.float32), ("product", torch.bfloat16)):
        head = {"hidden": lambda dtype=dtype: torch.zeros(ROWS, WIDTH, dtype=dtype),
                "weight": lambda dtype=dtype: torch.zeros(VOCABULARY, WIDTH, dtype=dtype),
                "bias": lambda dtype=dtype: torch.zeros(VOCABULARY, dtype=dtype), "targets": cpu.targets}  # fmt: skip
        e = {"e": lambda dtype=dtype: torch.zeros(ROWS, VOCABULARY, dtype=dtype)}
        written, scratch = {"logp": rows, "entropy": rows, "sums": sums}, {"rows": floats(6 * ROWS)}
        parts, tile = {"parts": floats(4 * ROWS)}, {"tile": floats(ROWS, 1024)} if kind == "tiles" else {}
        yield (
            f"exp_product by {kind}", exp_product, e | written | head | scratch | parts | tile,
            {"e": (), "entropy": (), "bias": ()}, (),
        )  # fmt: skip
        yield (
            f"exp_product_grad by {kind}", exp_product_grad, e | head | upstream | scratch | tile,
            {"bias": (), "grad_entropy": (), "entropy": ("grad_entropy",)}, (),
        )  # fmt: skip


ENTRIES = {name: entry for name, *entry in entries()}
OWN_PRODUCT = [name for name in ENTRIES if name.endswith("product")]


def on_devices(names=ENTRIES):
    """A parameter each; the product is of one device."""
    found = [(name, device) for device in DEVICES for name in names]
    return pytest.mark.parametrize(("name", "device"), [x for x in found if x[0] not in OWN_PRODUCT or x[1] == "H200"])


@on_devices()
def test_every_combination_of_missing_arguments_makes_launches_or_is_refused_by_name(name, device):
    call, makers, optional, _ = ENTRIES[name]
    most = max(3, len(optional))  # of 14 that would be 16384 combinations
    leave_out(lambda **given: checked(call(DEVICES[device], **given)), makers, optional, most)


def checked(launches):
    """Some, each of which a device takes."""
    flat = [launch for part in launches for launch in (part if isinstance(part, list) else [part])]
    assert flat
    for launch in flat:
        assert launch.blocks >= 1 and launch.blocks % launch.cluster == 0 and launch.threads % 32 == 0
        assert 0 <= launch.shared <= described.shared_bytes and 0 < len(launch.params) <= 4096


@on_devices()
def test_a_description_that_does_not_fit_is_refused_by_name(name, device):
    call, makers, _, unknown = ENTRIES[name]
    damage(lambda **given: call(DEVICES[device], **given), makers, unknown, (*cpu.ANY_STRIDES, "e"))


def parameter_passes(device):
    """name: the call, of lists by name; makers of lists; what may be None in them."""
    held = torch.zeros(4, dtype=torch.float64), torch.zeros(8, dtype=torch.float64), torch.zeros(20)
    out, room, scalars = held
    one, three, four = (view(out[:n]) for n in (1, 3, 4))
    two, six, eight = (view(room[:n]) for n in (2, 6, 8))
    _, passes = cpu.parameter_passes()
    calls = {
        "squared_norm": lambda tensors: compiled.squared_norm(one, tensors, two, device),
        "perturb": lambda params, grads: compiled.perturb(
            four, params, grads, [0, 7], cpu.MOVE, PERTURB, eight, device
        ),
        "combine": lambda firsts, grads: compiled.combine(three, firsts, grads, 0.5, six, device),
        "adamw": lambda **lists: compiled.adamw(list(lists.values()), cpu.ADVANCE, ADAMW, view(scalars), device),
    }
    return held, {name: (call, *passes[name][1:]) for name, call in calls.items()}


@pytest.mark.parametrize("name", ["squared_norm", "perturb", "combine", "adamw"])
@pytest.mark.parametrize("device", DEVICES)
def test_lists_that_do_not_fit_are_refused_by_name(name, device):
    _, passes = parameter_passes(DEVICES[device])
    damage_lists(*passes[name])


@pytest.mark.parametrize("vocabulary", [1, 1000, 32_000, 151_936, 400_000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_launches_are_made_for_rows_of_every_length(vocabulary, dtype):
    """Of memory that nothing touches: where the plan reads it, the sanitizer stops."""
    logits, targets = torch.empty(1, 1, dtype=dtype).expand(2, vocabulary), torch.zeros(2).long()
    outputs, kept = views(torch.empty(2), None, torch.empty(3, 2)), views(*torch.empty(2, 2))
    for device in DEVICES.values():
        checked(compiled.token_logp(outputs, views(logits, targets), TRANSFORM, device))
        grad = view(torch.empty(2, vocabulary, dtype=dtype))
        upstream = [outputs[2], kept[0], NONE, NONE]
        checked(compiled.token_logp_grad(grad, views(logits, targets), upstream, TRANSFORM, device))


def test_launches_are_made_for_hundreds_of_tensors():
    """Several launches, each with a table of its own."""
    params, sizes = [rows() for _ in range(620)], [ROWS * i for i in range(620)]
    sums, partials = torch.zeros(4, dtype=torch.float64), torch.zeros(4 * 620, dtype=torch.float64)
    launches = compiled.perturb(
        view(sums), table(params), table(params), sizes, cpu.MOVE, PERTURB, view(partials), described
    )
    checked(launches)
    assert len(launches) > 3
