"""`redit-fast bench --device cuda` on CPU tensors: every function of a peer that runs on CUDA devices only is replaced
by one of the same arguments in plain PyTorch: python -m tests.project.gpu_twins OUT [SUITE ...]
"""

import sys
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F

from redit_fast.benchmarks import SUITES, command, peers, report
from redit_fast.benchmarks.place import Place


def logp_of(logits, targets):
    return torch.log_softmax(logits.float(), -1).gather(-1, targets[..., None]).squeeze(-1)


def fused_selective_log_softmax(logits, input_ids, temperature=0.9, mask=None):
    assert logits.shape[1] == input_ids.shape[1] + 1 and mask is None
    return logp_of(logits[:, :-1] / temperature, input_ids)


def triton_grpo_loss(logits, old_logp, ref_logp, completion_ids, advantages, temperature=0.9, beta=0.04, eps_high=0.4):
    assert old_logp is None and ref_logp is None and beta == 0 and logits.shape[1] == completion_ids.shape[1] + 1
    logp = logp_of(logits[:, :-1] / temperature, completion_ids)
    ratio = torch.exp(logp - logp.detach())
    return -torch.min(ratio * advantages[:, None], ratio.clamp(0.8, 1 + eps_high) * advantages[:, None]), None, None


def cross_entropy(x, target, reduction="mean"):
    assert x.dim() == 2 and reduction == "none"
    return -logp_of(x, target)


def linear_cross_entropy_func(x, weight, bias, target, reduction="mean"):
    assert bias is None
    return cross_entropy(F.linear(x, weight), target, reduction)


def cce(e, c, targets, reduction="mean", filter_eps="high"):
    assert reduction == "none"
    return -logp_of(F.linear(e, c), targets)


def verl_linear_cross_entropy(hidden, weight, labels, temperature=1.0):
    logits = F.linear(hidden, weight).float()
    return logp_of(logits, labels), torch.distributions.Categorical(logits=logits).entropy()


def fused_linear_logprobs(hidden, weight, targets):
    return logp_of(F.linear(hidden, weight), targets)


def apply_liger_kernel_to_qwen2(rope, rms_norm, swiglu, fused_linear_cross_entropy, model):
    assert fused_linear_cross_entropy and not (rope or rms_norm or swiglu) and model is not None


TWINS = {
    "liger_kernel.ops.grpo_loss.fused_selective_log_softmax": fused_selective_log_softmax,
    "liger_kernel.transformers.grpo_loss.triton_grpo_loss": triton_grpo_loss,
    "liger_kernel.transformers.apply_liger_kernel_to_qwen2": apply_liger_kernel_to_qwen2,
    "quack.cross_entropy.cross_entropy": cross_entropy,
    "quack.linear_cross_entropy.linear_cross_entropy_func": linear_cross_entropy_func,
    "cut_cross_entropy.linear_cross_entropy": cce,
    "verl.utils.kernel.linear_cross_entropy.linear_cross_entropy": verl_linear_cross_entropy,
    "unsloth_zoo.fused_losses.fused_linear.fused_linear_logprobs": fused_linear_logprobs,
}


def load_for_gpus(place, package, module, name):
    assert place.kind == "cuda"
    return TWINS[f"{module}.{name}"]


def main(out, suites):
    peers.load_for_gpus = load_for_gpus
    chosen = {name: partial(command._tables, name) for name in suites}
    out.mkdir(parents=True, exist_ok=True)
    results = command.run(chosen, Place("cuda", torch.device("cpu")), out, "dry")
    report.write(results, out)
    bad = [row for table in results["tables"] for row in table["rows"] if row["status"] != "measured"]
    for row in bad:
        print(f"{row['name']}: {row['note']}")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.argv[2:] or SUITES))
