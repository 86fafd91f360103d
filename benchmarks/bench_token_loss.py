"""Log-probs and losses from logits: python -m benchmarks.bench_token_loss, or pytest benchmarks --benchmark-only

1024 rows of a vocabulary of 32000 (small: 128), float32 and bfloat16. Baselines: x.sum(), which reads the same bytes;
TRL 1.16's selective_log_softmax, with 8 sequences as trainers call it and row by row; torch.compile of log_softmax +
gather. The gradient is that of the on-policy loss -mean(A logp).
"""

import pytest
import torch
from trl.trainer.utils import selective_log_softmax

import redit_fast as rf
from benchmarks.common import Candidate, clock, main, measure, show

VOCABULARY, SEQUENCES = 32000, 8
TARGETS = {  # times faster than each baseline, at 1024 rows and two threads
    "redit-fast": {"x.sum()": 1 / 1.7, "TRL (8, R/8, V)": 3, "torch.compile": 1.3},
    "redit-fast, in place": {"TRL (R, V)": 10, "torch.compile": 2.5},
    "redit-fast, fresh": {"TRL (R, V)": 4, "torch.compile": 1.3},
    "redit-fast, bfloat16": {"TRL (8, R/8, V)": 3},
    "redit-fast, in place, bfloat16": {"TRL (R, V)": 8},
}


def log_softmax_gather(logits, targets):
    return torch.log_softmax(logits.float(), -1).gather(-1, targets.unsqueeze(-1)).squeeze(-1)


def batch(rows, dtype):
    generator = torch.Generator().manual_seed(0)
    logits = (torch.randn(rows, VOCABULARY, generator=generator) * 3).to(dtype)
    targets = torch.randint(VOCABULARY, (rows,), generator=generator)
    return logits, targets, torch.randn(rows, generator=generator)


def forward(rows, dtype):
    logits, targets, _ = batch(rows, dtype)
    expected = log_softmax_gather(logits, targets)
    sequences = [x.view(SEQUENCES, rows // SEQUENCES, *x.shape[1:]) for x in (logits, targets)]

    def candidate(name, function, *inputs, tolerance=2e-5, baseline=True):
        def run():
            with clock, torch.no_grad():
                out = function(*inputs)
            torch.testing.assert_close(out.flatten().float(), expected, rtol=0, atol=tolerance)

        return Candidate(name, logits.nbytes, lambda: run, baseline)

    def add():
        with clock:
            total = logits.sum()
        assert torch.isfinite(total)

    suffix = "" if dtype == torch.float32 else ", bfloat16"
    rounded = 2e-5 if dtype == torch.float32 else 0.1  # TRL's bfloat16 log-probs, of up to 25, are rounded to 8 bits
    return [
        candidate("redit-fast" + suffix, rf.token_logp, logits, targets, baseline=False),
        Candidate("x.sum()", logits.nbytes, lambda: add, True),
        candidate("TRL (8, R/8, V)", selective_log_softmax, *sequences, tolerance=rounded),
        candidate("TRL (R, V)", selective_log_softmax, logits, targets, tolerance=rounded),
        candidate("torch.compile", torch.compile(log_softmax_gather), logits, targets),
    ]


def gradient(rows, dtype):
    logits, targets, advantages = batch(rows, dtype)
    exact = logits.float().requires_grad_()
    expected = torch.autograd.grad(-(log_softmax_gather(exact, targets) * advantages).mean(), exact)[0]
    expected = expected.to(dtype)
    del exact
    scale = expected.abs().max().item()

    def candidate(name, loss, tolerance=1e-6, inplace=False, baseline=True):
        def make():
            buffer = torch.empty_like(logits) if inplace else logits

            def run():
                if inplace:
                    buffer.copy_(logits)
                leaf = buffer.detach().requires_grad_()
                with clock:
                    (grad,) = torch.autograd.grad(loss(leaf), leaf)
                torch.testing.assert_close(grad, expected, rtol=2**-7, atol=tolerance * scale)

            return run

        return Candidate(name, 2 * logits.nbytes, make, baseline)

    def ours(inplace):
        return lambda leaf: rf.grpo_loss(leaf, targets, advantages, config=rf.LossConfig(), inplace=inplace).loss

    def mean_of(logp):
        return lambda leaf: -(logp(leaf, targets) * advantages).mean()

    suffix = "" if dtype == torch.float32 else ", bfloat16"
    rounded = 1e-6 if dtype == torch.float32 else 2e-2
    return [
        candidate("redit-fast, in place" + suffix, ours(True), inplace=True, baseline=False),
        candidate("redit-fast, fresh" + suffix, ours(False), baseline=False),
        candidate("TRL (R, V)", mean_of(selective_log_softmax), tolerance=rounded),
        candidate("torch.compile", torch.compile(mean_of(log_softmax_gather)), tolerance=rounded),
    ]


def candidates(rows):
    return {
        f"{way.__name__}, {rows} rows of {VOCABULARY}, {dtype}": way(rows, dtype)
        for way in (forward, gradient)
        for dtype in (torch.float32, torch.bfloat16)
    }


def verdicts(rows):
    """The judged ratios, and for each miss what the bytes alone would take at the speed of the copy beside it."""
    copy = rows[0]
    for row in rows:
        for baseline, target in TARGETS.get(row.name, {}).items():
            if row.ratios[baseline] < target:
                print(
                    f"MISSED: {row.name} {row.ratios[baseline]:.2f} times faster than {baseline}, target {target:.2f}; "
                    f"its bytes take {row.ms * row.of_copy:.1f} ms at the copy's {copy.gb_per_s:.1f} GB/s"
                )


def tables(small):
    results = {}
    for title, group in candidates(128 if small else 1024).items():
        show(title, results.setdefault(title, measure(group, rounds=15)))
        verdicts(results[title])
    return results


SMALL = {f"{title}: {candidate.name}": candidate for title, group in candidates(64).items() for candidate in group}


@pytest.mark.benchmark(timer=clock)
@pytest.mark.parametrize("name", SMALL)
def test_token_loss(benchmark, name):
    benchmark.pedantic(SMALL[name].make(), rounds=5, warmup_rounds=1)
    benchmark.extra_info["GB/s"] = SMALL[name].bytes / benchmark.stats.stats.median / 1e9


if __name__ == "__main__":
    main(tables)
