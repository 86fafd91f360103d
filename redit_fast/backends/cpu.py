"""The C++ backend: csrc/ compiled as `redit_fast._cpu`, which links nothing of PyTorch and gets raw pointers.

`_cpu` is compiled for OpenMP but linked to no OpenMP library. Its symbols resolve, when it is loaded, to the runtime
that `import torch` has put into the process (libtorch_global_deps, with RTLD_GLOBAL), so both share one thread pool.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from redit_fast.backends.lists import check_like, check_lists, check_pairs, check_steps, contiguous, finish
from redit_fast.losses.config import LossConfig
from redit_fast.losses.transforms import LogitTransform

try:
    import redit_fast._cpu as _cpu

    _missing = None
except ModuleNotFoundError:
    _missing = (
        "redit_fast._cpu was not built; install a C++17 compiler (g++) and run "
        "`pip install --no-deps --force-reinstall .` in the source folder"
    )
except ImportError as error:
    _missing = f"redit_fast._cpu does not load beside torch {torch.__version__}: {error}"

_OPS = (
    "group_advantages",
    "token_logp",
    "token_logp_grad",
    "token_loss",
    "scale_in_place",
    "exp_product",
    "exp_product_grad",
    "addmm",
    "squared_norm",
    "perturb",
    "combine",
    "adamw",
)
_CODES = {  # Dtype of csrc/formats.h
    torch.float32: 0,
    torch.bfloat16: 1,
    torch.float16: 2,
    torch.float64: 3,
    torch.int64: 4,
    torch.bool: 5,
}
_LEVEL = -1  # instruction set: 0 baseline, 1 AVX2, 2 AVX-512; -1: the best that the processor has


def why_not(op: str, device: torch.device) -> str | None:
    if op not in _OPS:
        return f"{op} has no C++ version yet"
    if device.type != "cpu":
        return f"computes on CPU tensors only, got {device}"
    return _missing


def _tensor(tensor: Tensor | None) -> tuple[int, int, int, int, int, int]:
    """Address, dtype, rows, columns and their strides, for csrc/bindings.h to check; 0s for None; one row for a vector
    or a number."""
    if tensor is None:
        return (0, 0, 0, 0, 0, 0)
    if tensor.device.type != "cpu" or tensor.ndim > 2:
        raise ValueError(
            f"the cpu backend needs tensors of at most two dimensions on the CPU, got {tuple(tensor.shape)} on "
            f"{tensor.device}"
        )
    shape, strides = (1, 1, *tensor.shape), (1, 1, *tensor.stride())
    return (tensor.data_ptr(), _CODES.get(tensor.dtype, -1), *shape[-2:], *strides[-2:])


def group_advantages(
    values: Tensor,
    group_mean: Tensor,
    group_std: Tensor,
    dead: Tensor,
    dithered_mean: Tensor,
    dithered_std: Tensor,
    rewards: Tensor,
    groups: Tensor | None,
    group_size: int | None,
    sample_ids: Tensor | None,
    weights: Tensor,
    half_range: Tensor | None,
    distribution: str,
    seed: int,
    step: int,
    dead_groups: str,
    baseline: str,
    scale: str,
    combine: str,
    eps: float,
    ddof: int,
) -> None:
    """As `reference.group_advantages`, bit for bit; every tensor contiguous."""
    outputs = (values, group_mean, group_std, dead, dithered_mean, dithered_std)
    samples = torch.arange(len(rewards))
    groups = samples // group_size if groups is None else groups
    sample_ids = samples if sample_ids is None else sample_ids
    _cpu.group_advantages(
        *map(_tensor, (*outputs, rewards, groups, sample_ids, weights, half_range)),
        distribution,
        seed,
        step,
        dead_groups,
        baseline,
        scale,
        combine,
        eps,
        ddof,
        torch.get_num_threads(),
    )
    increment_version(outputs)


def _setting(transform: LogitTransform) -> tuple[float, float, float, bool, int, int]:
    temperature, scale, softcap = transform
    inner, outer = (1.0, scale) if softcap is None else (scale / softcap, softcap)
    factors = (scale / temperature, inner, outer / temperature / math.log(2))  # the kernels exponentiate to base 2
    return (*factors, softcap is not None, torch.get_num_threads(), _LEVEL)


def token_logp(
    logp: Tensor, entropy: Tensor | None, sums: Tensor, logits: Tensor, targets: Tensor, transform: LogitTransform
) -> None:
    """As `reference.token_logp`; logp and entropy contiguous, so are the rows of sums."""
    targets = targets.contiguous()
    _cpu.token_logp(*map(_tensor, (logp, entropy, sums, logits, targets)), _setting(transform))
    increment_version((logp, sums) if entropy is None else (logp, entropy, sums))


def token_logp_grad(
    grad_logits: Tensor,
    logits: Tensor,
    targets: Tensor,
    sums: Tensor,
    grad_logp: Tensor,
    grad_entropy: Tensor | None,
    entropy: Tensor | None,
    transform: LogitTransform,
) -> None:
    """As `reference.token_logp_grad`; grad_logp, grad_entropy and entropy contiguous, so are the rows of sums."""
    targets = targets.contiguous()
    rows = targets, sums, grad_logp, grad_entropy, entropy
    _cpu.token_logp_grad(*map(_tensor, (grad_logits, logits, *rows)), _setting(transform))
    increment_version((grad_logits,))


_FORMS = {"cispo": 1, "sapo": 2, "gpg": 3, "reinforce": 3, "dppo_tv": 4, "dppo_kl": 5, "dro": 6}  # else 0: clipped
_KLS = ("k1", "k2", "k3", "abs")
_CORRECTIONS = ("none", "token_truncate", "token_mask")


def _policy(config: LossConfig) -> tuple:
    """PolicyLoss of csrc/policy_loss.h, field by field."""
    return (
        _FORMS.get(config.loss_type, 0),
        _KLS.index(config.kl),
        _CORRECTIONS.index(config.correction),
        config.kl_ratio_correction,
        *config.clip_range,
        math.inf if config.delta is None else config.delta,
        math.inf if config.dual_clip is None else config.dual_clip,
        config.sapo_temperature_pos,
        config.sapo_temperature_neg,
        config.dro_beta or 0.0,
        config.beta,
        *config.correction_range,
    )


def token_loss(
    loss: Tensor,
    logp: Tensor,
    entropy: Tensor,
    grad_logits: Tensor | None,
    logits: Tensor,
    targets: Tensor,
    weights: Tensor,
    advantages: Tensor,
    old_logp: Tensor | None,
    ref_logp: Tensor | None,
    sampling_logp: Tensor | None,
    config: LossConfig,
    grad_scale: Tensor | None,
) -> None:
    """As `reference.token_loss`; the rows' numbers (R,) float32."""
    # held until the call returns: a contiguous copy is read through its address
    rows = (targets, weights, advantages, old_logp, ref_logp, sampling_logp)
    inputs = [None if x is None else x.contiguous() for x in rows]
    _cpu.token_loss(
        *map(_tensor, (loss, logp, entropy, grad_logits, logits, *inputs)),
        _policy(config),
        1.0 if grad_scale is None else grad_scale.item(),
        _setting(config.transform),
    )
    increment_version((loss, logp, entropy) if grad_logits is None else (loss, logp, entropy, grad_logits))


def scale_in_place(x: Tensor, factor: Tensor) -> None:
    """As `reference.scale_in_place`; x of at most two dimensions."""
    matrix = x.view(1, -1) if x.is_contiguous() else x.unsqueeze(0) if x.ndim == 1 else x
    if matrix.stride(0) == 1:
        matrix = matrix.t()
    _cpu.scale_in_place(_tensor(matrix), factor.item(), _setting(LogitTransform()))
    increment_version((x,))


# Of a product tile, rows per thread: 1 MB of float32 a thread. At 512 rows, 32000 x 896 and two threads the products
# take 153 ms; 128 x 2048 a thread 177, all columns at once 270.
TILE_ROWS, TILE_COLUMNS = 256, 1024


_PAIRS = _missing is None and _cpu.has_product()  # bfloat16 products with float32 results


def _multiply(out: Tensor, a: Tensor, b: Tensor, add: bool) -> None:
    if a.dtype == torch.bfloat16:
        _cpu.product(_tensor(out), add, _tensor(a), _tensor(b), torch.get_num_threads())
    elif add:
        out.addmm_(a, b)
    else:
        torch.mm(a, b, out=out)


@torch.no_grad()
def addmm(out: Tensor, a: Tensor, b: Tensor) -> None:
    """As `reference.addmm`; the rows of out contiguous."""
    if not (a.dtype == torch.bfloat16 and _PAIRS):
        a, b = a.float(), b.float()
    _multiply(out, a, b, add=True)
    increment_version(out)


class _Head:
    """A chunk of rows, its product tiles, and `HeadRows` of csrc/linear_loss.h around them."""

    def __init__(self, hidden, weight, bias, targets, transform: LogitTransform):
        self.weight, self.bias, self.setting = weight, None if bias is None else bias.contiguous(), _setting(transform)
        pairs = hidden.dtype == torch.bfloat16 and _PAIRS
        self.x = x = hidden if pairs else hidden.float()  # torch's 16-bit products round their result
        columns, self.tile_rows = min(TILE_COLUMNS, len(weight)), TILE_ROWS * torch.get_num_threads()
        self.blocks = range(0, len(x), self.tile_rows)
        self.tile = x.new_empty(min(self.tile_rows, len(x)) * columns, dtype=torch.float32)
        self.widened = None if weight.dtype == x.dtype else x.new_empty(columns, weight.shape[1])
        targets = targets.contiguous()  # held until HeadRows has copied them
        self.rows = _cpu.HeadRows(_tensor(targets), len(weight))
        self.rows.anchor_at_targets(_tensor(hidden), _tensor(weight), _tensor(self.bias), self.setting)

    def add_tiles(self, e: Tensor | None, blocks: Iterable[int]) -> None:
        for column in range(0, len(self.weight), TILE_COLUMNS):
            columns = self.weight[column : column + TILE_COLUMNS]
            columns = (columns if self.widened is None else self.widened[: len(columns)].copy_(columns)).t()
            for row in blocks:
                part = self.x[row : row + self.tile_rows]
                z = self.tile[: len(part) * columns.shape[1]].view(len(part), -1)
                _multiply(z, part, columns, add=False)
                if self.bias is not None:  # after the product: sums that start at a large bias lose their bits
                    z += self.bias[column : column + TILE_COLUMNS]
                self.rows.add(_tensor(e), _tensor(z), row, column, self.setting)


@torch.no_grad()
def exp_product(
    e: Tensor | None,
    logp: Tensor,
    entropy: Tensor | None,
    sums: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    transform: LogitTransform,
) -> None:
    """As `reference.exp_product`; logp and entropy contiguous, so are the rows of sums and of e."""
    head = _Head(hidden, weight, bias, targets, transform)
    head.add_tiles(e, head.blocks)
    broken = head.rows.repair(head.tile_rows)
    if broken:
        head.add_tiles(e, broken)
    head.rows.finish(_tensor(logp), _tensor(entropy), _tensor(sums), head.setting)
    if e is not None:
        head.rows.store_targets(_tensor(e), head.setting)
    increment_version([x for x in (e, logp, entropy, sums) if x is not None])


@torch.no_grad()
def exp_product_grad(
    e: Tensor,
    sums: Tensor,
    entropy: Tensor | None,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    transform: LogitTransform,
    grad_logp: Tensor,
    grad_entropy: Tensor | None,
) -> None:
    """As `reference.exp_product_grad`, but for rows without a number above 0 as their sum; entropy and the gradients
    contiguous, so are the rows of sums and of e."""
    head = _Head(hidden, weight, bias, targets, transform)
    head.rows.resume(*map(_tensor, (sums, entropy, grad_logp, grad_entropy)), head.setting)
    head.add_tiles(e, head.blocks)
    head.rows.store_targets(_tensor(e), head.setting)
    increment_version(e)


# Passes over parameters: tables of (address, dtype, elements) in, one call a pass.

_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def _table(name: str, tensors: list[Tensor | None]) -> list[tuple[int, int, int]]:
    for tensor in tensors:
        if tensor is None:
            continue
        if tensor.device.type != "cpu":
            raise ValueError(f"{name} must lie on the CPU as the others do, got a tensor on {tensor.device}")
        if tensor.dtype not in _FLOATS:
            raise NotImplementedError(
                f"{name} of {tensor.dtype}: the cpu backend has float32, bfloat16, float16 and float64; "
                "use_backend('reference') has every dtype"
            )
    return [(0, 0, 0) if x is None else (x.data_ptr(), _CODES[x.dtype], x.numel()) for x in tensors]


def squared_norm(out: Tensor, tensors: list[Tensor]) -> None:
    """As `reference.squared_norm`, to 2.4e-7."""
    check_lists(tensors=tensors)
    tensors = contiguous(tensors)  # held until the call returns
    _cpu.squared_norm(_tensor(out), _table("tensors", tensors), torch.get_num_threads(), _LEVEL)
    increment_version(out)


@torch.no_grad()
def perturb(
    sums: Tensor,
    params: list[Tensor],
    grads: list[Tensor],
    offsets: list[int],
    scale: Tensor,
    grad_factor: float,
    rounding: str,
    seed: int,
    step: Tensor,
    compute_dtype: torch.dtype | None,
) -> None:
    """As `reference.perturb`: the parameters bit for bit, the sums to 2.4e-7."""
    check_lists(params=params, grads=grads, offsets=offsets)
    check_like("grads", grads, params, wide=False)
    if compute_dtype is not None and compute_dtype not in _FLOATS:
        raise NotImplementedError(f"compute_dtype {compute_dtype} has no C++ version; use_backend('reference') has it")
    moved, slopes = contiguous(params), contiguous(grads)
    _cpu.perturb(
        _tensor(sums),
        _table("params", moved),
        _table("grads", slopes),
        offsets,
        scale.item(),
        grad_factor,
        rounding == "stochastic",
        seed,
        int(step),
        -1 if compute_dtype is None else _CODES[compute_dtype],
        torch.get_num_threads(),
        _LEVEL,
    )
    increment_version(sums)
    finish(params, moved)
    if grad_factor != 1:
        finish(grads, slopes)


@torch.no_grad()
def combine(sums: Tensor, firsts: list[Tensor], grads: list[Tensor], ratio: float) -> None:
    """As `reference.combine`: the gradients bit for bit, the sums to 2.4e-7; both of one dtype."""
    check_lists(grads=grads, firsts=firsts)
    check_pairs(firsts, grads)
    firsts, combined = contiguous(firsts), contiguous(grads)
    _cpu.combine(
        _tensor(sums),
        _table("firsts", firsts),
        _table("grads", combined),
        ratio,
        torch.get_num_threads(),
        _LEVEL,
    )
    increment_version(sums)
    finish(grads, combined)


@torch.no_grad()
def adamw(
    params: list[Tensor],
    masters: list[Tensor | None],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    steps: list[Tensor],
    factor: Tensor,
    finite: Tensor,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
) -> None:
    """As `reference.adamw`, to the last bit or two of float32."""
    state = {"masters": masters, "exp_avgs": exp_avgs, "exp_avg_sqs": exp_avg_sqs}
    check_lists(optional="masters", params=params, grads=grads, steps=steps, **state)
    check_like("grads", grads, params, wide=False)
    for name, tensors in state.items():
        check_like(name, tensors, params, wide=True)
    check_steps(steps, params, masters)
    written = (params, masters, exp_avgs, exp_avg_sqs)
    work = [contiguous(tensors) for tensors in written]
    grads = contiguous(grads)
    p, master, m, v = map(_table, ("params", "masters", "exp_avgs", "exp_avg_sqs"), work)
    _cpu.adamw(
        p,
        master,
        _table("grads", grads),
        m,
        v,
        _table("steps", steps),
        factor.item(),
        bool(finite),
        lr,
        beta1,
        beta2,
        eps,
        weight_decay,
        torch.get_num_threads(),
        _LEVEL,
    )
    for originals, copies in zip(written, work, strict=True):
        finish(originals, copies)
    increment_version(steps)
