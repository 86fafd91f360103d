"""The other libraries, each called as its users call it: their functions, defaults and shapes.

Every function here imports its library and gives what is run, or raises Absent with one sentence. Log-probs from
logits: f(logits (B, T, V), targets (B, T)) -> (B, T). Log-probs of the head: f(hidden (B, T, D), weight (V, D),
targets (B, T)) -> (B, T).
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .measure import Absent
from .place import Place

Logp = Callable[..., Tensor]
NEMO_CHUNK = 256  # positions of each sequence: linear_ce_fusion_chunk_size in NeMo RL's settings


def load(package: str, module: str, name: str) -> Any:
    """`module.name` of the package that pip knows as `package`."""
    if importlib.util.find_spec(module.split(".")[0]) is None:
        raise Absent(f"{package} is not installed here")
    logging.disable(logging.WARNING)  # verl says that there is no GPU
    try:
        with warnings.catch_warnings(action="ignore"):
            return getattr(importlib.import_module(module), name)
    except ImportError as error:
        raise Absent(f"{package} does not import here: {str(error).splitlines()[0]}") from error
    except AttributeError as error:
        raise Absent(f"this release of {package} has no {module}.{name}") from error
    finally:
        logging.disable(logging.NOTSET)


def load_for_gpus(place: Place, package: str, module: str, name: str) -> Any:
    """The same of kernels that run on CUDA devices only."""
    if place.kind != "cuda":
        raise Absent("its kernels run on CUDA devices only")
    return load(package, module, name)


def eager(logits: Tensor, targets: Tensor) -> Tensor:
    """Log-probs in float32 by plain PyTorch."""
    return torch.log_softmax(logits.float(), -1).gather(-1, targets[..., None]).squeeze(-1)


def eager_head(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return eager(F.linear(hidden, weight), targets)


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    return -F.cross_entropy(logits.flatten(0, -2), targets.flatten(), reduction="none").view(targets.shape)


def on_policy(logp: Tensor, advantages: Tensor) -> Tensor:
    """The clipped DAPO loss, whose old log-probs are these: its gradient for logp is -advantages / R."""
    ratio = torch.exp(logp - logp.detach())
    return -torch.min(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages).mean()


def trl_logp(place: Place) -> Logp:
    """What GRPOTrainer calls without its fused head; a Triton kernel on GPUs."""
    return load("trl", "trl.trainer.utils", "selective_log_softmax")


def verl_logp(place: Place) -> Logp:
    """verl's padding-free batches are rows of one length; flash-attn's kernel where that is installed."""
    logprobs = load("verl", "verl.utils.torch_functional", "logprobs_from_logits")
    return lambda logits, targets: logprobs(logits.flatten(0, -2), targets.flatten()).view(targets.shape)


def liger_logp(place: Place) -> Logp:
    """Forward only, of logits (B, T + 1, V) as a model gives them: it leaves out the last ones of a sequence."""
    selective = load_for_gpus(place, "liger-kernel", "liger_kernel.ops.grpo_loss", "fused_selective_log_softmax")
    return lambda logits, targets: selective(logits, targets, 1.0, None)


def liger_triton_loss(place: Place) -> Callable[..., Tensor]:
    """f(logits (B, T + 1, V), targets, advantages (B,)) -> loss; in place, its default."""
    of = load_for_gpus(place, "liger-kernel", "liger_kernel.transformers.grpo_loss", "triton_grpo_loss")

    def loss(logits: Tensor, targets: Tensor, advantages: Tensor) -> Tensor:
        return of(logits, None, None, targets, advantages, temperature=1.0, beta=0.0, eps_high=0.2)[0].mean()

    return loss


def quack_logp(place: Place) -> Logp:
    entropy = load_for_gpus(place, "quack-kernels", "quack.cross_entropy", "cross_entropy")

    def logp(logits: Tensor, targets: Tensor) -> Tensor:
        return -entropy(logits.flatten(0, -2), targets.flatten(), reduction="none").view(targets.shape)

    return logp


def trl_head(place: Place) -> Logp:
    """What GRPOTrainer's fused head calls."""
    function = load("trl", "trl.kernels", "ChunkedLogProbFunction")
    chunk = load("trl", "trl.trainer.utils", "_CHUNKED_LOGPROB_CHUNK_SIZE")
    outputs = ("log_probs", "entropy")

    def logp(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        rows = function.apply(hidden.flatten(0, -2), weight, None, targets.flatten(), 1.0, chunk, None, 1.0, outputs)
        return rows[0].view(targets.shape)

    return logp


def liger_chunked_loss(place: Place) -> Callable[..., Tensor]:
    """f(hidden (B, T, D), weight, targets, advantages (B,)) -> loss; one sequence a chunk, its default."""
    loss = load("liger-kernel", "liger_kernel.chunked_loss", "LigerFusedLinearGRPOLoss")(beta=0.0, use_ref_model=False)
    return lambda hidden, weight, targets, advantages: loss(
        hidden, weight, targets, torch.ones_like(targets), advantages
    )[0]


def verl_head(place: Place) -> Logp:
    """use_fused_kernels with the backend torch, its default: 512 rows a chunk."""
    head = load("verl", "verl.utils.experimental.torch_functional", "FusedLinearForPPO")()
    return lambda hidden, weight, targets: head(hidden.flatten(0, -2), weight, targets.flatten())[0].view(targets.shape)


def verl_triton_head(place: Place) -> Logp:
    """use_fused_kernels with the backend triton."""
    head = load_for_gpus(place, "verl", "verl.utils.kernel.linear_cross_entropy", "linear_cross_entropy")
    return lambda hidden, weight, targets: head(hidden, weight, targets)[0].view(targets.shape)


def cut_cross_entropy(place: Place, **options: Any) -> Logp:
    """Gradients below a threshold are left out, its default; with filter_eps=None none is."""
    loss = load_for_gpus(place, "cut-cross-entropy", "cut_cross_entropy", "linear_cross_entropy")
    return lambda hidden, weight, targets: -loss(hidden, weight, targets, reduction="none", **options)


def quack_head(place: Place) -> Logp:
    """Its head that gives a number for each row; the chunked one gives their mean alone."""
    loss = load_for_gpus(place, "quack-kernels", "quack.linear_cross_entropy", "linear_cross_entropy_func")

    def logp(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        rows = loss(hidden.flatten(0, -2), weight, None, targets.flatten(), reduction="none")
        return -rows.view(targets.shape)

    return logp


def unsloth_head(place: Place) -> Logp:
    head = load_for_gpus(place, "unsloth", "unsloth_zoo.fused_losses.fused_linear", "fused_linear_logprobs")

    def logp(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        found = head(hidden, weight, targets)
        return found[0] if isinstance(found, tuple) else found

    return logp


def torch_head(place: Place) -> Logp:
    """F.linear_cross_entropy of torch 2.13, in chunks."""
    loss = load("torch 2.13", "torch.nn.functional", "linear_cross_entropy")
    options = torch.nn.LinearCrossEntropyOptions()

    def logp(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        rows = loss(hidden.flatten(0, -2), weight, targets.flatten(), reduction="none", options=options)
        return -rows.view(targets.shape)

    return logp


def nemo_head(place: Place) -> Logp:
    """NeMo RL's algorithm: it runs inside Megatron's model, so its steps are written here."""
    return _Nemo.apply


class _Nemo(torch.autograd.Function):
    """Chunks of 256 positions of every sequence: the log-softmax of their logits in float32, again in backward."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        ctx.save_for_backward(hidden, weight, targets)
        pieces = zip(hidden.split(NEMO_CHUNK, 1), targets.split(NEMO_CHUNK, 1), strict=True)
        return torch.cat([eager_head(x, weight, t) for x, t in pieces], 1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        hidden, weight, targets = ctx.saved_tensors
        hidden_grad, weight_grad = torch.empty_like(hidden), torch.zeros_like(weight)
        for start in range(0, hidden.shape[1], NEMO_CHUNK):
            part = slice(start, start + NEMO_CHUNK)
            slopes = torch.log_softmax(F.linear(hidden[:, part], weight).float(), -1).exp_().neg_()
            slopes.scatter_add_(-1, targets[:, part, None], torch.ones_like(slopes[..., :1]))
            slopes = slopes.mul_(grad[:, part, None]).to(hidden.dtype)
            hidden_grad[:, part] = slopes @ weight
            weight_grad += slopes.flatten(0, 1).t() @ hidden[:, part].flatten(0, 1)
        return hidden_grad, weight_grad, None


def bare_advantages(rewards: Tensor, group: int) -> Tensor:
    """Rewards (N, K): the sum over K, less its group's mean, over its deviation; nothing else."""
    total = rewards.sum(1).view(-1, group)
    return ((total - total.mean(1, keepdim=True)) / (total.std(1, keepdim=True) + 1e-4)).flatten().float()


def trl_advantages(place: Place, group: int, count: int) -> Callable[[Tensor], Tensor]:
    """f(rewards (N, K) in float32): GRPOTrainer has no function for it; these are the operations between its rewards
    and its advantages, unscored completions and zero deviations included."""
    nanstd = load("trl", "trl.trainer.utils", "nanstd")
    weights = torch.ones(count, device=place.device)

    def advantages(rewards: Tensor) -> Tensor:
        unscored = rewards.isnan().all(1)
        total = (rewards * weights[None]).nansum(1)
        total[unscored] = torch.nan
        grouped = total.view(-1, group)
        mean, std = (x.repeat_interleave(group) for x in (grouped.nanmean(1), nanstd(grouped, dim=1)))
        found = (total - mean) / (std + 1e-4)
        torch.isclose(std, torch.zeros_like(std))
        return found.nan_to_num(nan=0.0)

    return advantages


def verl_advantages(place: Place) -> Callable[[Tensor, Any], Tensor]:
    """f(rewards summed over K (N,), group of each sample as numpy has it) -> (N,): its estimator for GRPO."""
    of = load("verl", "verl.trainer.ppo.core_algos", "compute_grpo_outcome_advantage")

    def advantages(total: Tensor, index: Any) -> Tensor:
        return of(total[:, None].float(), torch.ones_like(total)[:, None], index)[0][:, 0]

    return advantages
