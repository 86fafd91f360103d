"""Each primitive with every combination of missing arguments, on every backend: what the reference gives, or a
ValueError that names the argument, before anything is written."""

import inspect
from itertools import combinations

import pytest
import torch

from redit_fast import backends
from redit_fast.backends import cpu, cuda, reference, triton
from redit_fast.backends.args import AdvantageInputs, AdvantageOptions, Advantages
from redit_fast.losses.config import LossConfig
from redit_fast.losses.transforms import LogitTransform

ROWS, VOCABULARY, WIDTH = 5, 9, 4
TRANSFORM = LogitTransform(0.7, 0.5, 9.0)


def rows(*shape):
    return torch.randn(*shape, ROWS)


def cases():
    """name: arguments by name, the written ones first; those that may be missing, each with what then asks for it."""
    logits, targets, hidden = torch.randn(ROWS, VOCABULARY), torch.arange(ROWS), torch.randn(ROWS, WIDTH)
    head = {"hidden": hidden, "weight": torch.randn(VOCABULARY, WIDTH), "bias": torch.randn(VOCABULARY),
            "targets": targets, "transform": TRANSFORM}  # fmt: skip
    entropy, sums = rows(), rows(3)
    reference.exp_product(None, rows(), entropy, sums, *head.values())
    kept = {"sums": sums, "entropy": entropy}
    upstream = {"grad_logp": rows(), "grad_entropy": rows()}
    written = {"logp": rows(), "entropy": rows(), "sums": rows(3)}
    numbers = dict(zip(("weights", "advantages", "old_logp", "ref_logp", "sampling_logp"), rows(5), strict=True))

    def loss(config):
        return {"loss": torch.zeros(()), "logp": rows(), "entropy": rows(), "grad_logits": torch.zeros_like(logits),
                "logits": logits, "targets": targets, **numbers, "config": config,
                "grad_scale": torch.tensor(2.0)}  # fmt: skip

    entropies = {"grad_entropy": None, "entropy": "grad_entropy"}
    optional = dict.fromkeys(("grad_logits", "old_logp", "ref_logp", "sampling_logp", "grad_scale"))
    always = {"ref_logp": "beta", "sampling_logp": "correction"}
    return {
        "token_logp": ({**written, "logits": logits, "targets": targets, "transform": TRANSFORM}, {"entropy": None}),
        "token_logp_grad": (
            {"grad_logits": torch.zeros_like(logits), "logits": logits, "targets": targets, "sums": sums, **upstream,
             "entropy": entropy, "transform": TRANSFORM}, entropies,
        ),
        "token_loss": (loss(LossConfig()), optional),
        "token_loss of all": (loss(LossConfig(beta=0.1, correction="token_mask")), optional | always),
        "exp_product": ({"e": torch.zeros_like(logits), **written, **head}, {"e": None, "entropy": None, "bias": None}),
        "exp_product_grad": ({"e": torch.zeros_like(logits), **kept, **head, **upstream},
                             {"bias": None} | entropies),
    }  # fmt: skip


def by_op(names):
    """A parameter each; a name begins with its op."""
    return [pytest.param(name, marks=pytest.mark.ops(name.split()[0])) for name in names]


def test_every_backend_takes_the_references_arguments():
    pytest.importorskip("triton")
    for op in backends.PRIMITIVES:
        expected = list(inspect.signature(getattr(reference, op)).parameters)
        for module in (cpu, triton, *[cuda] * (op in cuda.__all__)):
            assert list(inspect.signature(getattr(module, op)).parameters) == expected, (op, module)


@pytest.mark.parametrize("name", by_op(cases()))
def test_every_combination_of_missing_arguments_is_right_or_refused(backend, device, name):
    torch.manual_seed(0)
    arguments, optional = cases()[name]
    op = name.split()[0]
    primitive = backends.primitive(getattr(reference, op), torch.device(device))

    def run(module_op, missing):
        given = {
            key: None if key in missing else value.clone() if isinstance(value, torch.Tensor) else value
            for key, value in arguments.items()
        }
        module_op(*given.values())
        return [value for value in given.values() if isinstance(value, torch.Tensor)]

    for count in range(len(optional) + 1):
        for missing in combinations(optional, count):
            of = {key: optional[key] for key in missing if optional[key] is not None and optional[key] not in missing}
            if of:
                with pytest.raises(ValueError, match=f"^({'|'.join(of)}) must be given with"):
                    run(primitive, missing)
                continue
            for ours, theirs in zip(run(primitive, missing), run(getattr(reference, op), missing), strict=True):
                torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", by_op(cases()))
def test_an_argument_of_another_length_is_refused_by_name(backend, device, name):
    if backend == "reference":
        pytest.skip("reference: torch itself refuses what it cannot compute")
    arguments, _ = cases()[name]
    primitive, refused = backends.primitive(getattr(reference, name.split()[0]), torch.device(device)), 0
    for key, value in arguments.items():
        for axis in range(value.ndim if isinstance(value, torch.Tensor) else 0):
            if (name, key, axis) == ("token_logp", "logits", 1):  # nothing else tells the vocabulary
                continue
            for other in (value.narrow(axis, 0, value.shape[axis] - 1), torch.cat([value, value], axis)):
                with pytest.raises(ValueError, match="|".join(arguments)):
                    primitive(*(arguments | {key: other}).values())
                    pytest.fail(f"{name} took {key} of {tuple(other.shape)}")
                refused += 1
    assert refused >= 10


def advantages():
    out = Advantages(
        *(torch.empty(8, dtype=torch.bool if name == "dead" else torch.float32) for name in Advantages._fields)
    )
    rewards, two = torch.arange(16.0).view(8, 2).double() % 5, torch.tensor([1.0, 0.3], device="cpu").double()
    groups, ids = torch.tensor([0, 0, 0, 1, 1, 1, 0, 1]), torch.arange(8) * 7
    options = AdvantageOptions("gaussian", 5, 1, "apply", "mean", "group", "sum_then_normalize", 1e-4, 1)
    return out, AdvantageInputs(rewards, groups, 4, ids, two, two / 9), options


@pytest.mark.ops("group_advantages")
def test_advantages_without_any_of_their_optional_inputs_are_the_references(backend, device):
    seen = []
    for count in range(4):
        for missing in combinations(("groups", "sample_ids", "half_range"), count):
            results = []
            for primitive in (
                backends.primitive(reference.group_advantages, torch.device(device)),
                reference.group_advantages,
            ):
                out, inputs, options = advantages()
                primitive(out, inputs._replace(**dict.fromkeys(missing)), options)
                results.append(out)
            assert all(map(torch.equal, *results))
            seen.append(results[0].values)
    assert len({tuple(values.tolist()) for values in seen}) == 6  # without noise the ids do not matter


@pytest.mark.ops("group_advantages")
def test_advantages_of_another_length_are_refused_by_name(backend, device):
    if backend == "reference":
        pytest.skip("reference: torch itself refuses what it cannot compute")
    out, inputs, options = advantages()
    primitive = backends.primitive(reference.group_advantages, torch.device(device))
    primitive(out, inputs, options)
    for packed in (out, inputs):
        for name, value in packed._asdict().items():
            if isinstance(value, int):
                continue
            for other in (value[:-1], torch.cat([value, value])):
                damaged = packed._replace(**{name: other})
                given = (damaged, inputs) if packed is out else (out, damaged)
                with pytest.raises(ValueError, match="|".join((*out._fields, *inputs._fields))):
                    primitive(*given, options)
                    pytest.fail(f"group_advantages took {name} of {tuple(other.shape)}")


def parameter_passes():
    def tensors():
        return [torch.randn(7) for _ in range(3)]

    def scalar(value=0.5):
        return torch.tensor(value, dtype=torch.float64)

    steps, state = [torch.zeros(()) for _ in range(3)], [scalar(), torch.tensor(True), 0.1, 0.9, 0.99, 1e-8, 0.1]
    perturbation = {"offsets": [0, 7, 14], "scale": scalar(), "grad_factor": 0.5, "rounding": "nearest", "seed": 3,
                    "step": torch.tensor(1), "compute_dtype": None}  # fmt: skip
    sums = torch.zeros(4, dtype=torch.float64)
    return {
        "squared_norm": {"out": sums[0], "tensors": tensors()},
        "perturb": {"sums": sums, "params": tensors(), "grads": tensors(), **perturbation},
        "combine": {"sums": sums[:3], "firsts": tensors(), "grads": tensors(), "ratio": 0.5},
        "adamw": {"params": tensors(), "masters": [None] * 3, "grads": tensors(), "exp_avgs": tensors(),
                  "exp_avg_sqs": [x.abs() for x in tensors()], "steps": steps, **dict(enumerate(state))},
    }  # fmt: skip


@pytest.mark.parametrize("name", by_op(parameter_passes()))
def test_lists_with_a_missing_tensor_or_of_another_length_are_refused_by_name(backend, device, name):
    run, arguments = backends.primitive(getattr(reference, name), torch.device(device)), parameter_passes()[name]
    run(*arguments.values())
    lists = [key for key, value in arguments.items() if isinstance(value, list)]
    before = [x.clone() for key in lists for x in arguments[key] if isinstance(x, torch.Tensor)]
    for key in lists:
        entries = arguments[key]
        wrong = {f"{key} must hold no None": [entries[0], None, entries[2]]} if key != "masters" else {}
        if len(lists) > 1:
            wrong |= {f"({'|'.join(lists)}) must be as long as": entries[:2]}
        for message, damaged in wrong.items():
            with pytest.raises(ValueError, match=message):
                run(*(arguments | {key: damaged}).values())
    after = [x for key in lists for x in arguments[key] if isinstance(x, torch.Tensor)]
    assert before and all(map(torch.equal, before, after))
