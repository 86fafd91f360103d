"""What a call writes may have any strides, but no two elements at one address: the sum of their gradients has no place
there."""

import pytest
import torch

import redit_fast as rf
from redit_fast.checks import check_apart

V, ROWS = 13, 5
BACKENDS = ("reference", "cpu")
OVERLAPPING = {
    "windows": lambda: torch.randn(V + ROWS - 1).unfold(0, V, 1),
    "one row expanded": lambda: torch.randn(1, V).expand(ROWS, V),
    "one column expanded": lambda: torch.randn(ROWS, 1).expand(ROWS, V),
    "rows that meet in one element": lambda: torch.randn(ROWS * V).as_strided((ROWS, V), (V - 1, 1)),
}
APART = {
    "dense": lambda: torch.randn(ROWS, V),
    "transposed": lambda: torch.randn(V, ROWS).t(),
    "every other column": lambda: torch.randn(ROWS, 2 * V)[:, ::2],
    "one row expanded to one": lambda: torch.randn(V).expand(1, V),
}


def grpo(logits):
    rows = len(logits)
    return rf.grpo_loss(
        logits, torch.arange(rows), torch.linspace(-1, 1, rows), config=rf.LossConfig(), inplace=True
    ).loss


def grpo_by_sequence(logits):
    config, rows = rf.LossConfig(loss_type="gspo"), len(logits)
    return rf.grpo_loss(logits, torch.arange(rows), torch.linspace(-1, 1, rows), config=config, inplace=True).loss


def logp(logits):
    return rf.token_logp(logits, torch.arange(len(logits)), inplace_backward=True).sum()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("loss", [grpo, grpo_by_sequence, logp])
@pytest.mark.parametrize("kind", OVERLAPPING)
def test_in_place_on_logits_that_share_memory_is_refused_before_anything_is_written(kind, loss, backend):
    logits = OVERLAPPING[kind]()
    before = logits.clone()
    with rf.use_backend(backend), pytest.raises(ValueError, match="^logits is written, so its elements must not share"):
        loss(logits.requires_grad_())
    assert torch.equal(logits, before)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("loss", [grpo, grpo_by_sequence, logp])
@pytest.mark.parametrize("kind", APART)
def test_in_place_on_other_strides_gives_the_gradient_of_a_copy(kind, loss, backend):
    logits = APART[kind]()
    copy = logits.clone(memory_format=torch.contiguous_format).requires_grad_()
    with rf.use_backend(backend):
        loss(copy).backward()
        expected, logits = copy.grad.clone(), logits.requires_grad_()
        (grad,) = torch.autograd.grad(loss(logits), logits)
    torch.testing.assert_close(grad, expected)


def test_an_overlap_is_told_exactly():
    for size, stride, overlap in [
        ((2, 3), (3, 2), False),  # 0 2 4 3 5 7: interleaved
        ((2, 4), (6, 2), True),  # 6 twice
        ((3, 2, 2), (2, 1, 6), False),
        ((3, 2, 2), (2, 1, 5), True),
        ((1, 4), (0, 1), False),
        ((0, 4), (0, 0), False),
        ((2, 2), (0, 1), True),
    ]:
        tensor = torch.zeros(32).as_strided(size, stride)
        addresses = [sum(i * s for i, s in zip(index, stride)) for index in torch.cartesian_prod(
            *(torch.arange(n) for n in size)).tolist()]  # fmt: skip
        assert (len(set(addresses)) < len(addresses)) == overlap
        if overlap:
            with pytest.raises(ValueError, match=r"^x is written"):
                check_apart("x", tensor)
        else:
            check_apart("x", tensor)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("loss_type", ["dapo", "gspo"])
@pytest.mark.parametrize(
    ("name", "grad"),
    [
        ("weight_grad", torch.zeros(1, 4).expand(V, 4)),
        ("weight_grad", torch.zeros(V + 3).unfold(0, 4, 1)),
        ("bias_grad", torch.zeros(1).expand(V)),
    ],
)
def test_a_gradient_to_add_into_that_shares_memory_is_refused(name, grad, loss_type, backend):
    grads = {"weight_grad": torch.zeros(V, 4), "bias_grad": torch.zeros(V), name: grad}
    with rf.use_backend(backend), pytest.raises(ValueError, match=f"^{name} is written, so its elements must not sha"):
        rf.linear_grpo_loss_and_grad_(
            torch.randn(ROWS, 4),
            torch.randn(V, 4),
            torch.arange(ROWS),
            torch.ones(ROWS),
            bias=torch.randn(V),
            config=rf.LossConfig(loss_type=loss_type),
            **grads,
        )
    assert not grad.any()
