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

from redit_fast.backends.lists import check_like, check_pairs, check_steps, contiguous, finish
from redit_fast.loss_config import LossConfig
from redit_fast.transforms import LogitTransform

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
    "addmm",
    "squared_norm",
    "perturb",
    "combine",
    "adamw",
)


def why_not(op: str, device: torch.device) -> str | None:
    if op not in _OPS:
        return f"{op} has no C++ version yet"
    if device.type != "cpu":
        return f"computes on CPU tensors only, got {device}"
    return _missing


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
        *(tensor.data_ptr() for tensor in (*outputs, rewards, groups, sample_ids, weights)),
        0 if half_range is None else half_range.data_ptr(),
        *rewards.shape,
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


_TYPES = (torch.float32, torch.bfloat16, torch.float16)
_LEVEL = -1  # instruction set: 0 baseline, 1 AVX2, 2 AVX-512; -1: the best that the processor has


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _matrix(tensor: Tensor | None) -> tuple[int, int, int, int, int]:
    return (0, 0, 0, 1, 1) if tensor is None else (tensor.data_ptr(), *tensor.shape, *tensor.stride())


def _setting(x: Tensor, transform: LogitTransform) -> tuple[int, float, float, float, bool, int, int]:
    temperature, scale, softcap = transform
    inner, outer = (1.0, scale) if softcap is None else (scale / softcap, softcap)
    factors = (scale / temperature, inner, outer / temperature / math.log(2))  # the kernels exponentiate to base 2
    return (_TYPES.index(x.dtype), *factors, softcap is not None, torch.get_num_threads(), _LEVEL)


def token_logp(
    logp: Tensor, entropy: Tensor | None, sums: Tensor, logits: Tensor, targets: Tensor, transform: LogitTransform
) -> None:
    """As `reference.token_logp`; logp and entropy contiguous, so are the rows of sums."""
    targets = targets.contiguous()
    _cpu.token_logp(
        logp.data_ptr(),
        _address(entropy),
        sums.data_ptr(),
        sums.stride(0),
        _matrix(logits),
        targets.data_ptr(),
        _setting(logits, transform),
    )
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
    _cpu.token_logp_grad(
        _matrix(grad_logits),
        _matrix(logits),
        targets.data_ptr(),
        sums.data_ptr(),
        sums.stride(0),
        grad_logp.data_ptr(),
        _address(grad_entropy),
        _address(entropy),
        _setting(logits, transform),
    )
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
        loss.data_ptr(),
        logp.data_ptr(),
        entropy.data_ptr(),
        _matrix(grad_logits),
        _matrix(logits),
        *map(_address, inputs),
        _policy(config),
        1.0 if grad_scale is None else grad_scale.item(),
        _setting(logits, config.transform),
    )
    increment_version((loss, logp, entropy) if grad_logits is None else (loss, logp, entropy, grad_logits))


def scale_in_place(x: Tensor, factor: Tensor) -> None:
    """As `reference.scale_in_place`; x of at most two dimensions."""
    matrix = x.view(1, -1) if x.is_contiguous() else x.unsqueeze(0) if x.ndim == 1 else x
    if matrix.stride(0) == 1:
        matrix = matrix.t()
    _cpu.scale_in_place(_matrix(matrix), factor.item(), _setting(x, LogitTransform()))
    increment_version((x,))


# Of a product tile, rows per thread: 1 MB of float32 a thread. At 512 rows, 32000 x 896 and two threads the products
# take 153 ms; 128 x 2048 a thread 177, all columns at once 270.
TILE_ROWS, TILE_COLUMNS = 256, 1024


_PAIRS = _missing is None and _cpu.has_product()  # bfloat16 products with float32 results


def _multiply(out: Tensor, a: Tensor, b: Tensor, add: bool) -> None:
    if a.dtype == torch.bfloat16:
        _cpu.product(out.data_ptr(), out.stride(0), add, _matrix(a), _matrix(b), torch.get_num_threads())
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
    grad_logp: Tensor | None,
    grad_entropy: Tensor | None,
) -> None:
    """As `reference.exp_product`; logp, entropy and their gradients contiguous, so are the rows of sums and of e."""
    count, vocabulary = len(hidden), len(weight)
    targets, bias = targets.contiguous(), None if bias is None else bias.contiguous()
    pairs = hidden.dtype == torch.bfloat16 and _PAIRS
    x = hidden if pairs else hidden.float()  # torch's 16-bit products round their result
    tile_rows = TILE_ROWS * torch.get_num_threads()
    tile = x.new_empty(min(tile_rows, count) * min(TILE_COLUMNS, vocabulary), dtype=torch.float32)
    widened = None if weight.dtype == x.dtype else x.new_empty(min(TILE_COLUMNS, vocabulary), weight.shape[1])
    setting = _setting(hidden, transform)
    rows = _cpu.HeadRows(targets.data_ptr(), count, vocabulary)
    rows.anchor_at_targets(_matrix(hidden), _matrix(weight), _address(bias), setting)

    def add_tiles(e: Tensor | None, blocks: Iterable[int]) -> None:
        for column in range(0, vocabulary, TILE_COLUMNS):
            columns = weight[column : column + TILE_COLUMNS]
            columns = (columns if widened is None else widened[: len(columns)].copy_(columns)).t()
            for row in blocks:
                part = x[row : row + tile_rows]
                z = tile[: len(part) * columns.shape[1]].view(len(part), -1)
                _multiply(z, part, columns, add=False)
                if bias is not None:  # after the product: sums that start at a large bias lose their bits
                    z += bias[column : column + TILE_COLUMNS]
                rows.add(_matrix(e), _matrix(z), row, column, setting if e is None else _setting(e, transform))

    blocks, with_entropy = range(0, count, tile_rows), grad_entropy is not None
    add_tiles(None if with_entropy else e, blocks)
    broken = rows.repair(tile_rows)
    if broken:
        add_tiles(None if with_entropy else e, broken)
    gradients = (grad_logp, grad_entropy) if with_entropy else (None, None)
    rows.finish(logp.data_ptr(), _address(entropy), sums.data_ptr(), sums.stride(0), *map(_address, gradients), setting)
    written = [logp, sums] if entropy is None else [logp, entropy, sums]
    if e is not None:
        if with_entropy:
            add_tiles(e, blocks)
        rows.store_targets(_matrix(e), _setting(e, transform))
        written.append(e)
    increment_version(written)


# Passes over parameters: tables of (address, dtype) in, one call a pass.

_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3}  # Dtype of csrc/formats.h


def _table(name: str, tensors: list[Tensor | None]) -> list[tuple[int, int]]:
    for tensor in tensors:
        if tensor is None:
            continue
        if tensor.device.type != "cpu":
            raise ValueError(f"{name} must lie on the CPU as the others do, got a tensor on {tensor.device}")
        if tensor.dtype not in _CODES:
            raise NotImplementedError(
                f"{name} of {tensor.dtype}: the cpu backend has float32, bfloat16, float16 and float64; "
                "use_backend('reference') has every dtype"
            )
    return [(0, 0) if tensor is None else (tensor.data_ptr(), _CODES[tensor.dtype]) for tensor in tensors]


def squared_norm(out: Tensor, tensors: list[Tensor]) -> None:
    """As `reference.squared_norm`, to 2.4e-7."""
    tensors = contiguous(tensors)
    numels = [tensor.numel() for tensor in tensors]
    _cpu.squared_norm(out.data_ptr(), _table("tensors", tensors), numels, torch.get_num_threads(), _LEVEL)
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
    check_like("grads", grads, params, wide=False)
    if compute_dtype is not None and compute_dtype not in _CODES:
        raise NotImplementedError(f"compute_dtype {compute_dtype} has no C++ version; use_backend('reference') has it")
    moved, slopes = contiguous(params), contiguous(grads)
    _cpu.perturb(
        sums.data_ptr(),
        _table("params", moved),
        _table("grads", slopes),
        [param.numel() for param in params],
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
    check_pairs(firsts, grads)
    firsts, combined = contiguous(firsts), contiguous(grads)
    _cpu.combine(
        sums.data_ptr(),
        _table("firsts", firsts),
        _table("grads", combined),
        [grad.numel() for grad in grads],
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
    check_like("grads", grads, params, wide=False)
    for name, state in (("masters", masters), ("exp_avgs", exp_avgs), ("exp_avg_sqs", exp_avg_sqs)):
        check_like(name, state, params, wide=True)
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
        [step.data_ptr() for step in steps],
        [param.numel() for param in params],
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
