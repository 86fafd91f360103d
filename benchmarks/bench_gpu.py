"""The ops on a CUDA device beside what it replaces: python -m benchmarks.bench_gpu GROUP [--rows R] [--json PATH]

Logits 16384 x 151936 in bfloat16; heads of width 896 and 3584 on the same vocabulary; the regularised AdamW step of 500
million bfloat16 weights. Every timed result is compared with float32 or float64 off the clock. Baselines that are not
installed are left out and named.
"""

import argparse
import importlib
import json
import os
from dataclasses import asdict
from pathlib import Path

import torch
import torch.nn.functional as F

import redit_fast as rf
from benchmarks.common import Candidate, clock, machine, measure, show
from redit_fast import backends

VOCABULARY = 151_936
CONFIG = rf.LossConfig()
CHECKED = 64  # rows whose results are compared


def importable(module, name):
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        print(f"left out: {module}.{name} ({error})")
        return None


def log_softmax_gather(logits, targets):
    return torch.log_softmax(logits.float(), -1).gather(-1, targets[..., None]).squeeze(-1)


def batch(rows, width=None):
    torch.manual_seed(0)
    targets, advantages = torch.randint(VOCABULARY, (rows,), device="cuda"), torch.randn(rows, device="cuda")
    if width is None:
        return torch.empty(rows, VOCABULARY, dtype=torch.bfloat16, device="cuda").normal_(std=3), targets, advantages
    hidden = torch.randn(rows, width, device="cuda").bfloat16()
    weight = (torch.randn(VOCABULARY, width, device="cuda") * 3 / width**0.5).bfloat16()
    return hidden, weight, targets, advantages


def forward(rows):
    logits, targets, _ = batch(rows)
    expected = log_softmax_gather(logits[:CHECKED], targets[:CHECKED])

    def candidate(name, function, tolerance=2e-5, baseline=True):
        def run():
            with clock, torch.no_grad():
                out = function(logits, targets)
            torch.testing.assert_close(out.flatten()[:CHECKED].float(), expected, rtol=0, atol=tolerance)

        return Candidate(name, logits.nbytes, lambda: run, baseline)

    def add():
        with clock:
            total = logits.sum(dtype=torch.float32)
        assert torch.isfinite(total)

    found = [
        candidate("redit-fast", rf.token_logp, baseline=False),
        Candidate("x.sum()", logits.nbytes, lambda: add, True),
        candidate("eager", log_softmax_gather),
        candidate("torch.compile", torch.compile(log_softmax_gather)),
    ]
    if selective := importable("trl.trainer.utils", "selective_log_softmax"):
        found.append(candidate("TRL", selective, tolerance=0.1))
    return found


def gradient(rows):
    logits, targets, advantages = batch(rows)
    exact = logits[:CHECKED].float().requires_grad_()
    loss = -(log_softmax_gather(exact, targets[:CHECKED]) * advantages[:CHECKED]).sum() / rows
    expected = torch.autograd.grad(loss, exact)[0].bfloat16()
    scale = expected.abs().max().item()

    def candidate(name, loss, factor=1.0, inplace=False, baseline=True, tolerance=1e-6):
        def make():
            buffer = torch.empty_like(logits) if inplace else logits

            def run():
                if inplace:
                    buffer.copy_(logits)
                leaf = buffer.detach().requires_grad_()
                with clock:
                    (grad,) = torch.autograd.grad(factor * loss(leaf), leaf)
                torch.testing.assert_close(
                    grad[:CHECKED], factor * expected, rtol=2**-7, atol=factor * tolerance * scale
                )

            return run

        return Candidate(name, 2 * logits.nbytes, make, baseline)

    def ours(inplace):
        return lambda leaf: rf.grpo_loss(leaf, targets, advantages, config=CONFIG, inplace=inplace).loss

    def mean_of(logp):
        return lambda leaf: -(logp(leaf, targets) * advantages).mean()

    found = [
        candidate("redit-fast, in place", ours(True), inplace=True, baseline=False),
        candidate("redit-fast, in place, upstream 8", ours(True), 8.0, inplace=True, baseline=False),
        candidate("redit-fast, fresh", ours(False), baseline=False),
        candidate("torch.compile", torch.compile(mean_of(log_softmax_gather)), tolerance=2e-2),
    ]
    if rows <= 4096:  # three arrays of float32
        found.append(candidate("eager", mean_of(log_softmax_gather), tolerance=2e-2))
    if selective := importable("trl.trainer.utils", "selective_log_softmax"):
        found.append(candidate("TRL", mean_of(selective), tolerance=2e-2))
    if liger := importable("liger_kernel.transformers.grpo_loss", "triton_grpo_loss"):
        found.append(candidate("Liger", liger_loss(liger, targets, advantages), tolerance=2e-2))
    return found


def liger_loss(triton_grpo_loss, targets, advantages):
    """Its kernel leaves out the last logit of a sequence: one more row of them is not read."""

    def loss(leaf):
        padded = F.pad(leaf.unsqueeze(1), (0, 0, 0, 1))
        per_token = triton_grpo_loss(
            padded, None, None, targets[:, None], advantages, beta=0.0, temperature=1.0, inplace=False, reduce=False
        )[0]
        return per_token.mean()

    return loss


def head(rows, width):
    hidden, weight, targets, advantages = batch(rows, width)
    logits = hidden[:CHECKED].double() @ weight.double().t()
    exact = torch.log_softmax(logits, -1).gather(1, targets[:CHECKED, None]).squeeze(1)
    slopes = logits.softmax(-1) * advantages[:CHECKED, None] / rows
    slopes[torch.arange(CHECKED), targets[:CHECKED]] -= advantages[:CHECKED] / rows
    expected = slopes @ weight.double()
    del logits, slopes

    def candidate(name, logp_and_loss, baseline=False, tolerance=1e-5, limit=3e-3):
        def run():
            leaves = [x.detach().requires_grad_() for x in (hidden, weight)]
            with clock:
                logp, loss = logp_and_loss(*leaves)
                dx, dw = torch.autograd.grad(loss, leaves)
            assert (logp[:CHECKED] - exact).abs().max() < tolerance and torch.isfinite(dw[-1]).all()
            assert (dx[:CHECKED].double() - expected).norm() < limit * expected.norm()

        return Candidate(
            name, 2 * (hidden.nbytes + weight.nbytes), lambda: run, baseline, 6 * rows * VOCABULARY * width
        )

    def fused(x, w):
        out = rf.linear_grpo_loss(x, w, targets, advantages, config=CONFIG)
        return out.logp, out.loss

    def of(function):
        def logp_and_loss(x, w):
            logp = function(x, w)
            ratio = torch.exp(logp - logp.detach())
            return logp, -torch.min(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages).mean()

        return logp_and_loss

    def products():
        e = torch.randn(rows, VOCABULARY, device="cuda", dtype=torch.bfloat16)

        def run():
            with clock:
                found = F.linear(hidden, weight), e @ weight, e.t() @ hidden
            assert all(torch.isfinite(product[-1]).all() for product in found)

        return run

    found = [
        candidate("redit-fast", fused),
        candidate("redit-fast, linear_logp", of(lambda x, w: rf.linear_logp(x, w, targets))),
        Candidate("three products", 0, products, True, 6 * rows * VOCABULARY * width),
    ]
    if chunked := importable("trl.kernels", "ChunkedLogProbFunction"):
        size = importable("trl.trainer.utils", "_CHUNKED_LOGPROB_CHUNK_SIZE")

        def trl(x, w):
            return chunked.apply(x, w, None, targets, 1.0, size, None, 1.0, ("log_probs", "entropy"))[0]

        found.append(candidate("TRL", of(trl), True, tolerance=0.5, limit=3e-2))
    return found


def steps(layers):
    """gamma = epsilon: norm, perturb, norm, AdamW, 38 bytes a weight."""
    shapes = [(4096, 4096)] * 4 + [(4096,)] * 2
    torch.manual_seed(0)
    start, g1, g2 = (
        [(torch.randn(shape, device="cuda") * scale).bfloat16() for shape in shapes * layers]
        for scale in (0.02, 1e-4, 1e-4)
    )

    def give(params, grads):
        for p, g in zip(params, grads, strict=True):
            p.grad = g.clone()

    def ours():
        params = [torch.nn.Parameter(p.clone()) for p in start]
        optimizer = rf.RegularizedAdamW(params, lr=1e-3, gamma=0.1, epsilon=0.1)

        def run():
            before = params[0].detach().clone()
            give(params, g1)
            with clock:
                assert optimizer.perturb()
            give(params, g2)
            with clock:
                optimizer.step()
            optimizer.zero_grad()
            assert not torch.equal(params[0], before) and torch.isfinite(params[0]).all()

        return run

    def foreach():
        params = [p.clone().requires_grad_() for p in start]
        copies, masters = [torch.empty_like(p) for p in params], [p.float().requires_grad_() for p in params]
        wide = [torch.empty_like(master) for master in masters]
        optimizer = torch.optim.AdamW(masters, lr=1e-3, weight_decay=0.0, fused=True)

        @torch.no_grad()
        def run():
            before = params[0].clone()
            give(params, g1)
            with clock:
                torch._foreach_copy_(copies, params)
                torch._foreach_add_(params, [p.grad for p in params], alpha=0.1)
            give(params, g2)
            with clock:
                torch._foreach_copy_(params, copies)
                torch._foreach_copy_(wide, [p.grad for p in params])
                for master, grad in zip(masters, wide, strict=True):
                    master.grad = grad
                torch.nn.utils.clip_grad_norm_(masters, 1.0, foreach=True)
                optimizer.step()
                torch._foreach_copy_(params, masters)
            assert not torch.equal(params[0], before) and torch.isfinite(params[0]).all()

        return run

    weights = sum(p.numel() for p in start)
    return [Candidate("RegularizedAdamW", 38 * weights, ours),
            Candidate("torch foreach", 66 * weights, foreach, baseline=True)]  # fmt: skip


GROUPS = {
    "forward": lambda rows: forward(rows),
    "gradient": lambda rows: gradient(rows),
    "head-896": lambda rows: head(rows, 896),
    "head-3584": lambda rows: head(rows, 3584),
    "step": lambda rows: steps(max(1, rows // 2048)),
}


def backend():
    """What REDIT_FAST_BACKEND forces, else the first one that does not refuse."""
    ready = [name for op, name, why in backends.report("cuda") if (op, why) == ("token_loss", "ok")]
    return os.environ.get("REDIT_FAST_BACKEND", ready[0])


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("group", choices=GROUPS)
    parser.add_argument("--rows", type=int, default=16_384)
    parser.add_argument("--json", type=Path, help="also write the results there")
    arguments = parser.parse_args()
    rows = measure(GROUPS[arguments.group](arguments.rows), rounds=11, device="cuda")
    title = f"{arguments.group}, {arguments.rows} rows of {VOCABULARY}, bfloat16, backend {backend()}"
    show(title, rows)
    if arguments.json:
        results = {"machine": machine(), "tables": {title: [asdict(row) for row in rows]}}
        arguments.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
